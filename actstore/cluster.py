"""Harvest on a dask.distributed cluster: parts are tasks, the client plans and reports.

The client creates the store; a worker process loads model and data set once and computes any
part. A part of a lost worker goes to another one, and gives the same bytes there.
"""

import dataclasses
import importlib
import itertools
import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from actstore.calibrate import create_calibrated, with_scales
from actstore.commit import read_commit, record_path
from actstore.execute import Event, Job, run_parts
from actstore.harvester import READ_AHEAD, choose_device, free_disk, load_model, prepare
from actstore.manifest import Manifest
from actstore.scheduler import connect
from actstore.sources import Unreachable, check_source, reopen_source
from actstore.storage import open_storage
from actstore.store import Store, read_manifest

log = logging.getLogger(__name__)

RETRIES = 3
"""Times a part is tried again after an error of the medium."""

AT_ONCE = 2
"""Parts a worker process computes side by side: one is decoded or written, one is forwarded."""

QUEUED = 4
"""Parts handed to the scheduler for each thread of the cluster; more follow as parts end."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Ticket:
    """All a worker needs to make its `Job`; travels to every worker once."""

    manifest: dict[str, Any]
    """The manifest as JSON."""
    url: str
    """The store, absolute."""
    storage_options: dict[str, Any] | None = dataclasses.field(repr=False)
    """Options of the storage; not shown, a worker logs what its tasks were given."""
    model: str
    """Name of the model."""
    load: dict[str, Any]
    """Options of `vitmodels.load`."""
    device: str
    """Where it runs."""
    source: Any = dataclasses.field(repr=False)
    """The data set, if it cannot be opened again from its description."""
    workers: int | None
    """Threads that decode."""
    strict: bool
    """Whether an undecodable item stops the harvest."""
    skip_unreachable: bool
    """Whether an item whose storage fails is skipped."""
    id: str
    """Of this run."""


class _OneAtATime:
    """A model that several threads may run, one after the other."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def run(self, x: Any, **options: Any) -> Any:
        """See `VisionModel.run`."""
        with self._lock:
            return self._model.run(x, **options)


_jobs: dict[str, Job] = {}
_loading = threading.Lock()
_running = threading.BoundedSemaphore(AT_ONCE)


def _job(ticket: _Ticket) -> Job:
    """Return what this process computes parts with, made when it is first asked for.

    Raises
    ------
    ValueError
        When this host sees another store, data set or model than the client.
    """
    with _loading:
        if ticket.id in _jobs:
            return _jobs[ticket.id]
        manifest = Manifest.from_json(ticket.manifest)
        storage = open_storage(ticket.url, ticket.storage_options)
        there = read_manifest(storage)
        host = socket.gethostname()
        if there is None or there.fingerprint != manifest.fingerprint:
            raise ValueError(
                f"worker on {host} does not see the store at {ticket.url}: it must lie on S3 or in "
                "a folder that all machines share"
            )
        if ticket.source is None:
            source = reopen_source(manifest.data, ticket.storage_options)
        else:
            source = ticket.source
            check_source(source, manifest.data)
        model = load_model(ticket.model, ticket.device, **ticket.load)
        if model.spec.to_json() != manifest.model:
            raise ValueError(
                f"worker on {host} loads another {ticket.model} than the client: same weights and "
                "same versions are needed (`pip freeze` on both)"
            )
        _jobs.clear()
        _jobs[ticket.id] = Job(
            manifest=manifest,
            storage=storage,
            source=source,
            model=_OneAtATime(model),
            batch_size=int(manifest.compute["batch_size"]),
            workers=ticket.workers or min(16, os.cpu_count() or 1),
            read_ahead=READ_AHEAD,
            buffers=1,
            strict=ticket.strict,
            skip_unreachable=ticket.skip_unreachable,
        )
        return _jobs[ticket.id]


def _ready(ticket: _Ticket) -> _Ticket:
    """Be the task whose result is the ticket: when all copies are lost it is made again."""
    return ticket


def _harvest_part(ticket: _Ticket, part: int, refuse_empty: bool) -> list[Event] | str:
    """Compute and commit one part on a worker.

    Returns
    -------
    list of Event, or str
        What happened; or the words of an error that trying again would not mend.

    Raises
    ------
    Unreachable
        When the storage of the data fails; without a cause, for that of a client of HTTP cannot
        travel to another process.
    """
    events: list[Event] = []
    failure = ""
    try:
        job = _job(ticket)
        if job.storage.size(record_path(part)) is None:
            with _running:
                run_parts(job, [part], on_event=events.append, refuse_empty=refuse_empty)
        else:
            items = job.manifest.planned(part)
            done = read_commit(job.storage, part).items
            events = [
                Event(kind=k, part=part, items=n) for k, n in (("items", items), ("part", done))
            ]
    except (ValueError, KeyError, FileNotFoundError) as error:
        log.warning("part %d: %s", part, error)
        return f"part {part}: {error}"
    except Unreachable as error:
        failure = str(error)
    if failure:
        raise Unreachable(failure)
    return events


