"""The losses: published values, the theorems behind them, TRL's own code, and the fused head."""

import math
import re
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mio
from mio import (
    LOSSES,
    Answers,
    chunked_logps,
    find_loss,
    fused_pair_loss,
    naive_logps,
    pair_loss,
)
from support.run_options import loss_table

ROOT = Path(mio.__file__).parent
PAIRWISE = [name for name, loss in LOSSES.items() if loss.pairwise]
REFERENCE = (-20.0, -30.0)  # log-probs of the chosen and of the rejected answer
LENGTHS = (10, 20)
ADVANTAGES = (0.5, -1.5)  # for rlhf
POLICIES = [(-20.0, -30.0), (-19.0, -31.0), (-25.0, -45.0)]
# Of each pairwise loss, at beta 0.1 and its default options, for each of POLICIES:
# the loss, d loss / d s_w and d loss / d s_l.
TABLE = """
mio       1.386294 -0.02500 +0.02500   1.338793 -0.02125 +0.02375   1.311822 -0.04337 +0.00912
dpo       0.693147 -0.05000 +0.05000   0.598139 -0.04502 +0.04502   0.313262 -0.02689 +0.02689
bce       1.386294 -0.05000 +0.05000   1.288793 -0.04750 +0.04750   1.175490 -0.06225 +0.01824
nwj       0.000000 -0.05000 +0.05000  -0.094996 -0.04474 +0.04524  -0.085170 -0.06967 +0.01116
cdpo      0.693147 -0.04000 +0.04000   0.618139 -0.03502 +0.03502   0.413262 -0.01689 +0.01689
robust    0.693147 -0.06250 +0.06250   0.573139 -0.05752 +0.05752   0.188262 -0.03939 +0.03939
hinge     1.000000 -0.10000 +0.10000   0.800000 -0.10000 +0.10000   0.000000 +0.00000 +0.00000
ipo      25.000000 -1.00000 +0.50000  23.522500 -0.97000 +0.48500  22.562500 -0.95000 +0.47500
dpo_norm  0.693147 -0.00500 +0.00250   0.685675 -0.00496 +0.00248   0.680725 -0.00494 +0.00247
apo_zero  1.000000 -0.02500 +0.02500   0.950042 -0.02494 +0.02494   0.804885 -0.02350 +0.01491
apo_down  1.000000 +0.00000 +0.02500   0.975145 +0.00019 +0.02475   0.646482 +0.00384 +0.01966
exo       2.761231 -0.17267 +0.17267   2.422015 -0.16600 +0.16600   1.276310 -0.11613 +0.11613
sppo     50.000000 -10.00000 +10.00000  32.000000 -8.00000 +8.00000  200.000000 -20.00000 -20.00000
dpop      0.693147 -0.05000 +0.05000   0.598139 -0.04502 +0.04502  24.000000 -5.10000 +0.10000
rpo       2.693147 -0.15000 +0.05000   2.498139 -0.14502 +0.04502   2.813262 -0.12689 +0.02689
lsif     -0.500000 -0.10000 +0.05000  -0.652752 -0.11052 +0.04524  -0.494966 -0.06065 +0.01116
ukl       3.000000 -0.10000 +0.05000   2.851229 -0.10000 +0.04756   2.972367 -0.10000 +0.02362
simpo     1.005492 -0.00634 +0.00317   0.996007 -0.00631 +0.00315   0.989712 -0.00628 +0.00314
orpo      2.104206 -0.10749 +0.00417   1.992900 -0.10711 +0.00384   2.584048 -0.10619 +0.00318
cpo       2.313262 -0.12689 +0.02689   2.163282 -0.12315 +0.02315   2.626928 -0.11192 +0.01192
slic      0.200000 -0.01000 +0.00000   0.190000 -0.01000 +0.00000   0.250000 -0.01000 +0.00000
rlhf    -17.500000 -0.25000 +0.75000 -18.500000 -0.25000 +0.75000 -27.500000 -0.25000 +0.75000
sft       2.000000 -0.10000 +0.00000   1.900000 -0.10000 +0.00000   2.500000 -0.10000 +0.00000
"""
VALUES = {name: [float(x) for x in row] for name, *row in map(str.split, TABLE.split("\n")[1:-1])}


