"""Rows of every form become examples; rows that cannot be used are named with their reason."""

import gzip
import json

import pytest
from conftest import SHARED, chat_tokenizer, needs_shared, write_rows

from data import load_pairs, read_pairs
from support.rows import Example, Report, UnusableError, data_rows, read_row
from support.tokenizers import byte_tokenizer, load_tokenizer


def messages(*texts: str) -> list[dict]:
    """["u:hello", "a:yes"] as messages."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[text[0]], "content": text[2:]} for text in texts]


Q, YES, NO = "u:hello", "a:yes", "a:no"
HH = "\n\nHuman: hello\n\nAssistant: what?\n\nHuman: that\n\nAssistant:"
LONGER = messages(Q, YES, "u:more", "a:later")
PREFERENCE = "prompt, chosen, rejected"
# name -> row, its example with messages written as above
FORMS = {
    "strings": (
        {"prompt": "p ", "chosen": "c", "rejected": "r"},
        Example(PREFERENCE, "p ", "c", "r"),
    ),
    "prompt and answers as lists": (
        {"prompt": messages("s:be", Q), "chosen": messages(YES), "rejected": messages(NO)},
        Example("prompt and messages", ["s:be", Q], YES, NO),
    ),
    "prompt as a string, answers as lists": (
        {"prompt": "hello", "chosen": messages(YES), "rejected": messages(NO)},
        Example("prompt and messages", [Q], YES, NO),
    ),
    "complete conversations": (
        {"chosen": messages(Q, YES), "rejected": messages(Q, NO)},
        Example("conversations", [Q], YES, NO),
    ),
    "UltraFeedback repeats the prompt": (
        {"prompt": "hello", "chosen": messages(Q, YES), "rejected": messages(Q, NO)},
        Example("conversations", [Q], YES, NO),
    ),
    "conversations that part early": (
        {"chosen": LONGER, "rejected": messages(Q, NO, "u:oh", "a:later")},
        Example("conversations", [Q], YES, NO),
    ),
    "conversations that part late": (
        {"chosen": LONGER, "rejected": [*LONGER[:3], *messages("a:laten")]},
        Example("conversations", [Q, YES, "u:more"], "a:later", "a:laten"),
    ),
    "transcripts": (
        {"chosen": HH + " The sky", "rejected": HH + " The sky is"},
        Example("transcripts", HH, " The sky", " The sky is", continues=True),
    ),
    "good completion": (
        {"prompt": "p", "completion": "c", "label": True},
        Example("unpaired", "p", "c", None),
    ),
    "bad completion": (
        {"prompt": "p", "completion": "c", "label": False},
        Example("unpaired", "p", None, "c"),
    ),
    "bad completion as a list": (
        {"prompt": messages(Q), "completion": messages(NO), "label": False},
        Example("unpaired", [Q], None, NO),
    ),
    "bad messages": (
        {"messages": messages(Q, NO), "label": False},
        Example("unpaired messages", [Q], None, NO),
    ),
    "supervised": (
        {"prompt": "p", "completion": "c", "messages": 1},
        Example("supervised", "p", "c", None),
    ),
    "supervised as a list": (
        {"prompt": messages(Q), "completion": messages(YES)},
        Example("supervised", [Q], YES, None),
    ),
    "messages": (
        {"messages": messages("s:be", Q, YES)},
        Example("supervised messages", ["s:be", Q], YES, None),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_row_becomes_an_example(name):
    row, expected = FORMS[name]
    if isinstance(expected.prompt, list):
        answers = [answer and messages(answer)[0] for answer in expected[2:4]]
        expected = expected._replace(
            prompt=messages(*expected.prompt), chosen=answers[0], rejected=answers[1]
        )
    assert read_row(row) == expected


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The byte tokenizer with a chat template whose output is easy to read."""
    template = (
        "{% for m in messages %}"
        "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "{{ m.role[0] }}:{{ m.content }}"
        "{% if m.role == 'assistant' %}<|end|>{% endif %}|{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"), template)


