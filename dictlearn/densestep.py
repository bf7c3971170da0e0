"""The losses of the dense step: as they are, under bfloat16 autocast, or compiled.

Only what is alike at every step is compiled: the reconstruction and the penalty. The factor of the
penalty, and the auxiliary loss of dead latents, whose number changes, are added outside.

Shapes: B tokens, F latents, r = width read, w = width written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from dictlearn.config import DictionaryConfig, ReLU
from dictlearn.dictionary import Dictionary
from dictlearn.losses import aux_loss, plain_losses

if TYPE_CHECKING:
    from dictlearn.kernels import Step

Losses = Callable[..., dict[str, Tensor]]


def compiled_losses(backend: Any) -> Losses:
    """Return `plain_losses` under `torch.compile`, by the name of a backend or by a callable."""
    return cast(Losses, torch.compile(plain_losses, backend=backend, dynamic=False))


def check_compiled(config: DictionaryConfig, name: str) -> None:
    """Refuse what changes at every step, and so would be compiled at every step.

    Raises
    ------
    ValueError
        The exponent of the penalty is annealed, or prefixes are sampled.
    """
    annealed = isinstance(config.sparsify, ReLU) and config.sparsify.p_end != 1.0
    sampled = config.matryoshka is not None and config.matryoshka.sampled > 0
    if annealed or sampled:
        what = "an annealed exponent (p_end)" if annealed else "sampled prefixes"
        raise ValueError(
            f"dictionary {name!r} has {what}, which differ at every step and would be compiled "
            "every time; leave compile out"
        )


def dense_losses(
    dictionary: Dictionary,
    x_Br: Float[Tensor, "b r"],
    target_Bw: Float[Tensor, "b w"],
    options: Step,
) -> dict[str, Float[Tensor, ""]]:
    """Terms of the loss, differentiable; see `plain_losses`."""
    half = options.backend == "bfloat16"
    with torch.autocast(x_Br.device.type, torch.bfloat16, enabled=half):
        if options.compiled is None:
            return plain_losses(
                dictionary,
                x_Br,
                target_Bw,
                prefixes=options.prefixes,
                progress=options.progress,
                penalty_scale=options.penalty_scale,
                aux=options.aux,
            )
        losses = dict(options.compiled(dictionary, x_Br, target_Bw, prefixes=options.prefixes))
        if "penalty" in losses:
            losses["penalty"] = options.penalty_scale * losses["penalty"]
        if options.aux is not None and bool(options.aux.dead_F.any()):
            dead_F = options.aux.dead_F
            pre_BF = dictionary.pre_activations(x_Br)
            with torch.no_grad():
                acts_BF = dictionary.sparsify.training_rule(pre_BF)
                residual_Bw = target_Bw - dictionary.decode(acts_BF, x_Br)
            aux = aux_loss(pre_BF[:, dead_F], dictionary.W_dec[dead_F], residual_Bw, options.aux)
            losses["aux"] = aux
        return losses
