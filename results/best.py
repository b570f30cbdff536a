"""Makes results/best.md: python results/best.py

Every loss at its best of the same small grid, chosen on validation problems of one seed, then
compared on test problems of all seeds: the same bases, pairs and order for all.
"""

import json
import statistics
import sys
from pathlib import Path

import numpy as np
from pool import ROOT, provenance, train_all

sys.path.insert(0, str(ROOT))
import eval as evaluation  # noqa: E402
import train  # noqa: E402
from data import is_correct, problems  # noqa: E402

LOSSES = ("dpo", "mio", "bce", "nwj", "dv", "ipo", "kto", "simpo", "orpo", "rpo", "apo_zero", "sft")
RATES, SCALES = (1e-4, 3e-4), (1.0, 4.0)  # learning rates; times the demonstration's beta
TUNED_ON, SEEDS, VALIDATION = 0, (0, 1, 2), 1000

TEXT = """# Best against best

**{verdict}**

**Question.** Which loss answers most problems right, each tuned on the same grid?

**Expected before the run.** At matched settings sft and dpo were ahead of mio; tuning should close
much of that.

`python results/best.py`: {provenance}. Learning rates {rates} times
{scales} of the demonstration's beta, the best by greedy accuracy on {validation} validation
problems of seed {tuned_on}; test accuracy on 1,000 test problems of seeds {seeds}, gain over the
base in points: the mean of seeds ± the standard error of that mean over seeds, and each seed.

| | lr | beta | validation, % | greedy gain, points | by seed | Δ chosen, nats | Δ rejected, nats |
|---|---|---|---|---|---|---|---|
{table}

Difference from mio on the same problems of all seeds together, 95 % paired bootstrap:

| | points |
|---|---|
{differences}

**What it does not show.** {count} seeds, four settings a loss ({two} where beta plays no part), one
small task of one kind.
"""


def folder(loss: str, rate: float, scale: float, seed: int) -> str:
    return f"out/demonstration/seed{seed}/best/{loss}-{rate:g}-{scale:g}"


def job(loss: str, rate: float, scale: float, seed: int) -> list[str]:
    base = f"out/demonstration/seed{seed}/" + ("base" if seed == 0 else f"base-seed{seed}")
    options, _ = train.parse_options(["--loss", loss])  # the demonstration's own
    values = {"loss": loss, "lr": rate, "beta": options.beta * scale, "seed": seed, "init": base,
              "data": f"{base}/pairs.jsonl", "eval_data": f"{base}/heldout_pairs.jsonl",
              "batch_size": options.batch_size, "epochs": options.epochs,
              "max_length": options.max_length}  # fmt: skip
    return [str(x) for name, value in values.items() for x in (f"--{name}", value)]


def validation_accuracy(out: str) -> float:
    file = ROOT / out / "validation.json"
    if not file.exists():
        model, tokenizer = evaluation.load_checkpoint(ROOT / out, "cpu")
        asked = problems("validation", VALIDATION, seed=1)
        answers = evaluation.sample_answers(model, tokenizer, asked, temperature=0)
        right = [is_correct(q, a) for q, (a,) in zip(asked, answers)]
        file.write_text(json.dumps(sum(right) / len(right)))
    return json.loads(file.read_text())


def right_answers(out: str) -> np.ndarray:
    """Of each test problem whether the greedy answer is right, kept beside the run."""
    file = ROOT / out / "test.json"
    if not file.exists():
        model, tokenizer = evaluation.load_checkpoint(ROOT / out, "cpu")
        file.write_text(json.dumps(evaluation.task_values(model, tokenizer, samples=1)["greedy"]))
    return np.array(json.loads(file.read_text()))


def main() -> None:
    grid = {(loss, rate, scale): folder(loss, rate, scale, TUNED_ON)
            for loss in LOSSES for rate in RATES for scale in SCALES
            if scale == SCALES[0] or loss != "sft"}  # fmt: skip
    made = train_all({out: job(*key, TUNED_ON) for key, out in grid.items()})
    scores = {key: validation_accuracy(out) for key, out in grid.items()}
    best = {loss: max((k for k in scores if k[0] == loss), key=scores.get) for loss in LOSSES}
    finals = {(loss, seed): folder(*best[loss], seed) for loss in LOSSES for seed in SEEDS}
    made |= train_all({finals[loss, s]: job(*best[loss], s) for loss, s in finals})
    rows = {}
    for loss in LOSSES:
        tables = [made[finals[loss, seed]]["summary"]["table"] for seed in SEEDS]
        gains = [100 * table["change"]["greedy"]["mean"] for table in tables]
        error = statistics.stdev(gains) / len(gains) ** 0.5
        moves = [statistics.mean(table[loss][side]["mean"] for table in tables)
                 for side in ("Δ chosen", "Δ rejected")]  # fmt: skip
        _, rate, _ = best[loss]
        beta = made[finals[loss, TUNED_ON]]["train_config"]["beta"]
        cells = [
            loss,
            f"{rate:g}",
            f"{beta:g}",
            f"{100 * scores[best[loss]]:.1f}",
            f"{statistics.mean(gains):+.1f} ± {error:.1f}",
            ", ".join(f"{gain:+.1f}" for gain in gains),
            *(f"{move:+.2f}" for move in moves),
        ]
        rows[loss] = statistics.mean(gains), f"| {' | '.join(cells)} |"  # fmt: skip
    order = sorted(LOSSES, key=lambda loss: -rows[loss][0])
    together = {}
    for loss in LOSSES:
        right = [right_answers(finals[loss, seed]) for seed in SEEDS]
        together[loss] = evaluation.Column(np.concatenate(right))
    differences = []
    for loss in order:
        if loss != "mio":
            d = together[loss].difference(together["mio"])
            differences.append(f"| {loss} | {100 * d.mean:+.1f} [{100 * d.low:+.1f}, "
                               f"{100 * d.high:+.1f}] |")  # fmt: skip
    place = order.index("mio") + 1
    text = TEXT.format(
        verdict=f"{order[0]} is first of {len(order)} by mean gain, mio number {place}.",
        provenance=provenance(made), rates=", ".join(f"{r:g}" for r in RATES),
        scales=", ".join(f"{s:g}" for s in SCALES), validation=VALIDATION, tuned_on=TUNED_ON,
        seeds=", ".join(map(str, SEEDS)), table="\n".join(rows[loss][1] for loss in order),
        differences="\n".join(differences), count=len(SEEDS), two=len(RATES),
    )  # fmt: skip
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