def test_examples_are_encoded_in_plain_and_in_compressed_files(tokenizer, tmp_path):
    """The prompt begins with the BOS token 256 unless a template writes it; an answer ends with the
    end token 257."""
    plain, compressed = tmp_path / "x.jsonl", tmp_path / "x.jsonl.gz"
    write_rows(plain, [row for row, _ in FORMS.values()])
    compressed.write_bytes(gzip.compress(plain.read_bytes()))
    pairs = load_pairs(plain, tokenizer)
    assert list(pairs) == list(load_pairs(compressed, tokenizer))
    assert list(pairs.lines) == list(range(1, len(FORMS) + 1))
    for pair, (_, expected) in zip(pairs, FORMS.values()):
        prompt, answers = expected.prompt, expected[2:4]
        if isinstance(prompt, list):
            turns = [f"{turn}\x01|" if turn[0] == "a" else f"{turn}|" for turn in prompt]
            prompt = [257 if byte == 1 else byte for byte in "".join([*turns, "a:"]).encode()]
            answers = [answer and answer[2:] for answer in answers]
        else:
            prompt = [256, *prompt.encode()]
        assert pair.prompt == prompt
        assert list(pair[1:]) == [[] if text is None else [*text.encode(), 257] for text in answers]


def call(city: str, **more) -> dict:
    function = {"name": "weather", "arguments": {"city": city}}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]} | more


