"""The folder of a run: which folders --out may name, and the files that a run keeps in it."""

import contextlib
import json
import math
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from support.checkpoints import recorded
from support.files import write_json, written_whole
from support.tokenizers import TOKENIZER_FILES

PROVENANCE = ("commit", "versions", "machine", "processes")  # keys of train_config.json
RESULTS = ("summary.json", "eval.json", "config.json", "model*.safetensors*", "adapter",
           *TOKENIZER_FILES, "*.partial", "checkpoints/*.partial")  # fmt: skip
PROGRESS = ("metrics.jsonl", "checkpoints", "tensorboard")  # a resumed run continues these


def check_out(options, sources: list) -> None:
    """Raises ValueError if --out holds files of no run, or `sources`, which the run reads."""
    folder = Path(options.out)
    for source in filter(None, sources):
        if Path(source).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--out {folder}: contains {source}, which the run reads; choose "
                             "another folder")  # fmt: skip
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder}: is a file; choose another name")
    if not folder.is_dir() or all(path.suffix == ".partial" for path in folder.iterdir()):
        return
    if not (folder / "train_config.json").is_file():
        raise ValueError(f"--out {folder}: holds other files; choose an empty folder")
    check_free(options)


def check_free(options) -> None:
    """Raises ValueError if --out holds a run, unless --resume or --overwrite is given."""
    folder = Path(options.out)
    if (folder / "train_config.json").is_file() and not (options.resume or options.overwrite):
        finished = (folder / "summary.json").is_file()
        state = "a finished run" if finished else "an unfinished run, which --resume continues"
        raise ValueError(f"--out {folder}: holds {state}; --overwrite replaces it, another --out "
                         "keeps it")  # fmt: skip


def clear(folder: Path, checkpoints: bool) -> None:
    """Removes the results of a run and, with `checkpoints`, also its metrics and checkpoints."""
    for pattern in RESULTS + PROGRESS if checkpoints else RESULTS:
        for path in list(folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def begin(options, record: dict, processes: int) -> None:
    """Prepares the folder for a run from the checkpoint of `record`, which is {} for a new run."""
    folder = Path(options.out)
    clear(folder, checkpoints=not record)
    write_json(folder / "train_config.json", recorded(options) | provenance(processes))
    file = folder / "metrics.jsonl"
    rows = file.read_bytes()[: record["metrics"]["bytes"]] if record else b""
    with written_whole(file) as partial:
        partial.write_bytes(rows)


def provenance(processes: int) -> dict:
    """What the results of a run depend on besides its options. The commit is None without git."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True).stdout if shutil.which("git") else b""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return dict(zip(PROVENANCE, (commit.decode().strip() or None, versions, machine, processes)))


@contextlib.contextmanager
def metrics_log(job):
    """Yields the last row of metrics.jsonl, or {}, and a function that appends a row. --tensorboard
    writes the same rows to event files; it discards events after the step of job.record."""
    if not job.world.first:
        yield {}, lambda row: None
        return
    folder, board = Path(job.options.out), None
    if job.options.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(folder / "tensorboard", purge_step=job.record.get("step", -1) + 1)

    def log(row: dict) -> None:
        print(strict_json(row), file=file, flush=True)
        for name, value in row.items() if board else ():
            board.add_scalar(name, value, row["step"])

    with open(folder / "metrics.jsonl", "a+", encoding="utf-8") as file:
        file.seek(0)
        yield json.loads(([*file] or ["{}"])[-1]), log
    if board:
        board.close()


def strict_json(row: dict) -> str:
    """Returns a row as JSON, with null for infinity and NaN, which JSON does not have."""
    finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(finite, allow_nan=False)
