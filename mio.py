"""The objective: losses on pairs of answers, and the head that turns hidden states into them.

From the paper to the code (MIO, arXiv 2506.22578; the units are nats throughout):

  s_w, s_l    log pi(y|x), summed over an answer's tokens    chosen_logps, rejected_logps
  ref_w ...   the same under the frozen reference model      ref_chosen_logps, ...
  T(x, y)     the critic, beta * (s - ref)                   rewards
  E_pos       mean over the chosen answers
  E_marg      mean over the half-and-half mixture of chosen and rejected
  sp(x)       log(1 + e^x)                                   F.softplus

Two lower bounds on the mutual information of prompt and preferred answer, for one pair:

  Donsker-Varadhan   T_w - log(e^T_w / 2 + e^T_l / 2)  =  log 2 - dpo
  Jensen-Shannon     -sp(-T_w) - sp(T_w) / 2 - sp(T_l) / 2  =  -mio

so that DPO maximises the first and MIO the second. As a function of T_w and T_l, `mio` is the
pairwise NCA loss (arXiv 2402.05369); the reading as mutual information is what the paper adds.
"""

import dataclasses
import inspect
import math
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# --- Losses: the two sides of B pairs in, (B,) out -----------------------------------------------


@dataclasses.dataclass(frozen=True)
class Answers:
    """One side of B pairs, the chosen or the rejected answers; every tensor is (B,)."""

    logps: Tensor  # s, a sum over the answer's tokens, its end token included
    ref_logps: Tensor | None  # the same under the reference; None for losses without
    lengths: Tensor | None  # n, tokens; 0 where there is no answer, None where no loss asks
    beta: float

    @property
    def logratios(self) -> Tensor:  # z = s - ref
        return self.logps - self.ref_logps

    @property
    def rewards(self) -> Tensor:  # T = beta z
        return self.beta * self.logratios

    @property
    def mean_logps(self) -> Tensor:  # m = s / n
        return self.logps / self.lengths.clamp(min=1)

    @property
    def mean_logratios(self) -> Tensor:  # z / n
        return self.logratios / self.lengths.clamp(min=1)

    @property
    def present(self) -> Tensor:
        return torch.ones_like(self.logps) if self.lengths is None else self.lengths > 0


def margins(chosen: Answers, rejected: Answers) -> Tensor:
    # D = T_w - T_l
    return chosen.rewards - rejected.rewards


# Mutual information: positives are the chosen, the marginal is the half-and-half mixture.


def dpo(chosen: Answers, rejected: Answers) -> Tensor:
    # -log sigma(D) = sp(-D)
    return F.softplus(-margins(chosen, rejected))


def mio(chosen: Answers, rejected: Answers) -> Tensor:
    # sp(-T_w) + sp(T_w) / 2 + sp(T_l) / 2: positives against the half-and-half mixture
    positive = F.softplus(-chosen.rewards)
    return positive + (F.softplus(chosen.rewards) + F.softplus(rejected.rewards)) / 2


def bce(chosen: Answers, rejected: Answers) -> Tensor:
    # sp(-T_w) + sp(T_l): positives against the rejected alone, the other reading of the paper
    return F.softplus(-chosen.rewards) + F.softplus(rejected.rewards)


def nwj(chosen: Answers, rejected: Answers) -> Tensor:
    # -(1 + T_w) + (e^T_w + e^T_l) / 2
    return (chosen.rewards.exp() + rejected.rewards.exp()) / 2 - 1 - chosen.rewards


def log_mean_exp(chosen: Answers, rejected: Answers) -> Tensor:
    # c = log mean e^T over the 2B critics of a batch: ()
    critics = torch.cat((chosen.rewards, rejected.rewards))
    return critics.logsumexp(dim=0) - math.log(len(critics))


def dv(chosen: Answers, rejected: Answers, shared: Tensor) -> Tensor:
    # -mean T_w + c is the least over c of the mean of nwj(T - c), reached at this c: so with c held
    # fixed nwj(T - c) has both its mean and its gradient
    mixture = ((chosen.rewards - shared).exp() + (rejected.rewards - shared).exp()) / 2
    return mixture - 1 - (chosen.rewards - shared)


