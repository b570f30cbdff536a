"""Helpers of the scripts in this folder: they make grids, read their runs and write the pages."""

import shlex
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that scripts can import the project
import eval as evaluation  # noqa: E402
import train  # noqa: E402
from support.figures import Column, read_columns, squares, table  # noqa: E402
from support.files import read_json, write_json  # noqa: E402
from support.grid import Run, arguments, find_grid, summarize  # noqa: E402
from support.run_options import read_flags  # noqa: E402

SEEDS, TEST_SEEDS = [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]
ALL = SEEDS + TEST_SEEDS
# A color, a marker and a name for each loss, the same in all figures.
LOOKS = {"mio": ("#0072B2", "o"), "dpo": ("#D55E00", "s"), "bce": ("#009E73", "^"),
         "sft": ("#000000", "*"), "ipo": ("#CC79A7", "v"), "orpo": ("#E69F00", "D"),
         "nwj": ("#56B4E9", "X"), "rlhf": ("#777777", "P")}  # fmt: skip


def make(**flags) -> list[Run]:
    """Makes the runs of a grid that are not finished, two at a time, and returns all its runs; or
    makes one run, if no flag has several values. clock.json in the folder adds up the seconds."""
    grid = find_grid(read_flags(arguments(flags), train.Options, "")[1], train.Options)
    runs = grid.runs() if grid else [Run(Path(flags["out"]), flags["loss"], flags["seed"], flags)]
    if not all((run.folder / "summary.json").is_file() for run in runs):
        start = time.monotonic()
        train.main(arguments(flags | ({"jobs": 2} if grid else {})))
        spend(Path(flags["out"]) / "clock.json", time.monotonic() - start)
    return runs


def spend(file: Path, seconds: float) -> None:
    before = read_json(file)["seconds"] if file.is_file() else 0
    write_json(file, {"seconds": before + seconds})


def bases(seeds: list[int]) -> dict[int, dict]:
    """Makes the base models and pairs of all ten seeds. Returns the flags that name the files of
    each of `seeds`."""
    make(loss="sft", max_steps=0, seed=ALL, out="out/bases")
    found = {}
    for seed in seeds:
        folder = Path("out/bases") / (f"base-seed{seed}" if seed else "base")
        files = {"data": folder / "pairs.jsonl", "eval_data": folder / "heldout_pairs.jsonl"}
        found[seed] = {"init": folder, **files, "seed": seed}
    return found


def evaluate(file: Path, *argv) -> dict[str, dict]:
    """Returns what eval.py wrote to `file`, by run; runs eval.py if the file does not exist."""
    if not file.exists():
        start = time.monotonic()
        evaluation.main([*map(str, argv), "--out", str(file)])
        spend(file.with_suffix(".clock.json"), time.monotonic() - start)
    return read_json(file)


def columns_of(run: Run) -> dict[str, Column]:
    """Returns the columns of a run, with `gain`: for each problem, greedy minus the base's."""
    rows = read_columns(run.folder / "items.json")
    gain = rows["run"]["greedy"].values - rows["base"]["greedy"].values
    return rows["run"] | {"gain": Column(100 * gain)}


def means(runs: list[Run], *columns: str) -> dict[str, np.ndarray]:
    """Returns (columns, seeds) for each setting: the mean over the items of each run."""
    found = {}
    for run in runs:
        values = columns_of(run)
        found.setdefault(run.setting, []).append([values[c].estimate().mean for c in columns])
    return {setting: np.array(values).T for setting, values in found.items()}


def interval(values, digits: int = 2) -> str:
    """Returns the mean and the 95 % interval (Student's t) of values, one for each seed."""
    values, form = np.array(values), f"+.{digits}f"
    mean = values.mean()
    half = np.sqrt(squares((values - mean) / len(values))[1])
    return f"{mean:{form}} [{mean - half:{form}}, {mean + half:{form}}]"


def markdown(*head, rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def clock(*folders) -> str:
    """Returns the minutes by the clock that the grids and evaluations in folders took."""
    files = [file for folder in folders for file in Path(folder).rglob("*clock.json")]
    seconds = sum(read_json(file)["seconds"] for file in files)
    return f"{seconds / 60:.0f}"


def command(run: Run) -> str:
    """Returns the command that made a run, or the grid of a run."""
    grid = run.folder.parent / "grid.md"
    if grid.is_file():
        return grid.read_text(encoding="utf-8").splitlines()[0].strip("`")
    return shlex.join(["python", "train.py", *arguments(run.flags)])


def write(script, runs: list[Run], *folders, **values: str) -> None:
    """Fills the parts of the script's page that lie between <!-- NAME --> and <!-- end --> with
    `values`, with "made", the origin of the runs, and with "table", a table of their means."""
    configs = [read_json(run.folder / "train_config.json") for run in runs]
    commits = " and ".join(sorted({(config["commit"] or "unknown")[:12] for config in configs}))
    made = f"`python results/{Path(script).name}` took {clock(*folders)} minutes by the clock, two "
    made += f"runs at a time (commit {commits}, torch {configs[0]['versions']['torch']}, "
    made += f"{configs[0]['machine']}). The runs are those of:\n"
    made += "".join(f"\n- `{line}`" for line in dict.fromkeys(map(command, runs)))
    rows, seeds = summarize(runs)
    rows = {name: row for name, row in rows.items() if " - " not in name}
    values = {"made": made, "table": table(rows, markdown=True, seeds=seeds)} | values
    fill(Path(script).with_suffix(".md"), **values)


def fill(page: Path, **values: str) -> None:
    """Replaces the marked parts of a page. Raises ValueError if a mark is missing."""
    text = page.read_text(encoding="utf-8")
    for name, value in values.items():
        mark = f"<!-- {name} -->"
        before, found, after = text.partition(mark)
        if not found:
            raise ValueError(f"{page}: has no {mark}")
        text = f"{before}{mark}\n{value}\n<!-- end -->{after.partition('<!-- end -->')[2]}"
    page.write_text(text, encoding="utf-8")
