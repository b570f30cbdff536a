"""Sampling from a model: generation with a cache, prompts and answers as text, and stop texts."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

GENERATION_ROWS = 1000  # prompts in one call of `generate`, which share a seed
GENERATION_TOKENS = 2**16  # tokens of prompts and answers in the cache at a time


@torch.no_grad()
def generate(model, prompts: list[list[int]], max_new_tokens: int, temperature: float = 1.0,
             top_p: float = 1.0, stop_ids=(), seed: int = 0, *, rows: int | None = None,
             is_over: Callable[[int, list[int]], bool] | None = None,
             progress: Callable[[list[int]], None] | None = None) -> list[list[int]]:  # fmt: skip
    """Continues each prompt until a stop id or for `max_new_tokens`. Returns the new ids of each,
    with the stop id if one was produced. The same seed and prompts give the same answers.

    prompts: non-empty lists of ids. temperature 0 is greedy; top_p keeps the smallest set of tokens
    whose probability reaches it. rows: how many prompts are continued at a time (default: all).
    is_over(prompt number, ids so far), called every few tokens, also ends an answer. progress(ids)
    is called for each finished answer."""
    assert prompts and all(prompts), "every prompt needs at least one token"
    rows, device = rows or len(prompts), model.head_weight.device
    # One uniform draw per token and prompt, so an answer does not depend on the other rows.
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(max_new_tokens, len(prompts), generator=generator).to(device)
    stop = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    look_every = 8 if device.type == "cuda" or is_over else 1  # steps between two checks
    answers: dict[int, list[int]] = {}

    def collect(live: list[int], new: Tensor, is_last: bool) -> None:
        """Stores finished answers. `live` holds the prompt of each row of `new` (R, steps)."""
        # The place of the first stop id in each row, or the number of steps if there is none.
        ends = pad(torch.isin(new, stop).int(), (0, 1), value=1).argmax(dim=1)  # (R,)
        for row, (number, end) in enumerate(zip(live, ends.tolist())):
            ended = is_last or end < new.shape[1]
            if (ended or is_over) and number not in answers:
                answer = new[row, : end + 1].tolist()
                if ended or is_over(number, answer):
                    answers[number] = answer
                    if progress:
                        progress(answer)

    for start in range(0, len(prompts), rows):
        live = list(range(len(prompts)))[start : start + rows]  # the prompt of each row
        lengths = torch.tensor([len(prompts[i]) for i in live], device=device)  # (R,)
        hidden, cache = _read_prompts(model, [prompts[i] for i in live], max_new_tokens)
        new = torch.zeros(len(live), 0, dtype=torch.long, device=device)  # (R, steps)
        draws = uniform[:, live]  # (max_new_tokens, R)
        for step in range(max_new_tokens):
            logits = (hidden @ model.head_weight.T).float()  # (R, V)
            token = sample(logits, temperature, top_p, draws[step])  # (R,)
            new = torch.cat((new, token[:, None]), dim=1)
            is_last = step + 1 == max_new_tokens
            if step % look_every == 0 or is_last:
                collect(live, new, is_last)
                unfinished = [row for row, i in enumerate(live) if i not in answers]
                if not unfinished:
                    break
                if len(unfinished) <= len(live) // 2:  # drop the finished rows
                    live, new = [live[row] for row in unfinished], new[unfinished]
                    cache, lengths = cache[:, :, unfinished], lengths[unfinished]
                    draws = draws[:, unfinished]
            position = (lengths + step)[:, None]  # (R, 1)
            keys = torch.arange(max(len(prompts[i]) for i in live) + step + 1, device=device)
            mask = keys <= position  # (R, S)
            if model.config.sliding_window is not None:
                mask &= position - keys < model.config.sliding_window
            hidden = model(new[:, -1:], position, mask[:, None, None], cache)[:, 0]  # (R, D)
    return [answers[i] for i in range(len(prompts))]


def _read_prompts(model, prompts: list[list[int]], new_tokens: int) -> tuple[Tensor, Tensor]:
    """The hidden state of each prompt's last token (R, D), and a cache that holds the prompts and
    has room for `new_tokens`. A prompt that occurs several times is read once."""
    number: dict[tuple, int] = {}
    source = [number.setdefault(tuple(prompt), len(number)) for prompt in prompts]
    config, weight, T = model.config, model.head_weight, max(map(len, number))
    # Padding at the end is never attended to, and the answer overwrites it in the cache.
    padded = [[*prompt, *[0] * (T - len(prompt))] for prompt in number]
    shape = (config.num_hidden_layers, 2, len(number), config.num_key_value_heads)
    cache = weight.new_zeros(*shape, T + new_tokens, config.head_dim)
    hidden = model(torch.tensor(padded, device=weight.device), None, None, cache)
    hidden = torch.stack([row[len(ids) - 1] for row, ids in zip(hidden, number)])  # (unique, D)
    if len(number) < len(prompts):
        hidden, cache = hidden[source], cache[:, :, source]
    return hidden, cache


def sample(logits: Tensor, temperature: float, top_p: float, uniform: Tensor) -> Tensor:
    """Samples a token per row by inverting the cumulative distribution at `uniform` in [0, 1).
    logits (B, V) float32, uniform (B,) -> ids (B,). Temperature 0 takes the likeliest token."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities, order = (logits / temperature).softmax(dim=-1), None  # (B, V)
    if top_p < 1:
        probabilities, order = probabilities.sort(dim=-1, descending=True)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    # With a strict >, a token of probability 0 is never sampled, even if uniform is 0.
    above = cumulative > uniform[:, None] * cumulative[:, -1:]
    choice = above.to(torch.uint8).argmax(dim=-1, keepdim=True)  # (B, 1)
    return (choice if order is None else order.gather(1, choice))[:, 0]


