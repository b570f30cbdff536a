"""Evaluation: log-probs of pairs, what they say about preferences, answers sampled and graded.

python eval.py out/base out/mio out/dpo          problems of the built-in task, held-out pairs
python eval.py out/mio --data FILE.jsonl         preference pairs of your own
"""

import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from tqdm import tqdm

from data import (
    Batch,
    Pairs,
    Parser,
    Tokenizer,
    is_correct,
    load_pairs,
    load_tokenizer,
    make_batches,
    problems,
    row_masks,
    sees,
)
from mio import chunked_logps
from model import Llama, read_json

SAMPLES = 8  # answers drawn at temperature 1 for each problem, for pass@k
PASS_AT = (1, 8)
TEST_PROBLEMS = 1000
ANSWER_TOKENS = 48  # a right answer of the built-in task has at most 35
GENERATION_ROWS = 1000
ROW_TOKENS, MICRO_TOKENS = 128, 4096


class Figure(NamedTuple):
    """A mean with its standard error over n independent items, None for a single one."""

    mean: float
    error: float | None
    n: int

    @classmethod
    def of(cls, values) -> "Figure":
        values = np.asarray(values, dtype=np.float64)
        error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
        return cls(float(values.mean()), error, len(values))


def pick_device(name: str) -> str:
    """`auto` is cuda where there is one. Raises ValueError for a device that is not here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        assert torch.device(name).type in ("cpu", "cuda")
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: not available here, try --device cpu") from None
    return name


# --- Preferences ----------------------------------------------------------------------------------


@torch.no_grad()
def pair_logps(
    model: Llama, pairs: Pairs, row_tokens: int, micro_tokens: int, dtype: torch.dtype
) -> Tensor:
    """Summed log-probabilities of chosen and rejected answers, (pairs, 2) in nats, on the CPU.

    The same packing, head and autocast as in training.
    """
    device = model.head_weight.device
    logps = torch.full((len(pairs), 2), torch.nan)
    with tqdm(total=len(pairs), desc="log-probs", unit="pair", leave=False) as bar:
        for start in range(0, len(pairs), 256):  # as many as are packed together
            index = list(range(start, min(start + 256, len(pairs))))
            for batch in make_batches(pairs, index, row_tokens, micro_tokens, fixed_length(model)):
                batch = batch.to(device)
                with autocast(device, dtype):
                    hidden, head = answer_states(model, batch), model.head_weight
                    sums = chunked_logps(
                        hidden, head, batch.targets, batch.lengths, compiled=model.compiled
                    )
                logps[batch.index] = sums.view(-1, 2).float().cpu()
                bar.update(len(batch.index))
    return logps


def fixed_length(model: Llama) -> bool:
    """FlexAttention's kernels are compiled for one length; elsewhere rows keep their own."""
    return model.compiled and model.head_weight.is_cuda


def answer_states(model: Llama, batch: Batch) -> Tensor:
    """The hidden states that predict the answers' tokens, laid end to end: (N, D)."""
    window = model.config.sliding_window
    if fixed_length(model):
        T = batch.tokens.shape[1]
        mask = create_block_mask(sees(batch, window), None, None, T, T, device=batch.tokens.device)
    else:
        mask = row_masks(batch, window)
    return model(batch.tokens, batch.positions, mask)[0, batch.source]


def autocast(device: torch.device, dtype: torch.dtype):
    """Matrix products in `dtype`; float32 switches autocast off."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def preference_values(logps: Tensor, ref_logps: Tensor | None, beta: float) -> dict[str, Tensor]:
    """What is logged of pairs, under TRL's names: a tensor (pairs,) each.

    logps, ref_logps (pairs, 2): chosen and rejected, NaN for an answer that is missing. Without a
    reference there are no rewards.
    """
    values = {"logps/chosen": logps[:, 0], "logps/rejected": logps[:, 1]}
    if ref_logps is not None:
        chosen, rejected = (beta * (logps - ref_logps)).unbind(dim=1)
        values |= {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": torch.where(
                chosen.isfinite() & rejected.isfinite(),
                (chosen > rejected).to(logps.dtype),
                torch.nan,
            ),
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
) -> list[list[str]]:
    """Draws answers to each prompt: `samples` texts each, "" for one that did not end in time."""
    ids = [tokenizer.prompt_ids(prompt) for prompt in prompts for _ in range(samples)]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # like lengths together
    texts = [""] * len(ids)
    quick = len(ids) <= GENERATION_ROWS  # a single batch is done before a bar is of use
    with tqdm(total=len(ids), desc="answers", unit="answer", leave=False, disable=quick) as bar:
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
    correct = np.array([sum(is_correct(q, a) for a in row) for q, row in zip(questions, drawn)])
    accuracy = [float(is_correct(q, a)) for q, (a,) in zip(questions, greedy)]
    return {"greedy": accuracy} | {
        f"pass@{k}": pass_at_k(correct, SAMPLES, k).tolist() for k in PASS_AT
    }


# --- Tables ---------------------------------------------------------------------------------------

Row = dict[str, Figure]


def task_row(values: dict[str, list]) -> Row:
    return {name: Figure.of(value) for name, value in values.items()}


def preference_row(logps: Tensor, ref_logps: Tensor, pairs: Pairs) -> Row:
    """Two (pairs, 2) of log-probs -> by how many nats those of chosen and rejected answers moved,
    and how often the chosen one's moved up by more: the accuracy of the implicit reward."""
    chosen, rejected = (logps - ref_logps).unbind(dim=1)
    has_chosen, has_rejected = torch.from_numpy(pairs.lengths()[:, 1:] > 0).unbind(dim=1)
    both = has_chosen & has_rejected
    columns = {
        "Δ chosen": chosen[has_chosen],
        "Δ rejected": rejected[has_rejected],
        "reward": (chosen > rejected)[both],
    }
    return {name: Figure.of(values) for name, values in columns.items() if len(values)}


