"""Answers side by side, and the end of the demonstration, against models that are asked alone."""

import contextlib
import io
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model, write_rows
from test_builtin_task import WRONG, Answers, shrink
from test_eval import refused, single_logp

import eval as evaluation
import train
from model import Llama
from support import builtin_task
from support import outcome as outcome_module
from support.builtin_task import is_correct, problems, solution
from support.curves import read_curves
from support.files import write_json
from support.grid import find_grid
from support.outcome import BLOCKS, side_by_side, what_happened
from support.run_options import read_flags
from support.tokenizers import byte_tokenizer
from support.trained_run import load_checkpoint

torch.set_num_threads(1)  # more threads do not speed up such small models

# --- Side by side ---------------------------------------------------------------------------------

PROMPTS = ["1 + 1 is", "The capital of France is"]


@pytest.fixture
def two(tmp_path) -> list[str]:
    """The folders of two models with different weights."""
    folders = [tmp_path / "one", tmp_path / "the-second"]
    for seed, folder in enumerate(folders):
        tiny_model(seed).save_pretrained(folder)
        byte_tokenizer().save(folder)
    return [str(folder) for folder in folders]


def ask(capsys, *argv: str) -> str:
    """What eval.py prints; it writes no file and returns no figures."""
    capsys.readouterr()
    assert evaluation.main([*argv, "--device", "cpu"]) == {}
    return capsys.readouterr().out


def read_answers(out: str, width: int) -> dict[str, list[tuple[str, str]]]:
    """Reads the printed text: prompt -> pairs of a run's name and an answer without white space.
    Only white space may change where a line is broken."""
    found, prompt = {}, ""
    for line in filter(None, out.split("\n")):
        if line[0] != " ":
            prompt = line
        elif name := line[2 : 2 + width].strip():
            found.setdefault(prompt, []).append([name, line[4 + width :]])
        else:
            found[prompt][-1][1] += line[4 + width :]
    return {p: [(name, "".join(x.split())) for name, x in rows] for p, rows in found.items()}


def expected_answers(folders: list[str], times: int, new: int, **kwargs) -> dict:
    """What model.generate answers to PROMPTS, as `read_answers` returns it."""
    found = {prompt: [] for prompt in PROMPTS}
    for folder in folders:
        model, tokenizer = load_checkpoint(folder, "cpu", torch.float32)
        asked = [prompt for prompt in PROMPTS for _ in range(times)]
        ids = [tokenizer.prompt_ids(prompt) for prompt in asked]
        answers = model.generate(ids, new, stop_ids=tokenizer.stop_ids, **kwargs)
        for prompt, answer in zip(asked, answers):
            text = tokenizer.decode(answer[:-1] if answer[-1] == tokenizer.end_id else answer)
            found[prompt].append((folder.rpartition("/")[2], "".join(text.split()) or "(empty)"))
    return found


def test_every_run_answers_every_prompt_greedily_in_lines_of_80_columns(two, tmp_path, capsys):
    out = ask(capsys, *two, "--prompt", *PROMPTS, "--max_new_tokens", "120")
    assert read_answers(out, len("the-second")) == expected_answers(two, 1, 120, temperature=0)
    lines = out.split("\n")
    assert max(map(len, lines)) <= 80 and sum(line[:4] == "    " for line in lines) > 1  # wrapped
    assert [line for line in lines if line and line[0] != " "] == PROMPTS
    assert not list(tmp_path.glob("*/eval.json"))
    # --prompt may be repeated.
    again = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    assert ask(capsys, *two, *again, "--max_new_tokens", "120") == out


def test_several_answers_are_sampled_as_the_flags_say(two, capsys):
    flags = ["--n", "2", "--max_new_tokens", "25", "--top_p", "0.9", "--seed", "5"]
    out = ask(capsys, *two, "--prompt", *PROMPTS, *flags)
    sampled = expected_answers(two, 2, 25, temperature=1.0, top_p=0.9, seed=5)
    assert read_answers(out, len("the-second")) == sampled
    for rows in sampled.values():
        assert [name for name, _ in rows] == ["one", "one", "the-second", "the-second"]
        assert rows[0] != rows[1]


