"""Does the chosen log-prob decline late in training? python results/late.py"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from page import LOOKS, SEEDS, bases, evaluate, interval, make, write

from support.builtin_task import problems, solution
from support.curves import read_curves
from support.files import read_rows, write_rows
from support.run_folder import checkpoints
from support.sampling import ANSWER_TOKENS

PAIRS, EPOCHS, EVERY = 1000, 24, 63  # EVERY: steps between checkpoints, three epochs
GRIDS = {"mio": {"loss": "mio", "beta": [0.2, 1.0]}, "dpo": {"loss": "dpo", "beta": [0.1, 0.5]},
         "chosen": {"loss": ["sft", "mio+0.1*sft"]}}  # fmt: skip
NAMES = {
    "beta=0.2": "mio, beta 0.2",
    "beta=1.0": "mio, beta 1",
    "beta=0.1": "dpo, beta 0.1",
    "beta=0.5": "dpo, beta 0.5",
    "sft": "sft",
    "mio+0.1*sft": "mio+0.1*sft, beta 1",
}
MATCHED = [("mio, beta 0.2", "dpo, beta 0.1"), ("mio, beta 1", "dpo, beta 0.5")]
QUESTIONS = Path("out/late/questions.jsonl")


def training_curve(folder: Path, side: str) -> np.ndarray:
    """Returns (epochs,): the mean log-prob over each epoch's batches, before their updates."""
    rows = [row for _, row in read_rows(folder / "metrics.jsonl") if f"logps/{side}" in row]
    epochs = [np.ceil(row["epoch"] - 1e-9) for row in rows]
    values = [row[f"logps/{side}"] for row in rows]
    return np.bincount(epochs, values)[1:] / np.bincount(epochs)[1:]


def accuracy(folder: Path, base: Path) -> np.ndarray:
    """Returns (checkpoints,): the greedy accuracy minus the base's, in points."""
    models = base, *checkpoints(folder)
    flags = "--data", QUESTIONS, "--max_new_tokens", ANSWER_TOKENS
    record = evaluate(folder / "accuracy.json", *models, *flags)
    right = [next(iter(r["figures"].values()))["strict"]["mean"] for r in record.values()]
    return 100 * (np.array(right[1:]) - right[0])


def train_all() -> list:
    """Makes the runs of all seeds."""
    runs, start = [], bases(SEEDS)
    QUESTIONS.parent.mkdir(parents=True, exist_ok=True)
    for seed, files in start.items():
        data = Path(f"out/late/pairs-seed{seed}.jsonl")
        write_rows(data, [row for _, row in read_rows(files["data"])][:PAIRS])
        flags = files | {
            "data": data,
            "epochs": EPOCHS,
            "schedule": "constant",
            "eval_every": EVERY // 3,
        }
        flags |= {"save_every": EVERY, "keep": EPOCHS // 3}
        for name, grid in GRIDS.items():
            runs += make(**grid, **flags, out=f"out/late/{name}-seed{seed}")
    return [run._replace(setting=NAMES[run.setting]) for run in runs]


def measure(runs: list) -> dict[str, dict[str, np.ndarray]]:
    """Returns for each setting its curves: (seeds, points) each, with their epochs under "x"."""
    texts = problems("test", 500, seed=0)
    write_rows(QUESTIONS, [{"prompt": t, "answer": solution(t), "grade": "gsm8k"} for t in texts])
    found = {}
    for run in runs:
        rows = found.setdefault(run.setting, {})
        curves = read_curves(run.folder)
        for side in ("chosen", "rejected"):
            steps, values = curves[f"logps/{side}"]
            rows.setdefault(f"held-out {side}", []).append(values - values[0])
            values = training_curve(run.folder, side)
            rows.setdefault(f"training {side}", []).append(values - values[0])
        rows.setdefault("greedy", []).append(accuracy(run.folder, run.flags["init"]))
    return {name: {c: np.array(x) for c, x in rows.items()} for name, rows in found.items()}


def second_half(name: str, values: np.ndarray) -> np.ndarray:
    """Returns (seeds,): the change from epoch 12 to epoch 24. Training curves have no epoch 0."""
    middle = {"greedy": 3, "training": 11}.get(name.split()[0], 12)
    return values[:, -1] - values[:, middle]


def draw(found: dict) -> None:
    titles = {"held-out chosen": 0, "held-out rejected": 0, "training chosen": 1, "greedy": 3}
    figure = Figure(figsize=(11, 8), layout="constrained")
    for axis, (title, first) in zip(figure.subplots(2, 2).flat, titles.items()):
        for name, rows in found.items():
            mean = rows[title].mean(0)
            x = np.arange(len(mean)) * (3 if title == "greedy" else 1) + first
            color, marker = LOOKS[name[:3]] if "+" not in name else ("#E69F00", "D")
            axis.plot(x, mean, "--" if "0.2" in name or "0.1," in name or name.endswith("0.1")
                      else "-", marker=marker, markevery=3, color=color, label=name)  # fmt: skip
            axis.fill_between(x, rows[title].min(0), rows[title].max(0), color=color, alpha=0.12)
        axis.axhline(0, color="0.4", lw=0.8, zorder=0)
        unit = "gain in greedy accuracy, points" if title == "greedy" else "nats"
        axis.set(title=title if title != "greedy" else "test problems", xlabel="epoch", ylabel=unit)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=6,
                  frameon=False)  # fmt: skip
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    runs = train_all()
    found = measure(runs)
    columns = list(next(iter(found.values())))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    halves = {s: {c: second_half(c, x) for c, x in rows.items()} for s, rows in found.items()}
    for a, b in MATCHED:
        halves[f"{a}, minus {b}"] = {c: halves[a][c] - halves[b][c] for c in columns}
    for name, row in halves.items():
        cells = [interval(x, 1 if c == "greedy" else 2) for c, x in row.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    epochs = range(3, EPOCHS + 1, 3)
    by_epoch = [f"| epoch | {' | '.join(map(str, epochs))} | highest minus last |",
                "|---" * (len(epochs) + 2) + "|"]  # fmt: skip
    for name, rows in found.items():
        mean = rows["greedy"].mean(0)
        cells = [f"{x:+.1f}" for x in [*mean, mean.max() - mean[-1]]]
        by_epoch.append(f"| {name} | {' | '.join(cells)} |")
    draw(found)
    write(__file__, runs, "out/late", changes="\n".join(lines),
          accuracy="\n".join(by_epoch))  # fmt: skip
