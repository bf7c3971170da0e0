"""What a model is, in words a manifest can hold: token grids, sites, the model itself.

Nothing here imports torch: a process that only reads a store uses this module too.
"""

import fnmatch
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from vitmodels.names import concrete, nearest, translate

Kind = Literal["cls", "register", "patch"]
_KINDS: tuple[Kind, ...] = ("cls", "register", "patch")
AXES = ("token", "head", "channel", "query", "key", "class")
"""What a dimension of a site's value can be, apart from the batch."""


@dataclass(frozen=True, kw_only=True)
class TokenGrid:
    """How many tokens of each kind stand at a site, and in which order.

    >>> TokenGrid(cls=1, register=4, patch=(2, 3)).slice("patch")
    slice(5, 11, None)
    """

    cls: int = 1
    """Class tokens: those a head reads (2 in distilled DeiT: class and distillation)."""
    register: int = 0
    """Register and other extra tokens that no head reads."""
    patch: tuple[int, ...] = (14, 14)
    """Patches as (height, width), or (time, height, width) for video; C order."""
    order: tuple[Kind, ...] = _KINDS
    """Order of the kinds along the token axis."""

    def __post_init__(self) -> None:
        if self.cls < 0 or self.register < 0 or any(n < 0 for n in self.patch):
            raise ValueError(f"token counts must not be negative: {self}")
        if len(self.patch) not in (2, 3):
            raise ValueError(f"patch must be (h, w) or (t, h, w), not {self.patch}")
        if sorted(self.order) != sorted(_KINDS):
            raise ValueError(f"order must name each of {_KINDS} once, not {self.order}")

    def count(self, kind: str) -> int:
        """Return the number of tokens of a kind (0 where it is absent)."""
        if kind == "patch":
            return math.prod(self.patch)
        if kind in ("cls", "register"):
            return self.cls if kind == "cls" else self.register
        raise ValueError(f"unknown token kind {kind!r}; kinds are {', '.join(_KINDS)}")

    def slice(self, kind: str) -> "slice":
        """Return where the tokens of a kind stand along the token axis."""
        n = self.count(kind)
        start = 0
        for other in self.order:
            if other == kind:
                break
            start += self.count(other)
        return slice(start, start + n)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds present, in token order."""
        return tuple(kind for kind in self.order if self.count(kind))

    @property
    def n_tokens(self) -> int:
        """Number of tokens of all kinds."""
        return sum(self.count(kind) for kind in _KINDS)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return {
            "cls": self.cls,
            "register": self.register,
            "patch": list(self.patch),
            "order": list(self.order),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild from :meth:`to_json`."""
        return cls(
            cls=data["cls"],
            register=data["register"],
            patch=tuple(data["patch"]),
            order=tuple(data["order"]),
        )


