"""What the command line draws: progress bars and tables."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from actstore.plan import Plan, size
from actstore.store import Store, open_store

if TYPE_CHECKING:
    from actstore.cli import Harvest, Verify
    from actstore.execute import Event

_PASSED_ON = (
    "data",
    "sites",
    "tokens",
    "tokens_per_item",
    "dtype",
    "codec",
    "limit",
    "seed",
    "device",
    "batch_size",
    "workers",
    "strict",
    "skip_unreachable",
    "memory",
    "autocast",
    "compile",
    "storage_options",
)
"""Options of the command that `harvest` takes as they are."""


@contextlib.contextmanager
def progress_bars(console: Console) -> Iterator[Progress]:
    """Give the bars every long command shows.

    They appear with `start`, when the work begins: an error before it does not follow empty bars.
    """
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    try:
        yield progress
    finally:
        if progress.live.is_started:
            progress.stop()


def plan_table(plan: Plan, parts_done: int = 0, title: str = "plan") -> Table:
    """Return the plan as a table."""
    m = plan.manifest
    table = Table(title=title, show_header=False)
    sites = list(dict.fromkeys(a.site for a in m.arrays))
    kinds = list(dict.fromkeys(a.kind for a in m.arrays))
    shown = ", ".join(sites[:4]) + (f", ... ({len(sites)})" if len(sites) > 4 else "")
    rows = {
        "model": (m.model or {}).get("id", "-"),
        "data": f"{m.data.get('kind')} {m.data.get('url', '')}".strip(),
        "sites": shown,
        "tokens": ", ".join(kinds)
        + "".join({f"; {a.tokens} of {a.of} {a.kind} tokens an item" for a in m.arrays if a.of}),
        "items": f"{m.items:,}",
        "parts": f"{m.n_parts:,} of {m.items_per_part:,} items"
        + (f", {parts_done:,} committed" if parts_done else ""),
        "dtype": m.dtype,
        "disk": f"{plan.disk:,} bytes ({size(plan.disk)})",
        "batch size": m.compute.get("batch_size", "-"),
        "peak memory": f"{size(plan.memory)} at most" if plan.memory else "",
    }
    for name, value in rows.items():
        if value != "":
            table.add_row(name, str(value))
    return table


class HarvestView:
    """Draw the events of a harvest."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console = console
        self._progress = progress
        self._items = progress.add_task("items", total=None)
        self._parts = progress.add_task("parts", total=None)
        self.skipped = 0

    def expect(self, items: int, parts: int) -> None:
        """Set the totals where no plan gives them."""
        self._progress.update(self._items, total=items)
        self._progress.update(self._parts, total=parts)

    def __call__(self, event: "Event") -> None:
        """Take one event; the bars appear with the first that tells of work."""
        if event.kind not in ("plan", "finished"):
            self._progress.start()
        if event.kind == "plan" and event.plan is not None:
            plan, m = event.plan, event.plan.manifest
            self._console.print(plan_table(plan, event.parts_done))
            if plan.resumed:
                self._console.print(
                    f"resuming: {event.parts_done} of {m.n_parts} parts are committed"
                )
            done = min(m.items, event.parts_done * m.items_per_part)
            self._progress.update(self._items, total=m.items, completed=done)
            self._progress.update(self._parts, total=m.n_parts, completed=event.parts_done)
        elif event.kind == "items":
            self._progress.advance(self._items, event.items)
        elif event.kind == "part":
            self._progress.advance(self._parts)
        elif event.kind == "skipped":
            self.skipped += 1
            if self.skipped <= 10:
                self._console.print(
                    f"skipped {event.key}: {event.message}", markup=False, soft_wrap=True
                )
            elif self.skipped == 11:
                self._console.print("further skipped items are in the index only")


def load_options(config: Any) -> dict[str, Any]:
    """Return the options of `vitmodels.load` that a command was given."""
    return {
        "weights": config.weights,
        "pretrained": not config.random_weights,
        "seed": config.weights_seed,
        "img_size": config.img_size,
    }


def load_for(config: Any, model_id: str) -> Any:
    """Return the model that the options of a command name."""
    from actstore.harvester import load_model

    return load_model(model_id, config.device, **load_options(config))


def source_for(config: Any, store: Store) -> Any:
    """Return the data set of a store: where it moved to, or where the manifest says it lies."""
    from actstore.sources import open_source, reopen_source

    if config.data:
        return open_source(config.data, config.storage_options)
    return reopen_source(store.manifest.data, config.storage_options)


def harvest_with_progress(config: "Harvest") -> int:
    """Harvest and draw it; 0 when the store is complete or other ranks still work on it."""
    from actstore.harvester import dry_run, harvest

    console = Console()
    options = {name: getattr(config, name) for name in _PASSED_ON}
    scheduler = None if config.dry_run else config.scheduler
    model = load_for(config, config.model) if scheduler is None else config.model
    if config.dry_run:
        console.print(plan_table(dry_run(model=model, out=config.out, **options)))
        return 0
    with progress_bars(console) as progress:
        view = HarvestView(console, progress)
        if scheduler is not None:
            from actstore.cluster import harvest_on

            options["load"] = load_options(config)
            store = harvest_on(scheduler, model=model, out=config.out, on_event=view, **options)
        else:
            store = harvest(model=model, out=config.out, on_event=view, **options)
    missing = len(store.missing_parts)
    state = "complete" if store.is_complete else f"{missing} parts missing (other ranks?)"
    counts = f"{store.n_items:,} items, {state}, {view.skipped} skipped in this run"
    console.print(f"{store.url}: {counts}", markup=False, soft_wrap=True)
    console.print(
        f"next: actstore info {store.url}; actstore verify {store.url}",
        markup=False,
        soft_wrap=True,
    )
    return 0


