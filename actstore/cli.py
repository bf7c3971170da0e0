"""The command ``actstore``; further commands come from the entry points `actstore.commands`."""

import dataclasses
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from actstore.place import Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Harvest(Place):
    """Run a model over a data set and keep its activations."""

    model: str
    """Name of the model, for instance timm/vit_small_patch14_dinov2; see `actstore models`."""
    data: str
    """digits, a folder of images, a parquet file, folder or glob, or an fsspec URL."""
    sites: str
    """Sites or patterns, for instance blocks.{5,7}.resid_post or blocks.*.mlp_out."""
    out: str
    """Where the store goes."""
    tokens: str = "cls,patch"
    """Token kinds to keep, of cls, register and patch."""
    tokens_per_item: int | None = None
    """Patch tokens to keep of each item, a random subset; all by default."""
    dtype: str | None = None
    """Type on disk: float16 (default), bfloat16, float32, or int8 with a scale per channel."""
    codec: str = "raw"
    """raw, archive (compressed, bfloat16) or int8 (the same as that dtype)."""
    limit: int | None = None
    """Number of items, a random choice keyed by the seed; all by default."""
    seed: int = 0
    """Key of the permutation of the items."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    batch_size: int | None = None
    """Items of a forward pass; 16 on the CPU and 128 elsewhere by default; halved when memory
    runs out."""
    workers: int | None = None
    """Threads that decode; the number of cores by default, at most 16."""
    strict: bool = False
    """Stop at the first item that cannot be decoded instead of skipping it."""
    skip_unreachable: bool = False
    """Skip items whose storage fails too, instead of stopping."""
    memory: int | None = None
    """Bytes for part buffers; two fifths of what is available by default, at most 8e9."""
    autocast: str | None = None
    """Type the forward pass runs in: bfloat16 or float16; that of the weights by default."""
    compile: bool = False
    """Compile the model block by block."""
    weights: str | None = None
    """Local weights, a safetensors or pt file."""
    random_weights: bool = False
    """Take random weights (seeded by --weights-seed) instead of published ones."""
    weights_seed: int = 0
    """Seed of random weights."""
    img_size: int | None = None
    """Side of the input in pixels; that of the checkpoint by default."""
    scheduler: str | None = None
    """Address of a dask.distributed scheduler (tcp://host:8786) whose workers compute the parts."""
    dry_run: bool = False
    """Print the plan and stop."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info(Place):
    """Show what is in a store and how complete it is."""

    url: tyro.conf.Positional[str]
    """The store."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Again(Place):
    """How to load the model of a store again."""

    weights: str | None = None
    """Local weights, if the harvest used them."""
    random_weights: bool = False
    """The harvest used random weights."""
    weights_seed: int = 0
    """Seed of random weights."""
    img_size: int | None = None
    """Side of the input in pixels, if the harvest set it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify(_Again):
    """Read every byte of a store and compare with its checksums."""

    url: tyro.conf.Positional[str]
    """The store."""
    against_model: int = 0
    """Also run this many random items through the model again and compare the values."""
    data: str | None = None
    """The data set, if it moved since the harvest."""
    workers: int = 4
    """Threads that read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repair(_Again):
    """Harvest damaged parts again; their bytes become those of the first run."""

    url: tyro.conf.Positional[str]
    """The store."""
    parts: str | None = None
    """Numbers of the parts, comma-separated; by default all that `verify` finds damaged."""
    data: str | None = None
    """The data set, if it moved since the harvest."""
    workers: int | None = None
    """Threads that decode."""
    skip_unreachable: bool = False
    """Skip items whose storage fails, as the harvest did."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert(Place):
    """Copy a store: elsewhere, fewer sites or tokens, another dtype, other parts."""

    url: tyro.conf.Positional[str]
    """The source."""
    out: str
    """Where the copy goes."""
    sites: str | None = None
    """Sites or patterns to keep; all by default."""
    tokens: str | None = None
    """Token kinds to keep; all by default."""
    dtype: str | None = None
    """float16, bfloat16, float32 or int8; that of the source by default."""
    codec: str | None = None
    """raw, archive (smaller, for keeping) or int8; that of the source by default."""
    items_per_part: int | None = None
    """Items of a part; those of the source by default."""
    reshard: bool = False
    """Choose parts and stripes anew for where the copy goes, as on the way to S3."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gc(Place):
    """Remove what killed harvests left behind; run it when no harvest runs."""

    url: tyro.conf.Positional[str]
    """The store."""
    dry_run: bool = False
    """List it and stop."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats(Place):
    """Summarise the values of a store: norms, outlier channels and tokens, by site and kind."""

    url: tyro.conf.Positional[str]
    """The store."""
    sites: str | None = None
    """Sites or patterns; all by default."""
    png: str | None = None
    """File for a figure."""
    json: str | None = None
    """File for all values: by channel, by position, tokens of largest norm."""
    scheduler: str | None = None
    """Address of a dask.distributed scheduler to compute on; threads of this process otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models:
    """List the models that can be harvested."""

    pattern: tyro.conf.Positional[str] = "*"
    """Part of a name, or a glob."""
    sites: bool = False
    """Also list the sites of each (give a pattern that matches few)."""


def _handlers() -> dict[type, Callable[[Any], int]]:
    """Return what each command runs; imported here so that `--help` is quick."""
    from actstore import report, report_summary, report_upkeep

    return {
        Harvest: report.harvest_with_progress,
        Info: lambda config: report.print_info(config.url, config.storage_options),
        Verify: report.verify_with_progress,
        Repair: report_upkeep.repair_with_progress,
        Convert: report_upkeep.convert_with_progress,
        Gc: report_upkeep.collect_garbage,
        Stats: report_summary.print_stats,
        Models: lambda config: report.print_models(config.pattern, with_sites=config.sites),
    }


def commands(arguments: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """Return the subcommands by name: those of this package, then those of entry points.

    An entry point is imported when it is asked for, or when no command of this package is.
    """
    found: dict[str, Callable[..., Any]] = {
        "harvest": Harvest,
        "info": Info,
        "verify": Verify,
        "repair": Repair,
        "convert": Convert,
        "gc": Gc,
        "stats": Stats,
        "models": Models,
    }
    asked = arguments[0] if arguments else ""
    if asked in found:
        return found
    for point in importlib.metadata.entry_points(group="actstore.commands"):
        if point.name in found or (asked and not asked.startswith("-") and asked != point.name):
            continue
        try:
            found[point.name] = point.load()
        except ImportError as error:
            if asked == point.name:
                raise ValueError(f"command {point.name} cannot be loaded: {error}") from error
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after a message that says what went wrong."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.ERROR, format="%(name)s: %(message)s")
    try:
        result = tyro.extras.subcommand_cli_from_dict(
            commands(words), prog="actstore", description=__doc__, args=words
        )
        handler = _handlers().get(type(result))
        code = handler(result) if handler else result
    except (ValueError, KeyError, OSError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        sys.stderr.write(f"error: {text}\n")
        return 1
    except MemoryError as error:
        sys.stderr.write(
            f"error: this takes more memory than there is ({error}); ask for less at once "
            "(--batch-size, --memory), or for fewer --sites or --tokens\n"
        )
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what was committed stays, the same command goes on\n")
        return 130
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
