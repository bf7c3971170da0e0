"""The k largest pre-activations by an 8-bit product whose error is bounded: exact, and cheaper.

    x' = x / s,  w' = w * s           s [r] balances channels: outliers would use up the 8 bits
    x' ~ xq, w' ~ wq                  whole numbers times one step for a token, one for a latent
    v_j = xq . wq_j + b_j             in 8 bits; half the time of float32 or less (AVX2)
    |pre_j - v_j| <= e_j = |x' - xq| |wq_j| + (|xq| + |x' - xq|) |w'_j - wq_j|

The bound is Cauchy and Schwarz's, from the rounding errors as they are. The latents with the
largest v are computed in float32; the k-th of those, T, is no larger than the k-th of all. Only a
latent with ``v_j + e_j >= T`` can be among the k largest, and every such latent is computed too. So
the result is that of float32, for any data. Where too many are left (a token of which 8 bits say
little, values that are not finite), the token is multiplied in float32.

As in `dictlearn.candidates`, loops are compiled by numba, entries that are not positive are left
out, and the plain functions are the specification. PyTorch reaches the 8-bit product of oneDNN by
operators that are not public: they are used in this file alone, and its tests fail when they
change.

Shapes: B tokens, C rows of a chunk, F latents, r = width read, k kept for a token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dictlearn.candidates import Found, compiled, keep_largest, share_rows

_X_TOP, _X_ZERO, _W_TOP = 63, 64, 127
"""Largest whole numbers. Where 8-bit products are added in pairs into 16 bits, (63 + 64) * 127 * 2
still fits."""
_ROUNDING = 1.001
"""Factor of the bound, for the float32 arithmetic that it takes itself."""
_SHARE = 16
"""A token with more than F / 16 (and 4 k) latents to compute is multiplied in float32 instead:
from there on that is cheaper."""
_SAMPLE = 256
"""Rows by which channels are balanced."""
_TINY = 1e-15
_MOST = np.finfo(np.float32).max


class Rounded(NamedTuple):
    """A matrix in whole numbers: ``value[i] * step[i]`` is about row i."""

    value: Int[Tensor, "n r"]
    step: Float[Tensor, " n"]
    norm: Float[Tensor, " n"]
    """Of the rounded row."""
    error: Float[Tensor, " n"]
    """Norm of the row less the rounded row."""


@functools.cache
def multiplies_int8() -> bool:
    """Whether an 8-bit product is known to pay: x86 with AVX2, a PyTorch with oneDNN's product."""
    fast: bool = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return fast and all(hasattr(torch.ops.onednn, f"qlinear_{n}") for n in ("prepack", "pointwise"))


