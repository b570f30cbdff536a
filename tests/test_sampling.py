"""Sampling many prompts: order, seeds, parts, and stop texts."""

import functools
import sys
from types import SimpleNamespace

from conftest import tiny_model

from support import sampling
from support.sampling import sample_answers, sample_ids, stop_texts
from support.tokenizers import byte_tokenizer


def fake_model(generate) -> SimpleNamespace:
    """A model that only generates, and records its keyword arguments in `calls`."""
    calls = []

    def recorded(prompts, max_new_tokens, **how):
        calls.append({"prompts": prompts, **how})
        return [generate(prompt) for prompt in prompts]

    return SimpleNamespace(generate=recorded, calls=calls)


def test_answers_come_back_to_their_prompts_and_unfinished_ones_are_empty(monkeypatch):
    monkeypatch.setattr(sampling, "GENERATION_ROWS", 4)
    # The model answers with the length of the prompt. An answer to three tokens does not end.
    model = fake_model(lambda ids: [*b"%02d" % len(ids)] + ([257] if len(ids) != 3 else []))
    prompts = ["aaaa", "", "aa", "a", "aaaaaa", "aaa"]
    answers = sample_answers(model, byte_tokenizer(), prompts, samples=2, temperature=0.5, seed=7)
    assert answers == [[text, text] for text in ("05", "01", "", "02", "07", "04")]
    assert [call["seed"] for call in model.calls] == [7, 11, 15]  # each part has its own seed
    assert {call["temperature"] for call in model.calls} == {0.5}
    assert all(257 in call["stop_ids"] for call in model.calls)
    lengths = [len(prompt) for call in model.calls for prompt in call["prompts"]]
    assert lengths == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 7, 7]


def test_as_many_rows_are_generated_at_a_time_as_the_cache_may_hold(monkeypatch):
    sizes, read = [], sampling._read_prompts

    def recorded(model, prompts, new_tokens):
        sizes.append([len(prompt) for prompt in prompts])
        return read(model, prompts, new_tokens)

    monkeypatch.setattr(sampling, "_read_prompts", recorded)
    monkeypatch.setattr(sampling, "GENERATION_ROWS", 4)
    monkeypatch.setattr(sampling, "GENERATION_TOKENS", 30)
    model, prompts = tiny_model(), [[1] * n for n in (20, 5, 1, 60, 10, 2)]
    sample_ids(model, prompts, max_new_tokens=5)
    assert sizes == [[1, 2], [5, 10], [20], [60]]  # at most 30 // 15 rows, then at least 1
    sizes.clear()
    sample_ids(model, prompts, max_new_tokens=5, rows=3)
    assert sizes == [[1, 2, 5], [10], [20, 60]]


def test_the_stop_texts_of_a_prompt_end_its_own_answer(monkeypatch):
    """Prompts keep their numbers when they are sorted by length and split into parts."""
    monkeypatch.setattr(sampling, "GENERATION_ROWS", 2)
    tokenizer, prompts = byte_tokenizer(), [[97] * n for n in (5, 2, 4, 1, 3)]
    is_done = stop_texts(tokenizer, [(f"{len(prompt)}",) for prompt in prompts])

    def generate(prompts, max_new_tokens, is_done, **_):
        """Counts from 0 until the answer is over."""
        answers = []
        for n in range(len(prompts)):
            counts = (list(b"0123456789"[:end]) for end in range(1, 11))
            answers.append(next(ids for ids in counts if is_done(n, ids)))
        return answers

    answers = sample_ids(SimpleNamespace(generate=generate), prompts, 10, is_done=is_done)
    assert [tokenizer.decode(answer)[-1] for answer in answers] == ["5", "2", "4", "1", "3"]


def test_real_answers_do_not_depend_on_rows_and_end_at_their_stop_texts(monkeypatch):
    monkeypatch.setattr(sampling, "GENERATION_ROWS", 5)
    model, tokenizer = tiny_model(), byte_tokenizer()
    prompts = [[256, *b"abcdefgh"[: 1 + 3 * i % 8]] for i in range(8)]
    answers = sample_ids(model, prompts, 24, seed=1, stop_ids=(257,), top_p=0.9)
    assert len({tuple(answer) for answer in answers}) == 8
    assert sample_ids(model, prompts, 24, seed=1, stop_ids=(257,), top_p=0.9, rows=3) == answers
    # The tenth id of each answer, as a text, becomes the stop text of its prompt.
    stops = [(tokenizer.decode(answer[9:10]),) if len(answer) > 9 else () for answer in answers]
    is_done = stop_texts(tokenizer, stops)
    shorter = sample_ids(model, prompts, 24, seed=1, stop_ids=(257,), top_p=0.9, is_done=is_done)
    for answer, short, stop in zip(answers, shorter, stops):
        assert short == answer[: len(short)]  # generate may look at an answer every few tokens
        assert len(short) == len(answer) or any(text in tokenizer.decode(short) for text in stop)
    assert sum(map(len, shorter)) < sum(map(len, answers))
    assert sample_ids(model, [], 24) == []


def test_a_long_draw_shows_a_progress_bar_on_a_terminal(capsys, monkeypatch):
    def generate(prompts, max_new_tokens, progress, **_):
        for _ in prompts:
            progress([1, 2, 3])
        return [[1, 2, 3]] * len(prompts)

    model = SimpleNamespace(generate=generate)
    eager = functools.partial(sampling.tqdm, mininterval=0, miniters=1)  # at each update
    monkeypatch.setattr(sampling, "tqdm", eager)
    sample_ids(model, [[1]] * 4, 49)
    assert capsys.readouterr().err == ""  # a file of output gets no bar
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    sample_ids(model, [[1]] * 4, 48)
    assert capsys.readouterr().err == ""
    sample_ids(model, [[1]] * 4, 49)
    shown = capsys.readouterr().err
    assert "answers: 100%" in shown and "4/4" in shown
    sample_ids(model, [[1]] * 1001, 1)
    assert "1001/1001" in capsys.readouterr().err


def test_a_stop_text_ends_an_answer_as_soon_as_the_text_contains_it():
    tokenizer = byte_tokenizer()
    is_done = stop_texts(tokenizer, [("bb",), ("Q", "é\n"), ()])
    answer = [*"é ab b\né\nbb".encode()]
    ends = [[at for at in range(len(answer) + 1) if is_done(i, answer[:at])] for i in range(3)]
    assert ends == [[13], [11, 12, 13], []]  # in bytes, which are the tokens here
    assert stop_texts(tokenizer, [(), ()]) is None
