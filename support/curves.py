"""Reads the metrics.jsonl of run folders and plots the training curves of the runs together."""

import json
import re
from itertools import chain, cycle
from pathlib import Path

import numpy as np

from support.files import read_json, read_rows
from support.run_folder import MAY_CHANGE, PROVENANCE

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
# Keys of train_config.json that may differ between runs of one experiment.
IGNORED = {*MAY_CHANGE, *PROVENANCE, "config", "resume", "overwrite"} - {"epochs", "max_steps"}


def read_curves(folders: dict[str, Path]) -> dict[str, list[dict[str, np.ndarray]]]:
    """Returns a dict from labels to lists of runs that differ only in their seed. A run is a dict
    from metrics to arrays (2, points) of steps and values, on held-out pairs or else on training
    pairs. Skips folders without a run. Raises ValueError if a step or value is not a number."""
    groups: dict[str, tuple[str, list]] = {}
    for name, folder in folders.items():
        file, config_file = folder / "metrics.jsonl", folder / "train_config.json"
        if not (file.is_file() and config_file.is_file()):
            continue
        config = {k: v for k, v in read_json(config_file).items() if k not in IGNORED}
        seed = config.pop("seed", None)
        # The names of the demonstration's base model and pairs contain the seed, too.
        experiment = re.sub(rf"-?seed{seed}\b", "", json.dumps(config, sort_keys=True))
        rows, curves = [row for _, row in read_rows(file)], {}
        prefix = "eval_" if any("eval_loss" in row for row in rows) else ""
        for metric in chain(*PANELS.values()):
            column = prefix + metric
            points = [(row.get("step"), row[column]) for row in rows if row.get(column) is not None]
            if not all(isinstance(x, int | float) for point in points for x in point):
                raise ValueError(f"{file}: step and {column} must be numbers; restore the file")
            if points:
                curves[metric] = np.array(points, dtype=float).T  # (2, points)
        if curves:
            groups.setdefault(experiment, (name, []))[1].append(curves)
    return {f"{n} ({len(runs)} seeds)" if len(runs) > 1 else n: runs for n, runs in groups.values()}


def plot(folders: dict[str, Path], file: Path):
    """Plots runs to `file` and returns the figure. Runs that differ only in their seed appear as
    mean and range over common steps. Raises ValueError if curves or matplotlib are missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib; pip install -r requirements-dev.txt") from None
    if not (curves_of := read_curves(folders)):
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
