"""Harvest: run a model over a data set once and keep its activations in a store."""

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actstore.calibrate import create_calibrated, with_scales
from actstore.codec import profile
from actstore.compile import compiler_memory
from actstore.execute import Event, Job, rank_and_world, run_parts
from actstore.forward import check_compute
from actstore.manifest import Manifest
from actstore.plan import (
    Plan,
    choose_arrays,
    choose_layout,
    disk_bytes,
    forward_bytes,
    keep_some,
    part_bytes,
)
from actstore.segments import seal_all
from actstore.sources import open_source
from actstore.sources.base import ForModel
from actstore.storage import Storage, open_storage
from actstore.store import Store, check_same, read_manifest

if TYPE_CHECKING:
    from vitmodels.spec import SiteInfo

log = logging.getLogger(__name__)

READ_AHEAD = 3
"""Batches decoded ahead of the forward pass."""


def harvest(
    *,
    model: Any,
    data: Any,
    sites: str | Sequence[str],
    out: str | os.PathLike[str],
    tokens: str | Sequence[str] = "cls,patch",
    tokens_per_item: int | None = None,
    dtype: str | None = None,
    codec: str = "raw",
    limit: int | None = None,
    seed: int = 0,
    device: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    strict: bool = False,
    skip_unreachable: bool = False,
    memory: int | None = None,
    autocast: str | None = None,
    compile: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Store:
    """Store the activations of `sites` for every item of `data`; an unfinished store goes on.

    Parameters
    ----------
    model
        Name known to `vitmodels.load`, or a loaded `VisionModel`.
    data
        ``"digits"``, a path or URL, or a map-style data set object; see `actstore.sources`.
    sites
        Names or patterns: ``blocks.{5,7}.resid_post``, ``blocks.*.mlp_out``.
    out
        Where the store goes.
    tokens
        Token kinds to keep, of ``cls``, ``register`` and ``patch``.
    tokens_per_item
        Patch tokens to keep of an item, a random subset keyed by seed and item; all by default.
    dtype
        Activation dtype on disk: float16 (default), bfloat16, float32, or int8 with a scale for
        each channel, calibrated on the first items.
    codec
        Codec profile: ``raw``; ``archive``, compressed, in bfloat16 unless `dtype` is given;
        ``int8``, the same as that dtype.
    limit
        Number of items, a keyed random choice of the data set; all by default.
    seed
        Key of the permutation of the items.
    device
        Where the model runs; ``auto`` takes CUDA, then MPS, then the CPU.
    batch_size
        Items of a forward pass, halved when the device runs out of memory; it decides the last
        bits of the values.
    workers
        Threads that decode; as many as cores by default, at most 16.
    strict
        Stop at the first item that cannot be decoded instead of skipping it.
    skip_unreachable
        Skip items whose storage fails too, as many do in old lists of URLs; by default that stops
        the harvest, for an outage looks the same.
    memory
        Bytes allowed for part buffers; by default two fifths of what is available, at most 8 GB.
    autocast
        Type the forward pass runs in, ``bfloat16`` or ``float16``; that of the weights by default.
    compile
        Compile the model block by block with `torch.compile`.
    storage_options
        Options of the storage of `data` and `out`.
    on_event
        Called with every `Event`: the plan, progress, skipped items, committed parts.

    Raises
    ------
    ValueError
        When the place holds another store, disk or memory do not suffice, or a value does not
        fit the dtype.
    """
    storage = open_storage(out, storage_options)
    job, plan = prepare(
        model=model,
        data=data,
        sites=sites,
        storage=storage,
        tokens=tokens,
        tokens_per_item=tokens_per_item,
        dtype=dtype,
        codec=codec,
        limit=limit,
        seed=seed,
        device=device,
        batch_size=batch_size,
        workers=workers,
        strict=strict,
        skip_unreachable=skip_unreachable,
        memory=memory,
        autocast=autocast,
        compile=compile,
        storage_options=storage_options,
    )
    report = on_event or _ignore
    done = Store(storage, plan.manifest) if plan.resumed else None
    committed = 0 if done is None else int((done.part_items >= 0).sum())
    report(Event(kind="plan", plan=plan, parts_done=committed))
    written = plan.disk * committed // max(1, plan.manifest.n_parts)
    plan.check(free_disk=free_disk(storage), free_memory=available_memory(), done=written)
    report(Event(kind="started"))
    job = with_scales(job)
    job = dataclasses.replace(job, manifest=create_calibrated(storage, job.manifest))
    store = Store(storage, job.manifest)
    seal_all(store)
    rank, world = rank_and_world()
    mine = [part for part in store.missing_parts if part % world == rank]
    run_parts(job, mine, on_event=report, refuse_empty=not store.n_items)
    store.refresh()
    if store.is_complete:
        store.compact()
    report(Event(kind="finished", items=store.n_items))
    return store


def dry_run(*, out: str | os.PathLike[str], **options: Any) -> Plan:
    """Return the plan of a harvest without writing anything; options as for `harvest`."""
    storage = open_storage(out, options.get("storage_options"))
    return prepare(storage=storage, **options)[1]


def prepare(
    *,
    model: Any,
    data: Any,
    sites: str | Sequence[str],
    storage: Storage,
    tokens: str | Sequence[str] = "cls,patch",
    tokens_per_item: int | None = None,
    dtype: str | None = None,
    codec: str = "raw",
    limit: int | None = None,
    seed: int = 0,
    device: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    strict: bool = False,
    skip_unreachable: bool = False,
    memory: int | None = None,
    autocast: str | None = None,
    compile: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> tuple[Job, Plan]:
    """Load model and data and plan the store, without writing anything."""
    from vitmodels.spec import expand_sites

    codec, dtype = profile(codec, dtype)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    check_compute(autocast)
    source = open_source(data, storage_options)
    if not len(source):
        raise ValueError(f"the data set {data!r} is empty")
    loaded = load_model(model, device)
    if isinstance(source, ForModel):
        source = source.for_model(loaded.spec)
    available = loaded.sites()
    names = expand_sites(sites, [n for n, info in available.items() if info.readable])
    chosen: dict[str, SiteInfo] = {name: available[name] for name in names}
    kinds = tokens.split(",") if isinstance(tokens, str) else list(tokens)
    arrays = choose_arrays(chosen, [kind.strip() for kind in kinds])
    if tokens_per_item is not None:
        arrays = keep_some(arrays, tokens_per_item)
    items = min(limit or len(source), len(source))
    there = read_manifest(storage)
    on_cpu = str(loaded.device) == "cpu"
    batch = batch_size or (there and there.compute.get("batch_size")) or (16 if on_cpu else 128)
    budget = memory or min(8 << 30, available_memory() * 2 // 5)
    per_part, laid = choose_layout(
        arrays, items=items, dtype=dtype, budget=budget, remote="://" in storage.url
    )
    manifest = Manifest(
        items=items,
        items_per_part=per_part,
        arrays=tuple(laid),
        dtype=dtype,
        codec=codec,
        sites={name: info.to_json() for name, info in chosen.items()},
        order={"kind": "keyed", "seed": seed, "source_items": len(source)},
        data=source.describe(),
        model=loaded.spec.to_json(),
        compute={
            "batch_size": int(batch),
            **({"autocast": autocast} if autocast else {}),
            **({"compile": True} if compile else {}),
        },
    )
    if there is not None:
        manifest = _with_layout_of(manifest, there)
        check_same(storage, manifest)
    threads = workers or min(16, os.cpu_count() or 1)
    buffers = min(2, manifest.n_parts)
    forward = forward_bytes(loaded.spec, chosen, int(batch), READ_AHEAD * int(batch) + threads)
    plan = Plan(
        manifest=manifest,
        resumed=there is not None,
        disk=disk_bytes(manifest),
        memory=projected_memory(manifest, forward, buffers) + getattr(source, "memory", 0),
        buffers=buffers,
        forward_memory=forward,
    )
    job = Job(
        manifest=manifest,
        storage=storage,
        source=source,
        model=loaded,
        batch_size=int(batch),
        workers=threads,
        read_ahead=READ_AHEAD,
        buffers=buffers,
        strict=strict,
        skip_unreachable=skip_unreachable,
    )
    return job, plan


def projected_memory(manifest: Manifest, forward: int, buffers: int) -> int:
    """Return the projected peak of this process: what it has now, and what a harvest adds."""
    from actstore.plan import SLACK

    largest = max(a.channels for a in manifest.arrays) * manifest.items_per_part
    statistics = 16 * largest * max(a.stripe_tokens for a in manifest.arrays)
    adds = buffers * part_bytes(manifest) + forward + statistics + compiler_memory() + SLACK
    return resident_memory() + adds


def _with_layout_of(manifest: Manifest, there: Manifest) -> Manifest:
    """Take S, stripes and scales from a store of the same arrays: they are decided once."""
    asked = {(a.site, a.kind, a.tokens, a.of, a.channels) for a in manifest.arrays}
    found = {(a.site, a.kind, a.tokens, a.of, a.channels) for a in there.arrays}
    if asked != found or manifest.items != there.items:
        return manifest
    scales = there.scales if manifest.dtype == there.dtype else {}
    return dataclasses.replace(
        manifest, items_per_part=there.items_per_part, arrays=there.arrays, scales=scales
    )


def load_model(model: Any, device: str, **options: Any) -> Any:
    """Return a loaded model from its name, on the device asked for; a loaded one as it is."""
    if not isinstance(model, str):
        return model
    import vitmodels

    return vitmodels.load(model, device=choose_device(device), **options)


def choose_device(device: str) -> str:
    """Return the device ``auto`` stands for.

    Raises
    ------
    ValueError
        There is no such device, or not on this machine.
    """
    import torch

    if device != "auto":
        _check_device(device)
        return device
    if torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _check_device(device: str) -> None:
    import torch

    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"no device is called {device!r}; there are auto, cpu, cuda, cuda:1, mps"
        ) from None
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    count = there.get(found.type)
    if count is not None and (found.index or 0) >= count:
        raise ValueError(
            f"device {device!r} is not on this machine, which has {count} of that kind; "
            "auto takes the best there is, cpu is always there"
        )


def free_disk(storage: Storage) -> int | None:
    """Return the free bytes where a store lies, None when it is not on a local disk."""
    if "://" in storage.url and not storage.url.startswith(("file://", "local://")):
        return None
    folder = Path(storage.uri("")).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def available_memory() -> int:
    """Return the bytes this process may hold: what it has plus what the system can give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 + resident_memory()
    return 8 << 30


def resident_memory() -> int:
    """Return the bytes of memory this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _ignore(event: Event) -> None:
    """Take an event and do nothing."""
