"""A softmax over 20 answers, trained on one pair by plain gradient descent: python results/toy.py"""

import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from page import LOOKS, fill, interval
from torch import Tensor

from mio import pair_loss

ANSWERS, FEATURES, DRAWS, STEPS, RATE = 20, 8, 100, 4000, 0.1
LOSSES, BETAS, RARE = ["dpo", "mio", "bce", "nwj"], [0.1, 0.5, 2.0], [10.0**-n for n in range(1, 7)]
FALLS = np.linspace(0, 12, 49)  # nats by which the rejected log-prob has fallen
STYLES = dict(zip(BETAS, (":", "--", "-")))


def descend(logits, weights: Tensor, loss: str, beta: float) -> Tensor:
    """Minimizes the loss of a pair, answers 0 and 1, from weights (draws, P); logits(weights) is
    (draws, answers). The step is RATE / beta times the gradient, so that all betas start equally
    fast. Returns (STEPS + 1, draws, 2): changes of both log-probs from the start, in nats."""
    path = []
    for _ in range(STEPS + 1):
        weights = weights.detach().requires_grad_()
        logps = logits(weights).log_softmax(dim=1)[:, :2]  # (draws, 2)
        path.append(logps.detach())
        sums = *logps.unbind(1), *path[0].unbind(1)
        (gradient,) = torch.autograd.grad(pair_loss(loss, *sums, beta=beta).sum(), weights)
        weights = weights - RATE / beta * gradient
    return torch.stack(path) - path[0]


def shared_features() -> dict[tuple[str, float], np.ndarray]:
    """Returns paths by loss and beta: logits are features times weights plus the base's logits.
    The features of chosen and rejected have a correlation of 0.9; all others are independent."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(DRAWS, ANSWERS, FEATURES, generator=generator, dtype=torch.float64)
    features[:, 1] = 0.9 * features[:, 0] + (1 - 0.9**2) ** 0.5 * features[:, 1]
    base = torch.randn(DRAWS, ANSWERS, generator=generator, dtype=torch.float64)
    start = torch.zeros(DRAWS, FEATURES, dtype=torch.float64)
    logits = lambda weights: base + (features @ weights[:, :, None])[:, :, 0]  # noqa: E731
    return {(x, b): descend(logits, start, x, b).numpy() for x in LOSSES for b in BETAS}


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
    return descend(lambda weights: weights, start, loss, beta)[-1, :, 0].numpy()


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


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(paths: dict, rises: dict[str, np.ndarray], figure: Figure) -> None:
    """Draws both panels: paths with shared features, and the rise of a rare chosen answer."""
    left, right = figure.subplots(1, 2)
    for (loss, beta), path in paths.items():
        if loss not in ("dpo", "mio") or (loss == "dpo" and beta > BETAS[0]):
            continue  # dpo has one path for all betas
        chosen = chosen_at(path, FALLS)
        kept = (~np.isnan(chosen)).mean(axis=1) >= 0.5
        name = "dpo, every beta" if loss == "dpo" else f"mio, beta {beta:g}"
        style = "-" if loss == "dpo" else STYLES[beta]
        y = np.nanmedian(chosen[kept], axis=1)
        left.plot(FALLS[kept], y, style, color=LOOKS[loss][0], lw=2, label=name)
        left.plot(FALLS[kept][-1], y[-1], LOOKS[loss][1], color=LOOKS[loss][0])
    left.set(xlabel="fall of the rejected log-prob, nats", title="Answers with shared features")
    left.set_ylabel("change of the chosen log-prob, nats")
    for name, rise in rises.items():
        color, marker = LOOKS[name[:4].strip(",") if name[:4] in LOOKS else name[:3]]
        style = {"e": "--", "8": ":", "o": "-"}.get(name.partition(", ")[2][:1], "-")
        right.plot(RARE, rise, style, marker=marker, color=color, label=name)
    right.set(xscale="log", xlabel="probability of the chosen answer before training")
    right.set(ylabel="rise of the chosen log-prob, nats", title="A rare answer, beta 0.1")
    for axis in (left, right):
        axis.axhline(0, color="0.4", lw=0.8, zorder=0)
        axis.legend(frameon=False, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)


def measure() -> tuple[dict, dict]:
    """Returns the paths with shared features, and the rises by loss and beta."""
    rises = {}
    for beta in (0.1, 1.0):
        found = {loss: free_logits(loss, beta) for loss in LOSSES}
        found |= {
            "rlhf, optimum": optimum(beta),
            "rlhf, exact gradient": policy_gradient(beta, None),
        }
        rises[beta] = found | {"rlhf, 8 draws a step": policy_gradient(beta, 8)}
    return shared_features(), rises


if __name__ == "__main__":
    start = time.monotonic()
    paths, rises = measure()
    rows = []
    for (loss, beta), path in paths.items():
        last, at_two = path[-1], chosen_at(path, np.array([2.0]))[0]
        cells = [f"{x:+.2f}" for x in np.median(last, axis=0)] + [f"{(last[:, 0] < -1).mean():.0%}"]
        cells += [f"{np.nanmedian(at_two):+.2f}", f"{(~np.isnan(at_two)).mean():.0%}"]
        rows.append([loss, f"{beta:g}", *cells])
    gap = chosen_at(paths["mio", 0.5], FALLS[[8]]) - chosen_at(paths["dpo", 0.5], FALLS[[8]])
    shared = markdown(["loss", "beta", "Δ chosen", "Δ rejected", "chosen fell by more than 1 nat",
                       "Δ chosen at a fall of 2 nats", "draws that reach it"], rows)  # fmt: skip
    free = [[name, f"{beta:g}", *(f"{x:+.2f}" for x in rise)]
            for beta, found in rises.items() for name, rise in found.items()]  # fmt: skip
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    draw(paths, rises[0.1], figure)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)
    fill(Path(__file__).with_suffix(".md"), shared=shared,
         gap=interval(gap[~np.isnan(gap)]), free=markdown(["", "beta", *map(str, RARE)], free),
         gradients=markdown(["loss", "both fell by, nats", "π_w", "∂/∂π_w", "∂/∂π_l",
                             "∂/∂logit_w", "∂/∂logit_l"], gradients()),
         made=f"It took {time.monotonic() - start:.0f} seconds.")  # fmt: skip