def largest_exact(
    x_Br: Float[Tensor, "b r"],
    weight_Fr: Float[Tensor, "f r"],
    bias_F: Float[Tensor, " f"],
    k: int,
    chunk: int,
    *,
    compile_loop: Callable[[Any], Any] = compiled,
) -> Found:
    """Return latents [B, k], pre-activations [B, k] and how many of each row are filled [B].

    `chunk` rows at a time. `compile_loop` compiles the loops; tests leave them as they are.
    """
    rows, latents = len(x_Br), len(weight_Fr)
    latent_Bk, pre_Bk = torch.zeros(rows, k, dtype=torch.int64), torch.zeros(rows, k)
    count_B = torch.full((rows,), -1)
    x_Br, weight_Fr, bias_F = x_Br.contiguous(), weight_Fr.contiguous(), bias_F.contiguous()
    balance_r = _balance(x_Br, weight_Fr)
    w = _round(weight_Fr, balance_r, _W_TOP, 0, torch.int8, compile_loop)
    if bool((w.norm + w.error + bias_F).isfinite().all()):  # otherwise no bound holds
        x = _round(x_Br, 1 / balance_r, _X_TOP, _X_ZERO, torch.uint8, compile_loop)
        packed = torch.ops.onednn.qlinear_prepack(w.value, [chunk, x_Br.shape[1]])
        select = compile_loop(select_rows)
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            product_CF = _product(x.value[part], packed, w.step)
            each_C = (x_Br[part], x.step[part], x.norm[part], x.error[part])
            out_C = (latent_Bk[part], pre_Bk[part], count_B[part])
            arrays = (product_CF, *each_C, weight_Fr, bias_F, w.norm, w.error, *out_C)
            share_rows(select, arrays, len(product_CF), max(4 * k, latents // _SHARE))
    left = (count_B < 0).nonzero()[:, 0]
    for first in range(0, len(left), chunk):
        some = left[first : first + chunk]
        pre, latent = F.linear(x_Br[some], weight_Fr, bias_F).topk(k, sorted=False)
        latent_Bk[some], pre_Bk[some], count_B[some] = latent, pre, k
    return latent_Bk, pre_Bk, count_B


def _balance(x_Br: Tensor, weight_Fr: Tensor) -> Float[Tensor, " r"]:
    """Scale of every channel at which tokens and weights have the same mean square there.

    That of a sample of rows: the bound holds at any scales.
    """
    x_r, w_r = (v[:: max(1, len(v) // _SAMPLE)].square().mean(0).sqrt() for v in (x_Br, weight_Fr))
    balance_r = (x_r.clamp(min=_TINY) / w_r.clamp(min=_TINY)).sqrt()
    # one token that is not finite must not take the bound of all others away
    return torch.where(balance_r.isfinite(), balance_r, 1.0)


def _product(value_Cr: Tensor, packed: Tensor, step_F: Tensor) -> Float[Tensor, "c f"]:
    zero_F = torch.zeros(len(step_F), dtype=torch.int64)
    factors = (value_Cr, 1.0, _X_ZERO, packed, step_F, zero_F)
    out = torch.ops.onednn.qlinear_pointwise(*factors, None, 1.0, 0, torch.float32, "none", [], "")
    return cast(Tensor, out)


def _round(
    rows_Nr: Tensor,
    factor_r: Tensor,
    top: int,
    zero: int,
    dtype: torch.dtype,
    compile_loop: Callable[[Any], Any],
) -> Rounded:
    step_N, norm_N, error_N = torch.empty(3, len(rows_Nr))
    out = Rounded(torch.empty(rows_Nr.shape, dtype=dtype), step_N, norm_N, error_N)
    share_rows(compile_loop(round_rows), (rows_Nr, factor_r, *out), len(rows_Nr), top, zero)
    return out


def round_rows(
    rows_Nr: Any,
    factor_r: Any,
    value_Nr: Any,
    step_N: Any,
    norm_N: Any,
    error_N: Any,
    top: int,
    zero: int,
    first: int,
    last: int,
) -> None:
    """Fill rows ``first..last`` of a `Rounded` of ``rows * factor``, whole numbers from `zero`.

    Norms are taken in units of the step, where no square becomes too small.
    """
    width = rows_Nr.shape[1]
    scaled = np.empty(width, np.float32)
    half, one = np.float32(0.5), np.float32(1.0)
    for row in range(first, last):
        biggest = np.float32(0.0)
        for i in range(width):
            scaled[i] = rows_Nr[row, i] * factor_r[i]
        for i in range(width):
            biggest = max(biggest, abs(scaled[i]))
        step = biggest / np.float32(top)
        inverse = one / step if step > 0 else np.float32(0.0)
        norm, error = np.float32(0.0), np.float32(0.0)
        for i in range(width):
            exact = scaled[i] * inverse
            near = np.floor(exact + half)
            value_Nr[row, i] = np.int32(near) + zero
            norm += near * near
            error += (exact - near) * (exact - near)
        step_N[row] = step
        norm_N[row] = step * np.sqrt(norm)
        error_N[row] = step * np.sqrt(error)


def select_rows(
    product_CF: Any,
    x_Cr: Any,
    x_step_C: Any,
    x_norm_C: Any,
    x_error_C: Any,
    weight_Fr: Any,
    bias_F: Any,
    w_norm_F: Any,
    w_error_F: Any,
    latent_Ck: Any,
    pre_Ck: Any,
    count_C: Any,
    limit: int,
    first: int,
    last: int,
) -> None:
    """Fill rows ``first..last`` of the last three arrays before `limit`; see the module.

    A row of which more than `limit` latents would have to be computed keeps its count of -1.
    """
    latents, width, k = product_CF.shape[1], x_Cr.shape[1], latent_Ck.shape[1]
    v = np.empty(latents, np.float32)
    candidate = np.empty(latents, np.int64)
    value = np.empty(latents, np.float32)
    zero, one, half = np.float32(0.0), np.float32(1.0), np.float32(0.5)
    top_norm, top_error = w_norm_F.max(), w_error_F.max()
    guess = np.float32(0.1) * top_norm
    for row in range(first, last):
        spread = x_norm_C[row] + x_error_C[row]
        if not spread <= _MOST:  # nor if it is not a number
            continue
        for j in range(latents):
            v[j] = product_CF[row, j] * x_step_C[row] + bias_F[j]
        # A bound that k to k + 6 of v reach, searched for by counting, which runs at the speed of
        # the cache. With fewer than k positive ones it stays 0; after 24 counts it is good enough.
        low, high = zero, np.float32(np.inf)
        probe = guess * max(spread, np.float32(1e-30))
        reach = np.float32(0.06) * probe
        for _ in range(24):
            count = zero
            for j in range(latents):
                count += one if v[j] >= probe else zero
            if count >= k:
                low = probe
                if count <= k + 6:
                    break
            else:
                high = probe
            if high == np.inf:
                probe = low + reach
            elif low == zero:
                probe = max(high - reach, high * half)
            else:
                probe = (low + high) * half
            reach += reach
        if low > zero:
            guess = low / max(spread, np.float32(1e-30))
        found, done, least = 0, 0, zero
        for j in range(latents):
            if v[j] >= low:
                candidate[found] = j
                found += 1
        x = x_Cr[row]
        for stage in range(2):
            if found > limit:
                break
            while done < found:  # four at once: memory is read in four places
                c1, c2, c3 = (
                    min(done + 1, found - 1),
                    min(done + 2, found - 1),
                    min(done + 3, found - 1),
                )
                j0, j1, j2, j3 = candidate[done], candidate[c1], candidate[c2], candidate[c3]
                w0, w1, w2, w3 = weight_Fr[j0], weight_Fr[j1], weight_Fr[j2], weight_Fr[j3]
                sum0, sum1, sum2, sum3 = zero, zero, zero, zero
                for i in range(width):
                    sum0 += x[i] * w0[i]
                    sum1 += x[i] * w1[i]
                    sum2 += x[i] * w2[i]
                    sum3 += x[i] * w3[i]
                value[done], value[c1] = sum0 + bias_F[j0], sum1 + bias_F[j1]
                value[c2], value[c3] = sum2 + bias_F[j2], sum3 + bias_F[j3]
                done += 4
            done = found
            if stage == 0:
                if found >= k:
                    least = max(np.partition(value[:found], found - k)[found - k], zero)
                of_norm = x_error_C[row] * np.float32(_ROUNDING)
                of_error = spread * np.float32(_ROUNDING)
                cut = least - (of_norm * top_norm + of_error * top_error)
                for j in range(latents):
                    if v[j] < cut or v[j] >= low:
                        continue
                    if v[j] + of_norm * w_norm_F[j] + of_error * w_error_F[j] >= least:
                        candidate[found] = j
                        found += 1
        if found > limit:
            continue
        count_C[row] = keep_largest(candidate, value, found, latent_Ck[row], pre_Ck[row])
