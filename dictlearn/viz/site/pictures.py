"""Pictures of items as the model saw them: cropped and resized, out of the data set."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

SMALL = 64
"""Pictures of at most so many pixels a side are kept as they are; the page enlarges them."""

THUMB = 128
"""Longer side of a thumbnail in pixels."""

LARGE = 448
"""Longer side of the picture of an item's page."""


class Pictures:
    """Pictures out of a data set, by position in it.

    Parameters
    ----------
    source
        The data set (`actstore.sources.Source`).
    transform
        The model's preprocessing; without it the picture is cropped as its description says.
    description
        That description, of the model in the manifest; may be empty.
    """

    def __init__(
        self, source: Any, transform: Any | None, description: Mapping[str, Any] | None
    ) -> None:
        self.source, self.transform = source, transform
        self.description = dict(description or {})

    def input(self, index: int) -> Any:
        """Return one input of the model, a tensor; needs the transform.

        Raises
        ------
        ValueError
            When the item cannot be decoded (`actstore.sources.Undecodable`).
        """
        import torch

        image = self.source.image(index)
        if isinstance(image, torch.Tensor | np.ndarray):
            return torch.as_tensor(image)
        if self.transform is None:
            raise ValueError("an input needs the model's own preprocessing")
        return self.transform(image)

    def frames(self, index: int) -> list[Image.Image]:
        """Return the picture of an item, or the frames of a clip.

        Raises
        ------
        ValueError
            When the item cannot be decoded (`actstore.sources.Undecodable`).
        """
        image = self.source.image(index)
        if not isinstance(image, Image.Image) and not hasattr(image, "frames"):
            return self.unscale(np.asarray(image, dtype=np.float32))
        if self.transform is not None:
            return self.unscale(np.asarray(self.transform(image), dtype=np.float32))
        if isinstance(image, Image.Image):
            return [self._crop(image.convert("RGB" if image.mode != "L" else "L"))]
        return [self._crop(Image.fromarray(frame)) for frame in image.frames]

    def unscale(self, x: np.ndarray) -> list[Image.Image]:
        """Turn an input [C, H, W] or [time, C, H, W] back into pictures: ``x * std + mean``."""
        if x.ndim == 3:
            x = x[None]
        if x.ndim != 4:
            raise ValueError(f"an item of shape {x.shape} is no picture")
        if x.shape[1] not in (1, 3) and x.shape[0] in (1, 3):
            x = x.swapaxes(0, 1)
        mean = self.description.get("mean", self.description.get("image_mean"))
        std = self.description.get("std", self.description.get("image_std"))
        if mean is not None and std is not None and len(np.atleast_1d(mean)) in (1, x.shape[1]):
            x = x * np.reshape(std, (-1, 1, 1)) + np.reshape(mean, (-1, 1, 1))
        else:
            low, high = float(x.min()), float(x.max())
            x = (x - low) / ((high - low) or 1.0)
        pixels = np.clip(np.round(x * 255), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
        return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p[..., :3]) for p in pixels]

    def _crop(self, image: Image.Image) -> Image.Image:
        """Resize the shorter side and cut the middle out, as most preprocessing does."""
        size = self.description.get("input_size") or self.description.get("size") or [224, 224]
        sides = list(size.values()) if isinstance(size, Mapping) else list(size)
        height, width = (int(sides[-2]), int(sides[-1])) if len(sides) > 1 else (sides[0],) * 2
        share = float(self.description.get("crop_pct", 1.0)) or 1.0
        scale = max(height / share / image.height, width / share / image.width)
        resized = image.resize(
            (max(width, round(image.width * scale)), max(height, round(image.height * scale))),
            Image.Resampling.BICUBIC,
        )
        left, top = (resized.width - width) // 2, (resized.height - height) // 2
        return resized.crop((left, top, left + width, top + height))


def encode(picture: Image.Image, side: int) -> bytes:
    """Return a picture as WebP of at most `side` pixels; small ones without loss."""
    sink = io.BytesIO()
    if max(picture.size) <= SMALL:
        picture.save(sink, "WEBP", lossless=True)
    else:
        copy = picture.copy()
        copy.thumbnail((side, side), Image.Resampling.LANCZOS)
        copy.save(sink, "WEBP", quality=80, method=4)
    return sink.getvalue()


def middle(frames: Sequence[Image.Image]) -> Image.Image:
    """Return the frame that stands for a clip."""
    return frames[len(frames) // 2]
