"""SigLIP's and SigLIP 2's image towers in transformers.

No CLS token: a head with one query pools the normed tokens by attention. The NaFlex towers
take patches with their shape; here they get those of one image size, in row order.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from vitmodels.families.hf_clip import tower_taps
from vitmodels.family import Anatomy
from vitmodels.hf_anatomy import Head, classifier, numbers
from vitmodels.hf_backend import BASE, LARGE, Checkpoint, HFFamily, small
from vitmodels.hf_preprocess import image_transform
from vitmodels.hf_taps import Call
from vitmodels.spec import TokenGrid
from vitmodels.taps import OutputTap


def _rows() -> dict[str, Checkpoint]:
    so400m = {
        "hidden_size": 1152,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "intermediate_size": 4304,
    }
    giant = so400m | {"hidden_size": 1536, "num_hidden_layers": 40, "intermediate_size": 6144}
    families: dict[str, tuple[Mapping[str, int], dict[int, tuple[int, ...]]]] = {
        "siglip-base": (BASE, {16: (224, 256, 384, 512)}),
        "siglip-large": (LARGE, {16: (256, 384)}),
        "siglip-so400m": (so400m, {14: (224, 384)}),
        "siglip2-base": (BASE, {16: (224, 256, 384, 512), 32: (256,)}),
        "siglip2-large": (LARGE, {16: (256, 384, 512)}),
        "siglip2-so400m": (so400m, {14: (224, 384), 16: (256, 384, 512)}),
        "siglip2-giant-opt": (giant, {16: (256, 384)}),
    }
    rows = {
        f"google/{name}-patch{patch}-{side}": _siglip(config, patch, side)
        for name, (config, patches) in families.items()
        for patch, sides in patches.items()
        for side in sides
    }
    rows["google/siglip-base-patch16-256-multilingual"] = _siglip(BASE, 16, 256)
    rows["google/siglip-so400m-patch16-256-i18n"] = _siglip(so400m, 16, 256)
    return rows


def _siglip(config: Mapping[str, Any], patch: int, side: int) -> Checkpoint:
    size = {"size": {"height": side, "width": side}}
    sizes = {"patch_size": patch, "image_size": side}
    return Checkpoint(cls="SiglipVisionModel", config={**config, **sizes}, processor=size)


class HFSiglip(HFFamily):
    """Image towers of SigLIP as transformers builds them."""

    name = "hf_siglip"
    checkpoints = _rows()
    classes = ("SiglipVisionModel", "SiglipForImageClassification")
    processor = "SiglipImageProcessor"

    def native_size(self, config: Any) -> tuple[int, int]:
        """Return the tower's size, also from the configuration of a whole model."""
        return super().native_size(getattr(config, "vision_config", config))

    def anatomy(self, module: Any) -> Anatomy:
        """Describe the module."""
        body = getattr(module, "vision_model", module)
        config, origin = body.config, self.origin(module)
        patch = int(config.patch_size)
        grid = TokenGrid(cls=0, patch=(origin.size[0] // patch, origin.size[1] // patch))
        native = origin.size == self.native_size(config)
        taps = tower_taps(body, grid, native=native)
        taps["final"] = OutputTap(module=body.post_layernorm)
        head = classifier(module)  # reads the mean of the tokens
        if head is None and body.use_head:
            head = Head({"pooled": OutputTap(module=body.head)}, Call(field="pooler_output"))
        elif head is None:
            head = Head({}, Call(field="last_hidden_state"))
        return Anatomy(
            taps=taps | head.taps,
            grid=grid,
            n_classes=head.n_classes,
            input_shape=(int(config.num_channels), *origin.size),
            transform=image_transform(origin.processor),
            call=head.call.resampled(not native),
            **numbers(config),
        )

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return one small tower of every kind."""
        sizes: dict[str, Any] = {"intermediate_size": 48, "image_size": 32, "patch_size": 8}
        return {
            "pooled": small("SiglipVisionModel", **sizes),
            "no_head": small("SiglipVisionModel", vision_use_head=False, **sizes),
            "classifier": small("SiglipForImageClassification", num_labels=7, vision=sizes),
        }


FAMILY = HFSiglip()
