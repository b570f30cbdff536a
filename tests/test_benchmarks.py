"""Benchmarks: choices against single sequences and lm-evaluation-harness, questions end to end."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHARED, tiny_model, write_rows
from test_eval import refused, single_logp

import eval as evaluation
from data import LAYOUT
from eval import answer_logps
from model import Llama
from support.grading import GRADERS
from support.questions import answer_columns, choice_columns, choice_rows, columns_of, read_items
from support.tokenizers import byte_tokenizer

torch.set_num_threads(1)  # more threads do not speed up such small models

# --- Choices --------------------------------------------------------------------------------------

CHOICES = [
    {"prompt": "Which?", "choices": ["a", "bb bb", "ccc", "dé"], "gold": 1},
    {"prompt": "Count: ", "choices": ["one", " two"], "gold": 0},
    {"prompt": "Last\n", "choices": ["x", "y", "z" * 40], "gold": 2},
]


def items_of(rows, tmp_path):
    return read_items(write_rows(tmp_path / "items.jsonl", rows))


def test_choices_share_a_prompt_and_have_the_log_probs_of_single_sequences(tmp_path):
    model, tokenizer, items = tiny_model(), byte_tokenizer(), items_of(CHOICES * 2, tmp_path)
    rows = choice_rows(model, tokenizer, "", items)
    logps = answer_logps(model, rows, *LAYOUT, torch.float32)
    assert len(logps) == 6
    for row, found in zip(CHOICES * 2, logps):
        for choice, logp in zip(row["choices"], found.tolist()):
            space = "" if row["prompt"][-1].isspace() or choice[0] == " " else " "
            ids = tokenizer.encode(space + choice)
            expected = single_logp(model, tokenizer.prompt_ids(row["prompt"]), ids)
            assert logp == pytest.approx(expected, rel=1e-5)


def test_accuracies_count_characters_and_bytes_without_the_joining_space(tmp_path):
    rows = [{"prompt": "q", "choices": [" éé", "abc"], "gold": gold} for gold in (0, 1)]
    logps = [np.array([-3.1, -4.0])] * 2  # -1.55 and -1.33 a character, -0.78 and -1.33 a byte
    columns = choice_columns(items_of(rows, tmp_path), logps)
    found = {name: column.values.tolist() for name, column in columns.items()}
    assert found == {"acc": [1, 0], "acc_norm": [0, 1], "acc_bytes": [1, 0]}


def test_a_choice_that_the_model_cannot_read_is_named_by_file_and_line(tmp_path):
    model, items = tiny_model(max_position_embeddings=48), items_of(CHOICES, tmp_path)
    with pytest.raises(ValueError, match="x.jsonl:3: prompt and answer may take 46 tokens, over"):
        tight = tiny_model(max_position_embeddings=45)
        choice_rows(tight, byte_tokenizer(), "x.jsonl", items)
    assert len(choice_rows(model, byte_tokenizer(), "x.jsonl", items)) == 3


def test_log_probs_and_accuracies_are_those_of_lm_evaluation_harness(
    checkpoint, tmp_path, monkeypatch
):
    """Uses a real checkpoint if one lies beside the project, and otherwise the tiny model."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    import transformers
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    random, rows = np.random.default_rng(0), []
    units = ["", " dollars", " of them", " hours a day", " à la carte"]
    for i in range(60):
        a, b = random.integers(2, 100, 2)
        answers = dict.fromkeys((a + b, a * b, a - b, b))  # equal log-probs would be a tie
        choices = [f"{n}{units[random.integers(5)]}" for n in answers][: 2 + i % 3]
        prompt = f"Question: Ann has {a} apples and buys {b} more. How many has she?\nAnswer:"
        rows.append({"prompt": prompt, "choices": choices, "gold": i % len(choices)})
    folder, file = SHARED / "models/gsm-llama", write_rows(tmp_path / "choices.jsonl", rows)
    folder = str(folder if folder.is_dir() else checkpoint)
    out = tmp_path / "results.json"
    means = evaluation.main([folder, "--data", str(file), "--out", str(out)])[folder]
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    theirs = HFLM(
        pretrained=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
        add_bos_token=True, batch_size=16, device="cpu",
    )  # fmt: skip
    names = ("acc", "acc_norm", "acc_bytes")
    task = ConfigurableTask(config={
        "task": "choices", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(file)}}, "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}", "doc_to_choice": "choices", "doc_to_target": "gold",
        "metric_list": [{"metric": name} for name in names],
    })  # fmt: skip
    own = TaskManager(include_defaults=False)  # indexing the harness's own tasks takes a while
    results = lm_eval.simple_evaluate(
        theirs, tasks=[task], task_manager=own, bootstrap_iters=0, log_samples=True
    )
    (samples,) = results["samples"].values()
    samples.sort(key=lambda sample: sample["doc_id"])
    (ours,) = json.loads(out.read_text())[folder]["answers"].values()
    assert len(ours) == len(samples) == 60
    for logps, sample in zip(ours, samples):
        expected = [response[0] for response in sample["filtered_resps"]]
        assert logps == pytest.approx(expected, abs=1e-3)
    (figures,) = results["results"].values()
    assert means == pytest.approx({name: figures[f"{name},none"] for name in names}, abs=1e-9)
    assert 0 < means["acc"] < 1


# --- Questions ------------------------------------------------------------------------------------

QUESTIONS = [
    {"question": "1 + 1?", "answer": "It is <<1+1=2>>2\n#### 2"},
    {"question": "2 + 2?", "answer": "#### 4"},
    {"question": "3 + 3?", "answer": "#### 6"},
]


