"""Finds families by scanning ``families/``; loads a model by name, or wraps a module."""

import fnmatch
import functools
import importlib
import importlib.metadata
import pkgutil
from pathlib import Path

import torch
from torch import nn

import vitmodels.families
from vitmodels.catalog import catalog
from vitmodels.family import Family, Request
from vitmodels.model import VisionModel
from vitmodels.names import nearest
from vitmodels.prisma_names import from_prisma
from vitmodels.spec import ModelSpec
from vitmodels.weights import digest, seeded


@functools.cache
def families() -> tuple[Family, ...]:
    """Return every family: one a module of ``vitmodels.families``, by name."""
    found = []
    for info in sorted(pkgutil.iter_modules(vitmodels.families.__path__), key=lambda i: i.name):
        module = importlib.import_module(f"vitmodels.families.{info.name}")
        family = getattr(module, "FAMILY", None)
        if not isinstance(family, Family):
            raise ValueError(f"{module.__name__} must end with FAMILY = <a Family()>")
        if family.name != info.name:
            raise ValueError(
                f"{module.__name__}: FAMILY.name is {family.name!r}, not {info.name!r}"
            )
        found.append(family)
    return tuple(found)


def list_models(pattern: str = "*") -> list[str]:
    """Return the ids of all verified models that match a glob, sorted.

    A pattern without a glob character matches any id that holds it. The ids are those of
    :mod:`vitmodels.catalog`, and those of families that have been added since.
    """
    if not any(c in pattern for c in "*?["):
        pattern = f"*{pattern}*"
    listed = {row.family for row in catalog()}
    ids = {row.id for row in catalog()}
    for family in families():
        if family.name not in listed:
            ids.update(f"{family.prefix}/{name}" for name in family.names())
    return sorted(id for id in ids if fnmatch.fnmatchcase(id, pattern))


def resolve(id: str) -> tuple[Family, str]:
    """Return the family of an id, or of a name of Prisma's, and its name without the prefix.

    Raises
    ------
    ValueError
        No family claims it; the message holds the nearest names.
    """
    id = from_prisma(id)
    prefix, slash, name = id.partition("/")
    if slash:
        for family in families():
            if family.prefix == prefix and family.claims(name):
                return family, name
    for family in families():
        other = family.alias(id)
        if other is not None:
            return family, other
    for family in families():
        if family.prefix == prefix and (reason := family.refusal(name)):
            raise ValueError(f"model {id!r} cannot be served: {reason}")
    ids = list_models()
    near = nearest(id, ids) or nearest(name, [i.partition("/")[2] for i in ids])
    hint = f"nearest: {', '.join(near)}. " if near else ""
    raise ValueError(
        f"unknown model {id!r}; {hint}Ids look like 'timm/vit_base_patch16_224'; list them with "
        "vitmodels.list_models('*vit*') or `actstore models '*vit*'`"
    )


def load(
    id: str,
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
    seed: int = 0,
    img_size: int | tuple[int, int] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> VisionModel:
    """Load a model by name, in eval mode, its parameters frozen.

    Parameters
    ----------
    id
        ``timm/vit_small_patch14_dinov2``, ``toy/digits-2l``, ...
    weights
        Local safetensors or pt file; position embeddings are resampled to `img_size` by the
        backend.
    pretrained
        Without `weights`: fetch the published ones. False gives random weights.
    seed
        Of the random weights.
    img_size
        Side in pixels, or (height, width); None for the checkpoint's own.
    device
        Where to put it; ``"meta"`` builds it without memory, to list its sites.
    dtype
        Of the weights; None for float32.

    Raises
    ------
    ValueError
        Unknown name (with the nearest), or weights that do not fit (with the first key).
    FileNotFoundError
        `weights` is not there, or the published weights cannot be fetched.
    """
    family, name = resolve(id)
    meta = torch.device(device).type == "meta"
    request = Request(
        name=name,
        weights=None if weights is None else Path(weights).expanduser(),
        pretrained=pretrained and weights is None and not meta,
        img_size=img_size,
        meta=meta,
    )
    with seeded(seed):
        if meta:
            with torch.device("meta"):
                module = family.build(request)
        else:
            module = family.build(request)
    published = request.pretrained
    id = f"{family.prefix}/{name}"
    return _wrap(module, family, id, device=device, dtype=dtype, published=published)


def wrap(module: nn.Module, *, id: str = "custom", family: str | None = None) -> VisionModel:
    """Give names to the insides of a module that you have built yourself.

    Parameters
    ----------
    module
        An unmodified module of one of the supported architectures.
    id
        What to call it in the spec.
    family
        Name of the family that describes it; None to find it.

    Raises
    ------
    ValueError
        No family can describe it.
    """
    for candidate in families():
        if family in (None, candidate.name) and candidate.accepts(module):
            return _wrap(module, candidate, id, device=None, dtype=None, published=True)
    known = ", ".join(candidate.name for candidate in families())
    raise ValueError(
        f"no family describes {type(module).__module__}.{type(module).__name__}"
        f"{'' if family is None else f' (asked for {family!r})'}; families: {known}. "
        "docs/adding-a-model.md says how to add one"
    )


def _wrap(
    module: nn.Module,
    family: Family,
    id: str,
    *,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    published: bool,
) -> VisionModel:
    module = module.eval().requires_grad_(False)
    if dtype is not None:
        module = module.to(dtype)
    anatomy = family.anatomy(module)
    spec = ModelSpec(
        id=id,
        family=family.name,
        backend=f"{family.backend} {importlib.metadata.version(family.backend)}",
        revision=anatomy.revision if published else "",
        weights=digest(module),
        d_model=anatomy.d_model,
        n_layers=anatomy.n_layers,
        n_heads=anatomy.n_heads,
        d_head=anatomy.d_head,
        d_mlp=anatomy.d_mlp,
        n_classes=anatomy.n_classes,
        grid=anatomy.grid,
        input_shape=anatomy.input_shape,
        transform=anatomy.transform.describe(),
    )
    if device is not None and torch.device(device).type != "meta":
        module.to(device)
    return VisionModel(module=module, anatomy=anatomy, spec=spec)
