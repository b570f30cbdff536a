"""Evaluation: answers drawn and graded, choices scored, preferences measured, runs compared.

python eval.py out/base out/mio out/dpo                     the built-in task, held-out pairs
python eval.py out/mio out/dpo ../base --data gsm8k-test.jsonl arc.jsonl pairs.jsonl

Rows become items, items values, values figures, figures a table: a value for each item and run is
kept, so that runs are compared item by item.
"""

import argparse
import collections
import functools
import hashlib
import importlib.util
import json
import math
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from tqdm import tqdm

from data import (
    COLUMNS,
    Batch,
    Pairs,
    Parser,
    Tokenizer,
    is_correct,
    load_pairs,
    load_tokenizer,
    make_batches,
    messages_of,
    problems,
    read_rows,
    row_masks,
    sees,
    split_pairs,
    text_of,
)
from mio import chunked_logps
from model import Llama, LoraConfig, read_json, write_json

SAMPLES = 8  # answers drawn at temperature 1 for each problem, for pass@1 and pass@8
TEST_PROBLEMS = 1000
ANSWER_TOKENS = 48  # a right answer of the built-in task has at most 35
GENERATION_ROWS = 1000
GENERATION_TOKENS = 2**16  # of prompts and answers at work at a time, what the cache must hold
ROW_TOKENS, MICRO_TOKENS = 128, 4096
RESAMPLES = 2000  # of the bootstrap


class Figure(NamedTuple):
    """A mean over n items with its standard error, None where all have one prompt."""

    mean: float
    error: float | None
    n: int


