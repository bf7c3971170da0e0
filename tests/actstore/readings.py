"""Small stores whose every value says where it comes from, for the tests of reading."""

from pathlib import Path
from typing import Any

import numpy as np

import actstore
from actstore.commit import record_path
from actstore.manifest import ArraySpec, Manifest
from actstore.pipeline import PartPipeline
from actstore.storage import open_storage
from actstore.store import Store, create_store


def expected(site: int, item: Any, token: Any, channels: int) -> np.ndarray:
    """Return the value of (site, store position, token): distinct, and exact in float16."""
    item, token = np.asarray(item)[:, None], np.asarray(token)[:, None]
    channel = np.arange(channels)
    return ((item * 31 + token * 7 + site * 3 + channel) % 2039 - 1000).astype(np.float32)


def build(
    folder: Path,
    counts: list[int],
    *,
    size: int,
    tokens: int = 3,
    cls: int = 1,
    widths: tuple[int, ...] = (4,),
    stripe_tokens: tuple[int, ...] = (1,),
    dtype: str = "float16",
    commit: set[int] | None = None,
    codec: str = "raw",
) -> Store:
    """Write a store with `counts` valid items in its parts of `size`, `commit` of them committed.

    Site i is called ``s<i>``, has `widths[i]` channels, and patches in stripes of
    `stripe_tokens[i]`.
    """
    arrays = []
    for i, width in enumerate(widths):
        if cls:
            arrays.append(ArraySpec(site=f"s{i}", kind="cls", tokens=cls, channels=width))
        if tokens:
            arrays.append(
                ArraySpec(
                    site=f"s{i}",
                    kind="patch",
                    tokens=tokens,
                    channels=width,
                    first=cls,
                    stripe_tokens=stripe_tokens[i % len(stripe_tokens)],
                )
            )
    items = (len(counts) - 1) * size + max(counts[-1], 1)
    manifest = Manifest(
        items=items, items_per_part=size, arrays=tuple(arrays), dtype=dtype, codec=codec
    )
    storage = open_storage(folder)
    create_store(storage, manifest)
    with PartPipeline(storage, manifest) as pipeline:
        for part, count in enumerate(counts):
            if commit is not None and part not in commit:
                continue
            position = np.arange(part * size, part * size + count)
            buffer, values = pipeline.next_buffer(), {}
            for array in arrays:
                item = np.repeat(position, array.tokens)
                token = np.tile(np.arange(array.first, array.first + array.tokens), count)
                value = expected(int(array.site[1:]), item, token, array.channels)
                values[array] = value.reshape(count, array.tokens, array.channels)
            buffer.append(values)
            rows = [
                {"position": int(p), "source": int(p), "key": str(p), "status": "ok"}
                for p in position
            ]
            pipeline.submit(part, buffer, rows)
    return actstore.open(folder)


def check_batch(store: Store, batch: Any, widths: tuple[int, ...] = (4,)) -> set[tuple[int, int]]:
    """Assert that every value of a batch is the one of its item and token; return those."""
    item, token = np.asarray(batch.item), np.asarray(batch.token)
    assert item.dtype == np.int64
    assert token.dtype == np.int32
    for i, site in enumerate(batch.slices):
        width = widths[int(site[1:])]
        value = np.asarray(batch.site(site), dtype=np.float32)
        assert np.array_equal(value, expected(int(site[1:]), item, token, width)), i
    pairs = set(zip(item.tolist(), token.tolist(), strict=True))
    assert len(pairs) == len(item)
    return pairs


def uncommit(folder: Path, part: int) -> None:
    """Take a part's commit record away."""
    (folder / record_path(part)).unlink()
