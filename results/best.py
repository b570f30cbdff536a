"""Tunes each loss on two seeds and compares the winners on five others: python results/best.py"""

from pathlib import Path

import numpy as np
import page
from frontier import BETAS, LOSSES, RATES
from matplotlib.figure import Figure

from support.builtin_task import problems

OUT, TUNING, TESTED = Path("out/best"), [0, 1], [2, 3, 4, 5, 6]
QUESTIONS = Path("out/best/validation.jsonl")
ALL_RATES, ALL_BETAS = [3e-5, 1e-4, *RATES, 3e-3, 1e-2], [1 / 128, 1 / 32, *BETAS, 32.0, 128.0]
Place = tuple[str, int, int]  # a loss, and positions in ALL_RATES and in ALL_BETAS


def train(places: list[Place], seeds: list[int]) -> dict[Place, list[page.Run]]:
    """Makes a run of each place on each seed, or takes it from the runs of the frontier."""
    found = {}
    for loss, i, j in places:
        flags = {"loss": loss} | ({"beta": ALL_BETAS[j]} if loss != "sft" else {})
        flags |= {"lr": ALL_RATES[i]}
        name = ",".join(f"{key}={value}" for key, value in flags.items())
        for seed, files in page.bases(seeds).items():
            known = Path(f"out/frontier/seed{seed}") / name
            folder = known if known.is_dir() else OUT / f"seed{seed}" / name
            flags |= files | {"epochs": 1, "eval_every": 30}
            setting = name.removeprefix("loss=").replace(",", ", ").replace("=", " ")
            found.setdefault((loss, i, j), []).append(page.Run(folder, setting, seed, dict(flags)))
    page.make_all([run for runs in found.values() for run in runs], OUT)
    return found


def accuracies(places: list[Place]) -> dict[Place, float]:
    """Returns the greedy accuracy on validation problems, in %, in the mean over tuning seeds."""
    found = {}
    for place, runs in train(places, TUNING).items():
        records = [page.evaluate(x.folder / "validation.json", [x.folder], QUESTIONS) for x in runs]
        found[place] = 100 * np.mean([record["strict"]["mean"] for (record,) in records])
    return found


def near(place: Place) -> list[Place]:
    """Returns the settings with a learning rate or beta one step away."""
    loss, i, j = place
    found = [(loss, i - 1, j), (loss, i + 1, j)]
    found += [(loss, i, j - 1), (loss, i, j + 1)] if loss != "sft" else []
    return [x for x in found if 0 <= x[1] < len(ALL_RATES) and 0 <= x[2] < len(ALL_BETAS)]


def tune() -> tuple[dict[Place, float], list[Place]]:
    """Tries the grid of the frontier, and then the neighbors of each loss's best setting until all
    of them have been tried. Returns the accuracies and the best settings, one for each loss."""
    new = [(x, i, j) for x in LOSSES for i in (2, 3) for j in ((2, 3, 4, 5) if x != "sft" else [0])]
    tried = {}
    while new:
        tried |= accuracies(new)
        best = [max((x for x in tried if x[0] == loss), key=tried.get) for loss in LOSSES]
        new = [x for place in best for x in near(place) if x not in tried]
    return tried, best


if __name__ == "__main__":
    page.ask(QUESTIONS, problems("validation", 500, seed=1))
    tried, best = tune()
    runs = [run for runs in train(best, TESTED).values() for run in runs]
    rows = []
    for place in best:
        loss, i, j = place
        beta = f"{ALL_BETAS[j]:g}" if loss != "sft" else "-"
        others = ", ".join(f"{tried[x]:.1f}" for x in near(place))
        count = sum(x[0] == loss for x in tried)
        rows.append([loss, f"{ALL_RATES[i]:g}", beta, f"{tried[place]:.1f}", others, count])
    gains = page.means(runs, "greedy")
    figure = Figure(figsize=(7, 3), layout="constrained")
    axis = figure.subplots()
    page.ticks(axis, {name: gain for name, (gain,) in gains.items()})
    axis.set(xlabel="gain in greedy accuracy, points; a tick for each seed", xlim=(0, None))
    page.save(__file__, figure)
    head = "loss", "lr", "beta", "accuracy, %", "of its neighbors, %", "settings tried"
    page.write(__file__, runs, OUT, compare=True, tuned=(head, rows))
