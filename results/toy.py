"""Trains a softmax over 20 answers on one pair by gradient descent: python results/toy.py"""

import time

import numpy as np
import page
import torch
from matplotlib.figure import Figure
from torch import Tensor

from mio import pair_loss

ANSWERS, FEATURES, DRAWS, STEPS, RATE = 20, 8, 100, 4000, 0.1
LOSSES, BETAS = ["dpo", "mio", "bce", "nwj"], [0.1, 0.5, 2.0]
RARE = [10.0**-n for n in range(1, 7)]  # probabilities of the chosen answer
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
        value = pair_loss(loss, *logps.unbind(1), *path[0].unbind(1), beta=betas).sum()
        weights = weights - RATE / betas[:, None] * torch.autograd.grad(value, weights)[0]
    return (torch.stack(path) - path[0]).numpy()


def shared_features(loss: str) -> list[np.ndarray]:
    """Returns a path (STEPS + 1, DRAWS, 2) for each beta. Logits are the base's plus features times
    weights. The features of chosen and rejected correlate by 0.9, the others are independent."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(DRAWS, ANSWERS, FEATURES, generator=generator, dtype=torch.float64)
    features[:, 1] = 0.9 * features[:, 0] + (1 - 0.9**2) ** 0.5 * features[:, 1]
    base = torch.randn(DRAWS, ANSWERS, generator=generator, dtype=torch.float64)
    features, base = features.repeat(len(BETAS), 1, 1), base.repeat(len(BETAS), 1)  # (R, ...)
    betas = torch.tensor(BETAS, dtype=torch.float64).repeat_interleave(DRAWS)  # (R,)
    logits = lambda weights: base + (features @ weights[:, :, None])[:, :, 0]  # noqa: E731
    path = descend(logits, torch.zeros_like(features[:, 0]), loss, betas)
    return np.split(path, len(BETAS), axis=1)


def chosen_at(path: np.ndarray, falls) -> np.ndarray:
    """Returns (falls, draws): the change of the chosen log-prob when the rejected first has fallen
    by so many nats, or NaN where it never has."""
    fallen = np.maximum.accumulate(-path[:, :, 1], axis=0)  # (STEPS + 1, draws)
    found = [np.interp(falls, f, c, right=np.nan) for f, c in zip(fallen.T, path[:, :, 0].T)]
    return np.array(found).T


def table_of_answers() -> Tensor:
    """Returns log-probs (RARE, ANSWERS): a chosen answer of each probability, a rejected one of
    probability 1/2, and others that share the rest."""
    chosen = torch.tensor(RARE, dtype=torch.float64)[:, None]
    rest = ((0.5 - chosen) / (ANSWERS - 2)).expand(-1, ANSWERS - 2)
    return torch.cat((chosen, torch.full_like(chosen, 0.5), rest), dim=1).log()


def free_logits(loss: str, beta: float) -> np.ndarray:
    """Returns (RARE,): the rise of a chosen answer, with a weight for each answer."""
    start = table_of_answers()
    betas = torch.full_like(start[:, 0], beta)
    return descend(lambda weights: weights, start, loss, betas)[-1, :, 0]


def policy_gradient(beta: float, draws: int | None) -> np.ndarray:
    """Returns (RARE,): the mean rise of an answer with reward 1 (others: 0) under the gradient of
    reward minus beta KL: exact, or of so many draws a step with a leave-one-out baseline."""
    base = table_of_answers().repeat_interleave(DRAWS if draws else 1, dim=0)  # (R, ANSWERS)
    reward, generator = torch.eye(ANSWERS)[0], torch.Generator().manual_seed(0)
    logits = base.clone()
    for _ in range(STEPS):
        logps = logits.log_softmax(dim=1)
        returns, shares = reward - beta * (logps - base), logps.exp()  # (R, ANSWERS)
        if draws:
            ids = torch.multinomial(shares, draws, replacement=True, generator=generator)
            drawn = returns.gather(1, ids)
            drawn = (drawn - drawn.mean(1, keepdim=True)) / (draws - 1)
            gradient = torch.zeros_like(logits).scatter_add_(1, ids, drawn)
        else:
            gradient = shares * (returns - (shares * returns).sum(1, keepdim=True))
        logits = logits + RATE / beta * gradient
    return (logits.log_softmax(1) - base)[:, 0].view(len(RARE), -1).mean(1).numpy()


def rises(beta: float) -> dict[str, np.ndarray]:
    """Returns the rise of a rare chosen answer (RARE,) under each method. The optimum of reward
    minus beta KL is base * e^(reward / beta), normalized."""
    p, found = np.array(RARE), {loss: free_logits(loss, beta) for loss in LOSSES}
    optimum = 1 / beta - np.logaddexp(np.log1p(-p), np.log(p) + 1 / beta)
    found |= {"rlhf, optimum": optimum, "rlhf, exact gradient": policy_gradient(beta, None)}
    return found | {"rlhf, 8 draws a step": policy_gradient(beta, 8)}


def gradients(loss: str, chosen: float, fall: float) -> list[str]:
    """Returns derivatives at beta 1, after both log-probs have fallen, with respect to the two
    probabilities and, projected onto the simplex, to the logits of a softmax."""
    start = torch.tensor([chosen, 0.5], dtype=torch.float64).log()
    p = (start - fall).exp().requires_grad_()
    value = pair_loss(loss, *p.log()[:, None], *start[:, None], beta=1.0).sum()
    (slope,) = torch.autograd.grad(value, p)
    in_logits = p.detach() * (slope - (slope * p.detach()).sum())
    return [loss, f"{fall:g}", f"{chosen:g}", *(f"{x:+.3g}" for x in (*slope, *in_logits))]


def draw(axis, paths: dict) -> None:
    """Draws medians over the draws that reach a fall, as far as half of the draws reach it."""
    curves = {"dpo, every beta": paths["dpo"][0]}  # dpo has one path for all betas
    curves |= {f"mio, beta {beta:g}": path for beta, path in zip(BETAS, paths["mio"])}
    for name, path in curves.items():
        chosen = chosen_at(path, FALLS)  # (falls, draws)
        kept = (~np.isnan(chosen)).mean(axis=1) >= 0.5
        curves[name] = FALLS[kept], np.nanmedian(chosen[kept], axis=1)[None]
    page.lines(axis, curves, every=8)
    axis.set(xlabel="fall of the rejected log-prob, nats", title="toy: answers share features")
    axis.set_ylabel("change of the chosen log-prob, nats")
    axis.legend(frameon=False)


if __name__ == "__main__":
    begin, paths = time.monotonic(), {loss: shared_features(loss) for loss in LOSSES}
    rows = []
    for loss in LOSSES:
        for beta, path in zip(BETAS, paths[loss]):
            last, cells = path[-1], []
            for chosen in chosen_at(path, [2, 8]):
                reached = chosen[~np.isnan(chosen)]
                cells += [f"{np.median(reached):+.2f} ({len(reached)})" if len(reached) else "-"]
            shares = [f"{(x < -1).mean():.0%}" for x in (last[:, 0], path[:, :, 0].min(axis=0))]
            moved = [f"{x:+.2f}" for x in np.median(last, axis=0)]
            rows.append([loss, beta, *moved, *shares, *cells])
    found = {beta: rises(beta) for beta in (0.1, 1.0)}
    free = [[name, beta, *(f"{x:+.2f}" for x in rise)]
            for beta, of_beta in found.items() for name, rise in of_beta.items()]  # fmt: skip
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw(left, paths)
    page.lines(right, {name: (RARE, rise[None]) for name, rise in found[0.1].items()})
    right.set(xscale="log", xlabel="probability of the chosen answer before training")
    right.set(ylabel="rise of the chosen log-prob, nats", title="toy: a rare answer, beta 0.1")
    right.legend(frameon=False)
    page.save(__file__, figure)
    head = ["loss", "beta", "Δ chosen", "Δ rejected", "chosen ends below -1 nat", "ever below"]
    head += ["Δ chosen at a fall of 2 nats", "at a fall of 8 nats"]
    slopes = [gradients(x, p, fall) for fall in (0, 3) for x in LOSSES[:2] for p in (1e-1, 1e-4)]
    columns = "both fell by, nats", "π_w", "∂/∂π_w", "∂/∂π_l", "∂/∂logit_w", "∂/∂logit_l"
    page.fill(__file__, shared=(head, rows), gradients=(["loss", *columns], slopes),
              free=(["", "beta", *map("{:g}".format, RARE)], free),
              made=f"It takes {time.monotonic() - begin:.0f} seconds.")  # fmt: skip