def draw(
    model, prompts: list[list[int]], max_new_tokens, *, seed=0, rows=None, is_over=None, **kwargs
) -> list[list[int]]:
    """Continues lists of ids with `model.generate(**kwargs)` and returns the new ids of each.

    Sorts the prompts by length and splits them into parts of GENERATION_ROWS. The seed of a part is
    `seed` plus the number of prompts in earlier parts. rows: how many prompts of a part are
    generated at a time, as many as GENERATION_TOKENS allow if None. is_over(index of the prompt,
    ids so far) ends an answer. A long draw shows a progress bar."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, list[int]] = {}
    quick = len(prompts) <= GENERATION_ROWS and max_new_tokens <= 48  # needs no progress bar
    with tqdm(total=len(order), desc="answers", unit="answer", leave=None, disable=quick) as bar:
        kwargs["progress"] = lambda answer: bar.update()
        for start in range(0, len(order), GENERATION_ROWS):
            part = order[start : start + GENERATION_ROWS]
            texts, longest = [prompts[i] for i in part], len(prompts[part[-1]]) + max_new_tokens
            kwargs["rows"] = rows or max(1, GENERATION_TOKENS // longest)
            kwargs["is_over"] = is_over and (lambda n, ids, part=part: is_over(part[n], ids))
            generated = model.generate(texts, max_new_tokens, seed=seed + start, **kwargs)
            answers |= zip(part, generated)
    return [answers[i] for i in range(len(prompts))]


def sample_answers(
    model, tokenizer, prompts, *, samples=1, temperature=1.0, max_new_tokens=48, seed=0
) -> list[list[str]]:
    """Samples `samples` texts for each prompt; an answer cut off at max_new_tokens becomes ""."""
    ids = [tokenizer.prompt_ids(prompt) for prompt in prompts for _ in range(samples)]
    stop = tokenizer.stop_ids
    answers = draw(model, ids, max_new_tokens, stop_ids=stop, temperature=temperature, seed=seed)
    texts = [tokenizer.decode(a[:-1]) if a[-1] in stop else "" for a in answers]
    return [texts[i : i + samples] for i in range(0, len(texts), samples)]


def stop_texts(tokenizer, stops: list[tuple[str, ...]]) -> Callable | None:
    """The `is_over` of `draw` that ends answer i when it contains one of the texts stops[i], or
    None without stop texts. It decodes only the end of an answer, and all of it after a match."""
    looked_at = [0] * len(stops)  # length of each answer at the last call

    def is_over(i: int, answer: list[int]) -> bool:
        # A token holds at least a byte; 4 more bytes complete a character that is cut in two.
        span = max((len(stop.encode()) + 4 for stop in stops[i]), default=0)
        tail = tokenizer.decode(answer[max(0, looked_at[i] - span) :])
        looked_at[i] = len(answer)
        return any(stop in tail and stop in tokenizer.decode(answer) for stop in stops[i])

    return is_over if any(stops) else None
