"""Measures pass@k up to k = 64 and the cost of training: python results/beyond.py"""

from itertools import cycle
from pathlib import Path

import numpy as np
from page import Figure, evaluate, make, read_json, table, write

from support.curves import COLORS, STYLES
from support.figures import Column, over_seeds, paired_difference
from support.files import read_rows

TEXT = """# Beyond the base?

**Question.** Does training raise pass@k at k = 64 as it does at k = 1, or do the trained models
only find more often the right answers that the base also finds, as the paper's abstract says of
RLHF? How much does training on answers drawn from the policy at every step gain, and how much time
does it take?

**Expected before an earlier version of this experiment.** All losses raise pass@1. The pass@k
curves of the trained models meet or cross the curve of the base before k = 64. The runs that draw
answers from the policy (rlhf and "mio, on policy") gain more than the runs on fixed pairs and cost
several times as much.

{made}

Each model draws 64 answers at temperature 1 to each of 1,000 test problems. From these
answers the unbiased estimator computes pass@k. The figure shows means over seeds.

![pass@k of the base and of the trained models, for k from 1 to 64](beyond.png)

{table}

The seconds include the making of the base model if the run is the first on its seed:
{costs}

**What it shows.** Pass@64, in points over the base with a 95 % interval: {ends}.

**What it does not show.** Each model was trained with the default settings only. The seconds are
times of complete runs, two of which ran at a time.
"""

runs = make(loss=["sft", "dpo", "mio", "rlhf"], seed=[0, 1, 2], out="out/beyond/losses")
drawn = make(loss="mio", on_policy=True, seed=[0, 1, 2], out="out/beyond/on_policy")
runs = [run._replace(setting=run.flags["loss"]) for run in runs]
runs += [run._replace(setting="mio, on policy") for run in drawn]
found, rows, gaps, costs = {}, {}, {}, ""  # found: setting -> columns for each seed
for seed in range(3):
    folders = {"base": f"out/beyond/losses/base{f'-seed{seed}' if seed else ''}"}
    folders |= {run.setting: str(run.folder) for run in runs if run.seed == seed}
    file = Path(f"out/beyond/pass-seed{seed}.json")
    records = evaluate(file, *folders.values(), "--n", 64)
    for name, folder in folders.items():
        items = records[folder]["items"]["problems"]
        found.setdefault(name, []).append({c: Column(np.array(x)) for c, x in items.items()})
figure = Figure(figsize=(6.5, 4.5), layout="constrained")
axis = figure.subplots()
for (name, columns), color, style in zip(found.items(), cycle(COLORS), cycle(STYLES)):
    rows[name] = {c: over_seeds([each[c].estimate() for each in columns]) for c in columns[0]}
    pairs = list(zip(columns, found["base"]))
    gaps[name] = {c: paired_difference([(a[c], b[c]) for a, b in pairs]) for c in columns[0]}
    ks = [c for c in columns[0] if "@" in c]
    axis.plot(ks, [100 * rows[name][k].mean for k in ks], style, color=color, label=name)
axis.set_ylabel("problems with a right answer among k, %")
axis.legend(frameon=False)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)
for run in runs:
    seconds = read_json(run.folder / "summary.json")["seconds"]
    drawn = sum(row.get("num_drawn") or 0 for _, row in read_rows(run.folder / "metrics.jsonl"))
    costs += f"\n- {run.setting}, seed {run.seed}: {seconds:.0f} s, {drawn:,} tokens drawn"
del gaps["base"]
rows |= {f"{name} - base": row for name, row in gaps.items()}
ends = {name: [100 * x for x in row["pass@64"][:3]] for name, row in gaps.items()}
write(__file__, TEXT, runs, table=table(rows, markdown=True, seeds=3), costs=costs,
      ends=", ".join("{} {:+.1f} ({:+.1f} to {:+.1f})".format(n, *x) for n, x in ends.items()),
      )  # fmt: skip
