"""The training losses, plain and dense: the specification that `dictlearn.kernels` must equal.

Shapes: B tokens, F latents, r = width read, w = width written, P prefixes. Every squared error is
a mean over tokens and channels, so with inputs of unit variance it reads as a fraction of variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dictlearn.config import Gated, JumpReLU, Matryoshka, ReLU
from dictlearn.dictionary import Dictionary
from dictlearn.sparsify import GatedSelection, JumpReLUSelection


@dataclass(frozen=True, kw_only=True)
class AuxK:
    """Auxiliary loss of dead latents (Gao et al. 2024, arXiv:2406.04093, appendix A.2).

    ``coefficient * min(n_dead / k, 1) * |e_hat - e|^2``: e is the residual (not differentiated),
    e_hat the decoding of the k largest ``relu(pre)`` among the dead latents, without b_dec.
    """

    dead_F: Bool[Tensor, " f"]
    """Which latents count as dead."""
    k: int
    """Dead latents used for a token."""
    coefficient: float
    """Weight of the term."""


def prefixes_of(matryoshka: Matryoshka | None, latents: int, u: Sequence[float] = ()) -> list[int]:
    """Prefix lengths of one step, ascending, the full width last.

    `u` are numbers in [0, 1), one for each prefix to sample: ``round(F ** u)``, log-uniform.
    """
    fixed = matryoshka.prefixes if matryoshka else ()
    drawn = [max(1, round(latents**v)) for v in u]
    return sorted({*fixed, *drawn, latents})


def exponent(config: ReLU, progress: float) -> float:
    """Return p of the sparsity penalty at `progress` in [0, 1] of the training."""
    span = max(1.0 - config.anneal_start, 1e-9)
    t = min(max((progress - config.anneal_start) / span, 0.0), 1.0)
    return 1.0 + (config.p_end - 1.0) * t


def plain_losses(
    dictionary: Dictionary,
    x_Br: Float[Tensor, "b r"],
    target_Bw: Float[Tensor, "b w"],
    *,
    prefixes: Sequence[int] | None = None,
    progress: float = 1.0,
    penalty_scale: float = 1.0,
    aux: AuxK | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Differentiable terms of the training loss; their sum is the loss.

    ``mse``: ``mean_p mean_B |y_p - t|^2 / w`` over the prefixes p, y_p decoding latents below p.
    ``penalty``: of the strategy, times `penalty_scale`. ``aux``: of dead latents. ``gate``: the
    second reconstruction of `Gated`.
    """
    pre_BF = dictionary.pre_activations(x_Br)
    acts_BF = dictionary.sparsify.training_rule(pre_BF)
    lengths = list(prefixes or [dictionary.latents])
    errors = []
    for length in lengths:
        y_Bw = acts_BF[:, :length] @ dictionary.W_dec[:length] + dictionary.b_dec
        if dictionary.config.skip:
            y_Bw = y_Bw + x_Br @ dictionary.W_skip.T
        errors.append((y_Bw - target_Bw).square().mean())
    residual_Bw = (target_Bw - y_Bw).detach()
    losses = {"mse": torch.stack(errors).mean()}
    penalty = _penalty(dictionary, acts_BF, pre_BF, progress)
    if penalty is not None:
        losses["penalty"] = penalty_scale * penalty
    if isinstance(dictionary.sparsify, GatedSelection):
        gate_BF = (pre_BF + dictionary.sparsify.b_gate).relu()
        y_Bw = gate_BF @ dictionary.W_dec.detach() + dictionary.b_dec.detach()
        if dictionary.config.skip:
            y_Bw = y_Bw + x_Br @ dictionary.W_skip.detach().T
        losses["gate"] = (y_Bw - target_Bw).square().mean()
    if aux is not None and bool(aux.dead_F.any()):
        dec_Dw = dictionary.W_dec[aux.dead_F]
        losses["aux"] = aux_loss(pre_BF[:, aux.dead_F], dec_Dw, residual_Bw, aux)
    return losses


def aux_loss(
    pre_BD: Float[Tensor, "b dead"],
    dec_Dw: Float[Tensor, "dead w"],
    residual_Bw: Float[Tensor, "b w"],
    aux: AuxK,
) -> Float[Tensor, ""]:
    """See `AuxK`; `pre_BD` and `dec_Dw` are of the dead latents only."""
    n_dead = pre_BD.shape[1]
    k = min(aux.k, n_dead)
    value_BK, index_BK = pre_BD.relu().topk(k, dim=1, sorted=False)
    acts_BD = torch.zeros_like(pre_BD).scatter(1, index_BK, value_BK)
    e_hat_Bw = acts_BD @ dec_Dw
    scale = aux.coefficient * min(n_dead / aux.k, 1.0)
    return scale * (e_hat_Bw - residual_Bw).square().mean()


def _penalty(
    dictionary: Dictionary,
    acts_BF: Float[Tensor, "b f"],
    pre_BF: Float[Tensor, "b f"],
    progress: float,
) -> Float[Tensor, ""] | None:
    config = dictionary.config.sparsify
    norm_F = dictionary.W_dec.norm(dim=1)
    if isinstance(config, ReLU):
        p = exponent(config, progress)
        power_BF = acts_BF if p == 1.0 else _power(acts_BF, p)
        weight_F = norm_F if config.decoder_norm else torch.ones_like(norm_F)
        return (power_BF * weight_F).sum(1).mean().mul(config.l1)
    if isinstance(config, JumpReLU):
        if config.penalty == "tanh":
            tanh_BF: Tensor = (config.tanh_scale * acts_BF * norm_F).tanh()
            return tanh_BF.sum(1).mean().mul(config.l0)
        on_BF = cast(JumpReLUSelection, dictionary.sparsify).gate(pre_BF)
        return on_BF.sum(1).mean().mul(config.l0)
    if isinstance(config, Gated):
        gate_BF = (pre_BF + cast(GatedSelection, dictionary.sparsify).b_gate).relu()
        return config.l1 * gate_BF.sum(1).mean()
    return None


def _power(acts_BF: Float[Tensor, "b f"], p: float) -> Float[Tensor, "b f"]:
    """``acts ** p`` with gradient 0 where an activation is 0."""
    active_BF = acts_BF > 0
    return torch.where(active_BF, torch.where(active_BF, acts_BF, 1.0).pow(p), 0.0)
