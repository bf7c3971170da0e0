"""Run the parts of a harvest: decoding, forward pass and writing overlap.

``run_parts(job, parts)`` is idempotent: a part that is committed stays as it is, one that is
not is computed again from the start and gives the same bytes on the same hardware.
"""

import contextlib
import dataclasses
import functools
import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actstore import segments
from actstore.commit import Commit
from actstore.forward import Forward
from actstore.index import OK
from actstore.manifest import Manifest
from actstore.order import keyed_permutation
from actstore.pipeline import PartPipeline
from actstore.plan import Plan
from actstore.sources.base import Source, Undecodable, Unreachable
from actstore.staging import Stager
from actstore.storage import Storage
from actstore.subsample import deal_part
from actstore.writer import PartBuffer

log = logging.getLogger(__name__)

ASKED = 16
"""Items that are tried before a data set is said to hold none that can be read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Something a harvest reports."""

    kind: str
    """``plan``, ``started`` (the plan can be carried out), ``items``, ``skipped``, ``part``
    (committed) or ``finished``."""
    part: int = -1
    """Number of the part, where there is one."""
    items: int = 0
    """Number of items this is about."""
    key: str = ""
    """Key of a skipped item."""
    message: str = ""
    """Why an item was skipped."""
    plan: Plan | None = None
    """The plan, in the first event."""
    parts_done: int = 0
    """Parts that were committed before, in the first event."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """All a part needs to be computed."""

    manifest: Manifest
    """Description of the store."""
    storage: Storage
    """Where the store lies."""
    source: Source
    """The data set."""
    model: Any
    """A `VisionModel`."""
    batch_size: int
    """Items of a forward pass."""
    workers: int
    """Threads that decode."""
    read_ahead: int = 3
    """Batches decoded ahead."""
    buffers: int = 2
    """Part buffers: one is written while another is filled."""
    strict: bool = False
    """Whether an undecodable item stops the harvest."""
    skip_unreachable: bool = False
    """Whether an item whose storage fails is skipped too, instead of stopping the harvest."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Decoded:
    """One item, decoded or not."""

    row: dict[str, Any]
    """Index columns without the position."""
    input: Tensor | None
    """Model input; None when the item was skipped."""


def source_positions(manifest: Manifest, part: int) -> np.ndarray:
    """Return the positions in the data set of the items planned for a part."""
    start = part * manifest.items_per_part
    positions = np.arange(start, start + manifest.planned(part), dtype=np.int64)
    order = manifest.order
    if order.get("kind") != "keyed":
        return positions
    return keyed_permutation(positions, int(order["source_items"]), int(order["seed"]))


