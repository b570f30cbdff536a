"""The training step against a naive loop, the checks around it, and whole runs on tiny data."""

import copy
import dataclasses
import functools
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import PAIR_ROWS, logp_alone, tiny_model, write_rows
from runs import metrics, refused, run
from safetensors.torch import load_file

import mio
import train
from data import (
    Pair,
    Pairs,
    StepData,
    encode_example,
    epoch_order,
    load_pairs,
    make_batches,
    split_pairs,
)
from mio import LOSSES, pair_loss
from support import job as job_module
from support.files import read_json
from support.job import TrainingError, mismatched_pairs
from support.rows import Example
from support.run_options import options_of_losses
from support.tokenizers import byte_tokenizer
from train import Options, check_finite, check_first_step, learning_rate, make_optimizer, train_step

# --- The training step ----------------------------------------------------------------------------


def naive_logps(model, pairs) -> torch.Tensor:
    """The log-probs of each pair, every sequence alone: (pairs, 2)."""
    return torch.stack([logp_alone(model, p, side) for p in pairs for side in (1, 2)]).view(-1, 2)


def naive_step(model, optimizer, pairs, ref_logps, options, advantages, mismatched):
    """The oracle of train_step: every sequence alone, the published formula, autograd.

    ref_logps, advantages: (B, 2). mismatched: prompts with the answers of other rows, and their
    log-probs under the reference. Returns the mean loss, the gradient's norm and the log-probs."""
    logps = naive_logps(model, pairs)
    lengths = torch.tensor([[len(answer) for answer in pair[1:]] for pair in pairs])
    extras = {}
    if options.loss == "rlhf":
        extras["advantages"] = advantages.unbind(dim=1)
    if options.loss == "kto":
        with torch.no_grad():
            logratios = naive_logps(model, mismatched[0]) - mismatched[1]
        present = torch.tensor([[len(a) > 0 for a in pair[1:]] for pair in mismatched[0]])
        extras["shared"] = max(0, options.beta * logratios[present].mean().item())
    losses = pair_loss(
        *(options.loss, *logps.unbind(dim=1), *ref_logps.unbind(dim=1)),
        beta=options.beta,
        chosen_lengths=lengths[:, 0],
        rejected_lengths=lengths[:, 1],
        **extras,
    )
    losses.mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad()
    return losses.mean().item(), norm.item(), logps


@pytest.fixture(scope="module")
def start():
    """A model in float64, pairs to train on, the same with a missing answer, and for kto the latter
    with the answers of other rows; then log-probs of the first and the last under a reference."""
    rows = [Example("", row["prompt"], row["chosen"], row["rejected"]) for row in PAIR_ROWS[:7]]
    pairs = Pairs(encode_example(row, byte_tokenizer()) for row in rows)
    unpaired = Pairs([*pairs[:2], pairs[2]._replace(chosen=[]), *pairs[3:]])
    others = mismatched_pairs(unpaired, 100, None)
    model = tiny_model(initializer_range=0.15, num_hidden_layers=1).double()
    with torch.no_grad():
        # Some losses, and K of kto, have a kink where the policy equals the reference.
        ref_logps, ref_others = naive_logps(model, pairs) - 0.2, naive_logps(model, others) - 3
    return model, pairs, unpaired, others, ref_logps, ref_others


# Forward passes of one row, of some rows, and of the whole step; no clipping.
CASES = [(name, 250, 1.0) for name in LOSSES]
CASES += [(name, tokens, 1.0) for name in ("mio", "dv", "kto") for tokens in (1, 100_000)]
CASES += [("mio", 250, 0.0)]


