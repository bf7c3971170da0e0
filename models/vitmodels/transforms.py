"""Preprocessing that belongs to the weights, with a description that goes into manifests."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class Transform:
    """Image (or list of frames) to model input, with a JSON-able description.

    Parameters
    ----------
    function
        The backend's own preprocessing; picklable, so that worker processes can hold it.
    description
        Everything it depends on, as JSON-able values. Equal descriptions must mean equal
        outputs: the fingerprint is made from it.
    """

    def __init__(self, function: Callable[[Any], Tensor], description: Mapping[str, Any]) -> None:
        self.function = function
        self._description = json.loads(json.dumps(dict(description)))

    def __call__(self, image: Any) -> Tensor:
        """Return a float tensor: ``[C, H, W]`` for an image."""
        return self.function(image)

    def describe(self) -> dict[str, Any]:
        """Return what the output depends on."""
        return dict(self._description)

    def fingerprint(self) -> str:
        """Return the sha256 of the sorted description."""
        text = json.dumps(self._description, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def __repr__(self) -> str:
        return f"Transform({self._description})"


class _RGB:
    """Convert to RGB first: files hold grey, palette and CMYK images too."""

    def __init__(self, function: Callable[[Image.Image], Tensor]) -> None:
        self.function = function

    def __call__(self, image: Image.Image) -> Tensor:
        return self.function(image.convert("RGB"))


def timm_transform(config: Mapping[str, Any]) -> Transform:
    """Return timm's evaluation preprocessing for a data configuration of timm.

    Parameters
    ----------
    config
        What ``timm.data.resolve_model_data_config`` returns: input_size, interpolation, mean,
        std, crop_pct, crop_mode.
    """
    import timm.data

    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    kept = {key: config[key] for key in keys if key in config}
    if kept["input_size"][0] == 1:
        raise ValueError("timm preprocessing is for colour images, but the model takes one channel")
    function = timm.data.create_transform(**kept, is_training=False)
    kept = {key: list(v) if isinstance(v, tuple) else v for key, v in kept.items()}
    return Transform(_RGB(function), {"kind": "timm", **kept})


class _Grey:
    def __init__(self, size: tuple[int, int], mean: float, std: float) -> None:
        self.size, self.mean, self.std = size, mean, std

    def __call__(self, image: Image.Image) -> Tensor:
        grey = image.convert("L")
        if grey.size != self.size[::-1]:
            grey = grey.resize(self.size[::-1], Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.asarray(grey, dtype=np.float32) / 255)
        return ((pixels - self.mean) / self.std)[None]


def grey_transform(size: tuple[int, int], mean: float, std: float) -> Transform:
    """Return ``(grey / 255 - mean) / std``, resized bilinearly to (height, width) if needed."""
    description = {
        "kind": "grey",
        "input_size": [1, *size],
        "interpolation": "bilinear",
        "mean": [mean],
        "std": [std],
    }
    return Transform(_Grey(size, mean, std), description)
