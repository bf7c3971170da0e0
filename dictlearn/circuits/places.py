"""Places: the cells of a grid of site x layer x head x position, and the labelled array of it.

A place is a part of one site's value. The result of a function over places is an
:class:`xarray.Dataset` with one variable a part (``resid_post``, ``z``), each with those of the
dimensions layer, head and position that the grid has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from vitmodels.model import VisionModel
from vitmodels.names import Site
from vitmodels.spec import SiteInfo, TokenGrid, expand_sites

AXES = ("head", "position")
"""What a site can be cut along."""
Positions = Mapping[str, str | int | Sequence[int]] | Sequence[int] | str
"""Token numbers; a kind (``"cls"``); or named groups of either, each one cell."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """One cell: some heads and tokens of one site."""

    site: str
    """Canonical name."""
    head: int | None = None
    """One head, None for all (or where there are none)."""
    tokens: tuple[int, ...] | None = None
    """Token (or query) numbers, None for all (or where there are none)."""
    label: int | str | None = None
    """Coordinate along the dimension position."""

    def index(self, axes: Sequence[str]) -> tuple[Any, ...]:
        """Return the index of the cell in a value ``[batch, *axes]``."""
        cut: list[Any] = [slice(None)]
        for axis in axes:
            if axis == "head" and self.head is not None:
                cut.append(slice(self.head, self.head + 1))
            elif axis in ("token", "query") and self.tokens is not None:
                first, last = min(self.tokens), max(self.tokens)
                block = list(range(first, last + 1)) == list(self.tokens)
                cut.append(slice(first, last + 1) if block else list(self.tokens))
            else:
                cut.append(slice(None))
        return tuple(cut)


def require_logits(model: VisionModel) -> None:
    """Check that a model has class logits.

    Raises
    ------
    ValueError
        It has no head; the message names the two ways to one.
    """
    if "logits" not in model.anatomy.taps:
        raise ValueError(
            f"{model.spec.id} has no classification head, so there is no logit to look at. Give it "
            "one: a linear probe of its features, dictlearn.circuits.with_probe(model, weight, "
            "bias) (fit_probe trains one off a store), or a zero-shot head, "
            "vitmodels.zeroshot.load_zero_shot(id, classes), for checkpoints of open_clip"
        )


def editable_sites(model: VisionModel, sites: str | Sequence[str]) -> dict[str, SiteInfo]:
    """Expand patterns to sites that can be written, in model order.

    Raises
    ------
    ValueError
        A site is absent (the nearest is named) or read-only (with the reason).
    """
    names = expand_sites(sites, model.anatomy.taps)
    for name in names:
        if reason := model.anatomy.taps[name].reason:
            raise ValueError(f"site {name} of {model.spec.id} is read-only: {reason}")
    infos = model.sites()
    return {name: infos[name] for name in names}


def grid_places(
    infos: Mapping[str, SiteInfo],
    over: Sequence[str] = AXES,
    positions: Positions | None = None,
) -> list[Place]:
    """Return every cell of the sites, in the order of the sites.

    Parameters
    ----------
    infos
        Sites by name.
    over
        Which of ``head`` and ``position`` to cut along; a site is cut along those it has.
    positions
        Tokens to take, each a cell; or groups by name, each one cell. None takes all.

    Raises
    ------
    ValueError
        An unknown axis, a token that is not there, or a site without tokens although only some
        were asked for.
    """
    if bad := sorted(set(over) - set(AXES)):
        raise ValueError(f"over={bad[0]!r} is unknown; a site can be cut along {', '.join(AXES)}")
    places = []
    for name, info in infos.items():
        heads: list[int | None] = [None]
        if "head" in over and "head" in info.axes:
            heads = list(range(info.shape[info.axes.index("head")]))
        cells = _token_cells(info, "position" in over, positions)
        places += [
            Place(site=name, head=head, tokens=tokens, label=label)
            for head in heads
            for label, tokens in cells
        ]
    return places


def token_numbers(info: SiteInfo, where: str | int | Sequence[int]) -> tuple[int, ...]:
    """Return token numbers at a site from a kind, a number or numbers.

    Raises
    ------
    ValueError
        The site has no tokens, or not those.
    """
    axis = info.token_axis
    if axis is None or info.grid is None:
        raise ValueError(f"site {info.name} has no tokens to choose from; leave positions out")
    if isinstance(where, str):
        span = info.grid.slice(where)
        numbers: tuple[int, ...] = tuple(range(span.start, span.stop))
        if not numbers:
            raise ValueError(
                f"site {info.name} has no {where} tokens; it has {', '.join(info.grid.kinds)}"
            )
        return numbers
    size = info.shape[axis]
    given = [where] if isinstance(where, int | np.integer) else list(where)
    if bad := [n for n in given if not -size <= n < size]:
        raise ValueError(f"site {info.name} has {size} tokens, there is no token {bad[0]}")
    return tuple(int(n) % size for n in given)


def _token_cells(
    info: SiteInfo, each: bool, positions: Positions | None
) -> list[tuple[int | str | None, tuple[int, ...] | None]]:
    if info.token_axis is None:
        if positions is not None:
            raise ValueError(f"site {info.name} has no tokens to choose from; ask for it apart")
        return [(None, None)]
    if isinstance(positions, Mapping):
        return [(label, token_numbers(info, where)) for label, where in positions.items()]
    if positions is None:
        chosen = tuple(range(info.shape[info.token_axis])) if each else None
    else:
        chosen = token_numbers(info, positions)
    if not each or chosen is None:
        return [(None, chosen)]
    return [(token, (token,)) for token in chosen]


def dataset(places: Sequence[Place], values: Tensor, infos: Mapping[str, SiteInfo]) -> xr.Dataset:
    """Return values by place as a Dataset.

    Parameters
    ----------
    places
        Of :func:`grid_places`.
    values
        One a place, ``[places]`` or ``[places, items]``; the latter adds a dimension item.
    infos
        Sites by name.

    Raises
    ------
    ValueError
        Sites of one part differ in heads or tokens, as in hierarchical models.
    """
    array = values.detach().float().cpu().numpy()
    by_part: dict[str, dict[str, list[int]]] = {}
    for number, place in enumerate(places):
        site = Site.parse(place.site)
        part = f"{site.prefix}.{site.part}" if site.prefix else site.part
        by_part.setdefault(part, {}).setdefault(place.site, []).append(number)
    variables: dict[str, Any] = {}
    coords: dict[str, Any] = {}
    for part, sites in by_part.items():
        shapes = {name: _cell_axes([places[n] for n in rows]) for name, rows in sites.items()}
        first = next(iter(shapes))
        for name, axes in shapes.items():
            known = {key: coords[key] for key in axes if key in coords}
            other = next((k for k, v in known.items() if list(v) != list(axes[k])), None)
            if axes != shapes[first] or other:
                raise ValueError(
                    f"{name} has other heads or tokens than the sites before it, so they do not "
                    "fit one grid; ask for them in two calls"
                )
            coords.update(axes)
        layers = [Site.parse(name).layer for name in sites]
        sizes = [len(v) for v in shapes[first].values()]
        shape = (*sizes, *array.shape[1:])
        stacked = np.stack([array[rows].reshape(shape) for rows in sites.values()])
        dims = [*shapes[first], *(["item"] if array.ndim == 2 else [])]
        if layers == [None]:
            variables[part] = (dims, stacked[0])
        else:
            layer_coord = xr.DataArray(layers, dims="layer", coords={"layer": layers})
            variables[part] = xr.DataArray(
                stacked, dims=["layer", *dims], coords={"layer": layer_coord}
            )
    with_tokens = [infos[p.site].grid for p in places if isinstance(p.label, int)]
    grid = with_tokens[0] if with_tokens else None
    return xr.merge(
        [_with_coords(name, value, coords, grid) for name, value in variables.items()],
        join="outer",
        compat="no_conflicts",
    )


def _cell_axes(places: Sequence[Place]) -> dict[str, list[Any]]:
    axes: dict[str, list[Any]] = {}
    heads = list(dict.fromkeys(p.head for p in places))
    labels = list(dict.fromkeys(p.label for p in places))
    if heads != [None]:
        axes["head"] = heads
    if labels != [None]:
        axes["position"] = labels
    return axes


def _with_coords(
    name: str, value: Any, coords: Mapping[str, Any], grid: TokenGrid | None
) -> xr.Dataset:
    array = value if isinstance(value, xr.DataArray) else xr.DataArray(value[1], dims=value[0])
    array = array.assign_coords({k: v for k, v in coords.items() if k in array.dims})
    if grid is not None and "position" in array.dims:
        array = array.assign_coords(position_coords(grid, array["position"].values.tolist()))
    return array.to_dataset(name=name)


def position_coords(grid: TokenGrid, tokens: Sequence[int]) -> dict[str, Any]:
    """Return coordinates along position: kind; row and column (and time) of patches, else -1."""
    kinds = np.empty(grid.n_tokens, dtype=object)
    places = np.full((grid.n_tokens, len(grid.patch)), -1)
    for kind in grid.kinds:
        kinds[grid.slice(kind)] = kind
    places[grid.slice("patch")] = np.indices(grid.patch).reshape(len(grid.patch), -1).T
    names = ("time", "row", "column")[-len(grid.patch) :]
    index = np.asarray(tokens, dtype=int)
    found = {"kind": ("position", kinds[index].astype(str))}
    return found | {n: ("position", places[index, i]) for i, n in enumerate(names)}


def as_source(
    value: Tensor, info: SiteInfo, items: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return a value to patch in as ``[items, *shape]``; it may come without items or with one.

    Raises
    ------
    ValueError
        Another shape.
    """
    whole = value if value.dim() == len(info.shape) + 1 else value[None]
    if tuple(whole.shape[1:]) != tuple(info.shape) or whole.shape[0] not in (1, items):
        raise ValueError(
            f"the value for site {info.name} is {list(value.shape)}; it must be "
            f"[{items}, {', '.join(map(str, info.shape))}], or the same without the items"
        )
    return whole.to(device=device, dtype=dtype).expand(items, *info.shape)