@pytest.mark.parametrize(("name", "micro_tokens", "grad_clip"), CASES)
def test_steps_equal_the_naive_loop_in_any_split(name, micro_tokens, grad_clip, start):
    model, pairs, unpaired, others, ref_logps, ref_others = start
    pairs = unpaired if name == "kto" else pairs
    options = Options(loss=name, beta=0.5, lr=3e-3, weight_decay=0.1, grad_clip=grad_clip)
    fast, slow = copy.deepcopy(model), copy.deepcopy(model)
    advantages = torch.linspace(-1, 2, 14, dtype=torch.float64).view(7, 2)
    optimizers = [make_optimizer(model, options) for model in (fast, slow)]
    for index in ([0, 1, 2, 3, 4], [6, 0]):  # the gradient of a shorter step is a mean, too
        batches = make_batches(pairs, index, 120, micro_tokens)
        mismatched = None
        if LOSSES[name].shared_of_mismatched:
            mismatched = make_batches(others, index, 120, micro_tokens), ref_others
        data = StepData(
            batches,
            ref_logps=ref_logps if LOSSES[name].needs_reference else None,
            advantages=advantages if name == "rlhf" else None,
            mismatched=mismatched,
        )
        losses, logps, norm = train_step(fast, optimizers[0], data, options)
        assert all(parameter.grad is None for parameter in fast.parameters())
        index = [i for batch in batches for i in batch.index]
        loss, expected_norm, expected_logps = naive_step(
            *(slow, optimizers[1], pairs.take(index), ref_logps[index], options),
            advantages[index],
            ([others[i] for i in index], ref_others[index]),
        )
        # The fused update takes the clipping factor in float32.
        assert (losses.mean().item(), norm.item()) == pytest.approx((loss, expected_norm), rel=1e-6)
        torch.testing.assert_close(logps, expected_logps.float())
    for a, b in zip(fast.parameters(), slow.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


@pytest.fixture
def step(pairs_file):
    """The model, the optimizer, the data and the options of a step of four pairs."""
    options = Options(loss="mio", beta=0.2, lr=1e-2)
    pairs, model = load_pairs(pairs_file, byte_tokenizer())[:4], tiny_model(num_hidden_layers=1)
    with torch.no_grad():
        ref_logps = naive_logps(model, pairs)
    batches, index = make_batches(pairs, [0, 1, 2, 3], 120, 120), [0, 1, 2, 3]
    index = [i for batch in batches for i in batch.index]
    data = StepData(batches, ref_logps, pairs=pairs, index=index)
    return model, make_optimizer(model, options), data, options


def weights(model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_a_step_that_is_not_finite_changes_no_weight(step, monkeypatch):
    model, optimizer, data, options = step
    before = weights(model)
    broken = data.ref_logps.clone()
    broken[2, 1] = math.nan

    losses, _, norm = train_step(model, optimizer, data._replace(ref_logps=broken), options)
    assert sorted(losses.isfinite().tolist()) == [False, True, True, True] and norm.isnan()
    with monkeypatch.context() as patch:
        patch.setattr(train, "vector_norm", lambda *_, **__: torch.tensor(math.inf))
        losses, *_ = train_step(model, optimizer, data, options)
    assert losses.isfinite().all() and equal(weights(model), before)
    train_step(model, optimizer, data, options)
    assert not equal(weights(model), before)


def test_only_matrices_decay():
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, Options(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (1.0 if "norm" in name else 0.95)
        torch.testing.assert_close(parameter, expected)


def test_learning_rate_schedules():
    def curve(**changes):
        options = Options(lr=2.0, **changes)
        return [learning_rate(options, step, 10) for step in range(1, 11)]

    assert curve(schedule="constant", warmup=0.0) == [2.0] * 10
    assert curve(schedule="constant", warmup=0.4)[:5] == pytest.approx([0.5, 1, 1.5, 2, 2])
    assert curve(schedule="constant", warmup=0.35)[:4] == pytest.approx([0.5, 1, 1.5, 2])
    assert curve(schedule="linear", warmup=0.0) == pytest.approx([2 - 0.2 * i for i in range(10)])
    cosine = curve(schedule="cosine", warmup=0.2)
    assert cosine[2] == 2.0 and cosine[6] == pytest.approx(1.0) and cosine[-1] > 0
    assert sorted(cosine[2:], reverse=True) == cosine[2:]
    assert curve(warmup=1.0)[-1] == 2.0


def test_the_options_of_a_loss_are_those_that_were_set_for_it():
    assert LOSSES["mio"].arguments(Options(beta=0.3)) == {"beta": 0.3, "average_logps": False}
    sums = {"average_logps": False}
    assert LOSSES["simpo"].arguments(Options(beta=2, gamma=0.0)) == sums | {"beta": 2, "gamma": 0.0}
    assert LOSSES["rpo"].arguments(Options(beta=1, gamma=3.0)) == sums | {"beta": 1, "alpha": 1.0}
    means = Options(beta=1, alpha=0.5, average_logps=True)
    assert LOSSES["rpo"].arguments(means) == {"beta": 1, "alpha": 0.5, "average_logps": True}


# --- Checks ---------------------------------------------------------------------------------------


def test_the_check_runs_on_the_losses_and_log_probs_before_the_update(step):
    model, optimizer, data, options = step
    before = weights(model)

    def check(losses, logps):
        assert equal(weights(model), before)
        assert losses.shape == (4,) and logps.shape == (4, 2)
        check_first_step(options, data, losses, logps)

    train_step(model, optimizer, data, options, check=check)
    assert not equal(weights(model), before)


def test_a_wrong_reference_changes_no_weight(step):
    model, optimizer, data, options = step
    before = weights(model)
    data = data._replace(ref_logps=data.ref_logps.flip(1))
    with pytest.raises(TrainingError, match="policy and reference differ by .* nats"):
        train_step(
            model,
            optimizer,
            data,
            options,
            check=functools.partial(check_first_step, options, data),
        )
    assert equal(weights(model), before)


def start_of(name="dpo", loss=mio.LOG2, drift=0.0, beta=0.1, dtype="float32", **changes):
    """Checks a first step of two pairs with this loss, and with one log-prob off by `drift`."""
    options = Options(loss=name, beta=beta, dtype=dtype, **changes.pop("options", {}))
    ref = torch.tensor([[-1.0, -2.0], [-99.0, -4.0], [-5.0, -6.0]])  # largest in size: 99
    pairs = Pairs([Pair([256], [1, 257], [2, 3, 257])] * 3)  # answers of two and three tokens
    data = StepData([], **{"ref_logps": ref, "index": [1, 2], "pairs": pairs} | changes)
    check_first_step(
        options, data, torch.tensor([loss, loss]), ref[[1, 2]] + torch.tensor([0, drift])
    )


def test_the_first_step_must_have_rewards_of_zero_and_the_known_loss(capsys):
    start_of()
    assert capsys.readouterr().out == "  step 0: rewards 0 within 0.0e+00, loss 0.693147\n"
    start_of(drift=0.009)  # 1e-4 of 1 + 99
    start_of(drift=0.4, dtype="bfloat16")
    start_of("mio", mio.LOG4)
    start_of("ipo", 25.0)
    start_of("ipo", 1.0, beta=0.5)
    start_of("dpo", mio.LOG2 + 0.05, drift=0.009)  # a drift moves the loss, too
    exo = (math.log(0.5 / 0.7) + math.log(0.5 / 0.3)) / 2  # q = 1/2, epsilon = 0.3
    start_of("exo", exo, options={"epsilon": 0.3})
    start_of("mio+0.5*dpo", mio.LOG4 + mio.LOG2 / 2)
    for changes in (
        {"drift": 0.011},
        {"drift": -0.011},
        {"drift": 0.6, "dtype": "bfloat16"},
        {"loss": mio.LOG2 + 1e-4},
        {"loss": mio.LOG2 - 1e-4},
        {"name": "mio"},
        {"name": "ipo", "loss": 25.0, "beta": 0.5},
        {"name": "exo", "loss": exo},
        {"name": "exo", "loss": exo, "options": {"epsilon": 0.2}},
        {"name": "mio+0.5*dpo", "loss": mio.LOG4},
    ):
        with pytest.raises(TrainingError, match="step 0: policy and reference differ"):
            start_of(**changes)
    with pytest.raises(
        TrainingError, match="by 0 nats, .* 1.386294, but it should be 0.693147; rem"
    ):
        start_of(loss=mio.LOG4)


def test_the_first_loss_is_that_of_the_reference_where_it_depends_on_the_answers():
    sft = (99 + 5) / 2 / 2  # the mean of -m_w for chosen answers of two tokens
    start_of("rpo", mio.LOG2 + sft)
    start_of("mio+0.5*sft", mio.LOG4 + sft / 2)
    for name in ("rpo", "mio+0.5*sft"):
        with pytest.raises(TrainingError):
            start_of(name, 7.0)
    with pytest.raises(TrainingError):
        start_of("rpo", mio.LOG2 + sft, drift=5)


def test_the_first_step_is_not_compared_without_a_reference_or_with_advantages():
    start_of("sft", 7.0, drift=5, ref_logps=None)
    start_of("rlhf", 7.0, drift=5, advantages=torch.ones(3, 2))
    start_of(loss=math.nan, drift=5)  # check_finite reports it


def test_rows_that_are_not_finite_are_named_by_line():
    pairs = Pairs()
    for i in range(12):
        pairs.append(([256], [i], [257]), line=10 * i)
    job = SimpleNamespace(options=SimpleNamespace(data="d.jsonl"))
    data, fine = StepData([], pairs=pairs, index=[3, 1, 8]), torch.tensor(1.0)
    check_finite(job, 5, data, torch.ones(3), fine)
    with pytest.raises(
        TrainingError, match="^step 5: the loss or the gradient .* line 10, 80 of d.jsonl; "
    ):
        check_finite(job, 5, data, torch.tensor([1.0, math.inf, math.nan]), fine)
    with pytest.raises(TrainingError, match="for line 30, 10, 80 of"):
        check_finite(job, 5, data, torch.ones(3), torch.tensor(math.nan))
    data = data._replace(index=range(12))
    with pytest.raises(TrainingError, match="for line 0, 10, 20, 30, 40, 50, 60, 70 of"):
        check_finite(job, 5, data, torch.ones(12), torch.tensor(math.inf))


# --- Runs -----------------------------------------------------------------------------------------


@pytest.fixture
def jobs(monkeypatch):
    """Collects the jobs of the runs that a test starts."""
    collected, load = [], train.load_job
    monkeypatch.setattr(train, "load_job", lambda *a: collected.append(load(*a)) or collected[-1])
    return collected


def test_a_wrong_reference_or_loss_ends_a_run_before_its_first_update(
    checkpoint, pairs_file, tmp_path, monkeypatch, jobs
):
    inputs = ["--init", checkpoint, "--data", pairs_file, "--out", tmp_path / "out"]
    right = job_module.reference_logps
    monkeypatch.setattr(job_module, "reference_logps", lambda *a: right(*a).flip(1))
    assert "step 0: policy and reference differ by" in refused(*inputs)
    assert equal(weights(jobs[0].model), weights(tiny_model()))
    monkeypatch.undo()
    wrong = dataclasses.replace(LOSSES["dpo"], function=LOSSES["mio"].function)
    monkeypatch.setitem(LOSSES, "dpo", wrong)
    error = refused(*inputs, "--overwrite", "--loss", "dpo")
    assert "the loss is 1.386294, but it should be 0.693147; remove the cache" in error
    assert not (tmp_path / "out" / "model.safetensors").exists()


def means(logps, ref_logps, beta) -> dict[str, float]:
    """The logged means of log-probs (pairs, 2)."""
    rewards = beta * (logps - ref_logps)
    return {
        "logps/chosen": logps[:, 0].mean(),
        "logps/rejected": logps[:, 1].mean(),
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/margins": (rewards[:, 0] - rewards[:, 1]).mean(),
        "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).double().mean(),
    }


def test_every_metric_of_every_row(checkpoint, pairs_file, tmp_path, monkeypatch):
    """Compares the rows with log-probs of single sequences under the weights of their step."""
    models, seen, norms, real_step = [], [], [], train.train_step

    def spy(model, optimizer, data, options, check):
        models.append(copy.deepcopy(model))
        lrs = {group["lr"] for group in optimizer.param_groups}
        seen.append((len(data.batches), data.index, *lrs))
        losses, logps, norm = real_step(model, optimizer, data, options, check)
        norms.append(norm.item())
        return losses, logps, norm

    monkeypatch.setattr(train, "train_step", spy)
    flags = ("--epochs", "2", "--micro_tokens", "100", "--eval_fraction", "0.13", "--beta", "0.5")
    folder = run(checkpoint, pairs_file, tmp_path / "out", *flags, "--eval_every", "4")
    rows, tokenizer = metrics(folder), byte_tokenizer()
    pairs, held_out = split_pairs(load_pairs(pairs_file, tokenizer), 0.13, seed=0)  # --split_seed
    assert [row["step"] for row in rows] == list(range(7))  # steps of 8, 8 and 4 pairs, twice
    first = models[0]
    models.append(train.Llama.from_pretrained(folder))

    @torch.no_grad()
    def logps_of(model, pairs):
        return naive_logps(model, pairs).double()

    tokens = 0
    for step, row in enumerate(rows[1:], start=1):
        epoch, place = divmod(step - 1, 3)
        index = epoch_order(20, 1, epoch)[8 * place : 8 * place + 8].tolist()
        batches, seen_index, lr = seen[step - 1]
        assert sorted(index) == sorted(seen_index) and batches > 1
        ref, logps = (logps_of(model, pairs.take(index)) for model in (first, models[step - 1]))
        expected = means(logps, ref, 0.5)
        losses = pair_loss("mio", *logps.unbind(1), *ref.unbind(1), beta=0.5)
        tokens += sum(len(p) + len(c) - 1 + len(r) - 1 for p, c, r in pairs.take(index))
        expected |= {"loss": losses.mean(), "step": step, "epoch": step / 3, "num_tokens": tokens}
        expected |= {"learning_rate": lr, "grad_norm": norms[step - 1]}
        if step == 1:  # rewards are rounding errors, of either sign
            row["rewards/accuracies"] = expected["rewards/accuracies"] = 0
        found = {name: value for name, value in row.items() if name[:5] != "eval_"}
        assert found == pytest.approx(
            {k: float(v) for k, v in expected.items()}, rel=1e-4, abs=1e-4
        )
        assert lr == learning_rate(Options(lr=1e-3), step, 6)
    for step in (0, 4, 6):
        ref, logps = (logps_of(model, held_out) for model in (first, models[step]))
        expected = means(logps, ref, 0.5)
        losses = pair_loss("mio", *logps.unbind(1), *ref.unbind(1), beta=0.5)
        T = 0.5 * (logps - ref)
        expected |= {
            "loss": losses.mean(),
            "mi/dv": T[:, 0].mean() - T.exp().mean().log(),
            "mi/js": math.log(4) - losses.mean(),
            "mi/nwj": 1 + T[:, 0].mean() - T.exp().mean(),
        }
        found = {name[5:]: value for name, value in rows[step].items() if name[:5] == "eval_"}
        assert found == pytest.approx(
            {k: float(v) for k, v in expected.items()}, rel=1e-4, abs=1e-4
        )
    assert [step for step, row in enumerate(rows) if "eval_loss" in row] == [0, 4, 6]
    assert rows[0]["eval_rewards/chosen"] == rows[0]["eval_rewards/accuracies"] == 0.0
    assert rows[0].keys() - {"step", "epoch"} == {n for n in rows[4] if n[:5] == "eval_"}


def test_seconds_and_tokens_are_those_since_the_last_row(
    checkpoint, pairs_file, tmp_path, monkeypatch
):
    """A fake clock: six seconds pass in a step, and a hundred in an evaluation."""
    now, real_step, real_logps = [0.0], train.train_step, train.logps_of

    def pass_time(seconds, function):
        def timed(*args):
            now[0] += seconds
            return function(*args)

        return timed

    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(train, "train_step", pass_time(6, real_step))
    monkeypatch.setattr(train, "logps_of", pass_time(100, real_logps))
    flags = ("--epochs", "4", "--log_every", "3", "--eval_every", "4", "--max_steps", "11")
    folder = run(checkpoint, pairs_file, tmp_path / "out", *flags)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [train.json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [0, 3, 4, 6, 8, 9]
    assert [row["step_seconds"] for row in rows[1:]] == [6.0] * 5
    for before, row in zip([{"step": 0, "num_tokens": 0}, *rows[1:]], rows[1:]):
        tokens, steps = (row[name] - before[name] for name in ("num_tokens", "step"))
        assert row["tokens_per_second"] == pytest.approx(tokens / (6 * steps))


def test_averages_have_a_beta_that_the_mean_length_of_the_answers_scales(
    checkpoint, pairs_file, tmp_path, jobs, capsys
):
    """The rewards of an answer of mean length are then those that sums would have."""
    run(checkpoint, pairs_file, tmp_path / "out", "--average_logps", "--max_steps", "1")
    lengths = [len(answer) for pair in jobs[0].pairs for answer in pair[1:]]  # not of held-out ones
    tokens = sum(lengths) / len(lengths)
    assert jobs[0].options.beta == pytest.approx(0.2 * tokens) and tokens > 10
    printed = capsys.readouterr().out
    assert f"beta is 0.2 times {tokens:.1f}, the mean tokens of an answer" in printed
    assert f"beta {0.2 * tokens:g}" in printed
    config = read_json(tmp_path / "out" / "train_config.json")
    assert config["beta"] == jobs[0].options.beta and config["average_logps"] is True
    own = ("--average_logps", "--beta", "3", "--max_steps", "1", "--overwrite")
    run(checkpoint, pairs_file, tmp_path / "out", *own)
    assert jobs[1].options.beta == 3.0 and "mean tokens" not in capsys.readouterr().out
    sides = [{"prompt": r["prompt"], "completion": r["chosen"], "label": True} for r in PAIR_ROWS]
    labeled = write_rows(tmp_path / "labeled.jsonl", sides)
    flags = ("--loss", "kto", "--average_logps", "--max_steps", "1")
    run(checkpoint, labeled, tmp_path / "kto", *flags)  # missing answers do not count
    chosen = [len(pair.chosen) for pair in jobs[2].pairs]
    assert jobs[2].options.beta == pytest.approx(0.1 * sum(chosen) / len(chosen))


def test_the_bar_shows_metrics_on_a_terminal(checkpoint, pairs_file, tmp_path, capsys, monkeypatch):
    run(checkpoint, pairs_file, tmp_path / "file")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(train.sys.stderr, "isatty", lambda: True)
    row = metrics(run(checkpoint, pairs_file, tmp_path / "terminal"))[-1]
    shown = capsys.readouterr().err
    assert "mio:" in shown
    assert list(train.BAR.values()) == ["loss", "margin", "accuracy", "reward", "cut off"]
    for name, label in list(train.BAR.items())[:3]:  # the others belong to drawn answers
        assert f"{label}={row[name]:.3g}" in shown
    assert "reward=" not in shown and "cut off=" not in shown


def test_answers_that_are_missing_have_no_value(checkpoint, tmp_path, monkeypatch):
    """Unpaired rows for kto, and single answers for sft: means over the answers that there are."""
    sides = [(row, side) for row in PAIR_ROWS[:9] for side in ("chosen", "rejected")]
    labeled = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row, side in sides[:14]
    ]
    data = write_rows(tmp_path / "labeled.jsonl", labeled)
    eval_data = write_rows(tmp_path / "held_out.jsonl", [*labeled[:5], labeled[8]])
    single = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in PAIR_ROWS[:3]]
    single = write_rows(tmp_path / "single.jsonl", single)
    model = tiny_model()

    def sums(file, side):
        """The log-probs and lengths of the answers of one side in a file."""
        pairs = [p for p in load_pairs(file, byte_tokenizer()) if p[side]]
        with torch.no_grad():
            logps = torch.stack([logp_alone(model, pair, side) for pair in pairs])
        return logps, torch.tensor([len(pair[side]) for pair in pairs])

    def close(number):
        return pytest.approx(float(number), rel=1e-5)

    flags = ("--loss", "kto", "--eval_data", str(eval_data), "--batch_size", "14")
    start, first = metrics(run(checkpoint, data, tmp_path / "kto", *flags))
    assert start["eval_loss"] is first["eval_loss"] is None  # no held-out row has a K
    for name in ("rewards/margins", "rewards/accuracies"):
        assert start[f"eval_{name}"] is first[f"eval_{name}"] is first[name] is None
    for side, name in ((1, "chosen"), (2, "rejected")):
        assert start[f"eval_logps/{name}"] == close(sums(eval_data, side)[0].mean())
        assert first[f"logps/{name}"] == close(sums(data, side)[0].mean())
        assert abs(first[f"rewards/{name}"]) < 1e-4 < abs(first[f"eval_rewards/{name}"])
    assert first["loss"] == pytest.approx(0.5, abs=1e-5)
    flags = ("--loss", "sft", "--eval_data", str(single))
    start, first = metrics(run(checkpoint, single, tmp_path / "sft", *flags))
    logps, lengths = sums(single, 1)
    assert start["eval_logps/chosen"] == first["logps/chosen"] == close(logps.mean())
    assert start["eval_loss"] == first["loss"] == close(-(logps / lengths).mean())
    missing = ("eval_logps/rejected", "eval_rewards/rejected", "eval_rewards/margins", "eval_mi/dv")
    assert all(start[name] is None for name in missing) and first["logps/rejected"] is None


def test_kto_compares_with_the_rewards_of_mismatched_pairs(
    checkpoint, pairs_file, tmp_path, monkeypatch
):
    collected, shared = [], LOSSES["kto"].shared

    def spy(*sides):
        collected.append(sides)
        return shared(*sides)

    monkeypatch.setitem(LOSSES, "kto", dataclasses.replace(LOSSES["kto"], shared=spy))
    rows = metrics(run(checkpoint, pairs_file, tmp_path / "out", "--loss", "kto", "--epochs", "3"))
    logratios = [torch.cat([side.logratios for side in sides]) for sides in collected]
    assert len(logratios) == 9 and len(logratios[0]) == 16 and collected[0][0].beta == 0.1
    # The log-ratios are relative to a reference.
    assert logratios[0].abs().max() < 1e-3 < logratios[-1].abs().max()
    assert rows[1]["loss"] == pytest.approx(0.5, abs=1e-5) and rows[-1]["loss"] < 0.5


def test_the_run_folder_holds_a_checkpoint_that_transformers_loads_and_a_summary(
    checkpoint, pairs_file, tmp_path, capsys
):
    transformers = pytest.importorskip("transformers")
    folder = run(checkpoint, pairs_file, tmp_path / "out", "--max_steps", "2")
    rows, summary = metrics(folder), read_json(folder / "summary.json")
    assert {name: summary[name] for name in rows[-1]} == rows[-1] and summary["step"] == 2
    assert summary["seconds"] > 0
    for side in ("chosen", "rejected"):
        moved = rows[-1][f"eval_logps/{side}"] - rows[0][f"eval_logps/{side}"]
        figure = summary["table"]["mio"][f"Δ {side}"]
        assert figure["mean"] == pytest.approx(moved, abs=1e-4) and figure["n"] == 2
    assert "Δ chosen   Δ rejected   reward %" in capsys.readouterr().out
    config = read_json(folder / "train_config.json")
    assert {field.name for field in dataclasses.fields(Options)} <= config.keys()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = transformers.AutoTokenizer.from_pretrained(folder).encode(PAIR_ROWS[0]["prompt"])
    assert ids == load_pairs(pairs_file, byte_tokenizer())[0].prompt
    ours = train.Llama.from_pretrained(folder)
    with torch.no_grad():
        tokens = torch.tensor([ids])
        assert (theirs(tokens).logits - ours(tokens) @ ours.head_weight.T).abs().max() <= 1e-4


def test_the_same_command_gives_the_same_metrics_to_the_last_digit(
    checkpoint, pairs_file, tmp_path
):
    first = run(checkpoint, pairs_file, tmp_path / "a" / "run")
    again = run(checkpoint, pairs_file, tmp_path / "a" / "again")  # finds the reference
    fresh = run(checkpoint, pairs_file, tmp_path / "b" / "run")
    assert metrics(first) == metrics(again) == metrics(fresh)
    a, b, start = (load_file(f / "model.safetensors") for f in (first, fresh, checkpoint))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["model.norm.weight"], start["model.norm.weight"])


def test_zero_steps_leave_the_weights_alone(checkpoint, pairs_file, tmp_path):
    folder = run(checkpoint, pairs_file, tmp_path / "out", "--max_steps", "0")
    before, after = (load_file(f / "model.safetensors") for f in (checkpoint, folder))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [row["step"] for row in metrics(folder)] == [0]


def test_one_pair_trains_in_a_batch_larger_than_the_data(checkpoint, tmp_path, capsys):
    file = write_rows(tmp_path / "one.jsonl", PAIR_ROWS[:1])
    flags = ("--eval_fraction", "0", "--batch_size", "64")
    rows = metrics(run(checkpoint, file, tmp_path / "out", *flags))
    assert [row["step"] for row in rows] == [0, 1] and "eval_loss" not in rows[1]
    assert "Δ chosen" not in capsys.readouterr().out  # there is nothing for the table


def test_training_stops_at_a_loss_or_at_weights_that_are_not_finite(
    checkpoint, pairs_file, tmp_path
):
    before = (checkpoint / "model.safetensors").read_bytes()
    inputs = ["--init", checkpoint, "--data", pairs_file, "--batch_size", "8", "--warmup", "0"]
    for log_every in ("1", "3"):  # the step is named, even if its losses are read later
        flags = ("--lr", "1e30", "--log_every", log_every, "--overwrite")
        error = refused(*inputs, *flags, "--out", tmp_path / "out")
        assert "step 2: the loss or the gradient is not finite" in error and "--lr" in error
        assert not (tmp_path / "out" / "model.safetensors").exists()
    # No loss shows what the last step does to the weights.
    error = refused(*inputs, "--lr", "1e39", "--max_steps", "1", "--out", tmp_path / "last")
    assert "step 1: the weights are not finite; try a lower --lr" in error
    assert not (tmp_path / "last" / "model.safetensors").exists()
    assert (checkpoint / "model.safetensors").read_bytes() == before


# --- Flags ----------------------------------------------------------------------------------------

SMALL = {"--loss": "mio", "--eval_every": "2", "--batch_size": "3", "--eval_fraction": "0.25",
         "--epochs": "2"}  # fmt: skip
# Two steps in which a chosen answer loses probability; only then does dpop differ from dpo.
QUICK = (
    SMALL
    | {"--epochs": "1", "--lr": "1e-2", "--warmup": "0"}
    | dict.fromkeys(("--seed", "--split_seed"), "2")
)
CHANGES = {
    "--loss": "dpo", "--beta": "0.9", "--epochs": "1", "--max_steps": "2", "--batch_size": "5",
    "--max_length": "50", "--lr": "2e-3", "--warmup": "0.9", "--schedule": "constant",
    "--weight_decay": "0.5", "--grad_clip": "0.01", "--seed": "2", "--dtype": "bfloat16",
    "--eval_fraction": "0.4", "--eval_every": "1", "--log_every": "3", "--eval_data": "OTHER",
    "--split_seed": "3", "--average_logps": "", "--weights": "bfloat16",
}  # fmt: skip
# Options of losses: a value, and the losses that have the option. A new option is set to 0.3.
OWN = {f"--{name}": ("0.3", " ".join(losses)) for name, losses in options_of_losses().items()} | {
    "--label_smoothing": ("0.3", "cdpo robust"),
    "--epsilon": ("0.3", "exo"),
    "--gamma": ("3", "simpo"),
    "--alpha": ("0.2", "rpo cpo"),
    "--dpop_lambda": ("1", "dpop"),
}
# Flags that change memory use or the device: the metrics stay equal up to rounding.
NO_CHANGE = {
    "--row_tokens": "400", "--micro_tokens": "90", "--checkpointing": "on", "--compile": "on",
    "--device": "cpu", "--save_every": "2", "--keep": "1",
}  # fmt: skip
ELSEWHERE = (
    "init data out config resume overwrite on_policy samples max_new_tokens lora_rank "
    "lora_alpha lora_targets lora_rslora plan gpu jobs columns chat_template_kwargs"
)


@pytest.fixture
def trained(tmp_path):
    """A function from flags to the metrics of a run on eight pairs."""
    tiny_model(num_hidden_layers=1).save_pretrained(tmp_path / "init")
    byte_tokenizer().save(tmp_path / "init")
    data = write_rows(tmp_path / "eight.jsonl", PAIR_ROWS[:8])

    def metrics_of(flags: dict[str, str]) -> list[dict]:
        argv = [word for flag in flags.items() for word in flag if word]
        return metrics(run(tmp_path / "init", data, tmp_path / "out", "--overwrite", *argv))

    return metrics_of


def test_every_flag_has_a_test():
    names = {f"--{field.name}" for field in dataclasses.fields(Options)}
    assert names == {*CHANGES, *OWN, *NO_CHANGE, *(f"--{name}" for name in ELSEWHERE.split())}


def test_every_flag_of_the_mathematics_changes_the_metrics(trained, tmp_path):
    other = str(write_rows(tmp_path / "other.jsonl", PAIR_ROWS[:3]))
    plain = trained(SMALL)
    for flag, value in CHANGES.items():
        assert trained(SMALL | {flag: value.replace("OTHER", other)}) != plain, flag
    for flag, (value, losses) in OWN.items():
        for loss in losses.split():
            plain = trained(QUICK | {"--loss": loss})
            assert trained(QUICK | {"--loss": loss, flag: value}) != plain, (flag, loss)


def test_flags_of_memory_and_place_change_no_metric(trained, monkeypatch):
    compiled = []  # records what --compile would compile; real compilation takes a minute
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled.append(f) or f)
    head = mio._compiled_residual_of_rows.__wrapped__  # without the cache, which outlives the test
    monkeypatch.setattr(mio, "_compiled_residual_of_rows", head)
    plain = trained(SMALL)
    for flag, value in NO_CHANGE.items():
        rows = trained(SMALL | {flag: value})
        of_head = mio._residual_of_rows in compiled
        of_block = any(f is not mio._residual_of_rows for f in compiled)
        assert of_head == of_block == (flag == "--compile"), flag
        compiled.clear()
        for row, expected in zip(rows, plain, strict=True):
            if row["step"] == 1:  # rewards are rounding errors, of either sign
                row["rewards/accuracies"] = expected["rewards/accuracies"]
            assert row == pytest.approx(expected, rel=1e-3, abs=1e-5), flag


def test_each_loss_trains_other_weights_and_logs_rewards_if_it_has_a_reference(
    trained, monkeypatch
):
    ends, of_pairs = {}, [name for name in LOSSES if LOSSES[name].answers != "drawn"]
    for name in of_pairs:
        rows = trained(QUICK | {"--loss": name})
        ends[name] = (rows[-1]["eval_logps/chosen"], rows[-1]["eval_logps/rejected"])
        assert ("rewards/chosen" in rows[1]) == LOSSES[name].needs_reference
        assert (rows[2]["eval_loss"] is None) == (name == "kto")
    assert len(set(ends.values())) == len(of_pairs)
    monkeypatch.setattr(job_module, "reference_logps", None)  # sft must not call it
    trained(QUICK | {"--loss": "sft"})
