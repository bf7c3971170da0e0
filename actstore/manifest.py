"""The one description of a store: what is in it, in which layout, from what.

A manifest is pure data. Its fingerprint, the sha256 of its canonical JSON, ties a store, the
dictionaries trained on it and their reports together. It holds no time stamp and nothing else
that differs between two runs of the same plan.
"""

import base64
import binascii
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

FORMAT = 1
"""Version of the store format that this code writes; it reads this and older ones."""

DTYPES: dict[str, str] = {
    "float16": "float16",
    "bfloat16": "uint16",
    "float32": "float32",
    "int8": "int8",
}
"""Activation dtype -> Zarr data type that holds its bits."""

ITEM_SIZE: dict[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "int8": 1}
"""Activation dtype -> bytes of one value."""

CODECS = ("raw", "archive")
"""Codec profiles a store may be written with."""

MAX_JSON_BYTES = 64 << 20
"""A manifest or commit record larger than this is refused before it is parsed."""

MAX_OBJECT_BYTES = 4 << 30
"""An index or sidecar larger than this, packed or unpacked, is refused before it is read."""

MAX_PARTS = 1 << 25
"""Parts of a store; what is held of each is taken at once when a store is opened."""

MAX_TOKENS = 1 << 24
"""Tokens of an item, whose places in a shard are worked out at once."""

_LATER = ("scales",)
"""Fields that came after the first stores: absent from the JSON when they are empty."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,199}\Z")


class FormatError(ValueError):
    """A file of a store is damaged, foreign or of a format this version does not know."""


def validate_name(name: str, what: str) -> str:
    """Return `name` if it is safe as one component of a path.

    Allowed are letters, digits, ``_``, ``-`` and ``.``, starting with a letter or a digit, at
    most 200 characters, without ``..``.

    Raises
    ------
    FormatError
        For any other name: it could leave the folder of the store or collide with Zarr's files.
    """
    if not isinstance(name, str) or not _NAME.match(name) or ".." in name or name == "zarr.json":
        raise FormatError(
            f"{what} {name!r} cannot be a folder of a store: allowed are letters, digits, '_', "
            "'-' and single '.', starting with a letter or digit, at most 200 characters"
        )
    return name


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array of the store: one token kind of one site, shape [item, token, channel]."""

    site: str
    """Name of the place in the model."""
    kind: str
    """Token kind: ``cls``, ``register``, ``patch``, or ``item`` for a site without tokens."""
    tokens: int
    """Number of tokens an item."""
    channels: int
    """Number of values a token."""
    stripe_tokens: int = 1
    """Tokens of an inner chunk; divides `tokens`."""
    first: int = 0
    """Number of this kind's first token in the site's full token order."""
    of: int = 0
    """Positions that an item's tokens were chosen from; 0 where all of them are kept."""

    def __post_init__(self) -> None:
        validate_name(self.site, "site")
        validate_name(self.kind, "token kind")
        for field in ("tokens", "channels", "stripe_tokens"):
            value = getattr(self, field)
            if type(value) is not int or not 1 <= value < 1 << 40:
                raise FormatError(f"{self.path}: {field} must be a positive integer, not {value!r}")
        if type(self.first) is not int or not 0 <= self.first < 1 << 40:
            raise FormatError(f"{self.path}: first must be an integer >= 0, not {self.first!r}")
        if type(self.of) is not int or not (self.of == 0 or self.tokens <= self.of < 1 << 31):
            raise FormatError(f"{self.path}: {self.tokens} tokens cannot be of {self.of!r}")
        if self.tokens > MAX_TOKENS or self.channels >= 1 << 31:
            raise FormatError(
                f"{self.path}: {self.tokens} tokens of {self.channels} channels; at most "
                f"{MAX_TOKENS} of less than {1 << 31} are read"
            )
        if self.tokens % self.stripe_tokens:
            raise FormatError(
                f"{self.path}: stripe_tokens {self.stripe_tokens} does not divide {self.tokens}"
            )

    @property
    def path(self) -> str:
        """Folder of the array inside the store, also its name in commit records."""
        return f"acts/{self.site}/{self.kind}"

    @property
    def span(self) -> int:
        """Number of positions the kind has in the model: token numbers end at first + span."""
        return self.of or self.tokens

    @property
    def n_stripes(self) -> int:
        """Number of inner chunks of a shard."""
        return self.tokens // self.stripe_tokens


def scale_path(array: ArraySpec) -> str:
    """Return the folder of the Zarr array that shows the scales of an array."""
    return f"{array.path}_scale"


