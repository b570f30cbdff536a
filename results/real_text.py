"""Compares dpo with mio on real text: python results/real_text.py CHECKPOINT PAIRS.jsonl"""

import sys
from pathlib import Path

from page import make, outcome, write

from support.curves import plot
from support.files import digest_file

TEXT = """# dpo and mio on real text

**Question.** [The demonstration](demonstration.md) shows how dpo and mio change chosen and rejected
log-probs. Do the log-probs of a small Llama checkpoint change in the same way on pairs of real
text, and under which loss is the reward accuracy on held-out pairs higher?

**Data.** The pairs come from GSM8K's example model solutions (`example_model_solutions.jsonl` of
openai/grade-school-math). Each pair holds a right and a wrong solution to one test problem. Models
of GPT-3's size wrote the solutions, so the pairs are off-policy. The checkpoint was trained on
GSM8K's training text.

**Expected before an earlier version of this experiment.** At betas as small as 0.1 for dpo and 0.2
for mio, both losses may lower the chosen log-prob, dpo more than mio. The reward accuracies of both
losses agree within the standard error, which is about 6 points at 73 held-out pairs.

{made}

The SHA-256 sums of weights and pairs begin with {hashes}. Beta is 0.1 for dpo and 0.2 for mio, the
defaults. Each seed holds out another tenth of the prompts.

![Log-probs, losses, rewards, margins and accuracies over steps](real_text.png)

{table}

**What it shows.** At the start no pair counts for "reward", because all rewards are 0. {outcome}

**What it does not show.** The trained models' own answers to the questions were not graded. The
experiment has one small checkpoint, one learning rate, one beta for each loss, and few held-out
pairs a seed.
"""

if len(sys.argv) != 3:
    sys.exit(__doc__)
checkpoint, data = sys.argv[1:]
flags, runs = {"init": checkpoint, "data": data, "lr": 3e-5, "batch_size": 16}, []
for seed in range(3):
    out = f"out/real_text/seed{seed}"
    runs += make(loss=["dpo", "mio"], seed=seed, split_seed=seed, out=out, **flags)
runs = [run._replace(setting=run.flags["loss"]) for run in runs]
plot({loss: [run.folder for run in runs if run.setting == loss] for loss in ("dpo", "mio")},
     Path(__file__).with_suffix(".png"))  # fmt: skip
hashes = [digest_file(file)[:12] for file in (Path(checkpoint) / "model.safetensors", data)]
write(__file__, TEXT, runs, hashes=" and ".join(hashes), outcome=outcome(runs, "reward"))
