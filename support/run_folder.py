"""Writes and reads run folders and their checkpoints, from which runs resume exactly. A checkpoint
is a model or adapter folder that also holds training.safetensors, training.json and SHA256SUMS."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from support.cli import check_value, pick_device
from support.files import atomic_write, digest_file, flush_to_disk, read_json, write_json
from support.lora import save_adapter
from support.tokenizers import TOKENIZER_FILES
from support.weights import save_tensors

FILES = ("init", "data", "eval_data")  # may move before a resume, but not change
# Options that a resumed run may change:
MAY_CHANGE = ("epochs", "max_steps", "eval_every", "log_every", "save_every", "keep", "out")
RECORD_KEYS = {"step", "num_tokens", "inputs", "metrics", "options"}  # the keys of training.json
PROVENANCE = ("commit", "versions", "machine")  # keys of train_config.json
RESULTS = ("summary.json", "items.json", "eval.json", "config.json", "model*.safetensors*",
           "adapter", *TOKENIZER_FILES, "*.partial", "checkpoints/*.partial")  # fmt: skip


def check_out(options, sources: list) -> None:
    """Raises ValueError if --out contains one of `sources`, which the run reads, if --out holds
    files but no run, or if it holds a run and neither --resume nor --overwrite is given."""
    folder = Path(options.out)
    for path in filter(None, sources):
        if Path(path).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--out {folder}: contains {path}, which the run reads; change --out")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder}: is a file; choose another name")
    found = [path for path in folder.glob("*") if path.suffix != ".partial"]
    if found and not (folder / "train_config.json").is_file():
        raise ValueError(f"--out {folder}: holds other files, but no run; choose an empty folder")
    if found and not (options.resume or options.overwrite):
        raise ValueError(f"--out {folder}: holds a run; use --resume, --overwrite or another --out")


def begin(options, record: dict) -> None:
    """Removes old results and, unless the run resumes from the checkpoint of `record`, also old
    metrics and checkpoints. Writes train_config.json, whose commit is null without git."""
    folder = Path(options.out)
    for pattern in RESULTS if record else (*RESULTS, "metrics.jsonl", "checkpoints"):
        for path in list(folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if record:
        os.truncate(folder / "metrics.jsonl", record["metrics"]["bytes"])
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True).stdout if shutil.which("git") else b""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    values = commit.decode().strip() or None, versions, machine
    write_json(folder / "train_config.json", recorded(options) | dict(zip(PROVENANCE, values)))


@contextlib.contextmanager
def metrics_log(options):
    """Yields the last row of metrics.jsonl, or {}, and a function that appends a row."""
    with open(Path(options.out) / "metrics.jsonl", "a+", encoding="utf-8") as file:
        file.seek(0)
        last = json.loads(([*file] or ["{}"])[-1])
        yield last, lambda row: print(strict_json(row), file=file, flush=True)


def strict_json(row: dict) -> str:
    """Returns a row as JSON. Infinity and NaN, which JSON lacks, become null."""
    finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(finite, allow_nan=False)


# --- Checkpoints ----------------------------------------------------------------------------------


class Progress(NamedTuple):
    """The state of a run besides its weights. All random numbers follow from the seed and step."""

    step: int
    num_tokens: int
    ref_logps: Tensor | None  # (pairs, 2) log-probs under the reference
    ref_mismatched: Tensor | None  # (pairs, 2) log-probs of job.mismatched under the reference
    start_logps: Tensor  # (held-out pairs, 2) log-probs under the weights of step 0
    moments: dict[str, Tensor]  # AdamW's "exp_avg.NAME", "exp_avg_sq.NAME", "step.NAME"


def checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints of a run folder, the oldest first."""
    found = (p for p in folder.glob("checkpoints/step-*") if re.fullmatch("step-[0-9]+", p.name))
    return sorted(filter(Path.is_dir, found), key=lambda p: int(p.name[5:]))


def newest_checkpoint(folder: Path) -> Path | None:
    return (checkpoints(folder) or [None])[-1]


def recorded(options) -> dict:
    """Returns the options as train_config.json and checkpoints store them."""
    return dataclasses.asdict(options) | {"resume": False, "overwrite": False, "config": None}


def restore_moments(model, optimizer, moments: dict[str, Tensor]) -> None:
    """Restores the state of AdamW from `moments`, which are named as in Progress.moments."""
    for name, moment in moments.items():
        key, path = name.split(".", maxsplit=1)
        parameter = model.get_parameter(path)
        optimizer.state[parameter][key] = moment.to(parameter.device)


