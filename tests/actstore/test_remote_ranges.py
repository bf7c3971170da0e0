"""Ranges of an object store: few and large, many under way, bounded, right whatever is asked."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore import remote_ranges
from actstore.manifest import ArraySpec, FormatError
from actstore.plan import REMOTE_STRIPE, choose_layout
from actstore.ranges import Request
from actstore.remote_ranges import MAX_GAP, MAX_SPAN, StorageRanges, join

DATA = np.random.default_rng(0).integers(0, 255, 1 << 16, dtype=np.uint8).tobytes()


class Far:
    """Objects in memory; notes what is asked for and how much of it is not yet answered."""

    url = "far://x"

    def __init__(self):
        self.asked = []
        self.gate = threading.Event()
        self.gate.set()

    def read_range(self, path, offset, length):
        self.asked.append((path, offset, length))
        self.gate.wait(20)
        if path == "gone":
            raise FileNotFoundError(path)
        return DATA[offset : offset + length]

    def uri(self, path):
        return f"{self.url}/{path}"


def request(path, offset, length):
    return Request(path, 0, offset, length, (path, offset, length))


@given(
    wanted=st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 3000), st.integers(0, 500)), max_size=30
    ),
    ahead=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None)
def test_every_request_gets_its_bytes(wanted, ahead):
    requests = [request(*w) for w in sorted(wanted)]
    ranges = StorageRanges(Far())
    for _ in range(2):
        found = []

        def done(r, view, found=found):
            found.append((r.tag, bytes(view)))

        ranges.read(requests, lambda r: None, done, requests[:ahead])
        assert found == [(r.tag, DATA[r.offset : r.offset + r.length]) for r in requests]
    ranges.close()


def test_neighbours_are_one_request():
    near = [request("a", i * 10, 10) for i in range(5)]
    assert [(s.offset, s.length, len(s.requests)) for s in join(near)] == [(0, 50, 5)]
    gap = [request("a", 0, 10), request("a", 10 + MAX_GAP, 10), request("a", 21 + 2 * MAX_GAP, 1)]
    assert [s.length for s in join(gap)] == [20 + MAX_GAP, 1]
    large = [request("a", i * MAX_SPAN // 2, MAX_SPAN // 2) for i in range(3)]
    assert [s.length for s in join(large)] == [MAX_SPAN, MAX_SPAN // 2]
    assert len(list(join([request("a", 0, 10), request("b", 10, 10)]))) == 2
    assert len(list(join([request("a", 10, 10), request("a", 0, 10)]))) == 2


def test_the_next_pool_is_asked_for_while_this_one_is_read():
    far = Far()
    ranges = StorageRanges(far)
    pools = [[request(f"{k}-{i}", 0, 10) for i in range(3)] for k in range(3)]
    for now, after in zip(pools, [*pools[1:], []], strict=True):
        found = []
        ranges.read(now, lambda r: None, lambda r, v, found=found: found.append(r.path), after)
        assert found == [r.path for r in now]
    assert sorted(far.asked) == sorted((r.path, 0, 10) for pool in pools for r in pool)
    ranges.close()


def test_another_pool_than_announced(monkeypatch):
    far = Far()
    ranges = StorageRanges(far)
    found = []
    ranges.read([request("a", 0, 5)], lambda r: None, lambda r, v: None, [request("b", 0, 5)])
    ranges.read([request("c", 7, 5)], lambda r: None, lambda r, v: found.append(bytes(v)), [])
    assert found == [DATA[7:12]]
    ranges.close()


def test_what_is_under_way_is_bounded(monkeypatch):
    monkeypatch.setattr(remote_ranges, "BYTES_AHEAD", 1000)
    far = Far()
    ranges = StorageRanges(far)
    most = []

    def done(r, view):
        most.append(sum(length for _, _, length in far.asked) - 300 * len(most))

    ranges.read([request(str(i), 0, 300) for i in range(20)], lambda r: None, done, [])
    assert max(most) <= 1000 + 2 * 300
    assert max(most) > 600, "and several are under way"
    ranges.close()


def test_a_request_that_failed_is_sent_again(monkeypatch):
    far = Far()
    ranges = StorageRanges(far)
    real, left = far.read_range, [1]

    def fails(path, offset, length):
        left[0] -= 1
        if left[0] >= 0:
            raise ConnectionError("the network is gone")
        return real(path, offset, length)

    far.read_range = fails
    pool, found = [request("a", 0, 5), request("b", 0, 5)], []
    with pytest.raises(ConnectionError, match=r"network is gone"):
        ranges.read(pool, lambda r: None, lambda r, v: None, [])
    ranges.read(pool, lambda r: None, lambda r, v: found.append(bytes(v)), [])
    assert found == [DATA[:5]] * 2
    ranges.close()


def test_what_is_missing_or_short_is_named():
    ranges = StorageRanges(Far())
    with pytest.raises(FileNotFoundError, match=r"gone is missing although part 0 is committed"):
        ranges.read([request("gone", 0, 5)], lambda r: None, lambda r, v: None, [])
    ranges.close()
    ranges = StorageRanges(Far())
    end = len(DATA)
    with pytest.raises(FormatError, match=rf"truncated: it ends at byte {end} and a .* {end + 5}"):
        ranges.read([request("a", end - 5, 10)], lambda r: None, lambda r, v: None, [])
    ranges.close()


@pytest.mark.parametrize("sites", [1, 12])
@pytest.mark.parametrize(
    ("tokens", "channels"), [(196, 768), (256, 384), (256, 1024), (49, 512), (1, 768)]
)
def test_stripes_planned_for_an_object_store_are_large(sites, tokens, channels):
    arrays = [
        ArraySpec(site=f"s{i}", kind="patch", tokens=tokens, channels=channels)
        for i in range(sites)
    ]
    size, laid = choose_layout(arrays, items=10**6, dtype="float16", budget=8 << 30, remote=True)
    stripe = size * laid[0].stripe_tokens * channels * 2
    assert stripe >= REMOTE_STRIPE
    if sites == 1:  # several may not fit the budget
        assert 5e6 < stripe < 9e6
        assert laid[0].stripe_tokens <= 8, "so that a pool stays small"
