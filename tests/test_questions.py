"""Evaluation rows become items, and prompts must fit the model."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from support.files import write_rows
from support.questions import Item, prompt_ids, read_item, read_items

QUESTIONS = [
    {"question": "1 + 1?", "answer": "It is <<1+1=2>>2\n#### 2"},
    {"question": "2 + 2?", "answer": "#### 4"},
    {"question": "3 + 3?", "answer": "#### 6"},
]
CHOICES = [
    {"prompt": "Which?", "choices": ["a", "bb bb", "ccc", "dé"], "gold": 1},
    {"prompt": "Count: ", "choices": ["one", " two"], "gold": 0},
]
MESSAGES = [{"role": "user", "content": "2+2?"}]
EXACT = {"prompt": "2+2?", "answer": "4", "grade": "exact", "stop": ["\n", "Q:"]}


@pytest.fixture
def file(tmp_path):
    """Writes rows to a file and returns its path."""

    def write(rows, name="rows.jsonl") -> Path:
        write_rows(tmp_path / name, rows)
        return tmp_path / name

    return write


def test_rows_become_items(file):
    """The keys of a row of GSM8K stand for a prompt, a grade and a stop text."""
    items = read_items(file([QUESTIONS[0], EXACT, EXACT | {"prompt": MESSAGES}]))
    key = QUESTIONS[0]["answer"]
    assert items == [
        Item(1, "Question: 1 + 1?\nAnswer:", key, "gsm8k", ("Question:",)),
        Item(2, "2+2?", "4", "exact", ("\n", "Q:")),
        Item(3, MESSAGES, "4", "exact", ("\n", "Q:")),
    ]
    assert read_items(file(CHOICES)) == [
        Item(1, "Which?", "bb bb", None, (), ("a", "bb bb", "ccc", "dé"), 1),
        Item(2, "Count: ", "one", None, (), ("one", " two"), 0),
    ]
    row = {"prompt": "2+2?", "answer": "4", "grade": "exact"}
    assert read_item(5, row) == Item(5, "2+2?", "4", "exact")


def test_a_file_of_pairs_has_no_items(file):
    for row in ({"prompt": "p", "chosen": "c", "rejected": "r"}, {"messages": MESSAGES}):
        assert read_items(file([row])) is None
    with pytest.raises(ValueError, match="rows.jsonl: the file is empty; write {question, ans"):
        read_items(file([]))


BAD = {
    "no form": ({"prompt": "a", "gold": 1}, "the row's columns are prompt, gold; write {que"),
    "prompt": (EXACT | {"prompt": 3}, "'prompt' must be a string, not int"),
    "messages": (EXACT | {"prompt": [{"role": "user"}]}, "'prompt' must hold {role, content}"),
    "question": ({"question": None, "answer": "1"}, "the row's columns are answer; write"),
    "surrogate": (EXACT | {"stop": ["\ud800"]}, "surrogates not allowed"),
    "grade": (EXACT | {"grade": "f1"}, "the grade 'f1' is unknown; choose from gsm8k, math"),
    "tools": (EXACT | {"tools": [{"name": "f"}]}, "only pairs may have tools"),
    "list": (EXACT | {"grade": ["math"]}, "the grade ['math'] is unknown"),
    "gold": (CHOICES[1] | {"gold": 2}, "'gold' is 2, but must be from 0 to 1"),
    "negative": (CHOICES[1] | {"gold": -1}, "'gold' is -1"),
    "bool": (CHOICES[1] | {"gold": True}, "'gold' is True"),
    "float": (CHOICES[1] | {"gold": 1.0}, "'gold' is 1.0"),
    "one choice": (CHOICES[1] | {"choices": ["b"], "gold": 0}, "must be two or more texts"),
    "blank choice": (CHOICES[1] | {"choices": ["b", " "]}, "texts that are not blank"),
    "choices": (CHOICES[1] | {"choices": "ab"}, "'choices' must be a list of texts"),
    "no number": ({"question": "a", "answer": "many"}, "no result in 'many'; change answer or"),
    "no letter": (EXACT | {"answer": "third", "grade": "letter"}, "grade letter finds no result"),
    "blank key": (EXACT | {"answer": " "}, "grade exact finds no result in ' '"),
    "key": (EXACT | {"answer": 4}, "'answer' must be a string, not int"),
    "stop": (EXACT | {"stop": "Q"}, "'stop' must be a list of texts that are not empty"),
    "empty stop": (EXACT | {"stop": [""]}, "'stop' must be a list of texts that are not empty"),
    "pair": ({"prompt": "p", "chosen": "c", "rejected": "r"}, "row's columns are prompt, chosen"),
    "mixed": (CHOICES[0], "put questions with and without choices in two files"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_by_file_and_line(name, file):
    row, fault = BAD[name]
    path = file([QUESTIONS[0], row])
    with pytest.raises(ValueError) as error:
        read_items(path)
    assert str(error.value).startswith(f"{path}:2: ") and fault in str(error.value)


def test_an_answer_is_joined_to_its_prompt_by_one_space():
    for prompt, text, joined in [
        ("Answer:", "4", " 4"),
        ("Answer:", " 4", " 4"),
        ("Answer: ", "4", "4"),
        ("Answer\n", "4", "4"),
        (MESSAGES, "4", "4"),
    ]:
        assert Item(1, prompt, "4", "exact").joined(text) == joined


class Letters:
    """A tokenizer with an id a character, and a chat template that is JSON."""

    def prompt_ids(self, text):
        return [256, *map(ord, text)]

    def render(self, messages, add_generation_prompt):
        if messages[0]["role"] == "tool":
            raise ValueError("the chat template refuses it")
        return [*map(ord, json.dumps([messages, add_generation_prompt]))]


def test_prompts_are_encoded_as_text_or_as_conversations():
    items = [Item(1, "p", "k", "exact"), Item(2, MESSAGES, "k", "exact")]
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=256))
    ids = prompt_ids(model, Letters(), "x.jsonl", items, [1, 2])
    assert ids[0] == [256, *b"p"]
    assert bytes(ids[1]).decode() == json.dumps([MESSAGES, True])


def test_a_prompt_that_the_model_cannot_read_is_named_by_file_and_line():
    items = [Item(3, "abc", "k", "exact"), Item(7, "abcd", "k", "exact")]
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=9))
    assert len(prompt_ids(model, Letters(), "x.jsonl", items, [5, 4])) == 2
    with pytest.raises(ValueError, match="x.jsonl:7: prompt and answer may take 10 tokens, over"):
        prompt_ids(model, Letters(), "x.jsonl", items, [5, 5])
    with pytest.raises(ValueError, match="x.jsonl:3: prompt and answer may take 10 tokens"):
        prompt_ids(model, Letters(), "x.jsonl", items, [6, 4])
    tool = Item(4, [{"role": "tool", "content": "x"}], "k", "exact")
    with pytest.raises(ValueError, match="x.jsonl:4: the chat template refuses it"):
        prompt_ids(model, Letters(), "x.jsonl", [tool], [1])