# The sigmoid of the margin, and what others made of it.


def cdpo(chosen: Answers, rejected: Answers, label_smoothing: float = 0.1) -> Tensor:
    # (1 - eps) sp(-D) + eps sp(D)
    d = margins(chosen, rejected)
    return (1 - label_smoothing) * F.softplus(-d) + label_smoothing * F.softplus(d)


def robust(chosen: Answers, rejected: Answers, label_smoothing: float = 0.1) -> Tensor:
    # ((1 - eps) sp(-D) - eps sp(D)) / (1 - 2 eps): unbiased where a share eps of labels is flipped
    d = margins(chosen, rejected)
    clean, flipped = (1 - label_smoothing) * F.softplus(-d), label_smoothing * F.softplus(d)
    return (clean - flipped) / (1 - 2 * label_smoothing)


def exo(chosen: Answers, rejected: Answers, epsilon: float = 1e-3) -> Tensor:
    # KL of (q, 1 - q), q = sigma(D), from (1 - eps, eps)
    d = margins(chosen, rejected)
    right = d.sigmoid() * (F.logsigmoid(d) - math.log1p(-epsilon))
    return right + (-d).sigmoid() * (F.logsigmoid(-d) - math.log(epsilon))


def dpop(chosen: Answers, rejected: Answers, dpop_lambda: float = 50.0) -> Tensor:
    # sp(-(D - beta lambda max(0, -z_w))): the chosen may not fall below the reference
    fall = dpop_lambda * F.relu(-chosen.rewards)
    return F.softplus(fall - margins(chosen, rejected))


def rpo(chosen: Answers, rejected: Answers, alpha: float = 1.0) -> Tensor:
    # sp(-D) - alpha m_w
    return dpo(chosen, rejected) - alpha * chosen.mean_logps


def hinge(chosen: Answers, rejected: Answers) -> Tensor:
    # max(0, 1 - D)
    return F.relu(1 - margins(chosen, rejected))


def dpo_norm(chosen: Answers, rejected: Answers) -> Tensor:
    # sp(-beta (z_w / n_w - z_l / n_l))
    return F.softplus(-chosen.beta * (chosen.mean_logratios - rejected.mean_logratios))


# A distance from, or a step towards, a target of each answer.


def ipo(chosen: Answers, rejected: Answers) -> Tensor:
    # (z_w / n_w - z_l / n_l - 1 / (2 beta))^2
    return (chosen.mean_logratios - rejected.mean_logratios - 1 / (2 * chosen.beta)) ** 2


def sppo(chosen: Answers, rejected: Answers) -> Tensor:
    # (z_w - 1 / (2 beta))^2 + (z_l + 1 / (2 beta))^2
    target = 1 / (2 * chosen.beta)
    return (chosen.logratios - target) ** 2 + (rejected.logratios + target) ** 2


def apo_zero(chosen: Answers, rejected: Answers) -> Tensor:
    # 1 - sigma(T_w) + sigma(T_l)
    return (-chosen.rewards).sigmoid() + rejected.rewards.sigmoid()


def apo_down(chosen: Answers, rejected: Answers) -> Tensor:
    # sigma(T_w) + 1 - sigma(D)
    return chosen.rewards.sigmoid() + (-margins(chosen, rejected)).sigmoid()


def mismatch(chosen: Answers, rejected: Answers) -> Tensor:
    # K = max(0, mean of T over prompts with other rows' answers): ()
    rewards = torch.cat((chosen.rewards, rejected.rewards))
    present = torch.cat((chosen.present, rejected.present))
    return ((rewards * present).sum() / present.sum()).clamp(min=0)


def kto(chosen: Answers, rejected: Answers, shared: Tensor) -> Tensor:
    # 1 - sigma(T_w - K) and 1 - sigma(K - T_l): their mean, or the one whose answer is there
    terms = torch.stack(
        ((shared - chosen.rewards).sigmoid(), (rejected.rewards - shared).sigmoid())
    )
    present = torch.stack((chosen.present, rejected.present))
    return (terms * present).sum(dim=0) / present.sum(dim=0)


