"""Parts of an anatomy that several families of transformers share: sizes, blocks, heads."""

from typing import Any, NamedTuple

from vitmodels.hf_taps import Call, cls_tap, hf_block_taps
from vitmodels.taps import InputTap, OutputTap, Tap


def numbers(config: Any, *, d_mlp: int | None = None) -> dict[str, Any]:
    """Return the fields of an anatomy that a configuration of transformers states by itself.

    `d_mlp` where the configuration has a ratio instead of ``intermediate_size``.
    """
    heads = int(config.num_attention_heads)
    return {
        "d_model": int(config.hidden_size),
        "n_layers": int(config.num_hidden_layers),
        "n_heads": heads,
        "d_head": int(config.hidden_size) // heads,
        "d_mlp": int(config.intermediate_size) if d_mlp is None else d_mlp,
    }


def vit_block_taps(name: str, block: Any, heads: int) -> dict[str, Tap]:
    """Return the taps of a block whose modules have the names of transformers' ViT."""
    return hf_block_taps(
        name,
        block=block,
        attn=block.attention,
        proj=block.attention.o_proj,
        norm1=block.layernorm_before,
        norm2=block.layernorm_after,
        mlp=block.mlp,
        mlp_first=block.mlp.fc1,
        mlp_last=block.mlp.fc2,
        heads=heads,
    )


class Head(NamedTuple):
    """What comes after the last norm."""

    taps: dict[str, Tap]
    """``pooled`` and ``logits``, where they exist."""
    call: Call
    """How to get the logits, or the features where there is no classifier."""
    n_classes: int = 0
    """Outputs of the classifier, 0 without one."""


def classifier(module: Any) -> Head | None:
    """Return the linear classifier of a whole model, None where there is only a body."""
    if not hasattr(module, "classifier"):
        return None
    taps: dict[str, Tap] = {"pooled": InputTap(module=module.classifier)}
    n_classes = int(module.config.num_labels)
    if n_classes:
        taps["logits"] = OutputTap(module=module.classifier)
    return Head(taps, Call(field="logits"), n_classes)


def pooler(body: Any) -> Head:
    """Return the pooler of a body, or its CLS token after the last norm."""
    if body.pooler is not None:
        return Head({"pooled": OutputTap(module=body.pooler)}, Call(field="pooler_output"))
    return first_token(body.layernorm)


def first_token(norm: Any) -> Head:
    """Return the CLS token after the last norm."""
    return Head({"pooled": cls_tap(norm)}, Call(field="last_hidden_state", token=0))
