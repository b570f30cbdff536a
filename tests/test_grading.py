"""Graders against tables of cases; choices against one sequence at a time and the harness."""

import json
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHARED, needs_shared, tiny_model, write_rows
from test_data import single_logp

import eval as evaluation
from data import Pair, byte_tokenizer
from eval import GRADERS, flexible, grade_values, letter, math_answer, normalised, strict


@pytest.mark.parametrize(
    "text, first, last",
    [
        ("2 + 3 = 5\n#### 5", 5, 5),
        ("#### 1,234,567", 1234567, 1234567),
        ("#### $18.00", 18, 18),
        ("#### -7.", -7, -7),
        ("#### -$3.50", -3.5, -3.5),
        ("####12\nQuestion: of 3 apples", 12, 3),  # strict takes the first, flexible the last
        ("so 16-3=13 are left", None, 13),
        ("5-3", None, 3),  # a minus sign between numbers is not part of one
        ("it fell to -4 degrees.", None, -4),
        ("she pays $1,250.75, or 10% more.", None, 10),
        (".5 of it", None, 0.5),
        ("#### x", None, None),
        ("#### 1.2.3", None, Fraction(3, 10)),
        ("## 5 is a heading", None, 5),
        ("", None, None),
    ],
)
def test_numbers_are_found_and_compared_as_numbers(text, first, last):
    assert strict(text) == first and flexible(text) == last


@pytest.mark.parametrize(
    "left, right",
    [
        (r"\frac{1}{2}", "0.5"),
        (r"\dfrac12", "1/2"),
        (r"-\tfrac{3}{4}", "-.75"),
        (r"$1{,}000$".replace("{,}", ","), "1000"),
        (r"\text{B}", "B"),
        (r"5 \text{ cm}", "5"),
        (r"12\%", "12"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"\left(1, 2\right)", "(1,2)"),
        (r"x = 7", "7"),
        (r"\sqrt3", r"\sqrt{3}"),
        (r"\$4.50", "9/2"),
    ],
)
def test_formulas_that_mean_the_same_are_equal(left, right):
    assert normalised(left) == normalised(right)


def test_formulas_that_differ_are_not():
    different = [r"\frac13", r"\frac31", "-5", "5", r"\sqrt{2}", "2", "(1,2)", "(2,1)", "x"]
    assert len({normalised(text) for text in different}) == len(different)
    assert normalised("1/0") == "1/0"  # no number, and no reason to stop


def test_theerror_box_counts_with_its_braces_balanced():
    assert math_answer(r"\boxed{3} no, \boxed{\frac{1}{\sqrt{2}}} it is") == r"\frac{1}{\sqrt{2}}"
    assert math_answer(r"The final answer is $\frac{6}{4}$. I hope it is correct.") == Fraction(
        3, 2
    )
    assert math_answer("Final Answer: The final answer is 0.25.") == Fraction(1, 4)
    assert math_answer("The final answer is 3. No. The final answer is 4.") == 4
    assert math_answer(r"so \fbox{5}") == 5
    assert math_answer(r"\boxed{3") is None and math_answer("it is 3") is None
    _, readings = GRADERS["math"]
    for key, wrong in (("2x", "2x^2"), ("2x", "2y"), ("3", "3x"), ("3", "3i"), ("125", "12_5")):
        assert grade_values("math", key, [rf"\boxed{{{wrong}}}"]) == {"math": 0.0}
    assert grade_values("math", r"so \boxed{0.5}", [r"\boxed{\dfrac{1}{2}}"]) == {"math": 1.0}
    assert list(readings) == ["math"]


@pytest.mark.parametrize(
    "text, found",
    [
        ("The answer is (C).", "C"),
        ("the answer is B because A is wrong", "B"),
        ("Answer: **D**", "D"),
        ("(A)", "A"),
        ("C. ducks", "C"),
        ("B", "B"),
        ("C\nFor ducks swim", "C"),
        ("C: ducks", "C"),
        ("C) ducks", "C"),
        ("(C) because (B) flies", "C"),
        ("**C**", "C"),
        ("A. ducks\nB. geese\n**B**", "B"),
        ("So it must be option D", "D"),
        ("The correct choice is C.", "C"),
        ("**Correct option:** B, for option A cannot swim", "B"),
        ("**Answer**: D", "D"),
        ("the answer is (A). No: the answer is (B), not (C)", "B"),
        ("the answer is A because it swims", "A"),
        ("I", "I"),
        # Words are no letters, and lines after the first begin nothing.
        ("A duck is what it is, (D)", "D"),
        ("The answer is a duck: (B)", "B"),
        ("Answer: A duck, so (B)", "B"),
        ("The answer: I believe it is (C)", "C"),
        ("I'd say\nC. ducks", None),
        ("U.S. ducks", None),
        ("option a", None),
        ("An apple", None),
        ("", None),
    ],
)
def test_letters(text, found):
    assert letter(text) == found


