"""The objective: published values, the theorems behind them, the fused head against its oracle."""

import math

import pytest
import torch

import mio
from mio import LOSSES, chunked_logps, fused_pair_loss, naive_logps, pair_loss

PAIRWISE = [name for name, loss in LOSSES.items() if loss.pairwise]
REFERENCE = (-20.0, -30.0)
LENGTHS = (10, 20)
# beta 0.1; for each policy (s_w, s_l): loss, d loss / d s_w, d loss / d s_l, from the formulas.
VALUES = {
    "dpo": [
        (0.693147, -0.05000, +0.05000),
        (0.598139, -0.04502, +0.04502),
        (0.313262, -0.02689, +0.02689),
    ],
    "mio": [
        (1.386294, -0.02500, +0.02500),
        (1.338793, -0.02125, +0.02375),
        (1.311822, -0.04337, +0.00912),
    ],
    "bce": [
        (1.386294, -0.05000, +0.05000),
        (1.288793, -0.04750, +0.04750),
        (1.175490, -0.06225, +0.01824),
    ],
    "sft": [(2.0, -0.10000, 0.0), (1.9, -0.10000, 0.0), (2.5, -0.10000, 0.0)],
}
POLICIES = [(-20.0, -30.0), (-19.0, -31.0), (-25.0, -45.0)]


