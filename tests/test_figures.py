"""Standard errors against simulations and closed forms, and tables against their text."""

import math

import numpy as np
import pytest

from support.figures import (
    LEGEND,
    Column,
    Difference,
    Estimate,
    compared,
    over_seeds,
    paired_difference,
    table,
)


def test_an_estimate_is_the_mean_with_its_standard_error():
    assert Column(np.array([1.0, 0.0, 0.0, 1.0])).estimate() == (
        0.5,
        pytest.approx(math.sqrt(1 / 3) / 2),  # the sample's standard deviation over sqrt(4)
        4,
    )
    assert Column(np.array([3.0, np.nan, 5.0])).estimate()[::2] == (4.0, 2)


def test_the_interval_of_a_difference_is_that_of_a_paired_t_test():
    # The table of Student's t that textbooks print, by degrees of freedom.
    published = {1: 12.706, 2: 4.303, 3: 3.182, 5: 2.571, 7: 2.365, 9: 2.262, 10: 2.228, 15: 2.131,
                 20: 2.086, 30: 2.042, 40: 2.021, 60: 2.000, 120: 1.980, 10**5: 1.960}  # fmt: skip
    random = np.random.default_rng(1)
    for freedom, quantile in published.items():
        n = freedom + 1
        values, noise = random.normal(0, 1, n), random.normal(0, 0.1, n)
        mean, low, high, items = Column(values + 0.05 + noise).difference(Column(values))
        half = quantile * noise.std(ddof=1) / math.sqrt(n)
        assert items == n and mean == pytest.approx(0.05 + noise.mean())
        assert (low, high) == pytest.approx((mean - half, mean + half), abs=1e-3 * half)


