"""What the command line draws while a store is repaired or cleaned."""

from typing import TYPE_CHECKING

from rich.console import Console

from actstore.report import HarvestView, load_for, progress_bars, source_for
from actstore.store import open_store

if TYPE_CHECKING:
    from actstore.cli import Convert, Gc, Repair


def repair_with_progress(config: "Repair") -> int:
    """Repair damaged parts and draw it."""
    from actstore.repair import repair
    from actstore.verify import verify

    console = Console()
    if config.parts is None:
        problems = verify(open_store(config.url, config.storage_options))
        parts = sorted({problem.part for problem in problems if problem.part >= 0})
    else:
        parts = parse_parts(config.parts)
    if not parts:
        console.print("nothing is damaged")
        return 0
    store = open_store(config.url, config.storage_options, without=parts)
    if store.manifest.model is None:
        raise ValueError(f"{config.url} was not made by a model, it cannot be harvested again")
    model = load_for(config, str(store.manifest.model["id"]))
    source = source_for(config, store)
    with progress_bars(console) as progress:
        view = HarvestView(console, progress)
        view.expect(sum(store.manifest.planned(part) for part in parts), len(parts))
        repair(
            store,
            model,
            source,
            parts,
            workers=config.workers,
            skip_unreachable=config.skip_unreachable,
            on_event=view,
        )
    console.print(f"harvested {len(parts)} parts again", markup=False)
    return 0


def convert_with_progress(config: "Convert") -> int:
    """Copy a store and draw it."""
    from actstore.convert import convert

    console = Console()
    local = config.storage_options if "://" in config.url else None
    store = open_store(config.url, local)
    with progress_bars(console) as progress:
        task = progress.add_task("parts", total=None)

        def on_part(done: int, total: int) -> None:
            progress.start()
            progress.update(task, completed=done, total=total)

        copy = convert(
            store,
            config.out,
            sites=config.sites,
            tokens=config.tokens,
            dtype=config.dtype,
            codec=config.codec,
            items_per_part=config.items_per_part,
            reshard=config.reshard,
            storage_options=config.storage_options if "://" in config.out else None,
            on_part=on_part,
        )
    counts = f"{copy.n_items:,} items, {len(copy.manifest.arrays)} arrays, {copy.manifest.dtype}"
    console.print(f"{copy.url}: {counts}", markup=False, soft_wrap=True)
    return 0


def parse_parts(text: str) -> list[int]:
    """Return the part numbers of a comma list; ValueError when it is none."""
    try:
        return sorted({int(word) for word in text.split(",") if word.strip()})
    except ValueError:
        raise ValueError(f"--parts takes numbers like 3,17, not {text!r}") from None


def collect_garbage(config: "Gc") -> int:
    """Remove leftovers of killed runs, or list them."""
    from actstore.repair import collect, garbage

    store = open_store(config.url, config.storage_options)
    console = Console()
    found = garbage(store.storage, store.manifest) if config.dry_run else collect(store)
    for path in found:
        console.print(path, markup=False, soft_wrap=True)
    console.print(f"{len(found)} leftovers {'found' if config.dry_run else 'removed'}")
    return 0
