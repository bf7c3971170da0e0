"""``dictlearn view``: build the site of some dictionaries, and open it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """Build a static site that shows what the latents of dictionaries stand for."""

    store: tyro.conf.Positional[str]
    """The store."""
    dictionaries: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of dictionaries, or of runs (every dictionary in them)."""
    out: Path = Path("site")
    """Folder of the site: open index.html in it. A site that is there is replaced."""
    items: int = 24
    """Items with a page of their own: attention, logit lens, active latents of every patch."""
    top: int = 16
    """Best items shown of each latent."""
    thumbs: int = 20_000
    """Pictures written at most."""
    graph: tuple[Path, ...] = ()
    """Attribution graphs, JSON of `dictlearn trace`."""
    data: str | None = None
    """The data set, if it moved since the harvest."""
    model: bool = True
    """Load the model the store names, for what is computed inside of it."""
    weights: str | None = None
    """Local weights of that model."""
    img_size: int | None = None
    """Image size it was loaded with; the one of the harvest by default."""
    classes: Path | None = None
    """Names of the model's classes, one a line."""
    other_store: bool = False
    """Accept dictionaries trained on another store of the same model."""
    tokens: str | None = None
    """Token kinds to look at; those each dictionary was trained on by default."""
    seed: int = 0
    """Of the random items of each latent."""
    serve: bool = False
    """Serve the site on this machine alone, and open it in the browser, until interrupted."""
    port: int = 0
    """Port for --serve; any free one by default."""


def view(config: View) -> int:
    """Run ``dictlearn view``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    import actstore
    from dictlearn.viz.site.build import SiteOptions, build, check_folder

    console = Console()
    check_folder(config.out)
    store = actstore.open(config.store)
    dictionaries = load_all(config.dictionaries)
    options = SiteOptions(
        items=config.items,
        top=config.top,
        thumbs=config.thumbs,
        seed=config.seed,
        tokens=config.tokens,
        classes=_classes(config.classes),
        other_store=config.other_store,
    )
    model, why_not = load_model(store, config)
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console) as progress:
        bars: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=total)
            progress.update(bars[stage], completed=done, total=total)

        built = build(
            store,
            dictionaries,
            config.out,
            options,
            model=model,
            why_no_model=why_not,
            data=config.data,
            graphs=config.graph,
            on_event=show,
        )
    for note in built.notes[:10]:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    if len(built.notes) > 10:
        console.print(f"and {len(built.notes) - 10} more notes of this kind")
    page = (config.out / "index.html").resolve()
    console.print(
        f"{built.files:,} files, {built.bytes / 1e6:,.1f} MB; open {page}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if config.serve:
        from dictlearn.viz.site.serve import serve

        serve(config.out, port=config.port, on_start=lambda url: console.print(f"serving {url}"))
    return 0


def load_all(paths: Sequence[Path]) -> dict[str, tuple[Any, Path]]:
    """Load dictionaries; those of a run by the names they have there.

    Raises
    ------
    FileNotFoundError, ValueError
        There is none.
    """
    from dictlearn.formats import load

    if not paths:
        raise ValueError("name a dictionary to view: dictlearn view STORE DICTIONARY")
    found: dict[str, tuple[Any, Path]] = {}
    for folder in _folders(paths):
        name, number = folder.name, 1
        while name in found:
            number += 1
            name = f"{folder.name} ({number})"
        found[name] = (load(folder), folder)
    return found


def _folders(paths: Sequence[Path]) -> list[Path]:
    """Return the dictionaries meant: the folders given, or all of a run."""
    found: list[Path] = []
    for path in paths:
        inner = sorted(p.parent for p in path.glob("*/config.json"))
        if (path / "run.json").is_file() and inner:
            found += inner
        elif path.exists():
            found.append(path)
        else:
            names = [p.name for p in path.parent.glob("*")]
            near = difflib.get_close_matches(path.name, names)
            hint = f"; nearest in {path.parent}: {', '.join(near)}" if near else ""
            raise FileNotFoundError(f"no dictionary at {path}{hint}")
    return found


def load_model(store: Any, config: View) -> tuple[Any, str]:
    """Return the model of a store, or None and why there is none.

    Raises
    ------
    ValueError, FileNotFoundError
        Weights were named, and they are not there or do not fit.
    """
    described = store.manifest.model
    if not config.model:
        return None, "it was left out (--no-model)"
    if described is None:
        return None, f"{store.url} was not harvested from a model"
    import vitmodels

    shape = list(described.get("input_shape") or [])
    own = tuple(shape[-2:]) if len(shape) >= 3 else None
    size: Any = config.img_size or own
    if isinstance(size, tuple) and size[0] == size[1]:
        size = size[0]
    name = str(described["id"])
    try:
        try:
            return vitmodels.load(name, weights=config.weights, img_size=size), ""
        except ValueError:
            if config.img_size is not None:
                raise
            return vitmodels.load(name, weights=config.weights), ""
    except (ValueError, OSError, ImportError) as error:
        if config.weights is not None:
            raise
        return None, f"{name} cannot be loaded here: {_first_line(error)}"


def _classes(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    if not path.is_file():
        raise FileNotFoundError(f"--classes {path}: no such file; it holds one name a line")
    return tuple(path.read_text().splitlines())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
