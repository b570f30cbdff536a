"""Weights that are stored in bfloat16: matrix products, stochastic rounding and AdamW.

A bfloat16 has 8 significant bits, so its neighbors differ from it by 0.4 to 0.8 percent. Rounding
to the nearest number would undo most updates of a small learning rate. Stochastic rounding picks
the upper or the lower neighbor such that the expected result is the exact value, so that small
updates move a weight on average (Gupta et al., arXiv 1502.02551)."""

import functools
import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
EAGER_CHUNK = 2**17  # elements that are updated at a time without torch.compile


def in_product_precision(weight: Tensor, x: Tensor) -> Tensor:
    """Returns a weight in the dtype of its products with x: that of autocast, else that of x."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    return weight.to(torch.get_autocast_dtype(device) if autocast else x.dtype)


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """Rounds float32 values (n,) to bfloat16, with the lower 16 of the random bits (n,), int32. A
    bfloat16 is the upper half of a float32. Adding random bits to the lower half carries into the
    upper half with the probability that stochastic rounding needs. Infinity and NaN stay."""
    carried = values.view(torch.int32) + (bits & 0xFFFF)  # (n,)
    rounded = (carried & ~0xFFFF).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def random_bits(start: int, count: int, key: Tensor, counter: Tensor) -> Tensor:
    """Returns 32 random bits for each of the elements start, start + 1, ...: (count,) int32. They
    depend only on the number of the element, the key (2,) and the counter (), all int32."""
    element = torch.arange(start, start + count, dtype=torch.int32, device=key.device)
    return _mix(_mix(element ^ key[0]) ^ _mix(counter + key[1]))


def _mix(x: Tensor) -> Tensor:
    """Maps 32-bit integers one to one; each output bit depends on all input bits. This is the hash
    lowbias32 of Wellons' hash-prospector. The masks are needed because int32 shifts keep signs."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975  # 0x846CA68B as a signed number
    return x ^ ((x >> 16) & 0xFFFF)


def adamw(weight, grad, mean, square, step, lr, decay) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the weight, the mean and the mean square of its gradient after an AdamW step (arXiv
    1711.05101). Tensors are float32 (n,); step, lr and decay, 1 - lr * weight_decay, are ()."""
    mean = mean + (1 - BETA1) * (grad - mean)
    square = square + (1 - BETA2) * (grad * grad - square)
    bias1, bias2 = (-(step * math.log(beta)).expm1() for beta in (BETA1, BETA2))  # 1 - beta^step
    return decay * weight - lr * (mean / bias1) / ((square / bias2).sqrt() + EPSILON), mean, square


def _update(weight, grad, mean, square, start, key, step, lr, decay, grad_scale, skip) -> None:
    """Updates weight, mean and square in place, unless `skip` is 1. They and grad are bfloat16 (n,)
    and begin with element `start` of their parameter."""
    bits, old = random_bits(start, len(weight), key, step.int()), (weight, mean, square)
    w, m, v = (x.float() for x in old)
    new = adamw(w, grad.float() / grad_scale, m, v, step, lr, decay)
    for x, exact, noise in zip(old, new, (bits, bits >> 16, _mix(bits))):
        x.copy_(torch.where(skip > 0, x, round_stochastically(exact, noise)))


def _add(total: Tensor, grad: Tensor, start: int, key: Tensor, counter: Tensor) -> None:
    """Adds grad (n,) to total (n,), both bfloat16, in place."""
    bits = random_bits(start, len(total), key, counter)
    total.copy_(round_stochastically(total.float() + grad.float(), bits))


@functools.cache
def _compiled(function):
    return torch.compile(function, dynamic=True)  # one kernel; the same code for all sizes


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW for bfloat16 parameters. Its attributes grad_scale and found_inf mean the same as those
    of torch's fused AdamW. Updates are computed in float32 and rounded stochastically. If several
    backward passes precede a step, the sums of their gradients are rounded stochastically, too.

    The random numbers depend only on the seed, the step, the number of the backward pass, the
    number of the parameter and the element, so a resumed run continues exactly."""

    def __init__(self, params: Iterable, lr: float, weight_decay: float, seed: int, compiled: bool):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        parameters = [p for group in self.param_groups for p in group["params"]]
        device = parameters[0].device
        self.grad_scale = torch.ones((), device=device)
        self.found_inf = torch.zeros((), device=device)
        self.compiled, self.keys, self.passes = compiled, {}, {}
        for number, p in enumerate(parameters):
            self.state[p] = {"step": torch.zeros((), device=device)}
            self.state[p] |= {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            keys = np.random.default_rng([seed, number]).integers(-(2**31), 2**31, size=(2, 2))
            self.keys[p] = torch.tensor(keys, dtype=torch.int32, device=device)  # update, sums
            p.register_hook(functools.partial(self._accumulate, p))

    def _accumulate(self, p: Tensor, grad: Tensor) -> Tensor:
        """Returns the gradient of a backward pass plus those before it. Autograd stores the result
        in p.grad, and would round a sum of its own to the nearest number."""
        total, p.grad = p.grad, None
        self.passes[p] = 0 if total is None else self.passes[p] + 1
        if total is None:
            return grad
        counter = self.state[p]["step"].int() * 4096 + self.passes[p]
        self._run(_add, (total, grad), self.keys[p][1], counter)
        return total

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr = torch.full_like(self.grad_scale, group["lr"])  # copies nothing from the CPU
            decay = 1 - lr * group["weight_decay"]
            for p in (p for p in group["params"] if p.grad is not None):
                step, *moments = self.state[p].values()
                step += 1 - self.found_inf
                scalars = step, lr, decay, self.grad_scale, self.found_inf
                self._run(_update, (p, p.grad, *moments), self.keys[p][0], *scalars)

    def _run(self, function, tensors: tuple, key: Tensor, *scalars) -> None:
        """Calls a function on the elements of tensors (...): on all at once if it is compiled, else
        in chunks (n,), which bound the memory of intermediate results."""
        size = tensors[0].numel() if self.compiled else EAGER_CHUNK
        function = _compiled(function) if self.compiled else function
        for number, parts in enumerate(zip(*(x.reshape(-1).split(size) for x in tensors))):
            function(*parts, number * size, key, *scalars)
