"""Dictionaries that each format can hold, with random weights: one list for tests and script."""

from collections.abc import Iterator

import torch

from dictlearn.config import (
    BatchTopK,
    Gated,
    Input,
    JumpReLU,
    Matryoshka,
    ReLU,
    Sparsify,
    TopK,
)
from dictlearn.dictionary import Dictionary

SITE, IN, OUT = "blocks.3.resid_post", "blocks.3.mlp_in", "blocks.3.mlp_out"
NONE, OWN = Input(center="none"), Input(center="b_in")
LAYER, CONSTANT = Input(norm="layer_norm"), Input(norm="constant_norm", eps=0.0)
WIDTH, LATENTS = 12, 48


def inputs(rows: int = 64) -> torch.Tensor:
    """Rows that are not centred and differ in norm."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, WIDTH, generator=generator) + 0.5
    return x * (0.5 + torch.rand(rows, 1, generator=generator) * 2)


def dictionary(
    sparsify: Sparsify,
    *,
    input: Input | None = None,
    transcoder: bool = False,
    skip: bool = False,
    d_out: int = WIDTH,
    matryoshka: Matryoshka | None = None,
    latent_norm: bool = False,
    decode_scale: bool = False,
    decoder_bias: bool = True,
    unit_decoder: bool = False,
) -> Dictionary:
    """Every parameter random, thresholds positive, decoder rows of unequal norm."""
    made = Dictionary(
        {IN: WIDTH} if transcoder else {SITE: WIDTH},
        {OUT: d_out} if transcoder else None,
        latents=LATENTS,
        sparsify=sparsify,
        skip=skip,
        input=input,
        matryoshka=matryoshka,
        latent_norm=latent_norm,
        decode_scale=decode_scale,
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in made.state_dict().items():
            noise = torch.randn(value.shape, generator=generator)
            if name == "sparsify.threshold":
                value.copy_(0.6 + 0.1 * noise)
            else:
                value.add_(0.2 * noise)
        if isinstance(sparsify, Gated):
            made.b_enc.zero_()
        if not decoder_bias:
            made.b_dec.zero_()
        if unit_decoder:
            made.W_dec.div_(made.W_dec.norm(dim=1, keepdim=True))
    return made


def exports() -> Iterator[tuple[str, str, Dictionary]]:
    """Format, name of the case, dictionary."""
    jump, batch = JumpReLU(), BatchTopK(4)
    edge = JumpReLU(strict=False)
    yield "sae_lens", "relu", dictionary(ReLU())
    yield "sae_lens", "relu, nothing subtracted", dictionary(ReLU(), input=NONE)
    yield "sae_lens", "relu, layer norm", dictionary(ReLU(), input=LAYER)
    yield "sae_lens", "relu, decoder factors", dictionary(ReLU(), decode_scale=True)
    yield "sae_lens", "topk", dictionary(TopK(4))
    yield "sae_lens", "topk, constant norm", dictionary(TopK(4), input=CONSTANT)
    yield "sae_lens", "batch topk", dictionary(batch)
    yield "sae_lens", "jumprelu", dictionary(jump)
    yield "sae_lens", "jumprelu >=", dictionary(edge)
    yield "sae_lens", "gated", dictionary(Gated())
    yield "sae_lens", "transcoder", dictionary(ReLU(), transcoder=True, d_out=10)
    yield "sae_lens", "skip transcoder", dictionary(ReLU(), transcoder=True, skip=True, d_out=10)
    yield (
        "sae_lens",
        "skip transcoder, layer norm",
        dictionary(
            ReLU(),
            transcoder=True,
            skip=True,
            input=Input(center="b_in", norm="layer_norm", denormalize=False),
        ),
    )
    yield "sae_lens", "jumprelu transcoder", dictionary(jump, transcoder=True, input=NONE)
    yield "sae_lens", "batch topk skip transcoder", dictionary(batch, transcoder=True, skip=True)
    yield "sae_lens", "skip on one site", dictionary(ReLU(), skip=True)
    yield "prisma", "relu", dictionary(ReLU())
    yield "prisma", "relu, nothing subtracted", dictionary(ReLU(), input=NONE)
    yield "prisma", "relu, own centre", dictionary(ReLU(), input=OWN)
    yield "prisma", "relu, layer norm", dictionary(ReLU(), input=LAYER)
    yield "prisma", "tanh relu", dictionary(ReLU(function="tanh_relu"))
    yield "prisma", "topk, constant norm", dictionary(TopK(4), input=CONSTANT)
    yield "prisma", "gated, layer norm", dictionary(Gated(), input=LAYER)
    yield "prisma", "gated, nothing subtracted", dictionary(Gated(), input=NONE)
    yield "prisma", "gated topk", dictionary(Gated(k=4))
    yield "prisma", "transcoder", dictionary(ReLU(), transcoder=True, d_out=10)
    yield (
        "prisma",
        "topk skip transcoder, layer norm",
        dictionary(
            TopK(4),
            transcoder=True,
            skip=True,
            input=Input(center="b_in", norm="layer_norm"),
        ),
    )
    yield "prisma", "skip on one site", dictionary(TopK(4), skip=True)
    yield "dictionary_learning", "relu", dictionary(ReLU(), unit_decoder=True)
    yield "dictionary_learning", "relu, own centre", dictionary(ReLU(), input=OWN)
    yield "dictionary_learning", "topk", dictionary(TopK(4))
    yield "dictionary_learning", "topk, nothing subtracted", dictionary(TopK(4), input=NONE)
    yield "dictionary_learning", "batch topk", dictionary(batch)
    yield (
        "dictionary_learning",
        "matryoshka",
        dictionary(batch, matryoshka=Matryoshka(prefixes=(8, 20))),
    )
    yield "dictionary_learning", "jumprelu", dictionary(jump)
    yield "dictionary_learning", "gated", dictionary(Gated())
    yield "dictionary_learning", "gated, own centre", dictionary(Gated(), input=OWN)
    yield "sparsify", "topk", dictionary(TopK(4))
    yield "sparsify", "groupmax", dictionary(TopK(4, group_max=True))
    yield "sparsify", "topk, skip", dictionary(TopK(4), skip=True)
    yield "sparsify", "topk, nothing subtracted", dictionary(TopK(4), input=NONE)
    yield "sparsify", "skip transcoder", dictionary(TopK(4), transcoder=True, skip=True)
    yield "saev", "relu", dictionary(ReLU())
    yield "saev", "topk with negatives", dictionary(TopK(4, relu=False))
    yield "saev", "batch topk", dictionary(batch)
    plain = {"decoder_bias": False}
    yield "overcomplete", "relu", dictionary(ReLU(), **plain)
    yield "overcomplete", "topk, unit decoder", dictionary(TopK(4), unit_decoder=True, **plain)
    yield "overcomplete", "topk", dictionary(TopK(4), input=OWN, **plain)
    yield (
        "overcomplete",
        "topk, latent norm",
        dictionary(TopK(4), input=NONE, latent_norm=True, **plain),
    )
    yield "overcomplete", "batch topk", dictionary(batch, **plain)
    yield "overcomplete", "jumprelu", dictionary(jump, **plain)
    yield "overcomplete", "jumprelu >=", dictionary(edge, **plain)
