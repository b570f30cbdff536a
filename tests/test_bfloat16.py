"""support/bfloat16.py: stochastic rounding, the optimizer and runs with --weights bfloat16."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import tiny_model
from runs import make_inputs, metrics, refused, run
from safetensors.torch import load_file

import eval as evaluation
import train
from data import Pair, StepData, make_batches
from support import bfloat16
from support.bfloat16 import StochasticAdamW, adamw, random_bits, round_stochastically
from support.files import read_json

ROUNDINGS = 10_000


def scalar(value, dtype=torch.int32) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype)


KEY = torch.tensor([7, 12345], dtype=torch.int32)


# --- Rounding -------------------------------------------------------------------------------------


def values_of_the_whole_range() -> torch.Tensor:
    """float32 values with exponents from subnormal numbers to the largest bfloat16, both signs."""
    torch.manual_seed(0)
    bits = torch.randint(0, 0x7F7F0000, (2000,), dtype=torch.int32)
    values = bits.view(torch.float32) * torch.tensor([1.0, -1.0]).repeat(1000)
    return torch.cat([values, torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-40, 3.38e38])])


def neighbors(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bfloat16 numbers next to float32 values, toward zero and away from zero, as float64."""
    toward = values.view(torch.int32) & ~0xFFFF
    return toward.view(torch.float32).double(), (toward + 0x10000).view(torch.float32).double()


