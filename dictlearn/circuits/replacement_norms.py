"""Norms with their denominators held fixed, on a module that stays as it is.

A norm is a function of its input x over its last axis::

    layer norm    y = w (x - mean(x)) / s + b      s = sqrt(var(x) + eps)
    RMS norm      y = w x / s                      s = sqrt(mean(x^2) + eps)

Given s of one input, it is affine: the mean is a linear map and stays live. The values of s are
recorded in one pass over the input, a forward hook then puts the affine form in place of what the
module computed (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Ameisen
et al. 2025, "Circuit Tracing").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class NormCall:
    """One call of one norm during the recorded pass."""

    inverse: Float[Tensor, "... 1"]
    """``1 / s`` by token."""
    centred: bool
    """Whether the mean is subtracted."""


Recorded = Mapping[nn.Module, list[NormCall]]
"""Norm -> its calls in the order of the forward pass."""


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises over its last axis, told by its class or by its name."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return True
    name = type(module).__name__.lower().replace("_", "")
    return name.endswith(("rmsnorm", "layernorm", "layernormfp32", "rmsnormfp32"))


def _inverse(module: Any, x: Tensor, *, centred: bool) -> Tensor:
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if eps is None:
        eps = torch.finfo(wide.dtype).eps
    square = wide.var(-1, keepdim=True, unbiased=False) if centred else wide.pow(2).mean(-1, True)
    return (square + eps).rsqrt().to(x.dtype)


def affine(module: Any, call: NormCall, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """Return ``w (x - mean) / s + b`` with the recorded s."""
    y = (x - x.mean(-1, keepdim=True) if call.centred else x) * call.inverse
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias


@contextmanager
def recording(root: nn.Module) -> Iterator[Recorded]:
    """Record the denominators of every norm under `root` in the passes inside of the ``with``.

    Raises
    ------
    ValueError
        A module named a norm that computes something else than the formulas above.
    """
    calls: dict[nn.Module, list[NormCall]] = {}
    names = {module: name for name, module in root.named_modules()}

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x = args[0].detach()
        for centred in (True, False):
            call = NormCall(inverse=_inverse(module, x, centred=centred), centred=centred)
            rtol, atol = (1e-2, 1e-2) if x.dtype.itemsize < 4 else (1e-3, 1e-4)
            same = affine(module, call, x)
            if torch.allclose(same, output.detach(), rtol=rtol, atol=atol):
                calls.setdefault(module, []).append(call)
                return
        raise ValueError(
            f"the norm {names[module]} ({type(module).__name__}) is neither a layer norm nor an "
            "RMS norm over the last axis, so its denominator cannot be held fixed"
        )

    handles = [m.register_forward_hook(hook) for m in root.modules() if is_norm(m)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen(recorded: Recorded) -> Iterator[None]:
    """Compute the recorded norms in their affine form inside of the ``with``.

    Enter it before reads and edits of the model: hooks run in the order in which they were put
    on, so sites behind a norm then see the affine form.
    """
    counts = dict.fromkeys(recorded, 0)

    def hook(module: nn.Module, args: tuple[Any, ...], _output: Any) -> Tensor:
        calls = recorded[module]
        call = calls[counts[module] % len(calls)]
        counts[module] += 1
        return affine(module, call, args[0])

    handles = [module.register_forward_hook(hook) for module in recorded]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