def save_checkpoint(job, optimizer, progress: Progress) -> None:
    """Writes a checkpoint of the run, then removes all but the --keep newest checkpoints.
    After a crash, the new checkpoint is complete or absent, and the older checkpoints remain."""
    folder, options, model = Path(job.options.out), job.options, job.model
    states = {name: optimizer.state.get(p, {}) for name, p in model.named_parameters()}
    tensors = {f"moments.{key}.{n}": x for n, state in states.items() for key, x in state.items()}
    refs = {"ref_logps": progress.ref_logps, "ref_mismatched": progress.ref_mismatched}
    tensors |= {name: logps for name, logps in refs.items() if logps is not None}
    tensors["start"] = progress.start_logps
    flush_to_disk(folder / "metrics.jsonl")
    metrics = (folder / "metrics.jsonl").read_bytes()
    hashed = {"bytes": len(metrics), "sha256": hashlib.sha256(metrics).hexdigest()}
    record = {"step": progress.step, "num_tokens": progress.num_tokens, "inputs": job.inputs}
    record |= {"metrics": hashed, "options": recorded(options)}
    checkpoint = folder / "checkpoints" / f"step-{progress.step:06}"
    checkpoint.parent.mkdir(exist_ok=True)
    with atomic_write(checkpoint) as partial:
        if options.lora_rank:
            save_adapter(model, partial, options.init)
        else:
            model.save_pretrained(partial)
            job.tokenizer.save(partial)
        save_tensors(partial / "training.safetensors", tensors)
        write_json(partial / "training.json", record)
        (partial / "SHA256SUMS").write_text("".join(checksums(partial)))
    for old in checkpoints(folder)[: -options.keep]:
        shutil.rmtree(old.rename(old.with_name(f"{old.name}.partial")))


def checksums(checkpoint: Path) -> list[str]:
    """Returns a line for each file of a checkpoint, in the format of sha256sum."""
    files = sorted(file for file in checkpoint.iterdir() if file.name != "SHA256SUMS")
    return [f"{digest_file(file)}  {file.name}\n" for file in files]


def read_record(checkpoint: Path) -> dict:
    """Returns training.json. Raises ValueError that names the file if a file of the checkpoint, or
    a row of metrics.jsonl up to the checkpoint's step, has changed since the run wrote it."""
    remedy = f"remove {checkpoint} to resume from the checkpoint before it"
    sums, found = checkpoint / "SHA256SUMS", set(checksums(checkpoint))
    stored = set(sums.read_text(errors="replace").splitlines(True)) if sums.is_file() else set()
    if changed := {line[66:].strip() for line in stored ^ found}:
        raise ValueError(f"{checkpoint / min(changed)}: does not match {sums}; {remedy}")
    record = read_json(checkpoint / "training.json")
    if record.keys() != RECORD_KEYS or checkpoint.name != f"step-{record['step']:06}":
        raise ValueError(f"{checkpoint / 'training.json'}: is not a record of this step; {remedy}")
    file, metrics = checkpoint.parent.parent / "metrics.jsonl", record["metrics"]
    rows = file.read_bytes()[: metrics["bytes"]] if file.is_file() else b""
    if hashlib.sha256(rows).hexdigest() != metrics["sha256"]:
        raise ValueError(f"{file}: its rows have changed; restore it, or restart with --overwrite")
    return record


def load_progress(job) -> Progress:
    """Reads the state of the run from job.checkpoint."""
    tensors = load_file(job.checkpoint / "training.safetensors")
    moments = {n.removeprefix("moments."): x for n, x in tensors.items() if n[:8] == "moments."}
    refs = tensors.get("ref_logps"), tensors.get("ref_mismatched")
    return Progress(job.record["step"], job.record["num_tokens"], *refs, tensors["start"], moments)


def check_resumed(job) -> None:
    """Raises ValueError if an input has changed, or if the checkpoint is beyond the last step."""
    options, record, stop = job.options, job.record, job.stop
    for name, value in job.inputs.items():
        if value != record["inputs"].get(name):
            flag = name if getattr(options, name) else "data"  # held-out pairs may come from --data
            changed = f"--{flag} {getattr(options, flag)}: has changed since the run started"
            raise ValueError(f"{changed}; restore the input, or start again with --overwrite")
    if options.epochs != record["options"]["epochs"]:
        print(f"--epochs {options.epochs}: the learning-rate schedule now spans {job.steps} steps, "
              f"so the learning rate jumps at step {record['step'] + 1}")  # fmt: skip
    if record["step"] > stop:
        raise ValueError(f"{job.checkpoint}: is beyond step {stop}; raise --epochs or --max_steps")


def resumed_options(flags: dict, cls: type, folder: Path) -> dict:
    """Returns the options of `cls` with which --resume continues the run in `folder`. Raises
    ValueError if there is no such run, if its checkpoint is damaged or if a fixed flag changes."""
    checkpoint, config = newest_checkpoint(folder), folder / "train_config.json"
    if not checkpoint and not config.is_file():
        raise ValueError(f"--resume: there is no run in {folder}; correct --out or omit --resume")
    if not checkpoint and (folder / "summary.json").is_file():
        raise ValueError(f"--resume: {folder} is finished and has no checkpoints; use --overwrite")
    found = read_record(checkpoint)["options"] if checkpoint else read_json(config)
    stored = {f.name: check_value(f, found.get(f.name, f.default)) for f in dataclasses.fields(cls)}
    if "device" in flags:
        flags = flags | {"device": pick_device(flags["device"])}
    moved = [name for name in FILES if stored[name] is not None]
    for name in sorted(flags.keys() - {*MAY_CHANGE, *moved, "resume", "overwrite", "config"}):
        if flags[name] != stored[name]:
            raise ValueError(f"--{name}: the resumed run uses {stored[name]}; leave out --{name}")
    return stored | flags | {"out": str(folder)}


@contextlib.contextmanager
def catch_signals():
    """Yields a list that collects SIGINT and SIGTERM. The second signal ends the process."""
    received: list[int] = []

    def receive(number, _frame):
        if received:
            os._exit(128 + number)
        received.append(number)
        os.write(2, b"\nstopping once the run is saved; a second signal stops at once\n")

    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, receive))
        yield received
