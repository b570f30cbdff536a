"""Makes results/why.md and results/why.png: python results/why.py

Measures the effect of each part of mio with three variants of the loss: without the term ½ sp(T_w),
with the rejected answers alone as the marginal, and with means over tokens instead of sums. The
script also measures how the log-probs of rare and of likely chosen answers change.

With flags, such as --loss mio_free, the script runs train.py, and --loss also takes mio_free and
mio_means, the losses that are defined here.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from pool import (
    COLORS,
    ROOT,
    SEEDS,
    bases,
    first,
    graded,
    moved,
    on_pairs,
    provenance,
    spread,
    train_all,
)
from torch import Tensor
from torch.nn import functional as F

from mio import LOSSES, Answers, mio


def mio_free(chosen: Answers, rejected: Answers) -> Tensor:
    """sp(-T_w) + sp(T_l)/2"""  # without the term that limits T_w
    return F.softplus(-chosen.rewards) + F.softplus(rejected.rewards) / 2


def mio_means(chosen: Answers, rejected: Answers) -> Tensor:
    """mio with log-ratios that are means over tokens instead of sums: T = beta z / n"""

    def means(side: Answers) -> Answers:
        ref = side.mean_logps - side.mean_logratios
        return dataclasses.replace(side, logps=side.mean_logps, ref_logps=ref)

    return mio(means(chosen), means(rejected))


LOSSES |= {
    "mio_free": dataclasses.replace(
        LOSSES["mio"], function=mio_free, initial_loss=1.5 * math.log(2)
    ),
    "mio_means": dataclasses.replace(LOSSES["mio"], function=mio_means, uses="means"),
}

# train.py takes the choices of --loss from LOSSES when imported, so LOSSES is extended before.
import train  # noqa: E402
from data import LAYOUT, load_pairs  # noqa: E402
from eval import pair_logps  # noqa: E402
from support.trained_run import load_checkpoint  # noqa: E402

PAIRS, EPOCHS, RATE = 3000, 2, 1e-4
VARIANTS = {"mio": "mio", "without ½ sp(T_w)": "mio_free", "rejected-only marginal": "bce",
            "means instead of sums": "mio_means", "dpo": "dpo"}  # fmt: skip
HALVES = ("rare", "likely")

TEXT = """# Which part of mio does what?

**Question.** The loss mio is sp(-T_w) + ½ sp(T_w) + ½ sp(T_l), with the symbols of
[mio.py](../mio.py). (1) What is the effect of three parts of mio: the term ½ sp(T_w), the mixture
of chosen and rejected answers as the marginal, and sums over tokens instead of means? (2) Which
loss fails to raise the log-probs of chosen answers that the base model finds unlikely: DPO, whose
gradient vanishes as the margin T_w - T_l grows, or MIO, whose upward pull on T_w ends at T_w = log
2?

**Expected before the run.** (1) Without ½ sp(T_w) the chosen log-prob rises further, because no
term limits the rise, and accuracy rises, too. With the rejected answers alone as the marginal, mio
pushes the rejected answer down twice as hard, so the rejected log-prob falls further and drags the
chosen log-prob down. Means over tokens, at a beta that gives the same reward on average, change
little if answers have similar lengths. (2) MIO raises rare (unlikely) chosen answers more than
likely chosen answers, which have little to gain. Under DPO rare chosen answers fall furthest.
However, in a model in which the probability of each answer is a free parameter, MIO raises rare
answers less than DPO does.

`python results/why.py` made this page ({provenance}). Each run trains on {pairs:,} pairs for
{epochs} epochs at learning rate {rate:g}. Beta is {half:g} for dpo, {means:.0f} for token means
(the mean length of an answer in tokens) and 1 otherwise. The variant with the rejected-only
marginal is the loss bce. Each cell is the mean over seeds {seeds} (lowest, highest). The gain is
the increase in greedy accuracy over the base on 1,000 test problems. Δ is the change of an answer's
summed log-prob on held-out pairs during training, in nats.

| loss | gain, points | Δ chosen, nats | Δ rejected, nats |
|---|---|---|---|
{variants}

