"""Estimators against their definitions, and the command."""

import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PAIR_ROWS, tiny_model, write_rows
from test_data import random_pairs, single_logp

import eval as evaluation
import train
from data import Pair, Pairs, byte_tokenizer, load_pairs, solution
from eval import (
    Column,
    Figure,
    by_length,
    information,
    information_columns,
    pair_logps,
    pass_at_k,
    preference_columns,
    preference_metrics,
    preference_row,
    preference_values,
    resample,
    sample_answers,
    table,
    task_values,
)
from mio import pair_loss
from model import Llama


def test_pair_logps_are_those_of_single_sequences_in_order():
    model = tiny_model(initializer_range=0.15)
    pairs = random_pairs(300)
    got = pair_logps(model, pairs, row_tokens=64, micro_tokens=256, dtype=torch.float32)
    for i in range(0, 300, 29):
        expected = [single_logp(model, pairs[i], side).item() for side in (1, 2)]
        assert got[i].tolist() == pytest.approx(expected, rel=1e-5)


def test_preference_values_by_hand():
    logps, ref = torch.tensor([[-3.0, -5.0], [-4.0, -4.0]]), torch.tensor([[-4.0, -4.0]] * 2)
    values = preference_values(logps, ref, beta=0.5)
    assert values["rewards/chosen"].tolist() == [0.5, 0.0]
    assert values["rewards/rejected"].tolist() == [-0.5, 0.0]
    assert values["rewards/margins"].tolist() == [1.0, 0.0]
    assert values["rewards/accuracies"].tolist() == [1.0, 0.0]  # a tie is not a win
    assert values["logps/chosen"].tolist() == [-3.0, -4.0]
    assert set(preference_values(logps, None, 0.5)) == {"logps/chosen", "logps/rejected"}


def estimates(chosen, rejected):
    found = information(torch.stack((chosen, rejected), dim=1))
    return {name: column.mean() for name, column in found.items()}


def test_mutual_information_is_zero_at_the_reference_and_below_its_ceilings():
    zero = torch.zeros(50)
    assert all(abs(value) < 1e-12 for value in estimates(zero, zero).values())
    for scale in (1.0, 5.0, 30.0):
        chosen = scale * torch.rand(500, generator=torch.Generator().manual_seed(0))
        found = estimates(chosen, chosen - 2 * scale)
        assert found["js"] <= math.log(4) - 0.954771 and found["dv"] <= math.log(2)
        assert found["nwj"] <= found["dv"] + 1e-9
    w, rejected = torch.tensor([0.5, -0.2]).double(), torch.tensor([-1.0, 0.3]).double()
    found = estimates(w, rejected)
    loss = pair_loss("mio", w, rejected, 0 * w, 0 * w, beta=1.0).mean()
    assert found["js"] == pytest.approx(math.log(4) - loss.item())
    mixture = (w.exp().mean() + rejected.exp().mean()) / 2
    assert found["dv"] == pytest.approx(0.15 - math.log(mixture))
    assert found["nwj"] == pytest.approx(1.15 - mixture.item())


def test_metrics_are_means_over_all_pairs():
    logps = torch.tensor([[-3.0, -5.0], [-4.0, -4.0], [-8.0, -1.0]])
    metrics = preference_metrics(logps, torch.full((3, 2), -4.0), beta=1.0)
    assert metrics["logps/chosen"] == -5.0 and metrics["rewards/margins"] == pytest.approx(-5 / 3)
    assert metrics["rewards/accuracies"] == pytest.approx(1 / 3)
    assert metrics["mi/js"] == pytest.approx(estimates(*(logps + 4).T)["js"])
    logps = torch.cat([logps, torch.tensor([[-9.0, torch.nan]])])  # a row without a rejected answer
    more = preference_metrics(logps, torch.full((4, 2), -4.0), beta=1.0)
    assert more == metrics | {"logps/chosen": -6.0, "rewards/chosen": -2.0}


def test_pass_at_k_is_the_share_of_draws_with_a_right_answer():
    for right in range(7):
        for k in (1, 2, 4, 6):
            draws = list(itertools.combinations([True] * right + [False] * (6 - right), k))
            share = sum(any(draw) for draw in draws) / len(draws)
            assert pass_at_k(np.array([right]), 6, k)[0] == pytest.approx(share)
    with pytest.raises(ValueError, match="pass@8 needs 8 answers"):
        pass_at_k(np.array([1]), 6, 8)


