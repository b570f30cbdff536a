"""Which loss teaches a skill that the base was hardly shown? python results/starvation.py"""

import time
from pathlib import Path

import numpy as np
import page
import torch
from matplotlib.figure import Figure

from model import Llama
from support.builtin_task import BASE_MODEL, is_correct, problems, solution
from support.figures import read_columns
from support.files import read_rows, write_rows
from support.sampling import sample_answers
from support.tokenizers import byte_tokenizer, load_tokenizer

OUT, SEEDS = Path("out/starvation"), [0, 1, 2]
SEEN, RARE = 15_000, 360  # problems of both kinds that the base is trained on
BINS = [0, -2, -4, -6, -np.inf]  # powers of ten of the base's probability of the right answer
RANGES = ["1 to 1e-2", "1e-2 to 1e-4", "1e-4 to 1e-6", "below 1e-6"]
FLAGS = {"max_length": 96, "eval_fraction": 0.0, "schedule": "constant"}
GRIDS = {"mio": {"loss": ["mio", "bce", "sft"], "beta": [0.1, 0.5, 2.0]},
         "dpo": {"loss": "dpo", "beta": [0.05, 0.25, 1.0]}}  # fmt: skip


def rare(split: str, count: int, seed, negative: bool = True) -> list[str]:
    """Returns problems whose running total falls below zero, or (not `negative`) never does."""
    texts = problems(split, (3 if negative else 2) * count, seed)
    return [text for text in texts if ("=-" in solution(text)) == negative][:count]


def write_data(seed: int) -> list[page.Run]:
    """Writes an untrained model and the data of a seed, and returns the run that makes the base."""
    folder = OUT / f"data-seed{seed}"
    if not folder.is_dir():
        torch.manual_seed(seed)
        Llama(BASE_MODEL).save_pretrained(folder)
        byte_tokenizer().save(folder)
        texts = rare("train", SEEN, [seed, 2], negative=False) + rare("train", RARE, [seed, 2])
        rows = [{"prompt": text, "completion": solution(text)} for text in texts]
        write_rows(folder / "seen.jsonl", rows)
        page.ask(folder / "asked.jsonl", rare("train", 1500, [seed, 3]))
        page.ask(folder / "tested.jsonl", rare("test", 128, [seed, 4]))
    flags = {"data": folder / "seen.jsonl", "lr": 2e-3, "batch_size": 64, "seed": seed} | FLAGS
    return page.plan(loss="sft", init=folder, **flags, out=OUT / f"base-seed{seed}")


def runs_of(seed: int) -> list[page.Run]:
    """Writes pairs of a worked solution and a wrong draw of the base. Returns the runs on them."""
    folder, base = OUT / f"data-seed{seed}", OUT / f"base-seed{seed}"
    files = {"data": folder / "pairs.jsonl", "eval_data": folder / "heldout.jsonl"}
    if not files["eval_data"].exists():
        start, model = time.monotonic(), (Llama.from_pretrained(base), load_tokenizer(base))
        for file, which in zip(files.values(), (("train", 1500), ("test", 300))):
            texts, rows = rare(*which, [seed, 3]), []
            for text, answers in zip(texts, sample_answers(*model, texts, samples=4, seed=seed)):
                usable = [a for a in answers if a.strip() and "\ufffd" not in a]
                if wrong := [a for a in usable if not is_correct(text, a)]:
                    rows += [{"prompt": text, "chosen": solution(text), "rejected": wrong[0]}]
            write_rows(file, rows)
        page.spend(OUT / f"pairs-seed{seed}-clock.json", start)
    flags = files | {"init": base, "lr": 3e-4, "batch_size": 48, "seed": seed} | FLAGS
    drawn = flags | {"data": folder / "asked.jsonl", "max_new_tokens": page.ANSWER_TOKENS}
    runs = page.plan(loss="rlhf", epochs=1, **drawn, out=OUT / f"rlhf-seed{seed}")
    for name, grid in GRIDS.items():
        runs += page.plan(**grid, epochs=2, **flags, out=OUT / f"{name}-seed{seed}")
    return runs


