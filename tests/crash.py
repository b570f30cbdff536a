"""Kills training at random moments and resumes it, again and again, until each run is finished.
Then compares it with a run that nobody killed.

    python tests/crash.py [KILLS]      prints a table; exit status 1 if anything differs
"""

import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parent
FLAGS = "--batch_size 4 --epochs 6 --lr 1e-3 --micro_tokens 400 --save_every 1 --eval_every 7"


def train_quietly(argv: list[str], log: str) -> None:
    import train

    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    train.main(argv)


def crash_table(kills: int, folder: Path, seed: int = 0, flags: str = FLAGS) -> dict[str, int]:
    """Kills runs of folder/init and folder/pairs.jsonl; returns what happened, by name."""
    from runs import differences

    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    context, moment = multiprocessing.get_context("forkserver"), random.Random(seed)
    context.set_forkserver_preload(["runs"])  # imports train.py once, for all processes
    init, data = str(folder / "init"), str(folder / "pairs.jsonl")

    def start(out: Path, *more: str):
        out.parent.mkdir(exist_ok=True)
        argv = ["--init", init, "--data", data, "--out", str(out), *flags.split(), *more]
        process = context.Process(target=train_quietly, args=(argv, str(folder / "log")))
        process.start()
        return process

    undisturbed = folder / "undisturbed" / "run"
    process = start(undisturbed)  # the first start also starts the server
    process.join()
    assert process.exitcode == 0, (folder / "log").read_text()
    names = ("kills", "resumes", "in a write", "runs compared", "failures", "differences")
    counts, runs = dict.fromkeys(names, 0), 0
    while counts["kills"] < kills or runs == 0:
        runs += 1
        out, finished = folder / f"killed-{runs}" / "run", False
        while not finished:
            resume = ["--resume"] if (out / "train_config.json").is_file() else []
            counts["resumes"] += len(resume)
            process = start(out, *resume)
            wait = moment.uniform(0, 1.5) if counts["kills"] < kills else None
            before = set(out.parent.rglob("*.partial"))
            process.join(wait)
            if process.exitcode is None:
                process.kill()
                process.join()
                counts["kills"] += 1
                counts["in a write"] += not before.issuperset(out.parent.rglob("*.partial"))
            else:
                finished = True
                counts["failures"] += process.exitcode != 0
        counts["runs compared"] += 1
        found = differences(undisturbed, out)
        counts["differences"] += len(found)
        if found:
            print(f"{out}:", *found, file=sys.stderr)
    return counts


def main() -> None:
    from conftest import PAIR_ROWS, byte_tokenizer, tiny_model, write_rows

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