def test_figure_has_the_standard_error_of_a_mean():
    figure = Column(np.array([1.0, 0.0, 0.0, 1.0])).figure()
    assert figure == (0.5, pytest.approx(math.sqrt(1 / 3) / 2), 4)
    logps, ref = torch.tensor([[1.0, 5.0], [9.0, 5.0], [3.0, 0.0]]), torch.tensor([[1.0, 1.0]] * 3)
    pairs = Pairs([Pair([1], [2], [3]), Pair([4], [2], [3]), Pair([5], [2], [])])
    row = preference_row(logps[:2], ref[:2], pairs[:2])
    assert (row["Δ chosen"].mean, row["Δ rejected"].mean, row["reward"].mean) == (4.0, 4.0, 0.5)
    row = preference_row(logps, ref, pairs)  # a missing answer is not one of log-prob 0
    assert [row[name].n for name in ("Δ chosen", "Δ rejected", "reward")] == [3, 2, 2]
    assert preference_row(logps[2:], ref[2:], pairs[2:]).keys() == {"Δ chosen"}


def test_answers_come_back_to_their_prompts_and_unfinished_ones_are_empty(monkeypatch):
    seeds = []

    def generate(prompts, max_new_tokens, stop_ids, seed, **_):
        seeds.append(seed)
        # Answers its prompt's length; prompts of three tokens never end.
        return [[*str(len(p)).encode()] + ([257] if len(p) != 3 else []) for p in prompts]

    model = tiny_model()
    monkeypatch.setattr(model, "generate", generate)
    monkeypatch.setattr(evaluation, "GENERATION_ROWS", 4)
    prompts = ["aaaa", "", "aa", "a", "aaaaaa", "aaa"]
    answers = sample_answers(model, byte_tokenizer(), prompts, samples=2)
    assert answers == [[x, x] for x in ("5", "1", "", "2", "7", "4")]
    assert len(set(seeds)) == 3  # no two batches are drawn alike


def test_task_values_grade_greedy_and_sampled_answers(monkeypatch):
    def answer(model, tokenizer, prompts, samples=1, temperature=1.0):
        half = [solution(p) if i % 2 else "#### 1000" for i, p in enumerate(prompts)]
        return [[a] * samples for a in half]

    monkeypatch.setattr(evaluation, "sample_answers", answer)
    values = task_values(None, None, 10)
    assert values["greedy"] == values["pass@1"] == values["pass@8"] == [0.0, 1.0] * 5


def test_bootstrap_of_a_mean_is_the_closed_form_and_pairs_items():
    random = np.random.default_rng(1)
    first, second = random.normal(0, 1, 400), random.normal(0, 0.1, 400)
    column, other = Column(first), Column(first + 0.05 + second)
    mean, low, high, n = other.difference(column)
    error = second.std(ddof=1) / 20  # of the paired difference, a tenth of the unpaired one's
    assert n == 400 and mean == pytest.approx(0.05 + second.mean())
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.2 * error)
    assert resample(first, np.mean, np.arange(400)).std() == pytest.approx(
        first.std() / 20, rel=0.05
    )
    gaps = Column(np.where(np.arange(400) < 10, np.nan, first))
    assert gaps.figure().n == gaps.difference(other).n == 390
    names = np.array([f"file:{i}" for i in range(400)])
    column, other = column._replace(names=names), other._replace(names=names)
    some = Column(first[::-2], names=names[::-2])  # half of the items, in another order
    assert some.difference(column)[:3] == (0, 0, 0) and column.difference(some).n == 200
    assert other.difference(column) == (mean, low, high, n)
    assert column.difference(Column(first, names=np.char.add("other ", names))) is None