def encode_scale(scale: Float32[np.ndarray, " channel"]) -> str:
    """Return the scale of each channel as a manifest holds it."""
    return base64.b64encode(np.ascontiguousarray(scale, dtype="<f4").tobytes()).decode()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that decides the bytes of a store."""

    items: int
    """Number of items planned, undecodable ones included."""
    items_per_part: int
    """S, the number of items of a part (the last one may be shorter)."""
    arrays: tuple[ArraySpec, ...]
    """Arrays in site order."""
    dtype: str = "float16"
    """Activation dtype on disk, one of `DTYPES`."""
    codec: str = "raw"
    """Codec profile, one of `CODECS`."""
    sites: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Site -> its axes, shape and token grid, as the model describes it."""
    order: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"kind": "source"})
    """How items were ordered: ``{"kind": "keyed", "seed": s, "source_items": n}`` or source."""
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Description of the data set, enough to open it again, with a fingerprint."""
    model: Mapping[str, Any] | None = None
    """Description of the model; None for arrays that were written from memory."""
    compute: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What else decides bits: the batch size and the autocast dtype of the forward pass."""
    format: int = FORMAT
    """Version of the store format."""
    scales: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Array path -> base64 of the float32 scale of each channel: an int8 q stands for
    ``q * scale``. Empty for other dtypes, and for integers that stand for themselves."""

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise FormatError(
                f"the store has format {self.format!r}, this actstore reads format {FORMAT}: "
                "update it with `pip install -U actstore`"
            )
        if self.dtype not in DTYPES:
            raise FormatError(f"dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        if self.codec not in CODECS:
            raise FormatError(f"codec {self.codec!r} is none of {', '.join(CODECS)}")
        for field, least in (("items", 0), ("items_per_part", 1)):
            value = getattr(self, field)
            if type(value) is not int or not least <= value < 1 << 48:
                raise FormatError(f"{field} must be an integer >= {least}, not {value!r}")
        if self.n_parts > MAX_PARTS:
            raise FormatError(
                f"{self.items} items in parts of {self.items_per_part} are {self.n_parts} parts, "
                f"at most {MAX_PARTS} are read: more items_per_part"
            )
        paths = [a.path for a in self.arrays]
        if not paths or len(set(paths)) != len(paths):
            raise FormatError(f"a store needs at least one array, each once; found {paths}")
        if len({p.lower() for p in paths}) != len(paths):
            raise FormatError(f"array names must differ in more than case; found {paths}")
        if self.scales:
            self._check_scales(paths)
        chosen = {(a.kind, a.tokens, a.of) for a in self.arrays if a.of}
        if len({kind for kind, _, _ in chosen}) != len(chosen):
            raise FormatError(f"arrays of a kind must have the same tokens chosen; found {chosen}")

    def _check_scales(self, paths: Sequence[str]) -> None:
        """Refuse scales that are not those of the arrays, finite and positive."""
        if self.dtype != "int8" or set(self.scales) != set(paths):
            raise FormatError("scales belong to every array of an int8 store and to nothing else")
        for array in self.arrays:
            if scale_path(array) in paths:
                raise FormatError(f"{scale_path(array)} holds scales, it cannot be an array")
            scale = self.scale(array)
            if scale is None or not (np.isfinite(scale).all() and (scale > 0).all()):
                raise FormatError(f"{array.path}: scales must be finite and positive")

    def scale(self, array: ArraySpec) -> Float32[np.ndarray, " channel"] | None:
        """Return the scale of each channel of an array, None where values are stored plainly.

        Raises
        ------
        FormatError
            When there is not one float32 a channel.
        """
        if not self.scales:
            return None
        try:
            data = base64.b64decode(self.scales[array.path], validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise FormatError(f"{array.path}: scales are not base64") from error
        if len(data) != 4 * array.channels:
            raise FormatError(f"{array.path}: {len(data)} bytes of scales for {array.channels}")
        return np.frombuffer(data, "<f4")

    @property
    def n_parts(self) -> int:
        """Number of parts of the plan."""
        return -(-self.items // self.items_per_part)

    def planned(self, part: int) -> int:
        """Return how many items of the plan fall into `part`."""
        return min(self.items_per_part, self.items - part * self.items_per_part)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sha256 of the canonical JSON, in hexadecimal."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as JSON types, arrays as a list; later fields only where used."""
        value = json.loads(json.dumps(dataclasses.asdict(self), allow_nan=False))
        for array in value["arrays"]:
            if not array["of"]:
                del array["of"]
        return {k: v for k, v in value.items() if v or k not in _LATER}

    @classmethod
    def from_json(cls, value: Any) -> "Manifest":
        """Build a manifest from parsed JSON, checking every field.

        Raises
        ------
        FormatError
            When a field is missing, unknown or has a value that is not allowed.
        """
        if not isinstance(value, Mapping):
            raise FormatError(f"a manifest must be a JSON object, found {type(value).__name__}")
        if value.get("format") != FORMAT:
            cls(items=0, items_per_part=1, arrays=(), format=value.get("format", 0))
        known = {f.name for f in dataclasses.fields(cls)}
        required = {"items", "items_per_part", "arrays", "format"}
        if unknown := set(value) - known:
            raise FormatError(f"the manifest has unknown fields {sorted(unknown)}")
        if missing := required - set(value):
            raise FormatError(f"the manifest lacks the fields {sorted(missing)}")
        for field in ("sites", "order", "data", "compute", *_LATER):
            if not isinstance(value.get(field, {}), Mapping):
                raise FormatError(f"the manifest's field {field} must be a JSON object")
        if not isinstance(value["arrays"], Sequence) or isinstance(value["arrays"], str):
            raise FormatError("the manifest's field arrays must be a list")
        try:
            arrays = tuple(ArraySpec(**a) for a in value["arrays"])
        except TypeError as error:
            raise FormatError(f"the manifest describes an array wrongly: {error}") from error
        return cls(**{**value, "arrays": arrays})

    def diff(self, other: "Manifest") -> list[str]:
        """Name every field in which `other` differs, as ``field: mine -> other's``."""
        mine, theirs = _flatten(self.to_json()), _flatten(other.to_json())
        absent = "absent"
        return [
            f"{key}: {mine.get(key, absent)} -> {theirs.get(key, absent)}"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key, absent) != theirs.get(key, absent)
        ]


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Return the leaves of nested JSON by dotted name; arrays of the store by their path."""
    if isinstance(value, Mapping):
        pairs = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, list) and value and isinstance(value[0], Mapping) and prefix == "arrays":
        pairs = [(f"{v['site']}/{v['kind']}", v) for v in value]
    else:
        text = json.dumps(value)
        return {prefix: text if len(text) <= 120 else text[:100] + "..." + _digest(text)}
    out: dict[str, str] = {}
    for key, inner in pairs:
        out.update(_flatten(inner, f"{prefix}.{key}" if prefix else key))
    return out


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
