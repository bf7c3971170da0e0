"""``actstore quickstart``: the whole path on data that ship with the package.

Harvest every layer of a 4-layer ViT over 5,000 digits, train a dictionary a layer from one read
of the store, evaluate them with the model, count their firing with dask, and show it. Run again,
the harvest and the training go on where they were.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from dictlearn.config import BatchTopK
from dictlearn.report import Report
from dictlearn.schedule import TrainConfig

if TYPE_CHECKING:
    from actstore.execute import Event
    from actstore.store import Store
    from dictlearn.analysis import Sparsity
    from dictlearn.dictionary import Dictionary
    from dictlearn.trainer import TrainEvent

T = TypeVar("T")

MODEL = "toy/digits-4l"
EXPANSION = 8
K = 8
TRAIN = TrainConfig(steps=500, batch_size=2048, tokens="cls,patch", holdout=0.1, lr=2e-3)

log = logging.getLogger(__name__)


def quickstart(*, folder: str = "actstore-quickstart", device: str = "auto") -> int:
    """Harvest, train, evaluate and show: the whole path on handwritten digits, in two minutes.

    Parameters
    ----------
    folder
        Where everything goes; an unfinished or finished run in it is taken up again.
    device
        auto, cpu, cuda, cuda:1, mps.
    """
    console = Console()
    start = time.perf_counter()
    out = Path(folder)
    with Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        stages = _Stages(out, device, console, progress)
        store = stages.harvest()
        dictionaries = stages.train(store)
        reports = stages.evaluate(store, dictionaries)
        found = stages.sparsity(store, dictionaries)
    console.print(_table(reports))
    figure = _figure(store, reports, found, out / "summary.png")
    console.print(f"done in {time.perf_counter() - start:.0f} s; the figure is {figure}")
    console.print(
        "next:\n"
        f"  actstore info {out / 'acts.zarr'}\n"
        "  actstore harvest --model timm/vit_small_patch14_dinov2 --data FOLDER_OF_IMAGES "
        "--sites 'blocks.{5,7,9}.resid_post' --out acts.zarr\n"
        "  dictlearn train --help",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return 0


class _Stages:
    """The four stages, each drawing its progress and saying what it found done."""

    def __init__(self, out: Path, device: str, console: Console, progress: Progress) -> None:
        self.out, self.device, self.console, self.progress = out, device, console, progress

    def harvest(self) -> Store:
        """Stage 1: every layer's residual stream, CLS and patches."""
        import actstore

        task = self.progress.add_task("1 harvest (items)", total=None)

        def show(event: Event) -> None:
            if event.kind == "plan" and event.plan is not None:
                manifest = event.plan.manifest
                done = min(manifest.items, event.parts_done * manifest.items_per_part)
                self.progress.update(task, total=manifest.items, completed=done)
                if event.parts_done:
                    self.console.print(
                        f"resumed: {event.parts_done} of {manifest.n_parts} parts of the store "
                        "were there"
                    )
            elif event.kind == "items":
                self.progress.advance(task, event.items)

        return actstore.harvest(
            model=MODEL,
            data="digits",
            sites="blocks.*.resid_post",
            tokens="cls,patch",
            out=self.out / "acts.zarr",
            device=self.device,
            on_event=show,
        )

    def train(self, store: Store) -> dict[str, Dictionary]:
        """Stage 2: a dictionary a layer, all from one read of the store."""
        from actstore.harvester import choose_device
        from dictlearn.dictionary import Dictionary
        from dictlearn.trainer import train

        task = self.progress.add_task("2 train (steps)", total=TRAIN.steps)

        def show(event: TrainEvent) -> None:
            if event.kind == "resume":
                self.console.print(f"resumed: training was at step {event.step} of {event.steps}")
            self.progress.update(task, completed=event.step)

        dictionaries = []
        for site in store.sites:
            width = store.spec(site, "patch").channels
            sparsify = BatchTopK(K)
            latents = EXPANSION * width
            dictionaries.append(Dictionary({site: width}, latents=latents, sparsify=sparsify))
        trained = train(
            store,
            dictionaries,
            TRAIN,
            out=self.out / "dictionaries",
            names=list(store.sites),
            device=choose_device(self.device),
            on_event=show,
        )
        self.progress.update(task, completed=TRAIN.steps)
        return {one.name: one.dictionary.to("cpu") for one in trained}

    def evaluate(self, store: Store, dictionaries: Mapping[str, Dictionary]) -> dict[str, Report]:
        """Stage 3: sparsity, reconstruction and substitution loss on items never trained on."""
        import vitmodels
        from actstore.selection import Split
        from dictlearn.evaluation import evaluate

        model = vitmodels.load(MODEL)
        held_out = Split(half="validation", holdout=TRAIN.holdout, seed=TRAIN.split_seed)

        def one(name: str) -> Report:
            about = {"name": name}
            return evaluate(
                dictionaries[name], store, items=held_out, model=model, images=None, about=about
            )

        return self._each("3 evaluate (layers)", dictionaries, one)

    def sparsity(self, store: Store, dictionaries: Mapping[str, Dictionary]) -> dict[str, Sparsity]:
        """Stage 4: firing of every latent over the whole store, by dask."""
        from dictlearn.analysis import sparsity

        def one(name: str) -> Sparsity:
            found = sparsity(store, dictionaries[name], top=10)
            found.save(self.out / "sparsity" / name)
            return found

        return self._each("4 sparsity by dask (layers)", dictionaries, one)

    def _each(self, title: str, names: Mapping[str, Any], one: Callable[[str], T]) -> dict[str, T]:
        task = self.progress.add_task(title, total=len(names))
        found = {}
        for name in names:
            found[name] = one(name)
            self.progress.advance(task)
        return found


def _table(reports: Mapping[str, Report]) -> Table:
    table = Table(title=f"{MODEL} on held-out digits: BatchTopK dictionaries, k = {K}")
    for column in ("layer", "L0\nCLS", "L0\npatches", "\nFVU", "\ndead"):
        table.add_column(column, justify="right")
    table.add_column("CE clean/\nspliced/zeroed", justify="right")
    table.add_column("top-1 clean/\nspliced/zeroed", justify="right")
    for layer, report in enumerate(reports.values()):
        cells = [str(layer), *(f"{report.l0_by_kind[kind]:.2f}" for kind in ("cls", "patch"))]
        cells += [f"{report.fvu:.4f}", f"{report.dead:.1%}"]
        if report.substitution is not None:
            s = report.substitution
            conditions = ("clean", "spliced", "zero")
            cells.append("/".join(f"{s.ce[c]:.3f}" for c in conditions))
            cells.append("/".join(f"{100 * s.top1[c]:.1f}" for c in conditions) + " %")
        table.add_row(*cells)
    return table


def _figure(
    store: Store, reports: Mapping[str, Report], found: Mapping[str, Sparsity], path: Path
) -> Path:
    from actstore.sources import reopen_source
    from dictlearn.viz.summary import patch_box, summary

    source = reopen_source(store.manifest.data)
    origin = store.table()["source"].to_pylist()
    grid = store.grid(next(iter(reports)))
    figure = summary(
        {str(i): report for i, report in enumerate(reports.values())},
        {str(i): sparsity for i, sparsity in enumerate(found.values())},
        layer=str(len(reports) - 2),
        image=lambda item: source.image(origin[item]),
        box=patch_box(grid.slice("patch").start, grid.patch),
    )
    figure.savefig(path, dpi=150)
    return path
