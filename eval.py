"""Evaluation: log-probs of pairs, what they say about preferences, answers sampled and graded.

python eval.py out/base out/mio out/dpo          problems of the built-in task, held-out pairs
python eval.py out/mio --data FILE.jsonl         preference pairs of your own
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import (
    Pair,
    Tokenizer,
    is_correct,
    load_pairs,
    load_tokenizer,
    make_batches,
    problems,
    row_length,
)
from mio import chunked_logps
from model import Llama, read_json

SAMPLES = 8  # answers drawn at temperature 1 for each problem, for pass@k
PASS_AT = (1, 4, 8)
TEST_PROBLEMS = 1000
ANSWER_TOKENS = 48  # a right answer of the built-in task has at most 35
GENERATION_ROWS = 1000


class Figure(NamedTuple):
    """A mean with its standard error over n independent items."""

    mean: float
    error: float
    n: int

    @classmethod
    def of(cls, values) -> "Figure":
        values = np.asarray(values, dtype=np.float64)
        error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(float(values.mean()), float(error), len(values))


class Parser(argparse.ArgumentParser):
    """No abbreviated flags; bad input is one line on standard error and exit status 2."""

    def __init__(self, prog: str, description: str):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=form, allow_abbrev=False)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


# --- Preferences ----------------------------------------------------------------------------------


@torch.no_grad()
def pair_logps(
    model: Llama, pairs: list[Pair], row_tokens: int, micro_tokens: int, dtype: torch.dtype
) -> Tensor:
    """Summed log-probabilities of chosen and rejected answers, (pairs, 2) in nats, on the CPU.

    The same packing, head and autocast as in training.
    """
    device = model.head_weight.device
    logps = torch.full((len(pairs), 2), torch.nan)
    with tqdm(total=len(pairs), desc="log-probs", unit="pair", leave=False) as bar:
        for start in range(0, len(pairs), 256):  # as many as are packed together
            index = list(range(start, min(start + 256, len(pairs))))
            for batch in make_batches(pairs, index, row_tokens, micro_tokens):
                batch = batch.to(device)
                with autocast(device, dtype):
                    hidden = model(batch.tokens, batch.positions, batch.mask())
                    hidden = hidden.flatten(0, 1)[batch.source]  # (N, D)
                    sums = chunked_logps(hidden, model.head_weight, batch.targets, batch.lengths)
                logps[batch.index] = sums.view(-1, 2).float().cpu()
                bar.update(len(batch.index))
    return logps


def autocast(device: torch.device, dtype: torch.dtype):
    """Matrix products in `dtype`; float32 switches autocast off."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def preference_values(logps: Tensor, ref_logps: Tensor | None, beta: float) -> dict[str, Tensor]:
    """What is logged of pairs, under TRL's names: a tensor (pairs,) each.

    logps, ref_logps (pairs, 2): chosen and rejected. Without a reference there are no rewards.
    """
    values = {"logps/chosen": logps[:, 0], "logps/rejected": logps[:, 1]}
    if ref_logps is not None:
        chosen, rejected = (beta * (logps - ref_logps)).unbind(dim=1)
        values |= {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).to(logps.dtype),
        }
    return values


def mutual_information(chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, float]:
    """Three estimates by the rewards as critic, in nats; the marginal is the half-and-half mixture.

    `dv` and `nwj` bound the mutual information from below; `js` is twice the Jensen-Shannon
    divergence's own bound, log 4 minus the mio loss. With this mixture the divergences are at most
    log 2 (dv, nwj) and 0.4315 (js). All are 0 where the policy is the reference.
    """
    w, marginal = chosen_rewards.double(), torch.cat((chosen_rewards, rejected_rewards)).double()
    log_mean_exp = marginal.logsumexp(dim=0) - math.log(len(marginal))
    return {
        "mi/dv": float(w.mean() - log_mean_exp),
        "mi/js": float(math.log(4) - F.softplus(-w).mean() - F.softplus(marginal).mean()),
        "mi/nwj": float(1 + w.mean() - log_mean_exp.exp()),
    }


def preference_metrics(logps: Tensor, ref_logps: Tensor, beta: float) -> dict[str, float]:
    """Means over all pairs, with the mutual-information read-outs."""
    values = preference_values(logps, ref_logps, beta)
    metrics = {name: float(value.double().mean()) for name, value in values.items()}
    return metrics | mutual_information(values["rewards/chosen"], values["rewards/rejected"])


# --- Answers --------------------------------------------------------------------------------------


