"""What a harvest needs from a data set: items by number, and words for the manifest."""

import hashlib
import io
import json
import struct
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from PIL import Image

MAX_PIXELS = 1 << 26
"""Images with more pixels are refused before they are decoded (67 million)."""


class Undecodable(ValueError):
    """An item exists in the data set and cannot be turned into an image; says why."""


class Unreachable(OSError):
    """The storage of an item fails or refuses, which says nothing about the item."""


class Source(Protocol):
    """A data set with random access; `row` and `image` are called from several threads."""

    def __len__(self) -> int:
        """Return the number of items."""

    def row(self, index: int) -> Mapping[str, Any]:
        """Return the index columns of an item: key, label, label_name and any others.

        Never raises `Undecodable`: an item that is skipped has a row too.
        """

    def image(self, index: int) -> Any:
        """Return a decoded PIL image, or a tensor that the model takes as it is.

        Raises
        ------
        Undecodable
            When the item is missing or damaged.
        Unreachable
            When the storage it lies on fails; `row` may raise it too.
        """

    def describe(self) -> dict[str, Any]:
        """Return JSON for the manifest: kind, where it lies, items, fingerprint."""


@runtime_checkable
class ForModel(Protocol):
    """A source whose items depend on the model: clips of as many frames as it takes."""

    def for_model(self, spec: Any) -> Any:
        """Return the source for a `vitmodels.ModelSpec`; ValueError where they do not fit."""


def decode_image(data: bytes) -> Image.Image:
    """Decode an encoded image in full.

    Raises
    ------
    Undecodable
        When the bytes are not a whole image, or one of more than `MAX_PIXELS` pixels.
    """
    if not data:
        raise Undecodable("no bytes")
    try:
        image = Image.open(io.BytesIO(data))
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise Undecodable(f"{width} x {height} pixels, at most {MAX_PIXELS} are decoded")
        image.load()
    except Undecodable:
        raise
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        struct.error,
        IndexError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise Undecodable(f"cannot be decoded: {_one_line(error)}") from error
    return image


def digest(entries: Iterable[Any]) -> str:
    """Return the sha256 of JSON entries, a line each: the fingerprint of a list of items."""
    sha = hashlib.sha256()
    for entry in entries:
        sha.update(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
    return sha.hexdigest()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(" <_io.BytesIO")[0][:200]
