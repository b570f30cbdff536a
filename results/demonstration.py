"""Compares mio, dpo and sft on five seeds: python results/demonstration.py [--small]

With --small, as a quick check, the runs start from out/base and make two steps, and the page is
out/small/demonstration.md.
"""

import shutil
import sys
from pathlib import Path

from page import make, write

from support.curves import plot

script, losses = Path(__file__), ["mio", "dpo", "sft"]
flags = {"seed": [0, 1, 2, 3, 4], "out": "out/demonstration"}
if sys.argv[1:] == ["--small"]:
    flags = {"init": "out/base", "data": "out/base/pairs.jsonl", "eval_fraction": 0.02}
    flags |= {"seed": [0, 1], "max_steps": 2, "out": "out/small"}
    losses = losses[:2]
runs = make(loss=losses, **flags)
if flags["out"] == "out/small":
    script = Path(shutil.copy(script.with_suffix(".md"), "out/small")).with_suffix(".py")
folders = {loss: [run.folder for run in runs if run.setting == loss] for loss in losses}
plot(folders, script.with_suffix(".png"))
write(script, runs, flags["out"], compare=True)
