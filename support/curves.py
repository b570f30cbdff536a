"""Reads the metrics.jsonl of run folders and plots the training curves of the runs together."""

from itertools import chain, cycle
from pathlib import Path

import numpy as np

from support.files import read_rows

PANELS = {  # title -> metrics; a panel whose title begins with Δ shows changes since the first row
    "Δ log-prob of chosen answers, nats": ("logps/chosen",),
    "Δ log-prob of rejected answers, nats": ("logps/rejected",),
    "loss": ("loss",),
    "reward of chosen and (thin) rejected": ("rewards/chosen", "rewards/rejected"),
    "reward margin": ("rewards/margins",),
    "reward accuracy": ("rewards/accuracies",),
}
# The palette of Okabe and Ito, which color-blind readers can tell apart, and line styles for print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")


def read_curves(folder: Path) -> dict[str, np.ndarray]:
    """Returns a dict from metrics to arrays (2, points) of steps and values, on held-out pairs or
    else on training pairs; {} without a metrics.jsonl. Raises ValueError if one is no number."""
    file, curves = folder / "metrics.jsonl", {}
    rows = [row for _, row in read_rows(file)] if file.is_file() else []
    prefix = "eval_" if any("eval_loss" in row for row in rows) else ""
    for metric in chain(*PANELS.values()):
        column = prefix + metric
        points = [(row.get("step"), row[column]) for row in rows if row.get(column) is not None]
        if not all(isinstance(x, int | float) for point in points for x in point):
            raise ValueError(f"{file}: step and {column} must be numbers; restore the file")
        if points:
            curves[metric] = np.array(points, dtype=float).T  # (2, points)
    return curves


def plot(groups: dict[str, list[Path]], file: Path):
    """Plots groups of runs to `file` and returns the figure. A group appears as mean and range over
    the steps that its runs have in common. Raises ValueError without curves or matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib; pip install -r requirements-dev.txt") from None
    curves_of = {}
    for name, folders in groups.items():
        if runs := [curves for folder in folders if (curves := read_curves(folder))]:
            curves_of[f"{name} ({len(runs)} seeds)" if len(runs) > 1 else name] = runs
    if not curves_of:
        raise ValueError(f"--plot {file}: no run has metrics in metrics.jsonl; leave out --plot")
    figure, lines = Figure(figsize=(11, 6), layout="constrained"), {}  # label -> one of its lines
    for axis, (title, metrics) in zip(figure.subplots(2, 3).flat, PANELS.items()):
        for (label, runs), color, style in zip(curves_of.items(), cycle(COLORS), cycle(STYLES)):
            for width, metric in zip((2, 1), metrics):
                if not (curves := [run[metric] for run in runs if metric in run]):
                    continue
                steps = curves[0][0][curves[0][0] <= min(curve[0, -1] for curve in curves)]
                starts = [[curve[1, 0] if title.startswith("Δ") else 0] for curve in curves]
                values = np.array([np.interp(steps, *curve) for curve in curves]) - starts
                (lines[label],) = axis.plot(steps, values.mean(0), style, color=color, lw=width)
                if len(curves) > 1:
                    axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if title not in ("loss", "reward accuracy"):
            axis.axhline(0, color="0.4", linewidth=0.8, zorder=0)
    columns = min(max(132 // (12 + max(map(len, lines))), 1), 4)  # 132 characters fill the width
    place = {"loc": "outside lower center", "ncols": columns, "frameon": False, "handlelength": 3.5}
    figure.legend(lines.values(), lines, **place)
    figure.savefig(file, dpi=150, bbox_inches="tight")  # "tight" makes room for a longer label
    return figure
