"""Kills training at random moments and resumes it, again and again, until each run is through; then
compares it with a run that was left alone.

    python tests/crash.py [KILLS]      prints a table; exit status 1 if anything differs
"""

import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
TIMINGS = ("step_seconds", "tokens_per_second")
FLAGS = "--batch_size 4 --epochs 6 --lr 1e-3 --micro_tokens 400 --save_every 1 --eval_every 7"
FILES = ("model.safetensors", "training.safetensors", "tokenizer.json", "config.json")


def metrics(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl without what the clock says."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two run folders and their checkpoints: weights, moments, metrics, to
    the bit."""
    found = [] if metrics(one) == metrics(other) else ["metrics.jsonl"]
    names = [sorted(p.name for p in run.glob("checkpoints/*")) for run in (one, other)]
    found += [] if names[0] == names[1] else ["names of the checkpoints"]
    for inner in ("", *(f"checkpoints/{name}/" for name in names[0])):
        for name in FILES if inner else (FILES[0], *FILES[2:]):
            files = [run / inner / name for run in (one, other)]
            same = (
                all(f.is_file() for f in files) and files[0].read_bytes() == files[1].read_bytes()
            )
            found += [] if same else [f"{inner}{name}"]
    return found


def train_quietly(argv: list[str], log: str) -> None:
    import torch

    import train

    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    torch.set_num_threads(1)
    train.main(argv)


def crash_table(kills: int, folder: Path, seed: int = 0, flags: str = FLAGS) -> dict[str, int]:
    """Kills runs of folder/init and folder/pairs.jsonl; returns what happened, by name."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    context, moment = multiprocessing.get_context("forkserver"), random.Random(seed)
    context.set_forkserver_preload(["torch", "train"])  # so that a start takes no seconds
    init, data = str(folder / "init"), str(folder / "pairs.jsonl")

    def start(out: Path, *more: str):
        out.parent.mkdir(exist_ok=True)
        argv = ["--init", init, "--data", data, "--out", str(out), *flags.split(), *more]
        process = context.Process(target=train_quietly, args=(argv, str(folder / "log")))
        process.start()
        return process

    alone = start(folder / "alone" / "run")  # the first one also starts the server
    alone.join()
    assert alone.exitcode == 0, (folder / "log").read_text()
    names = ("kills", "resumes", "in a write", "runs compared", "failures", "differences")
    counts, runs = dict.fromkeys(names, 0), 0
    while counts["kills"] < kills or runs == 0:
        runs += 1
        out, done = folder / f"killed-{runs}" / "run", False
        while not done:
            again = (out / "train_config.json").is_file()
            counts["resumes"] += again
            process = start(out, *(["--resume"] if again else []))
            wait = moment.uniform(0, 1.5) if counts["kills"] < kills else None
            before = set(out.parent.rglob("*.partial"))
            process.join(wait)
            if process.exitcode is None:
                process.kill()
                process.join()
                counts["kills"] += 1
                counts["in a write"] += not before.issuperset(out.parent.rglob("*.partial"))
            else:
                done = True
                counts["failures"] += process.exitcode != 0
        counts["runs compared"] += 1
        found = differences(folder / "alone" / "run", out)
        counts["differences"] += len(found)
        if found:
            print(f"{out}:", *found, file=sys.stderr)
    return counts


def main() -> None:
    from conftest import PAIR_ROWS, tiny_model, write_rows

    from data import byte_tokenizer

    kills, began = int((sys.argv[1:] or [50])[0]), time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tiny_model().save_pretrained(folder / "init")
        byte_tokenizer().save(folder / "init")
        write_rows(folder / "pairs.jsonl", PAIR_ROWS)
        counts = crash_table(kills, folder)
        for name, count in counts.items():
            print(f"{name:14} {count}")
        if counts["failures"]:
            print((folder / "log").read_text())
    print(f"{time.perf_counter() - began:.0f} s")
    sys.exit(bool(counts["failures"] or counts["differences"]))


if __name__ == "__main__":
    main()
