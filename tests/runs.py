"""What tests of training runs share: how to start one, and what it left behind."""

import contextlib
import io
import json
from pathlib import Path

import train

TIMINGS = ("step_seconds", "tokens_per_second")
FILES = ("model.safetensors", "training.safetensors", "tokenizer.json", "config.json")


def run(init: Path, data: Path, out: Path, *flags: str) -> Path:
    """Trains on a small data file and returns the run folder."""
    command = ["--init", init, "--data", data, "--out", out, "--batch_size", "8", "--lr", "1e-3"]
    return train.main([*map(str, command), "--seed", "1", *flags])


def refused(*argv) -> str:
    """The one line on standard error with which a command line of train.py ends."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            train.main([str(arg) for arg in argv])
            raise AssertionError(f"not refused: {argv}")
        except SystemExit as stop:
            status = stop.code
    error = stderr.getvalue().rpartition("\r")[2]  # without a progress bar
    assert status == 2 and error.startswith("train.py: error: "), error
    assert error.count("\n") == 1 and error.endswith("\n")
    return error


def metrics(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl without what a clock measured."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def differences(one: Path, other: Path) -> list[str]:
    """The files that differ by a bit between two runs and their checkpoints, and metrics.jsonl if
    its metrics differ."""
    found = [] if metrics(one) == metrics(other) else ["metrics.jsonl"]
    names = [sorted(p.name for p in run.glob("checkpoints/*")) for run in (one, other)]
    found += [] if names[0] == names[1] else ["names of the checkpoints"]
    for inner in ("", *(f"checkpoints/{name}/" for name in names[0])):
        for name in FILES if inner else (FILES[0], *FILES[2:]):
            files = [run / inner / name for run in (one, other)]
            contents = [file.read_bytes() if file.is_file() else None for file in files]
            same = contents[0] is not None and contents[0] == contents[1]
            found += [] if same else [f"{inner}{name}"]
    return found
