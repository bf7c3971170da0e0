"""BEiT in transformers: relative positions as a bias of the scores, LayerScale as parameters.

``scores`` hold the bias, as the kernel adds it. What a branch adds to the stream is read
after LayerScale, at the block's one DropPath module, which is called once for each branch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitmodels.family import Anatomy
from vitmodels.hf_anatomy import classifier, numbers, pooler, vit_block_taps
from vitmodels.hf_backend import BASE, LARGE, Checkpoint, HFFamily, small
from vitmodels.hf_preprocess import image_transform
from vitmodels.hf_taps import learned_positions, patches_tap
from vitmodels.spec import TokenGrid
from vitmodels.taps import MidStreamTap, OutputTap, Tap, Wire, Wiring


def _rows() -> dict[str, Checkpoint]:
    rows: dict[str, Checkpoint] = {}
    large = LARGE | {"layer_scale_init_value": 1e-5}
    for size, config, sides in (("base", BASE, (224, 384)), ("large", large, (224, 384, 512))):
        tuned = {**config, "use_relative_position_bias": True, "cls": "BeitForImageClassification"}
        shared = {**config, "use_shared_relative_position_bias": True, "use_mask_token": True}
        for side in sides:
            rows[f"microsoft/beit-{size}-patch16-{side}"] = _row(tuned, side, 1000)
        name = f"microsoft/beit-{size}-patch16-224-pt22k"
        rows[f"{name}-ft22k"] = _row(tuned, 224, 21841)
        rows[name] = _row(shared | {"cls": "BeitModel", "use_mean_pooling": False}, 224, 2)
    return rows


def _row(config: Mapping[str, Any], side: int, labels: int) -> Checkpoint:
    fields = {**config, "image_size": side, "num_labels": labels}
    cls = fields.pop("cls")
    return Checkpoint(cls=cls, config=fields, processor={"size": {"height": side, "width": side}})


@dataclass(frozen=True, kw_only=True)
class RepeatedTap(Tap):
    """The output of one call of a module that its block calls several times."""

    module: nn.Module
    """Whose output it is."""
    block: nn.Module
    """Counting starts anew when it is entered."""
    call: int
    """Which call, from 0."""

    def attach(self, wire: Wire, wiring: Wiring) -> None:
        """Count the calls, and pass the output of one of them through the wire."""
        calls = 0

        def enter(_module: nn.Module, _args: Any, _kwargs: Any) -> None:
            nonlocal calls
            calls = 0

        def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
            nonlocal calls
            mine, calls = calls == self.call, calls + 1
            if not mine:
                return None
            value = wire(output)
            return value if wire.writes else None

        wiring.before(self.block, enter)
        wiring.after(self.module, hook)


class HFBeit(HFFamily):
    """BEiT as transformers builds it."""

    name = "hf_beit"
    checkpoints = _rows()
    classes = ("BeitModel", "BeitForImageClassification")
    processor = "BeitImageProcessor"

    def anatomy(self, module: Any) -> Anatomy:
        """Describe the module."""
        body, config = module.base_model, module.config
        origin = self.origin(module)
        patch = int(config.patch_size)
        grid = TokenGrid(patch=(origin.size[0] // patch, origin.size[1] // patch))
        resampled = None if origin.size == self.native_size(config) else origin.size
        taps: dict[str, Tap] = {"patch_embed": patches_tap(body.embeddings.patch_embeddings, grid)}
        if config.use_absolute_position_embeddings:
            taps["pos_embed"] = learned_positions(body.embeddings, grid, resampled)
        taps["embed"] = OutputTap(module=body.embeddings)
        for i, block in enumerate(body.layers):
            taps |= self._block(f"blocks.{i}", block, int(config.num_attention_heads))
        if not config.use_mean_pooling:  # else the norm comes after the mean
            taps["final"] = OutputTap(module=body.layernorm)
        head = classifier(module) or pooler(body)
        return Anatomy(
            taps=taps | head.taps,
            grid=grid,
            n_classes=head.n_classes,
            input_shape=(int(config.num_channels), *origin.size),
            transform=image_transform(origin.processor),
            call=head.call,
            **numbers(config),
        )

    def _block(self, name: str, block: Any, heads: int) -> dict[str, Tap]:
        taps = vit_block_taps(name, block, heads)
        taps[f"{name}.attn_out"] = RepeatedTap(module=block.drop_path, block=block, call=0)
        taps[f"{name}.mlp_out"] = RepeatedTap(module=block.drop_path, block=block, call=1)
        taps[f"{name}.resid_mid"] = MidStreamTap(
            branch=block.layernorm_after,
            branch_out=block.drop_path,  # its last call is that of the MLP
            block=block,
        )
        return taps

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return one small module of every kind."""
        sizes: dict[str, Any] = {"intermediate_size": 48, "image_size": 32, "patch_size": 8}
        return {
            "classifier": small(
                "BeitForImageClassification",
                num_labels=7,
                use_relative_position_bias=True,
                **sizes,
            ),
            "shared_bias": small(
                "BeitModel",
                use_shared_relative_position_bias=True,
                use_mean_pooling=False,
                **sizes,
            ),
            "absolute": small(
                "BeitModel",
                options={"add_pooling_layer": False},
                use_absolute_position_embeddings=True,
                use_mean_pooling=False,
                **sizes,
            ),
            "no_layer_scale": small("BeitModel", layer_scale_init_value=0.0, **sizes),
        }


FAMILY = HFBeit()
