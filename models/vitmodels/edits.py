"""Helpers for edits: at some heads, at some tokens, and the usual replacements.

Each takes or returns a function from the value of a site to a new value::

    with model.editing({"blocks.3.z": at_heads([0, 5], zero)}): ...
    with model.editing({"blocks.3.resid_post": at_tokens("cls", shift(direction), grid)}): ...
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vitmodels.spec import SiteInfo, TokenGrid
from vitmodels.taps import Edit


def zero(value: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
    """Ablate to zero."""
    return torch.zeros_like(value)


def replace(new: Float[Tensor, "..."]) -> Edit:
    """Patch in a value (of another run, or a mean), broadcast over the batch if it has none."""

    def edit(value: Tensor) -> Tensor:
        return new.to(device=value.device, dtype=value.dtype).expand_as(value).clone()

    return edit


def shift(direction: Float[Tensor, " channel"], scale: float = 1.0) -> Edit:
    """Steer: add ``scale * direction`` to every token."""

    def edit(value: Tensor) -> Tensor:
        return value + scale * direction.to(device=value.device, dtype=value.dtype)

    return edit


def at_heads(heads: int | Sequence[int], edit: Edit, *, axes: Sequence[str] | None = None) -> Edit:
    """Restrict an edit to some heads.

    Parameters
    ----------
    heads
        Their numbers.
    edit
        Gets the value of these heads only, with the head axis kept.
    axes
        ``model.sites()[site].axes``; by default head is the axis before the last
        (q, k, v, z, head_out). Give ``("head", "query", "key")`` for scores and pattern.
    """
    axes = ("token", "head", "channel") if axes is None else axes
    if "head" not in axes:
        raise ValueError(f"a site with axes {tuple(axes)} has no heads; use at_tokens or the edit")
    return _at(1 + list(axes).index("head"), [heads] if isinstance(heads, int) else heads, edit)


def at_tokens(
    where: str | int | Sequence[int],
    edit: Edit,
    site: SiteInfo | TokenGrid | None = None,
) -> Edit:
    """Restrict an edit to some tokens (queries, for scores and pattern).

    Parameters
    ----------
    where
        Token numbers, or a kind: ``"cls"``, ``"register"``, ``"patch"``.
    edit
        Gets the value of these tokens only, with the token axis kept.
    site
        ``model.sites()[name]``, or a grid: needed for a kind, and for scores and pattern.
    """
    grid = site.grid if isinstance(site, SiteInfo) else site
    if isinstance(where, str):
        if grid is None:
            raise ValueError(f"give at_tokens({where!r}, ...) the site: model.sites()[name]")
        span = grid.slice(where)
        where = list(range(span.start, span.stop))
        if not where:
            raise ValueError(f"there are no tokens of that kind; kinds here: {grid.kinds}")
    axis = 0
    if isinstance(site, SiteInfo):
        if site.token_axis is None:
            raise ValueError(f"site {site.name} has no tokens")
        axis = site.token_axis
    return _at(1 + axis, [where] if isinstance(where, int) else where, edit)


def _at(dim: int, numbers: Sequence[int], edit: Edit) -> Edit:
    def partial(value: Tensor) -> Tensor:
        size = value.shape[dim]
        if bad := [n for n in numbers if not -size <= n < size]:
            raise ValueError(f"no number {bad[0]} along an axis of {size}")
        index = torch.tensor([n % size for n in numbers], device=value.device)
        part = edit(value.index_select(dim, index))
        return value.index_copy(dim, index, part.to(value.dtype))

    return partial
