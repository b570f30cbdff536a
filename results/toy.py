"""Trains a softmax over 20 answers on one pair by gradient descent: python results/toy.py"""

import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from page import LOOKS, fill, markdown
from torch import Tensor

from mio import pair_loss

ANSWERS, FEATURES, DRAWS, STEPS, RATE = 20, 8, 100, 4000, 0.1
LOSSES, BETAS, RARE = ["dpo", "mio", "bce", "nwj"], [0.1, 0.5, 2.0], [10.0**-n for n in range(1, 7)]
FALLS = np.linspace(0, 12, 49)  # nats by which the rejected log-prob has fallen


def descend(logits, weights: Tensor, loss: str, betas: Tensor) -> np.ndarray:
    """Minimizes the loss of a pair, answers 0 and 1, from weights (R, P) with a beta for each of R
    trials; logits(weights) is (R, answers). A step is RATE / beta times the gradient, so all betas
    start equally fast. Returns (STEPS + 1, R, 2): changes of both log-probs, in nats."""
    path = []
    for _ in range(STEPS + 1):
        weights = weights.detach().requires_grad_()
        logps = logits(weights).log_softmax(dim=1)[:, :2]  # (R, 2)
        path.append(logps.detach())
        sums = *logps.unbind(1), *path[0].unbind(1)
        (gradient,) = torch.autograd.grad(pair_loss(loss, *sums, beta=betas).sum(), weights)
        weights = weights - RATE / betas[:, None] * gradient
    return (torch.stack(path) - path[0]).numpy()


