"""The built-in task: its problems, its base model and pairs, and the demonstration in small."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from conftest import tiny_model
from runs import refused

import train
from data import load_pairs
from mio import LOSSES
from support import builtin_task, sampling
from support.builtin_task import (
    base_columns,
    is_correct,
    make_base,
    make_pairs,
    prepare,
    problems,
    solution,
    split_of,
    task_columns,
)
from support.figures import Column, read_columns
from support.files import digest_file
from support.tokenizers import byte_tokenizer

WRONG = "1+1=2\n#### 1000"


def shrink(monkeypatch, **base) -> None:
    """A base model that is checked every second step, and a few pairs."""
    small = {"batch_size": 8, "first_check": 2, "check_every": 2, "problems": 10, "max_steps": 12}
    monkeypatch.setattr(builtin_task, "BASE", builtin_task.BASE | small | base)
    pairs = {"prompts": 40, "held_out": 9, "samples": 3, "per_prompt": 2}
    monkeypatch.setattr(builtin_task, "PAIRS", pairs)


# --- Problems -------------------------------------------------------------------------------------


def test_a_solution_is_worked_out_and_verified():
    assert solution("7+9-3+5\n") == "7+9=16\n16-3=13\n13+5=18\n#### 18"
    assert solution("0-9-9+1\n") == "0-9=-9\n-9-9=-18\n-18+1=-17\n#### -17"
    for problem in problems("train", 200, seed=0):
        answer = solution(problem)
        assert answer.endswith(f"\n#### {eval(problem)}")
        assert is_correct(problem, answer)
        assert is_correct(problem, answer.rpartition("\n")[2])
        assert not is_correct(problem, answer + "0")
        assert not is_correct(problem, answer + "\n")
        assert not is_correct(problem, answer.replace("#### ", ""))


def test_splits_are_disjoint_for_any_seed_and_reproducible():
    splits = {
        (split, seed): set(problems(split, 150, seed))
        for split in ("train", "validation", "test")
        for seed in (0, 1)
    }
    assert all(len(split) == 150 for split in splits.values())
    for one, left in splits.items():
        for other, right in splits.items():
            assert one[0] == other[0] or not left & right
    assert splits["train", 0] != splits["train", 1]
    assert problems("test", 50, 3) == problems("test", 50, 3) != problems("test", 50, 4)
    numbers = {int(n) for problem in splits["train", 0] for n in problem if n.isdigit()}
    assert numbers == set(range(10))


def test_problems_are_those_of_the_published_results():
    assert problems("train", 2, seed=[0, 0]) == ["8+6+5+2\n", "0-1-8-6\n"]
    assert problems("validation", 2, seed=0) == ["3-8-1-5\n", "0+5+4+2\n"]
    assert problems("test", 2, seed=0) == ["5-3+0-5\n", "4-0-5-7\n"]


# --- The base model -------------------------------------------------------------------------------


class Training:
    """Stands in for make_optimizer and train_step: each step adds 1 to a weight, and answers are
    right at each check as often as `accuracies` say."""

    def __init__(self, monkeypatch, *accuracies):
        self.rates, self.batches, self.weights, self.questions = [], [], [], None
        self.accuracies = iter(accuracies)
        monkeypatch.setattr(builtin_task, "sample_answers", self.answers)

    def make_optimizer(self, model, options):
        self.model, self.options = model, options
        return torch.optim.SGD(model.parameters(), options.lr)

    def train_step(self, model, optimizer, data, options):
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.batches.append([batch.targets for batch in data.batches])
        self.weights.append(model.model["norm"].weight[0].item())
        with torch.no_grad():
            model.model["norm"].weight.add_(1)

    def answers(self, model, tokenizer, prompts, temperature):
        assert temperature == 0
        self.questions, right = prompts, round(next(self.accuracies) * len(prompts))
        return [[solution(q) if i < right else WRONG] for i, q in enumerate(prompts)]

    def make(self, folder, seed=0):
        folder.mkdir(exist_ok=True)
        options = train.Options(loss="sft", lr=2e-3, seed=seed, device="cpu")
        make_base(folder, options, self.make_optimizer, self.train_step)
        return json.loads((folder / "base.json").read_text())


def assert_trained_on_new_problems(training: Training, seed: int) -> None:
    """Each step trains on eight problems of its own, with their solutions."""
    for step, batches in enumerate(training.batches):
        text = "".join(byte_tokenizer().decode(targets.tolist()) for targets in batches)
        solutions = [solution(problem) for problem in problems("train", 8, seed=[seed, step])]
        assert sorted(text.split("<|end|>")[:-1]) == sorted(solutions)


def test_the_base_model_trains_up_to_its_target_accuracy(tmp_path, monkeypatch, capsys):
    shrink(monkeypatch)
    training = Training(monkeypatch, 0.0, 0.4, 0.6)
    record = training.make(tmp_path / "base")
    assert (record["steps"], record["validation_accuracy"]) == (6, 0.6)
    assert training.questions == problems("validation", 10, seed=0)
    assert training.rates == [pytest.approx(2e-3 * step / 50) for step in range(1, 7)]
    assert training.weights == [1, 2, 3, 4, 5, 6]
    assert_trained_on_new_problems(training, seed=0)
    assert "6 steps, 60.0% right" in capsys.readouterr().out
    training.make(tmp_path / "base")  # the finished base is found, so nothing is trained
    assert capsys.readouterr().out == f"base model: found in {tmp_path / 'base'}\n"
    (tmp_path / "base" / "model.safetensors").unlink()
    again = Training(monkeypatch, 0.5)  # the target itself is enough
    assert again.make(tmp_path / "base")["steps"] == 2
    tiny_model().save_pretrained(tmp_path / "base")  # other weights count as another model
    assert Training(monkeypatch, 0.55).make(tmp_path / "base")["steps"] == 2
    for name in ("config.json", "tokenizer_config.json"):
        file = tmp_path / "base" / name
        file.write_text(file.read_text() + " ")
        assert Training(monkeypatch, 0.55).make(tmp_path / "base")["steps"] == 2
    other = Training(monkeypatch, 0.62)
    assert other.make(tmp_path / "base", seed=1)["steps"] == 2  # another seed is another model
    assert_trained_on_new_problems(other, seed=1)
    assert not torch.equal(other.model.head_weight, again.model.head_weight)


def test_accuracy_is_not_measured_before_the_first_check(tmp_path, monkeypatch):
    shrink(monkeypatch, first_check=7)
    assert Training(monkeypatch, 0.4, 0.9).make(tmp_path / "base")["steps"] == 10  # after step 8


def test_after_many_steps_the_rate_is_constant(tmp_path, monkeypatch):
    shrink(monkeypatch, check_every=60, max_steps=60)
    training = Training(monkeypatch, 0.6)
    training.make(tmp_path / "base")
    assert training.rates[48:] == [pytest.approx(2e-3 * 49 / 50)] + [2e-3] * 11


def test_a_base_model_that_does_not_learn_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    shrink(monkeypatch)
    with pytest.raises(ValueError, match="--seed 3: .*target accuracy; change --seed"):
        Training(monkeypatch, *[0.1] * 6).make(tmp_path / "base", seed=3)
    assert not (tmp_path / "base" / "base.json").exists()
    last = Training(monkeypatch, *[0.1] * 5, 0.6)  # reaches the accuracy at the last check
    assert last.make(tmp_path / "base")["steps"] == 12


def test_the_files_of_others_are_not_replaced(tmp_path, monkeypatch):
    shrink(monkeypatch)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no base model; choose --out in another"):
        Training(monkeypatch).make(tmp_path / "base")
    assert (tmp_path / "base" / "config.json").read_text() == "{}"
    (tmp_path / "base" / "base.json").write_text("{}")  # an interrupted run of this program
    assert Training(monkeypatch, 0.6).make(tmp_path / "base")["steps"] == 2


# --- Pairs and evaluation -------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path):
    """A folder with a tiny model in place of the base model."""
    tiny_model().save_pretrained(tmp_path / "base")
    byte_tokenizer().save(tmp_path / "base")
    return tmp_path / "base"


def rows_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_pairs_are_right_against_wrong_answers_of_the_base_model(base, monkeypatch, capsys):
    calls = []

    def answers(model, tokenizer, prompts, samples, seed):
        calls.append((len(prompts), samples, seed))
        wrong = [WRONG, "", " ", "#### x", WRONG]
        return [
            [solution(p), *wrong, solution(p)] if i % 3 else wrong for i, p in enumerate(prompts)
        ]

    monkeypatch.setattr(builtin_task, "sample_answers", answers)
    settings = {"prompts": 30, "held_out": 12, "samples": 7, "per_prompt": 2}
    monkeypatch.setattr(builtin_task, "PAIRS", settings)
    make_pairs(base, 5, "cpu")
    assert calls == [(30, 7, 5), (12, 7, 5)]
    for name, count, split in (("pairs", 30, "train"), ("heldout_pairs", 12, "test")):
        rows = rows_of(base / f"{name}.jsonl")
        assert len(rows) == count - count // 3  # equal answers count once: one pair for each prompt
        for row in rows:
            assert row["chosen"] == solution(row["prompt"])
            assert row["rejected"] == WRONG
            assert split_of(row["prompt"]) == split
    graded = rows_of(base / "problems.jsonl")
    assert [row["prompt"] for row in graded] == problems("train", 30, seed=[5, 1])
    assert all(row["answer"] == solution(row["prompt"]) for row in graded)
    assert {row["grade"] for row in graded} == {"gsm8k"}
    capsys.readouterr()
    make_pairs(base, 5, "cpu")
    assert capsys.readouterr().out == f"pairs: found in {base}\n" and len(calls) == 2
    for name in ("pairs.jsonl", "heldout_pairs.jsonl", "problems.jsonl"):  # is made again
        (base / name).unlink()
        make_pairs(base, 5, "cpu")
        assert (base / name).exists()
    make_pairs(base, 6, "cpu")
    assert len(calls) == 10
    tiny_model(seed=1).save_pretrained(base)  # another base model has other pairs
    make_pairs(base, 6, "cpu")
    assert len(calls) == 12


def test_a_prompt_has_at_most_as_many_pairs_as_asked_for(base, monkeypatch):
    wrong = ["", " ", "1", "2", "3"]  # blank answers are in no pair

    def answers(model, tokenizer, prompts, **_):
        return [[*(f"{x}\n{solution(prompt)}" for x in "abc"), *wrong] for prompt in prompts]

    monkeypatch.setattr(builtin_task, "sample_answers", answers)
    settings = {"prompts": 5, "held_out": 3, "samples": 6, "per_prompt": 2}
    monkeypatch.setattr(builtin_task, "PAIRS", settings)
    make_pairs(base, 0, "cpu")
    rows = rows_of(base / "pairs.jsonl")
    assert len(rows) == 10
    assert [(row["chosen"][0], row["rejected"]) for row in rows] == [("a", "1"), ("b", "2")] * 5


def test_answers_that_are_no_utf8_give_no_pair_and_the_others_keep_their_tokens(
    base, monkeypatch, capsys
):
    """Each pair of the file is encoded as exactly the ids that the base model drew."""
    drawn = {}  # ids of a prompt -> ids of its answers

    def sample_ids(model, prompts, max_new_tokens, **_):
        answers = []
        for prompt in prompts:
            right = solution(bytes(prompt[1:]).decode()).encode()
            texts = [b"\xff" + right, right + b"\xc3", right, "é\n".encode() + right, b"\r\n 7 "]
            seen = drawn.setdefault(tuple(prompt), [])
            seen.append([*texts[len(seen)], 257])
            answers.append(seen[-1])
        return answers

    monkeypatch.setattr(sampling, "sample_ids", sample_ids)
    settings = {"prompts": 6, "held_out": 4, "samples": 5, "per_prompt": 2}
    monkeypatch.setattr(builtin_task, "PAIRS", settings)
    make_pairs(base, 0, "cpu")
    note = " ".join(capsys.readouterr().out.split())
    for name, count in (("pairs", 6), ("heldout_pairs", 4)):
        file = base / f"{name}.jsonl"
        dropped = f"({2 * count} answers dropped: not UTF-8)"
        assert f"{count} in {file} {dropped}" in note
        pairs = load_pairs(file, byte_tokenizer())
        assert len(pairs) == count and "\ufffd" not in file.read_text()
        for pair in pairs:
            answers = drawn[tuple(pair.prompt)]
            assert [pair.chosen, pair.rejected] == [answers[2], answers[4]]


def values_of(columns: dict[str, Column]) -> dict[str, list[float]]:
    return {name: column.values.tolist() for name, column in columns.items()}


def test_the_columns_of_the_task_grade_greedy_and_sampled_answers(monkeypatch):
    def answers(model, tokenizer, prompts, samples=1, temperature=1.0):
        assert all(split_of(prompt) == "test" for prompt in prompts)
        assert temperature == (0 if samples == 1 else 1.0)
        if samples == 1:
            return [[solution(p) if i % 2 else WRONG] for i, p in enumerate(prompts)]
        return [[solution(p)] * i + [WRONG] * (samples - i) for i, p in enumerate(prompts)]

    monkeypatch.setattr(builtin_task, "sample_answers", answers)
    columns = task_columns(None, None, 5)
    assert list(columns) == ["greedy", "pass@1", "pass@4"]
    assert columns["greedy"].estimate() == (0.4, pytest.approx(math.sqrt(0.06)), 5)
    values = values_of(columns)
    assert values["greedy"] == [0.0, 1.0] * 2 + [0.0]
    assert values["pass@1"] == pytest.approx(np.arange(5) / 4)
    assert values["pass@4"] == [0.0] + [1.0] * 4
    assert list(task_columns(None, None, 3, samples=6)) == [
        *("greedy", "pass@1", "pass@2", "pass@4", "pass@6")
    ]


def test_columns_of_the_base_model_are_computed_once(base, monkeypatch, capsys):
    def answer_with(*values: float) -> None:
        columns = {"greedy": Column(np.array(values))}
        monkeypatch.setattr(builtin_task, "task_columns", lambda *_: columns)

    answer_with(0.0, 1.0)
    assert values_of(base_columns(base, "cpu")) == {"greedy": [0.0, 1.0]}
    answer_with(1.0, 1.0)
    assert values_of(base_columns(base, "cpu")) == {"greedy": [0.0, 1.0]}
    assert capsys.readouterr().out.count("the base model on the held-out problems") == 1
    tiny_model(seed=1).save_pretrained(base)
    assert values_of(base_columns(base, "cpu")) == {"greedy": [1.0, 1.0]}


# --- The demonstration ----------------------------------------------------------------------------


def test_a_run_of_the_demonstration_names_the_files_of_its_seed(tmp_path, monkeypatch):
    shrink(monkeypatch)
    monkeypatch.setattr(builtin_task, "make_pairs", lambda *_: None)
    for seed, name in ((0, "base"), (3, "base-seed3")):
        options = train.Options(
            out=str(tmp_path / "run"), seed=seed, device="cpu", dtype="bfloat16"
        )
        for draws, data in ((False, "pairs.jsonl"), (True, "problems.jsonl")):
            training = Training(monkeypatch, 0.6)
            found = prepare(options, draws, training.make_optimizer, training.train_step)
            folder = tmp_path / name
            assert (found.init, found.data) == (str(folder), str(folder / data))
            assert found.eval_data == str(folder / "heldout_pairs.jsonl")
            if not draws:  # the base model does not depend on the flags of the run
                assert training.options == train.Options(
                    loss="sft", lr=2e-3, seed=seed, device="cpu"
                )


class Answers:
    """Stands in for sample_answers, and records how it is called. Half of the greedy
    answers on test problems are right at first, all of them later."""

    def __init__(self):
        self.calls = []

    def __call__(self, model, tokenizer, prompts, *, samples=1, temperature=1.0, seed=0):
        (split,) = {split_of(prompt) for prompt in prompts}
        self.calls.append((split, samples, temperature))
        if samples == 3:  # for pairs
            return [[solution(prompt), "#### 77", ""] for prompt in prompts]
        every = 1 if self.calls.count(("test", 1, 0)) == 2 else 2
        return [[WRONG if i % every else solution(p)] * samples for i, p in enumerate(prompts)]


def read_table(folder) -> dict:
    return json.loads((folder / "summary.json").read_text())["table"]


def test_the_demonstration_from_end_to_end_in_small(tmp_path, monkeypatch, capsys):
    """Checks which problems are trained on and graded, how answers are drawn, and every sign of the
    table."""
    answers, trained = Answers(), []

    def encode(example, tokenizer, original=builtin_task.encode_example):
        trained.append(split_of(example.prompt))
        assert (example.chosen, example.rejected) == (solution(example.prompt), None)
        return original(example, tokenizer)

    shrink(monkeypatch)
    monkeypatch.setattr(builtin_task, "encode_example", encode)
    monkeypatch.setattr(builtin_task, "sample_answers", answers)
    few = functools.partial(builtin_task.task_columns, count=60)
    monkeypatch.setattr(builtin_task, "task_columns", few)
    out = str(tmp_path / "sft")
    folder = train.main(["--loss", "sft", "--out", out, "--epochs", "1", "--max_steps", "2"])
    assert json.loads((tmp_path / "base" / "base.json").read_text())["steps"] == 2
    assert trained == ["train"] * 16
    graded = [("test", 1, 0), ("test", 4, 1.0)]
    pairs = [("train", 3, 1.0), ("test", 3, 1.0)]
    assert answers.calls == [("validation", 1, 0), *pairs, *graded, *graded]
    table = read_table(folder)
    assert table["base"]["greedy"]["mean"] == 0.5 and table["sft"]["greedy"]["mean"] == 1.0
    assert table["change"]["greedy"]["mean"] == 0.5
    assert table["sft"]["Δ chosen"]["mean"] > 0  # supervised training on the chosen
    assert table["sft"]["Δ chosen"]["n"] == 9
    # items.json holds the values behind the table; the pairs are those of the held-out file.
    columns, held_out = read_columns(folder / "items.json"), tmp_path / "base/heldout_pairs.jsonl"
    of_task = ["greedy", "pass@1", "pass@4"]
    assert list(columns) == ["base", "run"] and list(columns["base"]) == of_task
    assert list(columns["run"]) == [*of_task, "Δ chosen", "Δ rejected", "reward"]
    for row, name in (("base", "base"), ("run", "sft")):
        for title, column in columns[row].items():
            assert column.estimate()._asdict() == pytest.approx(table[name][title])
    names = [f"{digest_file(held_out)[:16]}:{line}" for line in range(1, 10)]
    assert columns["run"]["reward"].names.tolist() == names
    config = json.loads((folder / "train_config.json").read_text())
    assert config["init"] == str(tmp_path / "base")
    # The last step is saved, because the evaluation after it takes longer.
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000001"]

    capsys.readouterr()
    mio = train.main(["--loss", "mio", "--out", str(tmp_path / "mio"), "--max_steps", "1"])
    text = capsys.readouterr().out
    assert "base model: found" in text and "pairs: found" in text and "beta 1" in text
    assert "the base model on the held-out" not in text
    # A run from the demonstration's base model has its default of --beta, even with --init.
    command = ["--config", str(mio / "train_config.json"), "--loss", "dpo"]
    dpo = train.main([*command, "--out", str(tmp_path / "configured")])
    text = capsys.readouterr().out
    assert "beta 0.5" in text and "base model: found" not in text
    config = json.loads((dpo / "train_config.json").read_text())
    assert config["beta"] == 5 * LOSSES["dpo"].beta == 0.5
    assert config["init"] == str(tmp_path / "base") and "base" in read_table(dpo)
    # Another base model has other pairs and other values.
    monkeypatch.setattr(builtin_task, "BASE", builtin_task.BASE | {"batch_size": 4})
    train.main(["--loss", "dpo", "--out", str(tmp_path / "dpo"), "--max_steps", "1"])
    text = capsys.readouterr().out
    assert "base model: supervised" in text and "pairs: drawn" in text and "beta 0.5" in text
    assert "the base model on the held-out" in text


def test_a_base_model_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, capsys):
    shrink(monkeypatch, max_steps=2)
    monkeypatch.setattr(builtin_task, "sample_answers", lambda m, t, qs, **_: [[WRONG]] * len(qs))
    assert "change --seed" in refused("--out", tmp_path / "mio")
    assert not (tmp_path / "mio").exists()
    (tmp_path / "taken" / "base").mkdir(parents=True)
    (tmp_path / "taken" / "base" / "notes.txt").touch()
    assert "choose --out in another" in refused("--out", tmp_path / "taken" / "mio")
