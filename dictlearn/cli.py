"""The command ``dictlearn`` and its subcommands."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from actstore.place import CachedPlace
from dictlearn.eval_command import Eval, eval_with_progress
from dictlearn.schedule import TrainConfig
from dictlearn.sweepcli import Sweep, sweep_with_progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(CachedPlace):
    """Train dictionaries off a store, all from one read of it; the same command resumes."""

    store: tyro.conf.Positional[str]
    """The store; or NAME=STORE,NAME=STORE of the same items, whose sites are then NAME.site."""
    out: Path
    """Folder of the run: log, checkpoints, dictionaries."""
    sites: str = "*"
    """Sites or patterns; one dictionary each (an SAE), unless --writes or --together."""
    writes: str | None = None
    """Sites or patterns to write instead: one transcoder from the sites to these."""
    together: bool = False
    """One crosscoder over all the sites."""
    kind: Literal["TopK", "BatchTopK", "ReLU", "JumpReLU", "Gated"] = "TopK"
    """Which latents are active; see dictlearn.config."""
    k: int | None = None
    """Latents kept for a token (TopK, BatchTopK); 32 by default."""
    l1: float | None = None
    """Coefficient of the L1 penalty (ReLU, Gated)."""
    l0: float | None = None
    """Coefficient of the penalty of JumpReLU."""
    expansion: int = 8
    """Latents for each channel read."""
    latents: int | None = None
    """Number of latents, instead of --expansion."""
    prefixes: tuple[int, ...] = ()
    """Matryoshka prefixes; the full width is always one."""
    skip: bool = False
    """Add a linear path past the latents."""
    config: Path | None = None
    """A run.json: train the dictionaries it describes, as it describes; other options but the
    store and --out are then ignored."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    log_to: tuple[Literal["wandb", "trackio"], ...] = ()
    """Trackers besides log.jsonl and TensorBoard; each is an extra of its name."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=TrainConfig
    )
    """How to train."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsityOf:
    """Firing rates, L0 by position and best items of every latent over a store, by dask."""

    dictionary: tyro.conf.Positional[Path]
    """Folder of the dictionary."""
    store: str
    """The store."""
    out: Path
    """Folder of the parquet tables."""
    tokens: str | None = None
    """Token kinds; every kind stored by default."""
    top: int = 10
    """Best items kept of each latent."""


def _handlers() -> dict[type, Callable[[Any], int]]:
    from dictlearn import commands, view
    from dictlearn.circuits import tracing_command

    return {
        view.View: view.view,
        tracing_command.Trace: tracing_command.trace_with_progress,
        Sweep: sweep_with_progress,
        Train: commands.train_with_progress,
        Eval: eval_with_progress,
        SparsityOf: commands.print_sparsity,
    }


def subcommands() -> dict[str, Callable[..., Any]]:
    """Return every subcommand by name."""
    from dictlearn.circuits.tracing_command import Trace
    from dictlearn.formats.commands import convert, pretrained
    from dictlearn.structure_command import absorption, coactivation, structure
    from dictlearn.view import View

    return {
        "train": Train,
        "sweep": Sweep,
        "eval": Eval,
        "sparsity": SparsityOf,
        "view": View,
        "trace": Trace,
        "structure": structure,
        "coactivation": coactivation,
        "absorption": absorption,
        "convert": convert,
        "pretrained": pretrained,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after a message that says what went wrong."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.ERROR, format="%(name)s: %(message)s")
    try:
        result = tyro.extras.subcommand_cli_from_dict(
            subcommands(), prog="dictlearn", description=__doc__, args=words
        )
        handler = _handlers().get(type(result))
        code = handler(result) if handler else result
    except (ValueError, KeyError, OSError) as error:
        sys.stderr.write(f"error: {_said(error)}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on from the last checkpoint\n")
        return 130
    return code if isinstance(code, int) else 0


def _said(error: Exception) -> str:
    """Return the message of an error; those of the system say which file it was."""
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}; give another place"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
