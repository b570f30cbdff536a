"""The objective: losses on pairs of answers, and the fused head that computes them.

The symbols of the paper (MIO, arXiv 2506.22578) have these names in the code (log-probs in nats):

  s_w, s_l       log pi(y|x), summed over an answer's tokens   chosen_logps, ...
  ref_w, ref_l   the same under the frozen reference model     ref_chosen_logps
  n              tokens of an answer, its end token included   lengths
  z = s - ref    log-ratio                                     logratios
  m = s / n      mean log-probability of a token               mean_logps
  T = beta z     implicit reward, the critic of the paper      rewards
  d = T_w - T_l  margin                                        margins
  K              max(0, mean T) on answers of other rows       shared (kto)
  A              advantage of a sampled answer                 advantages (rlhf)
  sp, sigma      log(1 + e^x) and its derivative, the logistic function

The paper compares two lower bounds on the mutual information between a prompt and its preferred
answer. The positive samples are the chosen answers, and the marginal is the half-and-half mixture
of chosen and rejected answers. For one pair the bounds are

  Donsker-Varadhan   T_w - log(e^T_w / 2 + e^T_l / 2)       =  log 2 - dpo
  Jensen-Shannon     -sp(-T_w) - sp(T_w) / 2 - sp(T_l) / 2  =  -mio

so DPO maximizes the first bound and MIO maximizes the second.
"""

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from support.bfloat16 import in_product_precision
from support.loss_sums import weighted_sum

# --- Losses: functions that map both sides of B pairs to (B,); each docstring is the formula ------


@dataclasses.dataclass(frozen=True)
class Answers:
    """One side of B pairs: the chosen or the rejected answers. Every tensor is (B,)."""

    logps: Tensor
    ref_logps: Tensor | None  # None for losses without a reference
    lengths: Tensor | None  # 0 for a missing answer; None if the loss uses no lengths
    beta: float
    advantages: Tensor | None = None  # only for rlhf

    @property
    def logratios(self) -> Tensor:
        return self.logps - self.ref_logps

    @property
    def rewards(self) -> Tensor:
        return self.beta * self.logratios

    @property
    def mean_logps(self) -> Tensor:
        return self.logps / self.lengths.clamp(min=1)

    @property
    def mean_logratios(self) -> Tensor:
        return self.logratios / self.lengths.clamp(min=1)

    @property
    def present(self) -> Tensor:
        return torch.ones_like(self.logps) if self.lengths is None else self.lengths > 0

    def averaged(self) -> "Answers":
        """Returns the answers with means over tokens in place of sums, for --average_logps."""
        mean_ref = None if self.ref_logps is None else self.ref_logps / self.lengths.clamp(min=1)
        one = self.lengths.clamp(max=1)  # a mean is not divided again
        return dataclasses.replace(self, logps=self.mean_logps, ref_logps=mean_ref, lengths=one)


def margins(chosen: Answers, rejected: Answers) -> Tensor:
    return chosen.rewards - rejected.rewards


# Bounds on mutual information.
def mio(chosen: Answers, rejected: Answers) -> Tensor:
    """sp(-T_w) + sp(T_w)/2 + sp(T_l)/2"""
    positive = F.softplus(-chosen.rewards)
    return positive + (F.softplus(chosen.rewards) + F.softplus(rejected.rewards)) / 2


def dpo(chosen: Answers, rejected: Answers) -> Tensor:
    """sp(T_l - T_w)"""
    return F.softplus(-margins(chosen, rejected))


def bce(chosen: Answers, rejected: Answers) -> Tensor:
    """sp(-T_w) + sp(T_l)"""
    return F.softplus(-chosen.rewards) + F.softplus(rejected.rewards)


def nwj(chosen: Answers, rejected: Answers) -> Tensor:
    """-(1 + T_w) + (e^T_w + e^T_l)/2"""
    return (chosen.rewards.exp() + rejected.rewards.exp()) / 2 - 1 - chosen.rewards


def log_mean_exp(chosen: Answers, rejected: Answers) -> Tensor:
    """c = log mean e^T over the 2B answers of B pairs: a scalar (), `shared` in dv."""
    critics = torch.cat((chosen.rewards, rejected.rewards))  # (2B,)
    return critics.logsumexp(dim=0) - math.log(len(critics))


