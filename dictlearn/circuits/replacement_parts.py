"""Transcoders that stand for the MLPs of one model: one a layer, plain or cross-layer, checked.

A transcoder of layer l reads ``blocks.l.mlp_in`` and writes ``blocks.l.mlp_out`` (Dunefsky et al.
2024, arXiv:2406.11944); a cross-layer transcoder also writes ``mlp_out`` of later layers (Ameisen
et al. 2025). Every layer needs one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dictlearn.config import ReLU
from dictlearn.dictionary import Dictionary

if TYPE_CHECKING:
    from vitmodels.model import VisionModel

_SITE = re.compile(r"blocks\.(\d+)\.(mlp_in|mlp_out)\Z")
_COMMAND = "dictlearn train STORE --sites blocks.{0}.mlp_in --writes blocks.{0}.mlp_out --out RUN"


@dataclass(frozen=True, kw_only=True)
class Transcoders:
    """One dictionary for every layer of a model, in the order of the layers."""

    dictionaries: tuple[Dictionary, ...]
    """Number l reads ``blocks.l.mlp_in``."""
    names: tuple[str, ...]
    """What each is called in a graph, by default the site it reads."""
    paths: tuple[str, ...] = field(default=())
    """Folders they came from, empty for dictionaries made in memory."""

    def writes(self, layer: int) -> tuple[int, ...]:
        """Layers whose ``mlp_out`` the dictionary of a layer writes."""
        return tuple(_layer(site) for site in self.dictionaries[layer].config.writes)

    def to(self, device: Any) -> Transcoders:
        """Move every dictionary."""
        for dictionary in self.dictionaries:
            dictionary.to(device)
        return self


def transcoders(
    model: VisionModel,
    dictionaries: Sequence[Dictionary]
    | Mapping[str, Dictionary]
    | Sequence[str | Path]
    | str
    | Path,
) -> Transcoders:
    """Check dictionaries against a model, and put them in the order of its layers.

    Parameters
    ----------
    model
        Whose MLPs they stand for.
    dictionaries
        Dictionaries, name -> dictionary, folders of dictionaries, or the folder of one run.

    Raises
    ------
    ValueError
        A dictionary that is no transcoder (an SAE, a crosscoder), that was trained on another
        model (its weights' digest differs), of another width, or of a kind whose active latents
        are not affine in the input; a layer without a dictionary, or with two.
    FileNotFoundError
        No dictionary in a folder.
    """
    named, paths = _named(model, dictionaries)
    layers: dict[int, tuple[str, Dictionary, str]] = {}
    for name, dictionary in named.items():
        layer = _check(model, name, dictionary)
        if layer in layers:
            raise ValueError(
                f"two transcoders read blocks.{layer}.mlp_in: {layers[layer][0]} and {name}; "
                "give one for each layer"
            )
        layers[layer] = (name, dictionary, paths.get(name, ""))
    missing = [layer for layer in range(model.spec.n_layers) if layer not in layers]
    if missing:
        gaps = ", ".join(map(str, missing))
        raise ValueError(
            f"{model.spec.id} has {model.spec.n_layers} layers, but no transcoder reads layer "
            f"{gaps}; train the missing ones: {_COMMAND.format(missing[0])}"
        )
    ordered = [layers[layer] for layer in range(model.spec.n_layers)]
    return Transcoders(
        dictionaries=tuple(d.to(model.device).eval() for _, d, _ in ordered),
        names=tuple(n for n, _, _ in ordered),
        paths=tuple(p for _, _, p in ordered),
    )


def _named(model: VisionModel, given: Any) -> tuple[dict[str, Dictionary], dict[str, str]]:
    """Return name -> dictionary, and name -> folder for those that were loaded."""
    if isinstance(given, Mapping):
        return dict(given), {}
    given = [given] if isinstance(given, str | Path) else list(given)
    if all(isinstance(one, Dictionary) for one in given):
        return {f"{'+'.join(d.config.reads)}#{i}": d for i, d in enumerate(given)}, {}
    from dictlearn.formats import load

    named, paths = {}, {}
    for folder in _folders(given):
        name = folder.name if folder.name not in named else str(folder)
        _check_origin(model, folder)
        named[name], paths[name] = load(folder), str(folder)
    return named, paths


def _folders(given: Sequence[str | Path]) -> list[Path]:
    folders: list[Path] = []
    for path in map(Path, given):
        inner = sorted(p.parent for p in path.glob("*/config.json"))
        if not path.exists() or not (inner or any(path.iterdir() if path.is_dir() else [path])):
            raise FileNotFoundError(f"no dictionary at {path}")
        folders += [path] if (path / "config.json").is_file() or not inner else inner
    return folders


def _check_origin(model: VisionModel, folder: Path) -> None:
    """Refuse a dictionary whose description names other weights than the model's."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    about = config.get("about") if isinstance(config, dict) else None
    origin = about.get("model") if isinstance(about, dict) else None
    if not isinstance(origin, dict):
        return
    here = model.spec
    for key, there, mine in (
        ("weights", origin.get("weights"), here.weights),
        ("id", origin.get("id"), here.id),
    ):
        if there and mine and there == mine:
            return  # the same weights under another name are the same model
        if there and mine and there != mine:
            raise ValueError(
                f"{folder} was trained on another model: {key} {there!r} "
                f"(model {origin.get('id')!r}), this one has {mine!r} ({here.id!r}). "
                f"Load that model: vitmodels.load({origin.get('id')!r})"
            )


def _layer(site: str) -> int:
    found = _SITE.match(site)
    if found is None:
        raise ValueError(f"{site} is not a site of an MLP")
    return int(found.group(1))


def _check(model: VisionModel, name: str, dictionary: Dictionary) -> int:
    """Return the layer a dictionary reads; see `transcoders` for what is refused."""
    config = dictionary.config
    reads, writes = list(config.reads), list(config.writes)
    what = f"dictionary {name} reads {', '.join(reads)} and writes {', '.join(writes)}"
    need = (
        "circuit tracing needs transcoders, which read blocks.L.mlp_in and write blocks.L.mlp_out "
        f"(and those of later layers, if cross-layer). Train one: {_COMMAND.format('L')}"
    )
    if reads == writes:
        kind = "an SAE" if len(reads) == 1 else "a crosscoder"
        raise ValueError(f"{what}: it is {kind}; {need}")
    read = _SITE.match(reads[0])
    if len(reads) != 1 or read is None or read.group(2) != "mlp_in":
        raise ValueError(f"{what}; {need}")
    layer = int(read.group(1))
    for site in writes:
        written = _SITE.match(site)
        if written is None or written.group(2) != "mlp_out":
            raise ValueError(f"{what}; {need}")
        if int(written.group(1)) < layer:
            raise ValueError(f"{what}: it writes an earlier layer than it reads; {need}")
    infos = model.sites()
    for site, width in {**config.reads, **config.writes}.items():
        if site not in infos:
            raise ValueError(
                f"{what}, but {model.spec.id} has {model.spec.n_layers} layers and no site {site}"
            )
        if infos[site].width != width:
            raise ValueError(
                f"dictionary {name} expects {width} channels at {site}, {model.spec.id} has "
                f"{infos[site].width}: it was trained on another model"
            )
    if config.latent_norm:
        raise ValueError(f"{what}; a layer norm over its pre-activations mixes all latents, which "
                         "direct effects cannot take apart")  # fmt: skip
    if isinstance(config.sparsify, ReLU) and config.sparsify.function != "relu":
        raise ValueError(
            f"{what}; its activation {config.sparsify.function} is not affine where it is active"
        )
    return layer
