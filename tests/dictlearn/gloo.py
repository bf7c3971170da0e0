"""The same training with 4, 2 and 1 processes joined by gloo, and the comparison of their runs."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dictlearn.formats import load
from dictlearn.runlog import read_log

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
Rows = list[dict[str, Any]]


def in_worlds(rank: int, out: str, run: Callable[[int], None]) -> None:
    """Call ``run(world)`` in 4 joined processes, then in the first 2 of them."""
    torch.set_num_threads(1)
    for world in (4, 2):
        if rank < world:
            init = f"file://{out}/rendezvous-{world}"
            dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
            run(world)
            dist.destroy_process_group()


def beside(
    work: Callable[..., None],
    arguments: Sequence[str],
    alone: Callable[[], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run ``work(rank, *arguments)`` in 4 processes, and ``alone()`` here at the same time."""
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dictlearn.trainer", "dictlearn.commands", "actstore.store"])
    processes = [context.Process(target=work, args=(rank, *arguments)) for rank in range(4)]
    for process in processes:
        process.start()
    alone()
    for process in processes:
        process.join(200)
        assert process.exitcode == 0


def same_weights(a: Path, b: Path, count: int) -> tuple[Rows, Rows]:
    """Check that two runs ended with the same `count` dictionaries; return their logs."""
    names = sorted(p.parent.name for p in a.glob("*/config.json"))
    assert len(names) == count
    for name in names:
        one, other = load(a / name).state_dict(), load(b / name).state_dict()
        for key, value in one.items():
            torch.testing.assert_close(other[key], value, atol=2e-4, rtol=2e-3, msg=f"{name} {key}")
    one, other = ([r for r in read_log(p / "log.jsonl") if r["name"]] for p in (a, b))
    return one, other
