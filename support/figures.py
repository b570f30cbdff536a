"""Figures with their errors, paired comparisons of runs, and the tables that show them.

An evaluation stores one value for each item and run, in a `Column`. A `Figure` summarizes a column,
a `Difference` compares two columns item by item, and `table` prints both.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000  # of the bootstrap


class Figure(NamedTuple):
    """The statistic of n items and its standard error, which is None if all share one prompt."""

    mean: float
    error: float | None
    n: int


class Difference(NamedTuple):
    """A run minus another one, over the n items of both, with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int


Row = dict[str, Figure | Difference]  # name of a column -> its cell in one row of a table


class Column(NamedTuple):
    """The values of all items, and the statistic that summarizes them.

    values: (items,), or (items, parts) if the statistic needs several numbers of an item. NaN marks
        an item without a value.
    statistic: maps values to a number. The error of `np.mean` has a closed form; the error of any
        other statistic comes from the bootstrap.
    prompts: (items,) identifies the prompt of each item. Items of one prompt are not independent,
        so all errors are those of sampling prompts. None gives each item a prompt of its own.
    names: (items,) identifies the same item in two runs. None identifies it by its position.
    """

    values: np.ndarray
    statistic: Callable[[np.ndarray], float] = np.mean
    prompts: np.ndarray | None = None
    names: np.ndarray | None = None

    def known(self) -> tuple[np.ndarray, np.ndarray]:
        """The values of the items that have one, and the numbers 0, 1, ... of their prompts."""
        present = ~np.isnan(self.values).any(axis=tuple(range(1, self.values.ndim)))
        prompts = np.arange(len(present)) if self.prompts is None else self.prompts
        return self.values[present], np.unique(prompts[present], return_inverse=True)[1]

    @np.errstate(invalid="ignore")  # log-probs may be infinite, and inf - inf is NaN
    def mean(self) -> float:
        """The statistic of the known values, NaN if there are none."""
        values, _ = self.known()
        return float(self.statistic(values)) if len(values) else math.nan

    @np.errstate(invalid="ignore")
    def figure(self) -> Figure:
        """The statistic with its standard error over prompts (clustered as in arXiv 2411.00640)."""
        values, prompts = self.known()
        n, G, mean, error = len(values), len(set(prompts)), self.mean(), None
        if G > 1 and self.statistic is np.mean:
            # Var(mean) = G / (G - 1) * sum_g (sum_{i in g} (x_i - mean))^2 / n^2 for G prompts g.
            # This is the usual s^2 / n if each item has its own prompt.
            residuals = np.bincount(prompts, values - mean)  # (G,)
            error = math.sqrt(G / (G - 1) * (residuals**2).sum()) / n
        elif G > 1:
            error = float(resample(values, self.statistic, prompts).std(ddof=1))
        return Figure(mean, error, n)

    @np.errstate(invalid="ignore")
    def difference(self, first: "Column") -> Difference | None:
        """This column minus `first`, over the items that have a value in both. Returns None if
        these items have fewer than two prompts."""
        names = [range(len(c.values)) if c.names is None else c.names for c in (self, first)]
        place = {name: i for i, name in enumerate(names[1])}
        mine = [i for i, name in enumerate(names[0]) if name in place]
        theirs = [place[names[0][i]] for i in mine]
        both = np.stack((self.values[mine], first.values[theirs]), axis=-1)  # (items, ..., 2)
        prompts = None if self.prompts is None else self.prompts[mine]
        values, prompts = Column(both, prompts=prompts).known()
        if len(set(prompts)) < 2:
            return None
        pair = values[..., 0], values[..., 1]
        mean = self.statistic(pair[0]) - self.statistic(pair[1])
        # Both calls of `resample` draw the same prompts, so the bootstrap is paired.
        resampled = [resample(one, self.statistic, prompts) for one in pair]
        low, high = np.percentile(resampled[0] - resampled[1], (2.5, 97.5)).tolist()
        return Difference(float(mean), low, high, len(values))


def task_row(values: dict[str, list[float]]) -> Row:
    """The row of a table from the values of each item by column."""
    return {name: Column(np.array(value)).figure() for name, value in values.items()}


def resample(values: np.ndarray, statistic: Callable, prompts: np.ndarray) -> np.ndarray:
    """Bootstrap over prompts: (RESAMPLES,) values of the statistic. A resample draws prompts with
    replacement, as many as there are, and takes all items of each. prompts: (items,) 0, 1, ..."""
    random, G = np.random.default_rng(0), prompts.max() + 1
    found = []
    for _ in range(RESAMPLES):
        times_drawn = np.bincount(random.integers(0, G, G), minlength=G)  # (G,)
        found.append(statistic(np.repeat(values, times_drawn[prompts], axis=0)))
    return np.array(found)


