"""Benchmarks: reads questions, grades answers to them, or compares the log-probs of choices."""

from itertools import islice
from typing import NamedTuple

import numpy as np

from support.figures import Column
from support.grading import GRADERS, grade_values
from support.rows import ANSWER_COLUMNS, data_rows, messages_of, text_of
from support.sampling import answer_text, sample_ids, stop_texts

FORMS = "write {question, answer}, {prompt, answer, grade}, {prompt, choices, gold} or pairs"


class Item(NamedTuple):
    """A question whose answer is graded, or a multiple-choice question."""

    line: int  # the line number in its file
    prompt: str | list[dict]  # text or messages
    key: str  # the right answer
    grade: str | None  # a key of GRADERS; None with choices
    stop: tuple[str, ...] = ()  # texts that end an answer
    choices: tuple[str, ...] = ()
    gold: int = 0  # the index of the right choice

    def ids(self, tokenizer) -> list[int]:
        if isinstance(self.prompt, list):
            return tokenizer.render(self.prompt, add_generation_prompt=True)
        return tokenizer.prompt_ids(self.prompt)

    def joined(self, text: str) -> str:
        """Returns an answer's text, with a space in front if it would touch the prompt."""
        bare = isinstance(self.prompt, list) or self.prompt[-1:].isspace() or text[:1].isspace()
        return text if bare else " " + text


def read_item(line: int, row: dict) -> Item:
    """Converts a row that holds a question to an item. Raises ValueError for other rows."""
    if row.keys() >= {"question", "answer"}:
        prompt = f"Question: {text_of(row, 'question')}\nAnswer:"
        row = {"prompt": prompt, "answer": row["answer"], "grade": "gsm8k", "stop": ["Question:"]}
    has_choices = row.keys() >= {"prompt", "choices", "gold"}
    if not has_choices and not row.keys() >= {"prompt", "answer", "grade"}:
        raise ValueError(f"the row's columns are {', '.join(row) or 'none':.200}; {FORMS}")
    if row.keys() & {"tools", "chat_template_kwargs"}:
        raise ValueError("only pairs may have tools; for questions use --chat_template_kwargs")
    read = messages_of if isinstance(row["prompt"], list) else text_of
    prompt = read(row, "prompt")
    if has_choices:
        choices, gold = _texts_of(row, "choices"), row["gold"]
        if len(choices) < 2 or not all(choice.strip() for choice in choices):
            raise ValueError("'choices' must be two or more texts that are not blank")
        if type(gold) is not int or gold not in range(len(choices)):
            raise ValueError(f"'gold' is {gold!r:.40}, but must be from 0 to {len(choices) - 1}")
        return Item(line, prompt, choices[gold], None, (), choices, gold)
    key, grade = text_of(row, "answer"), row["grade"]
    if not isinstance(grade, str) or grade not in GRADERS:
        raise ValueError(f"the grade {grade!r:.40} is unknown; choose from {', '.join(GRADERS)}")
    if not key.strip() or not (callable(GRADERS[grade]) or GRADERS[grade][0](key) is not None):
        raise ValueError(f"grade {grade} finds no result in {key!r:.40}; change answer or grade")
    return Item(line, prompt, key, grade, _texts_of(row, "stop"))


def _texts_of(row: dict, column: str) -> tuple[str, ...]:
    texts = row.get(column, [])
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{column!r} must be a list of texts that are not empty")
    "".join(texts).encode()  # a lone surrogate raises ValueError
    return tuple(texts)


def read_items(path, columns: str | None = None) -> list[Item] | None:
    """Returns the questions in a data file, or None for pairs. Raises ValueError for bad rows."""
    items = []
    for line, row in data_rows(path, columns):
        if not items and row.keys() & ANSWER_COLUMNS:
            return None
        try:
            items.append(read_item(line, row))
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from None
        if bool(items[-1].choices) != bool(items[0].choices):
            raise ValueError(f"{path}:{line}: put questions with and without choices in two files")
    if not items:
        raise ValueError(f"{path}: the file is empty; {FORMS}")
    return items


def prompt_ids(model, tokenizer, path, items: list[Item], lengths) -> list[list[int]]:
    """Returns the ids of each item's prompt. lengths: (items,) most answer tokens. Raises a
    ValueError that names file and line if prompt and answer exceed the model's context."""
    limit, ids = model.config.max_position_embeddings, []
    for item, length in zip(items, lengths):
        try:
            ids.append(item.ids(tokenizer))
            if (total := len(ids[-1]) + length) > limit:
                problem = f"prompt and answer may take {total} tokens, over the model's {limit}"
                raise ValueError(f"{problem}; lower --max_new_tokens")
        except ValueError as error:
            raise ValueError(f"{path}:{item.line}: {error}") from None
    return ids


def answer_columns(model, tokenizer, path, items: list[Item], options):
    """Generates options.n answers to each item and grades them. Returns a dict of columns, and the
    answers of each item. "cut" is the share of answers without an end token or stop text."""
    n, new = options.n, options.max_new_tokens
    prompts = prompt_ids(model, tokenizer, path, items, [new] * len(items))
    kwargs = {"temperature": options.temperature, "top_p": options.top_p, "seed": options.seed}
    kwargs |= {"rows": options.batch_size, "stop_ids": tokenizer.stop_ids}
    kwargs["is_done"] = stop_texts(tokenizer, [item.stop for item in items for _ in range(n)])
    answers = iter(sample_ids(model, [ids for ids in prompts for _ in range(n)], new, **kwargs))
    texts, values = [], []
    for item in items:
        found, cut = [], 0
        for answer in islice(answers, n):
            text, ended = answer_text(tokenizer, answer)
            stop = min((text.find(s) for s in item.stop if s in text), default=None)
            found.append(text[:stop])
            cut += not ended and stop is None
        texts.append(found)
        values.append(grade_values(item.grade, item.key, found) | {"cut": cut / n})
    return columns_of(values), texts


def choice_rows(model, tokenizer, path, items: list[Item]) -> list[list[list[int]]]:
    """Returns for each item the prompt's ids, then each choice's ids as they follow the prompt."""
    choices = [[tokenizer.continue_ids(item.joined(c)) for c in item.choices] for item in items]
    longest = [max(map(len, ids)) for ids in choices]
    prompts = prompt_ids(model, tokenizer, path, items, longest)
    return [[prompt, *ids] for prompt, ids in zip(prompts, choices)]


def choice_columns(items: list[Item], logps: list[np.ndarray]) -> dict[str, Column]:
    """Returns accuracies as in lm-evaluation-harness: acc takes the likeliest choice; acc_norm and
    acc_bytes divide each log-prob by the number of characters or bytes of the stripped choice."""
    values = []
    for item, scores in zip(items, logps):
        texts = [choice.strip() for choice in item.choices]
        sizes = {"acc": [1] * len(texts), "acc_norm": [len(text) for text in texts]}
        sizes["acc_bytes"] = [len(text.encode()) for text in texts]
        best = {name: np.argmax(scores / size) for name, size in sizes.items()}
        values.append({name: float(choice == item.gold) for name, choice in best.items()})
    return columns_of(values)


def columns_of(values: list[dict[str, float]]) -> dict[str, Column]:
    """Converts one dict per item to one column per key, with NaN for missing values."""
    names = dict.fromkeys(name for one in values for name in one)
    return {n: Column(np.array([one.get(n, np.nan) for one in values])) for n in names}
