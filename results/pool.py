"""Functions with which the scripts in this folder run train.py and read the results.

Two runs, of one thread each, run at the same time. Finished runs are not repeated. The command
`python results/pool.py FOLDER` grades the greedy answers of the checkpoint in FOLDER to 1,000
validation problems and 1,000 test problems, and writes graded.json into FOLDER.
"""

import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # so that scripts can import the project's modules
WORKERS, SEEDS = 2, (0, 1, 2, 3, 4)
COLORS = {"dpo": "#D55E00", "mio": "#0072B2"}  # from the palette of Okabe and Ito


def run(command: list[str]) -> str:
    """Runs a Python command in the project's folder and returns its standard output. Raises
    RuntimeError if the command fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "COLUMNS": "80"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment,
                          capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed; fix this error:\n{done.stderr[-2000:]}")
    return done.stdout


def train_all(jobs: dict[str, list[str]], script: str = "train.py", grade: bool = False) -> dict:
    """Makes the runs that do not exist yet. `jobs` maps run folders to flags of `script`, which is
    train.py or extends train.py. With `grade`, each run is also graded. Returns a dict from each
    run folder to {"summary": ..., "train_config": ...}, the contents of these two JSON files."""

    def make(out: str) -> None:
        if not (ROOT / out / "summary.json").exists():
            run([script, "--out", out, "--overwrite", *jobs[out]])
        if grade:
            graded(out)

    ends = ["summary.json", "graded.json"][: 1 + grade]
    missing = [out for out in jobs if not all((ROOT / out / end).exists() for end in ends)]
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        waiting = {pool.submit(make, out): out for out in missing}
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


def bases() -> dict[int, str]:
    """Returns a dict from each seed to the folder with the demonstration's base model and pairs for
    this seed. If a folder is missing, a run with mio makes it."""
    train_all({f"out/demonstration/seed{s}/mio": ["--loss", "mio", "--seed", str(s)]
               for s in SEEDS})  # fmt: skip
    return {s: f"out/demonstration/seed{s}/base" + (f"-seed{s}" if s else "") for s in SEEDS}


def first(file: str, count: int) -> str:
    """Copies the first `count` lines of `file` to a new file in the same folder, unless the copy
    exists. Returns the path of the copy."""
    path = ROOT / file
    few = path.with_name(f"{path.stem}-{count}.jsonl")
    if not few.exists():
        lines = path.read_text(encoding="utf-8").splitlines(True)[:count]
        few.write_text("".join(lines), encoding="utf-8")
    return str(few.relative_to(ROOT))


def on_pairs(base: str, count: int, seed: int, **flags) -> list[str]:
    """Returns the flags of a run that trains on the first `count` pairs in the folder `base`. The
    run starts from a copy of the base model in base/start. The copy lacks base.json, because
    train.py would otherwise spend time on the demonstration's evaluation after each run."""
    start = ROOT / base / "start"
    if not start.exists():
        start.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / base / name, start)
    flags = {"init": f"{base}/start", "data": first(f"{base}/pairs.jsonl", count),
             "eval_data": f"{base}/heldout_pairs.jsonl", "eval_every": 1000, "max_length": 96,
             "batch_size": 64, "seed": seed} | flags  # fmt: skip
    return [str(x) for name, value in flags.items() for x in (f"--{name}", value)]


def graded(folder: str) -> dict[str, np.ndarray]:
    """Returns a dict from "validation" and "test" to arrays (1000,), which are 1 where the
    checkpoint's greedy answer is right and 0 elsewhere. Makes graded.json if it is missing."""
    file = ROOT / folder / "graded.json"
    if not file.exists():
        run(["results/pool.py", folder])
    return {name: np.array(values) for name, values in json.loads(file.read_text()).items()}


def metric(folder: str, name: str) -> tuple[list[int], list[float]]:
    """Returns the steps at which metrics.jsonl has a value of the metric `name`, and the values."""
    rows = [json.loads(line) for line in (ROOT / folder / "metrics.jsonl").read_text().splitlines()]
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def moved(folder: str, side: str) -> tuple[list[int], list[float]]:
    """Returns the steps of the evaluations and, at each of these steps, how far the mean log-prob
    of the held-out chosen or rejected answers (`side`) has moved since step 0, in nats."""
    steps, values = metric(folder, f"eval_logps/{side}")
    return steps, [value - values[0] for value in values]


def spread(values: list[float], digits: int = 2, sign: str = "+") -> str:
    """Formats `values`, which holds one value for each seed, as "mean (lowest, highest)"."""
    one = f"{{:{sign}.{digits}f}}".format
    return f"{one(np.mean(values))} ({one(min(values))}, {one(max(values))})"


def provenance(found: dict[str, dict]) -> str:
    """Returns a text with the commits, torch version, machine and total time of the runs."""
    configs = [one["train_config"] for one in found.values()]
    commits = sorted({(config["commit"] or "unknown")[:12] for config in configs})
    seconds = sum(one["summary"]["seconds"] for one in found.values())
    return (f"commit{'s' if len(commits) > 1 else ''} {' and '.join(commits)}, "
            f"torch {configs[0]['versions']['torch']}, {configs[0]['machine'].split(',')[0]}, "
            f"1 thread a run,\n{WORKERS} runs at a time; the times of all runs add up to "
            f"{seconds / 60:.0f} minutes")  # fmt: skip


def main() -> None:
    import torch

    from support.builtin_task import is_correct, problems
    from support.sampling import sample_answers
    from support.trained_run import load_checkpoint

    folder = ROOT / sys.argv[1]
    model, tokenizer = load_checkpoint(folder, "cpu", torch.float32)
    right = {}
    for split, seed in (("validation", 1), ("test", 0)):
        asked = problems(split, 1000, seed=seed)
        answers = sample_answers(model, tokenizer, asked, temperature=0)
        right[split] = [int(is_correct(q, a)) for q, (a,) in zip(asked, answers)]
    (folder / "graded.json").write_text(json.dumps(right))


if __name__ == "__main__":
    main()
