"""Training off a store: learning, resuming bit for bit, refusing what does not fit."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import actstore
from actstore.store import Store
from dictlearn.config import BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, Sparsify, TopK
from dictlearn.dictionary import Dictionary
from dictlearn.formats import load
from dictlearn.runfile import default_names
from dictlearn.runlog import read_log
from dictlearn.schedule import TrainConfig
from dictlearn.trainer import TrainEvent, train

SITES = ("blocks.0.resid_post", "blocks.1.resid_post")
WIDTHS = {SITES[0]: 16, SITES[1]: 24}
QUICK = TrainConfig(steps=60, batch_size=64, checkpoint_every=20, log_every=10, lr=5e-3)


def fresh(sparsify: Sparsify | None = None, site: str = SITES[0], seed: int = 0) -> Dictionary:
    sites = {site: WIDTHS[site]}
    return Dictionary(sites, latents=48, sparsify=sparsify or TopK(4), seed=seed)


def fvu(store: Store, d: Dictionary) -> float:
    reads, writes = (
        torch.cat(
            [
                torch.from_numpy(
                    np.concatenate([store.dask(s, k).compute() for k in ("cls", "patch")], 1)
                ).flatten(0, 1)
                for s in sites
            ],
            1,
        )
        for sites in (d.config.reads, d.config.writes)
    )
    with torch.no_grad():
        error = (d(reads) - writes).square().sum()
    return float(error / (writes - writes.mean(0)).square().sum())


def test_two_sites_train_from_one_read_and_end_in_raw_units(store: Store) -> None:
    ds = [fresh(site=s) for s in SITES]
    before = [fvu(store, d) for d in ds]
    config = TrainConfig(steps=200, batch_size=128, lr=8e-3)
    done = train(store, ds, config)
    for trained, start in zip(done, before, strict=True):
        assert fvu(store, trained.dictionary) < 0.25 < start
        assert trained.metrics["fvu"] == pytest.approx(fvu(store, trained.dictionary), abs=0.08)
        assert not trained.failed


@pytest.mark.parametrize(
    "sparsify",
    [
        TopK(4),
        BatchTopK(4),
        ReLU(l1=3e-3),
        ReLU(l1=3e-3, p_end=0.5),
        JumpReLU(l0=1e-3),
        JumpReLU(l0=1e-3, penalty="tanh"),
        Gated(l1=3e-3),
    ],
    ids=str,
)
@pytest.mark.parametrize("matryoshka", [None, Matryoshka(prefixes=(16,), sampled=1)])
def test_every_kind_learns(store: Store, sparsify: Sparsify, matryoshka: Matryoshka | None) -> None:
    width = {SITES[0]: 16}
    d = Dictionary(width, latents=48, sparsify=sparsify, matryoshka=matryoshka)
    (done,) = train(store, d, TrainConfig(steps=150, batch_size=128, lr=5e-3))
    assert fvu(store, done.dictionary) < 0.45
    assert done.metrics["l0"] < 24


def test_transcoder_and_crosscoder_learn(store: Store) -> None:
    a, b = SITES
    transcoder = Dictionary({a: 16}, {b: 24}, latents=48, sparsify=TopK(4), skip=True)
    crosscoder = Dictionary(dict(WIDTHS), latents=64, sparsify=TopK(8))
    done = train(store, [transcoder, crosscoder], TrainConfig(steps=200, batch_size=128, lr=5e-3))
    assert fvu(store, done[1].dictionary) < 0.35
    assert fvu(store, done[0].dictionary) < 1.0  # the sites are independent: only the mean is there


def state_of(folder: Path) -> dict[str, bytes]:
    keep = ("safetensors", "config.json", "log.jsonl")
    return {
        str(p.relative_to(folder)): _untimed(p)
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name.endswith(keep)
    }


def _untimed(path: Path) -> bytes:
    """Content of a file, without the rows of the log that say how long something took."""
    if path.name != "log.jsonl":
        return path.read_bytes()
    lines = path.read_bytes().splitlines(keepends=True)
    return b"".join(line for line in lines if b"tokens_per_second" not in line)


@pytest.mark.parametrize("sparsify", [TopK(4), BatchTopK(4), JumpReLU(), ReLU(), Gated()], ids=str)
def test_resumed_equals_uninterrupted_bit_for_bit(
    store: Store, tmp_path: Path, sparsify: Sparsify
) -> None:
    matryoshka = Matryoshka(sampled=2)

    def run(out: str, stop: int | None) -> None:
        def on_event(event: TrainEvent) -> None:
            if stop is not None and event.step >= stop:
                raise KeyboardInterrupt

        d = Dictionary({SITES[0]: 16}, latents=48, sparsify=sparsify, matryoshka=matryoshka)
        train(store, d, QUICK, out=tmp_path / out, on_event=on_event)

    run("whole", None)
    for stop in (10, 30, 60):
        with pytest.raises(KeyboardInterrupt):
            run("cut", stop)
    run("cut", None)
    assert state_of(tmp_path / "cut") == state_of(tmp_path / "whole")


KILLED = """
import sys, actstore
from dictlearn.config import TopK
from dictlearn.dictionary import Dictionary
from dictlearn.schedule import TrainConfig
from dictlearn.trainer import train
import torch
torch.set_num_threads(1)
config = TrainConfig(steps=120, batch_size=64, checkpoint_every=7, log_every=5, gemm="default")
d = Dictionary({"blocks.0.resid_post": 16}, latents=48, sparsify=TopK(4))
print("ready", flush=True)
train(actstore.open(sys.argv[1]), d, config, out=sys.argv[2])
"""


def test_killed_and_resumed_equals_uninterrupted(store: Store, tmp_path: Path) -> None:
    """kill -9 of a real process, right after its first checkpoint appears."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

    def start(out: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", KILLED, store.url, str(tmp_path / out)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)

    whole = start("whole")
    cut = tmp_path / "cut" / "checkpoints"
    process = start("cut")
    deadline = time.monotonic() + 60
    while not list(cut.glob("0*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert process.stdout is not None
    process.stdout.close()
    process = start("cut")
    assert process.wait() == 0
    assert whole.wait() == 0
    for p in (process, whole):
        assert p.stdout is not None
        p.stdout.close()
    assert state_of(tmp_path / "cut") == state_of(tmp_path / "whole")


def test_a_finished_run_is_loaded_and_logged(store: Store, tmp_path: Path) -> None:
    events: list[TrainEvent] = []
    first = train(store, fresh(), QUICK, out=tmp_path, on_event=events.append)
    assert {e.kind for e in events} == {"start", "log", "checkpoint", "finished"}
    every = read_log(tmp_path / "log.jsonl")
    rows = [r for r in every if r["name"]]
    assert [r["step"] for r in rows] == list(range(10, 61, 10))
    of_the_run = [r for r in every if not r["name"]]
    assert [r["step"] for r in of_the_run] == [r["step"] for r in rows]
    shown = [(e.tokens_per_second, e.data_wait) for e in events if e.kind == "log"]
    assert [(r["tokens_per_second"], r["data_wait"]) for r in of_the_run] == shown
    assert rows[-1]["fvu"] < rows[0]["fvu"]
    assert set(rows[0]) >= {"mse", "fvu", "l0", "dead", "lr", "grad_norm", "name", "step"}
    assert list((tmp_path / "tensorboard").glob("events*"))
    again = train(store, fresh(), QUICK, out=tmp_path, on_event=events.append)
    assert torch.equal(again[0].dictionary.W_enc, first[0].dictionary.W_enc)
    assert again[0].metrics == first[0].metrics
    assert first[0].path is not None
    loaded = load(first[0].path)
    assert torch.equal(loaded.W_dec, first[0].dictionary.W_dec)
    about = json.loads((first[0].path / "config.json").read_text())["about"]
    assert about["store"] == store.fingerprint
    assert TrainConfig.from_json(about["train"]) == QUICK


def test_a_torn_log_and_a_torn_checkpoint_do_not_matter(store: Store, tmp_path: Path) -> None:
    train(store, fresh(), QUICK, out=tmp_path)
    wanted = state_of(tmp_path)
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 6')
    (tmp_path / "checkpoints" / ".writing-1").mkdir()
    torn = tmp_path / "checkpoints" / "000000099"
    torn.mkdir()
    train(store, fresh(), QUICK, out=tmp_path)
    torn.rmdir()
    assert {k: v for k, v in state_of(tmp_path).items() if "writing" not in k} == wanted


def test_held_out_items_are_never_read(store: Store) -> None:
    from dictlearn.trainer import _Run

    config = TrainConfig(steps=2, batch_size=64, holdout=0.25)
    run = _Run(store, [fresh()], [config], ["a"], None, torch.device("cpu"), lambda e: None)
    from actstore.reader import batches
    from actstore.selection import Split

    held = Split(half="validation", holdout=0.25)
    outside = {int(i) for b in batches(store, SITES[0], 64, items=held) for i in b.item}
    loader = run.loader
    seen = {int(i) for _, b in zip(range(20), loader, strict=False) for i in b.item}
    assert seen
    assert outside
    assert not seen & outside
    assert seen | outside == set(range(60))


# ---- errors ----------------------------------------------------------------------------------
def test_site_not_in_the_store(store: Store) -> None:
    d = Dictionary({"blocks.7.resid_post": 16}, latents=48, sparsify=TopK(4))
    with pytest.raises(KeyError, match=r"has no site 'blocks.7.resid_post'; nearest: blocks"):
        train(store, d, QUICK)


def test_widths_that_differ(store: Store) -> None:
    d = Dictionary({SITES[0]: 17}, latents=48, sparsify=TopK(4))
    with pytest.raises(ValueError, match=r"has 17 channels at 'blocks.0.resid_post', .* stores 16"):
        train(store, d, QUICK)


def test_a_run_of_another_store_or_configuration(store: Store, tmp_path: Path) -> None:
    train(store, fresh(), QUICK, out=tmp_path / "run")
    d = Dictionary({SITES[0]: 16}, latents=47, sparsify=TopK(4))
    with pytest.raises(ValueError, match=r"holds another run(.|\n)*latents: 48 -> 47"):
        train(store, d, QUICK, out=tmp_path / "run")
    values = np.ones((20, 3, 16), np.float32) * np.random.default_rng(0).random((20, 3, 16))
    other = actstore.write_arrays(
        tmp_path / "b.zarr", {SITES[0]: {"patch": values.astype(np.float32)}}
    )
    with pytest.raises(ValueError, match=r"store: \w+ -> \w+(.|\n)*another store fingerprint"):
        train(other, fresh(), QUICK, out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"initial"):
        train(store, fresh(seed=1), QUICK, out=tmp_path / "run")


def test_nan_in_one_dictionary_stops_it_alone(store: Store) -> None:
    bad = fresh(seed=1)
    with torch.no_grad():
        bad.b_enc[0] = float("nan")
    events: list[TrainEvent] = []
    good, failed = train(store, [fresh(), bad], QUICK, on_event=events.append)
    assert not good.failed
    assert "is nan at step 0" in failed.failed
    assert "Lower the learning rate" in failed.failed
    assert [e.message for e in events if e.kind == "failed"] == [failed.failed]


def test_nan_everywhere_is_an_error(store: Store) -> None:
    bad = fresh()
    with torch.no_grad():
        bad.b_enc[0] = float("nan")
    with pytest.raises(ValueError, match=r"is nan at step 0 .*gradient norm nan"):
        train(store, bad, QUICK)


def test_a_site_that_never_varies(tmp_path: Path) -> None:
    flat = actstore.write_arrays(tmp_path / "c.zarr", {"a": {"patch": np.ones((8, 2, 4), "f4")}})
    with pytest.raises(ValueError, match=r"mean channel variance 0.0.*nothing can be learned"):
        train(flat, Dictionary({"a": 4}, latents=8, sparsify=TopK(2)), QUICK)


def test_configurations_must_agree_on_the_data(store: Store) -> None:
    configs: Sequence[TrainConfig] = [QUICK, TrainConfig(steps=61)]
    with pytest.raises(ValueError, match=r"steps must agree; got \['60', '61'\]"):
        train(store, [fresh(), fresh(seed=1)], configs)
    with pytest.raises(ValueError, match=r"TrainConfig.warmup = 2 is outside"):
        TrainConfig(warmup=2)
    with pytest.raises(ValueError, match=r"no field 'lrr'; nearest: lr"):
        TrainConfig.from_json({"lrr": 1})


def test_names_are_made_of_sites() -> None:
    a, b = SITES
    t = Dictionary({a: 16}, {b: 24}, latents=48, sparsify=TopK(4))
    assert default_names([fresh(), fresh(), t]) == [a, f"{a}-2", f"{a}-to-{b}"]


def test_schedules() -> None:
    c = TrainConfig(steps=100, warmup=0.1, decay=0.2, lr=1.0)
    rates = [c.learning_rate(i, 10) for i in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[79] == 1.0
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)
    cosine = TrainConfig(steps=100, decay=0.2, decay_shape="cosine", lr=1.0)
    assert cosine.learning_rate(90, 10) == pytest.approx(0.5)
    assert c.penalty_scale(4) == pytest.approx(0.5)
    assert c.penalty_scale(50) == 1.0