def test_items_of_one_prompt_are_not_independent():
    """The errors are as large as the figures' own spread over files drawn anew; without prompts
    they are far too small. Of pairs, the prompts are those of the rows."""
    random, found = np.random.default_rng(0), []
    for _ in range(300):
        prompts = np.repeat(np.arange(60), random.integers(1, 6, 60))
        values = random.normal(0, 1, 60)[prompts] + random.normal(0, 0.3, len(prompts))
        column = Column(values, prompts=prompts)
        found.append((*column.figure()[:2], Column(values).figure().error))
    spread, (_, error, naive) = np.std(found, axis=0)[0], np.mean(found, axis=0)
    assert error == pytest.approx(spread, rel=0.1) and naive < 0.7 * spread
    _, low, high, _ = column.difference(Column(0 * values))
    assert (high - low) / 2 == pytest.approx(1.96 * found[-1][1], rel=0.1)
    summed = Column(np.stack([values, values], 1), lambda x: x.mean(), prompts).figure()
    assert summed.error == pytest.approx(found[-1][1], rel=0.1)
    one = Column(values, prompts=0 * prompts)
    assert one.figure().error is None and one.difference(one) is None
    pairs = Pairs([Pair([1, i // 3], [2], [3]) for i in range(6)])
    columns = preference_columns(torch.randn(6, 2), torch.zeros(6, 2), pairs, 1.0)
    columns |= information_columns(columns) | by_length(columns, np.ones(6))
    assert {tuple(column.prompts) for column in columns.values()} == {(0, 0, 0, 1, 1, 1)}


def test_information_read_outs_have_bootstrap_errors_and_a_bound_on_kl():
    rewards = np.random.default_rng(0).normal((0.7, -3), 0.3, (200, 2))
    columns = {"margin": Column(rewards[:, 0]), "T chosen": Column(rewards[:, 0]),
               "T rejected": Column(rewards[:, 1])}  # fmt: skip
    found = {k: c.figure() for k, c in information_columns(columns).items()}
    expected = estimates(*torch.from_numpy(rewards).T)
    for name, figure in zip(("dv", "nwj", "js"), found.values()):
        assert figure.mean == pytest.approx(expected[name]) and 0 < figure.error < 0.2
    assert 0 < found["KL from js ≤0.693"].mean < math.log(2)
    assert evaluation.least_kl(0) == evaluation.least_kl(-1) == 0
    assert evaluation.least_kl(0.4315 / 2) <= math.log(2)
    random = np.random.default_rng(0)
    for p, q in random.dirichlet(np.ones(4), (300, 2)):  # a bound for distributions of any kind
        kl, middle = (p * np.log(p / q)).sum(), (p + q) / 2
        jsd = ((p * np.log(p / middle)).sum() + (q * np.log(q / middle)).sum()) / 2
        assert evaluation.least_kl(jsd) <= kl * 1.001
    for p, q in ((0.99, 0.5), (1e-9, 0.5), (1e-9, 0.02)):  # and not an idle one, however small
        p, q = np.array([p, 1 - p]), np.array([q, 1 - q])
        middle, kl = (p + q) / 2, (p * np.log(p / q)).sum()
        jsd = ((p * np.log(p / middle)).sum() + (q * np.log(q / middle)).sum()) / 2
        assert evaluation.least_kl(jsd) > 0.8 * kl


@pytest.mark.filterwarnings("error")
def test_infinite_log_probs_make_no_noise():
    ref = torch.full((4, 2), -4.0)
    logps = torch.tensor([[-3.0, -5], [-math.inf, -4], [-4, -math.inf], [-3, -2]])
    metrics = preference_metrics(logps, ref, beta=1.0)
    assert metrics["mi/dv"] == metrics["mi/js"] == -math.inf
    assert metrics["rewards/accuracies"] == 0.5  # of the two pairs that can tell
    ref[3, 0] = -math.inf
    assert math.isnan(preference_metrics(logps, ref, beta=1.0)["mi/dv"])  # inf - inf
    columns = preference_columns(logps, ref, Pairs([Pair([i], [2], [3]) for i in range(4)]), 1.0)
    for column in (columns | information_columns(columns)).values():
        column.figure(), column.difference(column)


def test_quarters_by_length_split_the_pairs():
    lengths = np.arange(20)
    parts = by_length({"margin": Column(lengths / 10)}, lengths)
    assert [c.figure().n for c in parts.values()] == [5] * 4 and "margin 0-4" in parts
    assert sum(c.figure().mean for c in parts.values()) / 4 == pytest.approx(0.95)


def test_command_measures_runs_draws_their_curves_and_keeps_every_value(
    checkpoint, pairs_file, tmp_path, capsys
):
    pytest.importorskip("matplotlib")
    common = ["--init", str(checkpoint), "--data", str(pairs_file), "--eval_data", str(pairs_file)]
    runs = [str(train.main([*common, "--lr", "1e-3", "--seed", str(seed), "--out",
                            str(tmp_path / f"mio{seed}")])) for seed in (0, 1)]  # fmt: skip
    capsys.readouterr()
    picture = tmp_path / "curves.png"
    flags = ["--plot", str(picture), "--max_new_tokens", "9", "--kl_samples", "5"]
    bad = write_rows(tmp_path / "bad.jsonl", [*PAIR_ROWS, {"prompt": 1}])
    with pytest.raises(SystemExit):
        evaluation.main([*runs, "--data", str(pairs_file), str(bad), *flags])
    assert not picture.exists()
    assert "bad.jsonl:24" in capsys.readouterr().err
    shutil.copytree(runs[0], tmp_path / "spoilt")
    for row, fault in ({"eval_loss": 1}, "metrics.jsonl: step and eval_loss must"), ({}, "figures"):
        write_rows(tmp_path / "spoilt" / "metrics.jsonl", [row])
        with pytest.raises(SystemExit):
            evaluation.main([str(tmp_path / "spoilt"), *flags])
        assert fault in capsys.readouterr().err
    found = evaluation.main([*runs, str(checkpoint), "--data", str(pairs_file), *flags])
    assert picture.read_bytes()[:4] == b"\x89PNG" and not (checkpoint / "eval.json").exists()
    ((label, curves),) = evaluation.read_curves({Path(r).name: Path(r) for r in runs}).items()
    assert label == "mio0 (2 seeds)" and len(curves) == 2
    assert curves[0]["rewards/margins"][0].tolist() == [0, 1]  # steps of held-out figures
    kept = json.loads((Path(runs[0]) / "eval.json").read_text())
    (items, critic, _) = kept["items"].values()
    lengths = Pairs(load_pairs(pairs_file, byte_tokenizer())).lengths()
    assert len(items["margin"]) == 23 and len(critic["KL"]) == 5
    beta, row = 0.2, found[runs[0]]
    assert row["T chosen"] == pytest.approx(beta * row["Δ chosen"])
    assert row["margin"] == pytest.approx(row["T chosen"] - row["T rejected"])
    for side, length in (("chosen", lengths[:, 1]), ("rejected", lengths[:, 2])):
        per_token = np.array(items[f"Δ {side}"]) / length
        assert row[f"Δ/token {side}"] == pytest.approx(per_token.mean())
    printed = capsys.readouterr().out
    assert "| mio1 - mio0 |" in printed and "| init |" in printed


def test_kl_is_the_log_ratio_of_what_is_drawn_once_for_each_prompt(tmp_path, monkeypatch):
    drawn, tokenizer = [65, 66, 257], byte_tokenizer()
    monkeypatch.setattr(evaluation, "draw", lambda _, prompts, *x, **y: [drawn] * len(prompts))
    file = write_rows(tmp_path / "pairs.jsonl", [PAIR_ROWS[0], *PAIR_ROWS[:3]])
    pairs, models = load_pairs(file, tokenizer), (tiny_model(), tiny_model(seed=1))
    options = SimpleNamespace(kl_samples=9, max_new_tokens=5, seed=0, batch_size=None)
    config = {"dtype": "float32", "beta": 1.0}
    blocks = evaluation.pair_columns(
        models[0], tokenizer, models[1], file, "x", pairs, options, config
    )
    kl = blocks["x: critic"]["KL"]
    assert [name.rpartition(":")[2] for name in kl.names] == ["1", "3", "4"]
    for value, pair in zip(kl.values, pairs[1:]):
        logps = [single_logp(m, Pair(pair.prompt, drawn, []), 1).item() for m in models]
        assert value == pytest.approx(logps[0] - logps[1], rel=1e-4)
    first, *_ = blocks["x: by tokens of the chosen answer"]
    assert first.startswith(f"reward {pairs.lengths()[:, 1].min()}-")


def test_table_is_aligned_and_fits_a_terminal():
    row = {
        "greedy": Figure(0.5623, 0.0157, 1000),
        "pass@1": Figure(0.5, 0.01, 1000),
        "pass@8": Figure(1.0, 0.01, 1000),
        "Δ chosen": Figure(-12.345, 0.1, 400),
        "Δ rejected": Figure(-22.345, 0.1, 400),
        "reward": Figure(0.75, 0.1, 400),
    }
    lines = table({"base": dict(list(row.items())[:3]), "mio": row}).splitlines()
    assert "56.2±1.6" in lines[1] and lines[1].count("-") == 3
    assert "-12.35±0.10" in lines[2] or "-12.34±0.10" in lines[2]
    assert max(map(len, lines)) <= 80
    assert lines[0].index("greedy") < lines[0].index("pass@1")
    apart = {"mio - base": {"greedy": evaluation.Difference(0.125, -0.25, 0.5, 8)}}
    assert "+12.5 [-25.0, +50.0]" in table(apart)


def test_names_of_any_length_leave_room_for_figures(tmp_path):
    """The table's in 80 columns, the picture's within it."""
    names = [f"llama-3.2-1b-gsm8k-{loss}-beta0.2-lr1e-6-seed0" for loss in ("sft", "dpo", "mio")]
    column = Column(np.arange(9) / 7)
    rows = evaluation.compared({name: {"exact": column, "exact maj@8": column} for name in names})
    text = table(rows)
    assert max(map(len, [*text.splitlines(), *evaluation.LEGEND.values()])) <= 80
    assert f"{names[1]} - first" in text and "maj@n: the most frequent" in text
    pyplot = pytest.importorskip("matplotlib.pyplot")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "train_config.json").write_text(json.dumps({"loss": name}))
        write_rows(tmp_path / name / "metrics.jsonl", [{"step": i, "loss": i} for i in range(2)])
    close, figures = pyplot.close, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyplot, "close", figures.append)
        evaluation.plot({name: tmp_path / name for name in names}, tmp_path / "curves.png")
    (figure,) = figures
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
    assert [text.get_text() for text in figure.legends[0].texts] == names
    close(figure)


def test_command_compares_a_run_with_what_it_started_from(checkpoint, pairs_file, tmp_path):
    flags = ["--data", str(pairs_file), "--eval_data", str(pairs_file), "--lr", "1e-3"]
    out = str(tmp_path / "out")
    folder = train.main(["--init", str(checkpoint), *flags, "--out", out, "--loss", "sft"])
    summary = json.loads((folder / "summary.json").read_text())["table"]["sft"]
    found = evaluation.main([out, str(checkpoint), "--data", str(pairs_file)])
    for column in ("Δ chosen", "Δ rejected", "reward"):
        assert found[out][column] == pytest.approx(summary[column]["mean"], abs=1e-4)
    assert set(found[str(checkpoint)]) == {"chosen", "rejected"}
    assert found[out]["Δ chosen"] > 0
    again = str(tmp_path / "short")  # cut where the run cut
    train.main(["--init", str(checkpoint), *flags, "--out", again, "--max_length", "50"])
    summary = json.loads((tmp_path / "short" / "summary.json").read_text())["table"]["mio"]
    found = evaluation.main([again, "--data", str(pairs_file)])
    assert found[again]["Δ chosen"] == pytest.approx(summary["Δ chosen"]["mean"], abs=1e-4)


def run_folder(checkpoint, folder, **config) -> str:
    """As a run of train.py leaves it, with the weights that it began with."""
    shutil.copytree(checkpoint, folder)
    config = {"init": str(checkpoint), **config}
    (folder / "train_config.json").write_text(json.dumps(config))
    return str(folder)


def test_command_compares_the_rows_that_two_runs_share(checkpoint, tmp_path, capsys):
    """Of files of one name the same lines of the same content, which one run may have dropped."""
    rows = [*PAIR_ROWS, {"prompt": "long?", "chosen": "x" * 90, "rejected": "y"}, PAIR_ROWS[0]]
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    other = write_rows(tmp_path / "init" / "pairs.jsonl", rows[1:])
    runs = {"a": (file, 99), "b": (file, 80), "c": (other, 99)}
    runs = [run_folder(checkpoint, tmp_path / name, eval_data=str(file), max_length=length)
            for name, (file, length) in runs.items()]  # fmt: skip
    evaluation.main([*runs, "--kl_samples", "0"])
    said = capsys.readouterr()
    assert "1 of 25 rows dropped" in said.err and "-: the two have no items in common" in said.out
    lines = [line.strip("| ").split(" | ") for line in said.out.splitlines()[:10]]
    rows = {line[0]: line[1:] for line in lines}
    assert set(rows["c - a"]) == {"-"} and rows["n"][0] == "24-25"
    assert all(cell.startswith("+0.") for cell in rows["b - a"])


def test_without_data_a_run_is_asked_what_its_training_held_out(
    checkpoint, pairs_file, tmp_path, monkeypatch
):
    values = {"greedy": [0.0, 1.0]}
    monkeypatch.setattr(evaluation, "task_values", lambda *_: values)
    out = str(tmp_path / "out")
    flags = ["--eval_fraction", "0.3", "--seed", "3", "--max_steps", "1", "--lr", "1e-3"]
    train.main(["--init", str(checkpoint), "--data", str(pairs_file), *flags, "--out", out])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["table"]["mio"]
    found = evaluation.main([out, "--kl_samples", "0"])[out]
    assert found["Δ chosen"] == pytest.approx(summary["Δ chosen"]["mean"], abs=1e-5)
    assert "greedy" not in found
    (checkpoint / "base.json").write_text("{}")  # had it begun with the demonstration's base
    assert evaluation.main([out, "--kl_samples", "0"])[out] == {"greedy": 0.5} | found
    assert evaluation.main([str(checkpoint)])[str(checkpoint)] == {"greedy": 0.5}
    questions = write_rows(tmp_path / "questions.jsonl", [{"question": "1?", "answer": "1"}])
    for name, config in {
        "none": {"data": str(pairs_file), "eval_fraction": 0.0},
        "drawn": {"data": str(questions), "eval_fraction": 0.1},
    }.items():
        other = run_folder(checkpoint, tmp_path / name, **config)
        (checkpoint / "base.json").unlink(missing_ok=True)
        with pytest.raises(ValueError, match="--data FILE.jsonl"):
            evaluation.read_run(Path(other), {})


def test_command_reports_pairs_and_refuses_what_it_cannot_read(
    checkpoint, pairs_file, tmp_path, monkeypatch, capsys
):
    found = evaluation.main([str(checkpoint), "--data", str(pairs_file)])
    pairs = evaluation.load_pairs(pairs_file, byte_tokenizer())
    model = tiny_model()
    logps = [single_logp(model, pair, 1).item() for pair in pairs]
    assert found[str(checkpoint)]["chosen"] == pytest.approx(np.mean(logps), rel=1e-5)
    loaded, load = [], Llama.from_pretrained
    monkeypatch.setattr(Llama, "from_pretrained", lambda *x, **y: loaded.append(x) or load(*x, **y))
    file = write_rows(
        tmp_path / "choices.jsonl", [{"prompt": "a", "choices": ["b"] * 2, "gold": 0}]
    )
    questions = write_rows(tmp_path / "questions.jsonl", [{"question": "1?", "answer": "1"}])
    data = ["--data", str(pairs_file), str(file), "--dtype", "float32"]
    found = evaluation.main([str(checkpoint), *data])[str(checkpoint)]
    assert found["choices.jsonl: acc"] == 1 and len(loaded) == 1
    capsys.readouterr()
    moved = run_folder(checkpoint, tmp_path / "moved", init="gone")
    asked = [moved, "--max_new_tokens", "1", "--data", str(questions)]
    assert "strict" in evaluation.main(asked)[moved]  # which takes no reference
    bad = ["nowhere"], [str(checkpoint), "--data", "gone.jsonl"], [], [str(checkpoint)]
    for argv in (*bad, [*asked, str(pairs_file)]):
        with pytest.raises(SystemExit) as stop:
            evaluation.main(argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("eval.py: error: ")
        assert error.count("\n") == 1
