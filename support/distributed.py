"""Supports one process, or several under torchrun, each of which holds the whole model."""

import contextlib
import datetime
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor


class World:
    """A single process: there is nothing to gather from other processes or to sum over them."""

    rank, count, first = 0, 1, True
    gather = staticmethod(torch.cat)  # joins the rows of all parts, and of all processes
    sum_gradients = staticmethod(lambda params: [p.grad for p in params if p.grad is not None])


class Processes(World):
    """One of torchrun's processes. All processes must call each method that communicates."""

    def __init__(self):
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.first = self.rank == 0  # the first process prints and writes files

    def sum_gradients(self, params) -> list[Tensor]:
        """Replaces each gradient by its sum over all processes, and returns the gradients."""
        trained = [p for p in params if p.requires_grad]
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # no batch, no gradient
            dist.all_reduce(p.grad)
        return [p.grad for p in trained]

    def gather(self, parts: list[Tensor]) -> Tensor:
        """Concatenates the parts (n, ...) of all processes, by their rank, on the CPU."""
        gathered = [None] * self.count
        dist.all_gather_object(gathered, [part.cpu() for part in parts])
        return torch.cat([part for parts in gathered for part in parts])


@contextlib.contextmanager
def join():
    """Yields the World of this process. Under torchrun, only the first process prints. A process
    that fails exits at once, and torchrun then stops the other processes."""
    if not dist.is_torchelastic_launched():
        yield World()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(timeout=datetime.timedelta(minutes=30))  # writing a checkpoint is slow
    world = Processes()
    with open(os.devnull, "w") as devnull:
        out, err = (sys.stdout, sys.stderr) if world.first else (devnull, devnull)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield world
    dist.destroy_process_group()
