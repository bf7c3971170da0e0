"""Data parallel training: every rank reads its own streams of the store, gradients are averaged.

A rank's loss is a mean over its rows and all ranks have equally many, so the mean of the ranks'
gradients is the gradient of the global batch. What decides the next step is made global too: which
latents fired, losses, and the threshold of BatchTopK. The batches depend on the number of canonical
streams (`TrainConfig.streams`), not on the number of ranks. Start with torchrun; the process group
is that of `torch.distributed`.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from dictlearn.kernels import StepResult

_SMALL = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes of a run; all operations do nothing when there is one."""

    rank: int = 0
    """Number of this process."""
    world: int = 1
    """Number of processes."""

    @classmethod
    def current(cls) -> Ranks:
        """Return the ranks of the initialised process group, or one process."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(rank=dist.get_rank(), world=dist.get_world_size())

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype by their mean over the ranks, in place.

        Small ones are sent together: a collective costs the wait for the slowest rank.
        """
        if self.world == 1:
            return
        small = [t for t in tensors if t.numel() <= _SMALL]
        if small:
            joined = torch.cat([t.reshape(-1) for t in small])
            dist.all_reduce(joined)
            for tensor, mean in zip(
                small, torch.split(joined, [t.numel() for t in small]), strict=True
            ):
                tensor.copy_((mean / self.world).view_as(tensor))
        for tensor in tensors:
            if tensor.numel() > _SMALL:
                dist.all_reduce(tensor)
                tensor.div_(self.world)

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def reduce(self, result: StepResult) -> None:
        """Make losses, error and firing counts those of the global batch."""
        if self.world == 1:
            return
        names = sorted(result.losses)
        values = torch.stack([result.losses[n].detach() for n in names] + [result.error.detach()])
        self.average([values])
        result.losses = {n: values[i] for i, n in enumerate(names)}
        result.error = values[-1]
        self.total(result.fired_F)

    def same(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def agree(self, value: Any, what: str) -> None:
        """Refuse to go on where this rank sees something else than rank 0.

        Raises
        ------
        ValueError
            On the ranks that differ.
        """
        if (first := self.same(value)) != value:
            raise ValueError(
                f"rank {self.rank} finds {value!r} as {what}, rank 0 finds {first!r}: the folder "
                "of a run must be on a file system that all ranks see"
            )

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors by those of rank 0."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def gather(self, values_N: Float[Tensor, " n"]) -> Float[Tensor, " m"]:
        """Concatenate vectors of different lengths over the ranks."""
        if self.world == 1:
            return values_N
        length = torch.tensor([values_N.numel()], device=values_N.device)
        lengths = [torch.zeros_like(length) for _ in range(self.world)]
        dist.all_gather(lengths, length)
        longest = int(max(int(n) for n in lengths))
        padded = values_N.new_zeros(longest)
        padded[: values_N.numel()] = values_N
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.cat([p[: int(n)] for p, n in zip(parts, lengths, strict=True)])

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world > 1:
            dist.barrier()


def start_from_environment(device: str) -> bool:
    """Join the process group torchrun describes, left at exit; returns whether there is one.

    On CUDA, ``cuda`` then means the device of the local rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        return False
    on_cuda = device.startswith("cuda")
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("nccl" if on_cuda else "gloo")
    atexit.register(_leave)
    return True


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
