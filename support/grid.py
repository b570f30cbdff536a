"""Runs a grid: one run of train.py for each combination of the flags that have several values.
Imports mio.py."""

import dataclasses
import importlib.util
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from mio import find_loss
from support import curves
from support.cli import check_value
from support.figures import Row, over_seeds, paired_difference, read_columns, table
from support.files import digest_file, locked, read_json, write_json
from support.hub import find
from support.run_folder import catch_signals, newest_checkpoint
from support.run_options import LOSS_FLAGS, make_options
from support.weights import hash_model

TRAIN = Path(__file__).parent.parent / "train.py"
ONE_VALUE = ("out", "config", "gpu", "device", "jobs")  # flags that cannot vary
REFUSED = ("resume", "overwrite", "plan")  # a grid goes on by itself
MAX_RUNS = 1000


class Run(NamedTuple):
    """A run of a grid."""

    folder: Path
    setting: str  # the values of the flags that vary, except the seed
    seed: int
    flags: dict  # name -> value


class Grid(NamedTuple):
    """The flags of a grid's command."""

    axes: dict[str, list]  # the flags that vary -> their values, two or more
    fixed: dict  # the other flags
    out: Path
    jobs: int  # number of runs at a time

    def command(self) -> str:
        flags = self.axes | self.fixed | {"jobs": self.jobs, "out": self.out}
        return shlex.join(["python", "train.py", *arguments(flags)])

    def runs(self) -> list[Run]:
        """Returns the runs; the seed varies fastest. A run leaves out flags that its loss does not
        use, so that --beta may vary in a grid of --loss mio,sft."""
        names = [name for name in self.axes if name != "seed"] + ["seed"] * ("seed" in self.axes)
        found: dict[Path, Run] = {}
        for values in product(*map(self.axes.get, names)):
            flags = self.fixed | dict(zip(names, values))
            if "loss" in self.axes:
                unused = LOSS_FLAGS - find_loss(flags["loss"]).flags
                flags = {name: value for name, value in flags.items() if name not in unused}
            parts = {n: f"{n}={flags[n]}".replace(os.sep, "_") for n in names if n in flags}
            folder = self.out / ",".join(parts.values())
            setting = ",".join(part for name, part in parts.items() if name != "seed")
            setting = setting.removeprefix("loss=") or "all"
            run = Run(folder, setting, int(flags.get("seed", 0)), flags)
            if found.setdefault(folder, run) != run or len(folder.name.encode()) > 240:
                raise ValueError(f"{folder.name}: the name of two runs, or too long; rename files")
        return list(found.values())

    def inputs(self) -> dict[str, str]:
        """Returns hashes of the files that the runs read. Raises OSError if one is missing."""
        flags = {name: [value] for name, value in self.fixed.items()} | self.axes
        given = {n: flags[n] for n in ("init", "data", "eval_data", "config") if n in flags}
        paths = {p: find(p) if n == "init" else Path(p) for n, each in given.items() for p in each}
        return {p: hash_model(x) if x.is_dir() else digest_file(x) for p, x in paths.items()}


def arguments(flags: dict) -> list[str]:
    """Returns flags as arguments of a command; a list of values is separated by commas."""
    found = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        found += [f"--{name}"] if value is True else [f"--{name}", ",".join(map(str, values))]
    return found


def find_grid(flags: dict, options: type) -> Grid | None:
    """Returns the grid that the flags of a command describe, or None if no flag has several values.
    Raises ValueError for an empty or repeated value and for a flag that cannot vary."""
    axes, fields = {}, {field.name: field for field in dataclasses.fields(options)}
    for name, field in fields.items():
        text = flags.get(name)
        several = isinstance(text, str) and "," in text and not os.path.exists(text)
        # Some flags take lists, and a path may contain a comma, as those of a grid's runs do.
        if not several or name in ("lora_targets", "columns", "chat_template_kwargs"):
            continue
        if name in ONE_VALUE:
            raise ValueError(f"--{name} {text}: takes one value; write it without a comma")
        parts = text.split(",")
        axes[name] = [check_value(field, part) for part in parts if part]
        if len({*axes[name]}) < len(parts):
            raise ValueError(f"--{name} {text}: a value is empty or repeated; remove it")
    if not axes:
        return None
    fixed = {n: check_value(fields[n], value) for n, value in flags.items() if n not in axes}
    for name in fixed.keys() & {*REFUSED}:
        raise ValueError(f"--{name}: a grid goes on by itself where it stopped; leave out --{name}")
    jobs, out = fixed.pop("jobs", 1), Path(fixed.pop("out", "out/grid"))
    return Grid(axes, fixed, out, jobs)