def sample_answers(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: list[str],
    *,
    samples: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = ANSWER_TOKENS,
    seed: int = 0,
) -> list[list[str | None]]:
    """Draws answers to each prompt: `samples` texts each, None for one that did not end in time."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = [bos + tokenizer.encode(prompt) for prompt in prompts for _ in range(samples)]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # like lengths together
    texts: list[str | None] = [None] * len(ids)
    with tqdm(total=len(ids), desc="answers", unit="answer", leave=False) as bar:
        for start in range(0, len(order), GENERATION_ROWS):
            rows = order[start : start + GENERATION_ROWS]
            answers = model.generate(
                [ids[i] for i in rows],
                max_new_tokens,
                temperature=temperature,
                stop_ids=tokenizer.stop_ids,
                seed=seed + start,
            )
            for i, answer in zip(rows, answers):
                if answer[-1] in tokenizer.stop_ids:
                    texts[i] = tokenizer.decode(answer[:-1])
            bar.update(len(rows))
    return [texts[i : i + samples] for i in range(0, len(texts), samples)]


def pass_at_k(correct: np.ndarray, n: int, k: int) -> np.ndarray:
    """The unbiased estimate of arXiv 2107.03374 for each problem: 1 - C(n - c, k) / C(n, k)."""
    return np.array([1 - math.comb(n - int(c), k) / math.comb(n, k) for c in correct])


def task_values(model: Llama, tokenizer: Tokenizer, count: int = TEST_PROBLEMS) -> dict[str, list]:
    """Greedy accuracy and pass@k on test problems of the built-in task, a number a problem."""
    questions = problems("test", count, seed=0)
    greedy = sample_answers(model, tokenizer, questions, temperature=0)
    drawn = sample_answers(model, tokenizer, questions, samples=SAMPLES)
    right = [[a is not None and is_correct(q, a) for a in row] for q, row in zip(questions, drawn)]
    correct = np.array(right).sum(axis=1)
    accuracy = [float(a is not None and is_correct(q, a)) for q, (a,) in zip(questions, greedy)]
    return {"greedy": accuracy} | {
        f"pass@{k}": pass_at_k(correct, SAMPLES, k).tolist() for k in PASS_AT
    }


# --- Tables ---------------------------------------------------------------------------------------

Row = dict[str, Figure]


def change_figures(logps: Tensor, start_logps: Tensor) -> Row:
    """By how many nats the log-probs of chosen and rejected answers moved, (pairs, 2) each."""
    chosen, rejected = (logps - start_logps).unbind(dim=1)
    return {"chosen logp": Figure.of(chosen), "rejected logp": Figure.of(rejected)}


def table(rows: dict[str, Row]) -> str:
    """Aligned lines of text: a row a name, a column a figure, each mean ± standard error."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["", *(f"{c}, %" if _is_share(c) else f"{c}, nats" for c in columns)]]
    for name, row in rows.items():
        lines.append([name, *(_cell(column, row.get(column)) for column in columns)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = (
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))])
        for line in lines
    )
    return "\n".join(line.rstrip() for line in aligned)


def _is_share(column: str) -> bool:
    return column.startswith(("greedy", "pass@", "accuracy"))


def _cell(column: str, figure: Figure | None) -> str:
    if figure is None:
        return "-"
    if _is_share(column):
        return f"{100 * figure.mean:.1f} ± {100 * figure.error:.1f}"
    return f"{figure.mean:+.2f} ± {figure.error:.2f}"


# --- The command ----------------------------------------------------------------------------------


def preference_figures(model: Llama, tokenizer: Tokenizer, folder: Path, data: Path) -> Row:
    """A checkpoint on pairs, against the reference that its train_config.json names as `init`."""
    pairs = load_pairs(data, tokenizer)
    row_tokens = max(map(row_length, pairs))
    sizes = row_tokens, 8 * row_tokens, torch.float32
    logps = pair_logps(model, pairs, *sizes)
    if not (folder / "train_config.json").is_file():
        chosen, rejected = logps.unbind(dim=1)
        return {"chosen logp": Figure.of(chosen), "rejected logp": Figure.of(rejected)}
    config = read_json(folder / "train_config.json")
    reference = Llama.from_pretrained(config["init"], device=model.head_weight.device)
    ref_logps = pair_logps(reference, pairs, *sizes)
    values = preference_values(logps, ref_logps, config["beta"])
    accuracy = {"accuracy of rewards": Figure.of(values["rewards/accuracies"])}
    return {f"change of {k}": v for k, v in change_figures(logps, ref_logps).items()} | accuracy


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Prints a table and returns it: run -> figure -> mean."""
    parser = Parser("eval.py", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN_OR_CHECKPOINT", help="folders to compare")
    parser.add_argument("--data", metavar="FILE.jsonl", help="preference pairs to evaluate on")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    options = parser.parse_args(argv)
    rows: dict[str, Row] = {}
    try:
        for name in options.runs:
            folder = Path(name)
            model = Llama.from_pretrained(folder, device=options.device)
            tokenizer, row = load_tokenizer(folder), {}
            data = options.data
            if data is None:
                row = {k: Figure.of(v) for k, v in task_values(model, tokenizer).items()}
                if (folder / "train_config.json").is_file():
                    data = read_json(folder / "train_config.json")["eval_data"]
            if data is not None:
                row |= preference_figures(model, tokenizer, folder, Path(data))
            rows[name] = row
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(table(rows))
    return {name: {key: figure.mean for key, figure in row.items()} for name, row in rows.items()}


if __name__ == "__main__":
    main()