ASK = messages("u:hello")[0]
SHAREGPT = [{"from": "system", "value": "be"}, {"from": "human", "value": "hello"}]
PARTS = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
# name -> row as in a file, the row in the forms above
OTHER_FORMS = {
    "question": (
        {"question": "p ", "chosen": "c", "rejected": "r"},
        {"prompt": "p ", "chosen": "c", "rejected": "r"},
    ),
    "instruction": (
        {"instruction": "p", "input": "", "chosen": "c", "rejected": "r"},
        {"prompt": "p", "chosen": "c", "rejected": "r"},
    ),
    "instruction and input": (
        {"instruction": "p", "input": "x", "chosen": messages(YES), "rejected": messages(NO)},
        {"prompt": messages("u:p\nx"), "chosen": messages(YES), "rejected": messages(NO)},
    ),
    "a prompt beside other columns": (
        {"prompt": "p", "question": "q", "conversations": [], "chosen": "c", "rejected": "r"},
        {"prompt": "p", "chosen": "c", "rejected": "r"},
    ),
    "ShareGPT": (
        {"conversations": [*SHAREGPT, {"from": "gpt", "value": "yes"}]},
        {"messages": messages("s:be", Q, YES)},
    ),
    "ShareGPT and a label": (
        {"conversations": [*SHAREGPT, {"from": "gpt", "value": "yes"}], "label": False},
        {"messages": messages("s:be", Q, YES), "label": False},
    ),
    "ShareGPT pairs of single messages": (
        {"conversations": SHAREGPT, "chosen": {"from": "gpt", "value": "yes"},
         "rejected": {"from": "gpt", "value": "no"}},
        {"prompt": messages("s:be", Q), "chosen": messages(YES), "rejected": messages(NO)},
    ),
    "answers as strings after messages": (
        {"prompt": messages("s:be", Q), "chosen": "yes", "rejected": "no"},
        {"prompt": messages("s:be", Q), "chosen": messages(YES), "rejected": messages(NO)},
    ),
    "contents in parts": (
        {"messages": [ASK | {"content": PARTS}, messages(YES)[0] | {"name": None}]},
        {"messages": messages(Q, YES)},
    ),
    "an empty list of tool calls": (
        {"messages": [ASK, messages(YES)[0] | {"tool_calls": []}]},
        {"messages": messages(Q, YES)},
    ),
    "a tool call without content": (
        {"messages": [ASK, call("Rome")]},
        {"messages": [ASK, call("Rome", content="")]},
    ),
    "another name of the reasoning": (
        {"messages": [ASK, messages(YES)[0] | {"reasoning": "so"}]},
        {"messages": [ASK, messages(YES)[0] | {"reasoning": "so", "reasoning_content": "so"}]},
    ),
    "columns of null": (
        {"messages": None, "label": None, "prompt": "p", "chosen": "c", "rejected": "r"},
        {"prompt": "p", "chosen": "c", "rejected": "r"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_other_names_and_forms_give_the_same_example(name, tmp_path):
    file = write_rows(tmp_path / "x.jsonl", list(OTHER_FORMS[name]))
    first, second = (read_row(row) for _, row in data_rows(file))
    assert first == second


def test_columns_renames_columns_of_pairs(tokenizer, tmp_path):
    row = {"ask": "p", "good": "c", "bad": "r", "chosen": 0}
    file = write_rows(tmp_path / "x.jsonl", [row, row | {"good": "r"}])
    pairs, report = read_pairs(file, tokenizer, 60, "prompt=ask,chosen=good,rejected=bad")
    assert list(pairs) == [([256, ord("p")], [ord("c"), 257], [ord("r"), 257])]
    assert report.unused == {} and report.dropped == {"chosen and rejected are identical": [2]}
    file = write_rows(file, [FORMS["strings"][0]])  # a map may also swap columns
    (pair,) = load_pairs(file, tokenizer, columns="chosen=rejected,rejected=chosen")
    assert pair[1:] == ([ord("r"), 257], [ord("c"), 257])


@pytest.mark.parametrize(
    "columns, message",
    [
        ("prompt=ask", "x.jsonl:1: --columns prompt=ask: no column 'ask' among prompt, chosen, re"),
        ("answer=chosen", "--columns answer=chosen: write NAME=COLUMN, each NAME once, of chat_te"),
        ("chosen", "--columns chosen: "),
        ("chosen=rejected,chosen=prompt", "each NAME once"),
        ("chosen=rejected,", "write NAME=COLUMN"),
    ],
)
def test_a_wrong_map_of_columns_is_refused(columns, message, tokenizer, tmp_path):
    file = write_rows(tmp_path / "x.jsonl", [FORMS["strings"][0]])
    with pytest.raises(ValueError) as error:
        load_pairs(file, tokenizer, columns=columns)
    assert message in str(error.value) and not isinstance(error.value, UnusableError)


def test_conversations_part_where_tool_calls_or_reasoning_differ():
    """Equal contents do not make equal messages: a call of another tool is another answer, and the
    messages that follow it belong to it."""
    result = {"role": "tool", "content": "rain"}
    chosen = [ASK, call("Rome"), result, *messages(YES)]
    rejected = [ASK, call("Oslo"), result, *messages(NO)]
    example = read_row({"chosen": chosen, "rejected": rejected})
    assert example.prompt == [ASK]
    answers = [message["tool_calls"] for message in (chosen[1], rejected[1])]
    assert [answer["tool_calls"] for answer in example[2:4]] == answers
    example = read_row({"chosen": chosen, "rejected": [*chosen[:3], *messages(NO)]})
    assert len(example.prompt) == 3 and example.rejected == messages(NO)[0]
    thoughts = [messages(YES)[0] | {"reasoning_content": text} for text in ("a", "b")]
    example = read_row({"prompt": "hello", "chosen": thoughts[:1], "rejected": thoughts[1:]})
    assert list(example[2:4]) == thoughts


def test_more_keys_of_messages_do_not_part_conversations():
    chosen, rejected = ([m | {"id": side} for m in messages(Q, side)] for side in (YES, NO))
    example = read_row({"chosen": chosen, "rejected": rejected})
    assert example == Example("conversations", chosen[:1], chosen[1], rejected[1])
    with pytest.raises(UnusableError, match="do not diverge"):
        read_row({"chosen": chosen, "rejected": [m | {"id": NO} for m in chosen]})


ASK_IMAGE = {"role": "user", "content": [{"type": "text", "text": "what?"}, {"type": "image"}]}
UNUSABLE = {
    "the chosen answer is empty": {"prompt": "p", "chosen": " \n", "rejected": "r"},
    "the rejected answer is empty": {"chosen": messages(Q, YES), "rejected": messages(Q, "a: ")},
    "chosen and rejected are identical": {"prompt": "p", "chosen": "c", "rejected": "c"},
    "conversations do not diverge at an assistant's turn after a prompt": {
        "chosen": messages(Q, YES),
        "rejected": messages(Q),
    },
    "the conversation does not end in an assistant's turn after a prompt": {
        "messages": messages(Q, YES, "u:bye")
    },
    "the transcript does not end in an assistant's turn": {
        "chosen": HH + "a\n\nHuman: b",
        "rejected": HH + "c",
    },
    "a message has a part of type image, not only text": {"messages": [ASK_IMAGE, *messages(YES)]},
    "a message is from 'function_call', not from human, gpt, user, assistant, system, tool": {
        "conversations": [{"from": "function_call", "value": "f()"}]
    },
    "enable_thinking needs a prompt of messages, but the prompt is a text": {
        "prompt": "p",
        "chosen": "c",
        "rejected": "r",
        "chat_template_kwargs": {"enable_thinking": False},
    },
    "the transcripts differ before their last answer": {
        "chosen": HH + " a",
        "rejected": "\n\nHuman: x" + HH + "b",
    },
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_an_unusable_row_is_named_with_its_reason(reason, tmp_path):
    with pytest.raises(UnusableError) as error:
        read_row(next(data_rows(write_rows(tmp_path / "x.jsonl", [UNUSABLE[reason]])))[1])
    assert str(error.value) == reason


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"chosen": HH + "a", "rejected": HH + "a"}, "identical"),
        ({"messages": messages(Q, "a: ")}, "the chosen answer is empty"),
        ({"prompt": "p", "completion": "\t", "label": False}, "the rejected answer is empty"),
        ({"chosen": messages(Q, YES), "rejected": messages(Q, YES)}, "do not diverge"),
        ({"messages": messages(YES)}, "after a prompt"),
        ({"chosen": messages(YES), "rejected": messages(NO)}, "after a prompt"),
        ({"chosen": messages(Q, "u:a"), "rejected": messages(Q, "u:b")}, "do not diverge"),
    ],
)
def test_other_rows_are_unusable_for_the_same_reasons(row, reason):
    with pytest.raises(UnusableError, match=reason):
        read_row(row)


