"""Rows of every form, what is dropped and why, and the doctor. transformers writes the chats."""

import gzip
import json
import tracemalloc

import pytest
from conftest import SHARED, needs_shared, write_rows

import data
from data import (
    Pair,
    Pairs,
    byte_tokenizer,
    load_pairs,
    load_tokenizer,
    read_pairs,
    row_to_pair,
)

# The formats of four families, in templates of our own.
TEMPLATES = {
    "llama3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim }}"
        "{{ '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "chatml": (
        "{%- for m in messages %}\n"
        "    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}\n"
        "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}\n"
        "{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user and assistant') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}"
        "{% endif %}{% endfor %}"
    ),
}
SPECIALS = {
    "llama3": ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "chatml": ["<|im_end|>", "<|im_start|>"],
    "zephyr": ["</s>"],
    "mistral": ["</s>"],
}
CHAT = [
    {"role": "user", "content": " What is 2+2?  I'd like\nto know "},
    {"role": "assistant", "content": "It is 4.\n\n"},
    {"role": "user", "content": "naïve 🙂 <s>? [INST] no"},
]
ANSWERS = [{"role": "assistant", "content": text} for text in ("yes,  sure", " no 🙂\n")]


@pytest.fixture(scope="module", params=TEMPLATES)
def chat(request, tmp_path_factory):
    """A folder with a tokenizer of the family's kind and its template, as a string or a file."""
    pytest.importorskip("tokenizers", reason="makes the tokenizers of these tests")
    from test_tokenizers import FAMILIES, write_tokenizer

    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    kind = {"llama3": "llama3", "chatml": "qwen", "zephyr": "llama2", "mistral": "mistral"}[name]
    spec = FAMILIES[kind]()
    known = {token["content"] for token in spec["added_tokens"]}
    top = max([*spec["model"]["vocab"].values(), *(t["id"] for t in spec["added_tokens"])])
    like = spec["added_tokens"][0] | {"special": True}
    for token in SPECIALS[name]:
        if token not in known:
            top += 1
            spec["added_tokens"].append(like | {"id": top, "content": token})
    config = {"bos_token": "<s>", "eos_token": SPECIALS[name][0]}
    if name == "llama3":
        config["chat_template"] = [
            {"name": "tools", "template": "no"},
            {"name": "default", "template": TEMPLATES[name]},
        ]
    elif name == "chatml":
        (folder / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
    else:
        config["chat_template"] = TEMPLATES[name]
    return write_tokenizer(folder, spec, **config)


GUARDED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if '</tool>' in m.content %}{{ m.content.split('</tool>')[-1] }}{% else %}{{ m.content }}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def plain_chat(messages: list[dict]) -> list[dict]:
    """Without text that reads like a special token, where we differ from transformers."""
    return [m | {"content": m["content"].replace("<s>", "")} for m in messages]


def oracle(folder, messages, **options) -> list[int]:
    transformers = pytest.importorskip("transformers", reason="the oracle")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    return theirs.apply_chat_template(messages, return_dict=False, **options)


def test_render_equals_apply_chat_template(chat):
    ours, messages = load_tokenizer(chat), plain_chat(CHAT)
    for end in range(1, 4):
        for prompt in (False, True):
            expected = oracle(chat, messages[:end], add_generation_prompt=prompt)
            assert ours.render(messages[:end], add_generation_prompt=prompt) == expected
    whole = [*messages, ANSWERS[0]]
    assert ours.render(whole) == oracle(chat, whole)


def test_an_answer_goes_on_as_the_template_writes_it_and_ends_once(chat, tmp_path):
    """Prompt and answer together are what transformers makes of the whole conversation."""
    ours, messages = load_tokenizer(chat), plain_chat(CHAT)
    row = {name: [*messages, answer] for name, answer in zip(("chosen", "rejected"), ANSWERS)}
    (pair,) = load_pairs(write_rows(tmp_path / "x.jsonl", [row]), ours)
    assert pair.prompt == oracle(chat, messages, add_generation_prompt=True)
    for ids, answer in zip(pair[1:], ANSWERS):
        whole = oracle(chat, [*messages, answer])
        assert pair.prompt + ids == whole[: len(pair.prompt + ids)]
        assert ids.count(ours.end_id) == 1 and ids[-1] == ours.end_id


