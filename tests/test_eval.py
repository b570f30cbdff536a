"""Log-probs and metrics against values by hand and single sequences, and the eval command."""

import hashlib
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PAIR_ROWS, tiny_model, write_rows

import eval as evaluation
import train
from data import Pair, Pairs, load_pairs
from eval import (
    answer_logps,
    critic_columns,
    information,
    pair_columns,
    pair_logps,
    preference_columns,
    preference_metrics,
    preference_values,
    reward_scale,
)
from mio import LOSSES, pair_loss
from model import Llama
from support.figures import Column, read_columns
from support.files import digest_file
from support.tokenizers import byte_tokenizer
from support.trained_run import TRAINING

torch.set_num_threads(1)  # more threads do not speed up such small models
SIDES = ("chosen", "rejected")


@torch.no_grad()
def single_logp(model, prompt: list[int], answer: list[int]) -> float:
    """The oracle of every log-prob: one sequence without packing, mask or cache."""
    ids = torch.tensor([[*prompt, *answer]])
    logps = (model(ids[:, :-1])[0] @ model.head_weight.T).log_softmax(dim=-1)  # (T - 1, V)
    scored = logps[len(prompt) - 1 :].gather(1, torch.tensor(answer)[:, None])
    return scored.sum().item()


def random_pairs(count: int) -> Pairs:
    """Pairs of random bytes; every fifth lacks the rejected answer."""
    random = np.random.default_rng(0)

    def ids(low, high):
        return random.integers(0, 256, size=random.integers(low, high)).tolist()

    return Pairs(
        Pair([256, *ids(0, 9)], [*ids(0, 7), 257], [*ids(0, 12), 257] if i % 5 else [])
        for i in range(count)
    )


