"""The dictionaries of a run take a batch: one after another, or shared by threads.

On a CPU the dictionaries of a sweep are the better thing to do in parallel: parts of a step (the
sort by latent, the search for entries) run on one core, whatever the number of threads, and every
operation waits for its slowest thread. With `workers` threads each takes whole dictionaries and
``threads / workers`` cores, so a dictionary gets bit for bit what a run of its own gets with so
many threads.

One product for all encoders of equal input gains nothing: with 8 x 1,536 latents of 384 channels it
takes 0.97 of the time of eight products (oneDNN; 1.09 by the default backend), and 1.01 (1.17) with
the selection, which then reads rows that lie apart.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Float
from torch import Tensor

from dictlearn.dictionary import Dictionary
from dictlearn.kernels import StepResult
from dictlearn.learner import Learner


def pair_of(
    d: Dictionary, acts: Float[Tensor, "b _"], slices: Mapping[str, slice]
) -> tuple[Float[Tensor, "b r"], Float[Tensor, "b w"]]:
    """Input and target of one dictionary in a batch."""
    x_Br = d.gather(acts, slices).contiguous()
    same = list(d.config.reads) == list(d.config.writes)
    return x_Br, x_Br if same else d.gather(acts, slices, write=True).contiguous()


def check_workers(workers: int, device: torch.device, world: int) -> None:
    """Refuse threads where they cannot share the dictionaries."""
    if workers < 1:
        raise ValueError(f"workers must be >= 1, got {workers}")
    if workers > 1 and (device.type != "cpu" or world > 1):
        what = f"device {device}" if device.type != "cpu" else f"{world} ranks"
        raise ValueError(f"workers={workers} share the cores of one process on CPU, not {what}")


def threads_each(workers: int) -> int:
    """Threads of PyTorch that each of `workers` threads has."""
    return max(1, torch.get_num_threads() // workers)


class Team:
    """Learners over the same batches.

    Parameters
    ----------
    learners
        Those that failed or stopped are left out of every step.
    workers
        Threads that share them; 1 takes them one after another in the calling thread.
    """

    def __init__(self, learners: Sequence[Learner], workers: int = 1) -> None:
        self.learners = learners
        self._pool: ThreadPoolExecutor | None = None
        workers = min(workers, len(learners))
        if workers > 1:
            whole, share = torch.get_num_threads(), threads_each(workers)
            self._pool = ThreadPoolExecutor(
                workers, initializer=torch.set_num_threads, initargs=(share,)
            )
            # the number is each thread's own, but also what later threads begin with
            started = threading.Barrier(workers)
            list(self._pool.map(lambda _: started.wait(), range(workers)))
            torch.set_num_threads(whole)

    def step(
        self, acts: Float[Tensor, "b _"], slices: Mapping[str, slice], number: int
    ) -> dict[str, StepResult]:
        """Take optimiser step `number` with every learner; results by name, in their order."""
        active = [one for one in self.learners if not (one.failed or one.stopped)]

        def take(learner: Learner) -> StepResult:
            return learner.train_step(*pair_of(learner.dictionary, acts, slices), number)

        found = map(take, active) if self._pool is None else self._pool.map(take, active)
        return {one.name: result for one, result in zip(active, found, strict=True)}

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