def errors_in_standard_errors(rounded_means: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The error of means (n,), float64, in units of their standard error, known from the values."""
    toward, away = neighbors(values)
    share = (values.double() - toward) / (away - toward)  # of roundings that go away from zero
    standard_error = (away - toward).abs() * (share * (1 - share) / ROUNDINGS).sqrt()
    errors = (rounded_means - values.double()).abs()
    return torch.where(share == 0, errors, errors / standard_error)


def test_rounding_is_unbiased_over_the_whole_range_and_ordinary_rounding_is_not():
    values, key = values_of_the_whole_range(), KEY
    total = torch.zeros(len(values), dtype=torch.float64)
    for counter in range(ROUNDINGS):
        bits = random_bits(0, len(values), key, scalar(counter))
        rounded = round_stochastically(values, bits)
        total += rounded.double() / ROUNDINGS
    found = errors_in_standard_errors(total, values)
    # About 1 in 16,000 means of normal errors is beyond 4 standard errors.
    assert found.max() < 4.5 and (found > 4).sum() <= 1
    assert 0.9 < found.square().mean() < 1.1  # as random as independent roundings
    ordinary = errors_in_standard_errors(values.bfloat16().double(), values)
    assert (ordinary > 4).float().mean() > 0.9


def test_rounding_goes_to_a_neighbor_and_keeps_what_a_bfloat16_can_hold():
    values = values_of_the_whole_range()
    bits = torch.randint(-(2**31), 2**31 - 1, values.shape, dtype=torch.int32)
    rounded = round_stochastically(values, bits).float()
    toward, away = neighbors(values)
    assert ((rounded == toward) | (rounded == away)).all()
    assert (rounded == toward).any() and (rounded == away).any()
    exact = values.bfloat16()
    assert torch.equal(round_stochastically(exact.float(), bits), exact)
    special = torch.tensor([math.inf, -math.inf, math.nan])
    kept = round_stochastically(special, torch.full((3,), -1, dtype=torch.int32))
    assert kept[:2].tolist() == [math.inf, -math.inf] and kept[2].isnan()
    other = torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32)  # a GPU's NaN, and another
    assert round_stochastically(other.view(torch.float32), other).isnan().all()


def test_random_bits_depend_on_element_key_and_counter_and_look_random():
    count, keys = 2**16, torch.tensor([[3, 9], [4, 10], [2**30, -5]], dtype=torch.int32)
    bits = random_bits(0, count, keys[0], scalar(5))
    assert torch.equal(bits[1000:2000], random_bits(1000, 1000, keys[0], scalar(5)))
    others = [random_bits(0, count, key, scalar(5)) for key in keys[1:]]
    others += [random_bits(0, count, keys[0], scalar(6))]
    for other in others:
        assert (bits == other).float().mean() < 1e-3
        # Nor are they the same numbers in another order, which would make elements twins.
        assert torch.isin(bits, other).float().mean() < 1e-3
    for position in range(32):
        ones = (bits >> position) & 1
        assert abs(ones.float().mean() - 0.5) < 4 * 0.5 / count**0.5
        for other in (*others, bits.roll(1)):
            equal = (ones == ((other >> position) & 1)).float().mean()
            assert abs(equal - 0.5) < 4.5 * 0.5 / count**0.5
    assert len(bits.unique()) == count  # for one key and counter, the map is one to one


# --- The optimizer --------------------------------------------------------------------------------


def test_the_exact_update_is_that_of_torch():
    torch.manual_seed(0)
    lr, weight_decay = 1e-2, 0.1
    theirs = torch.randn(500, requires_grad=True)
    ours = theirs.detach().clone(), torch.zeros(500), torch.zeros(500)
    oracle = torch.optim.AdamW([theirs], lr, weight_decay=weight_decay, fused=True)
    for step in range(1, 21):
        theirs.grad = torch.randn(500) * 10.0 ** (step % 5)
        oracle.step()
        decay = 1 - lr * weight_decay
        ours = adamw(ours[0], theirs.grad, *ours[1:], scalar(float(step), torch.float32), lr, decay)
    torch.testing.assert_close(ours[0], theirs.detach(), rtol=1e-5, atol=1e-6)
    moments = oracle.state[theirs]
    torch.testing.assert_close(ours[1], moments["exp_avg"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours[2], moments["exp_avg_sq"], rtol=1e-5, atol=1e-4)


def after_a_step(seed: int, grads: list, compiled=False, lr=1e-4, skip=0.0, scale=1.0, decay=0.0):
    """A weight (n,) of ones and its moments after a step on the sum of gradients (n,)."""
    p = torch.ones(len(grads[0]), dtype=torch.bfloat16, requires_grad=True)
    optimizer = StochasticAdamW([p], lr, decay, seed, compiled)
    for grad in grads:
        (p * grad).sum().backward()
    summed = p.grad.clone()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(skip)
    optimizer.step()
    state = optimizer.state[p]
    return p.detach(), state["exp_avg"], state["exp_avg_sq"], summed, state["step"]


def test_steps_far_below_the_spacing_move_weights_on_average():
    """Near 1, neighbors of a bfloat16 are 0.0039 below and 0.0078 above; the step is 1e-4."""
    count = 100_000
    grad = torch.full((count,), 0.3, dtype=torch.bfloat16)
    weight, mean, square, *_ = after_a_step(0, [grad])
    exact, g = 1 - 1e-4, grad[0].double()
    assert torch.tensor(exact).bfloat16() == 1  # ordinary rounding undoes the step
    assert set(weight.tolist()) == {1.0, 1 - 2**-8}
    for found, expected in ((weight, exact), (mean, 0.1 * g), (square, 0.001 * g * g)):
        values = found.double()
        assert abs(values.mean() - expected) < 4 * values.std() / count**0.5
        assert values.std() > 0
    shares = [(x.double() != x.double().max()).double() for x in (weight, mean, square)]
    for one, other in ((0, 1), (0, 2), (1, 2)):  # the three roundings are independent
        assert abs(np.corrcoef(shares[one], shares[other])[0, 1]) < 4 / count**0.5


def test_small_gradients_of_later_passes_count():
    """A sum of 1 and 64 times 0.002, in which every ordinary rounding would drop the small term."""
    count = 20_000
    grads = [torch.ones(count)] + [torch.full((count,), 0.002)] * 64
    grads = [grad.bfloat16() for grad in grads]
    *_, summed, _ = after_a_step(0, grads)
    ordinary = torch.ones((), dtype=torch.bfloat16)
    for grad in grads[1:]:
        ordinary += grad[0]
    assert ordinary == 1
    exact = sum(grad[0].double() for grad in grads)
    values = summed.double()
    assert abs(values.mean() - exact) < 4 * values.std() / count**0.5
    assert exact - 1 > 0.12
    # With share f = 0.002 / 2^-7 of roundings going up, independently in each of 64 passes:
    share = 0.002 * 2**7
    assert values.std() == pytest.approx((64 * share * (1 - share)) ** 0.5 / 2**7, rel=0.05)


def test_the_numbers_depend_on_seed_step_parameter_and_pass(monkeypatch):
    grads = [torch.full((4000,), x).bfloat16() for x in (1, 0.002, 0.002)]
    first = after_a_step(0, grads, lr=1e-3)
    assert all(map(torch.equal, first, after_a_step(0, grads, lr=1e-3)))
    assert not torch.equal(first[0], after_a_step(1, grads, lr=1e-3)[0])
    assert not torch.equal(first[3], after_a_step(1, grads, lr=1e-3)[3])
    monkeypatch.setattr(bfloat16, "EAGER_CHUNK", 37)  # chunks change nothing
    assert all(map(torch.equal, first, after_a_step(0, grads, lr=1e-3)))
    two = [torch.ones(4000, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    optimizer = StochasticAdamW(two, 1e-3, 0.0, 0, False)
    moved = []
    for _ in range(2):
        for p in two:
            p.data.fill_(1)
            p.grad = grads[0].clone()
            for key in ("exp_avg", "exp_avg_sq"):
                optimizer.state[p][key].zero_()
        optimizer.step()
        moved += [(p != 1).float() for p in two]
    for i in range(4):
        for j in range(i):
            assert abs(np.corrcoef(moved[i], moved[j])[0, 1]) < 4 / 4000**0.5, (i, j)
    assert [optimizer.state[p]["step"].item() for p in two] == [2, 2]


def test_scale_skip_and_decay_are_those_of_the_fused_optimizer():
    grads = [torch.full((1000,), 0.25).bfloat16()]
    halved = [torch.full((1000,), 0.5).bfloat16()]
    assert all(map(torch.equal, after_a_step(0, grads)[:3], after_a_step(0, halved, scale=2.0)[:3]))
    weight, mean, square, _, step = after_a_step(0, [g * math.inf for g in grads], skip=1.0)
    assert step == 0 and (weight == 1).all() and not mean.any() and not square.any()
    kept, gone = (after_a_step(0, [0 * grads[0]], lr=0.1, decay=d)[0] for d in (0.0, 0.5))
    assert (kept == 1).all() and abs(gone.double().mean() - 0.95) < 1e-3


def test_the_compiled_update_is_the_same_to_the_bit():
    torch.manual_seed(0)
    grads = [torch.randn(3000).bfloat16()]  # sums are compiled in tests/test_gpu.py
    eager, compiled = (after_a_step(0, grads, c, decay=0.1) for c in (False, True))
    # The compiler may fuse a product and a sum, so a few exact values differ by a float32 rounding.
    for one, other in zip(eager, compiled):
        assert (one != other).float().mean() < 1e-3


# --- A training step and runs ---------------------------------------------------------------------

BFLOAT16 = {"weights": "bfloat16", "dtype": "bfloat16"}


def test_a_step_follows_the_step_in_float32():
    """The first update of AdamW is lr times the sign of the gradient; most signs agree."""
    rng = np.random.default_rng(0)
    pairs = [Pair(*(rng.integers(0, 256, n).tolist() for n in (9, 7, 8))) for _ in range(6)]
    moved = []
    for more in ({}, BFLOAT16):
        options = train.Options(loss="mio", beta=0.2, lr=0.01, warmup=0.0, **more)
        model = tiny_model(tie_word_embeddings=True)
        model.to(getattr(torch, options.weights))
        before = {name: p.detach().double() for name, p in model.named_parameters()}
        optimizer = train.make_optimizer(model, options)
        batches = make_batches(pairs, list(range(6)), 24, 48)
        assert len(batches) > 2
        ref = train.evaluation.pair_logps(model, pairs, 24, 48, getattr(torch, options.dtype))
        losses, _, norm = train.train_step(model, optimizer, StepData(batches, ref), options)
        assert all(p.dtype == getattr(torch, options.weights) for p in model.parameters())
        moved.append(
            (losses, norm, {n: p.double() - before[n] for n, p in model.named_parameters()})
        )
    (losses, norm, exact), (rounded_losses, rounded_norm, rounded) = moved
    torch.testing.assert_close(rounded_losses, losses, atol=0.01, rtol=0)
    torch.testing.assert_close(rounded_norm, norm, rtol=0.05, atol=0)
    for name, change in exact.items():
        both = torch.stack([change.flatten(), rounded[name].flatten()])
        large = both[:, change.flatten().abs() > 0.005]
        assert np.corrcoef(large.detach())[0, 1] > 0.8, name


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("bfloat16"))


def test_a_run_stores_everything_in_bfloat16(inputs, tmp_path):
    """tests/test_checkpoints.py compares resumed runs."""
    flags = ("--micro_tokens", "200", "--checkpointing", "on", "--save_every", "2")
    out = run(*inputs, tmp_path / "out", "--weights", "bfloat16", *flags, "--max_steps", "2")
    weights = load_file(out / "model.safetensors")
    assert {x.dtype for x in weights.values()} == {torch.bfloat16}
    moments = load_file(out / "checkpoints" / "step-000002" / "training.safetensors")
    kinds = {n: x.dtype for n, x in moments.items() if n.startswith("moments.exp_avg")}
    assert set(kinds.values()) == {torch.bfloat16} and len(kinds) == 2 * len(weights)
    config = read_json(out / "train_config.json")
    assert config["weights"] == config["dtype"] == "bfloat16"
    assert metrics(out)[1]["rewards/margins"] == pytest.approx(0, abs=0.05)
    flags = ("--weights", "bfloat16", "--dtype", "float32", "--max_steps", "1")
    out = run(*inputs, tmp_path / "float32", *flags)
    assert metrics(out)[1]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    run(*inputs, tmp_path / "plain", "--max_steps", "1")
    assert len([*(tmp_path / "cache").iterdir()]) == 3  # each precision has its own log-probs


def test_answers_are_those_of_the_same_weights_in_float32():
    model = tiny_model().to(torch.bfloat16)
    model.float32, exact = True, copy.deepcopy(model).float()
    prompts = [[1, 2, 3], [4, 5, 6, 7]]
    expected = exact.generate(prompts, 20, temperature=0)
    assert model.generate(prompts, 20, temperature=0) == expected


def test_evaluation_rounds_the_reference_as_training_did(inputs, tmp_path):
    out = run(*inputs, tmp_path / "out", "--weights", "bfloat16", "--max_steps", "0")
    found = evaluation.main([str(out)])[str(out)]
    assert found["Δ chosen"] == found["Δ rejected"] == 0


def test_what_does_not_fit_is_refused_by_name(inputs, tmp_path):
    command = ["--init", inputs[0], "--data", inputs[1], "--out", tmp_path / "out"]
    error = refused(*command, "--weights", "bfloat16", "--lora_rank", "4")
    assert "--weights bfloat16: with --lora_rank" in error and "leave out --weights" in error
    assert not (tmp_path / "out").exists()
    half = run(*inputs, tmp_path / "half", "--max_steps", "1")
    error = refused("--resume", "--out", half, "--weights", "bfloat16")
    assert "--weights: the resumed run uses float32" in error