def run_grid(grid: Grid, options: type) -> Path:
    """Makes the runs that are not finished, writes grid.json, grid.md and, with matplotlib,
    grid.png, and returns the folder. Raises ValueError, before any run starts, for flags that a run
    refuses and for a folder that holds something else. Exits with status 1 if a run fails."""
    runs = grid.runs()
    if len(runs) > MAX_RUNS:
        raise ValueError(f"the grid has {len(runs)} runs, but may have {MAX_RUNS}; remove values")
    for run in runs:
        make_options(run.flags | {"out": str(run.folder)}, options)
    for name in grid.fixed.keys() | grid.axes.keys():
        if not any(name in run.flags for run in runs):
            raise ValueError(f"--{name}: no loss of the grid uses it; leave out --{name}")
    out, file = grid.out, grid.out / "grid.json"
    flags = {"axes": grid.axes, "fixed": grid.fixed, "inputs": grid.inputs()}
    if file.is_file() and any(out.glob("*/summary.json")):
        old = {"axes": {}, "inputs": {}} | read_json(file)
        kept = all({*values} <= {*grid.axes.get(name, ())} for name, values in old["axes"].items())
        if old.get("fixed") != grid.fixed or old["axes"].keys() != grid.axes.keys() or not kept:
            raise ValueError(f"--out {out}: holds another grid ({file}); choose another --out")
        for path in old["inputs"].keys() & flags["inputs"].keys():
            if old["inputs"][path] != flags["inputs"][path]:
                raise ValueError(f"{path}: has changed since the grid started; change --out")
    elif not file.is_file() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: holds other files, but no grid; choose an empty folder")
    with locked(out), catch_signals() as signals:
        write_json(file, flags)
        failed = make_runs(grid, runs, signals)
        if signals:
            print(f"stopped; the same command continues the grid: {grid.command()}")
            sys.exit(128 + signals[0])
        finished = [run for run in runs if run.folder not in failed]
        if not finished:
            sys.exit(1)
        rows, seeds = summarize(finished)
        text = f"`{grid.command()}`\n\n{table(rows, markdown=True, seeds=seeds)}\n"
        (out / "grid.md").write_text(text, encoding="utf-8")
        cells = {name: {c: cell._asdict() for c, cell in row.items()} for name, row in rows.items()}
        write_json(file, flags | {"runs": [str(r.folder) for r in finished], "rows": cells})
        print(f"\n{table(rows, seeds=seeds)}")
        settings = dict.fromkeys(run.setting for run in finished)
        groups = {s: [run.folder for run in finished if run.setting == s] for s in settings}
        if importlib.util.find_spec("matplotlib"):
            curves.plot(groups, out / "grid.png")
    if failed:
        sys.exit(1)
    return out


def make_runs(grid: Grid, runs: list[Run], signals: list[int]) -> dict[Path, str]:
    """Makes the runs, `grid.jobs` at a time. Returns the last line of each run that failed."""
    left = [run for run in runs if not (run.folder / "summary.json").is_file()]
    sizes = ", ".join(f"{len(values)} of --{name}" for name, values in grid.axes.items())
    print(f"{len(runs)} runs ({sizes}) in {grid.out}; {len(runs) - len(left)} are finished")
    env, failed = dict(os.environ), {}
    if grid.jobs > 1:
        env["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // grid.jobs))
    bar = {"total": len(runs), "initial": len(runs) - len(left), "unit": "run", "disable": None}
    with ThreadPoolExecutor(grid.jobs) as pool, tqdm(**bar) as progress:
        futures = {pool.submit(_make_run, run, env, signals): run for run in left}
        for done, future in enumerate(as_completed(futures), start=1):
            run, (seconds, error) = futures[future], future.result()
            if signals:
                continue
            progress.update()
            failed |= {run.folder: error} if error else {}
            tqdm.write(f"  {run.folder.name}: {error or f'{seconds:.0f} s'}")
            if done == 1 < len(left):
                rest = len(left) - 1
                minutes = seconds * rest / grid.jobs / 60
                tqdm.write(f"  the rest ({rest} of {len(left)}) takes about {minutes:.1f} min")
    return failed


def _make_run(run: Run, env: dict[str, str], signals: list[int]) -> tuple[float, str]:
    """Makes or resumes a run in a process of its own, whose output goes to a file. After a signal,
    the run saves a checkpoint and stops. Returns its seconds and, if it failed, its last line."""
    start, wait = time.monotonic(), "waiting for this run, which an earlier command started"
    if signals:
        return 0.0, ""
    with locked(run.folder, wait):
        how = {"resume": True} if newest_checkpoint(run.folder) else run.flags | {"overwrite": True}
    if (run.folder / "summary.json").is_file():
        return 0.0, ""
    command = [sys.executable, str(TRAIN), *arguments(how | {"out": run.folder})]
    file = run.folder.with_name(f"{run.folder.name}.log")
    with open(file, "wb") as log:  # in a session of its own, the run does not receive Ctrl-C
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    while process.poll() is None and not signals:
        time.sleep(0.1)
    if process.poll() is None:
        process.terminate()
    failed = process.wait() and not signals
    if failed:  # if the earlier command's run was still starting, it may have taken the lock since
        with locked(run.folder, wait):
            failed = not (run.folder / "summary.json").is_file()
    return time.monotonic() - start, file.read_text().strip().split("\n")[-1] if failed else ""


def summarize(runs: list[Run]) -> tuple[dict[str, Row], int]:
    """Returns a table's rows and the largest number of seeds of a row. A setting's row holds means
    over seeds; its difference from the first setting is paired over the seeds of both."""
    found: dict[str, dict[int, dict]] = {}  # setting, or "base" -> seed -> column's name -> Column
    for run in runs:
        for name, columns in read_columns(run.folder / "items.json").items():
            found.setdefault(name if name == "base" else run.setting, {})[run.seed] = columns
    rows, settings = {}, [setting for setting in found if setting != "base"]
    for setting, seeds in found.items():
        names = dict.fromkeys(name for columns in seeds.values() for name in columns)
        estimates = {n: [c[n].estimate() for c in seeds.values() if n in c] for n in names}
        rows[setting] = {name: over_seeds(each) for name, each in estimates.items()}
    for setting in settings[1:]:
        first, of_first = settings[0], found[settings[0]]
        both = [(run, of_first[seed]) for seed, run in found[setting].items() if seed in of_first]
        names = [name for name in rows[setting] if all(name in c for two in both for c in two)]
        cells = {n: paired_difference([(a[n], b[n]) for a, b in both]) for n in names if both}
        label = f"{setting} - {first if len(setting + first) < 48 else 'first'}"  # fits a table
        rows[label] = {name: cell for name, cell in cells.items() if cell}
    return rows, max(map(len, found.values()), default=1)
