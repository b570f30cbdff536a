"""Makes results/beyond.md and results/beyond.png: python results/beyond.py [--small]

Measures pass@k, for k from 1 to 64, of the base model and of trained models. Compares the cost of
drawing answers from the policy at every step with the cost of training on pairs that were drawn
once from the base. With --small, the script makes only two runs of two steps each and prints pass@k
of one run, as a quick check.
"""

import concurrent.futures
import json
import statistics
import sys
from pathlib import Path

import numpy as np
from pool import ROOT, WORKERS, provenance, run, train_all

LOSSES = {"sft": [], "dpo": [], "mio": [], "rlhf": ["--loss", "rlhf"],
          "mio, on policy": ["--loss", "mio", "--on_policy"]}  # fmt: skip
LOOK = {
    "base": ("#000000", ":"),
    "sft": ("#009E73", "-."),
    "dpo": ("#D55E00", "--"),
    "mio": ("#0072B2", "-"),
    "rlhf": ("#CC79A7", "--"),
    "mio, on policy": ("#56B4E9", "-"),
}
SEEDS, SAMPLES = (0, 1, 2), 64

TEXT = """# Beyond the base?

**Question.** Does training raise pass@k at k = 64 as it does at k = 1, or do the trained models
only find more often the right answers that the base also finds, as the paper's abstract says of
RLHF? How much does training on answers drawn from the policy at every step gain, and how much time
does it take?

**Expected before the run.** All losses raise pass@1. The pass@k curves of the trained models meet
or cross the curve of the base before k = 64. The runs that draw answers from the policy (rlhf and
"mio, on policy") gain more than the runs on fixed pairs and cost several times as much.

`python results/beyond.py` made this page ({provenance}). On each of {seeds} seeds, each model draws
{samples} answers at temperature 1 to each of 1,000 held-out problems. From these answers the
unbiased estimator computes pass@k, the probability that at least one of k answers is right. Each
cell is the mean over seeds (lowest, highest).

![pass@k of the base and of the trained models, for k from 1 to 64](beyond.png)

{table}

The next table shows the mean duration of a run over seeds, and the tokens of the run with seed 0:

| | seconds of a run | tokens trained on | tokens generated in training |
|---|---|---|---|
{costs}

**What it shows.** From the highest to the lowest pass@{samples}, the order is: {order}. Of the
{models} trained models, {above} have a higher pass@{samples} than the base on every seed, and
{below} have a lower pass@{samples} on every seed.

**What it does not show.** With {samples} answers the base solves {reach:.0f} % of the problems, so
little is left to gain. Each model was trained with the default settings only. The seconds are times
of complete runs, two of which ran at a time. The first run on each seed, here that of mio, also
made the base model and the pairs.
"""


def folders(loss: str, seed: int) -> str:
    if loss == "base":
        return f"out/demonstration/seed{seed}/" + ("base" if seed == 0 else f"base-seed{seed}")
    return f"out/demonstration/seed{seed}/{loss.replace(', ', '-').replace(' ', '-')}"


def solved(folder: str, samples: int) -> dict[int, float]:
    """Returns a dict from k to pass@k (0 to 1). eval.py draws `samples` answers to each problem."""
    file = ROOT / folder / f"pass-{samples}.json"
    if not file.exists():
        run(["eval.py", folder, "--n", str(samples), "--kl_samples", "0", "--out", str(file)])
    figures = next(iter(json.loads(file.read_text()).values()))["figures"]["problems"]
    return {int(k.removeprefix("pass@")): v["mean"] for k, v in figures.items() if "@" in k}


def draw(found: dict) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.5, 4.5), layout="constrained")
    for name, (color, style) in LOOK.items():
        curves = np.array([list(found[name, seed].values()) for seed in SEEDS]) * 100
        ks = list(found[name, SEEDS[0]])
        axis.plot(ks, curves.mean(axis=0), color=color, linestyle=style, label=name, linewidth=2)
        axis.fill_between(ks, curves.min(axis=0), curves.max(axis=0), color=color, alpha=0.12,
                          linewidth=0)  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_xticks(ks, ks)
    axis.set_xlabel("k answers")
    axis.set_ylabel("problems with a right one among them, %")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)


def main() -> None:
    if sys.argv[1:] == ["--small"]:
        made = train_all({
            "out/small-rlhf": ["--loss", "rlhf", "--max_steps", "2"],
            "out/small-on-policy": ["--on_policy", "--max_steps", "2"],
        })  # fmt: skip
        return print(provenance(made), solved("out/small-rlhf", 8), sep="\n")
    jobs = {
        folders(name, seed): [*(flags or ["--loss", name]), "--seed", str(seed)]
        for name, flags in LOSSES.items() for seed in SEEDS
    }  # fmt: skip
    made = train_all(jobs)
    keys = [(name, seed) for name in LOOK for seed in SEEDS]
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        found = dict(zip(keys, pool.map(lambda key: solved(folders(*key), SAMPLES), keys)))
    draw(found)
    ks = list(found["base", 0])
    lines = [f"| | {' | '.join(f'pass@{k}, %' for k in ks)} |", "|---" * (len(ks) + 1) + "|"]
    costs = []
    for name in LOOK:
        cells = []
        for k in ks:
            values = [100 * found[name, seed][k] for seed in SEEDS]
            cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f}, {max(values):.1f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        if name == "base":
            continue
        summaries = [made[folders(name, seed)]["summary"] for seed in SEEDS]
        rows = (ROOT / folders(name, 0) / "metrics.jsonl").read_text().splitlines()
        generated = sum(json.loads(row).get("num_drawn") or 0 for row in rows)
        seconds = statistics.mean(s["seconds"] for s in summaries)
        costs.append(f"| {name} | {seconds:.0f} | {summaries[0]['num_tokens']:,} | {generated:,} |")
    end, base = ks[-1], "base"
    trained = [name for name in LOOK if name != base]
    differences = {n: [found[n, s][end] - found[base, s][end] for s in SEEDS] for n in trained}
    text = TEXT.format(
        provenance=provenance(made), seeds=len(SEEDS), samples=SAMPLES, table="\n".join(lines),
        costs="\n".join(costs), models=len(trained),
        order="; ".join(sorted(LOOK, key=lambda n: -sum(found[n, s][end] for s in SEEDS))),
        above=sum(min(d) > 0 for d in differences.values()),
        below=sum(max(d) < 0 for d in differences.values()),
        reach=100 * statistics.mean(found[base, s][end] for s in SEEDS),
    )  # fmt: skip
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
