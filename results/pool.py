"""Runs of train.py, two at a time with a thread each; finished ones are not made again."""

import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORKERS = 2


def run(command: list[str]) -> str:
    """One command from the project's folder; what it prints. Raises RuntimeError where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "COLUMNS": "80"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment,
                          capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return done.stdout


def train_all(jobs: dict[str, list[str]]) -> dict[str, dict]:
    """Folder -> flags of train.py; returns folder -> its summary.json and train_config.json."""
    missing = [out for out in jobs if not (ROOT / out / "summary.json").exists()]
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        waiting = {
            pool.submit(run, ["train.py", "--out", out, "--overwrite", *jobs[out]]): out
            for out in missing
        }
        for number, done in enumerate(concurrent.futures.as_completed(waiting), start=1):
            done.result()
            print(f"{number} of {len(missing)}: {waiting[done]}", file=sys.stderr, flush=True)
    return {
        out: {
            name: json.loads((ROOT / out / f"{name}.json").read_text())
            for name in ("summary", "train_config")
        }
        for out in jobs
    }


def provenance(found: dict[str, dict]) -> str:
    """Commit, torch and machine of runs, and how long they took."""
    configs = [one["train_config"] for one in found.values()]
    commits = sorted({(config["commit"] or "unknown")[:12] for config in configs})
    seconds = sum(one["summary"]["seconds"] for one in found.values())
    return (f"commit {', '.join(commits)}, torch {configs[0]['versions']['torch']}, "
            f"{configs[0]['machine']} a run, {WORKERS} runs at a time, {seconds / 60:.0f} minutes "
            "of runs in all")  # fmt: skip
