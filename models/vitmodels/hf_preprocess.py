"""Preprocessing of transformers: its own image and video processors, as a `Transform`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitmodels.transforms import Transform

_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True, kw_only=True)
class Processor:
    """A processor class of transformers and its complete configuration."""

    cls: str
    """``ViTImageProcessor``, ``VivitVideoProcessor``."""
    config: Mapping[str, Any]
    """What its ``to_dict`` gives, as JSON-able values."""

    @classmethod
    def from_defaults(cls, name: str, changes: Mapping[str, Any]) -> Self:
        """Return a processor by the defaults of its class and what a row changes."""
        import transformers

        return cls.of(getattr(transformers, name)(**changes))

    @classmethod
    def of(cls, processor: Any) -> Self:
        """Describe a processor of transformers."""
        config = {k: v for k, v in processor.to_dict().items() if v is not None}
        return cls(cls=type(processor).__name__, config=json.loads(json.dumps(config)))

    @classmethod
    def from_place(cls, place: str | Path, where: Mapping[str, Any], usual: str) -> Self | None:
        """Return the processor saved beside weights, None where there is none.

        `usual` is the class of the family: it says whether images or clips are processed.
        """
        import transformers

        if isinstance(place, Path) and not any((place / name).is_file() for name in _FILES):
            return None
        if usual.endswith("VideoProcessor"):
            kind = getattr(transformers, usual)
        else:
            kind = transformers.AutoImageProcessor
        try:
            return cls.of(kind.from_pretrained(place, **where))
        except OSError:  # published without one
            return None

    def make(self) -> Any:
        """Build the processor."""
        import transformers

        return getattr(transformers, self.cls).from_dict(dict(self.config))


def output_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return (height, width) of what a processor gives, None where it follows the input."""
    crop, size = config.get("crop_size"), config.get("size")
    if config.get("do_center_crop", crop is not None) and crop:
        return int(crop["height"]), int(crop["width"])
    if config.get("do_resize", True) and size and "height" in size:
        return int(size["height"]), int(size["width"])
    return None


def sized(processor: Processor, size: tuple[int, int]) -> Processor:
    """Return the processor for another output size, the ratio of resize to crop kept."""
    before = output_size(processor.config)
    if before == size or before is None:
        return processor
    config = dict(processor.config)
    height, width = size
    resize = config.get("size", {})
    if "crop_size" in config:
        config["crop_size"] = {"height": height, "width": width}
    if "shortest_edge" in resize:
        ratio = max(height, width) / min(before)
        config["size"] = {"shortest_edge": round(resize["shortest_edge"] * ratio)}
    elif "height" in resize:
        config["size"] = {
            "height": round(resize["height"] * height / before[0]),
            "width": round(resize["width"] * width / before[1]),
        }
    return replace(processor, config=config)


def image_transform(processor: Processor) -> Transform:
    """Return the transform PIL image -> ``[C, H, W]``."""
    return Transform(_Images(processor), {"kind": "transformers", **processor.config})


def clip_transform(processor: Processor, frames: int) -> Transform:
    """Return the transform frames -> ``[T, C, H, W]``.

    Frames are ``[T, H, W, 3]`` of uint8, a sequence of PIL images, or a `vitmodels.clips.Clip`.
    """
    description = {"kind": "transformers", "frames": frames, **processor.config}
    return Transform(_Clips(processor, frames), description)


class _Images:
    def __init__(self, processor: Processor) -> None:
        self.processor = processor.make()

    def __call__(self, image: Any) -> Tensor:
        if not isinstance(image, Image.Image):
            frames = getattr(image, "frames", image)
            kind = f"array of shape {np.shape(frames)}" if np.ndim(frames) else type(image).__name__
            raise ValueError(
                f"this model takes images, got a {kind}; give a PIL image (clips need a video "
                "model: vitmodels.list_models('vivit'), 'videomae', 'vjepa2', 'timesformer')"
            )
        batch = self.processor(images=image.convert("RGB"), return_tensors="pt")
        pixels: Tensor = batch["pixel_values"][0]
        return pixels


class _Clips:
    def __init__(self, processor: Processor, frames: int) -> None:
        self.processor = processor.make()
        self.frames = frames

    def __call__(self, clip: Any) -> Tensor:
        clip = getattr(clip, "frames", clip)
        if isinstance(clip, Image.Image) or np.ndim(clip) == 3:
            raise ValueError(
                f"this model takes clips of {self.frames} frames, got one image; give frames "
                "[T, H, W, 3] (vitmodels.clips reads them from files) or use an image model"
            )
        if isinstance(clip, Sequence):
            clip = np.stack([np.asarray(frame.convert("RGB")) for frame in clip])
        frames_THWC = torch.as_tensor(clip)
        if frames_THWC.dim() != 4 or frames_THWC.shape[-1] != 3:
            raise ValueError(
                f"a clip is frames [T, H, W, 3] of uint8, got shape {tuple(frames_THWC.shape)}"
            )
        if frames_THWC.shape[0] != self.frames:
            raise ValueError(
                f"this model takes clips of {self.frames} frames, got {frames_THWC.shape[0]}: "
                f"sample them with vitmodels.clips.ClipSampling(frames={self.frames})"
            )
        batch = self.processor(frames_THWC.permute(0, 3, 1, 2), return_tensors="pt")
        key = "pixel_values_videos" if "pixel_values_videos" in batch else "pixel_values"
        pixels: Tensor = batch[key][0]
        return pixels
