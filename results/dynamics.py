"""Makes results/dynamics.md and results/dynamics.png: python results/dynamics.py

Measures how far the log-probs of held-out chosen and rejected answers move in four epochs under mio
and dpo, on a grid of learning rates and betas. The beta of dpo is half the beta of mio, so that
both losses start with the same gradient.
"""

from pathlib import Path

import numpy as np
from pool import COLORS, SEEDS, bases, first, moved, on_pairs, provenance, spread, train_all

LOSSES = {"mio": 1.0, "dpo": 0.5}  # each loss and its beta, which SCALES multiply
SCALES, RATES, PAIRS, EPOCHS = (0.25, 1.0, 4.0), (1e-4, 3e-4), 1000, 4
CELLS = [(rate, scale) for rate in RATES for scale in SCALES]
SIDES = ("chosen", "rejected")

TEXT = """# Where do chosen log-probs fall?

**Question.** The paper says that the chosen log-prob falls late in training under DPO and not under
MIO. At which learning rates and betas does the chosen log-prob fall on the built-in task?

**Expected before the run.** Under DPO the chosen log-prob falls more at smaller betas and larger
learning rates, and rises at large betas. Under MIO the chosen log-prob rises at beta 1 (the default
of the demonstration) and above, and falls a little at beta 0.25. The reason is that MIO pulls a
chosen log-prob up more strongly the further it has fallen, but the pull is strong only once T_w,
which is beta times the log-ratio, is below about -1.

`python results/dynamics.py` made this page ({provenance}). Each run trains on {pairs:,} pairs for
{epochs} epochs, with 32 pairs a step. A setting is a learning rate with a beta for mio and half
this beta for dpo, so that both losses start with the same gradient. Each setting is run on seeds
{seeds}. The table shows the change of an answer's summed log-prob from the start to the end of
training, in nats, averaged over 200 held-out pairs. Each cell is the mean over seeds (lowest,
highest).

![Change of chosen and rejected log-probs over steps, a panel for each setting](dynamics.png)

| learning rate | beta of mio and dpo | mio, chosen | dpo, chosen | mio, rejected | dpo, rejected |
|---|---|---|---|---|---|
{table}

**What it shows.** Averaged over seeds, the chosen log-prob ends below its start in {fell_dpo} of
{cells} settings under dpo and in {fell_mio} of {cells} under mio. The chosen log-prob ends lower
under dpo than under mio in {lower} of {cells} settings, and in {lower_runs} of {runs} pairs of runs
with the same setting and seed. In {late_dpo} of the {fell_dpo} settings in which dpo lowers the
chosen log-prob, the mean over seeds is lowest in the last quarter of training. The rejected
log-prob falls further under dpo than under mio in {further} of {cells} settings.

**What it does not show.** The experiment covers one small task and one small model. The page says
nothing about how many problems the models solve; [best.md](best.md) reports accuracies.
"""


def folder(loss: str, rate: float, scale: float, seed: int) -> str:
    return f"out/dynamics/seed{seed}/{loss}-{scale:g}-{rate:g}"


def curves(loss: str, rate: float, scale: float, side: str) -> tuple[list[int], np.ndarray]:
    found = [moved(folder(loss, rate, scale, seed), side) for seed in SEEDS]
    return found[0][0], np.array([values for _, values in found])


def draw() -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(9, 5.6), sharex=True, sharey=True,
                                   layout="constrained")  # fmt: skip
    for axis, (rate, scale) in zip(axes.flat, CELLS):
        for loss in LOSSES:
            for side, width in zip(SIDES, (2.2, 1.0)):
                steps, values = curves(loss, rate, scale, side)
                look = {"color": COLORS[loss], "linestyle": "-" if loss == "mio" else "--"}
                axis.plot(steps, values.mean(0), linewidth=width, label=f"{loss}, {side}", **look)
                axis.fill_between(steps, values.min(0), values.max(0), alpha=0.12, linewidth=0,
                                  color=COLORS[loss])  # fmt: skip
        axis.axhline(0, color="0.4", linewidth=0.8, zorder=0)
        axis.set_yscale("symlog", linthresh=1)
        axis.set_yticks([0, -1, -10], ["0", "-1", "-10"])
        betas = ", dpo ".join(f"{beta * scale:g}" for beta in LOSSES.values())
        axis.set_title(f"lr {rate:g}, beta mio {betas}", fontsize=9)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.supylabel("change of held-out log-prob, nats\n(linear up to 1, then logarithmic)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)


def main() -> None:
    base = bases()
    made = train_all({
        folder(loss, rate, scale, seed): on_pairs(
            base[seed], PAIRS, seed, loss=loss, lr=rate, beta=beta * scale, epochs=EPOCHS,
            batch_size=32, eval_every=16, eval_data=first(f"{base[seed]}/heldout_pairs.jsonl", 200),
        )
        for seed in SEEDS for rate, scale in CELLS for loss, beta in LOSSES.items()
    })  # fmt: skip
    draw()
    found = {(loss, *cell, side): curves(loss, *cell, side)[1]  # (seeds, evaluations)
             for loss in LOSSES for cell in CELLS for side in SIDES}  # fmt: skip
    rows = []
    for rate, scale in CELLS:
        ends = [spread(found[loss, rate, scale, side][:, -1]) for side in SIDES for loss in LOSSES]
        betas = ", ".join(f"{beta * scale:g}" for beta in LOSSES.values())
        rows.append(f"| {rate:g} | {betas} | {' | '.join(ends)} |")
    chosen = {loss: [found[loss, *cell, "chosen"] for cell in CELLS] for loss in LOSSES}
    rejected = {loss: [found[loss, *cell, "rejected"] for cell in CELLS] for loss in LOSSES}
    fell = {loss: [c for c in chosen[loss] if c[:, -1].mean() < 0] for loss in LOSSES}
    pairs = list(zip(chosen["dpo"], chosen["mio"]))
    text = TEXT.format(
        provenance=provenance(made), seeds=", ".join(map(str, SEEDS)), pairs=PAIRS, epochs=EPOCHS,
        table="\n".join(rows), cells=len(CELLS), runs=len(CELLS) * len(SEEDS),
        fell_mio=len(fell["mio"]), fell_dpo=len(fell["dpo"]),
        lower=sum(d[:, -1].mean() < m[:, -1].mean() for d, m in pairs),
        lower_runs=sum((d[:, -1] < m[:, -1]).sum() for d, m in pairs),
        late_dpo=sum(c.mean(0).argmin() >= 0.75 * (c.shape[1] - 1) for c in fell["dpo"]),
        further=sum(d[:, -1].mean() < m[:, -1].mean()
                    for d, m in zip(rejected["dpo"], rejected["mio"])),
    )  # fmt: skip
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