def dv(chosen: Answers, rejected: Answers, shared: Tensor) -> Tensor:
    """-mean T_w + log mean e^T, over the batch"""
    # As a function of c, the mean of nwj(T - c) is smallest at c = log_mean_exp, where it equals
    # dv. With c fixed at this value, nwj(T - c) therefore has the value and the gradient of dv.
    mixture = ((chosen.rewards - shared).exp() + (rejected.rewards - shared).exp()) / 2
    return mixture - 1 - (chosen.rewards - shared)


# Functions of the margin.
def cdpo(chosen: Answers, rejected: Answers, label_smoothing: float = 0.1) -> Tensor:
    """(1-eps) sp(-d) + eps sp(d)"""
    d = margins(chosen, rejected)
    return (1 - label_smoothing) * F.softplus(-d) + label_smoothing * F.softplus(d)


def robust(chosen: Answers, rejected: Answers, label_smoothing: float = 0.1) -> Tensor:
    """((1-eps) sp(-d) - eps sp(d)) / (1-2eps)"""
    d = margins(chosen, rejected)
    clean, flipped = (1 - label_smoothing) * F.softplus(-d), label_smoothing * F.softplus(d)
    return (clean - flipped) / (1 - 2 * label_smoothing)


def exo(chosen: Answers, rejected: Answers, epsilon: float = 1e-3) -> Tensor:
    """q log(q/(1-eps)) + (1-q) log((1-q)/eps), q = sigma(d)"""
    d = margins(chosen, rejected)
    right = d.sigmoid() * (F.logsigmoid(d) - math.log1p(-epsilon))
    return right + (-d).sigmoid() * (F.logsigmoid(-d) - math.log(epsilon))


def dpop(chosen: Answers, rejected: Answers, dpop_lambda: float = 50.0) -> Tensor:
    """sp(-(d - beta lambda max(0, -z_w)))"""
    penalty = dpop_lambda * F.relu(-chosen.rewards)
    return F.softplus(penalty - margins(chosen, rejected))


def rpo(chosen: Answers, rejected: Answers, alpha: float = 1.0) -> Tensor:
    """sp(-d) - alpha m_w"""
    return dpo(chosen, rejected) - alpha * chosen.mean_logps


def hinge(chosen: Answers, rejected: Answers) -> Tensor:
    """max(0, 1 - d)"""
    return F.relu(1 - margins(chosen, rejected))


def dpo_norm(chosen: Answers, rejected: Answers) -> Tensor:
    """sp(-beta (z_w/n_w - z_l/n_l))"""
    return F.softplus(-chosen.beta * (chosen.mean_logratios - rejected.mean_logratios))


# Losses with a target for each answer.
def ipo(chosen: Answers, rejected: Answers) -> Tensor:
    """(z_w/n_w - z_l/n_l - 1/(2 beta))^2"""
    return (chosen.mean_logratios - rejected.mean_logratios - 1 / (2 * chosen.beta)) ** 2


def sppo(chosen: Answers, rejected: Answers) -> Tensor:
    """(z_w - 1/(2 beta))^2 + (z_l + 1/(2 beta))^2"""
    target = 1 / (2 * chosen.beta)
    return (chosen.logratios - target) ** 2 + (rejected.logratios + target) ** 2


def apo_zero(chosen: Answers, rejected: Answers) -> Tensor:
    """1 - sigma(T_w) + sigma(T_l)"""
    return (-chosen.rewards).sigmoid() + rejected.rewards.sigmoid()


def apo_down(chosen: Answers, rejected: Answers) -> Tensor:
    """sigma(T_w) + 1 - sigma(d)"""
    return chosen.rewards.sigmoid() + (-margins(chosen, rejected)).sigmoid()


def mean_reward(chosen: Answers, rejected: Answers) -> Tensor:
    """K = max(0, mean T) over the answers that are present: a scalar (), `shared` in kto."""
    rewards = torch.cat((chosen.rewards, rejected.rewards))  # (2B,)
    present = torch.cat((chosen.present, rejected.present))  # (2B,)
    return ((rewards * present).sum() / present.sum()).clamp(min=0)