def compared(runs: dict[str, dict[str, Column]]) -> dict[str, Row]:
    """Rows of a table: the figures of all runs, then the differences from the first run."""
    rows: dict[str, Row] = {n: {c: x.figure() for c, x in run.items()} for n, run in runs.items()}
    (first, base), *others = runs.items()
    for name, run in others:
        differences = {c: run[c].difference(base[c]) for c in run if c in base}
        label = f"{name} - {first}"
        if len(label) > 50:  # two long names would leave no room for figures in 80 columns
            label = f"{name} - first"
        if differences:
            rows[label] = {c: d for c, d in differences.items() if d is not None}
    return rows


# Columns whose names begin with SHARES are in percent, those of SMALL have three decimals.
GRADES = ("strict", "flexible", "math", "exact", "letter")
SHARES = ("greedy", "pass@", "cut", "acc", "reward", *GRADES)
SMALL = ("Δ/token", "dv", "nwj", "js")

# Explanations of columns, under a column's name, the first word of its name, or "maj@".
LEGEND = {
    "greedy": "greedy: the greedy answer is correct; pass@k: at least one of k samples is",
    "strict": "strict: graded by the number after ####; flexible: by the last number",
    "math": "math: compares formulas by text and value, without algebra: a lower bound",
    "maj@": "pass@k: at least one of k answers is correct; maj@n: the most frequent one is",
    "cut": "cut: answers cut off at --max_new_tokens; the text so far is graded",
    "acc": "acc: the gold choice is likeliest; acc_norm: per character; acc_bytes: per byte",
    "Δ chosen": "Δ: change of an answer's summed log-prob from the reference, in nats",
    "reward": "reward: pairs whose chosen answer has the larger Δ",
    "margin": "T: the implicit reward, beta times Δ; margin: T chosen minus T rejected",
    "chosen": "chosen, rejected: summed log-prob of an answer, in nats",
    "dv": "dv, nwj, js: information between prompt and chosen answer, critic T, in nats",
    "js": "js: twice the Jensen-Shannon bound; ≤: the largest value that is possible",
    "KL": "KL: log-ratio to the reference, in nats, on answers sampled from the run",
}


def table(rows: dict[str, Row], width: int = 80, markdown: bool = False) -> str:
    """The text of a table with a line for each row, a line for the numbers of items, and a legend.

    A cell shows a mean and its standard error, or a difference and its interval. Plain text wraps
    into several tables of at most `width` characters.
    """
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    grid = [["", *(f"{column} %" if column.startswith(SHARES) else column for column in columns)]]
    for name, row in rows.items():
        grid.append([name, *(_cell(column, row.get(column)) for column in columns)])
    counts = [sorted({row[c].n for row in rows.values() if c in row}) for c in columns]
    grid.append(["n", *(f"{n[0]}-{n[-1]}" if len(n) > 1 else f"{n[0]}" for n in counts)])
    if markdown:
        lines = [f"| {' | '.join(line)} |" for line in grid]
        lines = [lines[0], "|---" * len(grid[0]) + "|", *lines[1:], ""]
    else:
        lines = _aligned(grid, width)
    return "\n".join([*lines, *legend(rows)])


def legend(rows: dict[str, Row]) -> list[str]:
    """Explains the columns and the marks of a table, in lines of at most 80 characters."""
    columns = {column for row in rows.values() for column in row}
    keys = columns | {column.split()[0] for column in columns}
    keys |= {"maj@" for column in columns if "maj@" in column}
    marks = "±: standard error over prompts"
    if any(isinstance(cell, Difference) for row in rows.values() for cell in row.values()):
        marks += "; [...]: 95 % bootstrap interval, paired"
    lines = [text for key, text in LEGEND.items() if key in keys] + [marks]
    return lines if all(rows.values()) else [*lines, "-: the two runs have no items in common"]


def _cell(column: str, cell: Figure | Difference | None) -> str:
    if cell is None:
        return "-"
    scale, sign, form = 1, "+", ".3f" if column.startswith(SMALL) else ".2f"
    if column.startswith(SHARES):
        scale, sign, form = 100, "", ".1f"
    if abs(cell.mean) > 1e4:  # an estimate that diverged
        form = ".2g"
    if isinstance(cell, Difference):
        mean, low, high = (f"{scale * x:+{form}}" for x in cell[:3])
        return f"{mean} [{low}, {high}]"
    error = "" if cell.error is None else f"±{scale * cell.error:{form}}"
    return f"{scale * cell.mean:{sign}{form}}{error}"


def _aligned(grid: list[list[str]], width: int) -> list[str]:
    """Lines of aligned cells. Columns that do not fit in `width` start a table below, which
    repeats the first column."""
    names, *rest = zip(*grid)
    lines: list[str] = []
    while rest:
        block, used = [names], max(map(len, names))
        while rest and (len(block) == 1 or used + 2 + max(map(len, rest[0])) <= width):
            used += 2 + max(map(len, rest[0]))
            block.append(rest.pop(0))
        widths = [max(map(len, column)) for column in block]
        lines += [""] if lines else []
        for name, *cells in zip(*block):
            padded = [cell.rjust(size) for cell, size in zip(cells, widths[1:])]
            lines.append("  ".join([name.ljust(widths[0]), *padded]))
    return lines
