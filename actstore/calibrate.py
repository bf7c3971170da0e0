"""Decide the scales of an int8 harvest, once, from its first items.

The items are those of the first batches of the plan, until `CALIBRATION` have been read. The
scales then stand in the manifest: whoever goes on with the store, or is another rank of the
same run, takes them from there, and every part is the same whoever computes it.
"""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from actstore.execute import Job, decoded_ahead
from actstore.forward import Forward
from actstore.manifest import ArraySpec, Manifest, encode_scale
from actstore.moments import channel_moments
from actstore.quantise import CALIBRATION, calibrated
from actstore.staging import tokens_of
from actstore.stats import ChannelStats
from actstore.storage import Storage
from actstore.store import check_same, create_store, read_manifest
from actstore.writer import check_range


def first_moments(job: Job) -> dict[ArraySpec, ChannelStats]:
    """Return the moments of every array over the first items, in float32.

    Raises
    ------
    ValueError
        When a value is not finite, or none of the items can be read.
    """
    manifest = job.manifest
    sites = {name: info for name, info in job.model.sites().items() if name in manifest.sites}
    forward = Forward(job.model, list(manifest.sites), manifest.compute)
    total = {array: ChannelStats.empty(array.channels) for array in manifest.arrays}

    def take(values: Mapping[str, Tensor]) -> None:
        for array in manifest.arrays:
            whole = dataclasses.replace(array, tokens=array.span, of=0, stripe_tokens=1)
            picked = tokens_of(values[array.site], sites[array.site], whole)
            rows = np.ascontiguousarray(picked.float().cpu().numpy()).reshape(-1, array.channels)
            check_range(array, rows, "float32")
            total[array] = total[array].merge(channel_moments(rows[None], "float32"))

    seen = read = 0
    with ThreadPoolExecutor(job.workers, "decode") as decoders:
        batches = decoded_ahead(job, range(manifest.n_parts), decoders)
        try:
            for _, decoded, _ in batches:
                inputs = [item.input for item in decoded if item.input is not None]
                with torch.inference_mode():
                    forward(inputs, take)
                seen, read = seen + len(decoded), read + len(inputs)
                if seen >= CALIBRATION:
                    break
        finally:
            batches.close()
    if not read:
        raise ValueError(
            f"none of the first {seen} items can be read: int8 has nothing to scale by"
        )
    return total


def with_scales(job: Job) -> Job:
    """Return the job of an int8 harvest with its scales in the manifest; others as they are."""
    manifest = job.manifest
    if manifest.dtype != "int8" or manifest.scales:
        return job
    moments = first_moments(job)
    scales = {a.path: encode_scale(calibrated(moments[a])) for a in manifest.arrays}
    return dataclasses.replace(job, manifest=dataclasses.replace(manifest, scales=scales))


def create_calibrated(storage: Storage, manifest: Manifest) -> Manifest:
    """Create the store, or find the one that another rank made meanwhile; return its manifest.

    Another rank's scales may differ in their last bits: those that were written first count.

    Raises
    ------
    ValueError
        When the place holds another store.
    """
    try:
        create_store(storage, manifest)
    except ValueError:
        there = read_manifest(storage)
        if there is None or not manifest.scales:
            raise
        manifest = dataclasses.replace(manifest, scales=there.scales)
        check_same(storage, manifest)
        create_store(storage, manifest)
    return manifest
