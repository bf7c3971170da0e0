"""Make damaged parts again, and remove what killed runs left behind."""

import logging
import os
import re
import socket
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from actstore import layout
from actstore.commit import committed_parts, index_path, record_path, sidecar_path
from actstore.manifest import Manifest
from actstore.segments import seal_all, stale, unseal
from actstore.storage import LocalStorage, Storage
from actstore.store import Store
from actstore.subsample import chunk_path, sampled

if TYPE_CHECKING:
    from actstore.execute import Event

log = logging.getLogger(__name__)

_TEMPORARY = re.compile(r"(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]+-\d+\Z")
_SHARD = re.compile(r"c\.(\d+)\.0\.0\Z")


def repair(
    store: Store,
    model: Any,
    source: Any,
    parts: Iterable[int],
    *,
    workers: int | None = None,
    skip_unreachable: bool = False,
    on_event: "Callable[[Event], None] | None" = None,
) -> Store:
    """Harvest the given parts again; their bytes become those of the first run.

    The record of a part is removed first: while it is repaired the part does not exist.

    Raises
    ------
    ValueError
        When model or data set are not those of the manifest, or a part is not of the plan.
    """
    from actstore.execute import Job, run_parts
    from actstore.sources import check_source
    from actstore.verify import check_model

    manifest = store.manifest
    todo = sorted(set(parts))
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    if wrong := [part for part in todo if not 0 <= part < manifest.n_parts]:
        raise ValueError(f"{store.url} has parts 0 to {manifest.n_parts - 1}, not {wrong[0]}")
    if manifest.order.get("kind") == "converted":
        raise ValueError(
            f"{store.url} was converted from the store {manifest.order.get('of')}: convert that "
            "one again, after removing parts/<part>.json of the damaged parts and segments/"
        )
    check_model(store, model)
    check_source(source, manifest.data)
    job = Job(
        manifest=manifest,
        storage=store.storage,
        source=source,
        model=model,
        batch_size=int(manifest.compute["batch_size"]),
        workers=workers or min(16, os.cpu_count() or 1),
        skip_unreachable=skip_unreachable,
    )
    for part in todo:
        unseal(store.storage, part)
        store.storage.delete(record_path(part))
        unseal(store.storage, part)  # a harvester may have made it meanwhile
    run_parts(job, todo, on_event=on_event or (lambda event: None))
    whole = Store(store.storage, manifest)
    if whole.is_complete:
        whole.compact()
    return whole


def garbage(storage: Storage, manifest: Manifest) -> list[str]:
    """Return what killed runs left: unfinished files, uncommitted objects, wrong segments.

    A temporary file of a process that lives on this host is not garbage. Objects of an
    uncommitted part may be those of a harvest that runs now: collect when none does.
    """
    found = []
    for name in storage.list(LocalStorage.TEMPORARY):
        match = _TEMPORARY.match(name)
        if match and not _alive(match["host"], int(match["pid"])):
            found.append(f"{LocalStorage.TEMPORARY}/{name}")
    committed = set(committed_parts(storage))
    for array in manifest.arrays:
        for name in storage.list(array.path):
            match = _SHARD.match(name)
            if match and int(match.group(1)) not in committed:
                part = int(match.group(1))
                if part < manifest.n_parts:
                    found.append(layout.shard_path(array, part))
    kinds = sampled(manifest)
    for part in range(manifest.n_parts):
        if part not in committed:
            some = [sidecar_path(part), index_path(part), *(chunk_path(k, part) for k in kinds)]
            found += [path for path in some if storage.size(path) is not None]
    return sorted([*found, *stale(storage, manifest, committed)])


def collect(store: Store) -> list[str]:
    """Remove garbage and return what was removed; make the segments that are missing."""
    found = garbage(store.storage, store.manifest)
    for path in found:
        store.storage.delete(path)
    store.refresh()
    seal_all(store)
    return found


def _alive(host: str, pid: int) -> bool:
    """Return whether a process may still live; of other hosts nothing is known, so it may."""
    if host != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
