"""Kills training runs at random file operations and resumes them until each run is finished. Then
compares each run with an uninterrupted one.

    python tests/crash.py [KILLS]      prints a table; exit status 1 if anything differs
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from conftest import PAIR_ROWS, byte_tokenizer, tiny_model, write_rows
from runs import differences

import train

FLAGS = "--batch_size 4 --epochs 6 --lr 1e-3 --micro_tokens 400 --save_every 1 --eval_every 7"
# The file operations that change a folder, as Python's audit events name them. The event of
# os.replace is os.rename.
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


def train_until(argv: list[str], folder: Path, kill_at: int | None) -> int:
    """Trains in a process of its own, which dies before its operation number `kill_at` on files of
    the folder. Returns the exit status, negative after a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    operations = 0

    def count(event: str, args: tuple) -> None:
        nonlocal operations
        opened = event == "open" and str(args[0]).startswith(str(folder))
        if opened or event in CHANGES:
            operations += 1
            if operations == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.addaudithook(count)
    status = 1
    try:
        train.main(argv)
        status = 0
    except BaseException as error:
        os.write(2, repr(error).encode())
    finally:
        os._exit(status)


def crash_table(kills: int, folder: Path, seed: int = 0, flags: str = FLAGS) -> dict[str, int]:
    """Kills runs of folder/init and folder/pairs.jsonl; returns what happened, by name."""
    init, data = str(folder / "init"), str(folder / "pairs.jsonl")
    command, numbers = ["--init", init, "--data", data, *flags.split()], random.Random(seed)
    undisturbed, runs = folder / "undisturbed" / "run", 0
    status = train_until([*command, "--out", str(undisturbed)], folder, None)
    assert status == 0, (folder / "log").read_text()
    names = ("kills", "resumes", "in a write", "runs compared", "failures", "differences")
    counts = dict.fromkeys(names, 0)
    while counts["kills"] < kills or runs == 0:
        runs += 1
        out, status = folder / f"killed-{runs}" / "run", -signal.SIGKILL
        while status == -signal.SIGKILL:
            resume = ["--resume"] if (out / "train_config.json").is_file() else []
            counts["resumes"] += len(resume)
            before = set(out.parent.rglob("*.partial"))
            kill_at = numbers.randrange(1, 300) if counts["kills"] < kills else None
            status = train_until([*command, "--out", str(out), *resume], folder, kill_at)
            counts["kills"] += status == -signal.SIGKILL
            counts["in a write"] += not before.issuperset(out.parent.rglob("*.partial"))
        counts["failures"] += status != 0
        counts["runs compared"] += 1
        found = differences(undisturbed, out)
        counts["differences"] += len(found)
        if found:
            print(f"{out}:", *found, file=sys.stderr)
    return counts


def main() -> None:
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