def test_unusable_rows_are_dropped_and_counted_by_line(tokenizer, tmp_path, capsys):
    unusable = UNUSABLE | {
        "the chat template refuses the messages: no tools": {
            "messages": [{"role": "tool", "content": "x"}, *LONGER]
        },
        "the longer answer leaves no room": {"prompt": "p", "chosen": "x" * 99, "rejected": "y"},
    }
    usable = FORMS["strings"][0]
    rows = [usable, *unusable.values(), *unusable.values(), usable]
    file = tmp_path / "x.jsonl"
    write_rows(file, rows)
    pairs = load_pairs(file, tokenizer, max_length=60)
    assert list(pairs.lines) == [1, len(rows)] and pairs[0] == pairs[1]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(unusable)
    for number, (reason, line) in enumerate(zip(unusable, lines), start=2):
        assert line.startswith(f"{file}: 2 of {len(rows)} rows dropped because {reason}")
        assert line.endswith(f": line {number}, {number + len(unusable)}")


def test_only_rows_that_are_used_count_as_a_form(tokenizer, tmp_path):
    file = tmp_path / "x.jsonl"
    rows = [FORMS["strings"][0], {"prompt": "p", "chosen": "x" * 99, "rejected": "y"}]
    write_rows(file, [*rows, FORMS["messages"][0]])
    _, report = read_pairs(file, tokenizer, 60)
    assert report.rows == 3 and report.forms == {PREFERENCE: 1, "supervised messages": 1}