def refused(argv: list[str], capsys) -> str:
    """The one line on standard error with which a command line of eval.py ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluation.main(argv)
    error = capsys.readouterr().err.rpartition("\r")[2]  # without a progress bar
    assert stop.value.code == 2 and error.startswith("eval.py: error: ") and error.count("\n") == 1
    return error


# --- Log-probs ------------------------------------------------------------------------------------


def test_log_probs_are_those_of_single_sequences_in_order():
    model, pairs = tiny_model(initializer_range=0.15), random_pairs(300)
    logps = pair_logps(model, pairs, 64, 256, torch.float32)
    assert logps.shape == (300, 2) and (logps[::5, 1] == 0).all()
    for i in range(0, 300, 29):
        answers = [answer for answer in pairs[i][1:] if answer]
        expected = [single_logp(model, pairs[i].prompt, answer) for answer in answers]
        assert logps[i, : len(answers)].tolist() == pytest.approx(expected, rel=1e-5)
    assert pair_logps(model, Pairs(), 64, 256, torch.float32).shape == (0, 2)


def test_a_prompt_may_have_any_number_of_answers():
    model = tiny_model(initializer_range=0.15)
    rows = [([256, 5], [1, 2], [3], [4, 5, 6]), ([256], [7]), ([256, 8, 9], [10], [11, 12])]
    logps = answer_logps(model, rows, 8, 16, torch.float32)
    for (prompt, *answers), found in zip(rows, logps, strict=True):
        expected = [single_logp(model, prompt, answer) for answer in answers]
        assert found.tolist() == pytest.approx(expected, rel=1e-5)


# --- Preference metrics ---------------------------------------------------------------------------


def test_preference_values_by_hand():
    logps, ref = torch.tensor([[-3.0, -5.0], [-4.0, -4.0]]), torch.tensor([[-4.0, -4.0]] * 2)
    values = preference_values(logps, ref, beta=0.5)
    assert values["rewards/chosen"].tolist() == [0.5, 0.0]
    assert values["rewards/rejected"].tolist() == [-0.5, 0.0]
    assert values["rewards/margins"].tolist() == [1.0, 0.0]
    assert values["rewards/accuracies"].tolist() == [1.0, 0.0]  # a tie is not a win
    assert values["logps/chosen"].tolist() == [-3.0, -4.0]
    assert values["logps/rejected"].tolist() == [-5.0, -4.0]
    assert preference_values(logps, None, 0.5).keys() == {"logps/chosen", "logps/rejected"}


def estimates(chosen, rejected) -> dict[str, float]:
    found = information(torch.stack((chosen, rejected), dim=1))
    return {name: values.mean().item() for name, values in found.items()}


def test_mutual_information_is_zero_at_the_reference_and_below_its_ceilings():
    zero = torch.zeros(50)
    assert all(abs(value) < 1e-12 for value in estimates(zero, zero).values())
    for scale in (1.0, 5.0, 30.0):
        chosen = scale * torch.rand(500, generator=torch.Generator().manual_seed(0))
        found = estimates(chosen, chosen - 2 * scale)
        assert found["js"] <= math.log(4) - 0.954771 and found["dv"] <= math.log(2)
        assert found["nwj"] <= found["dv"] + 1e-9


def test_mutual_information_by_its_formulas():
    chosen, rejected = torch.tensor([0.5, -0.2]).double(), torch.tensor([-1.0, 0.3]).double()
    found, zero = estimates(chosen, rejected), torch.zeros(2)
    loss = pair_loss("mio", chosen, rejected, zero, zero, beta=1.0).mean().item()
    assert found["js"] == pytest.approx(math.log(4) - loss)
    mixture = (chosen.exp().mean() + rejected.exp().mean()).item() / 2
    assert found["dv"] == pytest.approx(0.15 - math.log(mixture))
    assert found["nwj"] == pytest.approx(1.15 - mixture)
    values = information(torch.stack((chosen, rejected), dim=1))
    assert values.keys() == {"dv", "js", "nwj"} and values.keys() - {"js"} < LOSSES.keys()
    assert values["js"].tolist() == pytest.approx(
        (math.log(4) - pair_loss("mio", chosen, rejected, zero, zero, beta=1.0)).tolist()
    )


def test_the_error_of_dv_is_that_of_the_jackknife():
    """The jackknife leaves out one pair at a time and knows nothing of influence functions."""
    rewards = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)).double()
    rewards[:, 0] += 0.5
    without = [information(rewards[torch.arange(400) != i])["dv"].mean() for i in range(400)]
    values, nan = information(rewards)["dv"], torch.full((3, 2), torch.nan)
    error = Column(values.numpy()).estimate().error
    assert error == pytest.approx(np.std(without) * math.sqrt(399), rel=0.02)
    nan[0, 0] = 9.0  # a pair without a rejected answer does not count
    assert torch.equal(information(torch.cat([rewards, nan]))["dv"][:400], values)
    assert information(nan)["dv"].isnan().all()


def test_metrics_are_means_over_all_pairs():
    logps = torch.tensor([[-3.0, -5.0], [-4.0, -4.0], [-8.0, -1.0]])
    metrics = preference_metrics(logps, torch.full((3, 2), -4.0), beta=1.0)
    assert metrics["logps/chosen"] == -5.0 and metrics["rewards/margins"] == pytest.approx(-5 / 3)
    assert metrics["rewards/accuracies"] == pytest.approx(1 / 3)
    for name, value in estimates(*(logps + 4).T).items():
        assert metrics[f"mi/{name}"] == pytest.approx(value)
    doubled = preference_metrics(logps, torch.full((3, 2), -4.0), beta=2.0)
    assert doubled["mi/js"] == pytest.approx(estimates(*2 * (logps + 4).T)["js"])
    logps = torch.cat([logps, torch.tensor([[-9.0, torch.nan]])])  # without a rejected answer
    more = preference_metrics(logps, torch.full((4, 2), -4.0), beta=1.0)
    assert more == metrics | {"logps/chosen": -6.0, "rewards/chosen": -2.0}


def test_columns_by_hand_and_a_missing_answer_has_no_value(tmp_path):
    logps, ref = torch.tensor([[1.0, 5.0], [9.0, 5.0], [3.0, 0.0]]), torch.tensor([[1.0, 1.0]] * 3)
    pairs, file = Pairs(), tmp_path / "pairs.jsonl"
    for line, pair in ((4, ([1], [2], [3])), (7, ([4], [2, 2], [3])), (9, ([1], [2], []))):
        pairs.append(Pair(*pair), line)
    file.write_text("rows")
    columns = preference_columns(logps, ref, pairs, 0.5, file)
    expected = {
        "reward": [0, 1], "margin": [-2, 2], "T chosen": [0, 4, 1], "T rejected": [2, 2],
        "Δ chosen": [0, 8, 2], "Δ rejected": [4, 4], "Δ/token chosen": [0, 4, 2],
        "Δ/token rejected": [4, 4], "chosen": [1, 9, 3], "rejected": [5, 5],
    }  # fmt: skip
    assert {name: column.known()[0].tolist() for name, column in columns.items()} == expected
    # A hash of the file and the line name a pair, and its first pair names a prompt.
    names = [f"{hashlib.sha256(b'rows').hexdigest()[:16]}:{line}" for line in (4, 7, 9)]
    for column in columns.values():
        assert column.names.tolist() == names
        assert column.prompts.tolist() == [names[0], names[1], names[0]]
    assert preference_columns(logps, None, pairs, 1.0, file).keys() == {"chosen", "rejected"}
    columns = preference_columns(logps[2:], ref[2:], pairs[2:], 0.5, file)
    assert columns.keys() == {"T chosen", "Δ chosen", "Δ/token chosen", "chosen"}
    assert preference_columns(logps[:0], ref[:0], Pairs(), 0.5, tmp_path / "gone") == {}


@pytest.mark.filterwarnings("error")
def test_infinite_log_probs_cause_no_warnings(pairs_file):
    ref = torch.full((4, 2), -4.0)
    logps = torch.tensor([[-3.0, -5], [-math.inf, -4], [-4, -math.inf], [-3, -2]])
    metrics = preference_metrics(logps, ref, beta=1.0)
    assert metrics["mi/dv"] == metrics["mi/js"] == -math.inf
    assert metrics["rewards/accuracies"] == 0.5  # of the two pairs whose rewards are finite
    ref[3, 0] = -math.inf
    assert math.isnan(preference_metrics(logps, ref, beta=1.0)["mi/dv"])  # inf - inf
    pairs = Pairs([Pair([i], [2], [3]) for i in range(4)])
    columns = preference_columns(logps, ref, pairs, 1.0, pairs_file)
    columns |= critic_columns(columns)
    for column in columns.values():
        column.estimate(), column.difference(column)


# --- A file of pairs ------------------------------------------------------------------------------


def columns_by_title(models, file, title="x", kl_samples=0, beta=1.0, **training):
    tokenizer = byte_tokenizer()
    options = SimpleNamespace(kl_samples=kl_samples, max_new_tokens=5, seed=3, batch_size=None)
    training = TRAINING | {"beta": beta, "init": "base"} | training
    pairs = load_pairs(file, tokenizer)
    return pair_columns(models[0], tokenizer, models[1], file, title, pairs, options, training)


def test_information_of_a_file_has_the_rewards_as_critic_and_errors(pairs_file):
    by_title = columns_by_title((tiny_model(), tiny_model(seed=1)), pairs_file, beta=0.01)
    assert list(by_title) == ["x", "x: critic"]
    rewards = [torch.from_numpy(by_title["x"][f"T {side}"].values) for side in SIDES]
    critic = by_title["x: critic"]
    assert list(critic) == ["dv ≤0.693", "nwj ≤0.693", "js ≤0.4315"]
    for name, value in estimates(*rewards).items():
        (column,) = (column for title, column in critic.items() if title.startswith(name))
        assert column.estimate().mean == pytest.approx(value) and 0 < column.estimate().error < 1
        assert column.prompts is by_title["x"]["margin"].prompts
        assert column.names.tolist() == by_title["x"]["margin"].names.tolist()
    assert len(set(column.names)) == 23 and column.names[0].endswith(":1")
    assert list(columns_by_title((tiny_model(), None), pairs_file)) == ["x"]


def test_kl_is_the_log_ratio_of_an_answer_sampled_once_for_each_prompt(tmp_path, monkeypatch):
    answer, calls = [65, 66, 257], []

    def sample_ids(model, prompts, max_new_tokens, **how):
        calls.append((prompts, max_new_tokens, how))
        return [answer] * len(prompts)

    monkeypatch.setattr(evaluation, "sample_ids", sample_ids)
    file = write_rows(tmp_path / "pairs.jsonl", [PAIR_ROWS[0], *PAIR_ROWS[:3]])
    pairs, models = load_pairs(file, byte_tokenizer()), (tiny_model(), tiny_model(seed=1))
    kl = columns_by_title(models, file, kl_samples=9)["x: critic"]["KL"]
    assert [name.rpartition(":")[2] for name in kl.names] == ["1", "3", "4"]
    for value, pair in zip(kl.values, pairs[1:]):
        logps = [single_logp(model, pair.prompt, answer) for model in models]
        assert value == pytest.approx(logps[0] - logps[1], rel=1e-4)
    ((prompts, max_new_tokens, how),) = calls
    assert prompts == [pair.prompt for pair in pairs[1:]] and max_new_tokens == 5
    assert how == {"stop_ids": {257}, "seed": 3, "rows": None}
    assert len(columns_by_title(models, file, kl_samples=2)["x: critic"]["KL"].values) == 2
    short = [tiny_model(max_position_embeddings=max(map(len, prompts)) + 2) for _ in models]
    columns_by_title(short, file, kl_samples=9)
    assert calls[-1][1] == 2  # the context has room for two tokens


def test_a_reference_with_another_vocabulary_is_refused(pairs_file):
    with pytest.raises(ValueError, match="the reference has 300 token ids, but the run has 258"):
        columns_by_title((tiny_model(), tiny_model(vocab_size=300)), pairs_file)


# --- The command ----------------------------------------------------------------------------------


def trained(checkpoint, pairs_file, out, *flags: str) -> str:
    """Trains for one step and returns the run folder, as the command line names it."""
    common = ["--init", str(checkpoint), "--data", str(pairs_file), "--lr", "1e-3"]
    return str(train.main([*common, "--out", str(out), *flags]))


def summary_of(run: str, loss: str = "mio") -> dict:
    return json.loads((Path(run) / "summary.json").read_text())["table"][loss]


def untrained(checkpoint, folder, **config) -> str:
    """A folder as a run of train.py leaves it, with the weights that it started from."""
    shutil.copytree(checkpoint, folder)
    config = {"init": str(checkpoint), **config}
    (folder / "train_config.json").write_text(json.dumps(config))
    return str(folder)


def test_command_compares_runs_plots_their_curves_and_stores_every_value(
    checkpoint, pairs_file, tmp_path, monkeypatch, capsys
):
    plotted = []
    monkeypatch.setattr(evaluation, "plot", lambda *arguments: plotted.append(arguments))
    runs = [trained(checkpoint, pairs_file, tmp_path / f"mio{seed}", "--seed", str(seed),
                    "--eval_data", str(pairs_file)) for seed in (0, 1)]  # fmt: skip
    flags = ["--plot", str(tmp_path / "curves.png"), "--max_new_tokens", "9", "--kl_samples", "5"]
    bad = write_rows(tmp_path / "bad.jsonl", [*PAIR_ROWS, {"prompt": 1}])
    assert "bad.jsonl:24" in refused([*runs, "--data", str(bad), *flags], capsys)
    assert not plotted
    found = evaluation.main([*runs, str(checkpoint), "--data", str(pairs_file), *flags])
    assert plotted == [({"mio0": [Path(run) for run in runs]}, tmp_path / "curves.png")]
    assert not (checkpoint / "eval.json").exists()
    printed = capsys.readouterr().out
    assert "| mio1 - mio0 |" in printed and "| init |" in printed
    assert "pairs.jsonl\n\n" in printed and "pairs.jsonl: critic\n\n" in printed

    record = json.loads((Path(runs[0]) / "eval.json").read_text())
    items, critic = record["items"].values()
    lengths = load_pairs(pairs_file, byte_tokenizer()).lengths()
    assert len(items["margin"]) == 23 and len(critic["KL"]) == 5
    row = found[runs[0]]
    assert row["T chosen"] == pytest.approx(0.2 * row["Δ chosen"])  # 0.2 is the beta of mio
    assert row["margin"] == pytest.approx(row["T chosen"] - row["T rejected"])
    for side, length in (("chosen", lengths[:, 1]), ("rejected", lengths[:, 2])):
        per_token = np.array(items[f"Δ {side}"]) / length
        assert row[f"Δ/token {side}"] == pytest.approx(per_token.mean())
    assert record["figures"]["pairs.jsonl"]["margin"]["mean"] == row["margin"]
    assert record["argv"][0] == runs[0] and len(record["sha256"][str(pairs_file)]) == 64
    assert record["options"]["kl_samples"] == 5 and record["options"]["runs"][:2] == runs


def test_command_compares_a_run_with_the_model_that_it_started_from(
    checkpoint, pairs_file, tmp_path
):
    data = ["--data", str(pairs_file)]
    run = trained(checkpoint, pairs_file, tmp_path / "out", "--loss", "sft", "--eval_data", data[1])
    found = evaluation.main([run, str(checkpoint), *data, "--kl_samples", "0"])
    stored = read_columns(Path(run) / "items.json")["run"]
    assert list(stored) == ["Δ chosen", "Δ rejected", "reward"]
    for name, column in stored.items():
        assert summary_of(run, "sft")[name] == column.estimate()._asdict()
        assert found[run][name] == pytest.approx(column.estimate().mean, abs=1e-4)
        assert column.names[2] == f"{digest_file(pairs_file)[:16]}:3"
    assert found[run]["Δ chosen"] > 0
    pairs, model = load_pairs(pairs_file, byte_tokenizer()), tiny_model()
    logps = np.array([[single_logp(model, p.prompt, a) for a in p[1:]] for p in pairs])
    assert found[str(checkpoint)] == pytest.approx(dict(zip(SIDES, logps.mean(axis=0))), rel=1e-5)


@pytest.mark.parametrize("flags", [["--loss", "ipo"], ["--average_logps", "--beta", "7"]])
def test_losses_of_means_have_rewards_per_token(flags, checkpoint, pairs_file, tmp_path):
    """Training and evaluation log beta times the log-ratio per token, as the loss sees it."""
    data, beta = ["--data", str(pairs_file)], LOSSES["ipo"].beta if "ipo" in flags else 7.0
    run = trained(checkpoint, pairs_file, tmp_path / "out", *flags, "--eval_data", data[1])
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").open()]
    pairs = load_pairs(pairs_file, byte_tokenizer())
    logps = [[[single_logp(model, p.prompt, a) for a in p[1:]] for p in pairs]
             for model in (tiny_model(), Llama.from_pretrained(run))]  # fmt: skip
    rewards = beta * (np.array(logps[1]) - np.array(logps[0])) / pairs.lengths()[:, 1:]
    found = evaluation.main([run, *data, "--kl_samples", "0"])[run]
    for side, expected in zip(SIDES, rewards.mean(axis=0)):
        assert rows[-1][f"eval_rewards/{side}"] == pytest.approx(expected, rel=1e-3)
        assert found[f"T {side}"] == pytest.approx(expected, rel=1e-3)
        assert found[f"T {side}"] == pytest.approx(beta * found[f"Δ/token {side}"])
    assert rows[-1]["eval_rewards/margins"] == pytest.approx(found["margin"], rel=1e-3)
    lengths = torch.tensor([[2, 4], [0, 5]])  # a missing answer has no tokens
    scale = reward_scale(lengths, loss="ipo", beta=2.0, average_logps=False)
    assert scale.tolist() == [[1.0, 0.5], [2.0, pytest.approx(0.4)]]
    assert reward_scale(lengths, loss="dpo", beta=2.0, average_logps=False) == 2.0


def test_command_truncates_pairs_as_training_did_and_writes_only_the_file_of_out(
    checkpoint, pairs_file, tmp_path
):
    flags = ["--eval_data", str(pairs_file), "--max_length", "50"]
    run, out = trained(checkpoint, pairs_file, tmp_path / "short", *flags), tmp_path / "all.json"
    flags = ["--data", str(pairs_file), "--kl_samples", "0", "--out", str(out)]
    found = evaluation.main([run, *flags])[run]
    assert found["Δ chosen"] == pytest.approx(summary_of(run)["Δ chosen"]["mean"], abs=1e-4)
    assert json.loads(out.read_text()).keys() == {run}
    assert not (Path(run) / "eval.json").exists()


def test_without_data_a_run_is_evaluated_on_the_pairs_that_its_training_held_out(
    checkpoint, pairs_file, tmp_path, monkeypatch
):
    flags = ["--eval_fraction", "0.3", "--seed", "4", "--split_seed", "3", "--max_steps", "1"]
    run = trained(checkpoint, pairs_file, tmp_path / "out", *flags)
    found = evaluation.main([run, "--kl_samples", "0"])[run]
    assert found["Δ chosen"] == pytest.approx(summary_of(run)["Δ chosen"]["mean"], abs=1e-5)
    assert "greedy" not in found
    counts = []

    def task_columns(model, tokenizer, count, samples):
        counts.append((count, samples))
        return {"greedy": Column(np.array([0.0, 1.0]))}

    monkeypatch.setattr(evaluation, "task_columns", task_columns)
    (checkpoint / "base.json").write_text("{}")  # the mark of the demonstration's base model
    assert evaluation.main([run, "--kl_samples", "0"])[run] == {"greedy": 0.5} | found
    assert evaluation.main([str(checkpoint), "--n", "3"])[str(checkpoint)] == {"greedy": 0.5}
    assert counts == [(1000, 4), (1000, 3)]


def test_command_compares_the_rows_that_two_runs_share(checkpoint, tmp_path, capsys):
    """These are the same lines of files with the same content. A run may have dropped some."""
    rows = [*PAIR_ROWS, {"prompt": "long?", "chosen": "x" * 90, "rejected": "y"}, PAIR_ROWS[0]]
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    other = write_rows(tmp_path / "init" / "pairs.jsonl", rows[1:])
    runs = {"a": (file, 99), "b": (file, 80), "c": (other, 99)}
    runs = [untrained(checkpoint, tmp_path / name, eval_data=str(path), max_length=length)
            for name, (path, length) in runs.items()]  # fmt: skip
    evaluation.main([*runs, "--kl_samples", "0"])
    printed = capsys.readouterr()
    assert "1 of 25 rows dropped" in printed.err
    assert "-: the two runs have no items in common" in printed.out
    lines = [line.strip("| ").split(" | ") for line in printed.out.splitlines()[:10]]
    rows = {line[0]: line[1:] for line in lines}
    assert set(rows["c - a"]) == {"-"} and rows["n"][0] == "24-25"
    assert all(cell.startswith("+0.") for cell in rows["b - a"])


def test_several_files_share_one_model_and_their_columns_have_their_names(
    checkpoint, pairs_file, tmp_path, monkeypatch
):
    loaded, load = [], Llama.from_pretrained
    monkeypatch.setattr(Llama, "from_pretrained", lambda *x, **y: loaded.append(x) or load(*x, **y))
    row = {"prompt": "a", "choices": ["b", "c"], "gold": 0}
    file = str(write_rows(tmp_path / "choices.jsonl", [row]))
    argv = [str(checkpoint), "--data", str(pairs_file), file, "--dtype", "float32"]
    found = evaluation.main(argv)[str(checkpoint)]
    assert found.keys() == {
        *(f"pairs.jsonl: {side}" for side in SIDES),
        *(f"choices.jsonl: {name}" for name in ("acc", "acc_norm", "acc_bytes")),
    }
    assert len(loaded) == 1


def test_input_that_cannot_be_evaluated_is_refused_in_one_line(
    checkpoint, pairs_file, tmp_path, capsys
):
    question = {"question": "1 + 1?", "answer": "#### 2"}
    file = str(write_rows(tmp_path / "gsm.jsonl", [question] * 3))
    choices = {"prompt": "a", "choices": ["b", "c"], "gold": 0}
    choices = str(write_rows(tmp_path / "choices.jsonl", [choices]))
    (tmp_path / "there.json").write_text("{}")
    pairs = ["--data", str(pairs_file)]
    for argv, fault in [
        ([], "arguments are required: RUN_OR_CHECKPOINT"),
        (["nowhere"], "nowhere"),
        ([str(checkpoint), "--data", "gone.jsonl"], "gone.jsonl: No such file"),
        ([str(checkpoint)], "has no held-out pairs; name files with --data"),
        ([str(checkpoint), f"{checkpoint}/", *pairs], "is named twice"),
        ([str(checkpoint), "--data", file, "-k", "2"], "-k needs --shots"),
        ([str(checkpoint), "--data", file, "--shots", file, "-k", "4"], "has 3 questions, but -"),
        ([str(checkpoint), "--data", file, "--shots", file, "-k", "2"], "use --shots of another"),
        ([str(checkpoint), "--data", file, "--shots", choices, "-k", "1"], "kind and grade; cha"),
        ([str(checkpoint), "--data", file, "--n", "4", "--temperature", "0"], "--n 4: all greedy"),
        ([str(checkpoint), "--data", file, "--n", "0"], "--n 0: must be at least 1 and at most"),
        ([str(checkpoint), "--data", file, "--n", "1025"], "--n 1025: must be at least 1 and at"),
        ([str(checkpoint), "--data", file, "--top_p", "0"], "--top_p 0: must be at least 1e-06"),
        ([str(checkpoint), "--data", file, "--max_new_tokens", "250"], "gsm.jsonl:1: prompt and"),
        ([str(checkpoint), *pairs, "--out", str(tmp_path / "there.json")], "the file exists; choo"),
        ([str(checkpoint), *pairs, "--out", str(tmp_path)], "must be the name of a file in a"),
        ([str(checkpoint), *pairs, "--out", "no/such/place.json"], "in a folder that exists"),
    ]:
        assert fault in refused(argv, capsys), argv
    assert not list(tmp_path.glob("**/eval.json"))
