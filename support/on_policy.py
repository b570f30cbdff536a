"""Samples answers from the policy at each step. Imports mio.py, data.py and eval.py."""

import copy
import functools

import numpy as np
import torch
from tqdm import tqdm

from data import Pair, Pairs, StepData
from eval import pair_logps
from mio import find_loss
from support.grading import grade_answer
from support.lora import merge_lora
from support.questions import Item, prompt_ids, read_items
from support.sampling import sample_ids


def is_rlhf(options) -> bool:
    return find_loss(options.loss).answers == "drawn"


def is_on_policy(options) -> bool:
    """Tells whether the policy generates the answers, so that --data holds questions, not pairs."""
    return options.on_policy or is_rlhf(options)


def prompts_per_step(options) -> int:
    """Returns how many rows of --data a step uses. For rlhf, a step has 2 * batch_size answers."""
    return 2 * options.batch_size // options.samples if is_rlhf(options) else options.batch_size


def check_draws(options) -> None:
    """Raises ValueError if --on_policy or --samples does not fit --loss or --batch_size."""
    if options.on_policy and (find_loss(options.loss).shared_of_mismatched or is_rlhf(options)):
        raise ValueError(f"--on_policy: not supported by --loss {options.loss}; leave the flag out")
    k, answers = options.samples, 2 * options.batch_size
    if is_rlhf(options) and (k % 2 or answers % k):
        raise ValueError(f"--samples {k}: must be even and divide {answers}, twice --batch_size")


def load_questions(options, model, tokenizer) -> list[Item]:
    """Returns the questions in --data. Raises ValueError for other rows and overlong prompts."""
    items = read_items(options.data, options.columns)
    if items is None or items[0].choices:
        raise ValueError(f"{options.data}: rows must be questions with prompt, answer and grade")
    prompt_ids(model, tokenizer, options.data, items, [options.max_new_tokens] * len(items))
    return items


say_once = functools.cache(tqdm.write)


def draw_pairs(job, step: int, rows: list[int]) -> StepData:
    """Samples and grades --samples answers to each question job.questions[i], i in `rows`. The
    result depends only on the weights, the seed, the step and the rows.

    For rlhf, all answers form pairs. With --on_policy, the first answer with the best grade and the
    first with the worst form a pair, if the grades differ. The metrics are the mean grade, the
    share of answers without an end, the number of sampled tokens and, for rlhf, the KL in nats. An
    answer's return is grade - beta log(pi / ref); the advantage is the return minus the mean return
    of the prompt's other answers (RLOO, arXiv 2402.14740)."""
    options, model, tokenizer, k = job.options, job.model, job.tokenizer, job.options.samples
    dtype, pairs = getattr(torch, options.dtype), Pairs()
    items = [job.questions[i] for i in rows for _ in range(k)]  # one for each answer
    prompts = [item.ids(tokenizer) for item in items]
    policy = merge_lora(copy.deepcopy(model), dtype) if options.lora_rank else model
    seed = int(np.random.default_rng([options.seed, step]).integers(2**62))
    kwargs = {"stop_ids": tokenizer.stop_ids, "seed": seed}
    answers = sample_ids(policy, prompts, options.max_new_tokens, **kwargs)
    grades = [grade_answer(item, tokenizer, answer) for item, answer in zip(items, answers)]
    cut = sum(answer[-1] not in tokenizer.stop_ids for answer in answers) / len(answers)
    metrics = {"reward": sum(grades) / len(grades), "cut": cut, "num_drawn": sum(map(len, answers))}
    if not any(len(set(grades[i : i + k])) > 1 for i in range(0, len(grades), k)):
        say_once("  in this step the answers to each prompt have equal rewards, which give no "
                 "gradient; metrics.jsonl shows the reward and the share cut off")  # fmt: skip
    for start in range(0, len(answers), k):
        drawn = range(start, start + k)  # the answers to one prompt
        first, second = drawn[0::2], drawn[1::2]
        if options.on_policy:
            best, worst = (choice(drawn, key=grades.__getitem__) for choice in (max, min))
            first, second = ([best], [worst]) if grades[best] > grades[worst] else ([], [])
        for i, j in zip(first, second):
            pairs.append(Pair(prompts[i], answers[i], answers[j]), items[i].line)
    layout = options.row_tokens, options.micro_tokens, dtype
    data = StepData([], pair_logps(job.reference, pairs, *layout), pairs=pairs, metrics=metrics)
    if options.on_policy:
        return data
    logratios = (pair_logps(model, pairs, *layout) - data.ref_logps).view(-1, k)  # (prompts, k)
    metrics["kl"] = logratios.double().mean().item()
    returns = torch.tensor(grades).view(-1, k) - options.beta * logratios  # (prompts, k)
    advantages = (returns - returns.mean(dim=1, keepdim=True)) * k / (k - 1)
    return data._replace(advantages=advantages.view(-1, 2))