def test_a_template_sees_added_tokens_that_are_not_special(tmp_path):
    """As Qwen3's looks for </think> in earlier turns; only special ones are hidden from it."""
    from test_tokenizers import FAMILIES, write_tokenizer

    spec = FAMILIES["qwen"]()
    folder = write_tokenizer(tmp_path, spec, chat_template=GUARDED)
    messages = [{"role": "user", "content": "a<tool>b</tool>c"}, ANSWERS[0]]
    ours = load_tokenizer(folder)
    assert ours.render(messages) == oracle(folder, messages)
    assert "<tool>" not in ours.decode(ours.render(messages))
    messages[0]["content"] = "no <tool>x end"  # not special, so read out of the message
    assert ours.render(messages) == oracle(folder, messages)


def test_an_answer_ends_with_the_token_that_the_template_writes(tmp_path):
    """Of a base model whose eos_token is not its chat template's, or one of several stop ids."""
    from test_tokenizers import FAMILIES, write_tokenizer

    folder = write_tokenizer(
        tmp_path, FAMILIES["gpt2"](),
        chat_template=TEMPLATES["zephyr"].replace("eos_token", "'<|end|>'"),
    )  # fmt: skip
    tokenizer = load_tokenizer(folder)
    turn = tokenizer.added["<|end|>"]
    row = {"messages": [CHAT[0], ANSWERS[0]]}
    ids = row_to_pair(row, tokenizer)[1].chosen
    assert ids == [*tokenizer.encode("yes,  sure"), turn] and turn != tokenizer.end_id
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, turn]}))
    assert row_to_pair(row, load_tokenizer(folder))[1].chosen == ids


