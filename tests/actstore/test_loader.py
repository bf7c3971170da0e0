"""Tensors from a store: state, epochs, ranks, dtypes, normalisation, the path of a device."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from readings import build, check_batch, expected

from actstore.batching import Run
from actstore.loader import TokenLoader, _DeviceSink
from actstore.normalise import affine
from actstore.pools import Buffer, allocate
from actstore.selection import Split
from actstore.store import Store

WIDTHS = (4, 2)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return build(tmp_path / "a", [6, 6, 5, 6, 3], size=6, widths=WIDTHS)


def test_batches_for_some_epochs(store: Store) -> None:
    loader = TokenLoader(store, "s0,s1", 10, epochs=3)
    got = list(loader)
    assert len(loader) == 11
    assert len(got) == 33
    assert loader.rows == 104
    assert loader.memory_bytes == 2 * loader._run(allocate, None).pool_rows * (6 * 2 + 12)
    for epoch in range(3):
        pairs = [check_batch(store, b, WIDTHS) for b in got[11 * epoch : 11 * (epoch + 1)]]
        assert len(set().union(*pairs)) == sum(map(len, pairs)) == 104
    assert got[0].item.tolist() != got[11].item.tolist()
    assert got[0].acts.dtype == torch.float32
    assert list(loader) == []
    assert (loader.batch, loader.epoch) == (33, 3)


@pytest.mark.parametrize("drop_last", [False, True])
def test_resumed_at_any_batch(store: Store, drop_last: bool) -> None:
    options: dict[str, Any] = {"seed": 4, "epochs": 2, "drop_last": drop_last}
    loader = TokenLoader(store, "s0", 10, **options)
    whole, states = [], []
    for batch in loader:
        whole.append(batch)
        states.append(json.loads(json.dumps(loader.state_dict())))
    assert len(whole) == (20 if drop_last else 22)
    if drop_last:
        assert {len(b) for b in whole} == {10}
    for i, state in enumerate(states):
        again = TokenLoader(store, "s0", 10, **options)
        again.load_state_dict(state)
        rest = list(again)
        assert len(rest) == len(whole) - i - 1
        for got, want in zip(rest, whole[i + 1 :], strict=True):
            assert torch.equal(got.acts, want.acts)
            assert torch.equal(got.item, want.item)


def test_iterating_again_goes_on(store: Store) -> None:
    loader = TokenLoader(store, "s0", 10)
    first = [b.item.tolist() for b, _ in zip(loader, range(5), strict=False)]
    rest = [b.item.tolist() for b, _ in zip(loader, range(20), strict=False)]
    other = TokenLoader(store, "s0", 10)
    whole = [b.item.tolist() for b, _ in zip(other, range(25), strict=False)]
    # zip takes one batch more than it gives out
    assert first == whole[:5]
    assert rest[:10] == whole[6:16]


def test_a_state_of_another_order_is_refused(store: Store, tmp_path: Path) -> None:
    state = TokenLoader(store, "s0", 10, seed=1).state_dict()
    for change, match in [
        ({"seed": 2}, "seed: 1 -> 2"),
        ({"batch_size": 5}, "batch_size: 10 -> 5"),
        ({"sites": "s1"}, "sites"),
        ({"items": Split(half="train")}, "selected"),
        ({"streams": 2}, "streams: 1 -> 2"),
    ]:
        arguments = {"sites": "s0", "batch_size": 10, "seed": 1} | change
        with pytest.raises(ValueError, match=match):
            TokenLoader(store, **arguments).load_state_dict(state)
    part = build(tmp_path / "b", [6, 6, 5, 6, 3], size=6, widths=WIDTHS, commit={0, 1, 2, 3})
    with pytest.raises(ValueError, match="selected"):
        TokenLoader(part, "s0", 10, seed=1).load_state_dict(state)


def test_a_run_goes_on_with_another_number_of_ranks(store: Store) -> None:
    def loaders(world: int) -> list[TokenLoader]:
        return [
            TokenLoader(store, "s0", 12, streams=4, rank=r, world=world, epochs=2)
            for r in range(world)
        ]

    whole = [b.item.clone() for b in loaders(1)[0]]
    four = loaders(4)
    iterators = [iter(x) for x in four]
    seen = [torch.cat([next(i).item for i in iterators]) for _ in range(7)]
    two = loaders(2)
    for x in two:
        x.load_state_dict(four[3].state_dict())
    iterators = [iter(x) for x in two]
    seen += [torch.cat([next(i).item for i in iterators]) for _ in range(len(whole) - 7)]
    assert all(torch.equal(a, b) for a, b in zip(seen, whole, strict=True))


@pytest.mark.parametrize("stored", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(tmp_path: Path, stored: str, dtype: torch.dtype) -> None:
    store = build(tmp_path / "a", [3, 2], size=3, dtype=stored)
    for b in TokenLoader(store, "s0", 4, dtype=dtype, epochs=1):
        assert b.acts.dtype == dtype
        want = torch.from_numpy(expected(0, b.item.numpy(), b.token.numpy(), 4))
        exact = stored != "bfloat16" and dtype != torch.bfloat16
        torch.testing.assert_close(b.acts.float(), want, rtol=0 if exact else 2**-7, atol=0)


def test_normalisation(store: Store) -> None:
    rows = torch.cat([b.acts for b in TokenLoader(store, "s0,s1", 16, epochs=1)]).double()
    for how in ("center", "standard", "rms"):
        loader = TokenLoader(store, "s0,s1", 16, epochs=1, normalize=how)
        got = torch.cat([b.acts for b in loader]).double()
        torch.testing.assert_close(got.mean(0), torch.zeros(6).double(), atol=1e-4, rtol=0)
        if how == "center":
            torch.testing.assert_close(got, rows - rows.mean(0), atol=1e-3, rtol=0)
        if how == "standard":
            std = got.std(0, correction=0)
            torch.testing.assert_close(std, torch.ones(6).double(), atol=1e-5, rtol=0)
        if how == "rms":
            for site, width in (("s0", 4), ("s1", 2)):
                square = got[:, loader.slices[site]].square().sum(1).mean()
                assert square.item() == pytest.approx(width, rel=1e-5)
    pair = (torch.full((6,), 2.0), 0.5)
    given = torch.cat([b.acts for b in TokenLoader(store, "s0,s1", 16, epochs=1, normalize=pair)])
    torch.testing.assert_close(given.double(), (rows - 2) / 2)
    with pytest.raises(ValueError, match="center, standard, rms"):
        TokenLoader(store, "s0", 16, normalize="unit")


def test_a_constant_channel_is_not_divided_by_zero(tmp_path: Path) -> None:
    store = build(tmp_path / "a", [1], size=1, tokens=0)
    for how in ("standard", "rms"):
        shift, scale = affine(store, ["s0"], ["cls"], how)
        assert np.isfinite(shift).all()
        assert (scale == 1).all()


@pytest.mark.parametrize("normalize", [None, "standard"])
@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_the_path_of_a_device_gives_the_same_batches(
    tmp_path: Path, normalize: str | None, stored: str
) -> None:
    """The sink of CUDA devices, run on a CPU: whole pools copied, rows gathered there."""
    store = build(tmp_path / "a", [6, 6, 5, 6, 3], size=6, widths=WIDTHS, dtype=stored)
    loader = TokenLoader(store, "s0,s1", 10, epochs=2, normalize=normalize)
    sink = _DeviceSink(loader.selection, loader.device, loader.dtype, loader._affine)
    run: Run = loader._run(allocate, sink.upload)
    got = list(run.batches(sink))
    want = list(loader)
    assert len(got) == len(want) == 22
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.acts, b.acts)
        assert torch.equal(a.item, b.item)
        assert torch.equal(a.token, b.token)
        assert a.acts.dtype == b.acts.dtype


def test_the_prefetch_stream_copies_waits_and_keeps_in_that_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream logic of CUDA with recorded streams and events in place of the device's."""
    store = build(tmp_path / "a", [6, 6, 5, 6, 3], size=6, widths=WIDTHS)
    log: list[str] = []

    class Event:
        def record(self, stream: str) -> None:
            log.append(f"event on {stream}")

        def synchronize(self) -> None:
            log.append("copied")

    class Consumer:
        def wait_event(self, event: Event) -> None:
            log.append("consumer waits")

    class On:
        def __init__(self, stream: str) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            log.append(f"enter {self.stream}")

        def __exit__(self, *_: object) -> None:
            log.append("leave")

    consumer = Consumer()
    kept: set[int] = set()

    def record_stream(self: torch.Tensor, stream: Consumer) -> None:
        assert stream is consumer
        kept.add(id(self))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", On)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: consumer)
    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    loader = TokenLoader(store, "s0,s1", 10, epochs=1)
    sink = _DeviceSink(loader.selection, loader.device, loader.dtype, None)
    sink._stream = "prefetch"
    buffer = Buffer(loader.selection, 40, allocate)
    buffer.rows = 20
    sink.upload(buffer)
    # on the stream of its own, and done before the reading thread may fill the memory again
    assert log == ["enter prefetch", "event on prefetch", "leave", "copied"]
    sink.begin(10)
    sink.take(buffer, 0, 10, 0)
    assert log[4:] == ["consumer waits"]
    # memory of the copies is not given to anybody else while the consumer may work on it
    assert kept == {id(v) for v in buffer.extra[0]}
    assert sink.lend(buffer, 0, 10) is None
    assert len(sink.finish()) == 10


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_set_smaller_than_a_batch_goes_round(tmp_path: Path, drop_last: bool) -> None:
    store = build(tmp_path / "a", [2], size=2, tokens=0)
    loader = TokenLoader(store, "s0", 100, drop_last=drop_last)
    got = [b for b, _ in zip(loader, range(5), strict=False)]
    assert len(loader) == 1
    assert [sorted(b.item.tolist()) for b in got] == [[0, 1]] * 5
    streams = [TokenLoader(store, "s0", 4, streams=4, rank=r, world=4, epochs=1) for r in range(4)]
    assert sorted(i for x in streams for b in x for i in b.item.tolist()) == [0, 1]


