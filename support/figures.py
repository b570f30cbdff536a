"""Statistics with standard errors, paired comparisons of runs, and the tables that show both."""

import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.files import read_json, write_json

# Columns whose names begin as in RATES are shown in percent, as in SMALL with three decimals.
RATES = ("greedy", "pass@", "cut", "acc", "reward", "strict", "flexible", "math", "exact", "letter")
SMALL = ("Δ/token", "dv", "nwj", "js")
Row = dict[str, "Estimate | Difference"]  # name of a column -> its cell in one row of a table
LEGEND = {  # pattern that matches the start of a column's name -> explanation below a table
    "greedy": "greedy: the greedy answer is right; pass@k: at least one of k samples is right",
    "strict": "strict: graded by the number after ####; flexible: by the last number",
    "math": "math: compares formulas by text and value, without algebra: a lower bound",
    ".* maj@": "pass@k: at least one of k answers is right; maj@n: the majority answer is right",
    "cut": "cut: share of answers cut off at --max_new_tokens; the text so far is graded",
    "acc": "acc: the gold choice is likeliest; acc_norm: per character; acc_bytes: per byte",
    "Δ ": "Δ: change of an answer's summed log-prob from the reference, in nats",
    "reward": "reward: share of pairs whose chosen answer has the larger T",
    "margin": "T: the implicit reward, beta times Δ; margin: T chosen minus T rejected",
    "chosen": "chosen, rejected: summed log-prob of an answer, in nats",
    "dv": "dv, nwj, js: mutual information of prompt and chosen answer by critic T, in nats",
    "js": "js: estimates twice the Jensen-Shannon divergence; ≤: the largest possible value",
}


class Estimate(NamedTuple):
    """The mean of n items and its standard error (None if all items share one prompt)."""

    mean: float
    error: float | None
    n: int


class Difference(NamedTuple):
    """The mean difference between two runs on n common items, and its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int


class Column(NamedTuple):
    """The values of a run's items (pairs or questions). Only items of one prompt are dependent."""

    values: np.ndarray  # (items,); NaN marks an item without a value
    prompts: np.ndarray | None = None  # (items,) identify prompts in all runs; None if all differ
    names: np.ndarray | None = None  # (items,) identify items in all runs; None: their positions do

    def known(self) -> "Column":
        """Returns the column of the items that have a value, with names and prompts filled in."""
        known = ~np.isnan(self.values)
        names = (np.arange(len(known)) if self.names is None else self.names)[known]
        prompts = names if self.prompts is None else self.prompts[known]
        return Column(self.values[known], prompts, names)

    @np.errstate(invalid="ignore")  # log-probs may be infinite, and inf - inf is NaN
    def estimate(self) -> Estimate:
        """Returns the mean and its standard error, clustered by prompt (arXiv 2411.00640)."""
        values, prompts, _ = self.known()
        n, mean = len(values), float(values.mean()) if len(values) else math.nan
        sums = np.bincount(np.unique(prompts, return_inverse=True)[1], (values - mean) / n)  # (G,)
        return Estimate(mean, math.sqrt(squares(sums)[0]) if len(sums) > 1 else None, n)

    def difference(self, first: "Column") -> Difference | None:
        """Returns the mean difference from `first` on common items, or None for under 2 prompts."""
        return paired_difference([(self, first)])


def squares(sums: np.ndarray) -> tuple[float, float]:
    """Returns the squares of a mean's standard error and of half the width of its 95 % interval.
    sums: (G,) for each independent cluster of items, the sum of weight times (value - mean)."""
    variance = len(sums) / (len(sums) - 1) * (sums**2).sum()  # s^2 / n for clusters of one item
    # Quantiles of the t distribution; interpolation in 1 / freedom is at most 0.08 % too large.
    freedom = np.array([1, 2, 3, 4, 5, 6, 8, 12, 24, math.inf])
    quantiles = 12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3060, 2.1788, 2.0639, 1.9600
    return variance, np.interp(-1 / (len(sums) - 1), -1 / freedom, quantiles) ** 2 * variance


@np.errstate(invalid="ignore")
def paired_difference(runs: list[tuple[Column, Column]]) -> Difference | None:
    """Returns the mean over seeds of the mean difference between two runs on common items, or None
    if a seed has no common items or all items share one prompt. `runs` holds the columns of both
    runs for each seed. With several seeds, the interval covers other seeds as well as prompts."""
    changes, prompts = [], []  # for each seed: (its common items,)
    for run, first in [(run.known(), first.known()) for run, first in runs]:
        _, i, j = np.intersect1d(run.names, first.names, return_indices=True)
        changes.append(run.values[i] - first.values[j])
        prompts.append(run.prompts[i])
    found, n, S = np.unique(np.concatenate(prompts)), [len(x) for x in changes], len(runs)
    if len(found) < 2 or min(n) == 0:
        return None
    mean = float(np.mean([x.mean() for x in changes]))
    sums = np.zeros((S, len(found)))  # (S, G)
    for row, x, labels in zip(sums, changes, prompts):
        np.add.at(row, np.searchsorted(found, labels), (x - mean) / (S * len(x)))
    square = squares(sums.sum(axis=0))[1]
    if S > 1:
        # Two-way clusters: V = V_seed + V_prompt - V_both (Cameron, Gelbach and Miller 2011), where
        # V_seed has its own t quantile (Banerjee 1960), and S / (S - 1) makes the rest unbiased.
        rest = max(square - squares(sums.ravel())[1], 0)
        square = squares(sums.sum(axis=1))[1] + S / (S - 1) * rest
    return Difference(mean, mean - math.sqrt(square), mean + math.sqrt(square), sum(n))


