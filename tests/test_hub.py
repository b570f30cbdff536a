"""Models by name in the cache of Hugging Face. The oracle is huggingface_hub, which a run does not
need: both read made-up caches, in the layout of the library, and find the same folders."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from conftest import PAIR_ROWS, tiny_model, write_rows
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftConfig
from runs import metrics, refused, run

import data
import eval as evaluation
import train
from support import hub
from support.files import read_json
from support.grid import Grid
from support.tokenizers import byte_tokenizer

OLD, NEW = "a" * 40, "0123456789" * 4  # commits
REVISIONS = [None, "main", "v1.0", "refs/pr/7", OLD, NEW, "none", "b" * 40]


def add_snapshot(cache: Path, commit: str, seed: int = 0, ref: str = "main", name="org/tiny.1"):
    """Adds a model to a cache as the library does: files in blobs/, links to them in snapshots/."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot, blobs = folder / "snapshots" / commit, folder / "blobs"
    for made in (snapshot, blobs):
        made.mkdir(parents=True) if not made.exists() else None
    tiny_model(seed).save_pretrained(blobs / f"new{seed}")
    byte_tokenizer().save(blobs / f"new{seed}")
    for file in (blobs / f"new{seed}").iterdir():
        blob = file.rename(blobs / f"{seed}{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    (blobs / f"new{seed}").rmdir()
    if ref:
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "pairs.jsonl", PAIR_ROWS)
    return tmp_path / "hub"


# --- The folder of a name -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"XDG_CACHE_HOME": "/x"},
        {"HF_HOME": "~/h", "XDG_CACHE_HOME": "/x"},
        {"HF_HOME": "$PLACE/h"},
        {"HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/h"},
        {"HF_HUB_CACHE": "~/$PLACE", "HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/h"},
    ],
)
def test_the_cache_lies_where_the_library_looks_for_it(variables, monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (variables | {"PLACE": "/p", "HOME": "/home/me"}).items():
        monkeypatch.setenv(name, value)
    code = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert str(hub.cache_folder()) == str(Path(found.stdout.strip()))


@pytest.mark.parametrize(
    "revision", [None, "main", "v1.0", "refs/pr/7", OLD, NEW, "none", "b" * 40]
)
def test_a_name_means_the_snapshot_that_the_library_finds(revision, cache):
    add_snapshot(cache, OLD, 0, "v1.0")
    add_snapshot(cache, NEW, 1, "main")
    folder = cache / "models--org--tiny.1" / "refs" / "refs" / "pr"
    folder.mkdir(parents=True)
    (folder / "7").write_text(OLD)
    name = "org/tiny.1" + (f"@{revision}" if revision else "")
    kwargs = {"revision": revision, "cache_dir": cache}
    try:
        expected = huggingface_hub.snapshot_download("org/tiny.1", local_files_only=True, **kwargs)
    except LocalEntryNotFoundError:
        command = f"run: hf download org/tiny.1 --revision {revision}"
        for weights in (True, False):
            with pytest.raises(FileNotFoundError, match=command):
                hub.find(name, weights)
        return
    assert hub.find(name) == hub.find(name, weights=False) == Path(expected)
    file = huggingface_hub.try_to_load_from_cache("org/tiny.1", "config.json", **kwargs)
    assert str(hub.find(name) / "config.json") == file
    repo, *others = huggingface_hub.scan_cache_dir(cache).repos
    assert not others and hub.find(name) in {found.snapshot_path for found in repo.revisions}
    commit = hub.find(name).name
    assert hub.named(hub.find(name)) == f"org/tiny.1@{commit}"


def test_a_local_folder_or_file_wins_and_a_path_is_no_name(cache):
    snapshot = add_snapshot(cache, OLD)
    assert hub.find("org/tiny.1") == snapshot
    Path("org/tiny.1").mkdir(parents=True)
    assert hub.find("org/tiny.1") == Path("org/tiny.1")
    for path in ("tiny.1", "./org", "/org/tiny.1", "../org/tiny.1", "a/b/c", "org/tiny.1@../x", ""):
        assert hub.find(path) == Path(path) and hub.named(path) == path


def test_a_folder_of_another_cache_is_found_in_this_one(cache):
    snapshot = add_snapshot(cache, OLD)
    assert hub.find(f"/elsewhere/models--org--tiny.1/snapshots/{OLD}") == snapshot
    with pytest.raises(FileNotFoundError, match=f"run: hf download org/tiny.1 --revision {NEW}"):
        hub.find(f"/elsewhere/models--org--tiny.1/snapshots/{NEW}")


def test_an_incomplete_snapshot_has_the_same_remedy(cache):
    snapshot = add_snapshot(cache, OLD)
    blob = (snapshot / "model.safetensors").resolve()
    blob.unlink()  # the link stays, as after a download that broke off
    with pytest.raises(
        FileNotFoundError, match="lacks model.safetensors; .*hf download org/tiny.1$"
    ):
        hub.find("org/tiny.1")
    assert hub.find("org/tiny.1", weights=False) == snapshot
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot / "model-1.safetensors").touch()
    (snapshot / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="lacks config.json, model-2.safetensors;"):
        hub.find("org/tiny.1")


