"""The local replacement model of one input: transcoders for MLPs, attention and norms held fixed.

For one input x, every attention pattern and every norm denominator is held at its value for x, and
every MLP is replaced by its transcoder plus the error the transcoder makes on x::

    mlp_out_l[t] = sum_f a_f[t] d_f + b_dec + error_l[t]          (+ W_skip mlp_in_l[t])

What is left between the latents is affine, and on x itself equals the model (Ameisen et al. 2025,
"Circuit Tracing: Revealing Computational Graphs in Language Models", section "Building an
attribution graph"; without cross-layer writes: Dunefsky et al. 2024, arXiv:2406.11944).

Shapes: B copies of the input, T tokens, D channels, F latents, N active entries, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dictlearn.circuits.replacement_code import FrozenTranscoder
from dictlearn.circuits.replacement_norms import Recorded, frozen, recording
from dictlearn.circuits.replacement_parts import Transcoders, transcoders

if TYPE_CHECKING:
    from vitmodels.model import VisionModel

READOUTS = ("final", "pooled", "projection", "logits")
"""Sites behind the blocks that a readout may look at, where the model has them; besides, the last
block's ``resid_post``."""

_BENT, _ROUNDING, _OFF = 3e-5, 3e-6, 1e-3
"""What counts as affine: curvature over movement (float32 has 1e-6, a GELU behind a LayerScale of
1e-4 has 1e-4), curvature over the value itself; and as equal to the model."""

Outs = Callable[[int, list[Tensor]], Tensor]
"""(layer, ``mlp_in`` of the layers up to it) -> what the layer's MLP gives, [B, T, D]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Entries:
    """Active latents of one layer, sorted by token, then by latent."""

    token: Int[Tensor, " n"]
    """Token of each."""
    latent: Int[Tensor, " n"]
    """Number of each in its dictionary."""
    value: Float[Tensor, " n"]
    """Activation of each."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Replacement:
    """The model on one input, with everything that is held fixed; made by `replacement`."""

    model: VisionModel
    """The model itself, unmodified."""
    parts: Transcoders
    """Its transcoders."""
    x: Float[Tensor, "1 ..."]
    """The input."""
    recorded: Recorded
    """Denominators of the norms."""
    patterns: tuple[Float[Tensor, "1 h q k"], ...]
    """Attention pattern of every layer."""
    embed: Float[Tensor, "t d"]
    """Embedded tokens: where the stream begins."""
    content: Float[Tensor, "t d"]
    """What of `embed` comes from the patches; the rest is position, class token, registers."""
    mlp_in: tuple[Float[Tensor, "t d"], ...]
    """Input of every MLP."""
    mlp_out: tuple[Float[Tensor, "t d"], ...]
    """Output of every MLP of the model."""
    codes: tuple[FrozenTranscoder, ...]
    """Every transcoder with its input norm held fixed."""
    entries: tuple[Entries, ...]
    """Active latents of every layer."""
    error: tuple[Float[Tensor, "t d"], ...]
    """``mlp_out`` minus what the transcoders make of it."""
    bias: tuple[Float[Tensor, "t d"], ...]
    """Decoder biases that go into every layer's ``mlp_out``."""
    values: dict[str, Tensor]
    """The sites that a readout may look at, [1, ...]."""
    affine: tuple[str, ...]
    """Those of them that are affine in the stream with everything held fixed."""

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.mlp_in)

    def leaf(self, layer: int) -> Float[Tensor, "t d"]:
        """Return what a layer's MLP adds, without what it adds linearly past the latents."""
        made = self.bias[layer] + self.error[layer]
        for source in range(layer + 1):
            if layer in self.codes[source].writes:
                e = self.entries[source]
                rows_ND = self.codes[source].decoder_rows(layer, e.token, e.latent)
                made = made.index_add(0, e.token, e.value[:, None] * rows_ND)
        return made

    def frozen_pass(
        self,
        embed_BTD: Float[Tensor, "b t d"],
        outs: Outs,
        sites: Sequence[str],
    ) -> dict[str, Tensor]:
        """Run with patterns and norms held fixed, and with what `outs` gives for the MLPs."""
        with frozen(self.recorded):
            return self._pass(embed_BTD, outs, sites, self.patterns)

    def live_pass(self, copies: int, outs: Outs, sites: Sequence[str]) -> dict[str, Tensor]:
        """Run with attention and norms of the model's own, and `outs` for the MLPs."""
        return self._pass(self.embed.expand(copies, -1, -1), outs, sites, None)

    def _pass(
        self,
        embed_BTD: Tensor,
        outs: Outs,
        sites: Sequence[str],
        patterns: Sequence[Tensor] | None,
    ) -> dict[str, Tensor]:
        seen: list[Tensor] = []

        def remember(value: Tensor) -> Tensor:
            seen.append(value)
            return value

        edits: dict[str, Callable[[Tensor], Tensor]] = {"embed": lambda _: embed_BTD}
        for layer in range(self.n_layers):
            edits[f"blocks.{layer}.mlp_in"] = remember
            edits[f"blocks.{layer}.mlp_out"] = _give(outs, layer, seen)
            if patterns is not None:
                edits[f"blocks.{layer}.pattern"] = _fix(patterns[layer])
        x = self.x.expand(len(embed_BTD), *self.x.shape[1:])
        with self.model.editing(edits):
            return self.model.run(x, sites=list(sites))

    def linear_part(self, layer: int, seen: Sequence[Tensor]) -> Tensor | None:
        """Return what goes past the latents into a layer's output: skip paths, undone means."""
        total: Tensor | None = None
        for source in range(layer + 1):
            if layer in self.codes[source].writes and self.codes[source].has_linear:
                part = self.codes[source].linear(layer, seen[source])
                total = part if total is None else total + part
        return total

    def leaves(self, outs: Sequence[Tensor]) -> Outs:
        """Return the `Outs` of given tensors [B, T, D], one a layer; linear paths stay live."""

        def give(layer: int, seen: list[Tensor]) -> Tensor:
            linear = self.linear_part(layer, seen)
            return outs[layer] if linear is None else outs[layer] + linear

        return give


