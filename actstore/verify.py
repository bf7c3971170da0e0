"""Find damage: every byte of a store against its commit records, or values against the model."""

import dataclasses
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from actstore import layout
from actstore.commit import read_sidecar, record_path
from actstore.crc import crc32c, crc32c_of_file, extend
from actstore.index import OK
from actstore.manifest import ArraySpec, FormatError
from actstore.quantise import LIMIT, to_float
from actstore.storage import LocalStorage
from actstore.store import Store

READ_BYTES = 8 << 20
"""Bytes fetched and summed at a time; a thread holds one such block."""

FILE_BYTES = 512 << 10
"""Bytes of a local file read and summed at a time: half of a core's second-level cache."""

_memory = threading.local()
"""Room for `FILE_BYTES` of every thread that reads."""

_SHARD = re.compile(r"c\.(\d+)\.0\.0\Z")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with a store."""

    part: int
    """Part it belongs to; -1 for an object of no part."""
    path: str
    """Object, relative to the store."""
    what: str
    """What is wrong."""

    def __str__(self) -> str:
        where = f"part {self.part}, " if self.part >= 0 else ""
        return f"{where}{self.path}: {self.what}"


def verify(
    store: Store, *, workers: int = 4, on_part: Callable[[int], None] | None = None
) -> list[Problem]:
    """Read every object of every committed part and compare size and CRC-32C with the record.

    Parameters
    ----------
    store
        The store.
    workers
        Threads that read.
    on_part
        Called with the number of every part that was read.

    Returns
    -------
    list[Problem]
        Damaged, missing and foreign objects, and links that leave the store; empty for a sound
        store. Parts that were never committed are no damage.
    """
    parts = np.flatnonzero(store.part_items >= 0).tolist()
    problems: list[Problem] = []
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    foreign = list(_foreign(store))  # first: a folder that is a link is one error, not one a part
    with ThreadPoolExecutor(workers, "verify") as pool:
        for part, found in zip(
            parts, pool.map(lambda p: list(_part_problems(store, p)), parts), strict=True
        ):
            problems += found
            if on_part is not None:
                on_part(part)
    return [*problems, *foreign]


def _part_problems(store: Store, part: int) -> Iterator[Problem]:
    try:
        commit = store.commit(part)
    except FormatError as error:
        yield Problem(part=part, path=record_path(part), what=str(error))
        return
    arrays = {layout.shard_path(a, part): a for a in store.manifest.arrays}
    for path in arrays:
        if path not in commit.objects:
            yield Problem(part=part, path=path, what="the commit record does not name it")
    for path, expected in sorted(commit.objects.items()):
        try:
            size = store.storage.size(path)
        except FormatError as error:  # a link that leaves the store
            yield Problem(part=part, path=path, what=str(error))
            continue
        if size is None:
            yield Problem(part=part, path=path, what="missing")
        elif size != expected["bytes"]:
            what = f"has {size} bytes, {expected['bytes']} were written"
            yield Problem(part=part, path=path, what=what)
        else:
            try:
                crc = _object_crc(store, path, size)
            except OSError as error:  # a bad sector is damage to report, not the end of the check
                yield Problem(part=part, path=path, what=f"cannot be read: {error}")
                continue
            if crc != expected["crc32c"]:
                what = "bytes changed: the checksum differs"
                if path in arrays:
                    what += _damaged_stripes(store, arrays[path], part)
                yield Problem(part=part, path=path, what=what)


def _object_crc(store: Store, path: str, size: int) -> int:
    if isinstance(store.storage, LocalStorage):
        if not hasattr(_memory, "room"):
            _memory.room = bytearray(FILE_BYTES)
        return crc32c_of_file(store.storage.uri(path), _memory.room)
    crc = 0
    for start in range(0, size, READ_BYTES):
        block = store.storage.read_range(path, start, READ_BYTES)
        crc = extend(crc, block)
    return crc


def _damaged_stripes(store: Store, array: ArraySpec, part: int) -> str:
    """Say which stripes of a shard differ from their checksums."""
    try:
        sums = read_sidecar(store.storage, store.commit(part)).checksums(array)
    except (FormatError, FileNotFoundError):
        return ""
    shard = store.shard(array.site, array.kind, part)
    bad = [
        number
        for number, (offset, length) in enumerate(shard.spans.tolist())
        if crc32c(store.storage.read_range(shard.path, offset, length)) != sums[number]
    ]
    if not bad:
        return " (in the index of the shard)"
    return f" (stripe {bad[0]}{f' and {len(bad) - 1} more' if len(bad) > 1 else ''})"


def _foreign(store: Store) -> Iterator[Problem]:
    """Yield objects beside the activations that no committed part explains."""
    for array in store.manifest.arrays:
        for name in sorted(store.storage.list(array.path)):
            match = _SHARD.match(name)
            path = f"{array.path}/{name}"
            if name == "zarr.json":
                continue
            if match is None or int(match.group(1)) >= store.manifest.n_parts:
                yield Problem(part=-1, path=path, what="foreign: not written by a harvest")
            elif store.is_complete and store.part_items[int(match.group(1))] < 0:
                yield Problem(part=-1, path=path, what="foreign: its part has no commit record")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """How stored values of one array compare with a fresh forward pass."""

    site: str
    """Site."""
    kind: str
    """Token kind."""
    items: int
    """Items compared."""
    largest: float
    """Largest absolute difference over the root mean square of the stored values."""
    differing: int
    """Values that differ by more than rounding to the stored dtype explains."""


def verify_against_model(
    store: Store, model: Any, source: Any, *, items: int, seed: int = 0, batch_size: int = 8
) -> list[Comparison]:
    """Run random items through the model again and compare with what is stored.

    A value passes when it lies within ``4 eps |v| + 1e-3 rms``, with eps of the stored dtype
    and rms over the array: another batch composition changes the last bits of a float32 pass.
    Of int8 half a step comes on top, and values beyond its range count as the largest one.

    Raises
    ------
    ValueError
        When the model or the data set is not the one of the manifest.
    """
    import torch

    from actstore.forward import Forward
    from actstore.sources import check_source
    from actstore.sources.base import ForModel
    from actstore.staging import tokens_of
    from vitmodels.spec import SiteInfo

    check_model(store, model)
    if isinstance(source, ForModel):
        source = source.for_model(model.spec)
    check_source(source, store.manifest.data)
    rows = store.table().select(["position", "source", "status", "key"]).to_pylist()
    generator = np.random.Generator(np.random.Philox(key=seed))
    count = min(items, len(rows))
    chosen = np.sort(generator.choice(len(rows), size=count, replace=False)).tolist()
    infos = {name: SiteInfo.from_json(info) for name, info in store.manifest.sites.items()}
    eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}.get(
        store.manifest.dtype, 2.0**-23
    )
    slack = 1e-3
    if autocast := store.manifest.compute.get("autocast"):
        eps, slack = max(eps, {"float16": 2.0**-10}.get(autocast, 2.0**-7)), 2e-2
    forward = Forward(model, list(infos), store.manifest.compute)
    worst = {a: (0.0, 0) for a in store.manifest.arrays}
    for start in range(0, count, batch_size):
        batch = [rows[i] for i in chosen[start : start + batch_size]]
        images = [_input(model, source, row["source"]) for row in batch]
        pieces: list[Mapping[str, torch.Tensor]] = []
        forward(images, pieces.append)
        values = {name: torch.cat([piece[name] for piece in pieces]) for name in infos}
        for array in store.manifest.arrays:
            where = [row["position"] for row in batch]
            tokens = store.tokens(where, array.site, array.kind) - array.first
            fresh = tokens_of(values[array.site], infos[array.site], array, tokens)
            stored = stored_items(store, array, where)
            moments = store.stats(array.site, array.kind)
            rms = float(np.sqrt(np.mean(moments.var + moments.mean**2))) or 1.0
            new = fresh.float().cpu().numpy()
            step = store.manifest.scale(array)
            if step is not None:  # what saturates is stored as the largest value
                new = np.clip(new, -LIMIT * step, LIMIT * step)
            gap = np.abs(new - stored)
            half = 0.0 if step is None else 0.5 * step
            beyond = int((gap > 4 * eps * np.abs(new) + half + slack * rms).sum())
            largest, before = worst[array]
            worst[array] = (max(largest, float(gap.max()) / rms), before + beyond)
    return [
        Comparison(site=a.site, kind=a.kind, items=count, largest=largest, differing=n)
        for a, (largest, n) in worst.items()
    ]


def stored_items(store: Store, array: ArraySpec, positions: Sequence[int]) -> np.ndarray:
    """Return whole items as float32 [item, token, channel] through zarr-python.

    Raises
    ------
    FormatError
        When zarr-python finds one damaged.
    """
    values = store.array(array.site, array.kind)
    try:
        rows = [np.asarray(values[position]) for position in positions]
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(
            f"{array.path} of {store.url} is damaged ({error}): `actstore verify {store.url}` "
            "names the parts, `actstore repair` harvests them again"
        ) from error
    return np.stack([to_float(row, store.manifest, array) for row in rows])


def check_model(store: Store, model: Any) -> None:
    """Refuse a model that is not the one of the manifest; ValueError names the fields."""
    there = store.manifest.model
    if there is None:
        raise ValueError(f"{store.url} was not made by a model, there is nothing to run again")
    here = model.spec.to_json()
    if differing := [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]:
        lines = [f"  {key}: {there.get(key)!r} -> {here.get(key)!r}" for key in differing]
        raise ValueError(
            f"the model is not the one {store.url} was harvested with (store -> model):\n"
            + "\n".join(lines)
        )


def _input(model: Any, source: Any, index: int) -> Any:
    import torch

    image = source.image(index)
    if isinstance(image, torch.Tensor | np.ndarray):
        return torch.as_tensor(image)
    return model.transform(image)


def skipped(store: Store) -> dict[str, int]:
    """Return how many items were skipped, by reason."""
    reasons: dict[str, int] = {}
    for status in store.index()["status"].to_pylist():
        if status != OK:
            reasons[status] = reasons.get(status, 0) + 1
    return reasons
