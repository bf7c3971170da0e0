"""Rewriting a dictionary's weights into an equal one that another format can hold.

Every function takes and returns the plain tensors of `Dictionary.state_dict` (float32, CPU,
detached) and changes neither the activations nor the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dictlearn.config import BatchTopK, DictionaryConfig, JumpReLU
from dictlearn.dictionary import Dictionary


def tensors_of(dictionary: Dictionary) -> dict[str, Tensor]:
    """Return the state as detached, contiguous CPU tensors."""
    return {k: v.detach().cpu().contiguous() for k, v in dictionary.state_dict().items()}


def fold_center(tensors: dict[str, Tensor], config: DictionaryConfig) -> dict[str, Tensor]:
    """Move what is subtracted from the input into the bias.

    ``(x_n - c) @ W_enc + b = x_n @ W_enc + (b - c @ W_enc)``. For Gated, whose b_enc is 0, the
    shift goes into both of its biases: ``b_gate - c W``, ``b_mag - exp(r_mag) * (c W)``.
    """
    out = dict(tensors)
    center = config.input.center
    if center == "none":
        return out
    c_r = out["b_dec"] if center == "b_dec" else out.pop("b_in")
    shift_F = (c_r.double() @ out["W_enc"].double()).float()
    if "sparsify.b_gate" in out:
        out["sparsify.b_gate"] = out["sparsify.b_gate"] - shift_F
        out["sparsify.b_mag"] = out["sparsify.b_mag"] - out["sparsify.r_mag"].exp() * shift_F
    else:
        out["b_enc"] = out["b_enc"] - shift_F
    return out


def center_on_b_dec(tensors: dict[str, Tensor], config: DictionaryConfig) -> dict[str, Tensor]:
    """Rewrite for a format that subtracts b_dec whether one wants it or not.

    ``(x_n - c) @ W + b = (x_n - b_dec) @ W + (b + (b_dec - c) @ W)``.
    """
    out = dict(tensors)
    if config.input.center != "b_dec":
        shift_r = out["b_dec"] - (out.pop("b_in") if config.input.center == "b_in" else 0.0)
        out["b_enc"] = out["b_enc"] + (shift_r.double() @ out["W_enc"].double()).float()
    return out


def gate_biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move b_enc of a gated dictionary into its two biases and drop it; the formats lack one."""
    out = dict(tensors)
    b_enc_F = out.pop("b_enc")
    out["sparsify.b_gate"] = out["sparsify.b_gate"] + b_enc_F
    out["sparsify.b_mag"] = out["sparsify.b_mag"] + out["sparsify.r_mag"].exp() * b_enc_F
    return out


def fold_scale(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Multiply a decoder-only factor into the rows: ``(f * s) @ W = f @ (s[:, None] * W)``."""
    out = dict(tensors)
    if "scale" in out:
        out["W_dec"] = out["W_dec"] * out.pop("scale")[:, None]
    return out


def thresholds(tensors: dict[str, Tensor], config: DictionaryConfig, *, strict: bool) -> Tensor:
    """Return the thresholds [F] of BatchTopK or JumpReLU for a cut by ``>`` (strict) or ``>=``.

    ``x > t`` equals ``x >= next(t)`` with the next larger float32, and the other way round. An
    unset (negative) threshold is 0, that is ReLU.
    """
    rule = config.sparsify
    if not isinstance(rule, BatchTopK | JumpReLU):
        raise ValueError(f"{type(rule).__name__} has no threshold")
    theta_F = tensors["sparsify.threshold"].expand(config.latents).clone()
    if isinstance(rule, JumpReLU) and not rule.positive and bool((theta_F < 0).any()):
        raise ValueError("JumpReLU with thresholds below 0 and positive=False has no counterpart")
    if strict and not rule.strict:
        theta_F = torch.nextafter(theta_F, torch.tensor(-torch.inf))
    elif not strict and rule.strict:
        theta_F = torch.nextafter(theta_F, torch.tensor(torch.inf))
    return theta_F.clamp(min=0.0)


def require(condition: bool, format: str, what: str, way_out: str = "") -> None:
    """Raise a ValueError saying what a format cannot hold."""
    if not condition:
        hint = f" {way_out}" if way_out else ""
        raise ValueError(f"the format {format!r} cannot hold {what}.{hint}")
