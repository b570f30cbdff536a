"""Chat templates and conversations. The oracle is transformers' apply_chat_template."""

import json
import re

import pytest
from conftest import write_rows

from data import load_pairs
from support.rows import UnusableError
from support.tokenizers import byte_tokenizer, load_tokenizer, render_template

transformers = pytest.importorskip("transformers", reason="the oracle of most tests here")
from test_tokenizers import family_spec, write_tokenizer  # noqa: E402
from transformers.utils import chat_template_utils  # noqa: E402

# The formats of five families, in templates of our own.
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
    "mistral3": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
}
# The kind of tokenizer with which a template is tested, and the special tokens that it writes.
KINDS = {
    "llama3": "llama3",
    "chatml": "qwen",
    "zephyr": "llama2",
    "mistral": "mistral",
    "mistral3": "llama2",
}
SPECIALS = {
    "llama3": ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "chatml": ["<|im_end|>", "<|im_start|>"],
    "zephyr": ["</s>"],
    "mistral": ["</s>"],
    "mistral3": ["</s>", "[INST]", "[/INST]"],
}
CHAT = [
    {"role": "user", "content": " What is 2+2?  I'd like\nto know "},
    {"role": "assistant", "content": "It is 4.\n\n"},
    {"role": "user", "content": "naïve 🙂 <s>? [INST] no"},
]
ANSWERS = [{"role": "assistant", "content": text} for text in ("yes,  sure", " no 🙂\n")]


# --- Templates ------------------------------------------------------------------------------------

RENDERED = {
    "blocks and their white space": "{% if true %}\n  {% for m in messages %}\n {{ m.role }}\n"
    "  {% endfor %}\n{% endif %}\nend\n",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}"
    "{{ m.content }}{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}",
    "the generation tag": "a{% generation %}\n{{ messages[1].content }}{% endgeneration %}b",
    "tojson": "{{ messages | tojson }}{{ {'é': '<a>&'} | tojson(indent=2, sort_keys=true) }}",
    "the date": "{{ strftime_now('%Y-%m-%d') }}",
    "names and options": "{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}"
    "{{ tools is none }}{{ documents is none }}{{ nothing is defined }}",
    "namespace and dict": "{% set n = namespace(i=1) %}{% for m in messages %}"
    "{% set n.i = n.i + 1 %}{% endfor %}{{ n.i }}{{ dict(a=1).a }}{{ range(3) | list }}",
    **TEMPLATES,
}


@pytest.mark.parametrize("name", RENDERED)
def test_a_template_writes_what_it_writes_in_transformers(name):
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    theirs = chat_template_utils._compile_jinja_template(RENDERED[name])
    for prompt in (False, True):
        values = {"messages": CHAT, "tools": None, "documents": None, **names}
        expected = theirs.render(**values, add_generation_prompt=prompt)
        assert expected and render_template(RENDERED[name], CHAT, prompt, names) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ 'x' ", "the chat template fails"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ messages[9].content }}", "no element 9"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "recursion"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
        ("{{ strftime_now(1) }}", "the chat template fails"),
    ],
)
def test_a_template_that_fails_is_refused(source, message):
    with pytest.raises(ValueError, match=message) as error:
        render_template(source, CHAT, True, {})
    assert str(error.value).startswith("the chat template fails (")
    assert not isinstance(error.value, UnusableError)


def test_a_template_may_refuse_messages():
    source = "{% for m in messages %}{{ raise_exception('no ' + m.role) }}{% endfor %}"
    with pytest.raises(UnusableError, match="^the chat template refuses the messages: no user$"):
        render_template(source, CHAT, True, {})
    assert render_template(source, [], True, {}) == ""