# Density ratios by the token.


def lsif(chosen: Answers, rejected: Answers) -> Tensor:
    # -e^(z_w / n_w) + e^(2 z_l / n_l) / 2
    return (2 * rejected.mean_logratios).exp() / 2 - chosen.mean_logratios.exp()


def ukl(chosen: Answers, rejected: Answers) -> Tensor:
    # -m_w + e^(z_l / n_l)
    return rejected.mean_logratios.exp() - chosen.mean_logps


# Without a reference.


def simpo(chosen: Answers, rejected: Answers, gamma: float = 0.5) -> Tensor:
    # sp(-(beta (m_w - m_l) - gamma)): gamma itself, not gamma / beta
    return F.softplus(gamma - chosen.beta * (chosen.mean_logps - rejected.mean_logps))


def orpo(chosen: Answers, rejected: Answers) -> Tensor:
    # -m_w + beta sp(-(o_w - o_l)), o = m - log(1 - e^m)
    def log_odds(m):
        m = m.clamp(max=-torch.finfo(m.dtype).tiny)  # certain answers: log 0 has no gradient
        return m - torch.log(-torch.expm1(m))

    ratio = log_odds(chosen.mean_logps) - log_odds(rejected.mean_logps)
    return -chosen.mean_logps + chosen.beta * F.softplus(-ratio)


def cpo(chosen: Answers, rejected: Answers, alpha: float = 1.0) -> Tensor:
    # sp(-beta (s_w - s_l)) - alpha m_w
    return F.softplus(chosen.beta * (rejected.logps - chosen.logps)) - alpha * chosen.mean_logps


def slic(chosen: Answers, rejected: Answers) -> Tensor:
    # max(0, 1 - s_w + s_l) - beta m_w
    return F.relu(1 - chosen.logps + rejected.logps) - chosen.beta * chosen.mean_logps


def sft(chosen: Answers, rejected: Answers) -> Tensor:
    # -m_w: supervised fine-tuning on the chosen answer
    return -chosen.mean_logps


def rlhf(chosen: Answers, rejected: Answers) -> Tensor:
    # -(A_1 s_1 + A_2 s_2) / 2 for two draws of the policy; the advantages A have no gradient and
    # come as ref_logps = s + A / beta, which makes T = -A
    pull = chosen.rewards.detach() * chosen.logps + rejected.rewards.detach() * rejected.logps
    return pull / 2


@dataclasses.dataclass(frozen=True)
class Loss:
    """The declaration of a loss."""

    function: Callable[..., Tensor]  # of chosen, rejected and its options, which have defaults
    needs_reference: bool
    uses: str  # "sums" or "means" over an answer's tokens, or both
    # "both", only the "chosen", or "any" of them must be there; "drawn": by the policy itself
    answers: str
    beta: float  # the default; dpo's is half of mio's, which gives equal gradients at step 0
    # Its value while policy and reference agree, with its own options; a function of beta, or
    # None where it depends on the answers.
    start: float | Callable[[float], float] | None
    formula: str
    source: str
    # A loss of the whole batch splits into pairs once a number that they share is known, without
    # gradient: of the batch itself or, `mismatched`, of its prompts with other rows' answers.
    shared: Callable[[Answers, Answers], Tensor] | None = None
    mismatched: bool = False

    @property
    def pairwise(self) -> bool:
        return self.shared is None

    @property
    def options(self) -> dict[str, float]:
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}


