"""Supports one process, or several under torchrun with FSDP2. Imports data.py and model.py."""

import contextlib
import datetime
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm

from data import Batch, Pairs, make_batches, row_length
from model import Llama
from support.lora import add_lora, lora_of


class World:
    """A single process: there is nothing to gather from other processes, to shard or to check."""

    rank, count, first = 0, 1, True
    gather = staticmethod(torch.cat)  # joins the rows of all parts, and of all processes
    batches = staticmethod(make_batches)
    total_norm = staticmethod(get_total_norm)
    place = staticmethod(lambda moment, parameter: moment.to(parameter.device))
    sum = gather_state = gather_model = staticmethod(lambda value: value)
    check = shard = reshard = staticmethod(lambda *arguments: None)


class Processes(World):
    """One of torchrun's processes. All processes must call each method that communicates."""

    def __init__(self):
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.first = self.rank == 0  # the first process prints and writes files

    def check(self, init: str | None, batch_size: int, on_policy: bool) -> None:
        """Raises ValueError for options that do not allow this number of processes."""
        if on_policy or not init:
            raise ValueError("the demonstration, --on_policy and rlhf run only without torchrun")
        if batch_size < self.count:
            raise ValueError(f"--batch_size must be at least {self.count}, the number of processes")

    def sum(self, tensor: Tensor) -> Tensor:
        """Replaces the tensor of each process by the sum of the tensors of all processes."""
        dist.all_reduce(tensor)
        return tensor

    def gather(self, parts: list[Tensor]) -> Tensor:
        """Concatenates the rows of the parts (n, ...) of all processes, in the order of the
        processes. Every process receives all rows; the parts may have different n."""
        rows, counts = torch.cat(parts), torch.zeros(self.count, dtype=torch.long)
        counts[self.rank] = len(rows)
        counts = self.sum(counts).tolist()
        gathered = rows.new_zeros(sum(counts), *rows.shape[1:])
        gathered.split(counts)[self.rank].copy_(rows)
        return self.sum(gathered)

    def batches(self, pairs: Pairs, index: list[int], *layout) -> list[Batch]:
        """Packs this process's share of `index` by make_batches; adds empty batches if needed."""
        index = sorted(index, key=lambda i: row_length(pairs[i]))  # balances the lengths
        batches = make_batches(pairs, index[self.rank :: self.count], *layout)
        # Every pass involves all processes, so processes with fewer batches run empty batches.
        most = int(self.gather([torch.tensor([len(batches)])]).max())
        (batch,), none = make_batches(pairs, index[:1], *layout), torch.zeros(0, dtype=torch.long)
        empty = batch._replace(source=none, targets=none, lengths=none, index=[])
        return batches + [empty] * (most - len(batches))

    def shard(self, model: Llama, dtype: torch.dtype, device: str) -> None:
        """Shards every parameter over the processes, each of which has a device of this type."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = dist.init_device_mesh(torch.device(device).type, (self.count,))
        for module in (*model.model["layers"], model):
            # Blocks are sent in bfloat16; the residual stream and the head keep their precision.
            sent = torch.bfloat16 if dtype == torch.bfloat16 and module is not model else None
            policy = MixedPrecisionPolicy(sent, torch.float32, cast_forward_inputs=False)
            fully_shard(module, mesh=mesh, mp_policy=policy)
            module.set_force_sum_reduction_for_comms(True)  # gradients are sums over the pairs
            module.set_gradient_divide_factor(1.0)

    def reshard(self, model: Llama) -> None:
        """Frees gathered parameters after forward passes that no backward pass follows."""
        model.reshard()

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        """Returns the 2-norm () of all gradients together."""
        return get_total_norm(gradients).full_tensor()

    def place(self, moment: Tensor, parameter: Tensor) -> Tensor:
        """Shards a moment of AdamW like its parameter. Every process must hold all of `moment`."""
        from torch.distributed.tensor import distribute_tensor

        moment, mesh = moment.to(parameter.device), parameter.device_mesh
        if moment.dim() == 0:
            return moment  # the count of steps is not sharded
        return distribute_tensor(moment, mesh, parameter.placements, src_data_rank=None)

    def gather_state(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gathers sharded tensors on the CPU of the first process; other processes receive {}."""
        gathered = ((name, getattr(x, "full_tensor", x.cpu)()) for name, x in tensors.items())
        return {name: tensor.cpu() for name, tensor in gathered if self.first}

    def gather_model(self, model: Llama) -> Llama:
        """Gathers the model on the CPU of the first process; other processes receive no weights."""
        with torch.device("meta"):
            gathered = Llama(model.config)
            if lora := lora_of(model):
                add_lora(gathered, lora)
        state = self.gather_state(model.state_dict())
        gathered.load_state_dict(state, strict=self.first, assign=True)
        return gathered


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