A pair is "rare" if its chosen answer has a log-prob per token below the median under the base, and
"likely" otherwise. Training pairs and held-out pairs are both split in this way. The median summed
log-prob of chosen answers is {rare:.1f} nats in the rare half of the training pairs and
{likely:.1f} nats in the likely half.

![Change of log-probs of rare and of likely chosen answers under dpo and mio](why.png)

| loss | training pairs | gain, points | Δ chosen, rare pairs | Δ chosen, likely pairs |
|---|---|---|---|---|
{sides}

**What it shows.** {shows}

**What it does not show.** All chosen answers are right answers that were sampled from the base, so
the page says nothing about chosen answers that the base would never give. The learning rate and the
betas were not tuned for each variant. The rare and the likely half differ in more than likelihood:
rare answers belong to harder problems.
"""


def likelihood(base: str, file: str) -> tuple[Tensor, Tensor, list]:
    """Loads the pairs in `file`. Returns the log-probs of their chosen answers under the model in
    `base`, summed (pairs,) and per token (pairs,), and the pairs."""
    model, tokenizer = load_checkpoint(ROOT / base, "cpu", torch.float32)
    pairs = load_pairs(ROOT / file, tokenizer, 96)
    sums = pair_logps(model, pairs, *LAYOUT, torch.float32)[:, 0]
    return sums, sums / torch.tensor(pairs.lengths()[:, 1]), pairs


def halves(base: str) -> dict[str, float]:
    """Splits the first PAIRS training pairs of a base by the log-prob per token of the chosen
    answer, and writes rare-PAIRS.jsonl and likely-PAIRS.jsonl. Returns the median summed log-prob
    of the chosen answers in each half, in nats."""
    few = first(f"{base}/pairs.jsonl", PAIRS)
    sums, means, pairs = likelihood(base, few)
    lines = (ROOT / few).read_text(encoding="utf-8").splitlines(True)
    assert len(lines) == len(pairs)
    order = means.argsort()
    parts = dict(zip(HALVES, order.split((len(order) + 1) // 2)))
    for name, index in parts.items():
        text = "".join(lines[i] for i in sorted(index.tolist()))
        (ROOT / base / f"{name}-{PAIRS}.jsonl").write_text(text, encoding="utf-8")
    return {name: sums[index].median().item() for name, index in parts.items()}


def by_half(base: str, folder: str) -> dict[str, float]:
    """Returns, for the rare and for the likely held-out pairs, the mean change of the chosen
    answers' summed log-probs from the base to the run in `folder`, in nats."""
    file = ROOT / folder / "halves.json"
    if not file.exists():
        held_out = f"{base}/heldout_pairs.jsonl"
        before, means, _ = likelihood(base, held_out)
        change = likelihood(folder, held_out)[0] - before
        parts = dict(zip(HALVES, means.argsort().split((len(means) + 1) // 2)))
        file.write_text(json.dumps({n: change[index].mean().item() for n, index in parts.items()}))
    return json.loads(file.read_text())


def draw(moves: dict) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, trained in zip(axes, ("all", *HALVES)):
        for at, loss in enumerate(("dpo", "mio")):
            for side, half in enumerate(HALVES):
                values = [move[half] for move in moves[loss, trained]]
                bar = axis.bar(side + 0.38 * (at - 0.5), np.mean(values), 0.34, color=COLORS[loss],
                               hatch="//" if loss == "dpo" else "", edgecolor="white")  # fmt: skip
                axis.plot([side + 0.38 * (at - 0.5)] * len(values), values, "k.", markersize=4)
                if not side:
                    bar.set_label(loss)
        axis.axhline(0, color="0.3", linewidth=0.8)
        axis.set_xticks((0, 1), [f"{half}\nheld-out chosen" for half in HALVES])
        axis.set_title(f"trained on {trained} pairs", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("change of log-prob, nats")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)


def verdict(gains: dict, moves: dict, sides: dict) -> str:
    """Returns sentences that state the outcome, with numbers computed from the results."""
    whole = ", ".join(f"{name} {np.mean(values):+.1f}" for name, values in gains.items())
    parts = [f"The mean gains, in points, are: {whole}."]
    plain, free, other = (np.array([moves[name, side] for side in ("chosen", "rejected")])
                          for name in list(VARIANTS)[:3])  # fmt: skip
    parts.append(f"Without ½ sp(T_w) the chosen log-prob ends higher than under mio on "
                 f"{(free > plain)[0].sum()} of {len(SEEDS)} seeds. With the rejected answers "
                 f"alone as the marginal, the rejected log-prob ends lower than under mio on "
                 f"{(other < plain)[1].sum()} of {len(SEEDS)} seeds.")  # fmt: skip
    for loss in ("dpo", "mio"):
        rare, likely = (np.mean([s[half] for s in sides[loss, "all"]]) for half in HALVES)
        parts.append(f"If {loss} trains on all pairs, held-out log-probs change by {rare:+.2f} nats"
                     f" for rare and by {likely:+.2f} nats for likely chosen answers.")  # fmt: skip
    return " ".join(parts)


def main() -> None:
    base = bases()

    def folder(name: str, seed: int) -> str:
        return f"out/why/seed{seed}/{name.replace(' ', '-')}"

    def job(loss: str, seed: int, beta: float, trained: str = "all") -> list[str]:
        flags = {"loss": loss, "lr": RATE, "beta": beta, "epochs": EPOCHS}
        if trained != "all":
            flags["data"] = f"{base[seed]}/{trained}-{PAIRS}.jsonl"
        return on_pairs(base[seed], PAIRS, seed, **flags)

    medians = [halves(base[seed]) for seed in SEEDS]
    lengths = [likelihood(base[s], f"{base[s]}/heldout_pairs.jsonl")[2].lengths()[:, 1:].mean()
               for s in SEEDS]  # fmt: skip
    betas = {"dpo": 0.5, "mio_means": float(round(np.mean(lengths)))}
    jobs = {folder(name, seed): job(loss, seed, betas.get(loss, 1.0))
            for seed in SEEDS for name, loss in VARIANTS.items()}  # fmt: skip
    jobs |= {folder(f"{loss} {half}", seed): job(loss, seed, betas.get(loss, 1.0), half)
             for seed in SEEDS for loss in ("dpo", "mio") for half in HALVES}  # fmt: skip
    made = train_all(jobs, script="results/why.py", grade=True)

    def gain(name: str) -> list[float]:
        return [100 * (graded(folder(name, s))["test"] - graded(f"{base[s]}/start")["test"]).mean()
                for s in SEEDS]  # fmt: skip

    gains = {name: gain(name) for name in VARIANTS}
    moves = {(name, side): [moved(folder(name, s), side)[1][-1] for s in SEEDS]
             for name in VARIANTS for side in ("chosen", "rejected")}  # fmt: skip
    variants = [f"| {name} | {spread(gains[name], 1)} | {spread(moves[name, 'chosen'])} | "
                f"{spread(moves[name, 'rejected'])} |" for name in VARIANTS]  # fmt: skip
    sides, rows = {}, []
    for loss in ("dpo", "mio"):
        for trained in ("all", *HALVES):
            name = loss if trained == "all" else f"{loss} {trained}"
            found = sides[loss, trained] = [by_half(base[s], folder(name, s)) for s in SEEDS]
            cells = [spread([one[half] for one in found]) for half in HALVES]
            rows.append(f"| {loss} | {trained} | {spread(gain(name), 1)} | {' | '.join(cells)} |")
    draw(sides)
    text = TEXT.format(
        provenance=provenance(made), pairs=PAIRS, epochs=EPOCHS, rate=RATE, half=betas["dpo"],
        means=betas["mio_means"], seeds=", ".join(map(str, SEEDS)), variants="\n".join(variants),
        rare=np.median([m["rare"] for m in medians]), sides="\n".join(rows),
        likely=np.median([m["likely"] for m in medians]), shows=verdict(gains, moves, sides),
    )  # fmt: skip
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    if sys.argv[1:]:
        train.main()
    else:
        main()
