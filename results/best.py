"""Makes results/best.md and results/best.png: python results/best.py

Tunes every loss on the same small grid by the accuracy of runs with seed 0 on validation problems,
and compares the tuned losses by the accuracy of runs with four other seeds on test problems. On
each seed all losses start from the same base model and train on the same pairs in the same order.
"""

from pathlib import Path

import numpy as np
from pool import COLORS, bases, graded, moved, on_pairs, provenance, spread, train_all

import train
from mio import LOSSES as DECLARED
from support.figures import Column

LOSSES = ("dpo", "mio", "bce", "nwj", "dv", "ipo", "kto", "simpo", "orpo", "rpo", "apo_zero", "sft")
RATES, SCALES = (1e-4, 3e-4), (0.25, 1.0)  # learning rates, and factors of the demonstration's beta
TUNED_ON, TESTED_ON, PAIRS, EPOCHS = 0, (1, 2, 3, 4), 2000, 2

TEXT = """# Best against best

**{verdict}**

**Question.** Which loss solves the most problems if each loss is tuned on the same grid?

**Expected before the run.** At one learning rate for all losses, sft and dpo solved more problems
than mio ([demonstration.md](demonstration.md)). Tuning should select a smaller beta for mio and
close this gap, and most losses should end within two points of each other.

`python results/best.py` made this page ({provenance}). Each run trains on {pairs:,} pairs for
{epochs} epochs. The grid combines the learning rates {rates} with {scales} times the default beta
that each loss has on the built-in task. All settings are run on seed {tuned_on}. For each loss, the
setting with the highest greedy accuracy on 1,000 validation problems is then run on seeds {seeds}.
The table shows this validation accuracy on seed {tuned_on}, and the mean (lowest, highest) of gain
and Δ over the other seeds. The gain is the greedy accuracy on 1,000 test problems minus the
accuracy of the seed's base model ({base}), in points. Δ is the mean change of an answer's summed
log-prob on held-out pairs during training.

![Gain in greedy accuracy by loss: a tick for each seed, a dot for the mean](best.png)

| loss | lr | beta | validation accuracy, % | gain, points | Δ chosen, nats | Δ rejected, nats |
|---|---|---|---|---|---|---|
{table}

The next table shows the accuracy of each loss minus the accuracy of mio on the same test problems,
averaged over the {count} seeds, with a 95 % interval of the paired differences:

| loss | accuracy minus that of mio, points |
|---|---|
{differences}

**What it does not show.** The losses are compared on {count} seeds, and the intervals are computed
over problems, not over base models. Each loss has four settings, or two if the loss has no beta.
The selected setting has the lower learning rate for {edge} of {losses} losses and the smaller beta
for {small} losses. Settings outside the grid could therefore be better, above all for the losses
that end below the base. The experiment covers one small task with short training.
"""


def draw(gains: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for place, (loss, values) in enumerate(gains.items()):
        color = COLORS.get(loss, "0.3")
        axis.plot([min(values), max(values)], [place, place], color=color, linewidth=1)
        axis.plot(values, [place] * len(values), "|", color=color, markersize=7)
        axis.plot(np.mean(values), place, "o", color=color, markersize=6)
    axis.axvline(0, color="0.4", linewidth=0.8, zorder=0)
    axis.set_yticks(range(len(gains)), gains)
    axis.invert_yaxis()
    axis.set_xlabel("greedy accuracy over the base, points: seeds, and their mean")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)


def main() -> None:
    base = bases()

    def folder(loss: str, rate: float, scale: float, seed: int) -> str:
        return f"out/best/seed{seed}/{loss}-{rate:g}-{scale:g}"

    def job(loss: str, rate: float, scale: float, seed: int) -> list[str]:
        flags = {"loss": loss, "lr": rate, "epochs": EPOCHS}
        if DECLARED[loss].uses_beta:
            _, demonstration = train.parse_options(["--loss", loss], train.Options, "")
            flags["beta"] = demonstration.beta * scale
        return on_pairs(base[seed], PAIRS, seed, **flags)

    grid = {(loss, rate, scale): folder(loss, rate, scale, TUNED_ON)
            for loss in LOSSES for rate in RATES for scale in SCALES
            if scale == 1 or loss != "sft"}  # fmt: skip
    made = train_all({out: job(*key, TUNED_ON) for key, out in grid.items()}, grade=True)
    scores = {key: graded(out)["validation"].mean() for key, out in grid.items()}
    best = {loss: max((k for k in scores if k[0] == loss), key=scores.get) for loss in LOSSES}
    finals = {(loss, seed): folder(*best[loss], seed) for loss in LOSSES for seed in TESTED_ON}
    made |= train_all({finals[loss, s]: job(*best[loss], s) for loss, s in finals}, grade=True)

    start = {seed: graded(f"{base[seed]}/start")["test"] for seed in TESTED_ON}
    right = {key: graded(out)["test"] for key, out in finals.items()}
    gains = {loss: [100 * (right[loss, s] - start[s]).mean() for s in TESTED_ON] for loss in LOSSES}
    order = sorted(LOSSES, key=lambda loss: -np.mean(gains[loss]))
    draw({loss: gains[loss] for loss in order})
    rows, differences = [], []
    together = {loss: Column(np.concatenate([right[loss, s] for s in TESTED_ON]) * 1.0)
                for loss in LOSSES}  # fmt: skip
    for loss in order:
        _, rate, _ = best[loss]
        beta = made[finals[loss, TESTED_ON[0]]]["train_config"]["beta"]
        moves = [spread([moved(finals[loss, s], side)[1][-1] for s in TESTED_ON])
                 for side in ("chosen", "rejected")]  # fmt: skip
        score = f"{100 * scores[best[loss]]:.1f}"
        beta = "" if loss == "sft" else f"{beta:g}"
        rows.append(f"| {loss} | {rate:g} | {beta} | {score} | {spread(gains[loss], 1)} | "
                    f"{' | '.join(moves)} |")  # fmt: skip
        if loss != "mio":
            d = together[loss].difference(together["mio"])
            differences.append(f"| {loss} | {100 * d.mean:+.1f} [{100 * d.low:+.1f}, "
                               f"{100 * d.high:+.1f}] |")  # fmt: skip
    text = TEXT.format(
        verdict=f"By mean gain in accuracy over the base, {order[0]} is 1st of {len(order)} "
        f"losses, dpo is {order.index('dpo') + 1}th and mio is {order.index('mio') + 1}th.",
        provenance=provenance(made), rates=" and ".join(f"{r:g}" for r in RATES),
        scales=" and ".join(f"{s:g}" for s in SCALES), tuned_on=TUNED_ON, pairs=PAIRS,
        epochs=EPOCHS, seeds=", ".join(map(str, TESTED_ON)), table="\n".join(rows),
        count=len(TESTED_ON), differences="\n".join(differences), losses=len(LOSSES),
        edge=sum(rate == min(RATES) for _, rate, _ in best.values()),
        small=sum(scale == min(SCALES) for _, _, scale in best.values()),
        base=", ".join(f"{100 * start[s].mean():.1f} %" for s in TESTED_ON),
    )  # fmt: skip
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