def test_a_store_that_is_being_harvested_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = build(tmp_path / "a", [4, 4, 4], size=4, commit={1})
    loader = TokenLoader(store, "s0", 5, epochs=1)
    assert {i for b in loader for i in b.item.tolist()} == {4, 5, 6, 7}
    assert "is incomplete: reading the 1 committed of 3 parts" in caplog.text


def test_tensors_survive_the_loader(store: Store) -> None:
    kept = [b.acts[:2] for b in TokenLoader(store, "s0", 10, epochs=2)]
    again = [b.acts[:2].clone() for b in TokenLoader(store, "s0", 10, epochs=2)]
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize("stored", ["float16", "float32", "bfloat16"])
def test_tensors_of_the_stored_dtype_share_the_memory_of_the_pools(
    tmp_path: Path, stored: str
) -> None:
    store = build(tmp_path / "a", [64] * 4, size=64, tokens=8, dtype=stored)
    dtype = getattr(torch, stored)
    places = [b.acts.data_ptr() for b in TokenLoader(store, "s0", 50, dtype=dtype, epochs=1)]
    assert len(set(places)) > 40  # one memory for every copy would give 4
    rows, seen = torch.zeros(0, 2, dtype=torch.int64), 0
    for b in TokenLoader(store, "s0", 50, dtype=dtype, epochs=1):
        want = torch.from_numpy(expected(0, b.item.numpy(), b.token.numpy(), 4)).to(dtype)
        assert torch.equal(b.acts, want)
        b.acts.zero_()  # a row is given out once: whoever has it may write to it
        rows = torch.cat([rows, torch.stack([b.item, b.token.long()], 1)])
        seen += len(b)
    assert seen == 64 * 4 * 9 == len(rows.unique(dim=0))


def test_bad_arguments(store: Store) -> None:
    with pytest.raises(ValueError, match="floating point"):
        TokenLoader(store, "s0", 10, dtype=torch.int32)
    with pytest.raises(ValueError, match="must divide"):
        TokenLoader(store, "s0", 12, streams=4, world=3)