def double(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def extras(name: str, advantages=ADVANTAGES) -> dict:
    """Inputs that some losses need besides the log-probs: advantages of both sides, (B,) each, or
    the scalar that couples the pairs of a batch."""
    if name == "rlhf":
        return {"advantages": tuple(torch.as_tensor(a, dtype=torch.float64) for a in advantages)}
    return {} if find_loss(name).pairwise else {"shared": torch.tensor(0.3, dtype=torch.float64)}


def loss_and_gradient(name: str, policy, beta: float = 0.1, reference=REFERENCE, **options):
    """The loss of one pair, and its derivatives with respect to the two log-probs."""
    s_w, s_l = (double(s).requires_grad_() for s in policy)
    loss = pair_loss(
        *(name, s_w, s_l, double(reference[0]), double(reference[1])),
        beta=beta,
        chosen_lengths=torch.tensor([LENGTHS[0]]),
        rejected_lengths=torch.tensor([LENGTHS[1]]),
        **options,
    )
    loss.sum().backward()
    gradients = [0.0 if s.grad is None else s.grad.item() for s in (s_w, s_l)]
    return loss.item(), *gradients


def test_every_pairwise_loss_has_a_row_of_values():
    assert list(VALUES) == PAIRWISE


@pytest.mark.parametrize("name", VALUES)
def test_losses_have_their_published_values_and_gradients(name):
    for column, policy in enumerate(POLICIES):
        value, *gradients = loss_and_gradient(name, policy, **extras(name))
        row = VALUES[name][3 * column : 3 * column + 3]
        assert value == pytest.approx(row[0], abs=1e-6)
        assert gradients == pytest.approx(row[1:], abs=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_the_declared_start_is_the_loss_where_the_policy_equals_the_reference(name):
    own = LOSSES[name].options
    for beta, change in ((0.1, 1.0), (2.0, 1.0), (0.1, 0.7)):
        # At the reference dv and kto take their shared term from the pair itself, where it is 0.
        options = extras(name) if name == "rlhf" else {}
        options |= {option: change * default for option, default in own.items()}
        value = loss_and_gradient(name, REFERENCE, beta, **options)[0]
        start = LOSSES[name].loss_at_reference(beta, **options)
        if math.isnan(start):  # the loss depends on the answers
            lower = [s - 1 for s in REFERENCE]
            assert value != loss_and_gradient(name, lower, beta, lower, **options)[0]
        else:
            assert value == pytest.approx(start, rel=1e-12)


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


def test_mio_has_its_minimum_at_a_reward_of_log_2_and_a_lower_bound():
    w = double(math.log(2)).requires_grad_()
    at_rewards("mio", w, double(-50.0)).backward()
    assert abs(w.grad.item()) < 1e-12
    bound = math.log(1.5) + 0.5 * math.log(3)
    assert bound == pytest.approx(0.954771, abs=1e-6)
    assert at_rewards("mio", *random_rewards(5000)).min() > bound


def test_the_gradient_of_mio_on_the_chosen_does_not_depend_on_the_rejected_but_that_of_dpo_does():
    def pull(name, rejected):
        w = double(-1.0).requires_grad_()
        at_rewards(name, w, double(rejected)).backward()
        return w.grad.item()

    assert pull("mio", 0.0) == pull("mio", -9.0)
    assert pull("dpo", 0.0) != pull("dpo", -9.0)


def test_the_gradients_have_the_weights_that_the_readme_states():
    w, l = (side.requires_grad_() for side in random_rewards())  # noqa: E741
    mio_w, mio_l = torch.autograd.grad(at_rewards("mio", w, l).sum(), (w, l))
    torch.testing.assert_close(mio_w, 1.5 * w.sigmoid() - 1, rtol=0, atol=1e-12)
    torch.testing.assert_close(mio_l, 0.5 * l.sigmoid(), rtol=0, atol=1e-12)
    dpo_w, dpo_l = torch.autograd.grad(at_rewards("dpo", w, l).sum(), (w, l))
    torch.testing.assert_close(dpo_w, -(l - w).sigmoid(), rtol=0, atol=1e-12)
    torch.testing.assert_close(dpo_l, -dpo_w, rtol=0, atol=1e-12)  # a single weight for both
    assert (l - w)[(w - l) > 5].sigmoid().max() < 0.01  # the weight vanishes as the margin grows


def test_dpo_at_half_the_beta_starts_with_the_gradient_of_mio():
    mio_start = loss_and_gradient("mio", REFERENCE, beta=0.4)
    dpo_start = loss_and_gradient("dpo", REFERENCE, beta=0.2)
    assert mio_start[1:] == pytest.approx(dpo_start[1:], abs=1e-12)
    # The defaults therefore have the same initial gradient.
    assert LOSSES["mio"].beta == 2 * LOSSES["dpo"].beta


def test_mio_and_bce_start_at_one_value_but_with_different_gradients():
    mio_start, bce_start = (loss_and_gradient(name, REFERENCE) for name in ("mio", "bce"))
    assert mio_start[0] == bce_start[0] == pytest.approx(math.log(4))
    assert bce_start[1] == pytest.approx(2 * mio_start[1])


def batch_of_pairs(B: int = 5, seed: int = 0, scale: float = 3.0):
    """s_w, s_l, ref_w, ref_l, n_w, n_l of pairs whose answers differ in length: (B,) each."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (2, B), generator=generator)
    ref = -lengths * (0.5 + torch.rand(2, B, generator=generator, dtype=torch.float64))
    logps = ref + scale * torch.randn(2, B, generator=generator, dtype=torch.float64)
    logps = logps.clamp(max=-0.1)
    return *logps.requires_grad_().unbind(), *ref, *lengths


def loss_of(name, s_w, s_l, ref_w, ref_l, n_w, n_l, beta=0.7, **options):
    lengths = {"chosen_lengths": n_w, "rejected_lengths": n_l}
    return pair_loss(name, s_w, s_l, ref_w, ref_l, beta=beta, **lengths, **options)


def test_dv_of_a_batch_has_the_log_outside_the_mean():
    s_w, s_l, *rest = batch_of_pairs()
    t_w, t_l = 0.7 * (s_w - rest[0]), 0.7 * (s_l - rest[1])
    plain = -t_w.mean() + torch.cat((t_w, t_l)).exp().mean().log()
    dv = loss_of("dv", s_w, s_l, *rest).mean()
    torch.testing.assert_close(dv, plain, rtol=1e-12, atol=0)
    got, expected = (torch.autograd.grad(x, (s_w, s_l), retain_graph=True) for x in (dv, plain))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    assert loss_of("nwj", s_w, s_l, *rest).mean() >= dv  # the tighter bound is the smaller loss


def test_kto_averages_over_the_answers_that_are_present():
    s_w, s_l, *rest = batch_of_pairs()
    n_w, n_l = rest[2].clone(), rest[3].clone()
    n_w[1], n_l[2] = 0, 0  # these rows have one answer only
    t_w, t_l = 0.7 * (s_w - rest[0]), 0.7 * (s_l - rest[1])
    mean = torch.cat((t_w[n_w > 0], t_l[n_l > 0])).mean().item()
    for shift in (2 * abs(mean), -2 * abs(mean)):  # a positive mean, and a negative one
        refs = [ref - shift / 0.7 for ref in rest[:2]]
        sides = (Answers(*side, 0.7) for side in zip((s_w, s_l), refs, (n_w, n_l)))
        assert LOSSES["kto"].shared(*sides).item() == pytest.approx(max(0, mean + shift))
    losses = loss_of("kto", s_w, s_l, *rest[:2], n_w, n_l, shared=0.3)
    chosen, rejected = 1 - torch.sigmoid(t_w - 0.3), 1 - torch.sigmoid(0.3 - t_l)
    expected = (chosen + rejected) / 2
    expected[1], expected[2] = rejected[1], chosen[2]
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)


def test_without_a_shared_term_kto_takes_it_from_its_own_pairs_without_gradient():
    s_w, s_l, *rest = batch_of_pairs()
    rest[:2] = [ref - 2 for ref in rest[:2]]
    mean = 0.7 * torch.cat((s_w - rest[0], s_l - rest[1])).mean().item()
    own, fixed = loss_of("kto", s_w, s_l, *rest), loss_of("kto", s_w, s_l, *rest, shared=mean)
    assert mean > 0
    torch.testing.assert_close(own, fixed)
    gradients = (torch.autograd.grad(x.sum(), (s_w, s_l), retain_graph=True) for x in (own, fixed))
    torch.testing.assert_close(*gradients)


def test_robust_equals_dpo_on_average_over_flipped_labels():
    s_w, s_l, ref_w, ref_l, n_w, n_l = batch_of_pairs()
    right = loss_of("robust", s_w, s_l, ref_w, ref_l, n_w, n_l, label_smoothing=0.2)
    flipped = loss_of("robust", s_l, s_w, ref_l, ref_w, n_l, n_w, label_smoothing=0.2)
    clean = loss_of("dpo", s_w, s_l, ref_w, ref_l, n_w, n_l)
    torch.testing.assert_close(0.8 * right + 0.2 * flipped, clean, rtol=1e-12, atol=1e-12)


# Losses that grow as the exponential of a log-ratio overflow where it is large.
EXPONENTIAL = {"nwj": ("w", "l"), "lsif": ("w", "l"), "ukl": ("l",)}


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_log_ratios_give_finite_losses_and_gradients(name):
    for dtype in (torch.float32, torch.float64):
        extremes = torch.tensor((-1e4, 0.0, 1e4), dtype=dtype)
        z_w, z_l = torch.cartesian_prod(extremes, extremes).unbind(dim=1)  # (9,) each
        z_w = z_w.clamp(max=0) if "w" in EXPONENTIAL.get(name, ()) else z_w
        z_l = z_l.clamp(max=0) if "l" in EXPONENTIAL.get(name, ()) else z_l
        ref = torch.full_like(z_w, -1e4)
        s_w, s_l = ((ref + z).requires_grad_() for z in (z_w, z_l))  # up to 0, a certain answer
        options = {"shared": torch.zeros((), dtype=dtype)} if name == "kto" else {}
        if name == "rlhf":
            options = {"advantages": (torch.ones_like(ref), -torch.ones_like(ref))}
        lengths = torch.full(z_w.shape, 3)
        losses = loss_of(name, s_w, s_l, ref, ref, lengths, lengths, 1.0, **options)
        losses.sum().backward()
        gradients = [s.grad for s in (s_w, s_l) if s.grad is not None]
        assert losses.dtype == dtype and all(x.isfinite().all() for x in (losses, *gradients))


@pytest.mark.parametrize("name", LOSSES)
def test_the_printed_table_says_what_each_loss_uses(name):
    loss, batch, options = LOSSES[name], batch_of_pairs(8), extras(name, torch.randn(2, 8))
    lines = loss_table().splitlines()
    assert max(map(len, lines)) <= 80
    row = next(i for i, line in enumerate(lines) if line.split(" ")[0] == name)
    assert loss.function.__doc__ in lines[row] and loss.source in lines[row + 1]
    plain, facts = loss_of(name, *batch, **options), lines[row + 1]
    assert (f"beta {loss.beta:g}" in facts) == loss.uses_beta
    if name != "rlhf":  # its advantages contain beta and the reference
        other_beta = loss_of(name, *batch, 0.3, **options)
        assert torch.equal(plain, other_beta) == (not loss.uses_beta)
        other_ref = (*batch[:2], batch[2] - 1, batch[3] - 3, *batch[4:])
        same = torch.equal(plain, loss_of(name, *other_ref, **options))
        assert same == ("no reference" in facts) == (not loss.needs_reference)
    if "no reference" in facts:
        assert torch.equal(plain, loss_of(name, *batch[:2], None, None, *batch[4:]))
    longer = (*batch[:4], batch[4] + 1, batch[5] + 1)
    assert torch.equal(plain, loss_of(name, *longer, **options)) == ("means" not in facts)
    for option, default in loss.options.items():
        assert f"{option} {default:g}" in facts
        assert not torch.equal(plain, loss_of(name, *batch, **{option: default / 2}))
        assert torch.equal(plain, loss_of(name, *batch, **{option: default}))


def test_the_page_of_the_losses_repeats_the_printed_table():
    text = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE)
    printed = loss_table().splitlines()  # may hold a new loss that the page does not have yet
    (block,) = (block for block in blocks if "sp(T_l - T_w)" in block)
    assert set(block.splitlines()) <= set(printed) and len(block.splitlines()) > 50


# --- TRL's own code -------------------------------------------------------------------------------

DPO_TRAINER = {
    "dpo": "sigmoid", "mio": "nca_pair", "bce": "bco_pair", "cdpo": "aot", "robust": "robust",
    "hinge": "hinge", "ipo": "ipo", "dpo_norm": "sigmoid_norm", "apo_zero": "apo_zero",
    "apo_down": "apo_down", "exo": "exo_pair", "sppo": "sppo_hard", "rpo": "sigmoid sft",
    "sft": "sft",
}  # fmt: skip
# rpo is the sum of two of TRL's losses; cdpo is aot, which for a single pair sorts nothing.
CPO_TRAINER = {"simpo": "simpo", "cpo": "sigmoid", "slic": "hinge"}


def trl_trainer(**settings):
    """The attributes of a trainer that TRL's loss methods read."""
    same = {"gather": lambda x: x, "gather_for_metrics": lambda x: x}
    return SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu"), **same),
        model=SimpleNamespace(training=True),
        _metrics=defaultdict(lambda: defaultdict(list)),
        **{"aux_loss_enabled": False, "precompute_ref_logps": True, "ld_alpha": None},
        **{"f_divergence_type": "reverse_kl", "use_weighting": False, "_tp_size": 1},
        **{"_total_train_tokens": 0, "calculate_KL": True, "loss_weights": [1.0], **settings},
    )


def trl_inputs(logps, lengths, **inputs):
    """A batch of sequences, each a prompt token and an answer, and a model that gives the answers
    the log-probs `logps`."""
    T = 1 + int(lengths.max())
    mask = ((torch.arange(T) > 0) & (torch.arange(T) <= lengths[:, None])).long()
    zeros = torch.zeros(len(lengths), T - 1)
    output = SimpleNamespace(
        log_probs=mask[:, 1:] * (logps / lengths)[:, None],
        entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(),
    )  # fmt: skip
    inputs |= {"input_ids": 0 * mask, "attention_mask": mask, "completion_mask": mask}
    return lambda **_: output, inputs


def trl_loss(name, s_w, s_l, ref_w, ref_l, n_w, n_l, beta, epsilon, gamma, kl):
    """The loss of one pair by TRL 1.16; every tensor is (1,)."""
    settings = {"beta": beta, "label_smoothing": epsilon}
    if name in DPO_TRAINER:
        from trl import DPOTrainer

        types = DPO_TRAINER[name].split()
        trainer = trl_trainer(loss_types=types, **settings | {"loss_weights": [1.0] * len(types)})
        ref = {"ref_chosen_logps": ref_w, "ref_rejected_logps": ref_l}
        inputs = trl_inputs(torch.cat((s_w, s_l)), torch.cat((n_w, n_l)), **ref)
        return DPOTrainer._compute_loss(trainer, *inputs, False)
    if name == "kto":
        from trl import KTOTrainer

        weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
        trainer = trl_trainer(loss_type="kto", **settings, **weights)
        trainer._compute_kl_logps = lambda model, batch: kl / beta + ref_w
        ref = {"ref_logps": torch.cat((ref_w, ref_l)), "ref_KL_logps": ref_w}
        ref["label"] = torch.tensor([True, False])
        inputs = trl_inputs(torch.cat((s_w, s_l)), torch.cat((n_w, n_l)), **ref)
        return KTOTrainer._compute_loss(trainer, *inputs, False)
    means = [s / n for s, n in zip((s_w, s_l), (n_w, n_l))]
    trainer = trl_trainer(loss_type=CPO_TRAINER.get(name), alpha=0.0, **settings)
    if name == "orpo":
        from trl.experimental.orpo import ORPOTrainer

        trainer.odds_ratio_loss = partial(ORPOTrainer.odds_ratio_loss, trainer)
        trainer.concatenated_forward = lambda *_: (*means, s_w, s_l, -means[0].mean())
        return ORPOTrainer.get_batch_loss_metrics(trainer, None, None)[0]
    from trl.experimental.cpo import CPOTrainer

    trainer.beta = 1.0 if name == "slic" else beta
    trainer.label_smoothing, trainer.simpo_gamma = 0.0, gamma
    trainer.cpo_alpha = {"slic": beta, "cpo": 1.0, "simpo": 0.0}[name]
    trainer.cpo_loss = partial(CPOTrainer.cpo_loss, trainer)
    sums_or_means = means if name == "simpo" else (s_w, s_l)
    trainer.concatenated_forward = lambda *_: (*sums_or_means, s_w, s_l, -means[0].mean())
    return CPOTrainer.get_batch_loss_metrics(trainer, None, None)[0]


@pytest.mark.parametrize("name", [*DPO_TRAINER, *CPO_TRAINER, "orpo", "kto"])
def test_losses_and_gradients_are_those_of_trl(name):
    values = {"label_smoothing": 0.15, "epsilon": 0.15, "gamma": 0.4, "shared": torch.tensor(0.2)}
    used = LOSSES[name].options.keys() | ({"shared"} if name == "kto" else set())
    options = {key: value for key, value in values.items() if key in used}
    # TRL computes parts of three losses in float32.
    tolerance = 1e-6 if name in ("orpo", "exo", "kto") else 1e-12
    for seed in range(5):
        batch = batch_of_pairs(1, seed)
        ours = loss_of(name, *batch, beta=0.3, **options).mean()
        theirs = trl_loss(name, *batch, 0.3, 0.15, 0.4, 0.2)
        how = {"allow_unused": True, "materialize_grads": True}
        gradients = (torch.autograd.grad(x, batch[:2], **how) for x in (ours, theirs))
        for a, b in ((ours, theirs), *zip(*gradients)):
            assert (a - b).abs().max() <= tolerance


# --- Weighted sums, and means in place of sums ----------------------------------------------------


def mio_and_half_sft(w, l, ref_w, ref_l, n_w, beta):  # noqa: E741
    """mio+0.5*sft for log-probs (B,), written out."""
    sp, t_w, t_l = torch.nn.functional.softplus, beta * (w - ref_w), beta * (l - ref_l)
    return sp(-t_w) + sp(t_w) / 2 + sp(t_l) / 2 - 0.5 * w / n_w


def test_a_sum_of_losses_has_the_value_and_gradient_of_its_formula_through_the_head():
    lengths = [3, 2, 1, 4, 5, 1]
    hidden, head, targets, lengths, ref = completions(lengths)
    logps = naive_logps(hidden, head, targets, lengths)
    parts = logps[0::2], logps[1::2], ref[0::2], ref[1::2]
    expected = mio_and_half_sft(*parts, lengths[0::2], 0.7)
    for chunk_tokens in (1, 6, 1000):
        how = {"beta": 0.7, "chunk_tokens": chunk_tokens}
        fused, _ = fused_pair_loss(hidden, head, targets, lengths, ref, "mio+0.5*sft", **how)
        torch.testing.assert_close(fused, expected, rtol=1e-9, atol=0)
        wanted, got = (
            torch.autograd.grad(x.mean(), (hidden, head), retain_graph=True)
            for x in (expected, fused)
        )
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    test_the_fused_head_passes_gradcheck("mio+0.5*sft")


@pytest.mark.parametrize("name", ["mio+0.5*sft", "dpo+sft", "ipo+2*sppo", "exo+.1*cdpo", "dpo+rpo"])
def test_the_start_of_a_sum_is_the_sum_of_the_starts(name):
    loss = find_loss(name)
    options = {option: 0.7 * default for option, default in loss.options.items()}
    value = loss_and_gradient(name, REFERENCE, 0.3, **options)[0]
    start = loss.loss_at_reference(0.3, **options)
    unknown = "sft" in name or "rpo" in name  # these depend on the answers
    assert math.isnan(start) if unknown else start == pytest.approx(value, rel=1e-12)
    assert find_loss("mio+0.1*dpo").loss_at_reference(0.3) == pytest.approx(2.1 * math.log(2))


def test_a_sum_declares_what_its_terms_need():
    both = find_loss("sft+2*simpo")
    assert (both.uses, both.beta, both.answers) == ("means", 2.0, "both")
    assert not both.needs_reference and both.uses_beta and both.options == {"gamma": 0.5}
    total = find_loss("dpo+0.5*sft")
    assert (total.uses, total.beta, total.needs_reference) == ("sums and means", 0.1, True)
    assert "2305.18290" in total.source and total.function.__doc__ == "1 dpo + 0.5 sft"
    batch = batch_of_pairs()
    got = loss_of("simpo+0.5*cpo", *batch, gamma=0.2, alpha=3.0)
    parts = loss_of("simpo", *batch, gamma=0.2), loss_of("cpo", *batch, alpha=3.0)
    torch.testing.assert_close(got, parts[0] + 0.5 * parts[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["mio+0.5*nll", "mio+mio", "0.5*mio", "mio+", "mio+-1*sft",
                                  "mio+0*sft", "dpo+0.1*dv", "kto+sft", "sft+rlhf",
                                  "nosuch"])  # fmt: skip
def test_a_name_that_is_neither_a_loss_nor_a_sum_is_refused(name):
    with pytest.raises(ValueError, match=r"choose from mio, dpo, .* without dv, kto, rlhf$"):
        pair_loss(name, *[double(0.0)] * 4, beta=0.1)


def test_average_logps_divides_every_log_prob_by_its_tokens_once():
    s_w, s_l, ref_w, ref_l, n_w, n_l = batch_of_pairs()
    means = s_w / n_w, s_l / n_l, ref_w / n_w, ref_l / n_l
    for name in ("mio", "dpo", "sppo", "hinge", "dv"):
        expected = pair_loss(name, *means, beta=3.0)
        got = loss_of(name, s_w, s_l, ref_w, ref_l, n_w, n_l, 3.0, average_logps=True)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    expected = mio_and_half_sft(*means, 1.0, 3.0)  # sft has means already
    batch = s_w, s_l, ref_w, ref_l, n_w, n_l
    got = loss_of("mio+0.5*sft", *batch, 3.0, average_logps=True)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    slic = loss_of("slic", s_w, s_l, None, None, n_w, n_l, 3.0, average_logps=True)
    expected = torch.relu(1 - means[0] + means[1]) - 3.0 * means[0]
    torch.testing.assert_close(slic, expected, rtol=1e-12, atol=0)
    one_answer = torch.tensor([0, 3])
    kto = loss_of("kto", *(x[:2] for x in batch[:4]), one_answer, n_l[:2], average_logps=True)
    assert kto.isfinite().all()


@pytest.mark.parametrize("name", ["mio", "dpo+sft"])
def test_the_fused_head_averages_log_probs(name):
    *inputs, ref = completions([3, 2, 1, 4, 5, 1])
    losses, logps = naive_pair_loss(*inputs, ref, name, 0.7, average_logps=True)
    fused = fused_pair_loss(*inputs, ref, name, beta=0.7, chunk_tokens=6, average_logps=True)
    torch.testing.assert_close(fused, (losses, logps), rtol=1e-12, atol=1e-12)
    expected, got = (torch.autograd.grad(x.mean(), inputs[:2]) for x in (losses, fused[0]))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_a_sum_is_the_sum_of_trl():
    from trl import DPOTrainer

    s_w, s_l, ref_w, ref_l, n_w, n_l = batch_of_pairs(1)
    trainer = trl_trainer(loss_types=["nca_pair", "sft"], beta=0.3, label_smoothing=0.0)
    trainer.loss_weights = [1.0, 0.25]
    ref = {"ref_chosen_logps": ref_w, "ref_rejected_logps": ref_l}
    inputs = trl_inputs(torch.cat((s_w, s_l)), torch.cat((n_w, n_l)), **ref)
    theirs = DPOTrainer._compute_loss(trainer, *inputs, False)
    ours = loss_of("mio+0.25*sft", s_w, s_l, ref_w, ref_l, n_w, n_l, beta=0.3).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


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


def head_extras(name: str, count: int) -> dict:
    """As `extras`, for the head: the advantages of all `count` answers in one tensor."""
    advantages = torch.linspace(-1, 2, count, dtype=torch.float64)  # (2B,)
    return {"advantages": advantages} if name == "rlhf" else extras(name)


def naive_pair_loss(hidden, head, targets, lengths, ref, name, beta, **options):
    """The oracle of fused_pair_loss: the published formulas over naive_logps, by autograd."""
    logps, more = naive_logps(hidden, head, targets, lengths), head_extras(name, len(lengths))
    if name == "rlhf":
        more["advantages"] = more["advantages"][0::2], more["advantages"][1::2]
    losses = pair_loss(
        *(name, logps[0::2], logps[1::2], ref[0::2], ref[1::2]),
        beta=beta,
        chosen_lengths=lengths[0::2],
        rejected_lengths=lengths[1::2],
        **more,
        **options,
    )
    return losses, logps


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("lengths", [[3, 2, 1, 4, 5, 1], [1, 1], [4, 0, 2, 0]])
def test_the_fused_head_equals_its_oracle(name, lengths):
    *inputs, ref = completions(lengths)
    losses, logps = naive_pair_loss(*inputs, ref, name, 0.7)
    how = {"beta": 0.7, **head_extras(name, len(lengths))}
    for chunk_tokens in (1, 6, 1000):
        fused = fused_pair_loss(*inputs, ref, name, chunk_tokens=chunk_tokens, **how)
        torch.testing.assert_close(fused, (losses, logps), rtol=1e-12, atol=1e-12)
        for reduce in (torch.mean, torch.sum):
            expected, got = (
                torch.autograd.grad(reduce(x), inputs[:2], retain_graph=True)
                for x in (losses, fused[0])
            )
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", LOSSES)
def test_the_fused_head_passes_gradcheck(name):
    hidden, head, targets, lengths, ref = completions([3, 2, 1, 2])

    def mean_loss(hidden, head):
        options = {"beta": 0.7, "chunk_tokens": 4, **head_extras(name, 4)}
        return fused_pair_loss(hidden, head, targets, lengths, ref, name, **options)[0].mean()

    assert torch.autograd.gradcheck(mean_loss, (hidden, head), fast_mode=True)


def test_losses_without_a_reference_need_no_reference_log_probs_in_the_head():
    *inputs, ref = completions([3, 2, 1, 4])
    for name in (name for name in LOSSES if not LOSSES[name].needs_reference):
        losses = [fused_pair_loss(*inputs, r, name, beta=0.7)[0] for r in (ref, None)]
        assert torch.equal(*losses)


def test_the_compiled_head_runs_the_compiled_code(monkeypatch):
    calls = []

    def compiled(logits, targets):
        calls.append(len(logits))
        return mio._residual_of_rows(logits, targets)

    monkeypatch.setattr(mio, "_compiled_residual_of_rows", lambda: compiled)
    *inputs, ref = completions([3, 2, 1, 4])
    plain, fast = (
        fused_pair_loss(*inputs, ref, "mio", beta=1.0, compiled=compiled)
        for compiled in (False, True)
    )
    torch.testing.assert_close(fast, plain, rtol=0, atol=0)
    assert calls == [10]
    assert torch.equal(chunked_logps(*inputs, compiled=True), plain[1]) and calls == [10, 10]


def test_the_head_refuses_a_loss_of_the_whole_batch_without_its_shared_term():
    with pytest.raises(AssertionError, match="dv needs the batch's shared term"):
        fused_pair_loss(*completions([1, 1]), "dv", beta=1.0)


def test_the_readme_adds_a_loss_in_ten_lines(monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    function, row = (block for block in blocks if "tilted" in block)
    assert function.count("\n") + row.count("\n") <= 10
    names = dict(vars(mio))
    exec(f"{function}\nrow = {{{row}}}", names)
    monkeypatch.setitem(LOSSES, "tilted", names["row"]["tilted"])
    (line,) = re.findall(r"^tilted +(.*)$", text, re.MULTILINE)
    monkeypatch.setitem(VALUES, "tilted", [float(x) for x in line.split()])
    test_losses_have_their_published_values_and_gradients("tilted")
    test_the_declared_start_is_the_loss_where_the_policy_equals_the_reference("tilted")
    test_the_fused_head_equals_its_oracle("tilted", [3, 2, 1, 4, 5, 1])
    test_the_fused_head_passes_gradcheck("tilted")
    test_extreme_log_ratios_give_finite_losses_and_gradients("tilted")
    test_the_printed_table_says_what_each_loss_uses("tilted")
    assert LOSSES["tilted"].function.__doc__ == "sp(-T_w) + alpha sp(T_w) + (1-alpha) sp(T_l)"
    batch = batch_of_pairs()
    for alpha, name in ((0.0, "bce"), (0.5, "mio")):
        torch.testing.assert_close(loss_of("tilted", *batch, alpha=alpha), loss_of(name, *batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_head_errs_no_more_than_the_naive_form(dtype):
    """Compares both in low precision with float64 on the same rounded inputs."""
    *inputs, ref = completions([40, 30, 25, 50], dtype, D=64, V=500)
    exact = [x.detach().double().requires_grad_() for x in inputs[:2]]
    truth_loss = naive_pair_loss(*exact, *inputs[2:], ref.double(), "mio", 0.1)[0].mean()
    truth = torch.autograd.grad(truth_loss, exact)
    naive = naive_pair_loss(*inputs, ref.float(), "mio", 0.1)[0].mean()
    fused = fused_pair_loss(*inputs, ref.float(), "mio", beta=0.1, chunk_tokens=70)[0].mean()
    for got, plain, exact in zip(
        torch.autograd.grad(fused, inputs[:2]), torch.autograd.grad(naive, inputs[:2]), truth
    ):
        fused_error, naive_error = ((x.double() - exact).norm() for x in (got, plain))
        assert fused_error <= 1.1 * naive_error
    assert (fused.double() - truth_loss).abs() <= 1.1 * (naive.double() - truth_loss).abs() + 1e-6


def test_a_frozen_head_gets_no_gradient_and_unequal_upstream_gradients_give_nan():
    hidden, head, targets, lengths, ref = completions([3, 2, 1, 4])
    losses, logps = fused_pair_loss(hidden, head.detach(), targets, lengths, ref, "mio", beta=1.0)
    losses.mean().backward()
    assert head.grad is None and hidden.grad.isfinite().all() and not logps.requires_grad
    losses, _ = fused_pair_loss(hidden, head, targets, lengths, ref, "mio", beta=1.0)
    losses[0].backward()  # the single pass has summed the gradients of all pairs
    assert head.grad.isnan().all()


def test_chunked_logps_equal_the_oracle():
    hidden, head, targets, lengths, _ = completions([5, 3, 0, 4])
    expected = naive_logps(hidden, head, targets, lengths)
    for chunk_tokens in (1, 4, 100):
        got = chunked_logps(hidden, head, targets, lengths, chunk_tokens)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_the_log_softmax_of_bfloat16_logits_is_taken_in_float32():
    hidden, head, targets, lengths, _ = completions([300], torch.bfloat16, D=64, V=2000)
    logits = (hidden @ head.T).double()  # the product itself is in bfloat16 on purpose
    exact = logits.log_softmax(-1).gather(1, targets[:, None]).sum()
    assert abs(chunked_logps(hidden, head, targets, lengths)[0] - exact) < 0.05


def test_an_option_that_a_loss_does_not_have_is_refused():
    with pytest.raises(TypeError, match="gamma"):
        pair_loss("mio", *[double(0.0)] * 4, beta=0.1, gamma=1.0)


def test_chunks_hold_complete_pairs_in_order():
    chunks = list(mio.chunks_of_pairs([3, 2, 9, 9, 1, 1, 5, 1], 8))
    assert chunks == [
        (slice(0, 2), slice(0, 5)),
        (slice(2, 4), slice(5, 23)),  # longer than a chunk
        (slice(4, 8), slice(23, 31)),  # exactly a chunk
    ]
