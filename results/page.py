"""Helpers of the scripts in this folder: they make grids, read their runs and fill the pages."""

import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that scripts can import the project
import eval as evaluation  # noqa: E402
import train  # noqa: E402
from support.builtin_task import solution  # noqa: E402
from support.curves import COLORS, STYLES  # noqa: E402
from support.figures import read_columns, squares, table  # noqa: E402
from support.files import read_json, write_json, write_rows  # noqa: E402
from support.grid import Grid, Run, arguments, find_grid, make_runs, summarize  # noqa: E402
from support.run_folder import catch_signals  # noqa: E402
from support.run_options import read_flags  # noqa: E402
from support.sampling import ANSWER_TOKENS  # noqa: E402

SEEDS = [0, 1, 2, 3, 4]
LOSSES = ["mio", "dpo", "bce", "ipo", "orpo", "nwj", "sft", "rlhf", "mio+0.1*sft", "base"]
LOOKS = dict(zip(LOSSES, zip([*COLORS, "0.5", "#E69F00", "0.5"], "os^vDX*PD.")))  # color, marker


def plan(**flags) -> list[Run]:
    """Returns the runs of a grid, or one run if no flag has several values. Their settings are
    called "mio, beta 0.5, lr 0.001", without the learning rate if it does not vary."""
    grid = find_grid(read_flags(arguments(flags), train.Options, "")[1], train.Options)
    runs = grid.runs() if grid else [Run(Path(flags["out"]), "", flags["seed"], flags)]
    names = ["beta", "lr"] if grid and "lr" in grid.axes else ["beta"]
    settings = [[f"{name} {x.flags[name]:g}" for name in names if name in x.flags] for x in runs]
    return [run._replace(setting=", ".join([run.flags["loss"], *parts]))
            for run, parts in zip(runs, settings)]  # fmt: skip


def make(**flags) -> list[Run]:
    """Makes the runs of a grid that are not finished, and returns all its runs."""
    return make_all(plan(**flags), Path(flags["out"]))


def make_all(runs: list[Run], folder: Path) -> list[Run]:
    """Makes the runs that are not finished, two at a time; clock.json adds up their seconds."""
    if left := [run for run in runs if not (run.folder / "summary.json").is_file()]:
        start = time.monotonic()
        with catch_signals() as signals:
            failed = make_runs(Grid({}, {}, folder, 2), left, signals)
        assert not failed and not signals, failed or "stopped; the same command goes on"
        spend(folder / "clock.json", start)
    return runs


def spend(file: Path, start: float) -> None:
    """Adds the seconds since `start` to those that the file holds."""
    before = read_json(file)["seconds"] if file.is_file() else 0
    write_json(file, {"seconds": before + time.monotonic() - start})


def bases(seeds: list[int]) -> dict[int, dict]:
    """Makes the base models and pairs of ten seeds. Returns the flags for each of `seeds`."""
    make(loss="sft", max_steps=0, seed=list(range(10)), out="out/bases")
    found = {}
    for seed in seeds:
        folder = Path("out/bases") / (f"base-seed{seed}" if seed else "base")
        files = {"data": folder / "pairs.jsonl", "eval_data": folder / "heldout_pairs.jsonl"}
        found[seed] = {"init": folder, **files, "seed": seed}
    return found


