"""A run killed at 2 ranks goes on at 1 or 4; NaN on one rank; the threshold of all ranks."""

import contextlib
import dataclasses
import io
import multiprocessing
import os
import shutil
import signal
import socket
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import actstore
from actstore.store import Store
from dictlearn import checkpoint
from dictlearn.config import BatchTopK, JumpReLU, TopK
from dictlearn.dictionary import Dictionary
from dictlearn.distributed import Ranks
from dictlearn.formats import load
from dictlearn.learner import Learner
from dictlearn.picks import pick
from dictlearn.progress import TrainEvent
from dictlearn.runlog import read_log
from dictlearn.schedule import TrainConfig
from dictlearn.trainer import train

SITE = {"blocks.0.resid_post": 16}
CONFIG = TrainConfig(
    steps=8, batch_size=64, streams=4, lr=5e-3, log_every=1, checkpoint_every=4, gemm="default"
)
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")


def dictionaries() -> list[Dictionary]:
    kinds = [TopK(4), BatchTopK(4), JumpReLU(l0=0.01)]
    return [Dictionary(SITE, latents=48, sparsify=kind) for kind in kinds]


class _Poisoned(Dictionary):
    """NaN in the input of one rank alone."""

    def gather(self, *args: object, **options: object) -> torch.Tensor:  # type: ignore[override]
        x = super().gather(*args, **options)  # type: ignore[arg-type]
        return x * float("nan") if dist.is_initialized() and dist.get_rank() == 1 else x


def command(rank: int, world: int, port: int, url: str, out: str) -> None:
    """Run ``dictlearn train`` in the environment that torchrun sets."""
    from dictlearn.cli import main

    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {k: str(v) for k, v in numbers.items()}
    words = f"train {url} --out {out} --sites blocks.0.resid_post --latents 32 --k 4 --steps 2"
    words += " --batch-size 64 --streams 4 --device cpu --gemm default"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(words.split()) == 0
    assert ("next: dictlearn eval" in said.getvalue()) == (rank == 0)


def work(rank: int, world: int, url: str, out: str, meeting: str, stop: int, port: int) -> None:
    torch.set_num_threads(1)
    store = actstore.open(url)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)

    def on_event(event: TrainEvent) -> None:
        if event.kind == "checkpoint" and event.step == stop:
            os.kill(os.getpid(), signal.SIGKILL)

    if stop:
        train(store, dictionaries(), CONFIG, out=out, on_event=on_event)
    else:
        train(store, dictionaries(), CONFIG, out=out)
        bad = _Poisoned(SITE, latents=48, sparsify=TopK(4))
        short = dataclasses.replace(CONFIG, steps=2)
        done = train(store, [dictionaries()[0], bad], short)
        Path(f"{out}.failed-{rank}").write_text("|".join(d.failed for d in done))
        dist.destroy_process_group()
        command(rank, world, port, url, f"{out}-command")


def start(world: int, store: Store, out: Path, stop: int = 0) -> list[multiprocessing.Process]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dictlearn.trainer", "dictlearn.commands", "actstore.store"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rest = (world, store.url, str(out), f"{out}.meeting-{world}", stop, port)
    processes = [context.Process(target=work, args=(rank, *rest)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes  # type: ignore[return-value]


def close(a: Path, b: Path) -> None:
    names = sorted(p.parent.name for p in a.glob("*/config.json"))
    assert len(names) == 3
    for name in names:
        one, other = load(a / name).state_dict(), load(b / name).state_dict()
        for key, value in one.items():
            torch.testing.assert_close(other[key], value, atol=1e-4, rtol=1e-3, msg=f"{name} {key}")
    rows = [[r for r in read_log(p / "log.jsonl") if r["name"]] for p in (a, b)]
    assert [(r["step"], r["name"]) for r in rows[0]] == [(r["step"], r["name"]) for r in rows[1]]
    for one_row, other_row in zip(*rows, strict=True):
        assert other_row["mse"] == pytest.approx(one_row["mse"], rel=1e-3)


def test_killed_at_two_ranks_goes_on_at_one_and_four(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    two = start(2, store, tmp_path / "two", stop=4)
    train(store, dictionaries(), CONFIG, out=tmp_path / "whole")
    two[0].join(60)
    assert two[0].exitcode == -signal.SIGKILL
    two[1].kill()
    two[1].join(60)
    newest = checkpoint.latest(tmp_path / "two")
    assert newest is not None
    assert newest.name == "000000004"
    shutil.copytree(tmp_path / "two", tmp_path / "four")
    four = start(4, store, tmp_path / "four")
    train(store, dictionaries(), CONFIG, out=tmp_path / "two")
    close(tmp_path / "whole", tmp_path / "two")
    for process in four:
        process.join(200)
        assert process.exitcode == 0
    close(tmp_path / "whole", tmp_path / "four")
    failed = {Path(f"{tmp_path / 'four'}.failed-{rank}").read_text() for rank in range(4)}
    assert len(failed) == 1
    good, bad = failed.pop().split("|")
    assert not good
    assert "is nan at step 0" in bad
    assert load(tmp_path / "four-command" / "blocks.0.resid_post").latents == 32
    assert len(read_log(tmp_path / "four-command" / "log.jsonl")) == 2  # a dictionary, the run


class Together:
    """Gathers values over threads, as `Ranks.gather` does over processes."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world)
        self.parts: dict[int, torch.Tensor] = {}

    def of(self, rank: int):  # type: ignore[no-untyped-def]
        def gather(values: torch.Tensor) -> torch.Tensor:
            self.parts[rank] = values
            self.barrier.wait(20)
            out = torch.cat([self.parts[r] for r in sorted(self.parts)])
            self.barrier.wait(20)
            return out

        return gather


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1.0, 30.0), (1e-3, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("k", [4, 40])
def test_batch_top_k_is_that_of_the_global_batch(scales: tuple[float, float], k: int) -> None:
    """Even where one rank holds nearly all of the large values."""
    d = Dictionary(SITE, latents=48, sparsify=BatchTopK(k))
    generator = torch.Generator().manual_seed(0)
    xs = [s * torch.randn(32, 16, generator=generator) for s in scales]
    d.requires_grad_(False)
    whole = pick(d, torch.cat(xs))
    together, found = Together(2), {}

    def run(rank: int) -> None:
        found[rank] = pick(d, xs[rank], gather=together.of(rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert whole is not None
    entries = set()
    for rank, picks in found.items():
        assert picks is not None
        assert float(picks.smallest_kept) == float(whole.smallest_kept)  # type: ignore[arg-type]
        entries |= set(zip((picks.row + 32 * rank).tolist(), picks.latent.tolist(), strict=True))
    assert entries == set(zip(whole.row.tolist(), whole.latent.tolist(), strict=True))


def test_ranks_must_divide_the_streams(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "current", classmethod(lambda cls: cls(rank=0, world=3)))
    with pytest.raises(ValueError, match=r"4 streams cannot be shared by 3 ranks, only by 1, 2, 4"):
        train(store, dictionaries()[0], CONFIG)


def test_what_ranks_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Ranks(rank=1, world=2)
    d = Dictionary(SITE, latents=48, sparsify=BatchTopK(4), latent_norm=True)
    with pytest.raises(ValueError, match=r"'a': BatchTopK with latent_norm .* one rank only, not"):
        Learner(name="a", dictionary=d, config=CONFIG, ranks=two)
    monkeypatch.setattr(Ranks, "same", lambda self, value: "000000004")
    with pytest.raises(ValueError, match=r"rank 1 finds None as the newest .*'000000004': the"):
        two.agree(None, "the newest checkpoint in runs/a")
