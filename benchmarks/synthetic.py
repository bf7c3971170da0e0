"""A store of values that look like activations, written part by part in bounded memory.

A token is ``mean + gain * (A z_item + B z_token + noise)``: a few channels are massive, tokens of
an image are alike, and the spectrum falls off, as in the residual stream of a ViT.
"""

import numpy as np
import pyarrow as pa

from actstore.manifest import ArraySpec, Manifest
from actstore.order import keyed_permutation
from actstore.pipeline import PartPipeline
from actstore.storage import open_storage
from actstore.store import Store, create_store
from benchmarks.values import channel_statistics

RANK = 32


def write_synthetic(
    url: str,
    *,
    items: int,
    sites: int = 1,
    patches: int = 196,
    channels: int = 768,
    items_per_part: int = 256,
    stripe_tokens: int = 1,
    seed: int = 0,
) -> Store:
    """Write a store with `sites` sites of CLS and patches, items permuted, labels sorted."""
    arrays = []
    for s in range(sites):
        site = f"blocks.{s}.resid_post"
        arrays.append(ArraySpec(site=site, kind="cls", tokens=1, channels=channels))
        arrays.append(
            ArraySpec(
                site=site,
                kind="patch",
                tokens=patches,
                channels=channels,
                first=1,
                stripe_tokens=stripe_tokens,
            )
        )
    manifest = Manifest(
        items=items,
        items_per_part=items_per_part,
        arrays=tuple(arrays),
        order={"kind": "keyed", "seed": seed, "source_items": items},
        data={"kind": "synthetic", "seed": seed},
    )
    storage = open_storage(url)
    create_store(storage, manifest)
    store = Store(storage, manifest)
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(RANK, channels)).astype(np.float32)
    mean, gain = channel_statistics(rng, channels)
    with PartPipeline(storage, manifest) as pipeline:
        for part in store.missing_parts:
            count = manifest.planned(part)
            source = keyed_permutation(
                np.arange(part * items_per_part, part * items_per_part + count), items, seed
            )
            buffer = pipeline.next_buffer()
            values = {}
            for array in arrays:
                of_item = rng.normal(size=(count, 1, RANK)).astype(np.float32)
                of_token = rng.normal(size=(count, array.tokens, RANK)).astype(np.float32)
                of_token += of_item
                flat = of_token.reshape(-1, RANK) @ mix
                values[array] = (
                    (flat * gain + mean).reshape(count, array.tokens, channels).astype("f2")
                )
            buffer.append(values)
            rows = pa.table(
                {
                    "position": np.arange(part * items_per_part, part * items_per_part + count),
                    "source": source,
                    "key": [str(i) for i in source.tolist()],
                    "label": source * 100 // items,
                    "label_name": [str(i) for i in (source * 100 // items).tolist()],
                    "status": ["ok"] * count,
                }
            )
            pipeline.submit(part, buffer, rows)
    store.refresh()
    return store