HOSTILE = [
    "{{ ''.__class__ }}",
    "{{ ''['__class__'] }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''|attr('__class__') }}",
    "{{ messages|map(attribute='__class__')|list|join }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ ('{0.__class__}'|e).format(messages) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__globals__['json'].codecs.builtins }}",
    "{{ strftime_now.__code__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('echo class').read() }}",
    "{{ self._TemplateReference__context }}",
    "{{ messages.append({'role': 'class'}) }}",
    "{{ messages[0].update(role='class') }}",
    "{{ messages.clear() }}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_a_template_reaches_nothing_of_python_and_changes_no_message(source):
    messages = [{"role": "user", "content": "hello"}]
    try:
        written = render_template(source, messages, True, {})
    except ValueError as error:
        assert str(error).startswith("the chat template fails (")
    else:
        assert written == ""
    assert messages == [{"role": "user", "content": "hello"}]


# --- Conversations --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=TEMPLATES)
def chat(request, tmp_path_factory):
    """A folder with a tokenizer of the family's kind and its template, as a string or a file."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    spec = family_spec(KINDS[name])
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


def plain_chat(messages: list[dict]) -> list[dict]:
    """Messages without the text of a special token, which transformers treats differently."""
    return [m | {"content": re.sub(r"<s>|\[INST\]", "", m["content"])} for m in messages]


def oracle(folder, messages, **options) -> list[int]:
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


def test_prompt_and_answer_together_are_the_rendered_conversation(chat):
    ours, messages = load_tokenizer(chat), plain_chat(CHAT)
    prompt, answers = ours.turns(messages, ANSWERS)
    assert prompt == oracle(chat, messages, add_generation_prompt=True)
    for ids, answer in zip(answers, ANSWERS):
        whole = oracle(chat, [*messages, answer])
        assert prompt + ids == whole[: len(prompt + ids)]
        assert ids.count(ours.end_id) == 1 and ids[-1] == ours.end_id


def test_the_text_of_a_special_token_in_a_message_stays_text(chat):
    ours = load_tokenizer(chat)
    for token in ours.reserved:
        messages = [{"role": "user", "content": f"a{token}b\ufdd0"}]
        count = ours.render([{"role": "user", "content": "ab\ufdd0"}]).count(ours.added[token])
        ids = ours.render(messages)
        assert ids.count(ours.added[token]) == count
        assert token in ours.decode(ids) and "\ufdd0" in ours.decode(ids)
        answer = {"role": "assistant", "content": f"{token}!"}
        prompt, (answer_ids,) = ours.turns(messages, [answer])
        assert prompt == ours.render(messages, add_generation_prompt=True)
        assert f"{token}!" in ours.decode(answer_ids)


GUARDED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if '</tool>' in m.content %}{{ m.content.split('</tool>')[-1] }}{% else %}{{ m.content }}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_sees_added_tokens_that_are_not_special(tmp_path):
    """Qwen3's template looks for </think> in earlier turns. Only special tokens are hidden."""
    folder = write_tokenizer(tmp_path, family_spec("qwen"), chat_template=GUARDED)
    messages = [{"role": "user", "content": "a<tool>b</tool>c"}, ANSWERS[0]]
    ours = load_tokenizer(folder)
    assert ours.render(messages) == oracle(folder, messages)
    assert "<tool>" not in ours.decode(ours.render(messages))
    messages[0]["content"] = "no <tool>x end"  # it is not special, so it is read in the message
    assert ours.render(messages) == oracle(folder, messages)


# --- Where an answer ends -------------------------------------------------------------------------


def ending(folder, written_after: str, stop_ids=()) -> tuple:
    """The byte tokenizer with the special tokens <|x|> (258) and <|y|> (259), and the answer "yes"
    in a template that writes some text after it."""
    folder.mkdir()
    byte_tokenizer().save(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    begin = spec["added_tokens"][0]
    spec["added_tokens"] += [begin | {"id": 258, "content": "<|x|>"},
                             begin | {"id": 259, "content": "<|y|>"}]  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(stop_ids)}))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}"
        f"{{% if m.role == 'assistant' %}}{written_after}{{% endif %}}{{% endfor %}}"
    )
    tokenizer = load_tokenizer(folder)
    _, (ids,) = tokenizer.turns([CHAT[0]], [{"role": "assistant", "content": "yes"}])
    assert ids[:3] == list(b"yes")
    return tokenizer, ids[3:]


X, Y, END_ID = 258, 259, 257


@pytest.mark.parametrize(
    ("written_after", "stop_ids", "end"),
    [
        ("<|end|>", [], [END_ID]),
        ("<|x|><|end|>", [X], [X]),  # the first of several stop tokens
        ("<|end|><|x|><|end|>", [X], [END_ID]),
        ("<|end|>\n<|end|>", [], [END_ID]),
        ("<|y|><|end|>\n", [], [Y, END_ID]),  # a special token that is no stop token is inside
        ("<|end|><|y|>", [], [END_ID]),
        ("<|x|>.<|y|>\n", [], [X, ord("."), Y]),  # without a stop token: the last special token
        ("<|y|>\n", [], [Y]),
        (".", [], [ord("."), END_ID]),  # with neither, the end token is added
        ("", [], [END_ID]),
    ],
)
def test_an_answer_ends_at_the_first_stop_token_or_else_at_the_last_special_token(
    written_after, stop_ids, end, tmp_path
):
    tokenizer, ids = ending(tmp_path / "x", written_after, stop_ids)
    assert ids == end and tokenizer.stop_ids == {END_ID, *stop_ids}


def test_an_answer_of_a_base_model_ends_as_the_template_ends_it(tmp_path):
    """The eos_token of a base model is often not the token with which its chat template ends."""
    folder = write_tokenizer(
        tmp_path, family_spec("gpt2"),
        chat_template=TEMPLATES["zephyr"].replace("eos_token", "'<|end|>'"),
    )  # fmt: skip
    tokenizer = load_tokenizer(folder)
    turn = tokenizer.added["<|end|>"]
    _, (ids,) = tokenizer.turns(CHAT[:1], ANSWERS[:1])
    assert ids == [*tokenizer.encode("yes,  sure"), turn] and turn != tokenizer.end_id


def test_a_shortened_prompt_keeps_the_bos_that_a_template_writes(tmp_path):
    folder = write_tokenizer(
        tmp_path, family_spec("gpt2"), bos_token="<s>", chat_template=TEMPLATES["llama3"]
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.bos_id is None
    rows = write_rows(tmp_path / "x.jsonl", [{"messages": [*CHAT, ANSWERS[0]]}])
    whole, cut = (load_pairs(rows, tokenizer, length)[0].prompt for length in (1000, 60))
    assert len(cut) < len(whole) and cut[0] == whole[0] == tokenizer.added["<s>"]
    assert cut[1:] == whole[len(whole) - len(cut) + 1 :]


def test_a_conversation_that_the_template_cannot_continue_is_unusable(tmp_path):
    byte_tokenizer().save(tmp_path)
    with pytest.raises(ValueError, match="add a chat_template.jinja to the tokenizer"):
        load_tokenizer(tmp_path).render(CHAT)
    (tmp_path / "chat_template.jinja").write_text("{{ messages | length }}")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.render(CHAT) == list(b"3")
    with pytest.raises(UnusableError, match="the chat template changes the prompt when an ans"):
        tokenizer.turns(CHAT, ANSWERS)
