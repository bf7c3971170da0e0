"""open_clip's image towers that wrap a timm trunk: EVA-CLIP, SigLIP 1 and 2, PE, MobileCLIP.

The trunk is described by the timm family that accepts it; its classifier, where it has one, is
the projection here.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from vitmodels import open_clip_backend as backend
from vitmodels import open_clip_names as naming
from vitmodels.families.open_clip_vit import call_visual
from vitmodels.family import Anatomy, Family, Request
from vitmodels.taps import OutputTap


def timm_families() -> list[Family]:
    """Return the families that describe modules of timm."""
    from vitmodels.registry import families

    return [family for family in families() if family.prefix == "timm"]


def _why() -> Mapping[str, str]:
    return _reasons(naming.config_names())


@cache
def _reasons(configs: tuple[str, ...]) -> Mapping[str, str]:
    """Return configuration -> why its image tower has no taps; empty text where it has."""
    families, reasons = timm_families(), dict[str, str]()
    for config in configs:
        told = naming.vision_cfg(config)
        trunk = told.get("timm_model_name")
        if not trunk:
            native = isinstance(told.get("layers"), int)
            reasons[config] = "" if native else "its image tower is a ResNet, without blocks to tap"
        elif any(family.claims(trunk) for family in families):
            reasons[config] = ""
        else:
            reasons[config] = (
                f"its image tower is timm's {trunk}, which no family describes; "
                "docs/adding-a-model.md says how to add one"
            )
    return reasons


class OpenClipTimm(Family):
    """``open_clip.timm_model.TimmModel``, alone or inside of a CLIP."""

    name = "open_clip_timm"
    prefix = "open_clip"
    backend = "open_clip_torch"

    def _configs(self) -> tuple[str, ...]:
        return tuple(
            config
            for config, reason in _why().items()
            if not reason and naming.vision_cfg(config).get("timm_model_name")
        )

    def names(self) -> Sequence[str]:
        """Return the configurations whose trunk some timm family claims, and their tags."""
        return naming.names(self._configs())

    def claims(self, name: str) -> bool:
        """Accept a configuration, whatever its tag."""
        return naming.split(name)[0] in self._configs()

    def alias(self, id: str) -> str | None:
        """Accept hub ids of open_clip, bare or behind ``hf-hub:`` or ``open-clip:``."""
        name = naming.from_hub(id)
        return name if name is not None and self.claims(name) else None

    def refusal(self, name: str) -> str | None:
        """Say why a configuration of open_clip, or a name that is none, cannot be served."""
        return naming.refusal(name, {k: v for k, v in _why().items() if v})

    def build(self, request: Request) -> nn.Module:
        """Build the image tower by open_clip's own classes."""
        return backend.build_visual(request)

    def accepts(self, module: Any) -> bool:
        """Accept the tower, or a CLIP that has one, if a timm family accepts its trunk."""
        visual = getattr(module, "visual", module)
        return backend.is_a(visual, "TimmModel") and any(
            family.accepts(visual.trunk) for family in timm_families()
        )

    def anatomy(self, module: Any) -> Anatomy:
        """Describe the trunk, and the projection after it."""
        visual = getattr(module, "visual", module)
        family = next(family for family in timm_families() if family.accepts(visual.trunk))
        trunk = family.anatomy(visual.trunk)
        taps = {name: tap for name, tap in trunk.taps.items() if name != "logits"}
        _, height, width = trunk.input_shape
        return dataclasses.replace(
            trunk,
            taps={**taps, "projection": OutputTap(module=visual)},
            n_classes=0,
            transform=backend.transform(visual, (height, width)),
            revision=backend.revision(visual),
            call=call_visual,
        )

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return one small tower for each way of pooling and projecting."""

        def small(trunk: Callable[[], nn.Module], **options: Any) -> Callable[[], nn.Module]:
            def make() -> nn.Module:
                from open_clip.timm_model import TimmModel

                tower: nn.Module = TimmModel("test_vit", embed_dim=20, image_size=32, **options)
                with torch.no_grad():
                    tower.trunk = trunk()
                return tower

            return make

        def vit(**options: Any) -> Callable[[], nn.Module]:
            def make() -> nn.Module:
                from timm.models.vision_transformer import VisionTransformer

                sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3}
                tower: nn.Module = VisionTransformer(**sizes, num_heads=4, **options)
                return tower

            return make

        def eva() -> nn.Module:
            from timm.models.eva import Eva

            tower: nn.Module = Eva(
                img_size=32,
                patch_size=8,
                embed_dim=32,
                depth=3,
                num_heads=4,
                num_classes=20,
                use_rot_pos_emb=True,
                ref_feat_shape=(4, 4),
                swiglu_mlp=True,
                scale_mlp=True,
                global_pool="token",
            )
            return tower

        whole = {"pool": "token", "proj": None}
        found = {
            "token": small(vit(num_classes=20), **whole),
            "siglip": small(
                vit(num_classes=0, class_token=False, global_pool="map"), pool="map", proj="none"
            ),
            "linear": small(vit(num_classes=0), pool="token", proj="linear"),
        }
        if any(family.claims("eva02_base_patch16_clip_224") for family in timm_families()):
            found["eva02"] = small(eva, **whole)
        return found


FAMILY = OpenClipTimm()