def ask(file: Path, texts: list[str]) -> None:
    """Writes a file of problems that eval.py and --loss rlhf grade."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_rows(file, [{"prompt": t, "answer": solution(t), "grade": "gsm8k"} for t in texts])


def evaluate(file: Path, models: list, data: Path, *flags) -> list[dict]:
    """Returns what eval.py writes to `file` for each model: the table of `data`, items, answers."""
    if not file.exists():
        start, models = time.monotonic(), [str(model) for model in models]
        flags = "--max_new_tokens", ANSWER_TOKENS, *flags, "--out", file
        evaluation.main([*models, "--data", *map(str, (data, *flags))])
        spend(file.with_suffix(".clock.json"), start)
    records = read_json(file).values()
    kept = "items", "answers"
    return [next(iter(r["figures"].values())) | {n: r[n] for n in kept} for r in records]


def means(runs: list[Run], *columns: str) -> dict[str, np.ndarray]:
    """Returns (columns, seeds) for each setting: means over the items of each run, of rates minus
    those of the base, in points."""
    found = {}
    for run in runs:
        rows = read_columns(run.folder / "items.json")
        values = [rows["run"][c].estimate().mean for c in columns]
        values = [x if "Δ" in c else 100 * (x - rows["base"][c].estimate().mean)
                  for c, x in zip(columns, values)]  # fmt: skip
        found.setdefault(run.setting, []).append(values)
    return {setting: np.array(values).T for setting, values in found.items()}


def interval(values, digits: int = 2) -> str:
    """Returns the mean and the 95 % interval (Student's t) of values, one for each seed."""
    mean, form = np.mean(values), f"+.{digits}f"
    half = np.sqrt(squares((np.array(values) - mean) / len(values))[1])
    return f"{mean:{form}} [{mean - half:{form}}, {mean + half:{form}}]"


def lines(axis, curves: dict[str, tuple], band: bool = True, every: int = 1) -> None:
    """Draws each curve, x (points,) and y (seeds, points), as its mean and range. The settings of a
    loss, which begins the name of a curve, differ in line style."""
    counts = Counter()
    for name, (x, y) in curves.items():
        loss = name.partition(",")[0]
        color, marker = LOOKS[loss]
        looks = {"color": color, "marker": marker, "mfc": "none", "markevery": every}
        axis.plot(x, y.mean(0), STYLES[counts[loss]], label=name, **looks)
        if band:
            axis.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.12)
        counts[loss] += 1


def ticks(axis, rows: dict[str, np.ndarray]) -> None:
    """Draws a line for each row, with a tick for each seed and a marker for the mean."""
    for name, values in rows.items():
        color, marker = LOOKS[name.partition(",")[0]]
        axis.plot(values, [name] * len(values), "|-", ms=12, color=color)
        axis.plot([values.mean()], [name], marker, color=color)
    axis.invert_yaxis()


def save(script: str, figure, columns: int = 0) -> None:
    """Saves a figure beside its script, with a legend below if it has `columns`."""
    for axis in figure.axes:
        axis.axhline(0, color="0.4", lw=0.8, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    place = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    if columns:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), **place)
    figure.savefig(Path(script).with_suffix(".png"), dpi=150)


def write(script: str, runs: list[Run], *folders, compare: bool = False, **values) -> None:
    """Fills the page of a script with `values`, with "made", the origin of the runs, and with
    "table", a table of their means and, with `compare`, of differences from the first setting."""
    configs = [read_json(run.folder / "train_config.json") for run in runs]
    commits = sorted({(config["commit"] or "unknown")[:12] for config in configs})
    commits = f"commit{'s' if len(commits) > 1 else ''} {' and '.join(commits)}"
    files = [file for folder in folders for file in Path(folder).rglob("*clock.json")]
    minutes = sum(read_json(file)["seconds"] for file in files) / 60
    made = f"`python results/{Path(script).name}` made {len(runs)} runs, two at a time, in "
    made += f"{minutes:.0f} wall-clock minutes ({commits},\n"
    machine = configs[0]["machine"].replace(" 1 threads", " 1 thread")
    made += f"torch {configs[0]['versions']['torch']}, {machine})."
    rows, seeds = summarize(runs)
    rows = {name: row for name, row in rows.items() if compare or " - " not in name}
    values = {"made": made, "table": table(rows, markdown=True, seeds=seeds)} | values
    fill(script, **values)


def fill(script: str, **values) -> None:
    """Replaces the parts of a script's page between <!-- NAME --> and <!-- end -->. A value is a
    text, or the head and the rows of a table."""
    page = Path(script).with_suffix(".md")
    text = page.read_text(encoding="utf-8")
    for name, value in values.items():
        before, mark, after = text.partition(f"<!-- {name} -->")
        assert mark, f"{page} has no <!-- {name} -->"
        if not isinstance(value, str):
            head, rows = value
            cells = [head, ["---"] * len(head), *rows]
            value = "\n".join(f"| {' | '.join(map(str, row))} |" for row in cells)
        text = f"{before}{mark}\n{value}\n<!-- end -->{after.partition('<!-- end -->')[2]}"
    page.write_text(text, encoding="utf-8")
