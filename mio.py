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
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# --- Losses: (B,) in, (B,) out -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PairTerms:
    """What a loss may be made of; every tensor is (B,)."""

    chosen_logps: Tensor  # sums over the answer's tokens, its end token included
    rejected_logps: Tensor
    chosen_mean_logps: Tensor | None  # by token; None where no lengths were given
    rejected_mean_logps: Tensor | None
    chosen_rewards: Tensor | None  # beta * log-ratio; None where there is no reference
    rejected_rewards: Tensor | None
    beta: float


def dpo(pair: PairTerms) -> Tensor:
    # -log sigma(T_w - T_l)
    return F.softplus(pair.rejected_rewards - pair.chosen_rewards)


def mio(pair: PairTerms) -> Tensor:
    # sp(-T_w) + sp(T_w) / 2 + sp(T_l) / 2: positives against the half-and-half mixture
    positive = F.softplus(-pair.chosen_rewards)
    return positive + (F.softplus(pair.chosen_rewards) + F.softplus(pair.rejected_rewards)) / 2


def bce(pair: PairTerms) -> Tensor:
    # sp(-T_w) + sp(T_l): positives against the rejected alone, the other reading of the paper
    return F.softplus(-pair.chosen_rewards) + F.softplus(pair.rejected_rewards)


def sft(pair: PairTerms) -> Tensor:
    # -s_w / n_w: supervised fine-tuning on the chosen answer
    return -pair.chosen_mean_logps


@dataclasses.dataclass(frozen=True)
class Loss:
    """The declaration of a loss."""

    function: Callable[[PairTerms], Tensor]
    needs_reference: bool
    uses: str  # "sums" or "means" over an answer's tokens
    pairwise: bool  # False: a loss of the whole batch that does not split into pairs
    answers: str  # "both" or only the "chosen" must be there
    beta: float  # the default; dpo's is half of mio's, which gives equal gradients at step 0
    start: float | None  # its value while policy and reference agree; None where it depends
    formula: str
    source: str


LOSSES: dict[str, Loss] = {
    "dpo": Loss(
        dpo, True, "sums", True, "both", 0.1, math.log(2), "sp(T_l - T_w)",
        "arXiv 2305.18290, eq. 7",
    ),
    "mio": Loss(
        mio, True, "sums", True, "both", 0.2, math.log(4), "sp(-T_w) + sp(T_w)/2 + sp(T_l)/2",
        "arXiv 2506.22578; as a function NCA's pair loss, 2402.05369",
    ),
    "bce": Loss(
        bce, True, "sums", True, "both", 0.1, math.log(4), "sp(-T_w) + sp(T_l)",
        "the Jensen-Shannon bound with the rejected alone as marginal",
    ),
    "sft": Loss(
        sft, False, "means", True, "chosen", 0.1, None, "-s_w / n_w",
        "maximum likelihood of the chosen",
    ),
}  # fmt: skip


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
    function. Returns (B,). Raises KeyError for an unknown name.
    """
    loss = LOSSES[name]
    chosen_rewards = rejected_rewards = chosen_mean_logps = rejected_mean_logps = None
    if loss.needs_reference:
        chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
        rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    if chosen_lengths is not None and rejected_lengths is not None:
        chosen_mean_logps = chosen_logps / chosen_lengths.clamp(min=1)
        rejected_mean_logps = rejected_logps / rejected_lengths.clamp(min=1)
    terms = PairTerms(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        chosen_mean_logps=chosen_mean_logps,
        rejected_mean_logps=rejected_mean_logps,
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        beta=beta,
    )
    return loss.function(terms, **options)


# --- The head: hidden states of the answers' tokens, laid end to end, to losses ------------------
# Completions come in the order chosen_0, rejected_0, chosen_1, rejected_1, ...: hidden (N, D) holds
# the state that predicts each of their tokens, targets (N,) the tokens, lengths (2B,) the counts.


def naive_logps(hidden: Tensor, head_weight: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
    """The oracle: all logits at once. hidden (N, D), head_weight (V, D), targets (N,), lengths (S,)
    -> summed log-probability of each completion (S,), in nats, differentiable."""
    logits = at_least_float32(hidden @ head_weight.T)  # (N, V)
    token_logps = logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]  # (N,)
    return torch.stack([part.sum() for part in token_logps.split(lengths.tolist())])


@torch.no_grad()
def chunked_logps(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, lengths: Tensor,
    chunk_tokens: int = 1024, compiled: bool = False,
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
    chunk_tokens: int = 1024,
    compiled: bool = False,
    **options,
) -> tuple[Tensor, Tensor]:
    """Loss of each pair (B,) and log-probability of each completion (2B,), logits never kept.

    hidden (N, D), head_weight (V, D), targets (N,), lengths (2B,), ref_logps (2B,) or None.
    Differentiable in hidden and head_weight through losses.mean() or losses.sum(), that is with
    one gradient for all losses; anything else gives NaN gradients. The log-probs are detached.
    """
    assert LOSSES[name].pairwise, f"{name} is a loss of the whole batch"
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
    A pairwise loss needs only the two sums of its own pair, so w is known as soon as a chunk of
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
        chunks = list(_chunks_of_pairs(lengths.tolist(), chunk_tokens))
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
        factor = torch.where((grad_losses == grad_losses[0]).all(), grad_losses[0], torch.nan)
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


def _chunks_of_pairs(lengths: list[int], chunk_tokens: int):
    """Yields (slice of completions, slice of tokens): whole pairs, about `chunk_tokens` tokens."""
    first = start = end = 0
    for pair in range(0, len(lengths), 2):
        size = lengths[pair] + lengths[pair + 1]
        if end > start and end + size - start > chunk_tokens:
            yield slice(first, pair), slice(start, end)
            first, start = pair, end
        end += size
    yield slice(first, len(lengths)), slice(start, end)
