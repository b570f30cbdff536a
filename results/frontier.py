"""Does MIO protect chosen answers, or does it only move less? python results/frontier.py"""

from pathlib import Path

import numpy as np
from page import LOOKS, SEEDS, bases, interval, make, means, write

LOSSES, BETAS = ["mio", "dpo", "bce", "ipo", "orpo", "sft"], [0.125, 0.5, 2.0, 8.0]
RATES = [3e-4, 1e-3]
FALLS = [0.5, 1, 2, 4, 8]  # nats by which the rejected log-prob has fallen


def at(falls: np.ndarray, values: np.ndarray, level: float) -> float:
    """Returns values interpolated at a level of falls, or NaN outside the range of falls."""
    order = np.argsort(falls)
    return np.interp(level, falls[order], values[order], left=np.nan, right=np.nan)


def curve(found: dict, loss: str, lr: float) -> np.ndarray:
    """Returns (betas, 3, seeds): fall of the rejected, change of the chosen, gain in points."""
    names = [f"{loss},beta={beta},lr={lr}" for beta in BETAS if loss != "sft"]
    names = names or [f"{loss},lr={lr}"]  # sft has no beta
    return np.array([found[name] * [[-1], [1], [1]] for name in names])


def matched(found: dict) -> str:
    """Returns a table of mio, dpo and bce at equal falls of the rejected answers."""
    head = "lr", "fall of rejected", "chosen, mio", "chosen, dpo", "chosen, mio minus dpo"
    head += "chosen, bce minus dpo", "greedy, mio minus dpo, points"
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for lr in RATES:
        for level in FALLS:
            chosen, greedy = [
                {loss: np.array([at(c[:, 0, s], c[:, row, s], level) for s in range(len(SEEDS))])
                 for loss in ("mio", "dpo", "bce") if len(c := curve(found, loss, lr))}
                for row in (1, 2)
            ]  # fmt: skip
            gaps = chosen["mio"] - chosen["dpo"], chosen["bce"] - chosen["dpo"]
            cells = [f"{chosen[loss].mean():+.2f}" for loss in ("mio", "dpo")]
            cells += [interval(gap) for gap in gaps] + [interval(greedy["mio"] - greedy["dpo"], 1)]
            cells = ["-" if "nan" in cell else cell for cell in cells]
            lines.append(f"| {lr:g} | {level:g} nats | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(axis, found: dict, row: int) -> None:
    """Draws a line for each loss and learning rate; row: 1 for the chosen, 2 for the gain."""
    for loss in LOSSES:
        for lr, style in zip(RATES, ("-", "--")):
            falls, *values = curve(found, loss, lr).transpose(1, 0, 2)  # (betas, seeds) each
            color, marker = LOOKS[loss]
            looks = {"fmt": style + marker, "color": color, "lw": 1.3, "elinewidth": 0.7}
            looks |= {"label": f"{loss}, lr {lr:g}", "mfc": color if style == "-" else "white"}
            y = values[row - 1]
            axis.errorbar(falls.mean(1), y.mean(1), y.std(1, ddof=1), **looks)
    axis.axhline(0, color="0.4", lw=0.8, zorder=0)
    axis.set_xscale("symlog", linthresh=0.5)
    axis.set_xlabel("fall of the rejected log-prob, nats")
    axis.spines[["top", "right"]].set_visible(False)


def results() -> list:
    flags, runs = bases(SEEDS), []
    for seed, files in flags.items():
        runs += make(loss=LOSSES, lr=RATES, beta=BETAS, epochs=1, eval_every=30, **files,
                     out=f"out/frontier/seed{seed}")  # fmt: skip
    return runs


if __name__ == "__main__":
    from matplotlib.figure import Figure

    runs = results()
    found = means(runs, "Δ rejected", "Δ chosen", "gain")
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw(left, found, 1)
    draw(right, found, 2)
    left.set_yscale("symlog", linthresh=1)
    left.set_ylabel("change of the chosen log-prob, nats")
    right.set_ylabel("gain in greedy accuracy, points")
    labels = left.get_legend_handles_labels()
    figure.legend(*labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)
    write(__file__, runs, "out/bases", "out/frontier", matched=matched(found))