def print_info(url: str, storage_options: dict[str, Any] | None = None) -> int:
    """Print what is in a store."""
    from actstore.verify import skipped

    store = open_store(url, storage_options)
    m = store.manifest
    console = Console()
    console.print(f"{url}: format {m.format}", markup=False, soft_wrap=True)
    console.print(f"fingerprint {store.fingerprint}", markup=False, soft_wrap=True)
    console.print(plan_table(_as_plan(store), int((store.part_items >= 0).sum()), "store"))
    table = Table("site", "kind", "tokens", "channels", "stripe", "mean norm", "largest value")
    for a in m.arrays:
        moments = store.stats(a.site, a.kind)
        norm = float((moments.var + moments.mean**2).sum()) ** 0.5
        largest = float(moments.absmax.max()) if moments.count else 0.0
        stripe = f"{m.items_per_part} x {a.stripe_tokens} x {a.channels}"
        cells = [a.tokens, a.channels, stripe, f"{norm:.3g}", f"{largest:.3g}"]
        table.add_row(a.site, a.kind, *map(str, cells))
    console.print(table)
    console.print(f"{store.n_items:,} items readable of {m.items:,} planned")
    if store.is_complete:
        console.print("complete: every part is committed")
    else:
        console.print(
            f"incomplete: {len(store.missing_parts)} of {m.n_parts} parts missing; run the "
            "harvest again to go on"
        )
    for reason, count in skipped(store).items():
        console.print(f"skipped {count}: {reason}", markup=False, soft_wrap=True)
    return 0


def _as_plan(store: Store) -> Plan:
    from actstore.plan import disk_bytes

    return Plan(
        manifest=store.manifest,
        resumed=True,
        disk=disk_bytes(store.manifest),
        memory=0,
        buffers=0,
        forward_memory=0,
    )


def verify_with_progress(config: "Verify") -> int:
    """Verify and print what is wrong; 1 when something is."""
    from actstore.verify import verify

    store = open_store(config.url, config.storage_options)
    console = Console()
    with progress_bars(console) as progress:
        task = progress.add_task("parts", total=int((store.part_items >= 0).sum()))

        def advance(part: int) -> None:
            progress.start()
            progress.advance(task)

        problems = verify(store, workers=config.workers, on_part=advance)
    for problem in problems:
        console.print(str(problem), markup=False, style="red")
    parts = sorted({p.part for p in problems if p.part >= 0})
    if parts:
        listed = ",".join(map(str, parts))
        console.print(
            f"repair: actstore repair {config.url} --parts {listed}", markup=False, soft_wrap=True
        )
    elif not problems:
        n = int((store.part_items >= 0).sum())
        console.print(f"{n} parts read, every checksum fits")
    if store.missing_parts:
        console.print(f"{len(store.missing_parts)} parts are not harvested yet")
    if config.against_model:
        if parts:  # what is damaged is known already, the rest can be compared
            store = open_store(config.url, config.storage_options, without=parts)
        if not _compare(config, store, console):
            return 1
    return 1 if problems else 0


def _compare(config: "Verify", store: Store, console: Console) -> bool:
    """Run items through the model again; return whether all values fit."""
    from actstore.verify import verify_against_model

    if store.manifest.model is None:
        raise ValueError(f"{store.url} was not made by a model, there is nothing to run again")
    model = load_for(config, str(store.manifest.model["id"]))
    source = source_for(config, store)
    found = verify_against_model(store, model, source, items=config.against_model)
    table = Table("site", "kind", "items", "largest difference / rms", "values off")
    for one in found:
        cells = [one.items, f"{one.largest:.2e}", one.differing]
        table.add_row(one.site, one.kind, *map(str, cells))
    console.print(table)
    return not any(one.differing for one in found)


def print_models(pattern: str, *, with_sites: bool) -> int:
    """List models, and their sites on request."""
    import vitmodels
    import vitmodels.catalog

    console = Console()
    names = vitmodels.list_models(pattern)
    if not names:
        raise ValueError(f"no model matches {pattern!r}; `actstore models` lists all")
    known = {row.id: row.summary() for row in vitmodels.catalog.rows()}
    width = max(map(len, names))
    for name in names:
        line = f"{name:{width}}  {known.get(name, '')}".rstrip()
        console.print(line, markup=False, highlight=False, soft_wrap=True)
        if with_sites:
            for site, info in vitmodels.load(name, device="meta").sites().items():
                shape = " x ".join(map(str, info.shape))
                console.print(f"    {site}  {shape}", markup=False, highlight=False)
    return 0