# fmt: off
LOSSES: dict[str, Loss] = {
    "dpo": Loss(dpo, True, "sums", "both", 0.1, math.log(2),
        "sp(T_l - T_w)", "arXiv 2305.18290, eq. 7"),
    "mio": Loss(mio, True, "sums", "both", 0.2, math.log(4),
        "sp(-T_w) + sp(T_w)/2 + sp(T_l)/2",
        "arXiv 2506.22578; NCA's pair, 2402.05369"),
    "bce": Loss(bce, True, "sums", "both", 0.1, math.log(4),
        "sp(-T_w) + sp(T_l)", "the rejected as marginal; BCO, 2404.04656"),
    "nwj": Loss(nwj, True, "sums", "both", 0.1, 0.0,
        "-(1 + T_w) + (e^T_w + e^T_l)/2", "Nguyen-Wainwright-Jordan / f-GAN bound"),
    "dv": Loss(dv, True, "sums", "both", 0.1, 0.0,
        "-mean T_w + log mean e^T, over the batch", "Donsker-Varadhan; MINE, arXiv 1801.04062",
        shared=log_mean_exp),
    "cdpo": Loss(cdpo, True, "sums", "both", 0.1, math.log(2),
        "(1-eps) sp(-D) + eps sp(D)", "Mitchell's cDPO note"),
    "robust": Loss(robust, True, "sums", "both", 0.1, math.log(2),
        "((1-eps) sp(-D) - eps sp(D)) / (1-2eps)", "arXiv 2403.00409"),
    "hinge": Loss(hinge, True, "sums", "both", 0.05, 1.0,
        "max(0, 1 - D)", "SLiC, RSO; arXiv 2309.06657"),
    "ipo": Loss(ipo, True, "means", "both", 0.1, lambda beta: (1 / (2 * beta)) ** 2,
        "(z_w/n_w - z_l/n_l - 1/(2 beta))^2", "arXiv 2310.12036"),
    "dpo_norm": Loss(dpo_norm, True, "means", "both", 5.0, math.log(2),
        "sp(-beta (z_w/n_w - z_l/n_l))", "Tulu 3, arXiv 2411.15124"),
    "apo_zero": Loss(apo_zero, True, "sums", "both", 0.1, 1.0,
        "1 - sigma(T_w) + sigma(T_l)", "arXiv 2408.06266"),
    "apo_down": Loss(apo_down, True, "sums", "both", 0.1, 1.0,
        "sigma(T_w) + 1 - sigma(D)", "arXiv 2408.06266"),
    "exo": Loss(exo, True, "sums", "both", 0.1, -math.log(2) - math.log(1e-3 * (1 - 1e-3)) / 2,
        "q log(q/(1-eps)) + (1-q) log((1-q)/eps), q = sigma(D)", "arXiv 2402.00856"),
    "sppo": Loss(sppo, True, "sums", "both", 1e-3, lambda beta: 2 * (1 / (2 * beta)) ** 2,
        "(z_w - 1/(2 beta))^2 + (z_l + 1/(2 beta))^2", "arXiv 2405.00675, hard labels"),
    "dpop": Loss(dpop, True, "sums", "both", 0.1, math.log(2),
        "sp(-(D - beta lambda max(0, -z_w)))", "arXiv 2402.13228"),
    "rpo": Loss(rpo, True, "sums and means", "both", 0.1, None,
        "sp(-D) - alpha m_w", "arXiv 2404.19733"),
    "lsif": Loss(lsif, True, "means", "both", 1.0, -0.5,
        "-e^(z_w/n_w) + e^(2 z_l/n_l)/2", "DIL, arXiv 2503.05079"),
    "ukl": Loss(ukl, True, "means", "both", 1.0, None,
        "-m_w + e^(z_l/n_l)", "DIL, arXiv 2503.05079"),
    "simpo": Loss(simpo, False, "means", "both", 2.0, None,
        "sp(-(beta (m_w - m_l) - gamma))", "arXiv 2405.14734"),
    "orpo": Loss(orpo, False, "means", "both", 0.1, None,
        "-m_w + beta sp(o_l - o_w), o = m - log(1 - e^m)", "arXiv 2403.07691"),
    "cpo": Loss(cpo, False, "sums and means", "both", 0.1, None,
        "sp(-beta (s_w - s_l)) - alpha m_w", "arXiv 2401.08417"),
    "slic": Loss(slic, False, "sums and means", "both", 0.1, None,
        "max(0, 1 - s_w + s_l) - beta m_w", "arXiv 2305.10425"),
    "kto": Loss(kto, True, "sums", "any", 0.1, 0.5,
        "mean of 1 - sigma(T_w - K), 1 - sigma(K - T_l)", "arXiv 2402.01306",
        shared=mismatch, mismatched=True),
    "rlhf": Loss(rlhf, True, "sums", "drawn", 0.01, 0.0,
        "(T_w s_w + T_l s_l)/2, T fixed: minus an advantage", "RLOO, arXiv 2402.14740"),
    "sft": Loss(sft, False, "means", "chosen", 0.1, None,
        "-m_w", "maximum likelihood of the chosen"),
}
# fmt: on