def shared_features() -> dict[tuple[str, float], np.ndarray]:
    """Returns paths (STEPS + 1, DRAWS, 2) by loss and beta. Logits are the base's plus features
    times weights. Features of chosen and rejected correlate by 0.9, others are independent."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(DRAWS, ANSWERS, FEATURES, generator=generator, dtype=torch.float64)
    features[:, 1] = 0.9 * features[:, 0] + (1 - 0.9**2) ** 0.5 * features[:, 1]
    base = torch.randn(DRAWS, ANSWERS, generator=generator, dtype=torch.float64)
    features, base = features.repeat(len(BETAS), 1, 1), base.repeat(len(BETAS), 1)  # (R, ...)
    betas = torch.tensor(BETAS, dtype=torch.float64).repeat_interleave(DRAWS)  # (R,)
    found = {}
    for loss in LOSSES:
        logits = lambda weights: base + (features @ weights[:, :, None])[:, :, 0]  # noqa: E731
        path = descend(logits, torch.zeros_like(features[:, 0]), loss, betas)
        found |= {(loss, beta): x for beta, x in zip(BETAS, np.split(path, len(BETAS), axis=1))}
    return found


def chosen_at(path: np.ndarray, falls: np.ndarray) -> np.ndarray:
    """Returns (falls, draws): the change of the chosen log-prob when the rejected first has fallen
    by so many nats, or NaN where it never has."""
    fallen = np.maximum.accumulate(-path[:, :, 1], axis=0)  # (STEPS + 1, draws)
    found = [np.interp(falls, f, c, right=np.nan) for f, c in zip(fallen.T, path[:, :, 0].T)]
    return np.array(found).T


def free_logits(loss: str, beta: float) -> np.ndarray:
    """Returns (RARE,): the rise of a chosen answer of each probability, with a weight for each
    answer. The rejected answer has probability 1/2; 18 others share the rest."""
    chosen = torch.tensor(RARE, dtype=torch.float64)[:, None]
    rest = ((0.5 - chosen) / (ANSWERS - 2)).expand(-1, ANSWERS - 2)
    start = torch.cat((chosen, torch.full_like(chosen, 0.5), rest), dim=1).log()
    return descend(lambda weights: weights, start, loss, torch.full_like(chosen[:, 0], beta))[
        -1, :, 0
    ]


def policy_gradient(beta: float, draws: int | None) -> np.ndarray:
    """Returns (RARE,): the rise of an answer with reward 1, all others 0, under the gradient of
    reward minus beta KL: exact (draws None), or with so many draws a step and RLOO's baseline, in
    the mean of DRAWS trials."""
    chosen = torch.tensor(RARE, dtype=torch.float64).repeat_interleave(DRAWS if draws else 1)
    base = torch.stack((chosen, 1 - chosen), dim=1).log()  # (trials, 2): the others act as one
    reward, generator = torch.tensor([1.0, 0.0]), torch.Generator().manual_seed(0)
    logits = base.clone()
    for _ in range(STEPS):
        logps = logits.log_softmax(dim=1)
        returns = reward - beta * (logps - base)  # (trials, 2)
        shares = logps.exp()
        if draws:
            ids = torch.multinomial(shares, draws, replacement=True, generator=generator)
            drawn = returns.gather(1, ids)
            drawn = (drawn - drawn.mean(1, keepdim=True)) / (draws - 1)  # leave-one-out baseline
            gradient = torch.zeros_like(logits).scatter_add_(1, ids, drawn)
        else:
            gradient = shares * (returns - (shares * returns).sum(1, keepdim=True))
        logits = logits + RATE / beta * gradient
    return (logits.log_softmax(1) - base)[:, 0].view(len(RARE), -1).mean(1).numpy()


def optimum(beta: float) -> np.ndarray:
    """Returns (RARE,): the rise at the maximum of reward minus beta KL, base * e^(r / beta)."""
    return np.array([1 / beta - np.logaddexp(np.log1p(-p), np.log(p) + 1 / beta) for p in RARE])


def gradients() -> list[list[str]]:
    """Returns rows: the derivatives of dpo and mio with respect to the two probabilities, and to
    the logits of a softmax, where the projection onto the simplex cancels 1 / probability."""
    rows = []
    for fall in (0.0, 3.0):
        for loss in ("dpo", "mio"):
            for chosen in (1e-1, 1e-4):
                p = torch.tensor([chosen, 0.5], dtype=torch.float64, requires_grad=True)
                start = p.detach().log() + fall
                value = pair_loss(loss, *p.log()[:, None], *start[:, None], beta=1.0).sum()
                (slope,) = torch.autograd.grad(value, p)
                in_logits = p.detach() * (slope - (slope * p.detach()).sum())
                cells = [f"{x:+.3g}" for x in (*slope.tolist(), *in_logits.tolist())]
                rows.append([loss, f"{fall:g}", f"{chosen:g}", *cells])
    return rows


def draw(left, right, paths: dict, rises: dict[str, np.ndarray]) -> None:
    """Draws paths with shared features, in the median of the draws that reach a fall and as far as
    half of the draws reach it, and the rise of a rare chosen answer."""
    lines = {"dpo, every beta": ("dpo", 0.1, "-")}  # dpo has one path for all betas
    lines |= {f"mio, beta {b:g}": ("mio", b, style) for b, style in zip(BETAS, (":", "--", "-"))}
    for name, (loss, beta, style) in lines.items():
        chosen = chosen_at(paths[loss, beta], FALLS)  # (falls, draws)
        kept = (~np.isnan(chosen)).mean(axis=1) >= 0.5
        y, (color, marker) = np.nanmedian(chosen[kept], axis=1), LOOKS[loss]
        left.plot(FALLS[kept], y, style, marker=marker, markevery=8, color=color, label=name)
    for (name, rise), style in zip(rises.items(), ("-", "-", "-", "-", "-", "--", ":")):
        color, marker = LOOKS[name.partition(",")[0]]
        right.plot(RARE, rise, style, marker=marker, color=color, label=name)
    left.set(
        xlabel="fall of the rejected log-prob, nats", title="toy: answers with shared features"
    )
    left.set_ylabel("change of the chosen log-prob, nats")
    right.set(xscale="log", xlabel="probability of the chosen answer before training")
    right.set(
        ylabel="rise of the chosen log-prob, nats", title="toy: a rare chosen answer, beta 0.1"
    )
    for axis in (left, right):
        axis.axhline(0, color="0.4", lw=0.8, zorder=0)
        axis.legend(frameon=False, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)


def rare(beta: float) -> dict[str, np.ndarray]:
    """Returns the rises of a chosen answer, (RARE,) each."""
    found = {loss: free_logits(loss, beta) for loss in LOSSES} | {"rlhf, optimum": optimum(beta)}
    found |= {"rlhf, exact gradient": policy_gradient(beta, None)}
    return found | {"rlhf, 8 draws a step": policy_gradient(beta, 8)}


def main() -> None:
    start, page = time.monotonic(), Path(__file__)
    paths, rises, rows = shared_features(), {beta: rare(beta) for beta in (0.1, 1.0)}, []
    for (loss, beta), path in paths.items():
        cells = [f"{x:+.2f}" for x in np.median(path[-1], axis=0)]
        cells += [f"{(path[-1, :, 0] < -1).mean():.0%}"]
        for chosen in chosen_at(path, np.array([2, 8])):
            reached = chosen[~np.isnan(chosen)]
            cells += [f"{np.median(reached):+.2f} ({len(reached)})" if len(reached) else "- (0)"]
        rows.append([loss, f"{beta:g}", *cells])
    head = "loss", "beta", "Δ chosen", "Δ rejected", "chosen fell by more than 1 nat"
    shared = markdown(*head, "Δ chosen at a fall of 2 nats", "at a fall of 8 nats", rows=rows)
    free = [[name, f"{beta:g}", *(f"{x:+.2f}" for x in rise)]
            for beta, found in rises.items() for name, rise in found.items()]  # fmt: skip
    head = "loss", "both fell by, nats", "π_w", "∂/∂π_w", "∂/∂π_l", "∂/∂logit_w", "∂/∂logit_l"
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    draw(*figure.subplots(1, 2), paths, rises[0.1])
    figure.savefig(page.with_suffix(".png"), dpi=150)
    fill(page.with_suffix(".md"), shared=shared, free=markdown("", "beta", *RARE, rows=free),
         gradients=markdown(*head, rows=gradients()),
         made=f"It takes {time.monotonic() - start:.0f} seconds.")  # fmt: skip


if __name__ == "__main__":
    main()