def test_a_difference_pairs_the_items_of_the_same_name():
    random = np.random.default_rng(1)
    values, others = random.normal(0, 1, 40), random.normal(0, 1, 40)
    names = np.array([f"file:{i}" for i in range(40)])
    column, other = Column(values, names=names), Column(others, names=names)
    by_position = Column(others).difference(Column(values))
    assert by_position.mean == pytest.approx((others - values).mean())
    assert other.difference(column) == pytest.approx(by_position)
    half = Column(values[::-2], names=names[::-2])  # every second item, in reverse order
    assert half.difference(column)[:3] == (0, 0, 0) and column.difference(half).n == 20
    gaps = Column(np.where(np.arange(40) < 10, np.nan, values), names=names)
    assert gaps.estimate().n == gaps.difference(other).n == other.difference(gaps).n == 30
    assert column.difference(Column(values, names=np.char.add("other ", names))) is None
    column = column._replace(prompts=np.arange(40) // 2)
    same_prompt, two_prompts = (Column(values[i], names=names[i]) for i in ([5, 4], [6, 5]))
    assert column.difference(same_prompt) is None and column.difference(two_prompts).n == 2


def test_items_of_one_prompt_are_not_independent():
    """Errors match the spread of the estimates over files that are drawn anew. Errors that ignore
    prompts are far too small."""
    random, found = np.random.default_rng(0), []
    for _ in range(300):
        prompts = np.repeat(np.arange(60), random.integers(1, 6, 60))
        values = random.normal(0, 1, 60)[prompts] + random.normal(0, 0.3, len(prompts))
        column = Column(values, prompts=10 * prompts)  # any numbers identify prompts
        found.append((*column.estimate()[:2], Column(values).estimate().error))
    spread, (_, error, without_prompts) = np.std(found, axis=0)[0], np.mean(found, axis=0)
    assert error == pytest.approx(spread, rel=0.1) and without_prompts < 0.7 * spread
    _, low, high, _ = column.difference(Column(0 * values))
    assert (high - low) / 2 == pytest.approx(1.96 * found[-1][1], rel=0.1)
    one_prompt = Column(values, prompts=0 * prompts)
    assert one_prompt.estimate().error is None and one_prompt.difference(one_prompt) is None


# --- Several seeds --------------------------------------------------------------------------------


def seed_columns(seeds, items, shared, effects, random) -> list[tuple[Column, Column]]:
    """Columns of two runs on each seed, whose mean difference is 0. The items are the same on all
    seeds if `shared`. effects: the standard deviations over seeds, items and both together."""
    of_seed, of_item, of_both = effects
    common, couples = random.normal(0, of_item, items), []
    for seed in range(seeds):
        own = common if shared else random.normal(0, of_item, items)
        changes = random.normal(0, of_seed) + own + random.normal(0, of_both, items)
        names = np.array([f"{0 if shared else seed}:{i}" for i in range(items)])
        first = random.normal(0, 1, items)
        couples.append((Column(first + changes, names=names), Column(first, names=names)))
    return couples


@pytest.mark.parametrize(
    "seeds, shared, effects",
    [
        (3, False, (0.0, 0.3, 0.5)),  # with 1.96 in place of the t quantile it would be 80 %
        (3, False, (0.1, 0.3, 0.5)),  # an interval over items alone would contain it in 80 %
        (3, True, (0.0, 0.3, 0.05)),  # an interval over seeds alone would contain it in 30 %
        (5, True, (0.05, 0.3, 0.5)),
    ],
)
def test_an_interval_over_seeds_contains_the_difference_in_95_percent_of_simulations(
    seeds, shared, effects
):
    random, hits = np.random.default_rng(1), 0
    for _ in range(800):
        _, low, high, n = paired_difference(seed_columns(seeds, 50, shared, effects, random))
        hits += low <= 0 <= high
    assert n == seeds * 50 and 0.93 <= hits / 800 <= 0.98


def test_seeds_count_equally_and_with_items_of_their_own_the_interval_is_that_of_their_means():
    random = np.random.default_rng(0)
    couples = [
        couple
        for size in (20, 40, 90)
        for couple in seed_columns(1, size, False, (0.2, 0.5, 0.5), random)
    ]
    for i, couple in enumerate(couples):
        couples[i] = tuple(c._replace(names=np.char.add(f"{i} ", c.names)) for c in couple)
    means = [run.difference(first).mean for run, first in couples]
    mean, low, high, n = paired_difference(couples)
    half = 4.303 * np.std(means, ddof=1) / math.sqrt(3)  # two degrees of freedom
    assert mean == pytest.approx(np.mean(means)) and n == 150
    assert (low, high) == pytest.approx((mean - half, mean + half), rel=0.01)
    run, first = couples[0]
    assert paired_difference([(run, first)]) == run.difference(first)
    assert paired_difference([*couples, (run, couples[1][1])]) is None  # no common items
    up, down, zero = (Column(np.array(x)) for x in ([1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]))
    assert paired_difference([(up, zero), (down, zero)]) == (0, 0, 0, 4)


def test_pairs_of_one_prompt_are_one_cluster_on_all_seeds():
    """Each item stands twice, under one prompt, in the columns of every seed."""
    random = np.random.default_rng(0)
    couples = seed_columns(4, 30, True, (0.1, 0.3, 0.2), random)

    def twice(column: Column) -> Column:
        names = np.concatenate([np.char.add(side, column.names) for side in ("a", "b")])
        values, prompts = np.tile(column.values, 2), np.tile(column.names, 2)
        order = random.permutation(len(names))
        return Column(values[order], prompts[order], names[order])

    once = paired_difference(couples)
    doubled = paired_difference([(twice(run), twice(first)) for run, first in couples])
    assert doubled[:3] == pytest.approx(once[:3]) and doubled.n == 2 * once.n


def test_estimates_over_seeds_have_the_standard_deviation_over_seeds():
    one, other = Estimate(0.5, 0.1, 30), Estimate(0.7, None, 20)
    assert over_seeds([one, other]) == pytest.approx((0.6, math.sqrt(0.02), 50))
    assert over_seeds([one]) == one and over_seeds([other]) == other


@pytest.mark.filterwarnings("error")
def test_infinite_and_missing_values_cause_no_warnings():
    values = np.array([1.0, -math.inf, 2.0, math.inf])
    assert Column(values[:3]).estimate().mean == -math.inf
    column = Column(values)
    assert math.isnan(column.estimate().mean) and math.isnan(column.estimate().error)
    assert all(map(math.isnan, column.difference(column)[:3]))
    zero, infinite = Column(np.zeros(4)), Estimate(math.inf, None, 1)
    assert paired_difference([(Column(values[:3]), zero)] * 2).mean == -math.inf
    assert math.isnan(paired_difference([(column, zero), (zero, zero)]).mean)
    assert math.isnan(over_seeds([infinite, infinite]).error)
    mean, *others = Column(np.array([math.nan, math.nan])).estimate()
    assert math.isnan(mean) and others == [None, 0]


# --- Tables ---------------------------------------------------------------------------------------


def test_shares_are_percentages_and_other_columns_keep_their_unit():
    cells = {
        "greedy": (0.5, 0.0157, "50.0±1.6"),
        "pass@8": (1.0, None, "100.0"),
        "strict": (0.0, 0.01, "0.0±1.0"),
        "reward": (0.75, 0.1, "75.0±10.0"),
        "Δ chosen": (-12.345678, 0.1, "-12.35±0.10"),
        "Δ/token chosen": (0.0124, 0.0016, "+0.012±0.002"),
        "dv ≤0.693": (0.5, 0.01, "+0.500±0.010"),
        "margin": (math.nan, math.nan, "+nan±nan"),
        "nwj ≤0.693": (-0.0624, 0.01, "-0.062±0.010"),
        "js ≤0.4315": (0.4, 0.01, "+0.400±0.010"),
        "T chosen": (-123456.0, 2e5, "-1.2e+05±2e+05"),
    }
    for name, (mean, error, text) in cells.items():
        lines = table({"mio": {name: Estimate(mean, error, 7)}}).splitlines()
        percent = " %" if name in ("greedy", "pass@8", "strict", "reward") else ""
        assert lines[0].strip() == name + percent and lines[1].split() == ["mio", *text.split()]
    difference = Difference(0.25, -0.125, 0.5, 8)
    for name in ("flexible pass@2", "math maj@4", "exact", "letter", "cut", "acc_norm"):
        assert "a - b  +25.0 [-12.5, +50.0]" in table({"a - b": {name: difference}})
    assert "a - b  +0.25 [-0.12, +0.50]" in table({"a - b": {"T chosen": difference}})


def test_table_is_aligned_and_wraps_to_the_width():
    rows = {
        "base": {"greedy": Estimate(0.5, 0.01, 1000), "pass@8": Estimate(1.0, None, 1000)},
        "mio": {"greedy": Estimate(0.75, 0.01, 990), "Δ chosen": Estimate(-1.5, 0.25, 20)},
    }
    marks = [LEGEND["greedy"], LEGEND["Δ "], "±: standard error over prompts"]
    wide = [
        "      greedy %  pass@8 %    Δ chosen",
        "base  50.0±1.0     100.0           -",
        "mio   75.0±1.0         -  -1.50±0.25",
        "n     990-1000      1000          20",
    ]
    assert table(rows).splitlines() == table(rows, width=36).splitlines() == wide + marks
    narrow = [
        "      greedy %  pass@8 %",
        "base  50.0±1.0     100.0",
        "mio   75.0±1.0         -",
        "n     990-1000      1000",
        "",
        "        Δ chosen",
        "base           -",
        "mio   -1.50±0.25",
        "n             20",
    ]
    assert (
        table(rows, width=35).splitlines() == table(rows, width=24).splitlines() == narrow + marks
    )
    assert table(rows, width=1).splitlines()[4:5] == [""]  # a table has a column, however narrow
    assert table(rows, markdown=True).splitlines() == [
        "|  | greedy % | pass@8 % | Δ chosen |",
        "|---|---|---|---|",
        "| base | 50.0±1.0 | 100.0 | - |",
        "| mio | 75.0±1.0 | - | -1.50±0.25 |",
        "| n | 990-1000 | 1000 | 20 |",
        "",
        *marks,
    ]


def test_legend_explains_what_the_table_shows():
    for name, keys in {
        "greedy": ["greedy"],
        "exact pass@2": [],
        "exact maj@2": [".* maj@"],
        "strict maj@8": ["strict", ".* maj@"],
        "chosen": ["chosen"],
        "Δ chosen": ["Δ "],
        "Δ/token chosen": [],
        "js ≤0.4315": ["js"],
    }.items():
        lines = table({"mio": {name: Estimate(1.0, 1.0, 9)}}).splitlines()
        assert lines[3:] == [*(LEGEND[key] for key in keys), "±: standard error over prompts"]
    rows = {"mio": {"cut": Estimate(1.0, 1.0, 9)}, "a - b": {"cut": Difference(0.0, 0.0, 0.0, 9)}}
    assert table(rows).splitlines()[-1] == "[...]: 95 % interval, paired, over prompts only"
    assert table(rows, seeds=5).splitlines()[-2:] == [
        "±: standard deviation over seeds",
        "[...]: 95 % interval, paired, over seeds and prompts",
    ]
    lines = table(rows | {"c - b": {}}).splitlines()
    assert lines[-1] == "-: the two runs have no items in common"
    assert max(map(len, [*LEGEND.values(), *lines])) <= 80


def test_runs_are_compared_with_the_first_one():
    column, names = Column(np.arange(9) / 10), np.array([f"a:{i}" for i in range(9)])
    runs = {
        "base": {"exact": column, "only": column},
        "mio": {"exact": column._replace(values=column.values + 0.1), "mine": column},
        "dpo": {"exact": column._replace(names=names)},
        "sft": {"mine": column},
    }
    rows = compared(runs)
    assert list(rows) == ["base", "mio", "dpo", "sft", "mio - base", "dpo - base"]
    assert rows["base"] == {"exact": column.estimate(), "only": column.estimate()}
    assert rows["mio - base"].keys() == {"exact"} and rows["dpo - base"] == {}
    assert rows["mio - base"]["exact"] == pytest.approx((0.1, 0.1, 0.1, 9))
    assert "-: the two runs have no items in common" in table(rows)


def test_names_of_any_length_leave_room_for_estimates():
    names = [f"llama-3.2-1b-gsm8k-{loss}-beta0.2-lr1e-6-seed0" for loss in ("sft", "dpo", "mio")]
    column = Column(np.arange(9) / 7)
    rows = compared({name: {"exact": column, "exact maj@8": column} for name in names})
    assert f"{names[1]} - first" in rows and f"{names[1]} - {names[0]}" not in rows
    assert max(map(len, table(rows).splitlines())) <= 80
    first, second = "a" * 20, "b" * 27
    assert f"{second} - {first}" in compared({first: {"x": column}, second: {"x": column}})
    assert f"{second}b - first" in compared({first: {"x": column}, f"{second}b": {"x": column}})
