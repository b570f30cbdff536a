"""Files: strict JSON, rows, whole writes that survive a crash, hashes and locks."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from support import files
from support.files import (
    atomic_write,
    digest,
    digest_file,
    flush_to_disk,
    locked,
    parse_json,
    read_json,
    read_rows,
    write_json,
    write_rows,
)

NOT_JSON = {
    "empty": b"",
    "cut off": b'{"a": 1',
    "NUL": b"\0\0\0\0",
    "bad UTF-8": b'{"a": "\xff"}',
    "deep": b"[" * 200_000,
    "NaN": b'{"a": NaN}',
    "-Infinity": b'{"a": -Infinity}',
    "long number": b'{"a": ' + b"9" * 5000 + b"}",
    "key twice": b'{"a": 1, "a": 2}',
    "inner key twice": b'{"b": [{"a": 1, "a": 1}]}',
    "markup": b"<!DOCTYPE html>",
}


@pytest.mark.parametrize("content", NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_not_strict_json_is_refused_by_name(content, tmp_path):
    with pytest.raises(ValueError, match=r"^here: not valid JSON; correct it \(") as error:
        parse_json(content, "here")
    assert "\n" not in str(error.value)
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"^/.*x\.json: not valid JSON"):
        read_json(tmp_path / "x.json")


def test_json_that_is_not_an_object_is_refused_and_an_object_is_read(tmp_path):
    for content, kind in ((b"[1]", "list"), (b"null", "NoneType"), ("1", "int"), ('"a"', "str")):
        with pytest.raises(ValueError, match=f"^here: expected a JSON object .*, found {kind}$"):
            parse_json(content, "here")
    value = {"a": [1, 2.5, None, True], "b": {"a": "ünïcode\n"}, "c": {}}
    assert parse_json(json.dumps(value), "here") == value
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert (tmp_path / "x.json").read_text().startswith('{\n  "a"')
    with pytest.raises(FileNotFoundError, match=r"gone\.json"):
        read_json(tmp_path / "gone.json")


# --- Rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "compressed.jsonl"])
def test_rows_are_numbered_by_line_and_blank_lines_are_skipped(name, tmp_path):
    content = b'{"a": 1}\n\n  \r\n{"a": "\xc3\xa9"}\n{"b": 2}'
    (tmp_path / name).write_bytes(content if name == "x.jsonl" else gzip.compress(content))
    assert list(read_rows(tmp_path / name)) == [(1, {"a": 1}), (4, {"a": "é"}), (5, {"b": 2})]
    assert list(read_rows(str(tmp_path / name))) == list(read_rows(tmp_path / name))


def test_written_rows_are_read_again(tmp_path):
    rows = [{"a": i, "b": "é\n"} for i in range(3000)]
    write_rows(tmp_path / "x.jsonl", rows)
    assert [row for _, row in read_rows(tmp_path / "x.jsonl")] == rows
    write_rows(tmp_path / "x.jsonl", [])
    assert list(read_rows(tmp_path / "x.jsonl")) == []


def test_a_bad_row_is_refused_by_file_and_line_and_a_broken_archive_by_file(tmp_path):
    file = tmp_path / "x.jsonl"
    for content, message in (
        (b'{"a": 1}\n\n{', ":3: not valid JSON"),
        (b'{"a": 1}\n[1]\n', ":2: expected a JSON object"),
        (b'{"a": 1}\n{"a": "\xff"}', ":2: not valid JSON.*utf-8"),
        (b'{"a": NaN}', ":1: not valid JSON.*NaN"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"x\.jsonl{message}"):
            list(read_rows(file))
    archive = gzip.compress(b'{"a": 1}\n' * 999)
    cut_off, wrong_sum = archive[:-9], archive[:-8] + bytes(8)
    not_deflated = archive[:10] + b"\xff" * (len(archive) - 18) + archive[-8:]
    for content in (cut_off, wrong_sum, not_deflated):
        (tmp_path / "x.jsonl.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.jsonl\.gz: broken gzip file; compress it"):
            list(read_rows(tmp_path / "x.jsonl.gz"))
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        list(read_rows(tmp_path / "gone.jsonl"))


# --- Whole writes ---------------------------------------------------------------------------------


def test_content_is_flushed_before_it_takes_its_name_and_the_folder_afterwards(
    tmp_path, monkeypatch
):
    """The order survives a crash at any moment: fsync of all that was written, the rename, and
    fsync of the folder that holds the new name."""
    events, synced = [], []

    def flush(path):
        flush_to_disk(path)
        assert synced.pop() == os.stat(path).st_ino and not synced
        events.append(("flush", Path(path)))

    def rename(source, target):
        os.rename(source, target)
        events.append(("rename", Path(source), Path(target)))

    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(files, "flush_to_disk", flush)
    monkeypatch.setattr(os, "replace", rename)
    target = tmp_path / "step-2"
    with atomic_write(target) as partial:
        (partial / "inner").mkdir(parents=True)
        for name in ("a", "inner/b"):
            (partial / name).write_text(name)
        assert events == [] and not target.exists()
    *flushed, renamed, last = events
    assert {path for _, path in flushed} == {
        partial, partial / "a", partial / "inner", partial / "inner" / "b",
    }  # fmt: skip
    assert renamed == ("rename", partial, target) and last == ("flush", tmp_path)

    events.clear()
    write_json(tmp_path / "x.json", {})
    (_, inner), (_, source, name), (_, folder) = events
    assert (inner, name, folder) == (source, tmp_path / "x.json", tmp_path)


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_failed_write_leaves_the_old_content_and_nothing_else(is_folder, tmp_path):
    target = tmp_path / "x"
    target.write_text("old")

    def write(partial, error):
        if is_folder:
            partial.mkdir()
        (partial / "a" if is_folder else partial).write_text("half")
        raise error

    for error, kind in (
        (OSError(28, "No space left on device"), OSError),
        (SafetensorError("I/O error: No space left on device"), OSError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):
        with pytest.raises(kind) as raised, atomic_write(target) as partial:
            write(partial, error)
        if kind is OSError:
            assert str(target) in str(raised.value) and "No space left" in str(raised.value)
            assert str(partial) not in str(raised.value)
        assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_a_partial_file_is_named_after_its_target_and_its_process(tmp_path):
    with atomic_write(tmp_path / "x.json") as partial:
        assert partial.name == f"x.json.{os.getpid()}.partial"
        partial.write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


# --- Hashes ---------------------------------------------------------------------------------------


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_digest_depends_on_every_part_and_their_order(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"abc" * 100_000)
    assert digest_file(file) == sha256(file.read_bytes())
    hashes = [sha256(b'{"a": 1}'), sha256(b"raw"), digest_file(file)]
    assert digest({"a": 1}, b"raw", file) == sha256("".join(hashes).encode())
    assert digest(b"abc" * 100_000) == digest(file)
    parts = [(), (1,), ("1",), ([1],), (1, 2), (2, 1), (12,), (b"12", b""), (str(file),), (file,)]
    assert len({digest(*each) for each in parts}) == len(parts)


# --- Locks ----------------------------------------------------------------------------------------


def test_a_lock_is_released_after_success_and_failure(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        with pytest.raises(ValueError, match="another run uses it"), locked(tmp_path):
            pass
        raise KeyError
    for _ in range(2):
        with locked(tmp_path):
            pass


HOLD = """
import sys
sys.path.insert(0, sys.argv[1])
from support.files import locked
with locked(sys.argv[2], wait=sys.argv[3]):
    print("locked", flush=True)
    sys.stdin.readline()
"""


def other_process(folder, wait: str = "") -> subprocess.Popen:
    """A process that locks the folder, says so, and holds the lock until it reads a line."""
    command = [sys.executable, "-c", HOLD, str(Path(files.__file__).parent.parent), str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, wait], **pipes)


def test_a_lock_is_refused_while_another_process_holds_it_and_free_when_it_is_dead(tmp_path):
    folder = tmp_path / "new" / "out"
    other = other_process(folder)
    assert other.stdout.readline() == "locked\n" and folder.is_dir()
    with pytest.raises(ValueError, match=rf"^--out {folder}: another run uses it"), locked(folder):
        pass
    other.kill()
    other.communicate()
    with locked(folder):
        pass


def test_a_process_that_may_wait_says_so_and_gets_the_lock_afterwards(tmp_path, capfd):
    with locked(tmp_path, wait="unused"):
        other = other_process(tmp_path, wait="waiting for it")
        assert other.stdout.readline() == f"{tmp_path}: waiting for it\n"
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(ValueError, match="another run uses it"), locked(tmp_path):
        pass
    other.communicate("\n")
    assert other.returncode == 0 and capfd.readouterr().out == ""