def rank_and_world(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return (rank, world size) that torchrun or SLURM set, (0, 1) without them.

    Raises
    ------
    ValueError
        When the two do not fit together.
    """
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in environment and world in environment:
            pair = int(environment[rank]), int(environment[world])
            if not 0 <= pair[0] < pair[1]:
                raise ValueError(f"{rank}={pair[0]} does not fit {world}={pair[1]}")
            return pair
    return 0, 1


def decode(job: Job, index: int) -> _Decoded:
    """Return one item as model input, or why not.

    Raises
    ------
    ValueError
        With `strict`, when it cannot be decoded.
    Unreachable
        When its storage fails: an outage must not become a store with items missing.
    """
    row: dict[str, Any] = {"source": index}
    try:
        row |= job.source.row(index)
        image = job.source.image(index)
        if not isinstance(image, Tensor) and not isinstance(image, np.ndarray):
            image = job.model.transform(image)
        value = torch.as_tensor(image)
        expected = tuple(job.model.spec.input_shape)
        if value.ndim != len(expected) or value.shape[0] != expected[0]:
            raise Undecodable(f"gives an input of shape {list(value.shape)}, not {list(expected)}")
    except Unreachable as error:
        if not job.skip_unreachable or job.strict:
            raise Unreachable(
                f"the storage of the data failed at item {index}{_named(row)}: {error}; what was "
                "committed stays: run the same command again when it answers, or with "
                "--skip-unreachable, which leaves such items out"
            ) from error
        key = row.get("key", f"item-{index}")
        return _Decoded(row={"label": None, **row, "key": key, "status": str(error)}, input=None)
    except Undecodable as error:
        if job.strict:
            raise ValueError(
                f"item {index} ({row.get('key')}) {error}; without --strict it would be skipped"
            ) from error
        return _Decoded(row={**row, "status": str(error)}, input=None)
    return _Decoded(row={**row, "status": OK}, input=value)


def _named(row: Mapping[str, Any]) -> str:
    return f" ({row['key']})" if row.get("key") else ""


def _batches(job: Job, parts: Sequence[int]) -> Iterator[tuple[int, np.ndarray, bool]]:
    """Yield (part, source positions, whether it is the part's last) a batch."""
    for part in parts:
        positions = source_positions(job.manifest, part)
        for start in range(0, len(positions), job.batch_size):
            chosen = positions[start : start + job.batch_size]
            yield part, chosen, start + job.batch_size >= len(positions)


def decoded_ahead(
    job: Job, parts: Sequence[int], pool: ThreadPoolExecutor
) -> Generator[tuple[int, list[_Decoded], bool], None, None]:
    """Yield decoded batches in order, `read_ahead` of them being decoded meanwhile."""
    waiting: deque[tuple[int, list[Future[_Decoded]], bool]] = deque()
    try:
        for part, chosen, last in _batches(job, parts):
            futures = [pool.submit(decode, job, index) for index in chosen.tolist()]
            waiting.append((part, futures, last))
            if len(waiting) > job.read_ahead:
                number, ready, end = waiting.popleft()
                yield number, [future.result() for future in ready], end
        while waiting:
            number, ready, end = waiting.popleft()
            yield number, [future.result() for future in ready], end
    finally:
        for _, futures, _ in waiting:
            for future in futures:
                future.cancel()


def run_parts(
    job: Job,
    parts: Iterable[int],
    *,
    on_event: Callable[[Event], None],
    refuse_empty: bool = True,
) -> None:
    """Compute and commit parts in order.

    With `refuse_empty` the first of them, or the next `ASKED` items, must hold one that can be
    read: what is wrong with all items is found before hours have gone.

    Raises
    ------
    ValueError
        When a value does not fit the stored dtype, with `strict` an item cannot be decoded,
        or no item of the first part can.
    OSError
        When the medium fails; what was committed stays.
    """
    todo = list(parts)
    if not todo:
        return
    sites = {name: info for name, info in job.model.sites().items() if name in job.manifest.sites}
    stager = Stager(job.manifest, sites)
    forward = Forward(job.model, list(job.manifest.sites), job.manifest.compute)

    ends = {part // segments.SPAN: part for part in todo} if len(todo) > 1 else {}

    def committed(commit: Commit) -> None:
        number = commit.part // segments.SPAN
        if ends.get(number) == commit.part:
            segments.seal(job.storage, job.manifest, number)
        on_event(Event(kind="part", part=commit.part, items=commit.items))

    with (
        ThreadPoolExecutor(job.workers, "decode") as decoders,
        PartPipeline(
            job.storage, job.manifest, buffers=job.buffers, on_commit=committed
        ) as pipeline,
        contextlib.closing(decoded_ahead(job, todo, decoders)) as batches,
    ):
        buffer: PartBuffer | None = None
        rows: list[dict[str, Any]] = []
        for part, decoded, last in batches:
            if buffer is None:
                buffer, rows = pipeline.next_buffer(), []
                buffer.positions = deal_part(job.manifest, part)
            inputs = [item.input for item in decoded if item.input is not None]
            with torch.inference_mode():
                forward(inputs, functools.partial(stager.put, buffer))
            rows += [item.row for item in decoded]
            _report(part, decoded, on_event)
            if last:
                stager.flush()
                empty = refuse_empty and part == todo[0] and not buffer.items
                if empty and not _others_readable(job, part):
                    raise ValueError(
                        f"none of the {len(rows)} items of the first part can be read, nor the "
                        f"{ASKED} after them; {rows[0].get('key')}: {rows[0]['status']}: check "
                        "what --data names"
                    )
                _number(rows, part * job.manifest.items_per_part)
                pipeline.submit(part, buffer, rows)
                buffer = None


def _others_readable(job: Job, part: int) -> bool:
    """Whether one of the items after a part can be read; parts of a small data set hold one."""
    size, items = job.manifest.items_per_part, job.manifest.items
    start = min(items, (part + 1) * size)
    places = list(range(start, min(items, start + ASKED))) or list(range(min(ASKED, items)))
    for place in places:
        other, row = divmod(place, size)
        index = int(source_positions(job.manifest, other)[row])
        if decode(job, index).input is not None:
            return True
    return False


def _report(part: int, decoded: Sequence[_Decoded], on_event: Callable[[Event], None]) -> None:
    for item in decoded:
        if item.input is None:
            row = item.row
            log.warning("skipped %s: %s", row.get("key"), row["status"])
            on_event(
                Event(
                    kind="skipped", part=part, key=str(row.get("key")), message=str(row["status"])
                )
            )
    on_event(Event(kind="items", part=part, items=len(decoded)))


def _number(rows: list[dict[str, Any]], start: int) -> None:
    """Give the valid rows their positions in the store, packed at the front of the part."""
    position = start
    for row in rows:
        row["position"] = position if row["status"] == OK else None
        position += row["status"] == OK