def test_several_answers_give_pass_at_k_and_the_vote():
    texts = ["#### 5", "it is 5", "#### 4", "#### 4", "no"]
    values = grade_values("gsm8k", "work\n#### 4", texts)
    assert values["strict pass@1"] == pytest.approx(2 / 5)
    assert values["strict pass@2"] == pytest.approx(1 - math.comb(3, 2) / math.comb(5, 2))
    assert values["strict pass@5"] == 1 and values["strict maj@5"] == 1
    assert values["flexible maj@5"] == 0  # two against two: the first of equals, 5
    assert grade_values("exact", " yes ", ["yes", "Yes"])["exact pass@1"] == 0.5
    assert grade_values("letter", "c", ["(C)"]) == {"letter": 1.0}
    assert grade_values("gsm8k", "4", ["no"]) == {"strict": 0.0, "flexible": 0.0}


# --- Choices --------------------------------------------------------------------------------------

CHOICES = [
    {"prompt": "Which?", "choices": ["a", "bb bb", "ccc", "dé"], "gold": 1},
    {"prompt": "Count: ", "choices": ["one", " two"], "gold": 0},
    {"prompt": "Last\n", "choices": ["x", "y", "z" * 40], "gold": 2},
]


def items_of(rows, tmp_path):
    return evaluation.read_items(write_rows(tmp_path / "items.jsonl", rows))


def test_choices_share_a_prompt_and_keep_the_log_probs_of_single_sequences(tmp_path):
    model, tokenizer = tiny_model(), byte_tokenizer()
    columns, logps = evaluation.choice_columns(
        model, tokenizer, "", items_of(CHOICES * 9, tmp_path), "", torch.float32
    )
    for row, found in zip(CHOICES, logps):
        sizes = np.array([[1, len(c.strip()), len(c.strip().encode())] for c in row["choices"]])
        for choice, logp in zip(row["choices"], found):
            space = "" if row["prompt"][-1].isspace() or choice[0] == " " else " "
            ids = tokenizer.prompt_ids(row["prompt"]), tokenizer.encode(space + choice)
            expected = single_logp(model, Pair(*ids, []), 1).item()
            assert logp == pytest.approx(expected, rel=1e-5)
        best = (np.array(found)[:, None] / sizes).argmax(axis=0) == row["gold"]
        number = CHOICES.index(row)
        assert [
            columns[k].values[number] for k in ("acc", "acc_norm", "acc_bytes")
        ] == best.tolist()


def test_accuracies_count_characters_and_bytes_without_the_joining_space(tmp_path, monkeypatch):
    rows = [{"prompt": "q", "choices": [" éé", "abc"], "gold": gold} for gold in (0, 1)]
    logps = [torch.tensor([-3.1, -4.0])] * 2  # a character -1.55, -1.33; a byte -0.78, -1.33
    monkeypatch.setattr(evaluation, "answer_logps", lambda *_: logps)
    items = items_of(rows, tmp_path)
    columns, _ = evaluation.choice_columns(
        tiny_model(), byte_tokenizer(), "", items, "", torch.float32
    )
    found = {name: column.values.tolist() for name, column in columns.items()}
    assert found == {"acc": [1, 0], "acc_norm": [0, 1], "acc_bytes": [1, 0]}


