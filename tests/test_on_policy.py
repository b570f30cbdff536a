"""Answers drawn from the policy: RLHF with leave-one-out baselines, and pairs drawn anew."""

import copy
import dataclasses
import re

import pytest
import torch
from conftest import write_rows
from runs import metrics, parse_options, refused

import train
from data import Pair, StepData
from support import grading, on_policy
from support.job import load_job
from support.lora import merge_lora
from support.on_policy import check_draws, draw_pairs, prompts_per_step

QUESTIONS = [
    {"prompt": f"{i} and {j}?", "answer": "#### 1", "grade": "gsm8k"}
    for i in range(4)
    for j in range(3)
]


def grade(item, tokenizer, answer: list[int]) -> float:
    """A random model is right half of the time."""
    return float(answer[0] % 2)


@pytest.fixture
def argv(checkpoint, pairs_file, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setattr(on_policy, "grade_answer", grade)
    data = write_rows(tmp_path / "questions.jsonl", QUESTIONS)
    files = {"init": checkpoint, "data": data, "eval_data": pairs_file, "out": tmp_path / "out"}
    flags = {"samples": 4, "batch_size": 6, "max_new_tokens": 5, "lr": 1e-3, "row_tokens": 20}
    flags |= {"micro_tokens": 40, "device": "cpu"}
    return [str(x) for name, value in (files | flags).items() for x in (f"--{name}", value)]


def job_of(argv: list[str], *flags: str):
    options = parse_options([*argv, *flags])
    return load_job(options)


def move(model, scale: float = 0.02) -> None:
    """Changes the trained weights, as some steps of training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))


def single_logp(model, pair: Pair, side: int) -> torch.Tensor:
    """The log-prob of one answer after its prompt, with nothing else in the row: ()."""
    ids = torch.tensor([[*pair.prompt, *pair[side]]])
    logps = (model(ids[:, :-1])[0] @ model.head_weight.T).log_softmax(-1)  # (T - 1, V)
    return logps.gather(1, ids[0, 1:, None])[len(pair.prompt) - 1 :].sum()


# --- What is drawn --------------------------------------------------------------------------------


def test_rlhf_is_the_policy_gradient_with_a_leave_one_out_baseline(argv):
    job = job_of(argv, "--loss", "rlhf", "--beta", "0.3")
    model = job.model.double()
    move(model)
    drawn = draw_pairs(job, 1, rows=[7, 2, 11])
    assert [pair.prompt for pair in drawn.pairs] == [  # four answers to a prompt, two in a pair
        job.tokenizer.prompt_ids(QUESTIONS[i]["prompt"]) for i in (7, 7, 2, 2, 11, 11)
    ]
    assert [*drawn.pairs.lines] == [8, 8, 3, 3, 12, 12]
    loss, kl, grades = 0.0, [], []
    for first in range(0, 6, 2):
        answers = [(pair, side) for pair in drawn.pairs[first : first + 2] for side in (1, 2)]
        logps = [single_logp(model, *answer) for answer in answers]
        ref = [single_logp(job.reference, *answer) for answer in answers]
        kl += [(s - r).item() for s, r in zip(logps, ref)]
        grades += [grade(None, None, pair[side]) for pair, side in answers]
        returns = [g - 0.3 * z for g, z in zip(grades[-4:], kl[-4:])]
        for i, s in enumerate(logps):
            baseline = sum(returns[:i] + returns[i + 1 :]) / 3
            assert drawn.advantages[first + i // 2, i % 2] == pytest.approx(
                returns[i] - baseline, abs=1e-5
            )
            loss = loss - (returns[i] - baseline) * s / 12
    assert drawn.metrics["reward"] == sum(grades) / 12 and 0 < drawn.metrics["reward"] < 1
    assert drawn.metrics["kl"] == pytest.approx(sum(kl) / 12, abs=1e-5)
    assert drawn.metrics["num_drawn"] == sum(len(a) for pair in drawn.pairs for a in pair[1:])
    expected = torch.autograd.grad(loss, model.head_weight)[0]
    batches, gradients = job.batches(drawn.pairs, list(range(6))), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.step = lambda: gradients.append(model.head_weight.grad / 6)
    data = StepData(batches, drawn.ref_logps.double(), drawn.advantages.double())
    train.train_step(model, optimizer, data, job.options)
    assert len(batches) > 1
    torch.testing.assert_close(gradients[0], expected, rtol=1e-4, atol=1e-6)


def test_pairs_are_right_against_wrong_from_the_weights_of_the_step(argv):
    job = job_of(argv, "--loss", "mio", "--on_policy")
    drawn = draw_pairs(job, 1, rows=range(12))
    assert 3 < len(drawn.pairs) <= 12 and drawn.advantages is None
    assert len({*drawn.pairs.lines}) == len(drawn.pairs)  # at most one pair for each prompt
    for pair, line in zip(drawn.pairs, drawn.pairs.lines):
        assert (grade(None, None, pair.chosen), grade(None, None, pair.rejected)) == (1, 0)
        assert pair.prompt == job.tokenizer.prompt_ids(QUESTIONS[line - 1]["prompt"])
    expected = [[single_logp(job.reference, p, side) for side in (1, 2)] for p in drawn.pairs]
    torch.testing.assert_close(drawn.ref_logps, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert drawn.metrics.keys() == {"reward", "cut", "num_drawn"}
    move(job.model, scale=0.3)
    moved = draw_pairs(job, 1, rows=range(12))
    assert list(moved.pairs) != list(drawn.pairs)
    expected = [[single_logp(job.reference, p, side) for side in (1, 2)] for p in moved.pairs]
    torch.testing.assert_close(moved.ref_logps, torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_policy_and_reference_agree_at_step_0_with_bfloat16_weights(dtype, argv):
    job = job_of(argv, "--loss", "rlhf", "--weights", "bfloat16", "--dtype", dtype)
    assert draw_pairs(job, 1, rows=[0, 1, 2]).metrics["kl"] == 0


def drawn_texts(monkeypatch, *texts: str) -> None:
    """Lets the policy answer each prompt with these texts in turn; "!" marks one that is cut."""

    def sample_ids(model, prompts, max_new_tokens, **how):
        answers = [[*text.strip("!").encode()] + [257] * (text[-1:] != "!") for text in texts]
        return answers * (len(prompts) // len(texts))

    monkeypatch.setattr(on_policy, "sample_ids", sample_ids)


def length(key: str, text: str) -> float:
    """A grader of one's own, whose scores are fractions."""
    return len(text) / 10


@pytest.fixture
def own_grader(argv, tmp_path, monkeypatch) -> list[str]:
    """Flags of a run on questions that `length` grades."""
    monkeypatch.setattr(on_policy, "grade_answer", grading.grade_answer)
    monkeypatch.setitem(grading.GRADERS, "length", length)
    rows = [row | {"grade": "length"} for row in QUESTIONS]
    return [*argv, "--data", str(write_rows(tmp_path / "own.jsonl", rows))]


def test_the_best_answer_is_paired_with_the_worst(own_grader, monkeypatch):
    """Their scores are 0.2, 0.5, 0 (cut off), 0.1, 0.5 and 0."""
    flags = ("--on_policy", "--samples", "6")
    drawn_texts(monkeypatch, "aa", "bbbbb", "cccc!", "d", "eeeee", "")
    drawn = draw_pairs(job_of(own_grader, *flags), 1, rows=[0, 4])
    assert [(p.chosen, p.rejected) for p in drawn.pairs] == [([*b"bbbbb", 257], [*b"cccc"])] * 2
    assert [*drawn.pairs.lines] == [1, 5]
    assert drawn.metrics["reward"] == pytest.approx(1.3 / 6)
    assert drawn.metrics["cut"] == pytest.approx(1 / 6)
    assert drawn.metrics["num_drawn"] == 2 * (3 + 6 + 4 + 2 + 6 + 1)
    drawn_texts(monkeypatch, "aa", "bb", "cc", "dd", "ee", "ff")  # equal scores give no pair
    assert len(draw_pairs(job_of(own_grader, *flags), 1, rows=[0, 4]).pairs) == 0


def test_rlhf_is_rewarded_by_a_grader_of_ones_own(own_grader, monkeypatch):
    """At the reference the returns are the scores: 0.2, 0.5, 0 (cut off) and 0.1."""
    drawn_texts(monkeypatch, "aa", "bbbbb", "cccc!", "d")
    drawn = draw_pairs(job_of(own_grader, "--loss", "rlhf"), 1, rows=[3])
    expected = [[0.2 - 0.6 / 3, 0.5 - 0.3 / 3], [0.0 - 0.8 / 3, 0.1 - 0.7 / 3]]
    torch.testing.assert_close(drawn.advantages, torch.tensor(expected), atol=1e-5, rtol=0)
    assert drawn.metrics["reward"] == pytest.approx(0.2) and drawn.metrics["cut"] == 0.25


@pytest.mark.parametrize("flags", [["--on_policy"], ["--loss", "rlhf"]])
def test_steps_with_equal_rewards_say_so_once(flags, argv, monkeypatch, capsys):
    text = "in this step the answers to each prompt have equal rewards, which give no gradient"
    on_policy.say_once.cache_clear()  # another test may have been told
    train.main([*argv, *flags, "--max_steps", "1"])
    assert text not in capsys.readouterr().out  # half of the answers are right
    monkeypatch.setattr(on_policy, "grade_answer", lambda *_: 0.0)
    out = train.main([*argv, *flags, "--overwrite", "--epochs", "2"])
    assert [row["reward"] for row in metrics(out)[1:]] == [0.0] * (8 if "rlhf" in flags else 4)
    assert capsys.readouterr().out.count(text) == 1


def test_the_bar_shows_the_reward_and_the_share_cut_off(argv, monkeypatch, capsys):
    monkeypatch.setattr(train.sys.stderr, "isatty", lambda: True)
    row = metrics(train.main([*argv, "--loss", "rlhf", "--max_steps", "1"]))[1]
    shown = capsys.readouterr().err
    assert f"reward={row['reward']:.3g}, cut off={row['cut']:.3g}" in shown
    assert "margin=" not in shown  # drawn answers are neither chosen nor rejected


def test_each_step_and_each_seed_draws_other_answers_from_the_same_weights(argv):
    job = job_of(argv, "--loss", "rlhf")
    one, again, next_step = (draw_pairs(job, step, rows=[0, 1, 2]) for step in (1, 1, 2))
    assert list(one.pairs) == list(again.pairs) != list(next_step.pairs)
    other_seed = job._replace(options=dataclasses.replace(job.options, seed=1))
    assert list(draw_pairs(other_seed, 1, rows=[0, 1, 2]).pairs) != list(one.pairs)


def test_adapters_draw_as_the_merged_model_does_and_stay(argv):
    job = job_of(argv, "--loss", "rlhf", "--lora_rank", "3")
    at_start = draw_pairs(job, 1, rows=[0, 1, 2])
    assert at_start.metrics["kl"] == pytest.approx(0, abs=1e-6)
    move(job.model, scale=0.3)
    before = copy.deepcopy(job.model.state_dict())
    drawn = draw_pairs(job, 1, rows=[0, 1, 2])
    after = job.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert list(drawn.pairs) != list(at_start.pairs) and abs(drawn.metrics["kl"]) > 1e-3
    merged = merge_lora(copy.deepcopy(job.model), torch.float32)
    assert list(draw_pairs(job._replace(model=merged), 1, rows=[0, 1, 2]).pairs) == [*drawn.pairs]


# --- How much is drawn ----------------------------------------------------------------------------


def options_of(**changes) -> train.Options:
    return train.Options(**{"loss": "rlhf", "batch_size": 32} | changes)


@pytest.mark.parametrize("samples", [2, 4, 8, 16, 32, 64])
def test_a_step_of_rlhf_draws_twice_as_many_answers_as_pairs(samples):
    options = options_of(samples=samples)
    check_draws(options)
    assert prompts_per_step(options) * samples == 64
    assert prompts_per_step(options_of(loss="mio", on_policy=True, samples=samples)) == 32


def test_samples_that_do_not_divide_the_answers_of_a_step_are_refused():
    for samples in (3, 24, 10, 128):
        with pytest.raises(ValueError, match=f"--samples {samples}: .*even.*64.*--batch_size"):
            check_draws(options_of(samples=samples))
        check_draws(options_of(loss="mio", on_policy=True, samples=samples))  # one pair each
        check_draws(options_of(loss="mio", samples=samples))  # draws nothing
    for samples, batch_size in ((3, 3), (5, 10)):  # divides, but is odd
        with pytest.raises(ValueError, match="even"):
            check_draws(options_of(samples=samples, batch_size=batch_size))


def test_a_run_draws_and_says_how_many(argv, monkeypatch, capsys):
    counts = []

    def sample_ids(model, prompts, max_new_tokens, *, stop_ids, seed):
        counts.append(len(prompts))
        assert max_new_tokens == 5 and stop_ids == {257}
        return [[i % 3, 257] for i in range(len(prompts))]

    monkeypatch.setattr(on_policy, "sample_ids", sample_ids)
    train.main([*argv, "--loss", "rlhf", "--max_steps", "2"])
    assert counts == [12, 12]  # twice --batch_size 6
    text = " ".join(capsys.readouterr().out.split())
    assert "4 answers to each" in text and "3 prompts each" in text
    flags = ["--overwrite", "--batch_size", "32", "--max_steps", "0"]
    train.main([*argv, "--loss", "rlhf", *flags])
    assert "16 prompts each" in " ".join(
        capsys.readouterr().out.split()
    )  # 16 * 4 answers make 32 pairs
    train.main([*argv, "--on_policy", *flags])
    assert "32 prompts each" in " ".join(capsys.readouterr().out.split())


# --- Runs -----------------------------------------------------------------------------------------


def test_a_step_without_pairs_changes_nothing(argv, monkeypatch):
    monkeypatch.setattr(on_policy, "grade_answer", lambda *_: 1.0)
    out = train.main([*argv, "--on_policy", "--epochs", "2", "--save_every", "1"])
    rows = metrics(out)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and rows[1]["reward"] == 1.0
    assert rows[-1]["loss"] is None and rows[-1]["eval_rewards/chosen"] == 0.0
    longer = train.main(["--resume", "--out", str(out), "--epochs", "3"])
    assert metrics(longer)[-1]["step"] == 6


@pytest.mark.parametrize("flags", [["--loss", "rlhf"], ["--on_policy", "--loss", "dpo"]])
def test_the_policy_learns_what_is_graded(flags, argv):
    steps = ["--epochs", "10", "--lr", "5e-3", "--schedule", "constant", "--eval_every", "100"]
    rows = metrics(train.main([*argv, *flags, *steps]))[1:]
    rewards = torch.tensor([row["reward"] for row in rows])
    quarter = len(rows) // 4
    assert rewards[-quarter:].mean() > rewards[:quarter].mean() + 0.2
    assert ("kl" in rows[0]) == ("rlhf" in flags) and rows[0]["num_drawn"] > 0


def test_a_run_on_policy_has_a_folder_of_its_own():
    for flags, out in ((["--loss", "mio"], "out/mio"), (["--on_policy"], "out/mio-on-policy")):
        options = parse_options(flags)
        assert options.out == out


def test_what_cannot_be_drawn_is_refused_in_one_line(argv, pairs_file, tmp_path):
    choices = [{"prompt": "1 + 1 =", "choices": ["2", "3"], "gold": 0}]
    choices = write_rows(tmp_path / "choices.jsonl", choices)
    long = write_rows(tmp_path / "long.jsonl", [QUESTIONS[0] | {"prompt": "x" * 251}])
    for flags, message in (
        (["--loss", "rlhf", "--data", pairs_file], f"{pairs_file}: .*must be questions"),
        (["--on_policy", "--data", choices], f"{choices}: .*must be questions"),
        (["--on_policy", "--data", long], f"{long}:1: .*257.*256.*lower --max_new_tokens"),
        (["--loss", "rlhf", "--samples", "3"], "--samples 3: must be even and divide 12"),
        (["--loss", "rlhf", "--samples", "8"], "--samples 8: .*--batch_size"),
        (["--loss", "kto", "--on_policy"], "--on_policy: not supported by --loss kto"),
        (["--loss", "rlhf", "--on_policy"], "--on_policy: not supported by --loss rlhf"),
    ):
        assert re.search(message, refused(*argv, *flags)), message
        assert not (tmp_path / "out").exists()
