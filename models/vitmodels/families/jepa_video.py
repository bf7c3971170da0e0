"""V-JEPA 1: timm's ``VisionTransformer`` behind a tubelet embedding.

The published encoders (arXiv:2404.08471) have the blocks, norms and weight names of timm's ViT
without a class token; only the patch embedding is three-dimensional. So timm's module runs
them, given a convolution over time, height and width as its ``embed_layer``. The predictor of
the pretraining is not part of it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitmodels.families.timm_vit import FAMILY as VIT
from vitmodels.family import Anatomy, Family, Request
from vitmodels.weights import first_mismatch, read_weights

_URL = "https://dl.fbaipublicfiles.com/jepa"
_LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "img_size": 224}
_HUGE = {"embed_dim": 1280, "depth": 32, "num_heads": 16, "img_size": 224}
_SIZES: dict[str, dict[str, int]] = {
    "vitl16": _LARGE,
    "vith16": _HUGE,
    "vith16-384": _HUGE | {"img_size": 384},
}
FRAMES, TUBELET = 16, 2


class TubeletEmbed(nn.Module):
    """Cut a clip into boxes and project each: ``[B, C, T, H, W] -> [B, N, D]``.

    The N boxes are in (time, height, width) order.
    """

    def __init__(
        self,
        *,
        frames: int,
        tubelet: int,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        **_: Any,
    ) -> None:
        super().__init__()
        box = (tubelet, patch_size, patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel_size=box, stride=box)
        self.frames = frames
        self.img_size = (img_size, img_size)
        self.grid_size = (frames // tubelet, img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1] * self.grid_size[2]

    def forward(self, x: Tensor) -> Tensor:
        """Embed a clip."""
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens


def encoder(*, frames: int = FRAMES, tubelet: int = TUBELET, **options: Any) -> nn.Module:
    """Build timm's module with a tubelet embedding; `options` are those of timm's class."""
    from timm.models.vision_transformer import VisionTransformer

    module: nn.Module = VisionTransformer(
        class_token=False,
        global_pool="",
        num_classes=0,
        embed_layer=partial(TubeletEmbed, frames=frames, tubelet=tubelet),
        **options,
    )
    return module


def call_clip(module: nn.Module, x: Tensor) -> Tensor:
    """Run on ``[B, T, C, H, W]``, the layout of the other video models; gives ``[B, N, D]``."""
    output: Tensor = module(x.transpose(1, 2))
    return output


class JepaVideo(Family):
    """The three encoders of V-JEPA 1."""

    name = "jepa_video"
    prefix = "vjepa"
    backend = "timm"

    def names(self) -> Sequence[str]:
        """Return the published encoders."""
        return tuple(_SIZES)

    def build(self, request: Request) -> nn.Module:
        """Build timm's module; read the target encoder of a published checkpoint."""
        sizes = _SIZES[request.name]
        side = sizes["img_size"]
        if request.img_size not in (None, side, (side, side)):
            raise ValueError(
                f"vjepa/{request.name} takes frames of {side} x {side}, not {request.img_size}: "
                "its positions are fixed. There are vjepa/vith16 (224) and vjepa/vith16-384"
            )
        module = encoder(patch_size=16, **sizes)
        path = request.weights
        if path is None and request.pretrained:
            path = _fetch(request.name)
        if path is not None:
            state = {k.removeprefix("backbone."): v for k, v in read_weights(path).items()}
            if mismatch := first_mismatch(state, module):
                raise ValueError(f"{path} does not fit vjepa/{request.name}: {mismatch}")
            module.load_state_dict(state)
        return module

    def accepts(self, module: Any) -> bool:
        """Accept timm's ViT behind our tubelet embedding."""
        return VIT.accepts(module) and isinstance(module.patch_embed, TubeletEmbed)

    def anatomy(self, module: Any) -> Anatomy:
        """Describe it as a columnar ViT on clips, without a head."""
        from vitmodels.hf_backend import backend
        from vitmodels.hf_preprocess import Processor, clip_transform

        backend()  # the preprocessing is transformers' for V-JEPA: say so where it is missing
        found = VIT.anatomy(module)
        channels, height, width = found.input_shape
        frames = module.patch_embed.frames
        processor = Processor.from_defaults(
            "VJEPA2VideoProcessor",
            {
                "size": {"shortest_edge": height * 256 // 224},
                "crop_size": {"height": height, "width": width},
            },
        )
        return dataclasses.replace(
            found,
            taps={name: tap for name, tap in found.taps.items() if name != "pooled"},
            input_shape=(frames, channels, height, width),
            transform=clip_transform(processor, frames),
            call=call_clip,
        )

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return two small encoders."""
        small = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 4}
        return {
            "tubelet_2": lambda: encoder(frames=6, **small),
            "tubelet_3": lambda: encoder(frames=6, tubelet=3, **small),
        }


def _fetch(name: str) -> Path:
    """Return the published checkpoint, downloaded into torch's hub folder at first."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"vjepa-{name}.pth.tar"
    if path.is_file():
        return path
    url = f"{_URL}/{name}/{name}.pth.tar"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), progress=False)
    except Exception as error:
        cause = (str(error).splitlines() or [""])[0]
        raise FileNotFoundError(
            f"the weights of vjepa/{name} could not be fetched from {url} "
            f"({type(error).__name__}: {cause}). Give weights= a local file, pretrained=False for "
            f"random ones, or put the file at {path}"
        ) from error
    return path


FAMILY = JepaVideo()
