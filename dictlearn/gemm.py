"""The encoder product, by whichever backend is faster on this machine.

On CPU, oneDNN multiplies float32 at these shapes up to 1.6 times faster than the BLAS behind
`torch.mm`. PyTorch reaches it only through the fused operator `torch.ops.mkldnn._linear_pointwise`,
which is not public: it is used in this file alone, and `tests/dictlearn/test_gemm.py` fails when
its signature or its result changes. Results of two backends differ in the last bits, so a training
run records the backend it chose and keeps it when it is resumed.

Shapes: B tokens, r = width read, F latents.
"""

from __future__ import annotations

import time
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Backend = Literal["default", "onednn", "bfloat16"]
_TRIAL_ROWS = 512
_MIN_FLOP_TO_TIME = 1e9


def linear(
    x_Br: Float[Tensor, "b r"],
    weight_Fr: Float[Tensor, "f r"],
    bias_F: Float[Tensor, " f"] | None,
    backend: Backend = "default",
) -> Float[Tensor, "b f"]:
    """``x @ weight.T + bias`` in the dtype of x; ``bfloat16`` rounds both factors first."""
    if backend == "onednn":
        return _onednn(x_Br, weight_Fr, bias_F)
    if backend == "bfloat16":
        half = torch.bfloat16
        out_BF = F.linear(x_Br.to(half), weight_Fr.to(half)).to(x_Br.dtype)
        return out_BF if bias_F is None else out_BF.add_(bias_F)
    return F.linear(x_Br, weight_Fr, bias_F)


def has_onednn() -> bool:
    """Whether this build of PyTorch carries the oneDNN operator."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def choose_backend(rows: int, width: int, latents: int, device: torch.device) -> Backend:
    """Time the backends at (at most 512 rows of) this shape and return the fastest.

    Products too small to be worth it, and devices other than the CPU, get ``default``.
    """
    rows = min(rows, _TRIAL_ROWS)
    if device.type != "cpu" or not has_onednn() or 2 * rows * width * latents < _MIN_FLOP_TO_TIME:
        return "default"
    generator = torch.Generator().manual_seed(0)
    x_Br = torch.randn(rows, width, generator=generator)
    weight_Fr = torch.randn(latents, width, generator=generator)
    bias_F = torch.zeros(latents)
    names: tuple[Backend, ...] = ("default", "onednn")
    best = dict.fromkeys(names, float("inf"))
    for _ in range(4):
        for name in names:
            start = time.perf_counter()
            linear(x_Br, weight_Fr, bias_F, name)
            best[name] = min(best[name], time.perf_counter() - start)
    return min(names, key=lambda name: best[name])


def _onednn(x_Br: Tensor, weight_Fr: Tensor, bias_F: Tensor | None) -> Tensor:
    out = torch.ops.mkldnn._linear_pointwise(x_Br, weight_Fr, bias_F, "none", [], "")
    return cast(Tensor, out)