def test_truncation_keeps_a_bos_that_the_template_writes(tmp_path):
    from test_tokenizers import FAMILIES, write_tokenizer

    folder = write_tokenizer(
        tmp_path, FAMILIES["gpt2"](), bos_token="<s>", chat_template=TEMPLATES["llama3"]
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.bos_id is None
    rows = write_rows(tmp_path / "x.jsonl", [{"messages": [*CHAT, ANSWERS[0]]}])
    whole, cut = (load_pairs(rows, tokenizer, length)[0].prompt for length in (1000, 60))
    assert len(cut) < len(whole) and cut[0] == whole[0] == tokenizer.added["<s>"]
    assert cut[1:] == whole[len(whole) - len(cut) + 1 :]


def test_what_reads_like_a_special_token_in_a_message_stays_text(chat):
    ours = load_tokenizer(chat)
    for token in ours.reserved:
        messages = [{"role": "user", "content": f"a{token}b\ufdd0"}]
        harmless = [{"role": "user", "content": "ab\ufdd0"}]
        count = ours.render(harmless).count(ours.added[token])
        ids = ours.render(messages)
        assert ids.count(ours.added[token]) == count
        assert token in ours.decode(ids) and "\ufdd0" in ours.decode(ids)


# --- Forms ----------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tmp_path):
    """The bytes, with a template under which a conversation is easy to read."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    byte_tokenizer().save(folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}"
        "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "{{ m.role[0] }}:{{ m.content }}"
        "{% if m.role == 'assistant' %}<|end|>{% endif %}|{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    return load_tokenizer(folder)


def said(*texts: str) -> list[dict]:
    """["u:hello", "a:yes"] as messages."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[text[0]], "content": text[2:]} for text in texts]


Q, YES, NO = "u:hello", "a:yes", "a:no"
HH = "\n\nHuman: hello\n\nAssistant: what?\n\nHuman: that\n\nAssistant:"
LONGER = said(Q, YES, "u:more", "a:later")
FORMS = {
    "strings": ({"prompt": "p ", "chosen": "c", "rejected": "r"}, ("\x00p ", "c", "r")),
    "lists": (
        {"prompt": said(Q), "chosen": said(YES), "rejected": said(NO)},
        ("u:hello|a:", "yes", "no"),
    ),
    "whole": ({"chosen": said(Q, YES), "rejected": said(Q, NO)}, ("u:hello|a:", "yes", "no")),
    "ultrafeedback": (
        {"prompt": "hello", "chosen": said(Q, YES), "rejected": said(Q, NO), "score_chosen": 9.0},
        ("u:hello|a:", "yes", "no"),
    ),
    "prompt and answers": (
        {"prompt": "hello", "chosen": said(YES), "rejected": said(NO)},
        ("u:hello|a:", "yes", "no"),
    ),
    "parting early": (
        {"chosen": LONGER, "rejected": said(Q, NO, "u:oh", "a:later")},
        ("u:hello|a:", "yes", "no"),
    ),
    "parting late": (
        {"chosen": LONGER, "rejected": [*LONGER[:3], *said("a:laten")]},
        ("u:hello|a:yes<|end|>|u:more|a:", "later", "laten"),
    ),
    "transcripts": ({"chosen": HH + " The sky", "rejected": HH + " The sky is"},
                    ("\x00" + HH, " The sky", " The sky is")),
    "good": ({"prompt": "p", "completion": "c", "label": True}, ("\x00p", "c", None)),
    "bad": ({"prompt": "p", "completion": "c", "label": False}, ("\x00p", None, "c")),
    "bad list": (
        {"prompt": said(Q), "completion": said(NO), "label": False},
        ("u:hello|a:", None, "no"),
    ),
    "supervised": ({"prompt": "p", "completion": "c"}, ("\x00p", "c", None)),
    "supervised list": ({"prompt": said(Q), "completion": said(YES)}, ("u:hello|a:", "yes", None)),
    "bad messages": ({"messages": said(Q, NO), "label": False}, ("u:hello|a:", None, "no")),
    "messages": ({"messages": said("s:be", Q, YES)}, ("s:be|u:hello|a:", "yes", None)),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_every_form_of_row(name, suffix, tokenizer, tmp_path):
    """\x00 stands for the BOS that the code places; the template here writes none."""
    row, (prompt, *answers) = FORMS[name]
    file = tmp_path / f"x{suffix}"
    content = (json.dumps(row) + "\n").encode()
    file.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    (pair,) = load_pairs(file, tokenizer)
    expected = prompt.replace("<|end|>", "\x01").encode()
    assert pair.prompt == [{0: 256, 1: 257}.get(byte, byte) for byte in expected]
    assert list(pair[1:]) == [[] if a is None else [*a.encode(), 257] for a in answers]


def test_columns_that_are_not_used_are_named(tokenizer, tmp_path, capsys):
    row = FORMS["ultrafeedback"][0] | {"system": "be kind"}
    load_pairs(write_rows(tmp_path / "x.jsonl", [row]), tokenizer)
    assert "columns not used: score_chosen, system" in capsys.readouterr().err
    file = tmp_path / "y.jsonl"
    file.write_bytes(gzip.compress(b"{}"))
    with pytest.raises(ValueError, match="y.jsonl: is compressed"):
        load_pairs(file, tokenizer)


def test_metadata_of_messages_does_not_part_conversations(tokenizer):
    sides = [[m | {"id": side} for m in said(Q, side)] for side in (YES, NO)]
    _, pair = row_to_pair({"chosen": sides[0], "rejected": sides[1]}, tokenizer)
    assert bytes(pair.chosen[:-1]) == b"yes" and bytes(pair.prompt) == b"u:hello|a:"


DROPPED = {
    "answer is empty": {"messages": said(Q, "a: ")},
    "identical": {"chosen": said(Q, YES), "rejected": said(Q, YES)},
    "do not part at an assistant's turn": {"chosen": said(Q, YES), "rejected": said(Q)},
    "the conversation does not end in an": {"messages": said(Q, YES, "u:bye")},
    "the transcript does not end in": {"chosen": HH + "a\n\nHuman: b", "rejected": HH + "c"},
    "the chat template refuses it: no tools": {
        "messages": [{"role": "tool", "content": "x"}, *LONGER]
    },
    "differ before their last answer": {"chosen": HH + " a", "rejected": "\n\nHuman: x" + HH + "b"},
    "longer answer leaves no room": {"prompt": "p", "chosen": "x" * 99, "rejected": "y"},
}


def test_what_cannot_be_used_is_dropped_and_counted(tokenizer, tmp_path, capsys):
    good = FORMS["strings"][0]
    rows = [good, *DROPPED.values(), *DROPPED.values(), good]
    pairs = load_pairs(write_rows(tmp_path / "x.jsonl", rows), tokenizer, max_length=60)
    assert list(pairs.lines) == [1, len(rows)] and pairs[0] == pairs[1]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(DROPPED)
    for number, reason in enumerate(DROPPED, start=2):
        (line,) = [line for line in lines if reason in line]
        assert f"2 of {len(rows)} rows dropped" in line
        assert line.endswith(f": line {number}, {number + len(DROPPED)}")


MALFORMED = {
    '{"prompt": "p"}': "its columns are prompt; rows are",
    '{"prompt": ["p"], "chosen": [], "rejected": []}': "'chosen' must be a list of messages",
    '{"chosen": "a", "rejected": "b"}': "no column 'prompt', and 'chosen' is no transcript",
    '{"prompt": "p", "chosen": "a", "rejected": [1]}': "'rejected' must be a string, not list",
    '{"prompt": "p", "completion": "a", "label": 1}': "'label' must be true or false, not 1",
    '{"prompt": 1, "completion": "a"}': "'prompt' must be a string, not int",
    '{"messages": [{"role": "user"}]}': "a message is {role, content}",
    '{"messages": [{"role": "user", "content": [1]}]}': "'content' must be a string, not list",
    '{"messages": "hello"}': "'messages' must be a list of messages",
    '{"prompt": "a\x00b", "completion": "c"}': "not valid JSON",
    "\x00\x00\x00": "not valid JSON",
    '{"prompt": NaN, "completion": "c"}': "NaN is no number",
}


@pytest.mark.parametrize("line", MALFORMED)
def test_a_malformed_row_is_refused_by_its_line(line, tokenizer, tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "p", "completion": "c"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:2: .*" + MALFORMED[line].replace("{", r"\{")):
        load_pairs(file, tokenizer)


def test_messages_need_a_template(tmp_path):
    file = write_rows(tmp_path / "x.jsonl", [FORMS["messages"][0]])
    with pytest.raises(ValueError, match=r"x\.jsonl:1: messages need a chat template"):
        load_pairs(file, byte_tokenizer())


def test_a_huge_line_and_a_broken_archive_are_refused(tokenizer, tmp_path):
    huge = tmp_path / "huge.jsonl"
    huge.write_bytes(b'{"prompt": "' + b"a" * 50_000_000 + b'"}')
    with pytest.raises(ValueError, match=r"huge.jsonl:1: a row of more than 8 MiB"):
        load_pairs(huge, tokenizer)
    broken = tmp_path / "x.jsonl.gz"
    for content in (b"no gzip", gzip.compress(b'{"prompt": "p", "completion": "c"}\n' * 99)[:-9]):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=r"x.jsonl.gz: broken gzip file"):
            load_pairs(broken, tokenizer)


def test_pairs_are_a_sequence_in_little_memory(tmp_path):
    rows = [Pair([256, i], [i, 257], [] if i % 2 else [1, 2, 257]) for i in range(5)]
    pairs = Pairs(rows)
    assert list(pairs) == rows and pairs[-1] == rows[-1] and list(pairs[1:3]) == rows[1:3]
    assert list(pairs.take([3, 0])) == [rows[3], rows[0]]
    assert pairs.lengths().tolist() == [[2, 2, 0 if i % 2 else 3] for i in range(5)]
    with pytest.raises(IndexError):
        pairs[5]
    row = {"prompt": "x" * 100, "chosen": "y" * 150, "rejected": "z" * 150}
    file = write_rows(tmp_path / "x.jsonl", [row] * 5000)
    tracemalloc.start()
    pairs = load_pairs(file, byte_tokenizer())
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    ids = 4 * int(pairs.lengths().sum())
    assert ids == 4 * 403 * 5000 and held < 1.2 * ids and peak < 2.5 * ids


# --- The doctor -----------------------------------------------------------------------------------


def test_doctor_says_what_becomes_of_a_file(tokenizer, tmp_path, capsys):
    good = {"prompt": "ab\n", "chosen": "cde", "rejected": "fghi"}
    parting = {"chosen": said(Q, YES), "rejected": said("u:x", NO)}
    rows = [
        good,
        good,
        parting,
        *DROPPED.values(),
        good | {"prompt": "x" * 70},
        FORMS["messages"][0],
    ]
    file = write_rows(tmp_path / "x.jsonl", rows)
    data.main([str(file), "--tokenizer", str(tmp_path / "tokenizer"), "--max_length", "60"])
    out = capsys.readouterr().out
    assert all(len(line) < 80 for line in out.splitlines()), out
    lines = [line.rstrip() for line in out.splitlines()]
    assert lines[0] == "13 rows, used are 4 of prompt, chosen, rejected, 1 of supervised messages"
    assert sum("rows dropped" in line for line in lines) == len(DROPPED)
    assert "2 of 13 rows dropped, the conversations do not part at an assistant's turn" in out
    assert any("1 of 13 rows cut" in line and line.endswith("line 12") for line in lines)
    assert "4 pairs to train on, at most 60 tokens each" in lines
    assert "1 of them repeat another one" in lines
    prompt = next(line for line in lines if line.startswith("prompt "))
    assert prompt.split() == ["prompt", "4", "4", "10", "25", "49", "55"]
    grid = lines[lines.index("line 1, scored tokens marked ^:") + 1 :]
    assert grid == [
        "prompt       0 <|begin|> a b \\n",
        "chosen       4 c d e <|end|>",
        "               ^ ^ ^ ^^^^^^^",
        "rejected     4 f g h i <|end|>",
        "               ^ ^ ^ ^ ^^^^^^^",
    ]


def test_doctor_on_nothing_and_on_bad_input(tokenizer, tmp_path, capsys):
    file = write_rows(tmp_path / "x.jsonl", [DROPPED["identical"]])
    folder = str(tmp_path / "tokenizer")
    data.main([str(file), "--tokenizer", folder])
    assert "0 pairs to train on" in capsys.readouterr().out
    for argv, match in [
        (["gone.jsonl", "--tokenizer", folder], "gone.jsonl: No such file"),
        ([str(file), "--tokenizer", "gone"], "gone: No such file"),
        ([str(file), "--tokenizer", folder, "--max_length", "1"], "--max_length"),
        ([str(file)], "--tokenizer"),
    ]:
        with pytest.raises(SystemExit) as stop:
            data.main(argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and match in error


@needs_shared
def test_real_pairs_are_all_kept():
    tokenizer = load_tokenizer(SHARED / "models/gsm-llama")
    pairs, report = read_pairs(SHARED / "data/gsm8k-pairs.jsonl", tokenizer, 1024)
    assert (len(pairs), report.rows, report.losses()) == (731, 731, [])
