"""Compares mio with three variants, and rare with likely answers: python results/why.py"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
from page import draw, evaluate, make, outcome, read_columns, spread, train, write
from torch.nn import functional as F

from mio import LOG2, LOSSES
from support import grid
from support.files import read_rows, write_rows


def mio_free(chosen, rejected):
    """sp(-T_w) + sp(T_l)/2"""  # without the term that limits T_w
    return F.softplus(-chosen.rewards) + F.softplus(rejected.rewards) / 2


known = {"function": mio_free, "initial_loss": 1.5 * LOG2}
LOSSES["mio_free"] = dataclasses.replace(LOSSES["mio"], **known)
if sys.argv[1:]:  # the script is the training command of its grids
    train.main()
    sys.exit()
grid.TRAIN = Path(__file__)  # its runs know mio_free
SEEDS, HALVES = [0, 1, 2, 3, 4], ("rare", "likely")

TEXT = """# Which part of mio does what?

**Question.** The loss mio is sp(-T_w) + ½ sp(T_w) + ½ sp(T_l), with the symbols of
[mio.py](../mio.py). (1) What is the effect of three parts of mio: the term ½ sp(T_w), the mixture
of chosen and rejected answers as the marginal, and sums over tokens instead of means? (2) Which
loss fails to raise the log-probs of chosen answers that the base model finds unlikely: DPO, whose
gradient vanishes as the margin T_w - T_l grows, or MIO, whose upward pull on T_w ends at T_w = log
2?

**Expected before an earlier version of this experiment.** (1) Without ½ sp(T_w) the chosen log-prob
rises further, because no term limits the rise, and accuracy rises, too. With the rejected answers
alone as the marginal, mio pushes the rejected answer down twice as hard, so the rejected log-prob
falls further and drags the chosen log-prob down. Means over tokens, at a beta that gives the same
reward on average, change little if answers have similar lengths. (2) MIO raises rare (unlikely)
chosen answers more than likely chosen answers, which have little to gain. Under DPO rare chosen
answers fall furthest. However, in a model in which the probability of each answer is a free
parameter, MIO raises rare answers less than DPO does.

{made}

The loss mio_free is mio without ½ sp(T_w); results/why.py takes the flags of train.py and knows it.
The loss bce at beta 1 is mio with the rejected answers alone as the marginal. The default beta is 1
for mio and 0.5 for dpo; with `--average_logps` it is multiplied by the mean length of an answer. A
pair is "rare" if the summed log-prob of its chosen answer under the base is below the median, and
"likely" otherwise; "mio on rare" trained on the rare half of the pairs.

{table}

![Change of log-probs of rare and of likely chosen answers under dpo and mio](why.png)

**What it shows.** {outcome}

The chosen log-prob of rare and of likely held-out pairs changes, in nats, by:

{halves}

**What it does not show.** All chosen answers are right answers that were sampled from the base, so
the page says nothing about chosen answers that the base would never give. The learning rate and the
betas were not tuned for each variant. The rare and the likely half differ in more than likelihood:
rare answers belong to harder problems.
"""


def split(base: Path) -> list[np.ndarray]:
    """Writes rare.jsonl and likely.jsonl, the halves of the training pairs of a base model. Returns
    which of its held-out pairs are rare and which are likely: (pairs,) booleans each."""
    files = [base / "pairs.jsonl", base / "heldout_pairs.jsonl"]
    items = evaluate(base / "logps.json", base, "--data", *files)[str(base)]["items"]
    chosen = [np.array(items[file.name]["chosen"]) for file in files]  # (pairs,) each
    rare, held_out = (logps < np.median(logps) for logps in chosen)
    for half, part in zip(HALVES, (rare, ~rare)):
        rows = [row for (_, row), kept in zip(read_rows(files[0]), part, strict=True) if kept]
        write_rows(base / f"{half}.jsonl", rows)
    return [held_out, ~held_out]


runs = make(loss=["mio_free", "bce"], beta=1, seed=SEEDS, out="out/why/variants")
runs = [run._replace(setting=run.flags["loss"]) for run in runs]
means = make(loss="mio", average_logps=True, seed=SEEDS, out="out/why/means")
runs += [run._replace(setting="mio of means") for run in means]
moves = {}  # row of the figure -> changes of the chosen log-prob, one for each seed
for seed in SEEDS:
    base = Path("out/why/variants") / (f"base-seed{seed}" if seed else "base")
    parts, files = split(base), [base / f"{name}.jsonl" for name in ("pairs", *HALVES)]
    flags = {"init": base, "eval_data": base / "heldout_pairs.jsonl", "seed": seed}
    for run in make(loss=["mio", "dpo"], data=files, **flags, out=f"out/why/seed{seed}"):
        trained = Path(run.flags["data"]).stem
        run = run._replace(setting=f"{run.flags['loss']} on {trained}".removesuffix(" on pairs"))
        runs.append(run)
        change = read_columns(run.folder / "items.json")["run"]["Δ chosen"].values  # (pairs,)
        for half, part in zip(HALVES, parts):
            moves.setdefault(f"{run.setting}: {half} held-out", []).append(change[part].mean())
runs.sort(key=lambda run: run.setting != "mio")  # mio first: the table compares with mio
draw(__file__, moves, "change of the chosen log-prob, nats")
halves = "\n".join(f"- {name} {spread(values)}" for name, values in moves.items())
write(__file__, TEXT, runs, outcome=outcome(runs), halves=halves)