def kto(chosen: Answers, rejected: Answers, shared: Tensor) -> Tensor:
    """mean of 1 - sigma(T_w - K), 1 - sigma(K - T_l)"""
    # A pair without a chosen or a rejected answer has only one of the two terms.
    terms = torch.stack((shared - chosen.rewards, rejected.rewards - shared)).sigmoid()  # (2, B)
    present = torch.stack((chosen.present, rejected.present))  # (2, B)
    return (terms * present).sum(dim=0) / present.sum(dim=0)


# Density ratios per token.
def lsif(chosen: Answers, rejected: Answers) -> Tensor:
    """-e^(z_w/n_w) + e^(2 z_l/n_l)/2"""
    return (2 * rejected.mean_logratios).exp() / 2 - chosen.mean_logratios.exp()


def ukl(chosen: Answers, rejected: Answers) -> Tensor:
    """-m_w + e^(z_l/n_l)"""
    return rejected.mean_logratios.exp() - chosen.mean_logps


# Losses without a reference.
def simpo(chosen: Answers, rejected: Answers, gamma: float = 0.5) -> Tensor:
    """sp(-(beta (m_w - m_l) - gamma))"""
    return F.softplus(gamma - chosen.beta * (chosen.mean_logps - rejected.mean_logps))


def orpo(chosen: Answers, rejected: Answers) -> Tensor:
    """-m_w + beta sp(o_l - o_w), o = m - log(1 - e^m)"""
    m = torch.stack((chosen.mean_logps, rejected.mean_logps))  # (2, B)
    m = m.clamp(max=-torch.finfo(m.dtype).tiny)  # at probability 1 the gradient is infinite
    log_odds = m - torch.log(-torch.expm1(m))  # (2, B)
    return -chosen.mean_logps + chosen.beta * F.softplus(log_odds[1] - log_odds[0])


def cpo(chosen: Answers, rejected: Answers, alpha: float = 1.0) -> Tensor:
    """sp(-beta (s_w - s_l)) - alpha m_w"""
    return F.softplus(chosen.beta * (rejected.logps - chosen.logps)) - alpha * chosen.mean_logps


def slic(chosen: Answers, rejected: Answers) -> Tensor:
    """max(0, 1 - s_w + s_l) - beta m_w"""
    return F.relu(1 - chosen.logps + rejected.logps) - chosen.beta * chosen.mean_logps


def sft(chosen: Answers, rejected: Answers) -> Tensor:
    """-m_w"""
    return -chosen.mean_logps


def rlhf(chosen: Answers, rejected: Answers) -> Tensor:
    """-(A_1 s_1 + A_2 s_2)/2 for two samples with advantages A"""
    return -(chosen.advantages * chosen.logps + rejected.advantages * rejected.logps) / 2


