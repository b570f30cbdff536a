"""Does --weights bfloat16 train as well as float32? python results/bfloat16.py"""

from pathlib import Path

import numpy as np
import page
from matplotlib.figure import Figure
from safetensors.torch import load_file

from support.curves import read_curves
from support.files import read_json

COLUMNS = "greedy", "Δ chosen", "Δ rejected"
WEIGHTS = "float32", "bfloat16"
REAL = {"init": "../shared/models/gsm-llama", "data": "../shared/data/gsm8k-pairs.jsonl"}
RATES = [1e-6, 3e-5]


def make(name: str, weights: str, **flags) -> list:
    """Makes runs whose weights are stored in one precision and whose products are float32."""
    out = f"out/bfloat16/{name}-{weights}"
    runs = page.make(**flags, weights=weights, dtype="float32", out=out)
    return [run._replace(setting=f"{run.setting}, {weights}") for run in runs]


def minus_float32(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds, for each setting with bfloat16, the difference from float32 of the same seeds."""
    found = {}
    for setting, x in values.items():
        found[setting] = x
        if setting.endswith("bfloat16"):
            found[f"{setting} minus float32"] = x - values[setting.replace("bfloat16", "float32")]
    return found


def moved(run) -> float:
    """Returns the share of weights that differ from those of --init rounded to bfloat16 or, in
    float32, from those of --init, in percent."""
    files = [Path(folder) / "model.safetensors" for folder in (run.flags["init"], run.folder)]
    before, after = map(load_file, files)
    changed = sum((before[n].to(x.dtype) != x).sum().item() for n, x in after.items())
    return 100 * changed / sum(x.numel() for x in after.values())


def outcome_of(run) -> list[float]:
    """Returns the share of weights that moved, the held-out reward accuracy in percent, and changes
    of the chosen and rejected log-probs on held-out pairs, in nats."""
    row = read_json(run.folder / "summary.json")
    curves = [read_curves(run.folder)[f"logps/{side}"][1] for side in ("chosen", "rejected")]
    return [moved(run), 100 * row["eval_rewards/accuracies"], *(y[-1] - y[0] for y in curves)]


def draw(runs: list) -> None:
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2)
    for row, lr in zip(axes, RATES):
        for axis, side in zip(row, ("chosen", "rejected")):
            for run in (run for run in runs if run.flags["lr"] == lr):
                x, y = read_curves(run.folder)[f"logps/{side}"]
                color, _ = page.LOOKS[run.flags["loss"]]
                style = "-" if run.setting.endswith("float32") else "--"
                name = f"{run.flags['loss']}, {run.setting.rpartition(' ')[2]}"
                axis.plot(x, y - y[0], style, color=color, label=name)
            axis.set(title=f"lr {lr:g}: {side}", xlabel="step", ylabel="change, nats")
    page.save(__file__, figure, columns=4)


if __name__ == "__main__":
    small, real = [], []
    for seed, files in page.bases(page.SEEDS).items():
        for weights in WEIGHTS:
            small += make(f"seed{seed}", weights, loss=["mio", "dpo"], **files)
    for weights in WEIGHTS:
        flags = {"loss": ["mio", "dpo"], "lr": RATES, "seed": 0, **REAL}
        real += make("real", weights, eval_every=4, **flags)
    gains = minus_float32(page.means(small, *COLUMNS))
    rows = [[name, *map(page.interval, x)] for name, x in gains.items()]
    columns = "", "moved %", "reward accuracy %", "Δ chosen", "Δ rejected"
    real_rows = [[run.setting, *(f"{x:.{n}f}" for x, n in zip(outcome_of(run), (1, 1, 3, 3)))]
                 for run in real]  # fmt: skip
    draw(real)
    page.write(__file__, small + real, "out/bfloat16", demonstration=(["", *COLUMNS], rows),
               real=(columns, real_rows))  # fmt: skip
