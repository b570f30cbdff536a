"""Makes results/real_text.md and .png: python results/real_text.py CHECKPOINT PAIRS.jsonl

Compares dpo with mio on real text. CHECKPOINT is the folder of the model to train, and PAIRS.jsonl
holds preference pairs. Each of three seeds has its own held-out split and order of the pairs.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
from pool import COLORS, ROOT, metric, moved, provenance, spread, train_all
from safetensors.torch import load_file

SEEDS, RATE, EPOCHS, BATCH = (0, 1, 2), 3e-5, 1, 16
BETAS = {"dpo": 0.1, "mio": 0.2}

TEXT = """# dpo and mio on real text

**Question.** [The demonstration](demonstration.md) shows how dpo and mio change chosen and rejected
log-probs. Do the log-probs of a Llama checkpoint of {parameters} parameters change in the same way
on {rows} pairs of real text, and under which loss is the reward accuracy on held-out pairs higher?

**Data.** The pairs come from GSM8K's example model solutions (`example_model_solutions.jsonl` of
openai/grade-school-math). Each of the {rows} pairs holds a right and a wrong solution to one test
problem. Models of GPT-3's size wrote the solutions, so the pairs are off-policy. The checkpoint was
trained on GSM8K's training text.

**Expected before the run.** At betas as small as 0.1 for dpo and 0.2 for mio, both losses may lower
the chosen log-prob, dpo more than mio. The reward accuracies of both losses agree within the
standard error, which is about {error:.0f} points at {held_out} held-out pairs.

`python results/real_text.py CHECKPOINT PAIRS.jsonl` made this page from the weights of a checkpoint
and a file of pairs (sha256 {hashes}; {provenance}). Each run trains for {epochs} epoch with {batch}
pairs a step, learning rate {rate:g}, and beta 0.1 for dpo and 0.2 for mio. Each of the seeds
{seeds} holds out a different tenth of the pairs, split by prompts. Δ is the change of an answer's
summed log-prob on held-out pairs during training, and the margin is Δ chosen minus Δ rejected. Each
cell is the mean over seeds (lowest, highest).

![Δ chosen, Δ rejected and reward accuracy over steps](real_text.png)

| loss | reward accuracy, % | Δ chosen, nats | Δ rejected, nats | margin, nats |
|---|---|---|---|---|
{table}

For seeds {seeds} in turn, the reward accuracies of dpo and mio on the same held-out pairs are
{by_seed}.

**What it shows.** The chosen log-prob ends below its start on {fell_dpo} of {count} seeds under dpo
and on {fell_mio} of {count} under mio. The chosen log-prob ends lower under dpo than under mio on
{lower} of {count} seeds. The mean (lowest, highest) difference in reward accuracy, mio minus dpo,
is {difference} points.

**What it does not show.** The trained models' own answers to the questions were not graded. The
experiment has one small checkpoint, one learning rate, one beta for each loss, and {held_out}
held-out pairs a seed.
"""


def draw(outs: dict) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(9.5, 3.4), layout="constrained")
    for axis, side in zip(axes, ("chosen", "rejected", "accuracy")):
        for loss in BETAS:
            if side == "accuracy":
                found = [metric(outs[loss, s], "eval_rewards/accuracies") for s in SEEDS]
            else:
                found = [moved(outs[loss, seed], side) for seed in SEEDS]
            steps, values = found[0][0], np.array([v for _, v in found])
            if side == "accuracy":  # at step 0 all rewards are 0
                steps, values = steps[1:], 100 * values[:, 1:]
            axis.plot(steps, values.mean(0), color=COLORS[loss], linewidth=2, label=loss,
                      linestyle="-" if loss == "mio" else "--")  # fmt: skip
            axis.fill_between(steps, values.min(0), values.max(0), color=COLORS[loss], alpha=0.15,
                              linewidth=0)  # fmt: skip
        axis.set_title("reward accuracy, %" if side == "accuracy" else f"Δ {side}, nats")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    checkpoint, data = sys.argv[1:]
    outs = {(loss, seed): f"out/real_text/{loss}-{seed}" for seed in SEEDS for loss in BETAS}
    made = train_all({
        outs[loss, seed]: ["--loss", loss, "--beta", str(BETAS[loss]), "--init", checkpoint,
                           "--data", data, "--lr", str(RATE), "--epochs", str(EPOCHS),
                           "--batch_size", str(BATCH), "--seed", str(seed)]
        for loss, seed in outs
    })  # fmt: skip
    draw(outs)
    ends = {(loss, side): [moved(outs[loss, s], side)[1][-1] for s in SEEDS]
            for loss in BETAS for side in ("chosen", "rejected")}  # fmt: skip
    right = {loss: [100 * metric(outs[loss, s], "eval_rewards/accuracies")[1][-1] for s in SEEDS]
             for loss in BETAS}  # fmt: skip
    rows = []
    for loss in BETAS:
        margins = [c - r for c, r in zip(ends[loss, "chosen"], ends[loss, "rejected"])]
        cells = [spread(right[loss], 1, sign=""), spread(ends[loss, "chosen"]),
                 spread(ends[loss, "rejected"]), spread(margins)]  # fmt: skip
        rows.append(f"| {loss} | {' | '.join(cells)} |")
    table = made[outs["dpo", 0]]["summary"]["table"]
    held_out = table["dpo"]["Δ chosen"]["n"]
    files = [Path(checkpoint) / "model.safetensors", Path(data)]
    hashes = [hashlib.sha256((ROOT / file).read_bytes()).hexdigest()[:12] for file in files]
    weights = load_file(ROOT / outs["dpo", 0] / "model.safetensors").values()
    text = TEXT.format(
        parameters=f"{sum(weight.numel() for weight in weights) / 1e6:.1f} M",
        rows=len((ROOT / data).read_text(encoding="utf-8").splitlines()), held_out=held_out,
        error=100 * (0.25 / held_out) ** 0.5, hashes=" and ".join(hashes),
        provenance=provenance(made), epochs=EPOCHS, batch=BATCH,
        rate=RATE, seeds=", ".join(map(str, SEEDS)), table="\n".join(rows), count=len(SEEDS),
        by_seed="; ".join(f"{d:.1f} and {m:.1f} %" for d, m in zip(right["dpo"], right["mio"])),
        fell_dpo=sum(x < 0 for x in ends["dpo", "chosen"]),
        fell_mio=sum(x < 0 for x in ends["mio", "chosen"]),
        lower=sum(d < m for d, m in zip(ends["dpo", "chosen"], ends["mio", "chosen"])),
        difference=spread([m - d for d, m in zip(right["dpo"], right["mio"])], 1),
    )  # fmt: skip
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
