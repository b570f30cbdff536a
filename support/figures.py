"""Statistics with standard errors, paired comparisons of runs, and the tables that show both."""

import math
import re
from typing import NamedTuple

import numpy as np

# Columns whose names begin as in RATES are shown in percent, as in SMALL with three decimals.
RATES = ("greedy", "pass@", "cut", "acc", "reward", "strict", "flexible", "math", "exact", "letter")
SMALL = ("Δ/token", "dv", "nwj", "js")
LEGEND = {  # pattern that matches the start of a column's name -> explanation below a table
    "greedy": "greedy: the greedy answer is right; pass@k: at least one of k samples is right",
    "strict": "strict: graded by the number after ####; flexible: by the last number",
    "math": "math: compares formulas by text and value, without algebra: a lower bound",
    ".* maj@": "pass@k: at least one of k answers is right; maj@n: the majority answer is right",
    "cut": "cut: share of answers cut off at --max_new_tokens; the text so far is graded",
    "acc": "acc: the gold choice is likeliest; acc_norm: per character; acc_bytes: per byte",
    "Δ ": "Δ: change of an answer's summed log-prob from the reference, in nats",
    "reward": "reward: share of pairs whose chosen answer has the larger Δ",
    "margin": "T: the implicit reward, beta times Δ; margin: T chosen minus T rejected",
    "chosen": "chosen, rejected: summed log-prob of an answer, in nats",
    "dv": "dv, nwj, js: mutual information of prompt and chosen answer by critic T, in nats",
    "js": "js: estimates twice the Jensen-Shannon divergence; ≤: the largest possible value",
    "KL": "KL: log-ratio to the reference, in nats, on answers sampled from the run",
}


# The 97.5 % quantiles of the t distribution by degrees of freedom, exact to four decimals. Between
# them, linear interpolation in 1 / freedom gives values that are at most 0.08 % too large.
FREEDOM = np.array([1, 2, 3, 4, 5, 6, 8, 12, 24, math.inf])
T_QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3060, 2.1788, 2.0639, 1.9600)


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


Row = dict[str, Estimate | Difference]  # name of a column -> its cell in one row of a table


class Column(NamedTuple):
    """The values of a run's items (pairs or questions), which the mean summarizes. Items of one
    prompt are not independent, so errors and intervals are computed over prompts."""

    values: np.ndarray  # (items,); NaN marks an item without a value
    prompts: np.ndarray | None = None  # (items,) the prompt of each item; None if all differ
    names: np.ndarray | None = None  # (items,) identify items in all runs; None: their positions do

    def known(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the values that are not NaN, and the prompt of each of these values."""
        present = ~np.isnan(self.values)
        prompts = np.arange(len(present)) if self.prompts is None else self.prompts
        return self.values[present], prompts[present]

    def mean(self) -> float:
        """Returns the mean of the known values, or NaN if there are none."""
        return self.estimate().mean

    @np.errstate(invalid="ignore")  # log-probs may be infinite, and inf - inf is NaN
    def estimate(self) -> Estimate:
        """Returns the mean and its standard error, clustered by prompt (arXiv 2411.00640)."""
        values, prompts = self.known()
        n, error = len(values), None
        mean = float(values.mean()) if n else math.nan
        if len(set(prompts)) > 1:
            error = math.sqrt(clustered_variance((values - mean) / n, prompts))
        return Estimate(mean, error, n)

    @np.errstate(invalid="ignore")
    def difference(self, first: "Column") -> Difference | None:
        """Returns the mean difference from `first` on common items, or None for under 2 prompts.
        The 95 % interval is that of a t distribution, with G - 1 degrees of freedom for G prompts.
        """
        names = [np.arange(len(c.values)) if c.names is None else c.names for c in (self, first)]
        _, mine, theirs = np.intersect1d(*names, return_indices=True)
        known = ~np.isnan(self.values[mine]) & ~np.isnan(first.values[theirs])
        mine, theirs = mine[known], theirs[known]
        changes = self.values[mine] - first.values[theirs]  # (common items,)
        prompts = mine if self.prompts is None else self.prompts[mine]
        n, G = len(changes), len(set(prompts))
        if G < 2:
            return None
        mean = float(changes.mean())
        half = t_quantile(G - 1) * math.sqrt(clustered_variance((changes - mean) / n, prompts))
        return Difference(mean, mean - half, mean + half, n)


def clustered_variance(residuals: np.ndarray, clusters: np.ndarray) -> float:
    """Returns the variance of a mean, where only items of one cluster depend on each other.
    residuals: (items,) value minus mean, times the weight of the item; clusters: (items,)."""
    sums = np.bincount(np.unique(clusters, return_inverse=True)[1], residuals)  # (G,)
    return float(len(sums) / (len(sums) - 1) * (sums**2).sum())  # s^2 / n if all clusters differ


def t_quantile(freedom: int) -> float:
    """Returns the 97.5 % quantile of the t distribution with `freedom` degrees of freedom."""
    return float(np.interp(-1 / freedom, -1 / FREEDOM, T_QUANTILES))  # x must increase


def task_row(values: dict[str, list[float]]) -> Row:
    """Returns a row of a table: for each column, the mean of its values and the standard error."""
    return {name: Column(np.array(value)).estimate() for name, value in values.items()}


def compared(runs: dict[str, dict[str, Column]]) -> dict[str, Row]:
    """Returns a table's rows: the means of all runs, then their differences from the first run."""
    rows: dict[str, Row] = {n: {c: x.estimate() for c, x in run.items()} for n, run in runs.items()}
    (first, base), *others = runs.items()
    for name, run in others:
        differences = {c: run[c].difference(base[c]) for c in run if c in base}
        # Two long names would leave no room for cells in 80 characters.
        label = f"{name} - {first if len(name + first) < 48 else 'first'}"
        if differences:
            rows[label] = {c: d for c, d in differences.items() if d is not None}
    return rows


def table(rows: dict[str, Row], width: int = 80, markdown: bool = False) -> str:
    """Returns a table as text: a line for each row, a line with the numbers of items, and a legend.
    Without `markdown`, columns that do not fit `width` characters continue in a table below."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    grid = [["", *(f"{column} %" if column.startswith(RATES) else column for column in columns)]]
    for name, row in rows.items():
        grid.append([name, *(_cell(c, row[c]) if c in row else "-" for c in columns)])
    counts = [sorted({row[c].n for row in rows.values() if c in row}) for c in columns]
    grid.append(["n", *(f"{n[0]}-{n[-1]}" if len(n) > 1 else f"{n[0]}" for n in counts)])
    legend = [text for key, text in LEGEND.items() if any(re.match(key, c) for c in columns)]
    legend.append("±: standard error over prompts")
    if any(isinstance(cell, Difference) for row in rows.values() for cell in row.values()):
        legend.append("[...]: 95 % interval, paired; covers the choice of prompts, not of seeds")
    if not all(rows.values()):
        legend.append("-: the two runs have no items in common")
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
