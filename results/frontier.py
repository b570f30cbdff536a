"""Does MIO protect chosen answers, or does it only move less? python results/frontier.py"""

import numpy as np
from matplotlib.figure import Figure
from page import LOOKS, SEEDS, bases, interval, make, markdown, means, save, write

LOSSES, BETAS = ["mio", "dpo", "bce", "ipo", "orpo", "sft"], [0.125, 0.5, 2.0, 8.0]
RATES = [3e-4, 1e-3]
FALLS = [0.5, 1, 2, 4, 8]  # nats by which the rejected log-prob has fallen


def curve(found: dict, loss: str, lr: float) -> np.ndarray:
    """Returns (3, betas, seeds): fall of the rejected, change of the chosen, gain in points."""
    names = [f"{loss},beta={beta},lr={lr}" for beta in BETAS if loss != "sft"]
    values = np.array([found[name] for name in names or [f"{loss},lr={lr}"]])  # (betas, 3, seeds)
    return values.transpose(1, 0, 2) * np.array([-1, 1, 1])[:, None, None]


def at(falls: np.ndarray, values: np.ndarray, level: float) -> np.ndarray:
    """Returns (seeds,): values (betas, seeds) at a fall, interpolated between the neighboring betas
    of each seed, or NaN where the loss does not fall so far."""
    found, order = [], falls.argsort(axis=0)
    for x, y, i in zip(falls.T, values.T, order.T):
        found.append(np.interp(level, x[i], y[i], left=np.nan, right=np.nan))
    return np.array(found)


def matched(found: dict) -> list[list[str]]:
    """Returns rows that compare losses at equal falls of the rejected answers."""
    rows = []
    for lr in RATES:
        curves = {loss: curve(found, loss, lr) for loss in ("mio", "dpo", "bce")}
        for level in FALLS:
            chosen = {loss: at(c[0], c[1], level) for loss, c in curves.items()}
            greedy = {loss: at(c[0], c[2], level) for loss, c in curves.items()}
            cells = [f"{chosen[loss].mean():+.2f}" for loss in ("mio", "dpo")]
            cells += [interval(chosen[loss] - chosen["dpo"]) for loss in ("mio", "bce")]
            cells += [interval(greedy["mio"] - greedy["dpo"], 1)]
            rows.append([f"{lr:g}", level, *("-" if "nan" in cell else cell for cell in cells)])
    return rows


def draw(axis, found: dict, row: int, label: str) -> None:
    """Draws a line for each loss and learning rate; row: 1 for the chosen, 2 for the gain."""
    for loss in LOSSES:
        for lr, style in zip(RATES, ("-", "--")):
            values, (color, marker) = curve(found, loss, lr), LOOKS[loss]
            looks = {"fmt": style + marker, "color": color, "lw": 1.3, "elinewidth": 0.7}
            looks |= {"label": f"{loss}, lr {lr:g}", "mfc": color if style == "-" else "white"}
            x, y = values[0].mean(axis=1), values[row].mean(axis=1)
            axis.errorbar(x, y, values[row].std(axis=1, ddof=1), **looks)
    axis.set_xscale("symlog", linthresh=0.5)
    axis.set(xlabel="fall of the rejected log-prob, nats", ylabel=label)


if __name__ == "__main__":
    runs = []
    for seed, files in bases(SEEDS).items():
        runs += make(loss=LOSSES, lr=RATES, beta=BETAS, epochs=1, eval_every=30, **files,
                     out=f"out/frontier/seed{seed}")  # fmt: skip
    found = means(runs, "Δ rejected", "Δ chosen", "greedy")
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw(left, found, 1, "change of the chosen log-prob, nats")
    draw(right, found, 2, "gain in greedy accuracy, points")
    left.set_yscale("symlog", linthresh=1)
    save(__file__, figure, columns=6)
    head = ["lr", "fall of rejected, nats", "chosen, mio", "chosen, dpo", "chosen, mio minus dpo"]
    head += ["chosen, bce minus dpo", "greedy, mio minus dpo, points"]
    write(__file__, runs, "out/bases", "out/frontier", matched=markdown(*head, rows=matched(found)))
