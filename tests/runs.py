"""Helpers that tests of training runs share: they start a run and read the files that it wrote."""

import contextlib
import io
import json
from pathlib import Path

import torch
from conftest import PAIR_ROWS, tiny_model, write_rows

import train
from support.run_options import make_options, read_flags
from support.tokenizers import byte_tokenizer

torch.set_num_threads(1)  # more threads do not speed up such small models

TIMINGS = ("step_seconds", "tokens_per_second")
# Files that hold timings, or names of folders.
DESCRIPTIONS = ("metrics.jsonl", "summary.json", "train_config.json", "training.json", "SHA256SUMS")


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """Writes a tiny checkpoint to folder/init and small data to folder/pairs.jsonl."""
    tiny_model().save_pretrained(folder / "init")
    byte_tokenizer().save(folder / "init")
    return folder / "init", write_rows(folder / "pairs.jsonl", PAIR_ROWS)


def run(init: Path, data: Path, out: Path, *flags: str) -> Path:
    """Trains on a small data file and returns the run folder."""
    command = ["--init", init, "--data", data, "--out", out, "--batch_size", "8", "--lr", "1e-3"]
    return train.main([*map(str, command), "--seed", "1", *flags])


def parse_options(argv: list[str]):
    """The options that a command line of train.py means. Bad input ends as in train.main."""
    parser, flags = read_flags(argv, train.Options, "")
    try:
        return make_options(flags, train.Options)
    except (OSError, ValueError) as error:
        parser.error(error)


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
    assert error.count("\n") == 1 and error.endswith("\n"), error
    return error


def metrics(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl without the measured times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def differences(one: Path, other: Path) -> list[str]:
    """The files that only one of two run folders has or that differ between them. Of metrics.jsonl,
    only the metrics are compared."""
    names = [
        {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()} for run in (one, other)
    ]
    assert "model.safetensors" in names[0] & names[1]
    found = [] if metrics(one) == metrics(other) else ["metrics.jsonl"]
    for name in sorted(names[0] & names[1]):
        if Path(name).name not in DESCRIPTIONS:
            found += [] if (one / name).read_bytes() == (other / name).read_bytes() else [name]
    return found + sorted(names[0] ^ names[1])
