"""`store.items`: whole items by direct ranges."""

from pathlib import Path

import numpy as np
import pytest
from readings import build, expected, uncommit

import actstore
from actstore.manifest import FormatError


@pytest.mark.parametrize(("tokens", "stripe_tokens"), [(1, 1), (6, 1), (6, 3)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_items_are_the_ones_asked_for(
    tmp_path: Path, tokens: int, stripe_tokens: int, dtype: str
) -> None:
    store = build(
        tmp_path / "a",
        [5, 3, 4],
        size=5,
        tokens=tokens,
        stripe_tokens=(stripe_tokens,),
        dtype=dtype,
    )
    positions = np.array([13, 0, 7, 0, 10])
    got = store.items(positions, "s0", "patch")
    assert got.dtype == (np.float16 if dtype == "float16" else np.float32)
    for row, position in zip(got, positions, strict=True):
        want = expected(0, np.full(tokens, position), np.arange(1, 1 + tokens), 4)
        assert np.allclose(row, want, rtol=2**-8 if dtype == "bfloat16" else 0)
    assert store.items(13, "s0", "cls").shape == (1, 1, 4)
    assert store.items([], "s0", "cls").shape == (0, 1, 4)


def test_positions_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    build(tmp_path / "a", [5, 3, 4], size=5)
    uncommit(tmp_path / "a", 2)
    store = actstore.open(tmp_path / "a")
    for position in (-1, 8, 10, 99):
        with pytest.raises(ValueError, match=rf"position {position}: it was skipped"):
            store.items([0, position], "s0", "patch")
    with pytest.raises(ValueError, match="must be integers"):
        store.items([0.5], "s0", "patch")
    with pytest.raises(KeyError, match="nearest: s0"):
        store.items([0], "s1", "patch")


def test_missing_and_truncated_shards_are_named(tmp_path: Path) -> None:
    store = build(tmp_path / "a", [5, 5], size=5)
    path = Path(store.shard("s0", "patch", 1).uri)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(FormatError, match="part 1 is truncated"):
        store.items([6], "s0", "patch")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="part 1 is committed"):
        store.items([6], "s0", "patch")
    assert store.items([4], "s0", "patch").shape == (1, 3, 4)
