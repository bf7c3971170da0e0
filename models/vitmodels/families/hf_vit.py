"""ViT and its kin in transformers: ViT, DINO, DeiT, ViT-MAE, MSN, I-JEPA.

They share blocks and module names (as of transformers 5) and differ in tokens, positions and
heads. ViT-MAE runs with all patches, in order: masking is for its pretraining.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitmodels.family import Anatomy
from vitmodels.hf_anatomy import (
    Head,
    classifier,
    first_token,
    numbers,
    pooler,
    vit_block_taps,
)
from vitmodels.hf_backend import (
    BASE,
    HUGE,
    IMAGENET,
    LARGE,
    SMALL,
    TINY,
    Checkpoint,
    HFFamily,
    small,
)
from vitmodels.hf_preprocess import image_transform
from vitmodels.hf_taps import (
    Call,
    field_tap,
    learned_positions,
    patches_tap,
)
from vitmodels.spec import TokenGrid
from vitmodels.taps import OutputTap, Tap

_DEIT = IMAGENET | {"resample": 3, "do_center_crop": True}


def _rows() -> dict[str, Checkpoint]:
    rows: dict[str, Checkpoint] = {}
    sizes = {"base": BASE, "large": LARGE, "huge": HUGE}
    for size, patch, image in (
        *(("base", 16, 224), ("base", 16, 384), ("base", 32, 384)),
        *(("large", 16, 224), ("large", 16, 384), ("large", 32, 384)),
    ):
        rows[f"google/vit-{size}-patch{patch}-{image}"] = Checkpoint(
            cls="ViTForImageClassification",
            config=sizes[size] | {"patch_size": patch, "image_size": image, "num_labels": 1000},
            processor={"size": {"height": image, "width": image}},
        )
    for size, patch in (*(("base", 16), ("base", 32), ("large", 16), ("large", 32), ("huge", 14)),):
        rows[f"google/vit-{size}-patch{patch}-224-in21k"] = Checkpoint(
            cls="ViTModel", config=sizes[size] | {"patch_size": patch}
        )
    for letter, config in (("s", SMALL), ("b", BASE)):
        for patch in (16, 8):
            rows[f"facebook/dino-vit{letter}{patch}"] = Checkpoint(
                cls="ViTModel",
                config=config | {"patch_size": patch},
                processor=IMAGENET,
                options={"add_pooling_layer": False},
            )
    for size, config in (("tiny", TINY), ("small", SMALL), ("base", BASE)):
        for image in (224, 384) if size == "base" else (224,):
            config = config | {"image_size": image, "num_labels": 1000}
            resize = {224: 256, 384: 438}[image]
            processor = _DEIT | {
                "size": {"height": resize, "width": resize},
                "crop_size": {"height": image, "width": image},
            }
            rows[f"facebook/deit-{size}-patch16-{image}"] = Checkpoint(
                cls="ViTForImageClassification", config=config, processor=processor
            )
            rows[f"facebook/deit-{size}-distilled-patch16-{image}"] = Checkpoint(
                cls="DeiTForImageClassificationWithTeacher", config=config, processor=processor
            )
    for size, config in sizes.items():
        rows[f"facebook/vit-mae-{size}"] = Checkpoint(
            cls="ViTMAEModel",
            config=config | ({"patch_size": 14} if size == "huge" else {}),
            processor=IMAGENET,
        )
    for name, config in {
        "small": SMALL,
        "base": BASE,
        "large": LARGE,
        "base-4": BASE | {"patch_size": 4},
        "large-7": LARGE | {"patch_size": 7},
    }.items():
        rows[f"facebook/vit-msn-{name}"] = Checkpoint(
            cls="ViTMSNModel", config=config, processor=IMAGENET
        )
    giant = {
        "hidden_size": 1408,
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
        "intermediate_size": 6144,
    }
    for name, config in {
        "vith14_1k": HUGE | {"patch_size": 14},
        "vith14_22k": HUGE | {"patch_size": 14},
        "vith16_1k": HUGE | {"image_size": 448},
        "vitg16_22k": giant,
    }.items():
        side = config.get("image_size", 224)
        rows[f"facebook/ijepa_{name}"] = Checkpoint(
            cls="IJepaModel",
            config=config,
            processor=IMAGENET | {"size": {"height": side, "width": side}},
        )
    return rows


class HFViT(HFFamily):
    """The models of transformers whose blocks are those of ViT."""

    name = "hf_vit"
    checkpoints = _rows()
    classes = (
        "ViTModel",
        "ViTForImageClassification",
        "DeiTModel",
        "DeiTForImageClassification",
        "DeiTForImageClassificationWithTeacher",
        "ViTMAEModel",
        "ViTMSNModel",
        "ViTMSNForImageClassification",
        "IJepaModel",
        "IJepaForImageClassification",
    )
    processor = "ViTImageProcessor"

    def anatomy(self, module: Any) -> Anatomy:
        """Describe the module."""
        body, config = module.base_model, module.config
        origin = self.origin(module)
        kind = config.model_type
        patch = config.patch_size
        grid = TokenGrid(
            cls={"deit": 2, "ijepa": 0}.get(kind, 1),
            register=0,
            patch=(origin.size[0] // patch, origin.size[1] // patch),
        )
        native = origin.size == self.native_size(config)
        embeddings = body.embeddings
        taps: dict[str, Tap] = {"patch_embed": patches_tap(embeddings.patch_embeddings, grid)}
        taps["pos_embed"] = learned_positions(embeddings, grid, None if native else origin.size)
        taps["embed"] = OutputTap(module=embeddings)
        heads = int(config.num_attention_heads)
        for i, block in enumerate(body.layers):
            taps |= vit_block_taps(f"blocks.{i}", block, heads)
        taps["final"] = OutputTap(module=body.layernorm)
        head = self._head(module, body, grid)
        return Anatomy(
            taps=taps | head.taps,
            grid=grid,
            n_classes=head.n_classes,
            input_shape=(int(config.num_channels), *origin.size),
            transform=image_transform(origin.processor),
            call=head.call.resampled(not native),
            **numbers(config),
        )

    def _head(self, module: Any, body: Any, grid: TokenGrid) -> Head:
        if hasattr(module, "cls_classifier"):  # logits are the mean of two heads
            taps: dict[str, Tap] = {"logits": field_tap(module, "logits")}
            return Head(taps, Call(field="logits"), int(module.config.num_labels))
        if head := classifier(module):
            return head
        if getattr(body, "pooler", None) is not None:
            return pooler(body)
        if not grid.cls:
            return Head({}, Call(field="last_hidden_state"))
        head = first_token(body.layernorm)
        if module.config.model_type == "vit_mae":
            return head._replace(call=_MAECall(field=head.call.field, token=head.call.token))
        return head

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return one small module of every class."""
        sizes: dict[str, Any] = {"intermediate_size": 48, "image_size": 32, "patch_size": 8}
        bare = {"add_pooling_layer": False}
        return {
            "classifier": small("ViTForImageClassification", num_labels=7, **sizes),
            "pooler": small("ViTModel", **sizes),
            "dino": small("ViTModel", options=bare, **sizes),
            "no_qkv_bias": small("ViTModel", options=bare, qkv_bias=False, **sizes),
            "deit": small("DeiTForImageClassification", num_labels=7, **sizes),
            "deit_distilled": small("DeiTForImageClassificationWithTeacher", num_labels=7, **sizes),
            "mae": small("ViTMAEModel", **sizes),
            "msn": small("ViTMSNModel", **sizes),
            "ijepa": small("IJepaModel", **sizes),
            "ijepa_classifier": small("IJepaForImageClassification", num_labels=7, **sizes),
        }


@dataclass(frozen=True, kw_only=True)
class _MAECall(Call):
    """Keep every patch, in order: the masking sorts the noise given and drops none of it."""

    def __call__(self, module: Any, x: Any) -> Tensor:
        """Run the module with a mask ratio of 0."""
        patch = module.config.patch_size
        count = (x.shape[-2] // patch) * (x.shape[-1] // patch)
        noise_BN = torch.arange(count, device=x.device).expand(x.shape[0], -1)
        before, module.config.mask_ratio = module.config.mask_ratio, 0.0
        try:
            tokens: Tensor = module(pixel_values=x, noise=noise_BN, **self.options)[self.field]
        finally:
            module.config.mask_ratio = before
        return tokens[:, 0]


FAMILY = HFViT()