def write_columns(file: Path, rows: dict[str, dict[str, Column]]) -> None:
    """Writes the columns of a table's rows as JSON, with null for NaN."""
    lists = {
        row: {name: [x if x is None else x.tolist() for x in column] for name, column in cs.items()}
        for row, cs in rows.items()
    }
    write_json(file, lists)


def read_columns(file: Path) -> dict[str, dict[str, Column]]:
    def column(values, *labels) -> Column:
        labels = (None if label is None else np.array(label) for label in labels)
        return Column(np.array(values, dtype=float), *labels)

    return {r: {n: column(*c) for n, c in row.items()} for r, row in read_json(file).items()}


@np.errstate(invalid="ignore")
def over_seeds(estimates: list[Estimate]) -> Estimate:
    """Returns the mean and standard deviation over seeds (or one seed's error) and the sum of n."""
    means = [estimate.mean for estimate in estimates]
    error = float(np.std(means, ddof=1)) if len(means) > 1 else estimates[0].error
    return Estimate(float(np.mean(means)), error, sum(estimate.n for estimate in estimates))


def compared(runs: dict[str, dict[str, Column]]) -> dict[str, Row]:
    """Returns a table's rows: the means of all runs, then their differences from the first run."""
    rows: dict[str, Row] = {n: {c: x.estimate() for c, x in run.items()} for n, run in runs.items()}
    (first, base), *others = runs.items()
    for name, run in others:
        label = f"{name} - {first if len(name + first) < 48 else 'first'}"  # leaves room for cells
        if common := [c for c in run if c in base]:
            rows[label] = {c: d for c in common if (d := run[c].difference(base[c]))}
    return rows


def table(rows: dict[str, Row], width: int = 80, markdown: bool = False, seeds: int = 1) -> str:
    """Returns a table as text: a line for each row, a line with the numbers of items, and a legend
    for `seeds` seeds. Without `markdown`, columns that exceed `width` continue in a table below."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    grid = [["", *(f"{column} %" if column.startswith(RATES) else column for column in columns)]]
    for name, row in rows.items():
        grid.append([name, *(_cell(c, row[c]) if c in row else "-" for c in columns)])
    counts = [sorted({row[c].n for row in rows.values() if c in row}) for c in columns]
    grid.append(["n", *(f"{n[0]}-{n[-1]}" if len(n) > 1 else f"{n[0]}" for n in counts)])
    legend = [text for key, text in LEGEND.items() if any(re.match(key, c) for c in columns)]
    legend += [f"±: standard {'deviation over seeds' if seeds > 1 else 'error over prompts'}"]
    if any(isinstance(cell, Difference) for row in rows.values() for cell in row.values()):
        scope = "seeds and prompts" if seeds > 1 else "prompts only"
        legend += [f"[...]: 95 % interval, paired, over {scope}"]
    if not all(rows.values()):
        legend += ["-: the two runs have no items in common"]
    if markdown:
        head, *lines = [f"| {' | '.join(line)} |" for line in grid]
        return "\n".join([head, "|---" * len(grid[0]) + "|", *lines, "", *legend])
    names = [line[0].ljust(max(len(name) for name, *_ in grid)) for line in grid]
    tables: list[list[str]] = []  # each table is a list of lines
    for cells in zip(*(line[1:] for line in grid)):
        size = max(map(len, cells))
        if not tables or len(tables[-1][0]) + 2 + size > width:
            tables.append(names)
        tables[-1] = [f"{line}  {cell:>{size}}" for line, cell in zip(tables[-1], cells)]
    return "\n".join(["\n\n".join(map("\n".join, tables)), *legend])


def _cell(column: str, cell: Estimate | Difference) -> str:
    scale, sign, form = (100, "", ".1f") if column.startswith(RATES) else (1, "+", ".2f")
    form = ".3f" if column.startswith(SMALL) else form
    form = ".2g" if abs(cell.mean) > 1e4 else form  # the mean has diverged
    if isinstance(cell, Difference):
        mean, low, high = (f"{scale * x:+{form}}" for x in cell[:3])
        return f"{mean} [{low}, {high}]"
    error = "" if cell.error is None else f"±{scale * cell.error:{form}}"
    return f"{scale * cell.mean:{sign}{form}}{error}"