SYMBOLS = """\
s_w, s_l: summed log-prob of the chosen, the rejected answer; n: its tokens;
m = s/n; z: s minus the reference's; T = beta z; D = T_w - T_l; sp(x) =
log(1 + e^x); K = max(0, mean T of prompts with other rows' answers)."""


def loss_table() -> str:
    """Every row of LOSSES in two lines of at most 80 columns, below their symbols."""
    lines = [SYMBOLS, ""]
    for name, loss in LOSSES.items():
        facts = [loss.uses, "reference" if loss.needs_reference else "no reference"]
        if re.search("T|D|beta", loss.formula):
            facts.append(f"beta {loss.beta:g}")
        facts += [f"{option} {default:g}" for option, default in loss.options.items()]
        lines += [f"{name:10}{loss.formula}", f"{'':10}{', '.join(facts)}; {loss.source}"]
    return "\n".join(lines)


def pair_loss(
    name: str,
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    *,
    beta: float,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    **options,
) -> Tensor:
    """The loss of each pair, by the name of a row of LOSSES.

    Log-probs are sums in nats, (B,); lengths are tokens, (B,), needed by losses that use means;
    reference log-probs may be None for losses without a reference; `options` go to the loss's own
    function. Returns (B,), whose mean is the loss of the batch. A loss of the whole batch takes
    what its pairs share as `shared`; without it these pairs are the batch, and kto's K is of their
    own answers, as training's is not.
    Raises KeyError for an unknown name, TypeError for an option that the loss does not take.
    """
    loss = LOSSES[name]
    assert not loss.needs_reference or ref_chosen_logps is not None, f"{name} needs a reference"
    assert "means" not in loss.uses or chosen_lengths is not None, f"{name} needs lengths"
    chosen = Answers(chosen_logps, ref_chosen_logps, chosen_lengths, beta)
    rejected = Answers(rejected_logps, ref_rejected_logps, rejected_lengths, beta)
    if not loss.pairwise and "shared" not in options:
        options["shared"] = loss.shared(chosen, rejected).detach()
    return loss.function(chosen, rejected, **options)


# --- The head: hidden states of the answers' tokens, laid end to end, to losses ------------------
# Completions come in the order chosen_0, rejected_0, chosen_1, rejected_1, ...: hidden (N, D) holds
# the state that predicts each of their tokens, targets (N,) the tokens, lengths (2B,) the counts.
CHUNK_TOKENS = 1024  # rows of logits at a time


def naive_logps(hidden: Tensor, head_weight: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
    """The oracle: all logits at once. hidden (N, D), head_weight (V, D), targets (N,), lengths (S,)
    -> summed log-probability of each completion (S,), in nats, differentiable."""
    logits = at_least_float32(hidden @ head_weight.T)  # (N, V)
    token_logps = logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]  # (N,)
    return torch.stack([part.sum() for part in token_logps.split(lengths.tolist())])


@torch.no_grad()
def chunked_logps(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, lengths: Tensor,
    chunk_tokens: int = CHUNK_TOKENS, compiled: bool = False,
) -> Tensor:  # fmt: skip
    """naive_logps without a gradient, with at most `chunk_tokens` rows of logits at a time."""
    head = _Head(head_weight, hidden, min(chunk_tokens, len(hidden)), compiled)
    parts = zip(hidden.split(chunk_tokens), targets.split(chunk_tokens))
    token_logps = torch.cat([head.residual(h, y)[1] for h, y in parts])  # (N,)
    return _sum_by(token_logps, _owners(lengths, hidden.device), len(lengths))