def double(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loss_and_gradient(name: str, policy, beta: float = 0.1):
    s_w, s_l = (double(s).requires_grad_() for s in policy)
    loss = pair_loss(
        *(name, s_w, s_l, double(REFERENCE[0]), double(REFERENCE[1])),
        beta=beta,
        chosen_lengths=torch.tensor([LENGTHS[0]]),
        rejected_lengths=torch.tensor([LENGTHS[1]]),
    )
    loss.sum().backward()
    gradients = [0.0 if s.grad is None else s.grad.item() for s in (s_w, s_l)]
    return loss.item(), *gradients


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("column", range(3))
def test_losses_have_their_published_values_and_gradients(name, column):
    got = loss_and_gradient(name, POLICIES[column])
    loss, *gradients = VALUES[name][column]
    assert got[0] == pytest.approx(loss, abs=1e-6)
    assert got[1:] == pytest.approx(gradients, abs=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_declared_start_is_the_loss_at_the_reference(name):
    if LOSSES[name].start is not None:
        assert loss_and_gradient(name, REFERENCE)[0] == pytest.approx(LOSSES[name].start, abs=1e-12)


def random_rewards(count: int = 200):
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(2, count, generator=generator, dtype=torch.float64)


def at_rewards(name: str, w, l):  # noqa: E741
    zero = torch.zeros_like(w)
    return pair_loss(name, w, l, zero, zero, beta=1.0)


def test_dpo_is_the_donsker_varadhan_bound_of_one_pair():
    w, l = random_rewards()  # noqa: E741
    bound = w - torch.log(0.5 * w.exp() + 0.5 * l.exp())
    torch.testing.assert_close(at_rewards("dpo", w, l), math.log(2) - bound, rtol=0, atol=1e-12)


def test_mio_is_the_jensen_shannon_bound_against_the_half_mixture():
    w, l = random_rewards()  # noqa: E741
    sp = torch.nn.functional.softplus
    bound = -sp(-w) - 0.5 * (sp(w) + sp(l))
    torch.testing.assert_close(at_rewards("mio", w, l), -bound, rtol=0, atol=1e-12)


def test_mio_rests_at_log_2_and_is_bounded_below():
    w = double(math.log(2)).requires_grad_()
    at_rewards("mio", w, double(-50.0)).backward()
    assert abs(w.grad.item()) < 1e-12
    floor = math.log(1.5) + 0.5 * math.log(3)
    assert floor == pytest.approx(0.954771, abs=1e-6)
    assert at_rewards("mio", *random_rewards(5000)).min() > floor


def test_mio_pulls_the_chosen_whatever_became_of_the_rejected_and_dpo_does_not():
    def pull(name, rejected):
        w = double(-1.0).requires_grad_()
        at_rewards(name, w, double(rejected)).backward()
        return w.grad.item()

    assert pull("mio", 0.0) == pull("mio", -9.0)
    assert pull("dpo", 0.0) != pull("dpo", -9.0)


def test_dpo_at_half_the_beta_starts_with_mios_gradient():
    mio_start = loss_and_gradient("mio", REFERENCE, beta=0.4)
    dpo_start = loss_and_gradient("dpo", REFERENCE, beta=0.2)
    assert mio_start[1:] == pytest.approx(dpo_start[1:], abs=1e-12)
    assert LOSSES["mio"].beta == 2 * LOSSES["dpo"].beta  # so the defaults are the fair comparison


def test_mio_and_bce_start_alike_but_not_with_the_same_gradient():
    mio_start, bce_start = (loss_and_gradient(name, REFERENCE) for name in ("mio", "bce"))
    assert mio_start[0] == bce_start[0] == pytest.approx(math.log(4))
    assert bce_start[1] == pytest.approx(2 * mio_start[1])


# --- The head -------------------------------------------------------------------------------------


def completions(lengths, dtype=torch.float64, D=6, V=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    N, lengths = sum(lengths), torch.tensor(lengths)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype)
    head = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, V, (N,), generator=generator)
    ref = naive_logps(hidden.double(), head.double(), targets, lengths)
    ref = ref + torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    return hidden.requires_grad_(), head.requires_grad_(), targets, lengths, ref.to(dtype)


def naive_pair_loss(hidden, head, targets, lengths, ref, name, beta):
    """The oracle of fused_pair_loss: the published formulas over naive_logps, by autograd."""
    logps = naive_logps(hidden, head, targets, lengths)
    losses = pair_loss(
        *(name, logps[0::2], logps[1::2], ref[0::2], ref[1::2]),
        beta=beta,
        chosen_lengths=lengths[0::2],
        rejected_lengths=lengths[1::2],
    )
    return losses, logps


LENGTH_CASES = [[3, 2, 1, 4, 5, 1], [1, 1], [4, 0, 2, 0]]


@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize("lengths", LENGTH_CASES)
@pytest.mark.parametrize("chunk_tokens", [1, 6, 1000])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_fused_head_equals_its_oracle(name, lengths, chunk_tokens, reduce):
    *inputs, ref = completions(lengths)
    losses, logps = naive_pair_loss(*inputs, ref, name, 0.7)
    expected = torch.autograd.grad(getattr(losses, reduce)(), inputs[:2])
    fused_losses, fused_logps = fused_pair_loss(
        *inputs, ref, name, beta=0.7, chunk_tokens=chunk_tokens
    )
    got = torch.autograd.grad(getattr(fused_losses, reduce)(), inputs[:2])
    torch.testing.assert_close(fused_losses, losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fused_logps, logps, rtol=1e-12, atol=1e-12)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", PAIRWISE)
def test_fused_head_passes_gradcheck(name):
    hidden, head, targets, lengths, ref = completions([3, 2, 1, 2])

    def mean_loss(hidden, head):
        options = {"beta": 0.7, "chunk_tokens": 4}
        return fused_pair_loss(hidden, head, targets, lengths, ref, name, **options)[0].mean()

    assert torch.autograd.gradcheck(mean_loss, (hidden, head))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_head_errs_no_more_than_the_naive_form(dtype):
    """Both in low precision, against float64 on the same rounded inputs."""
    *inputs, ref = completions([40, 30, 25, 50], dtype, D=64, V=500)
    exact = [x.detach().double().requires_grad_() for x in inputs[:2]]
    truth_loss = naive_pair_loss(*exact, *inputs[2:], ref.double(), "mio", 0.1)[0].mean()
    truth = torch.autograd.grad(truth_loss, exact)
    naive = naive_pair_loss(*inputs, ref.float(), "mio", 0.1)[0].mean()
    fused = fused_pair_loss(*inputs, ref.float(), "mio", beta=0.1, chunk_tokens=70)[0].mean()
    for got, plain, true in zip(
        torch.autograd.grad(fused, inputs[:2]), torch.autograd.grad(naive, inputs[:2]), truth
    ):
        fused_error, naive_error = ((x.double() - true).norm() for x in (got, plain))
        assert fused_error <= 1.1 * naive_error
    assert (fused.double() - truth_loss).abs() <= 1.1 * (naive.double() - truth_loss).abs() + 1e-6


def test_frozen_head_gets_no_gradient_and_mixed_gradients_are_refused():
    hidden, head, targets, lengths, ref = completions([3, 2, 1, 4])
    losses, logps = fused_pair_loss(hidden, head.detach(), targets, lengths, ref, "mio", beta=1.0)
    losses.mean().backward()
    assert head.grad is None and hidden.grad.isfinite().all() and not logps.requires_grad
    losses, _ = fused_pair_loss(hidden, head, targets, lengths, ref, "mio", beta=1.0)
    losses[0].backward()  # one pair's gradient is not what the single pass has computed
    assert head.grad.isnan().all()


def test_chunked_logps_equal_the_oracle():
    hidden, head, targets, lengths, _ = completions([5, 3, 0, 4])
    expected = naive_logps(hidden, head, targets, lengths)
    for chunk_tokens in (1, 4, 100):
        got = chunked_logps(hidden, head, targets, lengths, chunk_tokens)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_log_softmax_is_taken_in_float32():
    hidden, head, targets, lengths, _ = completions([300], torch.bfloat16, D=64, V=2000)
    logits = (hidden @ head.T).double()  # the product itself is bfloat16, by intention
    exact = logits.log_softmax(-1).gather(1, targets[:, None]).sum()
    assert abs(chunked_logps(hidden, head, targets, lengths)[0] - exact) < 0.05


def test_an_option_that_a_loss_does_not_take_is_refused():
    with pytest.raises(TypeError, match="gamma"):
        pair_loss("mio", *[double(0.0)] * 4, beta=0.1, gamma=1.0)


def test_chunks_hold_whole_pairs_in_order():
    chunks = list(mio._chunks_of_pairs([3, 2, 9, 9, 1, 1, 1, 1], 8))
    assert chunks == [
        (slice(0, 2), slice(0, 5)),
        (slice(2, 4), slice(5, 23)),
        (slice(4, 8), slice(23, 27)),
    ]