# --- The table of losses --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Loss:
    """The properties of a loss that the trainer uses."""

    function: Callable[..., Tensor]  # takes chosen, rejected and options with defaults
    uses: str  # "sums" or "means" over the tokens of an answer, or "sums and means"
    beta: float  # the default of --beta, which also scales the logged rewards
    # The loss while the policy equals the reference: a number, or a function of beta and the loss's
    # own options; NaN if it depends on the answers.
    initial_loss: float | Callable[..., float]
    source: str
    needs_reference: bool = True
    uses_beta: bool = True
    answers: str = "both"  # a row must hold "both", the "chosen" or "any" answer; "drawn": sampled
    # Computes the scalar that couples the pairs of a step, without gradient, before their losses.
    # With shared_of_mismatched, its pairs are mismatched: prompts with answers of other rows.
    shared: Callable[[Answers, Answers], Tensor] | None = None
    shared_of_mismatched: bool = False

    @property
    def pairwise(self) -> bool:
        return self.shared is None

    @property
    def options(self) -> dict[str, float]:
        """Maps each of the loss's own options to its default. Each option is a flag of train.py."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    @property
    def flags(self) -> set[str]:
        """The flags of train.py that change this loss but not every other loss."""
        averages = "sums" in self.uses and self.answers != "drawn"
        names = {"beta": self.uses_beta, "average_logps": averages} | dict.fromkeys(self.options, 1)
        return {name for name, is_used in names.items() if is_used}

    def own(self, options: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in options.items() if name in self.options}

    def arguments(self, settings) -> dict[str, float]:
        """Returns beta, average_logps and the loss's own options as keyword arguments of pair_loss.
        The values are attributes of `settings`, where None stands for the default of an option."""
        given = {name: x for name, x in self.own(vars(settings)).items() if x is not None}
        shared = {"beta": settings.beta, "average_logps": settings.average_logps}
        return shared | self.options | given

    def loss_at_reference(self, beta: float, **options) -> float:
        value = self.initial_loss
        return value(beta=beta, **self.own(options)) if callable(value) else value


LOG2, LOG4, UNKNOWN = math.log(2), math.log(4), math.nan
# fmt: off
LOSSES: dict[str, Loss] = {
    "mio": Loss(mio, "sums", 0.2, LOG4, "arXiv 2506.22578; NCA's pair, 2402.05369"),
    "dpo": Loss(dpo, "sums", 0.1, LOG2, "arXiv 2305.18290, eq. 7"),
    "bce": Loss(bce, "sums", 0.1, LOG4, "the rejected as marginal; BCO, 2404.04656"),
    "nwj": Loss(nwj, "sums", 0.1, 0.0, "Nguyen-Wainwright-Jordan / f-GAN bound"),
    "dv": Loss(dv, "sums", 0.1, 0.0, "Donsker-Varadhan; MINE, arXiv 1801.04062",
               shared=log_mean_exp),
    "cdpo": Loss(cdpo, "sums", 0.1, LOG2, "Mitchell's cDPO note"),
    "robust": Loss(robust, "sums", 0.1, LOG2, "arXiv 2403.00409"),
    "hinge": Loss(hinge, "sums", 0.05, 1.0, "SLiC, RSO; arXiv 2309.06657"),
    "ipo": Loss(ipo, "means", 0.1, lambda beta: (1 / (2 * beta)) ** 2, "arXiv 2310.12036"),
    "dpo_norm": Loss(dpo_norm, "means", 5.0, LOG2, "Tulu 3, arXiv 2411.15124"),
    "apo_zero": Loss(apo_zero, "sums", 0.1, 1.0, "arXiv 2408.06266"),
    "apo_down": Loss(apo_down, "sums", 0.1, 1.0, "arXiv 2408.06266"),
    "exo": Loss(exo, "sums", 0.1,
                lambda beta, epsilon: -LOG2 - math.log(epsilon * (1 - epsilon)) / 2,
                "arXiv 2402.00856"),
    "sppo": Loss(sppo, "sums", 1e-3, lambda beta: 2 * (1 / (2 * beta)) ** 2,
                 "arXiv 2405.00675, hard labels"),
    "dpop": Loss(dpop, "sums", 0.1, LOG2, "arXiv 2402.13228"),
    "rpo": Loss(rpo, "sums and means", 0.1, UNKNOWN, "arXiv 2404.19733"),
    "lsif": Loss(lsif, "means", 1.0, -0.5, "DIL, arXiv 2503.05079", uses_beta=False),
    "ukl": Loss(ukl, "means", 1.0, UNKNOWN, "DIL, arXiv 2503.05079", uses_beta=False),
    "simpo": Loss(simpo, "means", 2.0, UNKNOWN, "arXiv 2405.14734", needs_reference=False),
    "orpo": Loss(orpo, "means", 0.1, UNKNOWN, "arXiv 2403.07691", needs_reference=False),
    "cpo": Loss(cpo, "sums and means", 0.1, UNKNOWN, "arXiv 2401.08417", needs_reference=False),
    "slic": Loss(slic, "sums and means", 0.1, UNKNOWN, "arXiv 2305.10425", needs_reference=False),
    "kto": Loss(kto, "sums", 0.1, 0.5, "arXiv 2402.01306", answers="any",
                shared=mean_reward, shared_of_mismatched=True),
    # The advantages of rlhf contain the KL penalty, which beta scales.
    "rlhf": Loss(rlhf, "sums", 0.01, UNKNOWN, "RLOO, arXiv 2402.14740", answers="drawn"),
    "sft": Loss(sft, "means", 0.1, UNKNOWN, "maximum likelihood of the chosen", answers="chosen",
                needs_reference=False, uses_beta=False),
}
# fmt: on
OPTION_BOUNDS = {"label_smoothing": (0.0, 0.49), "epsilon": (1e-12, 0.49)}  # least and most


def find_loss(name: str) -> Loss:
    """Returns a loss of LOSSES, or the sum that a name like "mio+0.1*sft" describes. Raises
    ValueError for other names."""
    if name in LOSSES:
        return LOSSES[name]
    alone = [n for n, loss in LOSSES.items() if not loss.pairwise or loss.answers == "drawn"]
    term = rf"(?:(\d*\.?\d+)\*)?({'|'.join(n for n in LOSSES if n not in alone)})"
    found = [re.fullmatch(term, part) for part in name.split("+")]
    weights = {match[2]: float(match[1] or 1) for match in found if match}
    if len(found) < 2 or len(weights) < len(found) or not all(weights.values()):
        sums = f"a sum like mio+0.1*sft of different losses, without {', '.join(alone)}"
        raise ValueError(f"--loss {name}: choose from {', '.join(LOSSES)}, or {sums}")
    return weighted_sum(weights, [LOSSES[name] for name in weights])


def pair_loss(
    name: str, chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None, *, beta: float, chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None, average_logps: bool = False,
    advantages: tuple[Tensor | None, Tensor | None] = (None, None), **options,
) -> Tensor:  # fmt: skip
    """Returns the loss of each pair (B,), whose mean is the loss of the batch.

    `name` is as in find_loss. Log-probs are sums over the tokens of an answer, (B,) in nats.
    Lengths (B,) are numbers of tokens, for losses that use means and for average_logps, which
    replaces sums by means. Reference log-probs may be None for losses without a reference. Only
    rlhf needs advantages, (B,) for chosen and (B,) for rejected answers. `options` are those of the
    loss, and for dv and kto the scalar `shared` that couples the pairs. By default the given pairs
    determine the scalar; in training, mismatched pairs (see Loss) determine the scalar of kto.
    Raises ValueError for an unknown name and TypeError for an option that the loss lacks."""
    loss = find_loss(name)
    assert not loss.needs_reference or ref_chosen_logps is not None, f"{name} needs a reference"
    sums_only = loss.uses == "sums" and not average_logps
    assert sums_only or chosen_lengths is not None, f"{name} needs lengths"
    chosen = Answers(chosen_logps, ref_chosen_logps, chosen_lengths, beta, advantages[0])
    rejected = Answers(rejected_logps, ref_rejected_logps, rejected_lengths, beta, advantages[1])
    if average_logps:
        chosen, rejected = chosen.averaged(), rejected.averaged()
    if not loss.pairwise and "shared" not in options:
        options["shared"] = loss.shared(chosen, rejected).detach()  # ()
    return loss.function(chosen, rejected, **options)


# --- The head: from the hidden states of the answers' tokens to losses ----------------------------
# The answers lie end to end in the order chosen_0, rejected_0, chosen_1, rejected_1, ...:
# hidden (N, D) holds the states that predict the tokens, targets (N,) holds the token ids, and
# lengths (2B,) holds the number of tokens of each answer. A chunk has b pairs and t tokens.

CHUNK_TOKENS = 1024  # number of tokens whose logits are in memory at a time


def naive_logps(hidden: Tensor, head_weight: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
    """Computes all logits at once, as an oracle for tests. hidden (N, D), head_weight (V, D),
    targets (N,), lengths (S,) -> differentiable summed log-prob of each answer, (S,) in nats."""
    logits = hidden @ head_weight.T  # (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    token_logps = logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]  # (N,)
    return torch.stack([part.sum() for part in token_logps.split(lengths.tolist())])


@torch.no_grad()
def chunked_logps(hidden, head_weight, targets, lengths, chunk_tokens=CHUNK_TOKENS, compiled=False):
    """Computes the result of naive_logps without gradient, in chunks of `chunk_tokens` tokens."""
    weight, token_logps = in_product_precision(head_weight, hidden), []
    buffer = weight.new_empty(min(chunk_tokens, len(hidden)), len(weight))  # the logits of a chunk
    for states, y in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens)):
        logits = torch.mm(states.to(weight.dtype), weight.T, out=buffer[: len(y)])  # (t, V)
        token_logps.append(_to_residual(logits, y, compiled))
    answer_of_token = _answer_of_token(lengths.to(hidden.device), targets)
    return _sum_by_answer(torch.cat(token_logps), answer_of_token, len(lengths))


def fused_pair_loss(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, lengths: Tensor,
    ref_logps: Tensor | None, name: str, *, beta: float, advantages: Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS, counts: list | None = None, compiled: bool = False, **options,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Computes, chunk by chunk, the loss of each pair (B,) and the log-prob of each answer (2B,).

    hidden (N, D), head_weight (V, D), targets (N,), lengths (2B,), ref_logps and advantages (2B,)
    or None. Reduce the losses by mean() or sum() before backward(): unless all losses have the same
    upstream gradient, hidden and head_weight get NaN gradients. The log-probs are detached. Without
    `counts`, the lengths as a list, reading them waits for a GPU."""
    assert find_loss(name).pairwise or "shared" in options, f"{name} needs the batch's shared term"
    assert len(lengths) % 2 == 0, "lengths must hold two entries for each pair"
    chunks = list(chunks_of_pairs(counts or lengths.tolist(), chunk_tokens))
    lengths = lengths.to(hidden.device)
    given = ref_logps, lengths, advantages  # (2B,) each, or None

    def losses_of(logps: Tensor, answers: slice) -> Tensor:
        """logps (2b,) of a slice of the answers -> losses (b,)."""
        parts = [None if x is None else x[answers] for x in given]  # (2b,) each
        refs, (n_w, n_l), A = [(None, None) if x is None else (x[0::2], x[1::2]) for x in parts]
        kwargs = {"chosen_lengths": n_w, "rejected_lengths": n_l, "advantages": A} | options
        return pair_loss(name, logps[0::2], logps[1::2], *refs, beta=beta, **kwargs)

    return FusedHead.apply(hidden, head_weight, targets, lengths, losses_of, chunks, compiled)