def test_the_command_of_the_remedy_exists():
    """The library's own parser reads the command, with and without a revision."""
    hf = Path(sys.executable).with_name("hf")
    text = subprocess.run([hf, "download", "--help"], capture_output=True, text=True).stdout
    assert "hf download" in text and "REPO_ID" in text and "--revision" in text


# --- The commands ---------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(), ("--lora_rank", "2")])
def test_a_run_keeps_its_snapshot_after_the_branch_has_moved(flags, cache, capsys):
    snapshot = add_snapshot(cache, OLD, 0)
    name, rows = Path("org/tiny.1"), Path("pairs.jsonl")
    saved = (*flags, "--save_every", "1", "--eval_fraction", "0.3")
    whole = run(snapshot, rows, Path("out/whole"), *saved)
    part = run(name, rows, Path("out/part"), *saved, "--max_steps", "1")
    assert f"org/tiny.1@{OLD}: " in capsys.readouterr().out
    for file in ("train_config.json", "summary.json"):
        assert hub.named(read_json(part / file)["init"]) == f"org/tiny.1@{OLD}"
    add_snapshot(cache, NEW, 1)
    train.main(["--resume", "--max_steps", "9", "--out", str(part)])
    assert metrics(part) == metrics(whole)
    assert evaluation.main([str(part)])[str(part)] == evaluation.main([str(whole)])[str(whole)]
    error = refused("--resume", "--max_steps", "9", "--out", part, "--init", name)
    assert f"snapshots/{NEW}: has changed since the run started" in error
    train.main(["--resume", "--out", str(part), "--init", f"org/tiny.1@{OLD}"])
    if flags:
        assert PeftConfig.from_pretrained(part / "adapter").base_model_name_or_path == str(snapshot)


def test_a_run_can_be_evaluated_where_the_cache_lies_elsewhere(cache, monkeypatch):
    add_snapshot(cache, OLD)
    part = run(Path("org/tiny.1"), Path("pairs.jsonl"), Path("out/part"), "--eval_fraction", "0.3")
    before = evaluation.main([str(part)])
    cache.rename("moved")
    with pytest.raises(SystemExit):
        evaluation.main([str(part)])
    monkeypatch.setenv("HF_HUB_CACHE", "moved")
    assert evaluation.main([str(part)]) == before


def test_names_of_models_are_compared_and_asked(cache, capsys):
    add_snapshot(cache, OLD, 0)
    add_snapshot(cache, NEW, 1, "v2")
    before = sorted(cache.rglob("*"))
    names = ["org/tiny.1", "org/tiny.1@v2"]
    found = evaluation.main([*names, "--data", "pairs.jsonl"])
    assert [*found] == names and found[names[0]] != found[names[1]]
    same = evaluation.main([f"org/tiny.1@{NEW}", "--data", "pairs.jsonl"])
    assert [*same.values()] == [found[names[1]]]
    capsys.readouterr()
    evaluation.main([*names, "--prompt", "hello", "--max_new_tokens", "3"])
    text = capsys.readouterr().out
    assert "  tiny.1 " in text and "  tiny.1@v2 " in text
    data.main(["pairs.jsonl", "--tokenizer", "org/tiny.1"])
    assert "23 pairs to train on" in capsys.readouterr().out
    assert sorted(cache.rglob("*")) == before


def test_a_plan_needs_config_json_alone(cache, capsys):
    snapshot = add_snapshot(cache, OLD)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(SystemExit) as stop:
        train.main(["--plan", "--init", "org/tiny.1"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("tiny.1: ")


def test_a_grid_over_models_notices_that_a_branch_has_moved(cache):
    add_snapshot(cache, OLD, 0)
    add_snapshot(cache, NEW, 1, "v2")
    grid = Grid({"init": ["org/tiny.1", "org/tiny.1@v2"]}, {"data": "pairs.jsonl"}, Path("grid"), 1)
    before = grid.inputs()
    assert before.keys() == {"org/tiny.1", "org/tiny.1@v2", "pairs.jsonl"}
    assert len({*before.values()}) == 3
    add_snapshot(cache, "b" * 40, 2)  # the branch main moves
    changed = {name for name, value in grid.inputs().items() if value != before[name]}
    assert changed == {"org/tiny.1"}


def test_a_missing_model_is_one_line_and_writes_nothing(cache, capsys):
    Path("models").mkdir()
    shutil.move(add_snapshot(cache, OLD) / "config.json", "models")
    before = sorted(Path().rglob("*"))
    rows = ["--data", "pairs.jsonl", "--out", "out"]
    remedy = "correct the name, or run: hf download "
    assert f"{remedy}some/model\n" in refused("--init", "some/model", *rows)
    assert f"{remedy}a/b --revision v1\n" in refused("--init", "a/b@v1", *rows)
    assert "lacks config.json" in refused("--init", "org/tiny.1", *rows)
    assert f"{remedy}a/b\n" in refused("--init", "a/b,org/tiny.1", *rows)
    assert f"{remedy}a/b\n" in refused("--init", "a/b", "--plan")
    for main, argv in (
        (evaluation.main, ["a/b", "--data", "pairs.jsonl"]),
        (evaluation.main, ["a/b", "--prompt", "x"]),
        (data.main, ["pairs.jsonl", "--tokenizer", "a/b"]),
    ):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2 and capsys.readouterr().err.endswith(f"{remedy}a/b\n")
    assert sorted(Path().rglob("*")) == before
