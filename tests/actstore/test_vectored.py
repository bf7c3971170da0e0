"""Scattered reads put every byte in its place, in any number of calls."""

import os
from pathlib import Path

import numpy as np
import pytest

from actstore import ranges, vectored
from actstore.ranges import LocalRanges, Request, ThreadedRanges
from actstore.remote_ranges import StorageRanges
from actstore.storage import LocalStorage

pytestmark = pytest.mark.skipif(not vectored.AVAILABLE, reason="no preadv2 on this platform")


@pytest.mark.parametrize("rows", [1, 7, 1024, 1025, 5000])
@pytest.mark.parametrize("start", [0, 3, 24, 50])
def test_rows_land_where_they_belong(tmp_path: Path, rows: int, start: int) -> None:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 255, (rows, 24), dtype=np.uint8)
    (tmp_path / "f").write_bytes(b"head" + data.tobytes())
    out = np.zeros((rows, 40), dtype=np.uint8)
    place = rng.permutation(rows)
    places = vectored.vectors(out.ctypes.data + 8, place, 40, 24)
    start = min(start, data.size)
    descriptor = os.open(tmp_path / "f", os.O_RDONLY)
    try:
        assert vectored.read_scattered(descriptor, 4, places, start) == data.size
    finally:
        os.close(descriptor)
    want = data.reshape(-1).copy()
    want[:start] = 0
    assert np.array_equal(out[place, 8:32], want.reshape(rows, 24))
    out[:, 8:32] = 0
    assert not out.any()


def test_the_end_of_a_file_and_errors(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(range(1, 51)))
    out = np.zeros((10, 8), dtype=np.uint8)
    places = vectored.vectors(out.ctypes.data, np.arange(10), 8, 8)
    descriptor = os.open(tmp_path / "f", os.O_RDONLY)
    assert vectored.read_scattered(descriptor, 0, places, 0) == 50
    assert out.reshape(-1)[:51].tolist() == [*range(1, 51), 0]
    assert vectored.read_scattered(descriptor, 60, places, 0) == 0
    os.close(descriptor)
    with pytest.raises(OSError, match=r"Bad file descriptor"):
        vectored.read_scattered(descriptor, 0, places, 0)


@pytest.mark.parametrize("reader", [LocalRanges, ThreadedRanges, StorageRanges, "plain", "blind"])
def test_every_way_of_reading_gives_the_same(
    tmp_path: Path, reader: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a platform that cannot scatter, and on a file system that cannot tell cold."""
    rng = np.random.default_rng(1)
    data = [rng.integers(0, 255, 64 * 50, dtype=np.uint8) for _ in range(3)]
    for i, values in enumerate(data):
        (tmp_path / f"f{i}").write_bytes(values.tobytes())
    if reader == "plain":
        monkeypatch.setattr(vectored, "AVAILABLE", False)
    monkeypatch.setattr(ranges, "LOOK_AHEAD", 2)
    storage = LocalStorage(tmp_path)
    many = reader(storage) if callable(reader) else LocalRanges(storage)
    if reader == "blind":
        monkeypatch.setattr(os, "RWF_NOWAIT", 1 << 30)
    requests = [
        Request(f"f{i % 3}", 0, 64 * j, 64 * (1 + j % 3), (i, j))
        for i, j in enumerate(rng.permutation(40).tolist())
    ]
    out = np.zeros((40, 4, 64), dtype=np.uint8)

    def place(request: Request) -> np.ndarray | None:
        i, _ = request.tag
        if i % 2:
            return None
        rows = np.arange(request.length // 64)
        return vectored.vectors(out[i].ctypes.data, rows, 64, 64)

    def done(request: Request, view: memoryview) -> None:
        i, _ = request.tag
        out[i].reshape(-1)[: len(view)] = np.frombuffer(view, dtype=np.uint8)

    many.read(requests, place, done, requests[:3])
    many.close()
    for request in requests:
        i, _ = request.tag
        start = request.offset
        want = data[i % 3][start : start + request.length]
        assert np.array_equal(out[i].reshape(-1)[: request.length], want)