def fused_pair_loss(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    lengths: Tensor,
    ref_logps: Tensor | None,
    name: str,
    *,
    beta: float,
    chunk_tokens: int = CHUNK_TOKENS,
    compiled: bool = False,
    **options,
) -> tuple[Tensor, Tensor]:
    """Loss of each pair (B,) and log-probability of each completion (2B,), logits never kept.

    hidden (N, D), head_weight (V, D), targets (N,), lengths (2B,), ref_logps (2B,) or None.
    Differentiable in hidden and head_weight through losses.mean() or losses.sum(), that is with
    one gradient for all losses; anything else gives NaN gradients. The log-probs are detached.
    """
    assert LOSSES[name].pairwise or "shared" in options, f"{name} needs the batch's shared term"
    assert len(lengths) % 2 == 0, "completions come in pairs"
    return FusedPairLoss.apply(
        hidden,
        head_weight,
        targets,
        lengths,
        ref_logps,
        name,
        beta,
        chunk_tokens,
        compiled,
        options,
    )


class FusedPairLoss(torch.autograd.Function):
    """Forward and backward of the head in one pass over the answers' tokens.

    With z = W h the logits of a token y, p = softmax(z) and s the sum of log p_y over a completion,
        d s / d z = onehot(y) - p                    for each of its tokens,
        d L / d z = -w (p - onehot(y))               with w = d L / d s,
        d L / d h = -w W^T (p - onehot(y)),
        d L / d W = sum over tokens of -(p - onehot(y)) (w h)^T.
    A loss needs only the two sums of its own pair (one of the whole batch also what its pairs
    share, which a pass without gradient has found), so w is known as soon as a chunk of
    whole pairs has been projected: its logits turn into p - onehot in place, w goes to the small
    side of both products, and the next chunk takes the same buffer. Three products a token, where
    a head that projects again in its backward needs four.
    """

    @staticmethod
    def forward(
        ctx, hidden, head_weight, targets, lengths, ref_logps, name, beta, chunk_tokens, compiled,
        options,
    ):  # fmt: skip
        need_hidden, need_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        accumulator = torch.promote_types(head_weight.dtype, torch.float32)
        grad_head = torch.empty_like(head_weight, dtype=accumulator) if need_head else None
        chunks = list(chunks_of_pairs(lengths.tolist(), chunk_tokens))
        most = max(tokens.stop - tokens.start for _, tokens in chunks)
        head = _Head(head_weight, hidden, most, compiled)
        owner = _owners(lengths, hidden.device)  # (N,) the completion of each token
        lengths = lengths.to(hidden.device)
        losses, logps = [], []
        for pairs, tokens in chunks:
            residual, token_logps = head.residual(hidden[tokens], targets[tokens])
            sums = _sum_by(token_logps, owner[tokens] - pairs.start, pairs.stop - pairs.start)
            with torch.enable_grad():
                sums.requires_grad_(True)
                ref_w = ref_l = None
                if ref_logps is not None:
                    ref_w, ref_l = ref_logps[pairs][0::2], ref_logps[pairs][1::2]
                n_w, n_l = lengths[pairs][0::2], lengths[pairs][1::2]
                loss = pair_loss(
                    *(name, sums[0::2], sums[1::2], ref_w, ref_l),
                    beta=beta, chosen_lengths=n_w, rejected_lengths=n_l, **options,
                )  # fmt: skip
                (w,) = torch.autograd.grad(loss.sum(), sums)  # d L / d s, (completions,)
            losses.append(loss.detach())
            logps.append(sums.detach())
            w = -w[owner[tokens] - pairs.start, None]  # (n, 1)
            if need_hidden:
                grad_hidden[tokens] = w * (residual @ head.weight)
            if need_head:
                _add_product(grad_head, residual, w * hidden[tokens], first=tokens.start == 0)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head_weight.dtype
        losses, logps = torch.cat(losses), torch.cat(logps)
        ctx.mark_non_differentiable(logps)
        return losses, logps

    @staticmethod
    def backward(ctx, grad_losses, _):
        grad_hidden, grad_head = ctx.saved_tensors
        # The chunks are summed already, so one factor must do for all pairs: NaN where it cannot.
        first = grad_losses[:1].sum()  # 0 where there are no pairs
        factor = torch.where((grad_losses == first).all(), first, torch.nan)
        if factor.is_cuda or factor != 1:  # of losses.sum() it is 1: no copy of (V, D) on a CPU
            grad_hidden = (
                None if grad_hidden is None else grad_hidden * factor.to(grad_hidden.dtype)
            )
            grad_head = None if grad_head is None else grad_head * factor
        if grad_head is not None:
            grad_head = grad_head.to(ctx.head_dtype)
        return grad_hidden, grad_head, *[None] * 8