class FusedHead(torch.autograd.Function):
    """Computes the head's forward and backward pass in one pass over the tokens.

    Let u = W h be the logits that predict a token y, p = softmax(u), s the sum of log p_y over an
    answer, and g = dL/ds the gradient with respect to this sum. For each token of the answer
        dL/du = g ds/du = -g (p - onehot(y))
        dL/dh = -g W^T (p - onehot(y))
        dL/dW = sum over tokens of -(p - onehot(y)) (g h)^T.
    The loss of a pair depends only on the two sums of the pair (given the shared scalar), so g is
    known as soon as a chunk of complete pairs has been projected. The logits of the chunk then turn
    into p - onehot(y) in place, g multiplies matrices of width D rather than V, and the next
    chunk reuses the buffer. This costs three matrix products per token; a head that recomputes its
    logits in the backward pass needs four."""

    @staticmethod
    def forward(ctx, hidden, head_weight, targets, lengths, losses_of, chunks, compiled):
        need_hidden, need_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        accumulator = torch.promote_types(head_weight.dtype, torch.float32)
        grad_head = torch.empty_like(head_weight, dtype=accumulator) if need_head else None
        largest = max(tokens.stop - tokens.start for _, tokens in chunks)
        weight = in_product_precision(head_weight, hidden)
        buffer = weight.new_empty(largest, len(weight))  # the logits of a chunk
        answer_of_token, results = _answer_of_token(lengths, targets), []
        for answers, tokens in chunks:
            states, y = hidden[tokens], targets[tokens]  # (t, D), (t,)
            logits = torch.mm(states.to(weight.dtype), weight.T, out=buffer[: len(y)])  # (t, V)
            residual, token_logps = logits, _to_residual(logits, y, compiled)  # (t, V), (t,)
            answer = answer_of_token[tokens] - answers.start  # (t,), counted within the chunk
            sums = _sum_by_answer(token_logps, answer, answers.stop - answers.start)  # (2b,)
            with torch.enable_grad():
                sums.requires_grad_(True)
                loss = losses_of(sums, answers)  # (b,)
                (g,) = torch.autograd.grad(loss.sum(), sums)  # (2b,)
            results.append((loss.detach(), sums.detach()))
            minus_g = -g[answer, None]  # (t, 1)
            if need_hidden:
                grad_hidden[tokens] = minus_g * (residual @ weight)
            if need_head:
                _add_product(grad_head, residual, minus_g * states, overwrite=tokens.start == 0)
        ctx.save_for_backward(grad_hidden, grad_head)
        losses, logps = map(torch.cat, zip(*results))  # (B,), (2B,)
        ctx.mark_non_differentiable(logps)
        return losses, logps

    @staticmethod
    def backward(ctx, grad_losses, _):
        gradients = ctx.saved_tensors  # of hidden and head_weight; None if not needed
        # forward() has summed gradients over chunks, so all pairs must share one upstream gradient.
        first = grad_losses[:1].sum()  # 0 if there are no pairs
        factor = torch.where((grad_losses == first).all(), first, torch.nan)
        if factor.is_cuda or factor != 1:  # losses.sum() on a CPU needs no copy of (V, D)
            gradients = [None if g is None else g * factor.to(g.dtype) for g in gradients]
        return *gradients, *[None] * 5  # autograd converts each gradient to its input's dtype


