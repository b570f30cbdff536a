"""Answers sampled from a model: many prompts, texts in place of ids, and stop texts."""

import time
from collections.abc import Callable

from tqdm import tqdm

GENERATION_ROWS = 1000  # prompts in one call of `generate`, which share a seed
GENERATION_TOKENS = 2**16  # tokens of prompts and answers in the cache at a time


def draw(
    model,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    seed: int = 0,
    rows: int | None = None,
    is_over: Callable[[int, list[int]], bool] | None = None,
    **how,
) -> list[list[int]]:
    """Continues lists of ids by `model.generate(**how)` and returns the new ids of each.

    Sorts the prompts by length and splits them into parts of GENERATION_ROWS. The seed of a part is
    `seed` plus its first position. rows: how many prompts of a part are generated at a time, as
    many as GENERATION_TOKENS allow if None. is_over(number of the prompt, ids so far) ends an
    answer. A long draw shows a progress bar with tokens per second.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    started, tokens = time.perf_counter(), 0
    quick = len(prompts) <= GENERATION_ROWS and max_new_tokens <= 48  # needs no progress bar
    with tqdm(total=len(order), desc="answers", unit="answer", leave=None, disable=quick) as bar:

        def progress(answer):
            nonlocal tokens
            tokens += len(answer)
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - started):.0f} tokens/s", False)
            bar.update()

        for start in range(0, len(order), GENERATION_ROWS):
            part = order[start : start + GENERATION_ROWS]
            longest = max(len(prompts[i]) for i in part) + max_new_tokens
            generated = model.generate(
                [prompts[i] for i in part],
                max_new_tokens,
                seed=seed + start,
                rows=rows or max(1, GENERATION_TOKENS // longest),
                is_over=is_over and (lambda n, ids, part=part: is_over(part[n], ids)),
                progress=progress,
                **how,
            )
            for i, answer in zip(part, generated):
                answers[i] = answer
    return answers


def sample_answers(
    model, tokenizer, prompts, *, samples=1, temperature=1.0, max_new_tokens=48, seed=0
) -> list[list[str]]:
    """Samples answers to texts: for each prompt `samples` texts, "" for an answer that does not end
    within `max_new_tokens`. Temperature 0 is greedy."""
    ids = [tokenizer.prompt_ids(prompt) for prompt in prompts for _ in range(samples)]
    stop = tokenizer.stop_ids
    answers = draw(model, ids, max_new_tokens, stop_ids=stop, temperature=temperature, seed=seed)
    texts = [tokenizer.decode(a[:-1]) if a[-1] in stop else "" for a in answers]
    return [texts[i : i + samples] for i in range(0, len(texts), samples)]


def stop_texts(tokenizer, stops: list[tuple[str, ...]]) -> Callable | None:
    """The `is_over` of `draw` that ends answer i when it contains one of the texts stops[i], or
    None if there are no stop texts. It decodes the new tokens and as many before them as a stop
    text can span, and the whole answer only to confirm a match."""
    looked_at = [0] * len(stops)  # tokens of each answer at the last call

    def is_over(i: int, answer: list[int]) -> bool:
        # A token holds a byte at least; 4 more bytes complete a character that is cut in two.
        span = max((len(stop.encode()) + 4 for stop in stops[i]), default=0)
        tail = tokenizer.decode(answer[max(0, looked_at[i] - span) :])
        looked_at[i] = len(answer)
        return any(stop in tail and stop in tokenizer.decode(answer) for stop in stops[i])

    return is_over if any(stops) else None