def _give(outs: Outs, layer: int, seen: list[Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda _value: outs(layer, seen)


def _fix(pattern: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda value: pattern.expand_as(value)


def replacement(
    model: VisionModel,
    dictionaries: Any,
    x: Float[Tensor, "*shape"],
) -> Replacement:
    """Hold a model fixed around one input and put transcoders in place of its MLPs.

    Parameters
    ----------
    model
        A model whose stream keeps one width and one set of tokens, with editable attention
        patterns and MLPs.
    dictionaries
        See `dictlearn.circuits.replacement_parts.transcoders`.
    x
        One input as the model takes it, with or without a batch of one.

    Raises
    ------
    ValueError
        A model that this does not work for (the message says why), or transcoders that do not
        belong to it, or more than one input.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("tracing needs autograd: call it outside of torch.inference_mode()")
    check_model(model)
    parts = (
        dictionaries if isinstance(dictionaries, Transcoders) else transcoders(model, dictionaries)
    )
    if x.dim() == len(model.spec.input_shape):
        x = x[None]
    if x.dim() != len(model.spec.input_shape) + 1 or len(x) != 1:
        raise ValueError(
            f"a graph is traced for one input of shape {tuple(model.spec.input_shape)}, got "
            f"{tuple(x.shape)}; call it once for each"
        )
    with torch.no_grad():
        made = _measure(model, parts, x)
        affine = _affine_sites(made)
    return replace(made, affine=affine)


def check_model(model: VisionModel) -> None:
    """Refuse a model without the sites that are held fixed or replaced; the message says which."""
    infos = model.sites()
    tokens = model.spec.grid.n_tokens
    if "embed" not in infos:
        raise ValueError(f"{model.spec.id} cannot be traced: it has no site embed")
    if infos["embed"].shape[0] != tokens:
        raise ValueError(
            f"{model.spec.id} (family {model.spec.family}) cannot be traced: it begins with "
            f"{infos['embed'].shape[0]} tokens and ends with {tokens}"
        )
    for layer in range(model.spec.n_layers):
        for part, why in (
            ("pattern", "attention patterns must be held fixed"),
            ("mlp_in", "transcoders read it"),
            ("mlp_out", "transcoders replace it"),
        ):
            site = f"blocks.{layer}.{part}"
            reason = None
            if site not in infos:
                reason = "has no such site"
            elif not infos[site].editable:
                reason = f"cannot edit it: {infos[site].reason}"
            elif infos[site].shape[-2] != tokens and part == "pattern":
                reason = f"has {infos[site].shape[-2]} queries there and {tokens} tokens"
            elif part != "pattern" and infos[site].shape != infos["embed"].shape:
                reason = f"has {infos[site].shape} there and {infos['embed'].shape} at embed"
            if reason:
                raise ValueError(
                    f"{model.spec.id} (family {model.spec.family}) cannot be traced: {why}, but "
                    f"at {site} it {reason}. Columnar transformers with an MLP in every block can "
                    "be traced: see docs/circuit-tracing.md"
                )


def _measure(model: VisionModel, parts: Transcoders, x: Tensor) -> Replacement:
    """Run the model once, and encode what its MLPs read."""
    n_layers = model.spec.n_layers
    last = f"blocks.{n_layers - 1}.resid_post"
    behind = [site for site in (last, *READOUTS) if site in model.sites()]
    blocks = [
        f"blocks.{i}.{part}" for i in range(n_layers) for part in ("pattern", "mlp_in", "mlp_out")
    ]
    first = ["patch_embed"] if "patch_embed" in model.sites() else []
    with recording(model.module) as recorded:
        values = model.run(x, sites=[*first, "embed", *blocks, *behind], stop_early=False)
    values = {name: value.detach() for name, value in values.items()}
    embed = values["embed"][0]
    mlp_in = [values[f"blocks.{i}.mlp_in"][0] for i in range(n_layers)]
    mlp_out = [values[f"blocks.{i}.mlp_out"][0] for i in range(n_layers)]
    codes = [FrozenTranscoder(d, x) for d, x in zip(parts.dictionaries, mlp_in, strict=True)]
    entries = []
    for code, x_TD in zip(codes, mlp_in, strict=True):
        acts_TF = code.activations(x_TD[None])[0]
        token_N, latent_N = acts_TF.nonzero(as_tuple=True)
        entries.append(Entries(token=token_N, latent=latent_N, value=acts_TF[token_N, latent_N]))
    bias = [torch.zeros_like(embed) for _ in range(n_layers)]
    for code in codes:
        for layer in code.writes:
            bias[layer] = bias[layer] + code.bias_rows(layer)
    made = Replacement(
        model=model,
        parts=parts,
        x=x,
        recorded=recorded,
        patterns=tuple(values[f"blocks.{i}.pattern"] for i in range(n_layers)),
        embed=embed,
        content=_content(model, embed, values.get("patch_embed")),
        mlp_in=tuple(mlp_in),
        mlp_out=tuple(mlp_out),
        codes=tuple(codes),
        entries=tuple(entries),
        error=tuple(torch.zeros_like(embed) for _ in range(n_layers)),
        bias=tuple(bias),
        values={name: values[name] for name in behind},
        affine=(),
    )
    error = []
    for layer in range(n_layers):
        made_TD = made.leaf(layer)
        linear = made.linear_part(layer, [v[None] for v in mlp_in])
        made_TD = made_TD if linear is None else made_TD + linear[0]
        error.append(mlp_out[layer] - made_TD)
    return replace(made, error=tuple(error))


def _content(model: VisionModel, embed: Tensor, patches: Tensor | None) -> Tensor:
    """Return the patches' share of the embedding, [T, D]; all of it where it cannot be told."""
    cut = model.spec.grid.slice("patch")
    if patches is None or patches[0].shape != embed[cut].shape:
        return embed
    content = torch.zeros_like(embed)
    content[cut] = patches[0]
    return content


def _affine_sites(made: Replacement) -> tuple[str, ...]:
    """Return the readout sites that are affine; refuse a model whose blocks are not.

    An affine F has ``F(z) - F(z + u) - F(z + v) + F(z + u + v) = 0`` for any u and v.
    """
    generator = torch.Generator().manual_seed(0)
    leaves = [made.embed, *(made.leaf(layer) for layer in range(made.n_layers))]

    def four(value: Tensor) -> Tensor:
        noise = torch.randn(2, *value.shape, generator=generator).to(value)
        u, v = noise * value.pow(2).mean().sqrt().clamp(min=1e-3)
        return torch.stack([value, value + u, value + v, value + u + v])

    embed_BTD, *outs = map(four, leaves)
    blocks = [f"blocks.{layer}.mlp_in" for layer in range(made.n_layers)]
    got = made.frozen_pass(embed_BTD, made.leaves(outs), [*blocks, *made.values])
    behind = []
    for site, value in got.items():
        f = value.double()
        moved = (f[1] - f[0]).abs().max() + (f[2] - f[0]).abs().max()
        bent = (f[0] - f[1] - f[2] + f[3]).abs().max()
        good = bool(bent <= _BENT * moved + _ROUNDING * f.abs().max())
        if site in made.values:
            behind += [site] if good else []
            continue
        layer = blocks.index(site)
        off = (f[0] - made.mlp_in[layer].double()).abs().max()
        same = bool(off <= _OFF * made.mlp_in[layer].abs().max().clamp(min=1e-6))
        if not (good and same):
            what = (
                "is not affine in the stream once attention patterns and norms are held fixed"
                if not good
                else "differs from the model's own value with everything held fixed"
            )
            raise ValueError(
                f"{made.model.spec.id} (family {made.model.spec.family}) cannot be traced: {site} "
                f"{what}, so some part before it is of a kind this does not know"
            )
    return tuple(behind)


def stacked(values: Sequence[Tensor], copies: int) -> list[Tensor]:
    """Return fresh leaves [B, T, D] that require gradients."""
    return [v.detach().expand(copies, *v.shape).clone().requires_grad_(True) for v in values]
