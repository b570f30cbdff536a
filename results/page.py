"""Helpers of the scripts in this folder: they make grids, read their runs and write the pages."""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that scripts can import the project
import eval as evaluation  # noqa: E402
import train  # noqa: E402
from support.figures import read_columns, table  # noqa: E402
from support.files import read_json  # noqa: E402
from support.grid import Run, arguments, find_grid, summarize  # noqa: E402
from support.run_options import read_flags  # noqa: E402


def make(**flags) -> list[Run]:
    """Makes the runs of a grid that are not finished, two at a time, and returns all its runs."""
    train.main(argv := arguments({"jobs": 2} | flags))
    return find_grid(read_flags(argv, train.Options, "")[1], train.Options).runs()


def evaluate(file: Path, *argv) -> dict[str, dict]:
    """Returns what eval.py wrote to `file`, by run; runs eval.py if the file does not exist."""
    if not file.exists():
        evaluation.main([*map(str, argv), "--out", str(file)])
    return read_json(file)


def changes(runs: list[Run], column: str) -> dict[str, list[float]]:
    """Returns, for each setting, the mean of a column in each run minus the base's, if it has this
    column: in nats for Δ, otherwise in points."""
    found = {}
    for run in runs:
        rows = read_columns(run.folder / "items.json")
        means = {name: row[column].estimate().mean for name, row in rows.items() if column in row}
        change = (means["run"] - means.get("base", 0)) * (1 if "Δ" in column else 100)
        found.setdefault(run.setting, []).append(change)
    return found


def spread(values: list[float]) -> str:
    return f"{np.mean(values):+.2f} ({min(values):+.2f} to {max(values):+.2f})"


def outcome(runs: list[Run], column: str = "greedy") -> str:
    """Returns a sentence, and a line for each setting in the order of the column's mean change."""
    moves, gains = changes(runs, "Δ chosen"), changes(runs, column)
    text = f"Mean changes from the start (lowest to highest seed), in the order of {column}:\n"
    for name in sorted(gains, key=lambda name: -sum(gains[name])):
        text += f"\n- {name}: {column} {spread(gains[name])} points, Δ chosen {spread(moves[name])}"
        text += f" nats, positive on {sum(x > 0 for x in moves[name])} of {len(moves[name])} seeds"
    return text


def draw(script: str, rows: dict[str, list[float]], label: str) -> None:
    """Draws each row's values as ticks on a line, with a dot for their mean."""
    figure = Figure(figsize=(7, 1 + len(rows) / 4), layout="constrained")
    axis = figure.subplots()
    for name, values in rows.items():
        color = {"mio": "#0072B2", "dpo": "#D55E00"}.get(name[:3], "0.4")
        axis.plot(values, [name] * len(values), "|-", lw=1, color=color)
        axis.plot([np.mean(values)], [name], "o", color=color)
    axis.axvline(0, color="0.4", lw=0.8, zorder=0)
    axis.set(xlabel=label, ylim=(len(rows) - 0.5, -0.5))
    figure.savefig(Path(script).with_suffix(".png"), dpi=150)


def write(script, text: str, runs: list[Run], **values) -> None:
    """Writes a page: `text` with values, and with the origin and a table of the runs."""
    configs = [read_json(run.folder / "train_config.json") for run in runs]
    commits = " and ".join(sorted({(config["commit"] or "unknown")[:12] for config in configs}))
    minutes = sum(read_json(run.folder / "summary.json")["seconds"] for run in runs) / 60
    made = f"`python results/{Path(sys.argv[0]).name}` made this page (commit {commits}, torch "
    made += f"{configs[0]['versions']['torch']}, {configs[0]['machine']}; the times of all\n"
    made += f"{len(runs)} runs add up to {minutes:.0f} minutes). The runs are those of:\n"
    for file in dict.fromkeys(run.folder.parent / "grid.md" for run in runs):
        made += f"\n- {file.read_text(encoding='utf-8').splitlines()[0]}"
    rows, seeds = summarize(runs)
    values = {"table": table(rows, markdown=True, seeds=seeds), "made": made} | values
    Path(script).with_suffix(".md").write_text(text.format(**values), encoding="utf-8")
