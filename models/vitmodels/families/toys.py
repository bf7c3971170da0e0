"""Toys: small ViTs trained on handwritten digits, with their weights in the package."""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitmodels import transforms
from vitmodels.families.timm_vit import FAMILY as VIT
from vitmodels.family import Anatomy, Family, Request
from vitmodels.weights import first_mismatch, read_metadata, read_weights

_NAMES = tuple(f"digits-{n}l{kind}" for n in (1, 2, 3, 4) for kind in ("", "-attn"))
MEAN, STD = 0.1307, 0.3081


class Zero(nn.Module):
    """An MLP branch that adds exactly 0."""

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros like `x`."""
        return torch.zeros_like(x)


def toy_module(name: str) -> nn.Module:
    """Build a toy by name, ``digits-2l`` or (attention only) ``digits-2l-attn``."""
    from timm.models.vision_transformer import VisionTransformer

    if name not in _NAMES:
        raise ValueError(f"unknown toy {name!r}; toys are {', '.join(_NAMES)}")
    depth, _, kind = name.removeprefix("digits-").partition("l")
    module: Any = VisionTransformer(
        img_size=20,
        patch_size=4,
        in_chans=1,
        num_classes=10,
        depth=int(depth),
        embed_dim=64,
        num_heads=4,
        mlp_ratio=4,
        class_token=True,
    )
    if kind:
        for block in module.blocks:
            block.norm2 = nn.Identity()
            block.mlp = Zero()
    built: nn.Module = module
    return built


class Toys(Family):
    """Four depths, each with and without MLPs."""

    name = "toys"
    prefix = "toy"
    backend = "timm"

    def names(self) -> Sequence[str]:
        """Return the eight toys."""
        return _NAMES

    def build(self, request: Request) -> nn.Module:
        """Build a toy with the weights in the package, or with those given."""
        if request.img_size not in (None, 20, (20, 20)):
            raise ValueError(f"toys take 20 x 20 images, not img_size={request.img_size}")
        module: Any = toy_module(request.name)
        path = request.weights
        if path is None and request.pretrained:
            path = Path(str(files("vitmodels") / "toy_weights" / f"{request.name}.safetensors"))
        if path is not None:
            state = read_weights(path)
            if mismatch := first_mismatch(state, module):
                raise ValueError(f"{path} does not fit toy/{request.name}: {mismatch}")
            module.load_state_dict(state)
            if path.suffix == ".safetensors":
                module.toy_metadata = read_metadata(path)
        built: nn.Module = module
        return built

    def accepts(self, module: Any) -> bool:
        """Accept a columnar ViT on 20 x 20 grey images."""
        if not VIT.accepts(module):
            return False
        one_channel: bool = module.patch_embed.proj.in_channels == 1
        return bool(one_channel and tuple(module.patch_embed.img_size) == (20, 20))

    def anatomy(self, module: Any) -> Anatomy:
        """Describe it as a columnar ViT, with the preprocessing written into the weights."""
        import dataclasses

        told = json.loads(getattr(module, "toy_metadata", {}).get("transform", "{}"))
        mean, std = _number(told.get("mean", MEAN)), _number(told.get("std", STD))
        return dataclasses.replace(
            VIT.anatomy(module), transform=transforms.grey_transform((20, 20), mean, std)
        )

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return one toy of each kind."""
        return {
            "digits-2l": lambda: toy_module("digits-2l"),
            "digits-2l-attn": lambda: toy_module("digits-2l-attn"),
        }


def _number(value: Any) -> float:
    return float(value[0] if isinstance(value, list) else value)


FAMILY = Toys()