LEGEND = {
    "greedy": "greedy, pass@k: right answers to {n} held-out problems",
    "Δ chosen": "Δ: change of an answer's log-prob in nats, {n} pairs",
    "reward": "reward: pairs whose chosen answer moved up by more",
    "chosen": "chosen, rejected: log-prob of an answer in nats, {n} pairs",
}


def table(rows: dict[str, Row]) -> str:
    """Aligned lines of text: a row a name, a column a figure, each mean ± standard error."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["", *(f"{column} %" if _is_share(column) else column for column in columns)]]
    for name, row in rows.items():
        lines.append([name, *(_cell(column, row.get(column)) for column in columns)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))])
        for line in lines
    ]
    counts = {column: figure.n for row in rows.values() for column, figure in row.items()}
    legend = [text.format(n=counts[column]) for column, text in LEGEND.items() if column in counts]
    return "\n".join([*(line.rstrip() for line in aligned), *legend, "±: standard error"])


def _is_share(column: str) -> bool:
    return column.startswith(("greedy", "pass@", "reward"))


def _cell(column: str, figure: Figure | None) -> str:
    if figure is None:
        return "-"
    scale, form = (100, ".1f") if _is_share(column) else (1, "+.2f")
    error = "" if figure.error is None else f"±{scale * figure.error:{form.strip('+')}}"
    return f"{scale * figure.mean:{form}}{error}"


# --- The command ----------------------------------------------------------------------------------


def load_checkpoint(folder, device: str) -> tuple[Llama, Tokenizer]:
    """Model and tokenizer of a folder, which must belong together."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: there is no such checkpoint folder")
    tokenizer, model = load_tokenizer(folder), Llama.from_pretrained(folder, device=device)
    largest = max(tokenizer.vocab_size - 1, *tokenizer.stop_ids)
    if largest >= model.config.vocab_size:
        raise ValueError(f"{folder}: tokenizer or eos_token_id have ids up to {largest}, the model "
                         f"has {model.config.vocab_size}; they do not belong together")  # fmt: skip
    return model, tokenizer


def trained_with(file: Path) -> dict:
    """What evaluation needs of a train_config.json, and defaults where there is none."""
    config = {"eval_data": None, "init": None, "max_length": 1024}
    config |= read_json(file) if file.is_file() else {}
    for name, kind in (("eval_data", str | None), ("init", str | None), ("max_length", int)):
        if not isinstance(config[name], kind):
            raise ValueError(f"{file}: {name} is {config[name]!r:.60}")
    return config


def evaluate_pairs(
    model: Llama, tokenizer: Tokenizer, data: Path, init: str | None, max_length: int
) -> Row:
    """A model on pairs of answers, against the checkpoint `init` that it was trained from."""
    pairs = load_pairs(data, tokenizer, max_length)

    def logps_of(model):
        return pair_logps(model, pairs, ROW_TOKENS, MICRO_TOKENS, torch.float32)

    if init is None:
        present = torch.from_numpy(pairs.lengths()[:, 1:] > 0)
        sides = zip(("chosen", "rejected"), logps_of(model).T, present.T)
        return {name: Figure.of(logps[here]) for name, logps, here in sides if here.any()}
    reference = Llama.from_pretrained(init, device=model.head_weight.device)
    if reference.config.vocab_size != model.config.vocab_size:
        raise ValueError(f"{init}: has {reference.config.vocab_size} ids, the model to compare has "
                         f"{model.config.vocab_size}; they do not belong together")  # fmt: skip
    return preference_row(logps_of(model), logps_of(reference), pairs)


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Prints a table and returns its means: run, as it was named in argv -> column -> mean."""
    parser = Parser("eval.py", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN_OR_CHECKPOINT", help="folders to compare")
    parser.add_argument("--data", metavar="FILE.jsonl", help="preference pairs to evaluate on")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N (default: auto)")
    options = parser.parse_args(argv)
    runs = {Path(run).name: run for run in options.runs}
    runs = runs if len(runs) == len(options.runs) else {run: run for run in options.runs}
    rows: dict[str, Row] = {}
    try:
        device = pick_device(options.device)
        for name, run in runs.items():
            folder, row = Path(run), {}
            model, tokenizer = load_checkpoint(folder, device)
            config = trained_with(folder / "train_config.json")
            data = options.data or config["eval_data"]
            if data is not None:  # first, for its input may be bad
                init, max_length = config["init"], config["max_length"]
                row = evaluate_pairs(model, tokenizer, Path(data), init, max_length)
            if options.data is None:
                row = task_row(task_values(model, tokenizer)) | row
            rows[name] = row
    except (OSError, ValueError) as error:
        parser.error(error)
    print(table(rows))
    return {
        runs[name]: {column: figure.mean for column, figure in row.items()}
        for name, row in rows.items()
    }


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console without "±" is no reason to stop
    main()
