"""Does MIO protect chosen answers, or does it only move less? python results/frontier.py"""

from pathlib import Path

import numpy as np
import page
import toy
from matplotlib.figure import Figure

LOSSES, BETAS = ["mio", "dpo", "bce", "ipo", "orpo", "sft"], [0.125, 0.5, 2.0, 8.0]
RATES = [3e-4, 1e-3]
FALLS = [0.5, 1, 2, 4, 8]  # nats by which the rejected log-prob has fallen
TICKS = [0.2, 0.5, 1, 2, 5, 10, 20, 50]


def curve(found: dict, loss: str, lr: float) -> np.ndarray:
    """Returns (3, betas, seeds): fall of the rejected, change of the chosen, gain in points."""
    names = [f"{loss}, beta {beta:g}, lr {lr:g}" for beta in BETAS if loss != "sft"]
    names = names or [f"{loss}, lr {lr:g}"]
    values = np.array([found[name] for name in names])  # (betas, 3, seeds)
    return values.transpose(1, 0, 2) * np.array([-1, 1, 1])[:, None, None]


def at(falls: np.ndarray, values: np.ndarray, level: float) -> np.ndarray:
    """Returns (seeds,): values (betas, seeds) at a fall, interpolated between the neighboring betas
    of each seed, or NaN where the loss does not fall so far."""
    found, order = [], falls.argsort(axis=0)
    for x, y, i in zip(falls.T, values.T, order.T):
        found.append(np.interp(level, x[i], y[i], left=np.nan, right=np.nan))
    return np.array(found)


def matched(found: dict) -> list[list]:
    """Returns rows that compare losses at equal falls of the rejected, on the seeds on which both
    losses fall so far, if there are two."""
    rows = []
    for lr in RATES:
        curves = {loss: curve(found, loss, lr) for loss in ("mio", "dpo", "bce")}
        for level in FALLS:
            chosen = {loss: at(c[0], c[1], level) for loss, c in curves.items()}
            greedy = at(curves["mio"][0], curves["mio"][2], level)
            gaps = [chosen["mio"] - chosen["dpo"], chosen["bce"] - chosen["dpo"]]
            gaps += [greedy - at(curves["dpo"][0], curves["dpo"][2], level)]
            gaps = [gap[~np.isnan(gap)] for gap in gaps]
            if min(map(len, gaps)) > 1:
                cells = [page.interval(gap, digits) for gap, digits in zip(gaps, (2, 2, 1))]
                rows.append([f"{lr:g}", level, *cells, *(len(gap) for gap in gaps[:2])])
    return rows


def draw(axis, found: dict, row: int, losses: list[str]) -> None:
    """Draws a line for each loss and learning rate; row: 1 for the chosen, 2 for the accuracy."""
    curves = {f"{x}, lr {lr:g}": curve(found, x, lr) for x in losses for lr in RATES}
    page.lines(axis, {name: (c[0].mean(1), c[row].T) for name, c in curves.items()}, band=False)
    axis.set_xscale("log")
    axis.set_xticks(TICKS, TICKS)
    axis.set_xlabel("fall of the rejected log-prob, nats")
    label = "change of the chosen log-prob, nats", "gain in greedy accuracy, points"
    axis.set_ylabel(label[row - 1])


if __name__ == "__main__":
    runs = []
    for seed, files in page.bases(page.SEEDS).items():
        runs += page.make(loss=LOSSES, lr=RATES, beta=BETAS, epochs=1, eval_every=30, **files,
                     out=f"out/frontier/seed{seed}")  # fmt: skip
    found = page.means(runs, "Δ rejected", "Δ chosen", "greedy")
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw(left, found, 1, LOSSES)
    draw(right, found, 2, LOSSES)
    left.set_yscale("symlog", linthresh=1)
    left.set_yticks([0, *(-x for x in TICKS[2:])])
    left.yaxis.set_major_formatter("{x:g}")
    left.set_ylim(top=0.4)
    page.save(__file__, figure, columns=6)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    toy.draw(left, {loss: toy.shared_features(loss) for loss in ("mio", "dpo")})
    draw(right, found, 2, ["mio", "dpo", "sft"])
    right.legend(frameon=False)
    right.set_title("arithmetic task: accuracy")
    page.save(Path(__file__).with_name("overview.png"), figure)
    head = ["lr", "fall of rejected, nats", "chosen, mio minus dpo", "chosen, bce minus dpo"]
    head += ["greedy, mio minus dpo, points", "seeds of mio and dpo", "seeds of bce and dpo"]
    made = "out/bases", "out/frontier"
    page.write(__file__, runs, *made, matched=(head, matched(found)))
