"""Benchmarks: a model's answers generated and graded, and its choices scored by log-prob."""

import numpy as np

from support.figures import Column
from support.grading import grade_values
from support.questions import Item, prompt_ids
from support.sampling import draw, stop_texts


def answer_columns(model, tokenizer, path, items: list[Item], before: str, options):
    """Generates options.n answers to each item and grades them.

    Returns columns of figures, and the texts of each item's answers. The column "cut" is the share
    of answers that neither ended nor reached a stop text; they are graded as they are."""
    n, new = options.n, options.max_new_tokens
    prompts = prompt_ids(model, tokenizer, path, items, before, [new] * len(items))
    how = {"temperature": options.temperature, "top_p": options.top_p, "seed": options.seed}
    how |= {"rows": options.batch_size, "stop_ids": tokenizer.stop_ids}
    how["is_over"] = stop_texts(tokenizer, [item.stop for item in items for _ in range(n)])
    answers = draw(model, [prompt for prompt in prompts for _ in range(n)], new, **how)
    texts, values = [], []
    for number, item in enumerate(items):
        found, cut = [], 0
        for answer in answers[number * n : (number + 1) * n]:
            ended = answer[-1] in tokenizer.stop_ids
            text = tokenizer.decode(answer[:-1] if ended else answer)
            stop = min((text.find(s) for s in item.stop if s in text), default=None)
            found.append(text[:stop])
            cut += not ended and stop is None
        texts.append(found)
        values.append(grade_values(item.grade, item.key, found) | {"cut": cut / n})
    return columns_of(values), texts


def choice_rows(model, tokenizer, path, items: list[Item], before: str) -> list[list[list[int]]]:
    """The ids of each item's prompt and of its choices, which go on from the prompt's text."""
    choices = [[tokenizer.continue_ids(item.joined(c)) for c in item.choices] for item in items]
    longest = [max(map(len, ids)) for ids in choices]
    prompts = prompt_ids(model, tokenizer, path, items, before, longest)
    return [[prompt, *ids] for prompt, ids in zip(prompts, choices)]


def choice_columns(items: list[Item], logps: list[np.ndarray]) -> dict[str, Column]:
    """Accuracies from the summed log-prob of each choice, as lm-evaluation-harness defines them:
    by log-prob, by log-prob over characters and over bytes, without the joining space."""
    values = []
    for item, scores in zip(items, logps):
        texts = [choice.strip() for choice in item.choices]
        sizes = {
            "acc": np.ones(len(texts)),
            "acc_norm": np.array([len(text) for text in texts]),
            "acc_bytes": np.array([len(text.encode()) for text in texts]),
        }
        best = {name: np.argmax(scores / size) for name, size in sizes.items()}
        values.append({name: float(choice == item.gold) for name, choice in best.items()})
    return columns_of(values)


def columns_of(values: list[dict[str, float]]) -> dict[str, Column]:
    """One dict of values an item -> one column a name; NaN where an item has no such value."""
    names = dict.fromkeys(name for one in values for name in one)
    return {n: Column(np.array([one.get(n, np.nan) for one in values])) for n in names}