def test_published_rows_are_answered_and_end_at_a_stop_text(
    checkpoint, tmp_path, monkeypatch, capsys
):
    prompts_read = []

    def generate(self, prompts, max_new_tokens, is_done=None, **how):
        texts = [bytes(prompt[1:]).decode() for prompt in prompts]
        prompts_read.extend(texts)
        assert max_new_tokens == 90
        assert is_done(0, list(b"a Question:")) and not is_done(1, list(b"a question"))
        return [
            [*b"#### 4 it is\nQuestion: 9"] if "3" in text else [*b"so 4", 257] for text in texts
        ]

    monkeypatch.setattr(Llama, "generate", generate)
    file, out = write_rows(tmp_path / "gsm.jsonl", QUESTIONS), tmp_path / "results.json"
    argv = [str(checkpoint), "--data", str(file), "--out", str(out)]
    found = evaluation.main([*argv, "--max_new_tokens", "90"])[str(checkpoint)]
    assert found == {"strict": 0, "flexible": pytest.approx(1 / 3), "cut": 0}
    assert prompts_read == [f"Question: {q['question']}\nAnswer:" for q in QUESTIONS]
    record = json.loads(out.read_text())[str(checkpoint)]
    title = "gsm.jsonl, greedy"
    assert record["answers"] == {title: [["so 4"], ["so 4"], ["#### 4 it is\n"]]}
    assert record["items"][title]["flexible"] == [0.0, 1.0, 0.0]
    assert record["sha256"].keys() == {str(file)}
    assert f"{title}\n\n" in capsys.readouterr().out


def test_flags_reach_the_draw_and_the_first_stop_text_ends_an_answer(
    checkpoint, tmp_path, monkeypatch
):
    calls = []

    def generate(self, prompts, max_new_tokens, **how):
        calls.append({"max_new_tokens": max_new_tokens, **how})
        return [[*b"4 b a"]] * len(prompts)

    monkeypatch.setattr(Llama, "generate", generate)
    row = {"prompt": "2+2?", "answer": "4", "grade": "exact", "stop": ["a", "b"]}
    file = write_rows(tmp_path / "sums.jsonl", [row])
    flags = {"max_new_tokens": 9, "seed": 7, "temperature": 0.5, "top_p": 0.25}
    argv = [str(checkpoint), "--data", str(file)]
    found = evaluation.main(
        [*argv, "--n=2", "--batch_size=3", *(f"--{k}={v}" for k, v in flags.items())]
    )
    assert found[str(checkpoint)]["exact pass@1"] == 1
    (how,) = calls
    assert {name: how[name] for name in flags} == flags
    assert how["rows"] == 3 and how["stop_ids"] == {257}
    for n in ("2", "1"):
        evaluation.main([*argv, "--n", n, "--max_new_tokens", "9"])
    assert [how["temperature"] for how in calls] == [0.5, 1, 0]


def test_answers_belong_to_their_items_and_those_without_an_end_are_cut(tmp_path, monkeypatch):
    """A graded answer ends before the end token; what was cut off is graded as it is."""
    rows = [{"prompt": p, "answer": p, "grade": "exact", "stop": ["!"]} for p in ("bb", "a")]
    items, model = items_of(rows, tmp_path), tiny_model()
    endings = iter([[257], [*b"!"], [*b" "], [*b"?"]])  # of the answers to "a", then to "bb"

    def generate(prompts, max_new_tokens, **how):
        return [[*prompt[1:], *next(endings)] for prompt in prompts]

    monkeypatch.setattr(model, "generate", generate)
    options = SimpleNamespace(
        n=2, max_new_tokens=9, temperature=1, top_p=1, seed=0, batch_size=None
    )
    columns, texts = answer_columns(model, byte_tokenizer(), "", items, options)
    assert texts == [["bb ", "bb?"], ["a", "a"]]
    found = {name: column.values.tolist() for name, column in columns.items()}
    assert found["exact pass@1"] == [0.5, 1] and found["cut"] == [1, 0]


def test_a_grader_of_ones_own_has_a_column_with_the_mean_score(
    checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(GRADERS, "length", lambda key, text: len(text) / int(key))
    rows = [{"prompt": p, "answer": "8", "grade": "length"} for p in ("a", "bb")]
    file, texts = write_rows(tmp_path / "own.jsonl", rows), ["1234", "12", "12345678", "1234"]

    def generate(self, prompts, max_new_tokens, **how):
        assert len(prompts) in (2, 4)
        return [[*text.encode(), 257] for text in texts[: len(prompts)]]

    monkeypatch.setattr(Llama, "generate", generate)
    argv, name = [str(checkpoint), "--data", str(file), "--max_new_tokens", "9"], str(checkpoint)
    assert evaluation.main(argv)[name] == {"length": (0.5 + 0.25) / 2, "cut": 0}
    found = evaluation.main([*argv, "--n", "2"])[name]
    assert found == {"length": (0.375 + 0.75) / 2, "cut": 0}
    assert "| length | cut % |" in capsys.readouterr().out
    rows[1]["grade"] = "width"
    write_rows(file, rows)
    message = "own.jsonl:2: the grade 'width' is unknown; choose from gsm8k, math, exact, letter, l"
    assert message in refused(argv, capsys)


def test_an_item_without_a_value_has_nan():
    columns = columns_of([{"strict": 1.0}, {"math": 0.0}, {"strict": 0.0}])
    found = {name: column.values.tolist() for name, column in columns.items()}
    assert found == {"strict": [1, pytest.approx(np.nan, nan_ok=True), 0],
                     "math": [pytest.approx(np.nan, nan_ok=True), 0,
                              pytest.approx(np.nan, nan_ok=True)]}  # fmt: skip
