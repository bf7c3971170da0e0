"""Small transcoders of every kind over a toy, and an image to trace."""

from collections.abc import Callable

import torch

import vitmodels
from actstore.sources.digits import Digits
from dictlearn.config import BatchTopK, Gated, Input, JumpReLU, ReLU, Sparsify, TopK
from dictlearn.dictionary import Dictionary
from vitmodels.model import VisionModel

WIDTH = 64


def toy(name: str = "toy/digits-2l") -> VisionModel:
    return vitmodels.load(name)


def image(model: VisionModel, index: int = 3) -> torch.Tensor:
    return model.transform(Digits().image(index))


def layer(
    i: int, writes: list[int] | None = None, *, sparsify: Sparsify | None = None, **options: object
) -> Dictionary:
    """One transcoder with biases everywhere, so that nothing is zero by chance."""
    dictionary = Dictionary(
        {f"blocks.{i}.mlp_in": WIDTH},
        {f"blocks.{j}.mlp_out": WIDTH for j in (writes or [i])},
        latents=48,
        sparsify=sparsify or TopK(4),
        seed=i,
        **options,  # type: ignore[arg-type]
    )
    generator = torch.Generator().manual_seed(10 + i)
    with torch.no_grad():
        for name, value in dictionary.named_parameters():
            if value.ndim == 1 or name == "W_skip":
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
        if hasattr(dictionary.sparsify, "threshold"):
            dictionary.sparsify.threshold.fill_(0.8)
    return dictionary


def pair(**options: object) -> list[Dictionary]:
    return [layer(i, **options) for i in range(2)]  # type: ignore[arg-type]


KINDS: dict[str, Callable[[], list[Dictionary]]] = {
    "topk": pair,
    "topk_signed": lambda: pair(sparsify=TopK(4, relu=False)),
    "relu": lambda: pair(sparsify=ReLU()),
    "batch_topk": lambda: pair(sparsify=BatchTopK(4)),
    "jump_relu": lambda: pair(sparsify=JumpReLU()),
    "gated": lambda: pair(sparsify=Gated()),
    "skip": lambda: pair(skip=True),
    "decode_scale": lambda: pair(decode_scale=True),
    "layer_norm": lambda: pair(skip=True, input=Input(center="b_in", norm="layer_norm")),
    "not_denormalised": lambda: pair(
        input=Input(center="none", norm="layer_norm", denormalize=False)
    ),
    "constant_norm": lambda: pair(input=Input(center="b_in", norm="constant_norm")),
    "cross_layer": lambda: [layer(0, [0, 1], skip=True), layer(1)],
}