def measure(runs: list[page.Run], gains: dict, rates: dict) -> list[int]:
    """Adds to `gains` the rise of right answers by bin (bins,), in nats, and to `rates` the columns
    of the second table, in percent, of a seed's runs. Returns the number of pairs in each bin."""
    base, held_out = runs[0].flags["init"], runs[0].flags["eval_data"]
    models, file = [base, *(run.folder for run in runs)], f"{base.name}.json"
    options = held_out.with_name("tested.jsonl"), "--n", 64, "--batch_size", 1000
    records = page.evaluate(OUT / f"pass-{file}", models, *options)
    texts = [row["prompt"] for _, row in read_rows(options[0])]
    solved = [solution(text) for text in texts]
    for name, record in zip(["base", *(run.setting for run in runs)], records):
        (answers,) = record["answers"].values()  # 64 for each problem
        worked = np.array([[a.strip() == s for a in drawn] for s, drawn in zip(solved, answers)])
        # By luck, an answer is right for the next problem in the file.
        lucky = [any(is_correct(text, a) for a in drawn)
                 for text, drawn in zip(texts[1:] + texts[:1], answers)]  # fmt: skip
        passes = [100 * record[f"strict pass@{k}"]["mean"] for k in (1, 64)]
        passes += [100 * np.mean(x) for x in (lucky, worked, worked.any(axis=1))]
        rates.setdefault(name, []).append(passes)
    (record,) = page.evaluate(OUT / f"logps-{file}", models[:1], held_out)
    powers = np.array(record["items"][held_out.name]["chosen"]) / np.log(10)  # (pairs,)
    bins = [(low < powers) & (powers <= high) for high, low in zip(BINS, BINS[1:])]
    for run in runs:
        change = read_columns(run.folder / "items.json")["run"]["Δ chosen"].values  # (pairs,)
        gains.setdefault(run.setting, []).append([change[part].mean() for part in bins])
    return [int(part.sum()) for part in bins]


def draw(gains: dict, rates: dict) -> None:
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    page.lines(left, {name: (RANGES, y) for name, y in gains.items()}, band=False)
    left.set(xlabel="probability of the right answer under the base", ylabel="rise, nats")
    left.set_yscale("symlog", linthresh=1)
    left.set_yticks([20, 10, 5, 2, 1, 0, -1, -2, -5, -10, -20, -50])
    left.yaxis.set_major_formatter("{x:g}")
    page.ticks(right, {name: values[:, 4] for name, values in rates.items()})
    right.set(xlabel="problems with a worked solution among 64 draws, %", xlim=(0, 100))
    page.save(__file__, figure, columns=6)


if __name__ == "__main__":
    page.make_all([run for seed in SEEDS for run in write_data(seed)], OUT)
    runs = page.make_all([run for seed in SEEDS for run in runs_of(seed)], OUT)
    gains, rates = {}, {}
    counts = [measure([x for x in runs if x.seed == seed], gains, rates) for seed in SEEDS]
    gains, rates = ({n: np.array(x) for n, x in found.items()} for found in (gains, rates))
    rows = [["held-out pairs, all seeds", *np.sum(counts, axis=0)]]
    rows += [[name, *map(page.interval, values.T)] for name, values in gains.items()]
    for dpo, mio in zip([n for n in gains if "dpo" in n], [n for n in gains if "mio" in n]):
        rows.append([f"{mio}, minus {dpo}", *map(page.interval, (gains[mio] - gains[dpo]).T)])
    passes = [[name, *(f"{x:.1f}" for x in values.mean(0)),
               page.interval(values[:, 4] - rates["base"][:, 4], 1) if name != "base" else "-"]
              for name, values in rates.items()]  # fmt: skip
    draw(gains, rates)
    head = ["", "pass@1 %", "pass@64 %", "pass@64 by luck %", "worked solution@1 %"]
    head += ["worked solution@64 %", "worked solution@64 minus base, points"]
    page.write(__file__, runs, OUT, gains=(["", *RANGES], rows), passes=(head, passes))