class Difference(NamedTuple):
    """Of a run from the first one over the n items of both, with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int


class Column(NamedTuple):
    """What is known of each item, (items,) or (items, parts), NaN where nothing is, and what makes
    a figure of them. Items of one prompt (items,) are not independent: errors are those of drawing
    prompts. None: each item has its own. Names tell which items of two runs are the same; without
    them it is their order."""

    values: np.ndarray
    statistic: Callable[[np.ndarray], float] = np.mean
    prompts: np.ndarray | None = None
    names: np.ndarray | None = None

    def known(self) -> tuple[np.ndarray, np.ndarray]:
        """The values that are there, and numbers of their prompts."""
        there = ~np.isnan(self.values).any(axis=tuple(range(1, self.values.ndim)))
        prompts = np.arange(len(there)) if self.prompts is None else self.prompts
        return self.values[there], np.unique(prompts[there], return_inverse=True)[1]

    @np.errstate(invalid="ignore")  # of infinite values, inf - inf is NaN and no news
    def mean(self) -> float:
        values, _ = self.known()
        return float(self.statistic(values)) if len(values) else math.nan

    @np.errstate(invalid="ignore")
    def figure(self) -> Figure:
        values, prompts = self.known()
        n, groups, mean, error = len(values), len(set(prompts)), self.mean(), None
        if groups > 1 and self.statistic is np.mean:
            # Var(mean) = G/(G-1) sum_g (sum_{i in g} x_i - mean)^2 / n^2, s^2/n where G is n.
            residuals = np.bincount(prompts, values - mean)
            error = math.sqrt(groups / (groups - 1) * (residuals**2).sum()) / n
        elif groups > 1:
            error = float(resample(values, self.statistic, prompts).std(ddof=1))
        return Figure(mean, error, n)

    @np.errstate(invalid="ignore")
    def difference(self, first: "Column") -> Difference | None:
        """Paired, over the items of both: a resample takes the same of each. None where these are
        not of two prompts at least."""
        names = (np.arange(len(c.values)) if c.names is None else c.names for c in (self, first))
        _, here, there = np.intersect1d(*names, assume_unique=True, return_indices=True)
        there, here = there[here.argsort()], np.sort(here)
        both = np.stack((self.values[here], first.values[there]), axis=-1)
        prompts = None if self.prompts is None else self.prompts[here]
        values, prompts = Column(both, prompts=prompts).known()
        if len(set(prompts)) < 2:
            return None

        def statistic(values):
            return float(self.statistic(values[..., 0]) - self.statistic(values[..., 1]))

        low, high = np.percentile(resample(values, statistic, prompts), (2.5, 97.5)).tolist()
        return Difference(statistic(values), low, high, len(values))


def resample(values: np.ndarray, statistic: Callable, prompts: np.ndarray) -> np.ndarray:
    """The bootstrap: the statistic of RESAMPLES draws of as many prompts, with replacement, each
    with all of its items. prompts: their numbers 0, 1, ... (items,)."""
    random, n = np.random.default_rng(0), prompts.max() + 1
    draws = (np.bincount(random.integers(0, n, n), minlength=n) for _ in range(RESAMPLES))
    return np.array([statistic(np.repeat(values, drawn[prompts], axis=0)) for drawn in draws])


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


def pair_logps(
    model: Llama, pairs: Pairs, row_tokens: int, micro_tokens: int, dtype: torch.dtype,
    batches: Callable[..., list[Batch]] = make_batches,
) -> Tensor:  # fmt: skip
    """Summed log-probabilities of chosen and rejected answers, (pairs, 2) in nats, on the CPU."""
    logps = answer_logps(model, pairs, row_tokens, micro_tokens, dtype, batches)
    return torch.stack(logps) if logps else torch.empty(0, 2)


@torch.no_grad()
def answer_logps(
    model: Llama, rows: Sequence, row_tokens: int, micro_tokens: int, dtype: torch.dtype,
    batches: Callable[..., list[Batch]] = make_batches,
) -> list[Tensor]:  # fmt: skip
    """Summed log-probabilities of the answers of each row, (answers,) in nats, on the CPU.

    rows: ids of a prompt and of any number of answers. The same packing, head and autocast as in
    training. batches: lays rows out, some of them where others are for other processes; 0 there.
    """
    device = model.head_weight.device
    logps = [torch.zeros(len(row) - 1) for row in rows]
    with tqdm(total=len(rows), desc="log-probs", unit="row", leave=False) as bar:
        for start in range(0, len(rows), 256):  # as many are packed together
            index = list(range(start, min(start + 256, len(rows))))
            for batch in batches(rows, index, row_tokens, micro_tokens, fixed_length(model)):
                batch = batch.to(device)
                with autocast(device, dtype):
                    hidden, head = answer_states(model, batch), model.head_weight
                    sums = chunked_logps(
                        hidden, head, batch.targets, batch.lengths, compiled=model.compiled
                    )
                answers = [len(rows[i]) - 1 for i in batch.index]
                for i, part in zip(batch.index, sums.float().cpu().split(answers)):
                    logps[i] = part
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


def information(rewards: Tensor) -> dict[str, Column]:
    """Three estimates by the rewards (pairs, 2) as critic, in nats; the marginal is the half-and-
    half mixture.

    `dv` and `nwj` bound the mutual information from below; `js` is twice the Jensen-Shannon
    divergence's own bound, log 4 minus the mio loss. With this mixture the divergences are at most
    log 2 (dv, nwj) and 0.4315 (js). All are 0 where the policy is the reference.
    """
    rewards = rewards.double()
    w, loser = rewards.unbind(dim=1)
    js = math.log(4) - F.softplus(-w) - (F.softplus(w) + F.softplus(loser)) / 2
    nwj = 1 + w - (w.exp() + loser.exp()) / 2
    return {"dv": Column(rewards.numpy(), donsker_varadhan), "js": Column(js.numpy()),
            "nwj": Column(nwj.numpy())}  # fmt: skip


def donsker_varadhan(rewards: np.ndarray) -> float:
    return rewards[:, 0].mean() - np.logaddexp.reduce(rewards, axis=None) + math.log(rewards.size)


def preference_metrics(logps: Tensor, ref_logps: Tensor, beta: float) -> dict[str, float]:
    """Means over the pairs that have what is measured, with the mutual-information read-outs."""
    values = preference_values(logps, ref_logps, beta)
    means = {name: Column(value.double().numpy()).mean() for name, value in values.items()}
    estimates = information(beta * (logps - ref_logps))
    return means | {f"mi/{name}": column.mean() for name, column in estimates.items()}


def preference_columns(
    logps: Tensor, ref_logps: Tensor | None, pairs: Pairs, beta: float
) -> dict[str, Column]:
    """Two (pairs, 2) of log-probs, by policy and reference, as columns: rewards, which carry beta,
    log-ratios in nats, of answers and of their tokens, and log-probs. An answer that is missing is
    not one of log-prob 0."""
    lengths, seen, columns = torch.from_numpy(pairs.lengths()[:, 1:]), {}, {}
    prompts = np.array([seen.setdefault(tuple(pair.prompt), len(seen)) for pair in pairs])
    logps = torch.where(lengths > 0, logps, torch.nan)
    values, parts = preference_values(logps, ref_logps, beta), {"": logps}
    if ref_logps is not None:
        columns = {"reward": values["rewards/accuracies"], "margin": values["rewards/margins"]}
        ratios = logps - ref_logps
        parts = {"T ": beta * ratios, "Δ ": ratios, "Δ/token ": ratios / lengths} | parts
    for name, part in parts.items():
        columns |= {f"{name}chosen": part[:, 0], f"{name}rejected": part[:, 1]}
    columns = {n: Column(v.double().numpy(), prompts=prompts) for n, v in columns.items()}
    return {name: column for name, column in columns.items() if len(column.known()[0])}


def by_length(columns: dict[str, Column], lengths: np.ndarray) -> dict[str, Column]:
    """Accuracy and margin of the four quarters of the pairs by tokens of the chosen answer."""
    quarter = np.searchsorted(np.quantile(lengths, (0.25, 0.5, 0.75)), lengths)
    found = {}
    for name in ("reward", "margin"):
        for q in np.unique(quarter) if name in columns else ():
            low, high = lengths[quarter == q].min(), lengths[quarter == q].max()
            values = np.where(quarter == q, columns[name].values, np.nan)
            if not np.isnan(values).all():
                found[f"{name} {low}-{high}"] = columns[name]._replace(values=values)
    return found


def information_columns(columns: dict[str, Column]) -> dict[str, Column]:
    """The estimates by the rewards, and the lower bound on the Kullback-Leibler divergence of
    chosen answers from the mixture that the Jensen-Shannon bound implies; with their ceilings."""
    if "margin" not in columns:
        return {}
    rewards = np.stack([columns[f"T {side}"].values for side in ("chosen", "rejected")], axis=1)
    found = information(torch.from_numpy(rewards))
    kl = found["js"]._replace(statistic=lambda js: least_kl(js.mean() / 2))
    found = {"dv ≤0.693": found["dv"], "nwj ≤0.693": found["nwj"], "js ≤0.4315": found["js"],
             "KL from js ≤0.693": kl}  # fmt: skip
    _, _, prompts, names = columns["margin"]
    return {n: column._replace(prompts=prompts, names=names) for n, column in found.items()}


def least_kl(jsd: float) -> float:
    """The least KL(P||Q) of two distributions whose Jensen-Shannon divergence is `jsd`, in nats.

    Both are means under Q of functions of dP/dQ, whose own mean is 1. KL's less a multiple of JSD's
    is concave up to a point and convex beyond, so its mean is least where dP/dQ has two values, one
    of them 0: P is Q without a share q of it.
    """
    kl = np.linspace(0, 7, 1001)  # -log(1 - q)
    q = -np.expm1(-kl)
    jsds = (math.log(2) * q - (1 - q) * kl - (2 - q) * np.log1p(-q / 2)) / 2
    return float(np.interp(jsd, jsds, kl))


# --- Answers --------------------------------------------------------------------------------------


def draw(
    model: Llama, prompts: list[list[int]], max_new_tokens: int, *, seed: int = 0,
    rows: int | None = None, is_over: Callable | None = None, **how,
) -> list[list[int]]:  # fmt: skip
    """Continues lists of ids as `Llama.generate` does, like lengths together, `rows` at a time or
    as many as GENERATION_TOKENS allows. A long draw leaves its seconds and tokens a second."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    began, tokens = time.perf_counter(), 0
    quick = len(prompts) <= GENERATION_ROWS and max_new_tokens <= ANSWER_TOKENS  # no bar is of use
    with tqdm(total=len(order), desc="answers", unit="answer", leave=None, disable=quick) as bar:

        def progress(answer):
            nonlocal tokens
            tokens += len(answer)
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - began):.0f} tokens/s", False)
            bar.update()

        for start in range(0, len(order), GENERATION_ROWS):
            part = order[start : start + GENERATION_ROWS]
            longest = max(len(prompts[i]) for i in part) + max_new_tokens
            over = is_over and (lambda row, ids, part=part: is_over(part[row], ids))
            found = model.generate(
                [prompts[i] for i in part], max_new_tokens, seed=seed + start, is_over=over,
                rows=rows or max(1, GENERATION_TOKENS // longest), progress=progress, **how,
            )  # fmt: skip
            for i, answer in zip(part, found):
                answers[i] = answer
    return answers


def sample_answers(
    model: Llama, tokenizer: Tokenizer, prompts: list[str], *, samples: int = 1,
    temperature: float = 1.0, max_new_tokens: int = ANSWER_TOKENS, seed: int = 0,
) -> list[list[str]]:  # fmt: skip
    """Draws answers to each prompt: `samples` texts each, "" for one that did not end in time."""
    ids = [tokenizer.prompt_ids(prompt) for prompt in prompts for _ in range(samples)]
    stop = tokenizer.stop_ids
    answers = draw(model, ids, max_new_tokens, stop_ids=stop, temperature=temperature, seed=seed)
    texts = [tokenizer.decode(a[:-1]) if a[-1] in stop else "" for a in answers]
    return [texts[i : i + samples] for i in range(0, len(texts), samples)]


def pass_at_k(correct: np.ndarray, n: int, k: int) -> np.ndarray:
    """The unbiased estimate of arXiv 2107.03374 for each problem: 1 - C(n - c, k) / C(n, k). Raises
    ValueError where k is above n."""
    if k > n:
        raise ValueError(f"pass@{k} needs {k} answers to each question, there are {n}")
    return np.array([1 - math.comb(n - int(c), k) / math.comb(n, k) for c in correct])


def task_values(
    model: Llama, tokenizer: Tokenizer, count: int = TEST_PROBLEMS, samples: int = SAMPLES
) -> dict[str, list]:
    """Greedy accuracy and pass@k on test problems of the built-in task, a number a problem."""
    questions = problems("test", count, seed=0)
    greedy = sample_answers(model, tokenizer, questions, temperature=0)
    drawn = sample_answers(model, tokenizer, questions, samples=samples)
    correct = np.array([sum(is_correct(q, a) for a in row) for q, row in zip(questions, drawn)])
    accuracy = [float(is_correct(q, a)) for q, (a,) in zip(questions, greedy)]
    ks = (1, SAMPLES) if samples == SAMPLES else powers_of_two(samples)
    passed = {f"pass@{k}": pass_at_k(correct, samples, k).tolist() for k in ks}
    return {"greedy": accuracy} | passed


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... and n itself."""
    return sorted({2**i for i in range(n.bit_length())} | {n})


# --- Graders: each way of reading an answer gives what it says, or None; right is what the answer
# key says, read the same way ----------------------------------------------------------------------

NUMBER = r"(?:(?<![\w)])-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"


def number(text: str) -> Fraction | None:
    """Of -$1,234.50 the value. Numbers are compared as numbers: 18.00 is 18."""
    try:
        return Fraction(re.sub(r"[$,\s]", "", text).replace("_", "?"))  # 12_5 is no number
    except (ValueError, ZeroDivisionError):
        return None


def strict(text: str) -> Fraction | None:
    """The first number after ####, as GSM8K's authors grade."""
    found = re.search(r"####\s*(-?\$?\s?-?[\d.,]+)", text)
    return found and number(found[1].rstrip(".,"))


def flexible(text: str) -> Fraction | None:
    """The last number of all."""
    found = re.findall(NUMBER, text)
    return number(found[-1]) if found else None


def boxed(text: str) -> str | None:
    """The last \\boxed{...}, braces balanced, or what follows the last "final answer is"."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start >= 0:
        depth, begin = 0, text.index("{", start)
        for end in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[begin + 1 : end]
        return None
    found = re.findall(r"final answer is:?\s*(.+?)(?:\.?\s*I hope|\.?\s*$|\.\s)", text, re.I | re.M)
    return found[-1] if found else None


def math_answer(text: str) -> Fraction | str | None:
    found = boxed(text)
    return None if found is None else normalised(found)


def normalised(text: str) -> Fraction | str:
    """A formula without what does not change its value, after Hendrycks' and Minerva's rules; a
    number or a fraction of numbers as its value."""
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\left|\\right|\\[!,;: ]|\^\s*\{?\\circ\}?|\\?[%$]", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text).strip().rstrip(".")
    text = re.sub(r"^\w\s*=\s*", "", text)  # x = 5
    text = re.sub(r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    unit = re.fullmatch(r"(-?[\d./]+)\s+[A-Za-z]{2}[A-Za-z .^\d]*", text)  # 5 cm, not 2 x
    plain = re.sub(r"\s+", "", unit[1] if unit else text)
    fraction = re.fullmatch(r"(-?)\\frac\{(-?[\d.]+)\}\{(-?[\d.]+)\}", plain)
    top, _, bottom = (plain if fraction is None else f"{fraction[1]}{fraction[2]}/{fraction[3]}"
                      ).partition("/")  # fmt: skip
    top, bottom = number(top.replace("--", "")), number(bottom or "1")
    return plain if top is None or not bottom else top / bottom


# A capital, but neither the pronoun nor the article that begins a sentence.
CAPITAL = r"((?:[B-HJ-Z]|[AI](?!['’]|\s+(?!because|since|as\b|is\b)\w))\b)"
LETTERS = (
    rf"(?i:\banswer|\bcorrect (?:choice|option))\**(?i:\s+is\b\**:?|:)[\s*(]*{CAPITAL}",
    rf"(?:(?i:\boption)\s+[*(]*|\*\*\(?(?=\w[).]*\*\*)){CAPITAL}",
    rf"\A\W*{CAPITAL}(?:[.:)](?!\w)|[ \t]*(?:\n|\Z))",
    rf"\({CAPITAL}\)",
)


def letter(text: str) -> str | None:
    """Of "answer is (C)" or "correct option: C" the last; else of "option C" or "**C**"; else a
    letter by itself that the text begins with; else the last (C)."""
    return next((found[-1] for way in LETTERS if (found := re.findall(way, text))), None)


# grade -> how the key is read, and ways of reading an answer
GRADERS: dict[str, tuple[Callable, dict[str, Callable]]] = {
    "gsm8k": (lambda key: number(key.rpartition("####")[2].strip().rstrip(".")),
              {"strict": strict, "flexible": flexible}),
    "math": (lambda key: normalised(boxed(key) or key), {"math": math_answer}),
    "exact": (str.strip, {"exact": str.strip}),
    "letter": (lambda key: letter(key) or letter(key.upper()), {"letter": letter}),
}  # fmt: skip


def grade_values(grade: str, key: str, texts: list[str]) -> dict[str, float]:
    """The figures of one item from its n answers: right or not, or pass@k for k = 1, 2, 4, ..., n
    and whether the most frequent result is right, the first of equals."""
    read_key, readings = GRADERS[grade]
    gold, n, values = read_key(key), len(texts), {}
    for name, read in readings.items():
        found = [read(text) for text in texts]
        right = [result is not None and result == gold for result in found]
        if n == 1:
            values[name] = float(right[0])
            continue
        for k in powers_of_two(n):
            values[f"{name} pass@{k}"] = float(pass_at_k([sum(right)], n, k)[0])
        votes = collections.Counter(result for result in found if result is not None)
        values[f"{name} maj@{n}"] = float(bool(votes) and votes.most_common(1)[0][0] == gold)
    return values


def grade_drawn(item: "Item", tokenizer: Tokenizer, answer: list[int]) -> float:
    """1 for ids that end by themselves and are right, by the first of the grade's readings."""
    first, *_ = grade_values(item.grade, item.key, [tokenizer.decode(answer[:-1])]).values()
    return first * (answer[-1] in tokenizer.stop_ids)


# --- Rows to items --------------------------------------------------------------------------------

EVALUATION_FORMS = (
    "rows to evaluate on are {question, answer} as GSM8K's, {prompt, answer, grade}, "
    "{prompt, choices, gold}, or pairs"
)


class Item(NamedTuple):
    """A row to answer and grade, or one with choices."""

    line: int
    prompt: str | list[dict]
    key: str  # the right answer, as a shot shows it
    grade: str | None
    stop: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    gold: int = 0

    def ids(self, tokenizer: Tokenizer, before: str) -> list[int]:
        if isinstance(self.prompt, list):
            return tokenizer.render(self.prompt, add_generation_prompt=True)
        return tokenizer.prompt_ids(before + self.prompt)

    def joined(self, text: str) -> str:
        """An answer as it goes on from the prompt: after a space, if none is there."""
        bare = isinstance(self.prompt, list) or self.prompt[-1:].isspace() or text[:1].isspace()
        return text if bare else " " + text


def read_item(line: int, row: dict) -> Item:
    """Raises ValueError for a row of no known form."""
    json.dumps(row, ensure_ascii=False).encode()  # raises it for half of a surrogate pair
    if row.keys() >= {"question", "answer"}:
        row = {"prompt": f"Question: {text_of(row, 'question')}\nAnswer:", "grade": "gsm8k",
               "answer": row["answer"], "stop": ["Question:"]}  # fmt: skip
    choose = row.keys() >= {"prompt", "choices", "gold"}
    if not choose and not row.keys() >= {"prompt", "answer", "grade"}:
        raise ValueError(f"its columns are {', '.join(row) or 'none':.200}; {EVALUATION_FORMS}")
    conversation = isinstance(row["prompt"], list)
    prompt = messages_of(row, "prompt") if conversation else text_of(row, "prompt")
    if choose:
        choices, gold = row["choices"], row["gold"]
        texts = isinstance(choices, list) and all(isinstance(c, str) and c.strip() for c in choices)
        if not texts or len(choices) < 2:
            raise ValueError("'choices' must be a list of two or more texts")
        if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
            raise ValueError(f"'gold' is {gold!r:.40}, of {len(choices)} choices it must be one of "
                             f"0 to {len(choices) - 1}")  # fmt: skip
        return Item(line, prompt, choices[gold], None, (), tuple(choices), gold)
    key, grade, stop = row["answer"], row["grade"], row.get("stop", [])
    if grade not in list(GRADERS):
        raise ValueError(f"there is no grade {grade!r:.40}; choose from {', '.join(GRADERS)}")
    if not isinstance(key, str) or not key.strip():
        raise ValueError("'answer' must be a text that is not empty")
    if GRADERS[grade][0](key) is None:
        raise ValueError(f"in the answer {key!r:.40} there is nothing to grade {grade} by")
    if not isinstance(stop, list) or not all(isinstance(s, str) and s for s in stop):
        raise ValueError("'stop' must be a list of texts that are not empty")
    return Item(line, prompt, key, grade, tuple(stop))


def read_items(path: Path) -> list[Item] | None:
    """The items of a file, None for a file of pairs, which `load_pairs` reads. Raises ValueError
    that names file and line."""
    items = []
    for line, row in read_rows(path):
        if not items and row.keys() & COLUMNS - {"prompt"}:
            return None
        try:
            items.append(read_item(line, row))
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from None
        if bool(items[-1].choices) != bool(items[0].choices):
            raise ValueError(f"{path}:{line}: questions to answer and choices belong in two files")
    if not items:
        raise ValueError(f"{path}: the file is empty; {EVALUATION_FORMS}")
    return items


def examples(path: Path | None, k: int, items: list[Item]) -> str:
    """The first k rows of a file of the same form as `items`, answered, to stand before them."""
    if path is None:
        return ""
    shots = read_items(Path(path))
    if shots is None or k > len(shots):
        raise ValueError(f"{path}: -k {k}, but it has {len(shots or [])} rows to show")
    shots = shots[:k]
    if any((s.grade, bool(s.choices)) != (i.grade, bool(i.choices)) for s in shots for i in items):
        return ""
    if any(isinstance(item.prompt, list) for item in shots + items):
        raise ValueError(f"{path}: --shots stand before prompts of plain text, not conversations")
    shown = {shot.prompt: shot.line for shot in shots}
    for line in (shown[item.prompt] for item in items if item.prompt in shown):
        raise ValueError(f"{path}:{line}: shows the answer to a question that is asked; take "
                         "--shots from a training split")  # fmt: skip
    return "".join(f"{shot.prompt}{shot.joined(shot.key)}\n\n" for shot in shots)


# --- Items to values ------------------------------------------------------------------------------


def prompt_ids(model, tokenizer, path, items: list[Item], before: str, lengths) -> list[list[int]]:
    """Raises ValueError, by file and line, where the model cannot read a prompt and then an answer
    of its length, (items,)."""
    most, found = model.config.max_position_embeddings, []
    for item, length in zip(items, lengths):
        try:
            found.append(item.ids(tokenizer, before))
            if (length := length + len(found[-1])) > most:
                raise ValueError(f"prompt and answer may take {length} tokens, the model reads "
                                 f"{most}; lower --max_new_tokens or -k")  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{path}:{item.line}: {error}") from None
    return found


def watch(tokenizer: Tokenizer, stops: list[tuple[str, ...]]) -> Callable | None:
    """is_over of `draw`: whether an answer has one of its stop texts. Decoded is what can hold one
    that was not there at the last look, and the whole only to make sure of it."""
    looked = [0] * len(stops)

    def is_over(i: int, answer: list[int]) -> bool:
        reach = max((len(stop.encode()) + 4 for stop in stops[i]), default=0)  # tokens, at most
        tail = tokenizer.decode(answer[max(0, looked[i] - reach) :])
        looked[i] = len(answer)
        return any(stop in tail and stop in tokenizer.decode(answer) for stop in stops[i])

    return is_over if any(stops) else None


def answer_columns(
    model: Llama, tokenizer: Tokenizer, path, items: list[Item], before: str, options
):
    """Columns of figures, and the texts of each item's n answers."""
    n, new = options.n, options.max_new_tokens
    prompts = prompt_ids(model, tokenizer, path, items, before, [new] * len(items))
    ids = [prompt for prompt in prompts for _ in range(n)]
    answers = draw(
        model, ids, new, stop_ids=tokenizer.stop_ids, temperature=options.temperature,
        top_p=options.top_p, seed=options.seed, rows=options.batch_size,
        is_over=watch(tokenizer, [items[i // n].stop for i in range(len(ids))]),
    )  # fmt: skip
    texts, values = [], []
    for start, item in zip(range(0, len(ids), n), items):
        mine, cut = [], 0
        for answer in answers[start : start + n]:
            ended = answer[-1] in tokenizer.stop_ids
            text = tokenizer.decode(answer[:-1] if ended else answer)
            at = min((text.find(s) for s in item.stop if s in text), default=None)
            mine.append(text[:at])
            cut += not ended and at is None
        texts.append(mine)
        values.append(grade_values(item.grade, item.key, mine) | {"cut": cut / n})
    return _columns(values), texts


def choice_columns(model, tokenizer, path, items: list[Item], before: str, dtype):
    """Columns of accuracy by log-prob, by it over characters and over bytes, as lm-evaluation-
    harness defines them, the joining space left out; and the log-probs of each item's choices."""
    choices = [[tokenizer.continue_ids(item.joined(text)) for text in item.choices]
               for item in items]  # fmt: skip
    longest = [max(map(len, ids)) for ids in choices]
    prompts = prompt_ids(model, tokenizer, path, items, before, longest)
    rows = [[prompt, *ids] for prompt, ids in zip(prompts, choices)]
    logps = [one.double().numpy() for one in
             answer_logps(model, rows, ROW_TOKENS, MICRO_TOKENS, dtype)]  # fmt: skip
    values = []
    for item, scores in zip(items, logps):
        texts = [choice.strip() for choice in item.choices]
        sizes = {"acc": 1, "acc_norm": [len(t) for t in texts],
                 "acc_bytes": [len(t.encode()) for t in texts]}  # fmt: skip
        values.append(
            {k: float(np.argmax(scores / np.array(size)) == item.gold) for k, size in sizes.items()}
        )
    return _columns(values), [scores.tolist() for scores in logps]


def _columns(values: list[dict[str, float]]) -> dict[str, Column]:
    names = dict.fromkeys(name for one in values for name in one)
    return {n: Column(np.array([one.get(n, np.nan) for one in values])) for n in names}


def pair_columns(
    model, tokenizer, reference, path, title, pairs: Pairs, options, config
) -> dict[str, dict[str, Column]]:
    """Blocks of columns on pairs, in the precision of training, against the reference, if any."""
    layout = ROW_TOKENS, MICRO_TOKENS, getattr(torch, config["dtype"])
    if reference and reference.config.vocab_size != model.config.vocab_size:
        raise ValueError(f"{config['init']}: has {reference.config.vocab_size} ids, the model to "
                         f"compare has {model.config.vocab_size}")  # fmt: skip
    logps = pair_logps(model, pairs, *layout)
    ref_logps = reference and pair_logps(reference, pairs, *layout)
    # A row is the same in two runs whatever their tokenizers made of it, or of those before it.
    file = digest_file(path)[:16]
    names = np.array([f"{file}:{line}" for line in pairs.lines])
    columns = preference_columns(logps, ref_logps, pairs, config["beta"])
    columns = {name: column._replace(names=names) for name, column in columns.items()}
    critic = information_columns(columns)
    if reference and options.kl_samples:
        first = {tuple(pairs[i].prompt): i for i in reversed(range(len(pairs)))}
        prompts = list(map(list, sorted(first, key=first.get)))[: options.kl_samples]
        room = model.config.max_position_embeddings - max(map(len, prompts))
        new = max(1, min(options.max_new_tokens, room))
        drawn = draw(model, prompts, new, stop_ids=tokenizer.stop_ids, seed=options.seed,
                     rows=options.batch_size)  # fmt: skip
        rows = list(zip(prompts, drawn))
        logps, ref = (torch.cat(answer_logps(m, rows, *layout)) for m in (model, reference))
        names = names[sorted(first.values())[: len(prompts)]]
        critic["KL"] = Column((logps - ref).double().numpy(), names=names)
    quarters = by_length(columns, pairs.lengths()[:, 1])
    blocks = {title: columns, f"{title}: critic": critic,
              f"{title}: by tokens of the chosen answer": quarters}  # fmt: skip
    return {title: block for title, block in blocks.items() if block}


# --- Tables ---------------------------------------------------------------------------------------

Row = dict[str, Figure | Difference]


def task_row(values: dict[str, list]) -> Row:
    return {name: Column(np.array(value)).figure() for name, value in values.items()}


def preference_row(logps: Tensor, ref_logps: Tensor, pairs: Pairs) -> Row:
    """Two (pairs, 2) of log-probs -> by how many nats those of chosen and rejected answers moved,
    and how often the chosen one's moved up by more: the accuracy of the implicit reward."""
    columns = preference_columns(logps, ref_logps, pairs, beta=1.0)
    names = [name for name in ("Δ chosen", "Δ rejected", "reward") if name in columns]
    return {name: columns[name].figure() for name in names}


LEGEND = {
    "greedy": "greedy, pass@k: right answers to held-out problems",
    "strict": "strict: the number after ####; flexible: the last number",
    "math": "math: by text and value; without a computer-algebra check a lower bound",
    "maj@": "pass@k: one of k answers is right; maj@n: the most frequent of all n is",
    "cut": "cut: answers that did not end in --max_new_tokens; they are graded as they are",
    "acc": "acc, acc_norm, acc_bytes: gold is likeliest as it is, by character, by byte",
    "Δ chosen": "Δ: change of an answer's log-prob in nats",
    "reward": "reward: pairs whose chosen answer moved up by more",
    "margin": "T: beta Δ, the reward; margin: T chosen - T rejected",
    "chosen": "chosen, rejected: log-prob of an answer in nats",
    "dv": "dv, nwj, js: of prompt and chosen answer, by T as critic, in nats; ≤: at most",
    "js": "js: twice the Jensen-Shannon divergence; KL from js: the least KL that it allows",
    "KL": "KL: log-ratio to the reference in nats, on answers drawn from the run",
}
SHARES = ("greedy", "pass@", "reward", "cut", "acc", "strict", "flexible", *GRADERS)
SMALL = ("Δ/token", "dv", "nwj", "js", "KL from js")


def table(rows: dict[str, Row], width: int = 80, markdown: bool = False) -> str:
    """Lines of text: a row a name, a column a figure, mean ± standard error or, of a difference,
    its interval; n below. As many tables as `width` asks for, or one of Markdown."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    grid = [["", *(f"{column} %" if column.startswith(SHARES) else column for column in columns)]]
    for name, row in rows.items():
        grid.append([name, *(_cell(column, row.get(column)) for column in columns)])
    counts = [sorted({row[c].n for row in rows.values() if c in row}) for c in columns]
    grid.append(["n", *("-".join(map(str, {n[0]: 0, n[-1]: 0})) for n in counts)])
    kinds = {type(figure) for row in rows.values() for figure in row.values()}
    lines = []
    if markdown:
        lines = [f"| {' | '.join(line)} |" for line in grid]
        lines.insert(1, "|---" * len(grid[0]) + "|")
        lines.append("")
    else:
        first, *rest = zip(*grid)
        while rest:
            block, room = [first], width - max(map(len, first))
            while rest and (len(block) == 1 or max(map(len, rest[0])) + 2 <= room):
                room -= max(map(len, rest[0])) + 2
                block.append(rest.pop(0))
            widths = [max(map(len, column)) for column in block]
            lines += [""] if lines else []
            lines += [f"{line[0].ljust(widths[0])}  "
                      + "  ".join(c.rjust(w) for c, w in zip(line[1:], widths[1:]))
                      for line in zip(*block)]  # fmt: skip
    heads = {*columns, *re.findall(r"^\S+|maj@", "\n".join(columns), re.M)}
    legend = [text for column, text in LEGEND.items() if column in heads]
    legend.append("±: standard error over prompts")
    if Difference in kinds:
        legend[-1] += "; [...]: of the paired difference, 95 % bootstrap"
    if not all(rows.values()):
        legend.append("-: the two have no items in common")
    return "\n".join([*(line.rstrip() for line in lines), *legend])


def _cell(column: str, figure: Figure | Difference | None) -> str:
    if figure is None:
        return "-"
    scale, form = (100, ".1f") if column.startswith(SHARES) else (1, "+.2f")
    form = "+.3f" if column.startswith(SMALL) else form
    form = "+.2g" if abs(figure.mean) > 1e4 else form  # an estimate that has burst
    if isinstance(figure, Difference):
        mean, low, high = (f"{scale * x:+{form.strip('+')}}" for x in figure[:3])
        return f"{mean} [{low}, {high}]"
    error = "" if figure.error is None else f"±{scale * figure.error:{form.strip('+')}}"
    return f"{scale * figure.mean:{form}}{error}"


def compared(runs: dict[str, dict[str, Column]]) -> dict[str, Row]:
    """Rows of a table: figures of each run, and the differences of all others from the first."""
    rows: dict[str, Row] = {n: {c: x.figure() for c, x in run.items()} for n, run in runs.items()}
    (first, base), *others = runs.items()
    for name, run in others:
        found = {c: run[c].difference(base[c]) for c in run if c in base}
        label = f"{name} - {first}"
        if found:  # of long names one is enough to stand before 80 columns' figures
            label = label if len(label) <= 50 else f"{name} - first"
            rows[label] = {c: d for c, d in found.items() if d is not None}
    return rows


# --- Curves ---------------------------------------------------------------------------------------

PANELS = {  # title -> what is drawn of metrics.jsonl, and whether its change since step 0
    "Δ log-prob of chosen answers, nats": ("logps/chosen", True),
    "Δ log-prob of rejected answers, nats": ("logps/rejected", True),
    "loss": ("loss", False),
    "reward of chosen and (thin) rejected": ("rewards/chosen", False),
    "reward margin": ("rewards/margins", False),
    "reward accuracy": ("rewards/accuracies", False),
}
# Okabe and Ito's palette, told apart by the colour-blind too, and line styles for print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")


def read_curves(folders: dict[str, Path]) -> dict[str, list[dict[str, np.ndarray]]]:
    """label -> a set of curves a run: name -> (steps, values). Runs that differ in seed alone share
    a label. Held-out figures; those of training where there are none."""
    groups: dict[str, tuple[str, list]] = {}
    for name, folder in folders.items():
        if not all((folder / name).is_file() for name in ("metrics.jsonl", "train_config.json")):
            continue
        config = read_json(folder / "train_config.json")
        seed = config.pop("seed", None)
        seldom = ("eval_every", "log_every", "save_every", "keep", "tensorboard", "overwrite")
        for key in ("out", "commit", "versions", "machine", "config", "resume", *seldom):
            config.pop(key, None)
        # The demonstration's base model and pairs are those of its seed.
        key = re.sub(rf"-?seed{seed}\b", "", json.dumps(config, sort_keys=True))
        file = folder / "metrics.jsonl"
        rows = [row for _, row in read_rows(file)]
        held_out = any("eval_loss" in row for row in rows)
        curves = {}
        for metric in {m for m, _ in PANELS.values()} | {"rewards/rejected"}:
            label = f"eval_{metric}" if held_out else metric
            points = [(row.get("step"), row[label]) for row in rows if row.get(label) is not None]
            if any(not isinstance(x, (int, float)) for point in points for x in point):
                raise ValueError(f"{file}: step and {label} must be numbers")
            if points:
                curves[metric] = np.array(points, dtype=float).T
        if curves:
            groups.setdefault(key, (name, []))[1].append(curves)
    return {f"{name} ({len(runs)} seeds)" if len(runs) > 1 else name: runs
            for name, runs in groups.values()}  # fmt: skip


def plot(folders: dict[str, Path], file: Path) -> None:
    """Draws the runs' curves over steps: the mean of seeds, a band from lowest to highest."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6), layout="constrained")
    lines = {}  # for the legend
    for number, (label, runs) in enumerate(read_curves(folders).items()):
        look = {"color": COLORS[number % len(COLORS)], "linestyle": STYLES[number % len(STYLES)]}
        for axis, (metric, change) in zip(axes.flat, PANELS.values()):
            for one in (metric, "rewards/rejected")[: 1 + (metric == "rewards/chosen")]:
                curves = [run[one] for run in runs if one in run]
                if not curves:
                    continue
                steps = curves[0][0][curves[0][0] <= min(curve[0, -1] for curve in curves)]
                values = np.array([np.interp(steps, *c) - change * c[1, 0] for c in curves])
                width = 2 if one == metric else 1
                (line,) = axis.plot(steps, values.mean(axis=0), linewidth=width, **look)
                lines.setdefault(label, line)
                if len(curves) > 1:
                    band = values.min(axis=0), values.max(axis=0)
                    axis.fill_between(steps, *band, color=look["color"], alpha=0.2, linewidth=0)
    for axis, title in zip(axes.flat, PANELS):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if "Δ" in title or "margin" in title or "chosen" in title:
            axis.axhline(0, color="0.4", linewidth=0.8, zorder=0)
    for axis in axes[1]:
        axis.set_xlabel("step")
    columns = min(max(132 // (12 + max(map(len, lines))), 1), 4)  # 132 letters are its width
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=columns,
                  frameon=False, handlelength=3.5)  # fmt: skip
    figure.savefig(file, dpi=150, bbox_inches="tight")  # wider for a label longer than it
    pyplot.close(figure)


# --- The command ----------------------------------------------------------------------------------


def load_checkpoint(
    folder, device: str, dtype: torch.dtype = torch.float32
) -> tuple[Llama, Tokenizer]:
    """Model and tokenizer of a folder, which must belong together."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: there is no such checkpoint folder")
    tokenizer, model = load_tokenizer(folder), Llama.from_pretrained(folder, dtype, device)
    largest = max(tokenizer.vocab_size - 1, *tokenizer.stop_ids)
    if largest >= model.config.vocab_size:
        raise ValueError(f"{folder}: tokenizer or eos_token_id have ids up to {largest}, the model "
                         f"has {model.config.vocab_size}; they do not belong together")  # fmt: skip
    return model, tokenizer


def load_reference(config: dict, device: str) -> Llama:
    """The model that a run began with: a checkpoint, or base and adapter."""
    model = Llama.from_pretrained(config["init"], device=device)
    if adapter := config["init_adapter"]:
        model.add_lora(LoraConfig.from_pretrained(adapter))
        model.load_adapter(adapter)
        model.merge_lora(torch.float32)
    return model


# What evaluation needs of a train_config.json: kind, and the value where there is none.
TRAINED_WITH = {
    "init": (str | None, None), "init_adapter": (str | None, None), "data": (str | None, None),
    "eval_data": (str | None, None), "eval_fraction": (float, 0.0), "seed": (int, 0),
    "max_length": (int, 1024), "beta": (float, 1.0), "dtype": (str, "float32"),
}  # fmt: skip


def trained_with(file: Path) -> dict:
    found = read_json(file) if file.is_file() else {}
    config = {name: found.get(name, value) for name, (_, value) in TRAINED_WITH.items()}
    for name, (kind, _) in TRAINED_WITH.items():
        if not isinstance(config[name], kind):
            raise ValueError(f"{file}: {name} is {config[name]!r:.60}")
    if config["dtype"] not in ("float32", "bfloat16"):
        raise ValueError(f"{file}: dtype is {config['dtype']!r:.60}")
    return config


class Run(NamedTuple):
    """A run or a checkpoint, and what it is asked."""

    folder: Path
    config: dict  # what evaluation needs of its training
    asked: dict[str, tuple[str, list[Item] | Pairs]]  # title -> file, and its rows
    built_in: bool  # the problems of the demonstration, too


def read_run(folder: Path, files: dict[str, list[Item] | None]) -> Run:
    """Asked is what is in the files, None standing for pairs; without any, the pairs that the run
    was watched with in training, and, where it began with the demonstration's base, the built-in
    problems. Raises ValueError where there is neither."""
    config, tokenizer = trained_with(folder / "train_config.json"), load_tokenizer(folder)
    built_in = not files and (Path(config["init"] or folder) / "base.json").is_file()
    load = functools.partial(load_pairs, tokenizer=tokenizer, max_length=config["max_length"])
    data, fraction, asked = config["data"], config["eval_fraction"], {}
    if not files and config["eval_data"]:
        files = {config["eval_data"]: None}
    elif not files and data and fraction and read_items(Path(data)) is None:
        _, held_out = split_pairs(load(data), fraction, config["seed"])
        asked = {f"{Path(data).name}, held out": (data, held_out)}
    for path, items in files.items():
        title = Path(path).name
        title = path if sum(Path(other).name == title for other in files) > 1 else title
        asked[title] = path, load(path) if items is None else items
    if not (asked or built_in):
        raise ValueError(f"{folder}: no pairs were held out in training it; --data FILE.jsonl says "
                         "what to evaluate it on")  # fmt: skip
    init = config["init"]
    if init and not Path(init).is_dir() and any(isinstance(x, Pairs) for _, x in asked.values()):
        raise ValueError(f"{folder}: its reference is {init}, from which it began, and there is no "
                         "such folder; run where it is, or mend train_config.json")  # fmt: skip
    return Run(folder, config, asked, built_in)


def within(kind: type, least: float, most: float = math.inf):
    """A type of argparse: a number, finite and not outside of these."""

    def read(text: str):
        value = kind(text)
        if not (least <= value <= most and value < math.inf):
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least:g}" + (
                f" and at most {most:g}" if most < math.inf else ""))  # fmt: skip
        return value

    read.__name__ = kind.__name__
    return read


def parse_options(argv: list[str] | None):
    parser = Parser("eval.py", __doc__)
    add, count = parser.add_argument, within(int, 1)
    add("runs", nargs="+", metavar="RUN_OR_CHECKPOINT", help="folders; the first is compared with")
    add("--data", nargs="+", default=[], metavar="FILE.jsonl", help="questions, choices, pairs")
    add("--shots", metavar="FILE.jsonl", help="its first rows stand answered before each prompt")
    add("-k", type=count, metavar="N", help="as many of them (default: 5)")
    add("--n", type=within(int, 1, 1024), default=1, help="answers each, for pass@k and maj@n")
    add("--temperature", type=within(float, 0), help="0 is greedy (default: 0, or 1 if --n > 1)")
    add("--top_p", type=within(float, 1e-6, 1), default=1.0, help="keep the likeliest tokens")
    add("--max_new_tokens", type=count, default=256, help="of an answer")
    add("--kl_samples", type=within(int, 0), default=64, help="answers drawn for KL; 0: no KL")
    add("--batch_size", type=count, help="answers in the making at a time (default: by length)")
    add("--seed", type=within(int, 0, 2**31), default=0, help="of the answers drawn")
    add("--dtype", choices=("float32", "bfloat16"), help="(default: bfloat16 with cuda)")
    add("--device", default="auto", help="cpu, cuda, cuda:N (default: auto)")
    add("--plot", metavar="FILE.png", help="draw the runs' metrics.jsonl")
    add("--out", metavar="FILE.json", help="results of all runs (default: eval.json in each)")
    return parser, parser.parse_args(argv)


def check_options(options) -> None:
    """Fills in what follows from other options. Raises ValueError for what cannot be done."""
    if options.temperature is None:
        options.temperature = float(options.n > 1)
    if options.n > 1 and options.temperature == 0:
        raise ValueError(f"--n {options.n}: greedy answers are all alike; --temperature above 0")
    if options.k and not options.shots:
        raise ValueError("-k needs --shots FILE.jsonl")
    options.k = options.k or 5
    options.device = pick_device(options.device)
    half = options.device != "cpu" if options.dtype is None else options.dtype == "bfloat16"
    options.dtype = torch.bfloat16 if half else torch.float32
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install -r requirements-dev.txt")
    if options.plot and Path(options.plot).suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--plot {options.plot}: must end in .png, .pdf or .svg")
    if options.plot and not read_curves({run: Path(run) for run in options.runs}):
        raise ValueError(
            f"--plot {options.plot}: none of the runs has a metrics.jsonl with figures"
        )
    folders = [Path(run).resolve() for run in options.runs]
    if len(set(folders)) < len(folders):
        raise ValueError(f"{max(folders, key=folders.count)}: is named twice")
    for file in filter(None, (options.plot, options.out)):
        if Path(file).is_dir() or not Path(file).parent.is_dir():
            raise ValueError(f"{file}: is not the name of a file in a folder that exists")
    if options.out and Path(options.out).exists():
        raise ValueError(f"--out {options.out}: exists; choose another name")


def evaluate(run: Run, shots: dict[str, str], options) -> tuple[dict, dict]:
    """shots: file -> what stands before its prompts. Returns title -> columns of a table, and title
    -> the texts or the log-probs of choices of each item."""
    blocks, answers = {}, {}
    load = functools.cache(lambda dtype: load_checkpoint(run.folder, options.device, dtype))
    init = run.config["init"]
    reference = functools.cache(lambda: init and load_reference(run.config, options.device))
    for title, (path, rows) in run.asked.items():
        if isinstance(rows, Pairs):
            models = *load(torch.float32), reference()
            blocks |= pair_columns(*models, path, title, rows, options, run.config)
            continue
        model, tokenizer = load(options.dtype)
        before = shots[path]
        title += f", {options.k} shots" if before else ""
        if rows[0].choices:
            found = choice_columns(model, tokenizer, path, rows, before, options.dtype)
        else:
            found = answer_columns(model, tokenizer, path, rows, before, options)
            title += f", temperature {options.temperature:g}" if options.temperature else ", greedy"
        blocks[title], answers[title] = found
    if run.built_in:
        samples = options.n if options.n > 1 else SAMPLES
        values = task_values(*load(torch.float32), TEST_PROBLEMS, samples)
        columns = {name: Column(np.array(value)) for name, value in values.items()}
        blocks = {"problems": columns} | blocks
    return blocks, answers


def digest_file(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record(figures: dict, blocks: dict, answers: dict, argv: list[str], options) -> dict:
    """What is kept of a run: figures, the values that they were made of, and what made them."""
    files = filter(None, (*options.data, options.shots))
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    content = {
        "argv": argv,
        "options": vars(options) | {"dtype": str(options.dtype)},
        "sha256": {file: digest_file(file) for file in files},
        "versions": versions | {"numpy": np.__version__},
        "figures": {t: {c: f._asdict() for c, f in row.items()} for t, row in figures.items()},
        "items": {t: {c: x.values.tolist() for c, x in b.items()} for t, b in blocks.items()},
        "answers": answers,
    }
    return json.loads(json.dumps(content), parse_constant=lambda nan: None)  # JSON has no NaN


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Prints tables and returns their means: run, as it was named in argv -> column -> mean; with
    several files of data the columns are called FILE: column."""
    parser, options = parse_options(argv)
    runs = {Path(run).name: run for run in options.runs}
    runs = runs if len(runs) == len(options.runs) else {run: run for run in options.runs}
    try:
        check_options(options)
        files = {path: read_items(Path(path)) for path in options.data}
        shots = {path: examples(options.shots, options.k, items)
                 for path, items in files.items() if items}  # fmt: skip
        if options.shots and not any(shots.values()):
            raise ValueError(f"--shots {options.shots}: no --data has rows of its form")
        asked = {name: read_run(Path(run), files) for name, run in runs.items()}
        found = {name: evaluate(run, shots, options) for name, run in asked.items()}
        if options.plot:
            plot({name: Path(run) for name, run in runs.items()}, Path(options.plot))
    except (OSError, ValueError) as error:
        parser.error(error)
    tables = {}
    for title in dict.fromkeys(title for blocks, _ in found.values() for title in blocks):
        columns = {name: blocks[title] for name, (blocks, _) in found.items() if title in blocks}
        tables[title] = compared(columns)
        print(f"{title}\n\n{table(tables[title], markdown=not sys.stdout.isatty())}\n")
    argv, records = sys.argv[1:] if argv is None else argv, {}
    for name, run in runs.items():
        figures = {title: rows[name] for title, rows in tables.items() if name in rows}
        records[run] = record(figures, *found[name], argv, options)
        if not options.out and (Path(run) / "train_config.json").is_file():
            write_json(Path(run) / "eval.json", records[run])
    if options.out:
        write_json(Path(options.out), records)
    return {
        run: {f"{title.split(',')[0]}: {c}" if len(files) > 1 else c: figure["mean"]
              for title, row in one["figures"].items() for c, figure in row.items()}
        for run, one in records.items()
    }  # fmt: skip


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console without "±" is no reason to stop
    main()