def _to_residual(logits: Tensor, targets: Tensor, compiled: bool) -> Tensor:
    """Turns logits (t, V) into softmax minus one-hot in place; returns token log-probs (t,)."""
    # A CPU processes a few rows at a time, so that the logits stay in its cache.
    rows = len(logits) if logits.is_cuda else 1 + 2**20 // logits.shape[1]
    of_rows = _compiled_residual_of_rows() if compiled else _residual_of_rows
    return torch.cat([*map(of_rows, logits.split(rows), targets.split(rows))])


def _residual_of_rows(logits: Tensor, targets: Tensor) -> Tensor:
    # In a long answer, the errors of a bfloat16 log-softmax can add up to a nat, so p is float32.
    p = logits.to(torch.promote_types(logits.dtype, torch.float32))
    torch.log_softmax(p, dim=-1, out=p)
    token_logps = p.gather(1, targets[:, None])[:, 0]
    p.exp_().scatter_add_(1, targets[:, None], p.new_full((len(p), 1), -1.0))
    logits.copy_(p)
    return token_logps


@functools.cache
def _compiled_residual_of_rows() -> Callable:
    return torch.compile(_residual_of_rows, dynamic=True)  # the compiler's import takes seconds


def _add_product(total: Tensor, residual: Tensor, weighted: Tensor, overwrite: bool) -> None:
    """Adds residual (t, V), transposed, times weighted (t, D) to total (V, D), or replaces total if
    `overwrite`. To save memory, a product of lower precision than total is added in slices of V."""
    weighted = weighted.to(residual.dtype)
    if total.dtype == residual.dtype:
        total.addmm_(residual.T, weighted, beta=0 if overwrite else 1)
        return
    for part, columns in zip(total.split(2**14), residual.split(2**14, dim=1)):
        product = columns.T @ weighted
        part.copy_(product) if overwrite else part.add_(product)


def _answer_of_token(lengths: Tensor, targets: Tensor) -> Tensor:
    """Returns the number of the answer that each target belongs to: lengths (S,) -> (N,)."""
    return torch.repeat_interleave(lengths, output_size=len(targets))  # a given size needs no wait


def _sum_by_answer(values: Tensor, answer_of_token: Tensor, count: int) -> Tensor:
    """values (N,), answer_of_token (N,) -> sums (count,), accumulated in float64."""
    sums = torch.zeros(count, dtype=torch.float64, device=values.device)
    return sums.index_add_(0, answer_of_token, values.double()).to(values.dtype)


def chunks_of_pairs(lengths: list[int], chunk_tokens: int) -> Iterator[tuple[slice, slice]]:
    """Yields chunks as (slice of answers, slice of tokens). A chunk holds complete pairs with at
    most `chunk_tokens` tokens, or a single longer pair."""
    first = start = end = 0
    for answer in range(0, len(lengths), 2):
        size = lengths[answer] + lengths[answer + 1]
        if end > start and end + size - start > chunk_tokens:
            yield slice(first, answer), slice(start, end)
            first, start = answer, end
        end += size
    yield slice(first, len(lengths)), slice(start, end)