@dataclass(frozen=True, kw_only=True)
class SiteInfo:
    """One site of one model: what its value looks like and what may be done with it."""

    name: str
    """Canonical spelling, ``blocks.7.resid_post``."""
    axes: tuple[str, ...]
    """Name of every dimension after the batch, from :data:`AXES`."""
    shape: tuple[int, ...]
    """Size of every dimension after the batch."""
    readable: bool = True
    """Whether ``run`` gives it."""
    editable: bool = True
    """Whether ``editing`` accepts it."""
    reason: str = ""
    """Why it is not editable, empty when it is."""
    grid: TokenGrid | None = None
    """Tokens along the token (or query) axis; None where the site has no such axis."""

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.shape):
            raise ValueError(f"site {self.name}: axes {self.axes} do not match {self.shape}")
        if unknown := set(self.axes) - set(AXES):
            raise ValueError(f"site {self.name}: unknown axes {sorted(unknown)}; allowed {AXES}")
        if not self.editable and not self.reason:
            raise ValueError(f"site {self.name} is read-only and does not say why")
        token = self.token_axis
        if token is not None and (self.grid is None or self.grid.n_tokens != self.shape[token]):
            raise ValueError(
                f"site {self.name}: {self.shape[token]} tokens along axis "
                f"{self.axes[token]!r}, but its grid is {self.grid}"
            )

    @property
    def token_axis(self) -> int | None:
        """Index into ``axes`` of the dimension that is stored as tokens, if any."""
        for axis in ("token", "query"):
            if axis in self.axes:
                return self.axes.index(axis)
        return None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Token kinds in a store; ``("item",)`` for a site without a token axis."""
        if self.token_axis is None or self.grid is None:
            return ("item",)
        return self.grid.kinds

    @property
    def width(self) -> int:
        """Stored channels a token: all other dimensions flattened."""
        token = self.token_axis
        return math.prod(n for i, n in enumerate(self.shape) if i != token)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        data = asdict(self)
        data["axes"], data["shape"] = list(self.axes), list(self.shape)
        data["grid"] = None if self.grid is None else self.grid.to_json()
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild from :meth:`to_json`."""
        grid = data["grid"]
        return cls(
            **{
                **data,
                "axes": tuple(data["axes"]),
                "shape": tuple(data["shape"]),
                "grid": None if grid is None else TokenGrid.from_json(grid),
            }
        )


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Identity and geometry of a loaded model: goes into the manifest of a store."""

    id: str
    """Name it was loaded by, ``timm/vit_small_patch14_dinov2``."""
    family: str
    """Family file that describes it, ``timm_vit``."""
    backend: str
    """Library and version that runs it, ``timm 1.0.31``."""
    revision: str = ""
    """Revision or tag of the checkpoint, as the backend names it; empty if it has none."""
    weights: str = ""
    """Digest of the weights in use (names, dtypes, shapes, bytes): ``sha256:...``."""
    d_model: int
    """Width of the residual stream (of the first stage where it varies)."""
    n_layers: int
    """Number of blocks."""
    n_heads: int
    """Attention heads a block (of the first stage where it varies)."""
    d_head: int
    """Channels a head."""
    d_mlp: int
    """Hidden width of the MLP, 0 where there is none."""
    n_classes: int = 0
    """Outputs of the head, 0 where there is none."""
    grid: TokenGrid
    """Tokens of the residual stream."""
    input_shape: tuple[int, ...]
    """One input without its batch: (channels, height, width), or as the backend wants clips."""
    transform: Mapping[str, Any] = field(default_factory=dict)
    """Preprocessing that belongs to the weights, as JSON-able values."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        data["grid"] = self.grid.to_json()
        data["input_shape"] = list(self.input_shape)
        data["transform"] = dict(self.transform)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild from :meth:`to_json`."""
        return cls(
            **{
                **data,
                "grid": TokenGrid.from_json(data["grid"]),
                "input_shape": tuple(data["input_shape"]),
            }
        )

    def fingerprint(self) -> str:
        """Return the sha256 of the sorted JSON: equal exactly when every field is equal."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def expand_sites(patterns: str | Sequence[str], available: Iterable[str]) -> list[str]:
    """Expand site patterns against the sites of a model or of a store.

    A pattern may be a comma list, a glob (``blocks.*.resid_post``), hold braces
    (``blocks.{5,7}.mlp_out``, ``blocks.{0..3}.z``), and be spelt as TransformerLens or Prisma
    do (``blocks.7.hook_resid_post``, ``tl:blocks.7.hook_mlp_in``). Layers may be counted from
    the end of those available (``blocks.-1.resid_post``).

    Parameters
    ----------
    patterns
        One pattern or several.
    available
        Canonical names, in model order.

    Returns
    -------
    list[str]
        Names without repetition, in the order of `available`.

    Raises
    ------
    ValueError
        A pattern matches nothing (the message names the nearest site), or is ambiguous
        between dialects.
    """
    names = list(available)
    chosen: set[str] = set()
    asked = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in itertools.chain.from_iterable(map(_split, asked)):
        wanted = {concrete(translate(name), names) for name in _braces(pattern)}
        for name in sorted(wanted):
            hits = fnmatch.filter(names, name) if any(c in name for c in "*?[") else None
            if hits is None:
                hits = [name] if name in names else []
            if not hits:
                raise ValueError(_no_site(pattern, name, names))
            chosen.update(hits)
    return [name for name in names if name in chosen]


def _no_site(pattern: str, name: str, names: Sequence[str]) -> str:
    as_ = "" if name == pattern else f" (as {name!r})"
    near = nearest(name, names)
    few = f"; of its {len(names)} sites the first are {', '.join(names[:4])}" if names else ""
    hint = f"nearest: {', '.join(near)}" if near else f"nothing is spelt like it{few}"
    return (
        f"no site matches {pattern!r}{as_}; {hint}. "
        "List them all with model.sites(), or store.sites for a store"
    )


def _split(text: str) -> list[str]:
    """Split at the commas outside of braces."""
    parts = re.split(r",(?![^{}]*\})", text)
    parts = [part.strip() for part in parts if part.strip()]
    if not parts:
        raise ValueError("no site was asked for: the pattern is empty")
    return parts


def _braces(text: str) -> list[str]:
    """Expand ``{a,b}`` and ``{0..3}`` (both ends included)."""
    match = re.search(r"\{([^{}]*)\}", text)
    if match is None:
        if "{" in text or "}" in text:
            raise ValueError(f"unbalanced braces in site pattern {text!r}")
        return [text]
    inner = match.group(1)
    span = re.fullmatch(r"\s*(\d+)\.\.(\d+)\s*", inner)
    if span:
        options = [str(i) for i in range(int(span.group(1)), int(span.group(2)) + 1)]
    else:
        options = [option.strip() for option in inner.split(",")]
    head, tail = text[: match.start()], text[match.end() :]
    return [name for option in options for name in _braces(head + option + tail)]
