"""Does the chosen log-prob decline late in training? python results/late.py"""

from pathlib import Path

import numpy as np
import page
from matplotlib.figure import Figure

from support.builtin_task import problems
from support.curves import read_curves
from support.files import read_rows, write_rows
from support.run_folder import checkpoints

PAIRS, EPOCHS, EVERY = 1000, 24, 63  # EVERY: steps between checkpoints, three epochs
GRIDS = {"mio": {"loss": "mio", "beta": [0.2, 1.0]}, "dpo": {"loss": "dpo", "beta": [0.1, 0.5]},
         "chosen": {"loss": ["sft", "mio+0.1*sft"]}}  # fmt: skip
SIDES = "chosen", "rejected"
QUESTIONS = Path("out/late/questions.jsonl")
# Columns of curves -> the epoch of their first point.
FIRST = {"held-out chosen": 0, "held-out rejected": 0, "training chosen": 1, "greedy": 3}


def train_all() -> list:
    """Makes the runs of all seeds."""
    page.ask(QUESTIONS, problems("test", 500, seed=0))
    runs = []
    for seed, files in page.bases(page.SEEDS).items():
        data = Path(f"out/late/pairs-seed{seed}.jsonl")
        write_rows(data, [row for _, row in read_rows(files["data"])][:PAIRS])
        flags = files | {"data": data, "epochs": EPOCHS, "schedule": "constant"}
        flags |= {"eval_every": EVERY // 3, "save_every": EVERY, "keep": EPOCHS // 3}
        for name, grid in GRIDS.items():
            runs += page.make(**grid, **flags, out=f"out/late/{name}-seed{seed}")
    return runs


def curves_of(run) -> dict[str, np.ndarray]:
    """Returns (points,) each: changes of log-probs from the first point, in nats, and of accuracy
    from the base, in points. A point of a training curve is the mean of an epoch's batches."""
    rows = [row for _, row in read_rows(run.folder / "metrics.jsonl") if "logps/chosen" in row]
    epochs = [int(np.ceil(row["epoch"] - 1e-9)) for row in rows]
    found = {f"held-out {s}": read_curves(run.folder)[f"logps/{s}"][1] for s in SIDES}
    for side in SIDES:
        sums = np.bincount(epochs, [row[f"logps/{side}"] for row in rows])
        found[f"training {side}"] = sums[1:] / np.bincount(epochs)[1:]
    found = {name: values - values[0] for name, values in found.items()}
    models = run.flags["init"], *checkpoints(run.folder)
    records = page.evaluate(run.folder / "accuracy.json", models, QUESTIONS)
    base, *right = [100 * record["strict"]["mean"] for record in records]
    return found | {"greedy": np.array(right) - base}


def second_half(name: str, values: np.ndarray) -> np.ndarray:
    """Returns (seeds,): the change of (seeds, points) from epoch 12 to epoch 24."""
    middle = {"greedy": 3, "training": 11}.get(name.split()[0], 12)
    return values[:, -1] - values[:, middle]


def draw(found: dict[str, dict]) -> None:
    figure = Figure(figsize=(11, 8), layout="constrained")
    for axis, (title, first) in zip(figure.subplots(2, 2).flat, FIRST.items()):
        columns = {name: columns[title] for name, columns in found.items()}  # (seeds, points) each
        curves = {n: (np.linspace(first, EPOCHS, y.shape[1]), y) for n, y in columns.items()}
        page.lines(axis, curves, every=1 if title == "greedy" else 3)
        if title != "greedy":
            axis.set_yscale("symlog", linthresh=1)
            axis.set_yticks([1, 0, -1, -2, -5, -10, -20, -40])
            axis.yaxis.set_major_formatter("{x:g}")
        unit = "gain in greedy accuracy, points" if title == "greedy" else "change, nats"
        axis.set(title=title.replace("greedy", "test problems"), xlabel="epoch", ylabel=unit)
    page.save(__file__, figure, columns=6)


if __name__ == "__main__":
    runs, found = train_all(), {}
    for run in runs:
        for name, values in curves_of(run).items():
            found.setdefault(run.setting, {}).setdefault(name, []).append(values)
    found = {s: {c: np.array(x) for c, x in columns.items()} for s, columns in found.items()}
    halves = {s: {c: second_half(c, x) for c, x in columns.items()} for s, columns in found.items()}
    columns = list(halves["sft"])
    for a, b in ("mio, beta 0.2", "dpo, beta 0.1"), ("mio, beta 1", "dpo, beta 0.5"):
        halves[f"{a}, minus {b}"] = {c: x - halves[b][c] for c, x in halves[a].items()}
    rows = [[name, *(page.interval(x, 1 if c == "greedy" else 2) for c, x in columns.items())]
            for name, columns in halves.items()]  # fmt: skip
    means = {name: columns["greedy"].mean(0) for name, columns in found.items()}
    gains = [[name, *(f"{y:+.1f}" for y in [*x, x.max() - x[-1]])] for name, x in means.items()]
    head = ["epoch", *range(3, EPOCHS + 1, 3), "highest minus last"]
    draw(found)
    page.write(__file__, runs, "out/late", changes=(["", *columns], rows),
          accuracy=(head, gains))  # fmt: skip
