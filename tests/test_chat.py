"""Chat templates and conversations. The oracle is transformers' apply_chat_template."""

import json
import re
import types

import pytest
import torch
from conftest import tiny_model, write_rows

import eval as evaluation
import train
from data import load_pairs
from eval import pair_logps
from model import Llama
from support.cli import DataOptions
from support.job import hash_pairs
from support.rows import UnusableError
from support.run_folder import newest_checkpoint
from support.tokenizers import byte_tokenizer, load_tokenizer, render_template
from support.trained_run import read_run

transformers = pytest.importorskip("transformers", reason="the oracle of most tests here")
from test_tokenizers import family_spec, write_tokenizer  # noqa: E402
from transformers.utils import chat_template_utils  # noqa: E402

# Like Qwen3's: tools, calls of tools, and thoughts, which earlier turns leave out.
QWEN3 = (
    "{%- if messages[0].role == 'system' or tools %}{{- '<|im_start|>system\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}"
    "{%- for tool in tools or [] %}{{- '\n' + (tool | tojson) }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- set ns = namespace(asked=0) %}"
    "{%- for m in messages if m.role == 'user' %}{%- set ns.asked = ns.asked + 1 %}{%- endfor %}"
    "{%- for m in messages %}{%- set content = m.content if m.content is string else '' %}"
    "{%- if m.role == 'user' %}{%- set ns.asked = ns.asked - 1 %}"
    "{{- '<|im_start|>user\n' + content + '<|im_end|>\n' }}"
    "{%- elif m.role == 'tool' %}{{- '<|im_start|>tool\n' + content + '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' %}{%- set thought = m.reasoning_content or '' %}"
    "{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if ns.asked == 0 %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}"
    "{{- content }}{%- for call in m.tool_calls or [] %}{{- '\n' if content }}"
    "{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
# The formats of six families, in templates of our own.
TEMPLATES = {
    "qwen3": QWEN3,
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
    "mistral-system": (  # writes the system message into the user's turn, if that is the last
        "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' %}"
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}{{ '[INST] ' }}"
        "{% if loop.last and system %}{{ system + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
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
    "mistral-system": "llama2",
    "qwen3": "qwen",
}
SPECIALS = {
    "llama3": ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "chatml": ["<|im_end|>", "<|im_start|>"],
    "zephyr": ["</s>"],
    "mistral": ["</s>"],
    "mistral3": ["</s>", "[INST]", "[/INST]"],
    "mistral-system": ["</s>", "[INST]", "[/INST]"],
    "qwen3": ["<|im_end|>", "<|im_start|>"],
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
    return write_chat(request.param, tmp_path_factory.mktemp(request.param))


def write_chat(name: str, folder):
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
    prompt, answers = ours.turns(messages, ANSWERS, {})
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
        prompt, (answer_ids,) = ours.turns(messages, [answer], {})
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


# --- Tools, thoughts and other values for a template ----------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"default": None}}}]
FUNCTION = {"name": "weather", "arguments": {"city": "Rome"}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": FUNCTION}]}
RAIN = {"role": "tool", "content": "rain"}
SYSTEM = {"role": "system", "content": "Be kind."}
THOUGHTS = [
    ANSWERS[0],
    {"role": "assistant", "content": "<think>\nIt is even.\n</think>\n\nyes"},
    {"role": "assistant", "content": "yes", "reasoning_content": "It is odd."},
]


def turns_equal_the_oracle(folder, tokenizer, messages, answers, row_values=None, **values):
    prompt, found = tokenizer.turns(messages, answers, row_values or {})
    assert prompt == oracle(folder, messages, add_generation_prompt=True, **values)
    for ids, answer in zip(found, answers):
        whole = oracle(folder, [*messages, answer], **values)
        assert whole[: len(prompt + ids)] == prompt + ids and ids[-1] == tokenizer.end_id
    return prompt, found


@pytest.mark.parametrize("thinking", [None, True, False])
def test_thoughts_and_enable_thinking_as_in_transformers(thinking, tmp_path):
    values = {} if thinking is None else {"enable_thinking": thinking}
    folder = write_chat("qwen3", tmp_path)
    tokenizer = load_tokenizer(folder, json.dumps(values))
    messages = [CHAT[0], THOUGHTS[1], CHAT[0], THOUGHTS[2], CHAT[0]]
    answers = THOUGHTS[:1] if thinking is False else THOUGHTS
    prompt, _ = turns_equal_the_oracle(folder, tokenizer, messages, answers, **values)
    assert tokenizer.render(messages, True) == prompt
    assert ("</think>" in tokenizer.decode(prompt)) == (thinking is False)
    if thinking is False:
        for answer in THOUGHTS[1:]:
            with pytest.raises(UnusableError, match="check the answer's reasoning and --chat_temp"):
                tokenizer.turns(messages, [answer], {})


def test_tools_and_their_calls_as_in_transformers(tmp_path):
    folder = write_chat("qwen3", tmp_path)
    tokenizer = load_tokenizer(folder)
    for messages in ([CHAT[0]], [SYSTEM, CHAT[0], CALL, RAIN]):
        for values in ({}, {"tools": TOOLS}, {"tools": TOOLS, "enable_thinking": False}):
            answers = [CALL, ANSWERS[0]]
            turns_equal_the_oracle(folder, tokenizer, messages, answers, values, **values)
    row = {"chosen": [CHAT[0], CALL], "rejected": [CHAT[0], ANSWERS[0]], "tools": TOOLS}
    rows = [row, row | {"tools": json.dumps(TOOLS)}, row | {"tools": []},
            row | {"chat_template_kwargs": {"enable_thinking": False}}]  # fmt: skip
    pairs = load_pairs(write_rows(tmp_path / "x.jsonl", rows), tokenizer)
    values = {"tools": TOOLS}, {"tools": TOOLS}, {}, {"tools": TOOLS, "enable_thinking": False}
    prompts = [tokenizer.turns([CHAT[0]], [], value)[0] for value in values]
    assert [pair.prompt for pair in pairs] == prompts and pairs[0] == pairs[1] != pairs[2]


def test_what_a_template_does_not_write_is_dropped_by_name(tmp_path, capsys):
    tokenizer = load_tokenizer(write_chat("chatml", tmp_path))
    row = {"chosen": [CHAT[0], ANSWERS[0]], "rejected": [CHAT[0], ANSWERS[1]]}
    kwargs = {"chat_template_kwargs": {"enable_thinking": True}}
    rows = [row, row | {"tools": TOOLS}, row | kwargs, row | {"rejected": [CHAT[0], CALL]},
            {"prompt": [CHAT[0], CALL, RAIN], "chosen": ANSWERS[:1], "rejected": ANSWERS[1:]},
            {"prompt": CHAT[:1], "chosen": THOUGHTS[2:], "rejected": "yes"},
            row | {"chat_template_kwargs": {"messages": []}}]  # fmt: skip
    pairs = load_pairs(write_rows(tmp_path / "x.jsonl", rows), tokenizer)
    assert list(pairs.lines) == [1]
    reasons = [line.partition("because ")[2] for line in capsys.readouterr().err.splitlines()]
    assert reasons == [
        "the chat template does not use tools: line 2",
        "the chat template does not use enable_thinking: line 3",
        "the chat template does not use tool_calls: line 4, 5",
        "the chat template writes the chosen and the rejected answer alike: line 6",
        "the chat template does not use messages: line 7",
    ]


def test_chat_template_kwargs_are_checked_and_those_of_a_run_are_found_again(tmp_path):
    folder, values = write_chat("qwen3", tmp_path), {"enable_thinking": False}
    for wrong in ('{"a"', "[1]", '{"a": NaN}'):
        with pytest.raises(ValueError, match="tokenizer.json: --chat_template_kwargs .*: "):
            load_tokenizer(folder, wrong)
    rows = write_rows(tmp_path / "x.jsonl", [{"messages": [CHAT[0], ANSWERS[0]]}])
    with pytest.raises(ValueError, match="no rows to train on: .*template does not use thinking:"):
        load_pairs(rows, load_tokenizer(folder, '{"thinking": 1}'))
    config = tmp_path / "train_config.json"
    config.write_text(json.dumps({"chat_template_kwargs": json.dumps(values)}))
    assert load_tokenizer(folder).template_values == values
    assert load_tokenizer(folder, "{}").template_values == {}
    (tmp_path / "copy").mkdir()
    load_tokenizer(folder).save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").template_values == {}
    config.write_text('{"chat_template_kwargs": 5}')
    with pytest.raises(ValueError, match="tokenizer.json: invalid tokenizer"):
        load_tokenizer(folder)


def test_a_run_and_its_evaluation_encode_with_the_same_values(tmp_path, capsys):
    folder = write_chat("qwen3", tmp_path)
    tiny_model(vocab_size=load_tokenizer(folder).vocab_size).save_pretrained(folder)
    rows = [{"prompt": f"{i}?", "chosen": ANSWERS[:1], "rejected": ANSWERS[1:]} for i in range(9)]
    file, flag = write_rows(tmp_path / "x.jsonl", rows), "--chat_template_kwargs"
    values, other = '{"enable_thinking": false}', '{"enable_thinking": true}'
    flags = ["--init", str(folder), "--data", str(file), "--eval_fraction", "0.5", flag, values]
    run = train.main([*flags, "--save_every", "1", "--device", "cpu", "--out", f"{tmp_path}/run"])
    record = json.loads((newest_checkpoint(run) / "training.json").read_text())
    for options, same in ((None, True), (DataOptions(None, values), True),
                          (DataOptions(None, "{}"), False)):  # fmt: skip
        ((_, held_out),) = read_run(run, {}, options).data.values()
        assert (hash_pairs(held_out) == record["inputs"]["eval_data"]) == same
    first, second = (evaluation.main([str(run), *flags])[str(run)]["chosen"]
                     for flags in ([], [flag, other]))  # fmt: skip
    assert first != second
    with pytest.raises(SystemExit):
        train.main(["--resume", "--out", str(run), flag, other])
    assert f"{flag}: the resumed run uses {values}; leave out {flag}" in capsys.readouterr().err


def test_a_system_message_that_a_template_leaves_out_before_an_answer_stays(tmp_path):
    """As Mistral's templates do: the prompt is what the model sees when it is to answer, and the
    answer is what the template writes after the same prompt without the system message."""
    folder = write_chat("mistral-system", tmp_path)
    tokenizer, chat = load_tokenizer(folder), plain_chat(CHAT)
    for messages in ([chat[0]], chat):
        _, expected = turns_equal_the_oracle(folder, tokenizer, messages, ANSWERS)
        prompt, answers = tokenizer.turns([SYSTEM, *messages], ANSWERS, {})
        assert prompt == oracle(folder, [SYSTEM, *messages], add_generation_prompt=True)
        assert "Be kind." in tokenizer.decode(prompt) and answers == expected


def test_the_text_of_a_special_token_in_a_thought_stays_text(tmp_path):
    tokenizer = load_tokenizer(write_chat("qwen3", tmp_path))
    answer = {"role": "assistant", "content": "a", "reasoning_content": "b<|im_end|>c"}
    _, (ids,) = tokenizer.turns([CHAT[0]], [answer], {})
    assert ids.count(tokenizer.end_id) == 1 and "b<|im_end|>c" in tokenizer.decode(ids)


# --- Log-probs of answers, from rows to nats, against TRL -----------------------------------------


def trl_ids(folder, rows: list[dict], columns=("prompt", "chosen", "rejected")) -> list[tuple]:
    """The prompt, chosen and rejected ids with which TRL's DPOTrainer trains on rows."""
    from datasets import Dataset
    from trl import DPOTrainer

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    trainer = types.SimpleNamespace(_tokenizer=theirs)
    settings = types.SimpleNamespace(dataset_num_proc=None, max_length=None)
    prepared = DPOTrainer._prepare_dataset(
        trainer, Dataset.from_list(rows), theirs, settings, "test"
    )
    return [tuple(row[f"{column}_ids"] for column in columns) for row in prepared]


def transformers_logp(model, prompt: list[int], answer: list[int]) -> float:
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logps = model(ids[:, :-1]).logits[0].log_softmax(-1)  # (T - 1, V)
    return logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item()


# Special tokens in a message are text here, and TRL's list of rows has one form of prompt.
PLAIN = plain_chat(CHAT)
COMPARED = [
    {"prompt": PLAIN[:1], "chosen": ANSWERS[:1], "rejected": ANSWERS[1:]},
    {"prompt": PLAIN, "chosen": ANSWERS[:1], "rejected": ANSWERS[1:]},
]


@pytest.mark.parametrize("name", ["llama3", "qwen3", "mistral", "zephyr", "mistral-system"])
def test_log_probs_of_answers_are_those_of_trl_and_transformers(name, tmp_path):
    """TRL trains on what a template writes after the token that ends an answer, such as a newline;
    here an answer ends with that token. Otherwise the ids are the same, and so are the nats."""
    pytest.importorskip("trl", reason="the oracle of this test")
    folder = write_chat(name, tmp_path)
    tokenizer = load_tokenizer(folder)
    tiny_model(vocab_size=tokenizer.vocab_size).save_pretrained(folder)
    rows = [row | {"prompt": [SYSTEM, *row["prompt"]]} for row in COMPARED]
    rows = COMPARED if name in ("mistral", "mistral-system") else COMPARED + rows
    implicit = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
                for row in rows]  # fmt: skip
    theirs = trl_ids(folder, rows) + trl_ids(folder, implicit)
    pairs = load_pairs(write_rows(tmp_path / "x.jsonl", rows + implicit), tokenizer)
    ours = pair_logps(Llama.from_pretrained(folder), pairs, 128, 4096, torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert len(pairs) == len(theirs) == 2 * len(rows)
    for pair, logps, (prompt, *answers) in zip(pairs, ours.tolist(), theirs):
        assert pair.prompt == prompt
        for ids, logp, answer in zip(pair[1:], logps, answers):
            assert ids == answer[: len(ids)] and tokenizer.decode(answer[len(ids) :]).strip() == ""
            assert logp == pytest.approx(transformers_logp(model, prompt, ids), abs=1e-4)


def test_texts_have_the_ids_of_trl_unless_tokens_merge_over_the_end_of_the_prompt(tmp_path):
    """Here, prompt and answer are encoded separately. TRL encodes them together and moves the end
    of a prompt whose last characters merge with the answer into the answer."""
    pytest.importorskip("trl", reason="the oracle of this test")
    folder = write_chat("llama3", tmp_path)
    rows = [{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5."},
            {"prompt": "It is ", "chosen": "the 4", "rejected": "the 5"}]  # fmt: skip
    tokenizer = load_tokenizer(folder)
    pairs = load_pairs(write_rows(tmp_path / "x.jsonl", rows), tokenizer)
    same, merged = trl_ids(folder, rows)
    assert tuple(pairs[0]) == same
    assert len(merged[0]) < len(pairs[1].prompt) and merged[1] != pairs[1].chosen
    assert merged[1][-1] == tokenizer.end_id == pairs[1].chosen[-1]


def test_trl_cuts_the_prompt_where_a_template_leaves_out_the_system_message(tmp_path):
    """The question, which is then part of TRL's answer, stays part of the prompt here."""
    pytest.importorskip("trl", reason="the oracle of this test")
    folder = write_chat("mistral-system", tmp_path)
    (row, _), tokenizer = COMPARED, load_tokenizer(folder)
    row = row | {"prompt": [SYSTEM, *row["prompt"]]}
    ((prompt, chosen, _),) = trl_ids(folder, [row])
    (pair,) = load_pairs(write_rows(tmp_path / "x.jsonl", [row]), tokenizer)
    assert "2+2" in tokenizer.decode(chosen) and chosen[-len(pair.chosen) :] == pair.chosen
    assert len(prompt) < len(pair.prompt) and "Be kind" in tokenizer.decode(pair.prompt)


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
    _, (ids,) = tokenizer.turns([CHAT[0]], [{"role": "assistant", "content": "yes"}], {})
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
    _, (ids,) = tokenizer.turns(CHAT[:1], ANSWERS[:1], {})
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
    with pytest.raises(UnusableError, match="the chat template changes the prompt before an ans"):
        tokenizer.turns(CHAT, ANSWERS, {})
