"""Samples answers from a model with a key-value cache, and returns them as ids or as text."""

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from support.bfloat16 import in_product_precision

ANSWER_TOKENS = 48  # most tokens of an answer to the built-in task, whose solutions have at most 35
GENERATION_ROWS = 1000  # most prompts in one call of `generate`, which share a seed
GENERATION_TOKENS = 2**16  # most tokens of prompts and answers in the cache at a time


@torch.no_grad()
def generate(model, prompts: list[list[int]], max_new_tokens: int, temperature: float = 1.0,
             top_p: float = 1.0, stop_ids=(), seed: int = 0, *, rows: int | None = None,
             is_done: Callable[[int, list[int]], bool] | None = None,
             progress: Callable[[list[int]], None] | None = None) -> list[list[int]]:  # fmt: skip
    """Continues each prompt up to a stop id or by `max_new_tokens` ids. Returns the new ids of each
    prompt, with the stop id if there is one. The same seed and prompts give the same answers.

    prompts: non-empty lists of ids. Temperature 0 is greedy. top_p keeps the smallest set of tokens
    whose total probability reaches top_p. rows: number of prompts to continue at once (default: as
    many as GENERATION_TOKENS allows). is_done(prompt index, new ids), called every 8 tokens, ends
    an answer by returning True. progress(ids) is called with each finished answer."""
    assert prompts and all(prompts), "every prompt needs at least one token"
    device, window = model.head_weight.device, model.config.sliding_window or torch.inf
    rows = rows or max(1, GENERATION_TOKENS // (max(map(len, prompts)) + max_new_tokens))
    # One uniform draw per token and prompt, so an answer does not depend on the other rows.
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(max_new_tokens, len(prompts), generator=generator).to(device)
    stop = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    check_every = 8 if device.type == "cuda" or is_done else 1  # steps between two checks
    answers: dict[int, list[int]] = {}
    for start in range(0, len(prompts), rows):
        active = list(range(len(prompts)))[start : start + rows]  # the prompt of each row
        lengths = torch.tensor([len(prompts[i]) for i in active], device=device)  # (R,)
        hidden, cache = _read_prompts(model, [prompts[i] for i in active], max_new_tokens)
        new = torch.zeros(len(active), 0, dtype=torch.long, device=device)  # (R, steps)
        draws = uniform[:, active]  # (max_new_tokens, R)
        for step in range(max_new_tokens):
            head = in_product_precision(model.head_weight, hidden)  # (V, D)
            logits = (hidden @ head.T).float()  # (R, V)
            token = sample(logits, temperature, top_p, draws[step])  # (R,)
            new = torch.cat((new, token[:, None]), dim=1)
            is_last = step + 1 == max_new_tokens
            if step % check_every == 0 or is_last:
                ended = torch.isin(new, stop).any(dim=1).nonzero()[:, 0].tolist()  # rows
                for row in range(len(active)) if is_last or is_done else ended:
                    if (i := active[row]) in answers:
                        continue
                    ids = new[row].tolist()
                    size = next((n for n, id in enumerate(ids, 1) if id in stop_ids), None)
                    if is_last or size or is_done(i, ids):
                        answers[i] = ids[:size]
                        if progress:
                            progress(answers[i])
                left = [row for row, i in enumerate(active) if i not in answers]  # unfinished rows
                if not left:
                    break
                if len(left) <= len(active) // 2:  # drop the finished rows
                    active, draws = [active[row] for row in left], draws[:, left]
                    cache, new, lengths = cache[:, :, left], new[left], lengths[left]
            position = (lengths + step)[:, None]  # (R, 1)
            keys = torch.arange(max(len(prompts[i]) for i in active) + step + 1, device=device)
            mask = (keys <= position) & (position - keys < window)  # (R, S)
            hidden = model(new[:, -1:], position, mask[:, None, None], cache)[:, 0]  # (R, D)
    return [answers[i] for i in range(len(prompts))]


def _read_prompts(model, prompts: list[list[int]], new_tokens: int) -> tuple[Tensor, Tensor]:
    """Returns the hidden state of each prompt's last token (R, D), and a cache that holds the
    prompts, with room for `new_tokens` more tokens. A repeated prompt is read only once."""
    number: dict[tuple, int] = {}
    source = [number.setdefault(tuple(prompt), len(number)) for prompt in prompts]
    config, weight, T = model.config, model.head_weight, max(map(len, number))
    # Padding at the end is never attended to, and the answer overwrites it in the cache.
    padded = [[*prompt, *[0] * (T - len(prompt))] for prompt in number]
    shape = (config.num_hidden_layers, 2, len(number), config.num_key_value_heads)
    dtype = torch.promote_types(weight.dtype, torch.float32) if model.float32 else weight.dtype
    cache = weight.new_zeros(*shape, T + new_tokens, config.head_dim, dtype=dtype)
    hidden = model(torch.tensor(padded, device=weight.device), None, None, cache)
    if len(number) < len(prompts):
        cache = cache[:, :, source]
    return hidden[source, [len(prompt) - 1 for prompt in prompts]], cache


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


def sample_ids(model, prompts, max_new_tokens, *, seed=0, is_done=None, **kwargs) -> list:
    """Returns the answers of model.generate, which has the same arguments. Each call of generate
    gets at most GENERATION_ROWS prompts, sorted by length; its seed is `seed` plus the number of
    prompts in earlier calls. Shows a progress bar unless the answers are few and short."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, list[int]] = {}
    quick = len(prompts) <= GENERATION_ROWS and max_new_tokens <= ANSWER_TOKENS
    bar = {"desc": "answers", "unit": "answer", "leave": False, "disable": quick or None}
    with tqdm(total=len(order), **bar) as progress:
        kwargs["progress"] = lambda answer: progress.update()
        for start in range(0, len(order), GENERATION_ROWS):
            part = order[start : start + GENERATION_ROWS]
            ids = [prompts[i] for i in part]
            kwargs["is_done"] = is_done and (lambda n, ids, part=part: is_done(part[n], ids))
            answers |= zip(part, model.generate(ids, max_new_tokens, seed=seed + start, **kwargs))
    return [answers[i] for i in range(len(prompts))]


def sample_answers(model, tokenizer, prompts: list, *, samples=1, temperature=1.0, seed=0) -> list:
    """Samples a list of texts for each prompt, with "" for an answer without an end."""
    ids = [tokenizer.prompt_ids(prompt) for prompt in prompts for _ in range(samples)]
    kwargs = {"stop_ids": tokenizer.stop_ids, "temperature": temperature, "seed": seed}
    answers = sample_ids(model, ids, ANSWER_TOKENS, **kwargs)
    found = (answer_text(tokenizer, answer) for answer in answers)
    texts = [text if ended else "" for text, ended in found]
    return [texts[i : i + samples] for i in range(0, len(texts), samples)]


def answer_text(tokenizer, answer: list[int]) -> tuple[str, bool]:
    """Returns the text of an answer without its stop token, and whether it has a stop token."""
    ended = answer[-1] in tokenizer.stop_ids
    return tokenizer.decode(answer[:-1] if ended else answer), ended


def stop_texts(tokenizer, stops: list[tuple[str, ...]]) -> Callable | None:
    """Returns None if there are no stop texts, otherwise a function `is_done` for `sample_ids` that
    ends answer i once it contains one of the texts in stops[i]."""
    if not any(stops):
        return None
    return lambda i, answer: any(stop in tokenizer.decode(answer) for stop in stops[i])