class _Head:
    """A head's weight in the dtype of its products, and one buffer for the logits of any chunk."""

    def __init__(self, weight: Tensor, like: Tensor, tokens: int, compiled: bool):
        self.weight = weight.to(_matmul_dtype(like))
        self.logits = self.weight.new_empty(tokens, len(weight))
        self.to_residual = _compiled_to_residual if compiled else _to_residual

    def residual(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (n, D), targets (n,) -> softmax minus one-hot (n, V), valid until the next call,
        and token log-probs (n,)."""
        dtype = self.weight.dtype
        logits = torch.mm(hidden.to(dtype), self.weight.T, out=self.logits[: len(hidden)])
        # On a CPU a few rows at a time, which stay in its cache from the first line to the last.
        rows = len(logits) if logits.is_cuda else 1 + 2**20 // logits.shape[1]
        parts = zip(logits.split(rows), targets.split(rows))
        return logits, torch.cat([self.to_residual(z, y) for z, y in parts])


def _to_residual(logits: Tensor, targets: Tensor) -> Tensor:
    """Turns logits (n, V) into softmax minus one-hot in place; returns token log-probs (n,)."""
    p = at_least_float32(logits)  # a copy where their precision is lower
    torch.log_softmax(p, dim=-1, out=p)
    token_logps = p.gather(1, targets[:, None])[:, 0]
    p.exp_().scatter_add_(1, targets[:, None], p.new_full((len(p), 1), -1.0))
    logits.copy_(p)
    return token_logps


_compiled_to_residual = torch.compile(_to_residual, dynamic=True)


def _add_product(total: Tensor, residual: Tensor, weighted: Tensor, first: bool) -> None:
    """total (V, D) += residual (n, V) transposed times weighted (n, D); `first`: total is not read.
    Products of lower precision are added in total's, a part of the vocabulary at a time."""
    weighted = weighted.to(residual.dtype)
    if total.dtype == residual.dtype:
        total.addmm_(residual.T, weighted, beta=0 if first else 1)
        return
    for part, columns in zip(total.split(2**14), residual.split(2**14, dim=1)):
        product = columns.T @ weighted
        part.copy_(product) if first else part.add_(product)


def at_least_float32(x: Tensor) -> Tensor:
    """A log-softmax in bfloat16 errs by nats on a long answer; float64 stays what it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _matmul_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _owners(lengths: Tensor, device: torch.device) -> Tensor:
    """lengths (S,) -> the number of the completion that each of their tokens belongs to (N,)."""
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths.cpu()).to(device)


def _sum_by(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """values (N,), owner (N,) -> sums (count,), accumulated in float64: answers can be long."""
    sums = torch.zeros(count, dtype=torch.float64, device=values.device)
    return sums.index_add_(0, owner, values.double()).to(values.dtype)


def chunks_of_pairs(lengths: list[int], chunk_tokens: int):
    """Yields (slice of completions, slice of tokens): whole pairs, about `chunk_tokens` tokens."""
    first = start = end = 0
    for pair in range(0, len(lengths), 2):
        size = lengths[pair] + lengths[pair + 1]
        if end > start and end + size - start > chunk_tokens:
            yield slice(first, pair), slice(start, end)
            first, start = pair, end
        end += size
    yield slice(first, len(lengths)), slice(start, end)
