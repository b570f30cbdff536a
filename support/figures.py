"""Statistics with standard errors, paired comparisons of runs, and the tables that show both."""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000  # number of resamples of the bootstrap
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
    "reward": "reward: share of pairs whose chosen answer has the larger T",
    "margin": "T: the implicit reward, beta times Δ; margin: T chosen minus T rejected",
    "chosen": "chosen, rejected: summed log-prob of an answer, in nats",
    "dv": "dv, nwj, js: mutual information of prompt and chosen answer by critic T, in nats",
    "js": "js: estimates twice the Jensen-Shannon divergence; ≤: the largest possible value",
    "KL": "KL: log-ratio to the reference, in nats, on answers sampled from the run",
}


class Estimate(NamedTuple):
    """The statistic of n items and its standard error (None if all items share one prompt)."""

    mean: float
    error: float | None
    n: int


class Difference(NamedTuple):
    """The difference of a statistic between two runs on n common items, and its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int


Row = dict[str, Estimate | Difference]  # name of a column -> its cell in one row of a table


class Column(NamedTuple):
    """The values of a run's items (pairs or questions), and the statistic that summarizes them.
    Items of one prompt are not independent, so errors and intervals are computed over prompts."""

    values: np.ndarray  # (items,) or (items, parts); NaN marks an item without a value
    statistic: Callable[[np.ndarray], float] = np.mean  # maps the values to a number
    prompts: np.ndarray | None = None  # (items,) the prompt of each item; None if all differ
    names: np.ndarray | None = None  # (items,) identify items in all runs; None: their positions do

    def known(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the values that are not NaN, and for each the number of its prompt, from 0 on."""
        present = ~np.isnan(self.values).any(axis=tuple(range(1, self.values.ndim)))
        prompts = np.arange(len(present)) if self.prompts is None else self.prompts
        return self.values[present], np.unique(prompts[present], return_inverse=True)[1]

    @np.errstate(invalid="ignore")  # log-probs may be infinite, and inf - inf is NaN
    def mean(self) -> float:
        """Returns the statistic of the known values, or NaN if there are none."""
        values, _ = self.known()
        return float(self.statistic(values)) if len(values) else math.nan

    @np.errstate(invalid="ignore")
    def estimate(self) -> Estimate:
        """Returns the statistic and its standard error, clustered by prompt (arXiv 2411.00640)."""
        values, prompts = self.known()
        n, G, mean, error = len(values), len(set(prompts)), self.mean(), None
        if G > 1 and self.statistic is np.mean:
            # Var(mean) = G / (G - 1) * sum_g (sum_{i in g} (x_i - mean))^2 / n^2; s^2 / n if G = n
            residuals = np.bincount(prompts, values - mean)  # (G,)
            error = math.sqrt(G / (G - 1) * (residuals**2).sum()) / n
        elif G > 1:
            error = float(resample(values, self.statistic, prompts).std(ddof=1))
        return Estimate(mean, error, n)

    @np.errstate(invalid="ignore")
    def difference(self, first: "Column") -> Difference | None:
        """Returns the difference from `first` on common items, or None for under 2 prompts."""
        names = [range(len(c.values)) if c.names is None else c.names for c in (self, first)]
        place = {name: i for i, name in enumerate(names[1])}
        mine = [i for i, name in enumerate(names[0]) if name in place]
        theirs = [place[names[0][i]] for i in mine]
        both = np.stack((self.values[mine], first.values[theirs]), axis=-1)  # (items, ..., 2)
        prompts = None if self.prompts is None else self.prompts[mine]
        summary = self.statistic
        change = Column(both, lambda two: summary(two[..., 0]) - summary(two[..., 1]), prompts)
        values, prompts = change.known()
        if len(set(prompts)) < 2:
            return None
        interval = np.percentile(resample(values, change.statistic, prompts), (2.5, 97.5))
        return Difference(change.mean(), *interval.tolist(), len(values))


def task_row(values: dict[str, list[float]]) -> Row:
    """Returns a row of a table: for each column, the mean of its values and the standard error."""
    return {name: Column(np.array(value)).estimate() for name, value in values.items()}


def resample(values: np.ndarray, statistic: Callable, prompts: np.ndarray) -> np.ndarray:
    """Returns RESAMPLES bootstrap values of the statistic. Each resample draws G of the G prompts
    with replacement and takes all their items. prompts: (items,) prompt numbers, 0 to G - 1."""
    random, G = np.random.default_rng(0), prompts.max() + 1
    draws = (np.bincount(random.integers(0, G, G), minlength=G) for _ in range(RESAMPLES))  # (G,)
    return np.array([statistic(np.repeat(values, drawn[prompts], axis=0)) for drawn in draws])


def compared(runs: dict[str, dict[str, Column]]) -> dict[str, Row]:
    """Returns a table's rows: statistics of all runs, then their differences from the first run."""
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
        legend[-1] += "; [...]: 95 % bootstrap interval, paired"
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
    form = ".2g" if abs(cell.mean) > 1e4 else form  # the statistic has diverged
    if isinstance(cell, Difference):
        mean, low, high = (f"{scale * x:+{form}}" for x in cell[:3])
        return f"{mean} [{low}, {high}]"
    error = "" if cell.error is None else f"±{scale * cell.error:{form}}"
    return f"{scale * cell.mean:{sign}{form}}{error}"