def harvest_on(
    scheduler: Any,
    *,
    model: str,
    data: Any,
    sites: str | Sequence[str],
    out: str | os.PathLike[str],
    load: Mapping[str, Any] | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    strict: bool = False,
    memory: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    on_event: Callable[[Event], None] | None = None,
    **options: Any,
) -> Store:
    """Harvest as `actstore.harvest` does, with the parts computed by the workers of a cluster.

    Parameters
    ----------
    scheduler
        Address of the scheduler, or a client of it.
    model
        Name known to `vitmodels.load`; every worker process loads it once.
    load
        Further options of `vitmodels.load`: weights (a file that all machines see), pretrained,
        seed, img_size.
    data, sites, out, batch_size, strict, storage_options, options
        As for `actstore.harvest`, whose other options (tokens, dtype, limit, ...) go here by name.
        A local `out` must be a folder that all machines share.
    device
        Where the model runs on a worker.
    workers
        Threads that decode in a worker process.
    memory
        Bytes allowed for part buffers of a worker process; two fifths of the memory limit of the
        smallest worker by default, at most 8 GB.
    on_event
        Called in this process with every `Event`, a part at a time.

    Raises
    ------
    ValueError
        As for `actstore.harvest`; or when there is no cluster, a worker sees another store, data
        set or model, or a part took several workers with it.
    """
    if not isinstance(model, str):
        raise ValueError(
            "on a cluster the model must be a name that workers can load, not "
            f"{type(model).__name__}"
        )
    client = connect(scheduler) if isinstance(scheduler, str) else scheduler
    try:
        there = os.fspath(out)
        there = there if "://" in there else os.path.abspath(there)
        storage = open_storage(there, storage_options)
        loading = dict(load or {})
        job, plan = prepare(
            model=load_model(model, "cpu", **loading),
            data=data,
            sites=sites,
            storage=storage,
            device="cpu",
            batch_size=batch_size or _batch_size(client, device),
            workers=workers,
            strict=strict,
            memory=memory or _memory(client),
            storage_options=storage_options,
            **options,
        )
        report = on_event or (lambda event: None)
        done = int((Store(storage, plan.manifest).part_items >= 0).sum()) if plan.resumed else 0
        report(Event(kind="plan", plan=plan, parts_done=done))
        written = plan.disk * done // max(1, plan.manifest.n_parts)
        limit_bytes = _least_limit(client)
        plan.check(free_disk=free_disk(storage), free_memory=limit_bytes or 1 << 62, done=written)
        report(Event(kind="started"))
        manifest = create_calibrated(storage, with_scales(job).manifest)
        store = Store(storage, manifest)
        ticket = _Ticket(
            manifest=manifest.to_json(),
            url=there,
            storage_options=dict(storage_options) if storage_options else None,
            model=model,
            load=loading,
            device=device,
            source=None if _reopens(job.source) else job.source,
            workers=workers,
            strict=strict,
            skip_unreachable=job.skip_unreachable,
            id=uuid.uuid4().hex,
        )
        first = None if store.n_items else next(iter(store.missing_parts), None)
        for events in _completed(client, ticket, store.missing_parts, first):
            for event in events:
                report(event)
    finally:
        if isinstance(scheduler, str):
            client.close()
    store.refresh()
    if store.is_complete:
        store.compact()
    report(Event(kind="finished", items=store.n_items))
    return store


def _completed(
    client: Any, ticket: _Ticket, parts: Sequence[int], refused_empty: int | None
) -> Iterator[list[Event]]:
    """Yield the events of each part as it is committed, keeping the queue short."""
    distributed: Any = importlib.import_module("distributed")
    shared = client.submit(_ready, ticket, key=f"ticket-{ticket.id}")
    waiting = iter(parts)
    running: dict[Any, int] = {}

    def start(part: int) -> Any:
        future = client.submit(
            _harvest_part,
            shared,
            part,
            part == refused_empty,
            key=f"harvest-{ticket.id}-{part}",
            retries=RETRIES,
        )
        running[future] = part
        return future

    queue = QUEUED * max(1, sum(client.nthreads().values()))
    first = [start(part) for part in itertools.islice(waiting, queue)]
    finished = distributed.as_completed(first, loop=client.loop)
    try:
        for future in finished:
            part = running.pop(future)
            try:
                result = future.result()
            except distributed.KilledWorker as error:
                raise ValueError(
                    f"part {part} took several workers with it, perhaps they lack memory: a "
                    "smaller --memory or --batch-size, or larger workers; what was committed stays"
                ) from error
            if isinstance(result, str):
                raise ValueError(result)
            if (following := next(waiting, None)) is not None:
                finished.add(start(following))
            yield result
    finally:
        client.cancel([*running, shared])


def _reopens(source: Any) -> bool:
    """Whether workers can open a data set from its description, and so check that they see it."""
    here = type(source).__module__.startswith("actstore.sources.")
    return here and source.describe().get("kind") != "python"


def _batch_size(client: Any, device: str) -> int | None:
    """Return the batch size for workers with a GPU, None where they have none.

    Raises
    ------
    ValueError
        When some have one and some not: their bits would differ.
    """
    found = client.run(choose_device, device)
    kinds = {name.partition(":")[0] for name in found.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"the workers have different devices ({', '.join(sorted(kinds))}), whose values differ "
            "in the last bits: give --device, or workers of one kind"
        )
    return None if kinds == {"cpu"} else 128


def _least_limit(client: Any) -> int:
    """Return the smallest memory limit of a worker in bytes, 0 when none has one."""
    infos = client.scheduler_info(n_workers=-1)["workers"].values()
    limits = [int(info.get("memory_limit") or 0) for info in infos]
    return min((limit for limit in limits if limit), default=0)


def _memory(client: Any) -> int | None:
    """Return the room for part buffers in a worker process, None when it has no limit."""
    limit = _least_limit(client)
    return min(8 << 30, limit * 2 // 5) if limit else None
