"""Files: strict JSON, rows of JSONL and Parquet, atomic writes, hashes, a lock on a folder."""

import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path

from safetensors import SafetensorError
from tqdm import tqdm


def parse_json(content: bytes | str, where) -> dict:
    """Parses a JSON object; refuses NaN and repeated keys. A ValueError begins with `where`."""

    def refuse(what):
        raise ValueError(f"{what} is not allowed")

    def unique_keys(items):
        value = dict(items)
        return value if len(value) == len(items) else refuse(f"a double key in {list(value)!s:.60}")

    try:
        value = json.loads(content, parse_constant=refuse, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON; correct it ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object {{...}}, found {type(value).__name__}")
    return value


def read_json(path: Path) -> dict:
    return parse_json(path.read_bytes(), path)


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON object, with null for NaN and infinity, which JSON lacks."""
    finite = json.loads(json.dumps(value), parse_constant=lambda constant: None)
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(finite, indent=2) + "\n", encoding="utf-8")


def read_rows(path):
    """Yields the line number (Parquet: row number) and the dict of each row of a data file, except
    blank lines. Raises OSError, or a ValueError that names the path and, for a bad row, the line.
    """
    bar = {"desc": f"reading {path}", "unit": "B", "unit_scale": True, "leave": False,
           "delay": 1, "disable": None}  # fmt: skip
    with open(path, "rb") as raw, tqdm(total=os.path.getsize(path), **bar) as progress:
        if raw.peek(4)[:4] == b"PAR1" or Path(path).suffix == ".parquet":
            yield from _parquet_rows(path)
            return
        lines = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
        try:
            for number, line in enumerate(lines, start=1):
                if not line.isspace():
                    yield number, parse_json(line, f"{path}:{number}")
                progress.update(raw.tell() - progress.n)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: broken gzip file; compress it again ({error})") from None


def _parquet_rows(path):
    """Yields what `read_rows` yields, without the nulls that Arrow writes for missing keys."""
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError:
        raise ValueError(f"{path}: Parquet needs pyarrow; pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(path)
        # Python cannot represent every date, and no column of dates is used.
        names = [x.name for x in file.schema_arrow if not types.is_temporal(x.type)]
        rows = (r for b in file.iter_batches(1000, columns=names) for r in b.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield number, {k: without_nulls(x) for k, x in row.items()}
    except (OSError, ValueError, ArrowException) as error:
        raise ValueError(f"{path}: broken Parquet file; write it again ({error})") from None


def without_nulls(value):
    """Returns a JSON value without the keys of objects, at any depth, whose value is null."""
    if isinstance(value, dict):
        return {k: without_nulls(x) for k, x in value.items() if x is not None}
    return [without_nulls(x) for x in value] if isinstance(value, list) else value


def write_rows(path: Path, rows: list[dict]) -> None:
    with atomic_write(path) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@contextlib.contextmanager
def atomic_write(path: Path):
    """Yields a temporary path for a file or folder to write, then flushes it to disk and renames it
    to `path`, so that a crash leaves `path` complete or unchanged. An OSError names `path`."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        for file in (*partial.rglob("*"), partial):
            flush_to_disk(file)
        os.replace(partial, path)
        flush_to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)


def flush_to_disk(path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def digest(*parts) -> str:
    """Returns a SHA-256 (hex) over all parts in order: bytes, files (as Path) or JSON values."""
    parts = [p if isinstance(p, bytes | Path) else json.dumps(p).encode() for p in parts]
    sums = [digest_file(p) if isinstance(p, Path) else hashlib.sha256(p).hexdigest() for p in parts]
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def digest_file(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(folder, wait: str = ""):
    """Creates a folder if necessary and locks it until the context or the process ends. If another
    process has the lock, prints `wait` and waits for it, or raises ValueError if `wait` is ""."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        handle = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise ValueError(f"--out {folder}: another run uses it; change --out") from None
            print(f"{folder}: {wait}", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