def test_prompts_are_lines_of_standard_input_if_none_is_given(two, capsys, monkeypatch):
    given = ask(capsys, *two, "--prompt", *PROMPTS, "--max_new_tokens", "9")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPTS[0]}\n\n  {PROMPTS[1]} \n"))
    assert ask(capsys, *two, "--max_new_tokens", "9", "--prompt") == given


def test_a_chat_template_makes_a_prompt_the_message_of_a_user(two, capsys, monkeypatch):
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    (Path(two[0]) / "chat_template.jinja").write_text(template)
    asked = []

    def sample_ids(model, prompts, max_new_tokens, **how):
        asked.append(prompts)
        return [[*b"fine", 257]] * len(prompts)

    monkeypatch.setattr(outcome_module, "sample_ids", sample_ids)
    out = ask(capsys, *two, "--prompt", "Hi", "--n", "2")
    _, tokenizer = load_checkpoint(two[0], "cpu", torch.float32)
    message = [{"role": "user", "content": "Hi"}]
    ids = tokenizer.render(message, add_generation_prompt=True)
    assert ids == [256, *b"user: Hi\nassistant:"] and asked == [[ids] * 2, [[256, *b"Hi"]] * 2]
    assert read_answers(out, len("the-second"))["Hi"][0] == ("one", "fine")


def test_prompts_of_the_built_in_task_end_with_a_newline(two, monkeypatch):
    write_json(Path(two[0]) / "base.json", {})
    write_json(Path(two[1]) / "train_config.json", {"init": two[0]})
    asked = []
    monkeypatch.setattr(
        outcome_module, "sample_ids", lambda m, ids, *_, **__: asked.extend(ids) or ids
    )
    options = evaluation.Options(temperature=0.0, dtype="float32", device="cpu")
    side_by_side({"base": two[0], "run": two[1]}, ["1+1"], options)
    assert asked == [[256, *b"1+1\n"]] * 2


def test_long_names_and_empty_answers_fit(two, tmp_path, capsys, monkeypatch):
    folders = [tmp_path / f"{letter * 40}-{letter}" for letter in "ab"]
    for folder, new in zip(two, folders):
        Path(folder).rename(new)
    answers = iter([[257], [*b"word " * 40, 257]])
    monkeypatch.setattr(outcome_module, "sample_ids", lambda *_, **__: [next(answers)])
    out = ask(capsys, *map(str, folders), "--prompt", "long " * 30)
    lines = out.split("\n")
    assert max(map(len, lines)) <= 80 and "".join(lines[:2]).count("long") == 30
    assert f"  {'a' * 40}-a  (empty)" in lines
    (first,) = (line for line in lines if line.startswith(f"  {'b' * 40}-b  word"))
    assert len(first) > 70 and out.count("word") == 40


def test_what_cannot_be_asked_is_refused_in_one_line(two, tmp_path, capsys, monkeypatch):
    rows = str(write_rows(tmp_path / "rows.jsonl", [{"question": "1?", "answer": "#### 1"}]))
    for flags in (["--data", rows], ["--out", "x.json"], ["--plot", "x.png"]):
        error = refused([*two, "--prompt", "x", *flags], capsys)
        assert "--prompt only shows answers; leave out --data, --out and --plot" in error
    # BOS and 255 letters are the 256 tokens of the context; with 254 there is room for one more.
    error = refused([*two, "--prompt", "1", "x" * 255], capsys)
    assert "--prompt: fills the model's context; shorten it" in error
    shown = read_answers(ask(capsys, *two, "--prompt", "x" * 254), len("the-second"))
    assert [name for name, _ in shown[max(shown)]] == ["one", "the-second"]
    assert "nowhere: there is no such folder" in refused(["nowhere", "--prompt", "x"], capsys)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n \n"))
    assert "--prompt: there is no text" in refused([*two, "--prompt"], capsys)
    assert "--prompt: there is no text" in refused([*two, "--prompt", "x", " "], capsys)


