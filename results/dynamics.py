"""Measures log-probs at several learning rates and betas: python results/dynamics.py"""

import numpy as np
from page import changes, draw, make, summarize, table, write

from support.curves import read_curves

BETAS = {"mio": [0.25, 1, 4], "dpo": [0.125, 0.5, 2]}  # both losses start with the same gradient
RATES, SEEDS = [1e-4, 3e-4], [0, 1, 2, 3, 4]

TEXT = """# Where do chosen log-probs fall?

**Question.** The paper says that the chosen log-prob falls late in training under DPO and not under
MIO. At which learning rates and betas does the chosen log-prob fall on the built-in task?

**Expected before an earlier version of this experiment.** Under DPO the chosen log-prob falls more
at smaller betas and larger learning rates, and rises at large betas. Under MIO the chosen log-prob
rises at beta 1 (the default of the demonstration) and above, and falls a little at beta 0.25. The
reason is that MIO pulls a chosen log-prob up more strongly the further it has fallen, but the pull
is strong only once T_w, which is beta times the log-ratio, is below about -1.

{made}

The names of the rows hold the beta. A setting is a learning rate with a beta for mio and half this
beta for dpo, so that both losses start with the same gradient.

![Change of the chosen log-prob by loss and setting: a tick for each seed](dynamics.png)

{table}

**What it shows.** Averaged over seeds, the chosen log-prob ends below its start in {fell_dpo} of
{cells} settings under dpo and in {fell_mio} of {cells} under mio. The chosen log-prob ends lower
under dpo than under mio in {lower} of {cells} settings. In {late} of the {fell_dpo} settings in
which dpo lowers the chosen log-prob, the mean over seeds is lowest in the last quarter of training.

**What it does not show.** The experiment covers one small task and one small model. No setting was
tuned for accuracy; [best.md](best.md) compares tuned losses.
"""

found, rows = {}, {}  # found: loss -> its runs for each setting
for loss, betas in BETAS.items():
    runs = make(loss=loss, beta=betas, lr=RATES, seed=SEEDS, epochs=4, out=f"out/dynamics/{loss}")
    runs = [run._replace(setting=f"{loss} {run.flags['beta']}, lr {run.flags['lr']}")
            for run in runs]  # fmt: skip
    found[loss] = [runs[i : i + len(SEEDS)] for i in range(0, len(runs), len(SEEDS))]
for mio, dpo in zip(*found.values()):
    rows |= summarize(mio + dpo)[0]
runs = [run for cell in zip(*found.values()) for runs in cell for run in runs]
moves = changes(runs, "Δ chosen")
draw(__file__, moves, "change of the chosen log-prob, nats")
mio, dpo = np.array(list(moves.values())).mean(axis=1).reshape(-1, 2).T  # (settings,) each
late = 0
for cell in found["dpo"]:
    steps, logps = np.mean([read_curves(run.folder)["logps/chosen"] for run in cell], axis=0)
    late += logps[-1] < logps[0] and steps[logps.argmin()] >= 0.75 * steps[-1]
write(__file__, TEXT, runs, table=table(rows, markdown=True, seeds=len(SEEDS)), cells=len(dpo),
      fell_dpo=(dpo < 0).sum(), fell_mio=(mio < 0).sum(), lower=(dpo < mio).sum(), late=late,
      )  # fmt: skip
