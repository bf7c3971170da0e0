"""The built-in data set: 5,000 handwritten digits of 20 x 20 pixels, 500 of each.

From the sample data of OpenCV (Apache-2.0); one PNG sheet of 50 x 100 digits.
"""

import functools
import hashlib
import importlib.resources
import io
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image


@functools.cache
def _sheet() -> bytes:
    return importlib.resources.files("actstore.sources").joinpath("digits.png").read_bytes()


@functools.cache
def digit_images() -> UInt8[np.ndarray, "5000 20 20"]:
    """Return all digits, 0 first; digit i shows ``i // 500``."""
    pixels = np.asarray(Image.open(io.BytesIO(_sheet())).convert("L"))
    return pixels.reshape(50, 20, 100, 20).transpose(0, 2, 1, 3).reshape(-1, 20, 20)


class Digits:
    """The digits as a source of grey images."""

    def __len__(self) -> int:
        return len(digit_images())

    def row(self, index: int) -> dict[str, Any]:
        """Return key, label and label name."""
        label = index // 500
        return {"key": f"digit-{index:04d}", "label": label, "label_name": str(label)}

    def image(self, index: int) -> Image.Image:
        """Return digit `index` as a grey image."""
        return Image.fromarray(digit_images()[index])

    def describe(self) -> dict[str, Any]:
        """Return the words for the manifest."""
        return {
            "kind": "digits",
            "items": len(self),
            "fingerprint": hashlib.sha256(_sheet()).hexdigest(),
        }