# --- The end of the demonstration -----------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def asked_in_turn(monkeypatch, *answers) -> None:
    """The greedy answers of the models that are asked one after the other: functions of a
    problem's number and text."""
    turns = iter(answers)

    def sample_answers(model, tokenizer, prompts, temperature):
        assert temperature == 0 and prompts == problems("test", 200, seed=0)
        answer = next(turns)
        return [[answer(i, prompt)] for i, prompt in enumerate(prompts)]

    monkeypatch.setattr(outcome_module, "sample_answers", sample_answers)


def job_of(run, base, model, tokenizer, loss: str) -> SimpleNamespace:
    """What `what_happened` reads of a job."""
    options = SimpleNamespace(out=str(run), init=str(base), loss=loss)
    return SimpleNamespace(options=options, model=model, tokenizer=tokenizer)


def of_base(i: int, problem: str) -> str:
    return [WRONG, solution(problem), "", "#### 999", solution(problem)][i % 5]


def of_run(i: int, problem: str) -> str:
    """Another answer than the base gives to problems 0, 3, 4, 5, ...; it has none to problem 8."""
    return solution(problem) if i % 5 < 3 else "" if i == 8 else WRONG


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory):
    """A run of the demonstration in small, in a folder with a space, and what it printed on a
    terminal. Then what such a run printed to a file."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        shrink(monkeypatch)
        monkeypatch.setattr(builtin_task, "sample_answers", Answers())
        few = builtin_task.task_columns
        monkeypatch.setattr(builtin_task, "task_columns", lambda *model: few(*model, count=20))
        folder, printed = tmp_path_factory.mktemp("my runs"), []
        for out, stdout in (("mio", Terminal()), ("file", io.StringIO())):
            asked_in_turn(monkeypatch, of_base, of_run)
            with contextlib.redirect_stdout(stdout):
                train.main(["--out", str(folder / out), "--device", "cpu", "--lr", "1e-3"])
            printed.append(stdout.getvalue())
    return SimpleNamespace(run=folder / "mio", base=folder / "base", printed=printed)


def test_the_demonstration_ends_with_examples_only_on_a_terminal(demonstration, monkeypatch):
    model, tokenizer = load_checkpoint(demonstration.run, "cpu", torch.float32)
    asked_in_turn(monkeypatch, of_base, of_run)
    text = what_happened(job_of(demonstration.run, demonstration.base, model, tokenizer, "mio"))
    on_terminal, to_file = demonstration.printed
    assert on_terminal.endswith(f"{text}\n") and "change" in to_file
    for part in ("Greedy answers", "Mean log-prob of held-out", "Next:", BLOCKS[0]):
        assert part in text and part not in to_file


def test_the_examples_are_changed_answers_with_their_verdicts_and_log_probs(demonstration):
    lines = demonstration.printed[0].split("\n")
    start = lines.index("Greedy answers that changed:") + 1
    shown, questions = lines[start : lines.index("", start)], problems("test", 200, seed=0)
    assert [line.strip() for line in shown[::3]] == [questions[i].strip() for i in (0, 3, 4)]
    models = [Llama.from_pretrained(demonstration.base), Llama.from_pretrained(demonstration.run)]
    verdicts, tokenizer = [], byte_tokenizer()
    for place, i in zip((1, 4, 7), (0, 3, 4)):
        for line, name, model, answer in zip(
            shown[place:], ("base", "mio"), models, (of_base, of_run)
        ):
            text = answer(i, questions[i])
            found = re.fullmatch(rf"    {name:9} (.{{42}}) (\w+), log-prob (-\d+\.\d)", line)
            assert found[1] == " | ".join(text.split("\n"))[:42].ljust(42)
            assert found[2] == ("right" if is_correct(questions[i], text) else "wrong")
            ids = [*tokenizer.encode(text), tokenizer.end_id]
            logp = single_logp(model, tokenizer.prompt_ids(questions[i]), ids)
            assert float(found[3]) == pytest.approx(logp, abs=0.06)
            verdicts.append(found[2])
    assert verdicts == ["wrong", "right", "wrong", "wrong", "right", "wrong"]


def test_the_curves_are_those_of_the_run(demonstration):
    lines, curves = demonstration.printed[0].split("\n"), read_curves(demonstration.run)
    for side in ("chosen", "rejected"):
        values = curves[f"logps/{side}"][1]
        (line,) = (line for line in lines if re.match(rf"  {side} +-", line))
        _, first, blocks, last = line.split()
        assert (first, last) == (f"{values[0]:.2f}", f"{values[-1]:.2f}")
        assert len(blocks) == len(values) == 3 and set(blocks) <= set(BLOCKS)


def test_blocks_show_both_curves_on_one_scale(two, tmp_path, monkeypatch):
    """The changes are 0, -2, 1 and 0, -7, -4, so the lowest is -7 and the highest is 1."""
    steps = zip((-10.0, -12.0, -9.0), (-20.0, -27.0, -24.0))
    names = "eval_logps/chosen", "eval_logps/rejected"
    rows = [{"step": i, "eval_loss": 1.0, **dict(zip(names, x))} for i, x in enumerate(steps)]
    model, tokenizer = load_checkpoint(two[1], "cpu", torch.float32)

    def lines(rows: list[dict]) -> list[str]:
        write_rows(tmp_path / "metrics.jsonl", rows)
        asked_in_turn(monkeypatch, of_run, of_run)  # no answer has changed
        return what_happened(job_of(tmp_path, two[0], model, tokenizer, "mio")).split("\n")

    assert lines(rows)[1:6] == [
        "Greedy answers that changed:",
        "",
        "Mean log-prob of held-out answers over training, in nats, on one scale:",
        "  chosen    -10.00 ▇▅█ -9.00",
        "  rejected  -20.00 ▇▁▄ -24.00",
    ]
    assert lines(rows[:1])[4:6] == ["  chosen    -10.00 ▁ -10.00", "  rejected  -20.00 ▁ -20.00"]


def test_the_commands_to_try_next_work(demonstration, capsys):
    lines = demonstration.printed[0].split("\n")
    ask_both, grid = (shlex.split(line) for line in lines[lines.index("Next:") + 1 :][:2])
    assert ask_both[:4] == ["python", "eval.py", str(demonstration.base), str(demonstration.run)]
    out = ask(capsys, *ask_both[2:], "--max_new_tokens", "5")
    assert [name for name, _ in read_answers(out, 4)["7+9-3+5"]] == ["base", "mio"]
    assert grid[:2] == ["python", "train.py"]
    _, flags = read_flags(grid[2:], train.Options, "")
    found = find_grid(flags, train.Options)
    assert found.axes == {"loss": ["mio", "dpo", "sft"], "seed": [0, 1, 2]} and found.jobs == 2


@pytest.mark.parametrize(
    ("loss", "flag"),
    [("dpo", "dpo,sft"), ("sft", "sft,dpo"), ("mio+0.1*sft", "'mio+0.1*sft,dpo,sft'")],
)
def test_the_grid_to_try_next_begins_with_the_loss(loss, flag, demonstration, monkeypatch):
    model, tokenizer = load_checkpoint(demonstration.run, "cpu", torch.float32)
    asked_in_turn(monkeypatch, of_run, of_run)
    text = what_happened(job_of(demonstration.run, demonstration.base, model, tokenizer, loss))
    assert text.endswith(f"\n  python train.py --loss {flag} --seed 0,1,2 --jobs 2")