@needs_shared
def test_choices_are_those_of_lm_evaluation_harness(tmp_path, monkeypatch):
    """300 items: log-probs within 1e-3 nats, accuracies equal."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    import transformers
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    random, rows = np.random.default_rng(0), []
    lines = (SHARED / "data/gsm8k-test.jsonl").read_text(encoding="utf-8").splitlines()[:300]
    questions = [json.loads(line) for line in lines]
    keys = [q["answer"].rpartition("#### ")[2] for q in questions]
    words = ["", " dollars", " of them", " hours a day", " à la carte"]
    for i, question in enumerate(questions):
        choices = [keys[(i + 7 * j) % 300] + words[random.integers(5)] for j in range(2 + i % 4)]
        gold = int(random.integers(len(choices)))
        choices[0], choices[gold] = choices[gold], choices[0]
        if len(set(choices)) < len(choices):  # equal ones are a tie, which rounding decides
            choices = [f"{choice}{'.' * j}" for j, choice in enumerate(choices)]
        prompt = f"Question: {question['question']}\nAnswer:"
        rows.append({"prompt": prompt, "choices": choices, "gold": gold})
    folder, file = SHARED / "models/gsm-llama", write_rows(tmp_path / "choices.jsonl", rows)
    out = tmp_path / "ours.json"
    found = evaluation.main([str(folder), "--data", str(file), "--out", str(out)])[str(folder)]
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
    result = lm_eval.simple_evaluate(theirs, tasks=[task], bootstrap_iters=0, log_samples=True)
    (samples,) = result["samples"].values()
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    (ours,) = json.loads(out.read_text())[str(folder)]["answers"].values()
    for logps, sample in zip(ours, samples):
        expected = [response[0] for response in sample["filtered_resps"]]
        assert logps == pytest.approx(expected, abs=1e-3)
    (figures,) = result["results"].values()
    for name in names:
        assert found[name] == pytest.approx(figures[f"{name},none"], abs=1e-9)
    most = max(abs(a - r[0]) for x, s in zip(ours, samples) for a, r in zip(x, s["filtered_resps"]))
    print(f"largest difference {most:.1e} nats; {[(n, found[n]) for n in names]}")


# --- Questions ------------------------------------------------------------------------------------

QUESTIONS = [
    {"question": "1 + 1?", "answer": "It is <<1+1=2>>2\n#### 2"},
    {"question": "2 + 2?", "answer": "#### 4"},
    {"question": "3 + 3?", "answer": "#### 6"},
]


def test_published_rows_are_answered_after_shots_and_end_at_a_stop_text(
    checkpoint, tmp_path, monkeypatch
):
    asked = []

    def generate(self, prompts, count, is_over=None, **_):
        texts = [bytes(prompt[1:]).decode() for prompt in prompts]
        asked.extend(texts)
        assert is_over(0, list(b"a Question:")) and not is_over(0, list(b"a question"))
        return [
            [*b"#### 4 it is\nQuestion: 9"] if "3" in text else [*b"so 4", 257] for text in texts
        ]

    monkeypatch.setattr("model.Llama.generate", generate)
    file, out = write_rows(tmp_path / "gsm.jsonl", QUESTIONS), tmp_path / "results.json"
    shown = [{"question": f"{i} - {i}?", "answer": "#### 0"} for i in (7, 8, 9)]
    shots = write_rows(tmp_path / "shots.jsonl", shown)
    argv = [str(checkpoint), "--data", str(file), "--out", str(out), "--shots", str(shots)]
    found = evaluation.main([*argv, "-k", "2", "--max_new_tokens", "90"])[str(checkpoint)]
    assert found == {"strict": 0, "flexible": pytest.approx(1 / 3), "cut": 0}
    before = "".join(f"Question: {q['question']}\nAnswer: {q['answer']}\n\n" for q in shown[:2])
    assert asked == [f"{before}Question: {q['question']}\nAnswer:" for q in QUESTIONS]
    kept = json.loads(out.read_text())[str(checkpoint)]
    assert kept["answers"]["gsm.jsonl, 2 shots, greedy"] == [["so 4"], ["so 4"], ["#### 4 it is\n"]]
    assert kept["items"]["gsm.jsonl, 2 shots, greedy"]["flexible"] == [0.0, 1.0, 0.0]
    assert kept["argv"][0] == str(checkpoint) and len(kept["sha256"][str(file)]) == 64


def test_flags_reach_the_draw_and_the_stop_text_that_comes_first_ends_an_answer(
    checkpoint, tmp_path, monkeypatch
):
    asked = {}

    def generate(self, prompts, count, **how):
        asked.update(how)
        return [[*b"4 b a"]] * len(prompts)

    monkeypatch.setattr("model.Llama.generate", generate)
    row = {"prompt": "2+2?", "answer": "4", "grade": "exact", "stop": ["a", "b"]}
    file = write_rows(tmp_path / "sums.jsonl", [row])
    flags = {"n": 2, "max_new_tokens": 9, "seed": 7, "temperature": 0.5, "top_p": 0.25}
    flags = [f"--{name}={value}" for name, value in flags.items()]
    found = evaluation.main([str(checkpoint), "--data", str(file), *flags])
    assert found[str(checkpoint)]["exact pass@1"] == 1
    assert (asked["seed"], asked["temperature"], asked["top_p"]) == (7, 0.5, 0.25)


def test_a_stop_text_is_found_at_the_look_that_a_whole_decoding_finds_it():
    tokenizer, random, decoded = byte_tokenizer(), np.random.default_rng(0), []
    spy = SimpleNamespace(decode=lambda ids: decoded.append(len(ids)) or tokenizer.decode(ids))
    stops = [("bb",), ("ab", "é\n"), ("é é é", "Q")] * 40
    is_over = evaluation.watch(spy, stops)
    for i, stop in enumerate(stops):
        answer = [*("".join(random.choice([*"abé \n"], 300)) + stop[-1]).encode()]
        looks = [*range(1 + i % 7, len(answer), 1 + i % 11), len(answer)]
        found = next(at for at in looks if any(s in tokenizer.decode(answer[:at]) for s in stop))
        decoded.clear()
        assert next(at for at in looks if is_over(i, answer[:at])) == found
        assert sum(decoded) <= 2 * found + 20 * len(decoded)
    assert evaluation.watch(spy, [(), ()]) is None


BAD = {
    "no form": ({"prompt": "a", "gold": 1}, "its columns are prompt, gold"),
    "no prompt": ({"prompt": 3, "answer": "a", "grade": "exact"}, "'prompt' must be a string"),
    "messages": ({"prompt": [{"role": "user"}], "answer": "a", "grade": "exact"}, "a message is"),
    "template": (
        {"prompt": [{"role": "user", "content": "a"}], "answer": "a", "grade": "exact"},
        "chat template",
    ),
    "question": ({"question": None, "answer": "1"}, "'question' must be a string"),
    "surrogate": ({"prompt": "a", "answer": "\ud800", "grade": "exact"}, "surrogates not allowed"),
    "grade": ({"prompt": "a", "answer": "b", "grade": "f1"}, "there is no grade 'f1'"),
    "gold": ({"prompt": "a", "choices": ["b", "c"], "gold": 2}, "one of 0 to 1"),
    "bool": ({"prompt": "a", "choices": ["b", "c"], "gold": True}, "'gold' is True"),
    "one choice": ({"prompt": "a", "choices": ["b"], "gold": 0}, "two or more texts"),
    "no number": ({"question": "a", "answer": "many"}, "there is nothing to grade gsm8k by"),
    "no letter": ({"prompt": "a", "answer": "third", "grade": "letter"}, "nothing to grade letter"),
    "stop": ({"prompt": "a", "answer": "b", "grade": "exact", "stop": ""}, "'stop' must be a list"),
    "key": ({"prompt": "a", "answer": " ", "grade": "exact"}, "'answer' must be a text"),
    "mixed": (CHOICES[0], "belong in two files"),
    "long": ({"question": "a" * 400, "answer": "1"}, "the model reads 256"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_by_file_and_line(name, checkpoint, tmp_path, capsys):
    row, fault = BAD[name]
    file = write_rows(tmp_path / "rows.jsonl", [QUESTIONS[0], row])
    argv = [str(checkpoint), "--max_new_tokens", "8", "--data", str(file)]
    error = refused(argv, capsys)
    assert error.startswith(f"eval.py: error: {file}:2: ") and fault in error


def refused(argv, capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluation.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    return error


def test_flags_that_cannot_be_are_refused(checkpoint, tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    file = str(write_rows(tmp_path / "gsm.jsonl", QUESTIONS))
    (tmp_path / "there.json").write_text("{}")
    choices = str(write_rows(tmp_path / "choices.jsonl", CHOICES))
    for flags, fault in [
        (["--data", str(empty)], "the file is empty"),
        (["--data", file, "--shots", file, "-k", "4"], "-k 4, but it has 3 rows"),
        (["--data", file, "--shots", file, "-k", "2"], "gsm.jsonl:1: shows the answer"),
        (["--data", file, "-k", "2"], "-k needs --shots"),
        (["--data", file, "--n", "4", "--temperature", "0"], "--n 4: greedy"),
        (["--data", file, "--n", "0"], "--n: 0: must be at least 1"),
        (["--data", file, "--n", "1025"], "--n: 1025: must be at least 1 and at most 1024"),
        (["--data", file, "--shots", choices, "-k", "1"], "no --data has rows of its form"),
        ([f"{checkpoint}/", "--data", file], "is named twice"),
        (["--data", file, "--plot", "curves.xyz"], "must end in .png"),
        (["--data", file, "--top_p", "0"], "--top_p: 0: must be"),
        (["--data", file, "--out", str(tmp_path / "there.json")], "exists"),
        (["--data", file, "--plot", str(tmp_path / "c.png")], "none of the runs has a metrics"),
    ]:
        assert fault in refused([str(checkpoint), *flags], capsys)
