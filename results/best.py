"""Tunes every loss on one seed and compares the tuned losses on four: python results/best.py"""

from pathlib import Path

from page import changes, draw, evaluate, make, outcome, summarize, table, write

from support.builtin_task import problems, solution
from support.files import write_rows
from support.sampling import ANSWER_TOKENS

LOSSES = ["mio", "dpo", "bce", "nwj", "dv", "ipo", "kto", "simpo", "orpo", "rpo", "apo_zero", "sft"]
QUESTIONS, RECORD = Path("out/best/validation.jsonl"), Path("out/best/validation.json")

TEXT = """# Best against best

**Question.** Which loss solves the most problems if each loss is tuned on the same grid?

**Expected before an earlier version of this experiment.** At one learning rate for all losses, sft
and dpo solved more problems than mio ([demonstration.md](demonstration.md)). Tuning should select a
smaller beta for mio and close this gap, and most losses should end within two points of each other.

{made}

The first command tunes on seed 0. The other commands run, on other seeds, the setting of each loss
with the highest greedy accuracy on 1,000 validation problems:

{tuned}

![Gain in greedy accuracy by loss: a tick for each seed, a dot for the mean](best.png)

{table}

**What it shows.** With a 95 % interval that excludes 0, {ahead} losses solve more problems than
mio and {behind} solve fewer. {outcome}

**What it does not show.** Each loss has eight settings, or two if the loss has no beta. Where an
end of the grid was selected, settings outside could be better. A beta has another scale in losses
that use means over tokens than in losses that use sums. The experiment covers one small task.
"""

tuning = make(loss=LOSSES, lr=[1e-4, 3e-4], beta=[0.1, 0.5, 1, 2], seed=0, out="out/best/tuning")
texts = problems("validation", 1000, seed=1)
write_rows(QUESTIONS, [{"prompt": t, "answer": solution(t), "grade": "gsm8k"} for t in texts])
records = evaluate(RECORD, *(run.folder for run in tuning), "--data", QUESTIONS,
                   "--max_new_tokens", ANSWER_TOKENS)  # fmt: skip
tables = {run.setting: next(iter(records[str(run.folder)]["figures"].values())) for run in tuning}
right = {setting: 100 * columns["strict"]["mean"] for setting, columns in tables.items()}
best, settings, runs = {}, {}, []
for run in sorted(tuning, key=lambda run: right[run.setting]):
    best[run.flags["loss"]] = run  # the last one has the highest accuracy
for loss, run in best.items():
    settings.setdefault((run.flags["lr"], run.flags.get("beta")), []).append(loss)
for (lr, beta), losses in settings.items():
    flags = {"loss": losses, "lr": lr} | ({"beta": beta} if beta else {})
    runs += make(**flags, seed=[1, 2, 3, 4], out=f"out/best/lr{lr}-beta{beta}")
runs = [run._replace(setting=run.flags["loss"]) for run in runs]
runs.sort(key=lambda run: run.setting != "mio")  # mio first: the table compares with mio
gains, (rows, seeds) = changes(runs, "greedy"), summarize(runs)
draw(__file__, dict(sorted(gains.items(), key=lambda gain: -sum(gain[1]))),
     "gain in greedy accuracy, points")  # fmt: skip
gaps = [rows[f"{loss} - mio"]["greedy"] for loss in gains if loss != "mio"]
write(__file__, TEXT, tuning + runs, table=table(rows, markdown=True, seeds=seeds),
      tuned="\n".join(f"- {run.setting}: {right[run.setting]:.1f} %" for run in best.values()),
      ahead=sum(gap.low > 0 for gap in gaps), behind=sum(gap.high < 0 for gap in gaps),
      outcome=outcome(runs))  # fmt: skip