MALFORMED = {
    '{"prompt": "p"}': "the row's columns are prompt; rows must be {",
    "{}": "the row's columns are none; rows must be {",
    '{"completion": "c"}': "the row's columns are completion; rows must be {",
    '{"prompt": "p", "chosen": "c"}': "the row's columns are prompt, chosen; rows must be {",
    '{"prompt": ["p"], "chosen": [], "rejected": []}': "'chosen' must be a list of messages",
    '{"chosen": "a", "rejected": "b"}': "'chosen' is no transcript, and",
    '{"prompt": "p", "chosen": "a", "rejected": [1]}': "'rejected' must be a string, not list",
    '{"prompt": "p", "completion": "a", "label": 1}': "'label' must be true or false, not 1",
    '{"prompt": 1, "completion": "a"}': "'prompt' must be a string, not int",
    '{"messages": [{"role": "user"}]}': "'messages' must hold {role, content}",
    '{"messages": [{"role": "user", "content": [1]}]}': "'content' must be a string, not list",
    '{"messages": "hello"}': "'messages' must be a list of messages",
    '{"messages": [{"role": "user", "content": null}]}': "'messages' must hold {role, content}",
    '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}': "'text' must be a string",
    '{"messages": [{"role": "a", "content": "b", "reasoning": 1}]}': "'reasoning_content' must be",
    '{"messages": [{"from": "human", "value": "b"}, 2]}': "must hold {role, content}, not 2",
    '{"prompt": "p", "completion": "c", "tools": "[{"}': "tools: not valid JSON",
    '{"prompt": "p", "completion": "c", "tools": 7}': "'tools' must be a list or its JSON",
    '{"prompt": "p", "completion": "c", "chat_template_kwargs": [1]}': "'chat_template_kwargs' an",
    '{"question": ["p"], "chosen": "c", "rejected": "r"}': "must hold {role, content}, not 'p'",
    '{"prompt": "\\ud800", "completion": "c"}': "surrogates not allowed",
    '{"prompt": "a\x00b", "completion": "c"}': "not valid JSON",
    '{"prompt": NaN, "completion": "c"}': "NaN",
}


@pytest.mark.parametrize("line", MALFORMED)
def test_a_malformed_row_is_named_by_file_and_line(line, tokenizer, tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('\n{"prompt": "p", "completion": "c"}\n' + line + "\n")
    with pytest.raises(ValueError) as error:
        load_pairs(file, tokenizer)
    assert str(error.value).startswith(f"{file}:3: ") and MALFORMED[line] in str(error.value)
    assert not isinstance(error.value, UnusableError)


def test_messages_need_a_chat_template(tmp_path):
    file = tmp_path / "x.jsonl"
    write_rows(file, [FORMS["messages"][0]])
    with pytest.raises(ValueError, match=r"x\.jsonl:1: messages need a template; add a"):
        load_pairs(file, byte_tokenizer())


def test_a_report_lists_the_columns_that_no_form_has_and_at_most_five_lines(tokenizer, tmp_path):
    row = FORMS["strings"][0] | {"system": "be kind", "score_chosen": 9.0}
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(row))
    _, report = read_pairs(file, tokenizer, 60)
    assert report.lines() == ["columns not used: score_chosen, system"]
    report = Report(rows=9, truncated=[7, 9], dropped={"it is odd": [1, 2, 3, 4, 5, 6]})
    assert report.lines() == [
        "6 of 9 rows dropped because it is odd: line 1, 2, 3, 4, 5, ...",
        "2 of 9 rows cut: the prompt lost its oldest tokens to --max_length: line 7, 9",
    ]
    assert Report(rows=9, truncated=[1, 2, 3, 4, 5]).lines()[0].endswith("line 1, 2, 3, 4, 5")


@needs_shared
def test_all_rows_of_a_real_file_are_used():
    tokenizer = load_tokenizer(SHARED / "models/gsm-llama")
    pairs, report = read_pairs(SHARED / "data/gsm8k-pairs.jsonl", tokenizer, 1024)
    assert (len(pairs), report.rows, report.lines()) == (731, 731, [])
