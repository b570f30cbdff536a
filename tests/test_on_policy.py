"""Answers drawn from the policy: RLHF by leave-one-out returns, and pairs that are drawn anew."""

import json

import pytest
import torch
from conftest import write_rows
from test_data import single_logp
from test_train import metrics

import data
import train
from data import load_pairs, load_tokenizer

QUESTIONS = [{"prompt": f"{i} and {j}?", "answer": "#### 1", "grade": "gsm8k"}
             for i in range(4) for j in range(3)]  # fmt: skip


def grade(item, tokenizer, answer) -> float:
    return float(answer[0] % 2)  # so that a model of random weights is right half of the time


@pytest.fixture
def argv(checkpoint, pairs_file, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setattr(train.evaluation, "grade_drawn", grade)
    questions = write_rows(tmp_path / "questions.jsonl", QUESTIONS)
    files = {
        "init": checkpoint,
        "data": questions,
        "eval_data": pairs_file,
        "out": tmp_path / "out",
    }
    flags = {"samples": 4, "batch_size": 6, "max_new_tokens": 5, "lr": 1e-3, "micro_tokens": 40}
    flags |= {"row_tokens": 20}
    return [str(x) for name, value in (files | flags).items() for x in (f"--{name}", value)]


def test_rlhf_is_the_policy_gradient_with_a_leave_one_out_baseline(argv):
    options, _ = train.parse_options([*argv, "--loss", "rlhf", "--beta", "0.3"])
    job = train.load_job(options)
    model = job.model.double()
    with torch.no_grad():  # some steps later than the reference
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    now, ref_logps, given, extra = train.draw_pairs(job, 1)
    assert len(now.pairs) == 6 and [p.prompt for p in now.pairs[:2]] == [now.pairs[0].prompt] * 2
    assert now.pairs[0].prompt != now.pairs[2].prompt  # four answers to a prompt, two to a pair
    loss, kl, grades = 0.0, [], []
    for first in range(0, 6, 2):
        drawn = [(pair, side) for pair in now.pairs[first : first + 2] for side in (1, 2)]
        logps = [single_logp(model, *one) for one in drawn]
        ref = [single_logp(job.reference, *one) for one in drawn]
        kl += [(s - r).item() for s, r in zip(logps, ref)]
        grades += [grade(None, None, pair[side]) for pair, side in drawn]
        returns = [g - 0.3 * z for g, z in zip(grades[-4:], kl[-4:])]
        for i, s in enumerate(logps):
            baseline = sum(returns[:i] + returns[i + 1 :]) / 3
            loss = loss - (returns[i] - baseline) * s / 12
    assert extra["reward"] == sum(grades) / 12 and 0 < extra["reward"] < 1
    assert extra["kl"] == pytest.approx(sum(kl) / 12, abs=1e-5)
    assert extra["num_drawn"] == sum(len(a) for pair in now.pairs for a in pair[1:])
    expected = torch.autograd.grad(loss, model.head_weight)[0]
    batches, gradients = train.step_batches(now, 1), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # shows the gradient as a change
    optimizer.step = lambda: gradients.append(model.head_weight.grad / 6)
    train.train_step(model, optimizer, batches, job.options, given.double())
    assert len(batches) > 1
    torch.testing.assert_close(gradients[0], expected, rtol=1e-4, atol=1e-6)


def test_pairs_are_drawn_from_the_weights_of_the_step_right_against_wrong(argv):
    options, _ = train.parse_options([*argv, "--loss", "mio", "--on_policy"])
    job = train.load_job(options)
    first, again, other = (train.draw_pairs(job, step) for step in (1, 1, 2))
    assert list(first[0].pairs) == list(again[0].pairs) != list(other[0].pairs)
    for pair, line in zip(first[0].pairs, first[0].pairs.lines):
        assert (grade(None, None, pair.chosen), grade(None, None, pair.rejected)) == (1, 0)
        assert pair.prompt == job.tokenizer.prompt_ids(QUESTIONS[line - 1]["prompt"])
    expected = [[single_logp(job.reference, p, side) for side in (1, 2)] for p in first[0].pairs]
    torch.testing.assert_close(first[1], torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert first[2] is first[1]
    with torch.no_grad():
        job.model.head_weight.mul_(0.5)
    moved, ref_logps, *_ = train.draw_pairs(job, 1)
    assert list(moved.pairs) != list(first[0].pairs)
    torch.testing.assert_close(ref_logps[:1], train.logps_of(job, moved.pairs, job.reference)[:1])


def test_a_step_without_pairs_changes_nothing(argv, monkeypatch, tmp_path):
    monkeypatch.setattr(train.evaluation, "grade_drawn", lambda *_: 1.0)
    out = train.main([*argv, "--on_policy", "--epochs", "2", "--save_every", "1"])
    rows = metrics(out)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and rows[1]["reward"] == 1.0
    assert rows[-1]["loss"] is None and rows[-1]["eval_rewards/chosen"] == 0.0
    longer = train.main(["--resume", "--out", str(out), "--epochs", "3"])
    assert metrics(longer)[-1]["step"] == 6


@pytest.mark.parametrize("flags", [["--loss", "rlhf"], ["--on_policy", "--loss", "dpo"]])
def test_the_policy_learns_what_is_graded(flags, argv):
    steps = ["--epochs", "12", "--lr", "5e-3", "--schedule", "constant", "--log_every", "1"]
    rows = metrics(train.main([*argv, *flags, *steps]))[1:]
    early, late = rows[: len(rows) // 4], rows[-len(rows) // 4 :]
    assert sum(r["reward"] for r in late) / len(late) > sum(r["reward"] for r in early) / len(
        early
    ) + 0.2  # fmt: skip
    assert ("kl" in rows[0]) == ("rlhf" in flags) and rows[0]["num_drawn"] > 0


def test_graded_by_the_answer_key_if_the_answer_ends(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    item = train.evaluation.read_item(1, {"prompt": "x", "answer": "#### 7", "grade": "gsm8k"})
    ids, end = tokenizer.encode("6+1=7\n#### 7"), tokenizer.end_id
    loose = tokenizer.encode("it is 7")  # flexible would take it
    for answer, expected in (([*ids, end], 1), (ids, 0), ([end], 0), ([*loose, end], 0)):
        assert train.evaluation.grade_drawn(item, tokenizer, answer) == expected


def test_what_cannot_be_drawn_is_refused(argv, pairs_file, tmp_path, capsys):
    for flags, words in (
        (["--loss", "rlhf", "--data", str(pairs_file)], "must be questions"),
        (["--loss", "rlhf", "--samples", "3"], "must be even"),
        (["--loss", "kto", "--on_policy"], "kto is not one of pairs"),
        (["--loss", "rlhf", "--on_policy"], "rlhf is not one of pairs"),
        (["--loss", "rlhf", "--max_new_tokens", "300"], "--max_new_tokens"),
    ):
        with pytest.raises(SystemExit):
            train.main([*argv, *flags])
        assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_demonstration_draws_from_its_own_problems(tmp_path, monkeypatch):
    from conftest import tiny_model

    from data import byte_tokenizer

    tiny_model().save_pretrained(tmp_path)
    byte_tokenizer().save(tmp_path)
    monkeypatch.setattr(train, "PAIRS", train.PAIRS | {"prompts": 20, "held_out": 5})
    drawn = lambda model, tokenizer, qs, **_: [["#### 0", data.solution(q)] for q in qs]  # noqa: E731
    monkeypatch.setattr(train.evaluation, "sample_answers", drawn)
    train.make_pairs(tmp_path, 0, "cpu")
    problems = [json.loads(x) for x in (tmp_path / "problems.jsonl").read_text().splitlines()]
    assert [p["answer"] for p in problems] == [data.solution(p["prompt"]) for p in problems]
    pairs = load_pairs(tmp_path / "pairs.jsonl", byte_tokenizer())
    asked = {tuple(byte_tokenizer().prompt_ids(p["prompt"])) for p in problems}
    assert {tuple(pair.prompt) for pair in pairs} == asked


def test_a_run_on_policy_does_not_meet_the_one_beside_it():
    for flags, out in ((["--loss", "mio"], "out/mio"), (["--on_policy"], "out/mio-on-policy")):
        assert train.parse_options(flags)[0].out == out
