"""The k largest pre-activations by candidates: a bfloat16 product picks some, float32 settles them.

    s = bf16(x) @ bf16(W_enc) + bf16(b)          half the bytes, twice the speed (AVX-512 BF16, AMX)
    C = the k + spare largest s > 0 of a token
    pre_j = x . W_enc[:, j] + b_j   for j in C, in float32
    kept = the k largest pre_j

What is kept has exact values. A latent among the true k largest is missed only if `spare` others
overtake it by the error of bfloat16; `docs/dictionaries.md` says how often that was seen. Entries
whose s is not positive carry neither value nor gradient and are left out. A CPU without
instructions for bfloat16 emulates them, slowly: `dictlearn.eightbit` serves those.

The inner loop is compiled by numba (the extra ``fast``); run as plain Python, the same function is
its specification. Shapes: C rows of a chunk, F latents, r = width read, k kept for a token.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from actstore.compile import compile_loop

SPARE = 16
"""Candidates of a token beyond k."""
_TOP = 1 << 15

Found = tuple[Int[Tensor, "c k"], Float[Tensor, "c k"], Int[Tensor, " c"]]


def scores(
    x_Cr: Float[Tensor, "c r"], weight_Fr: Float[Tensor, "f r"], bias_F: Float[Tensor, " f"]
) -> Int[Tensor, "c f"]:
    """Return the bfloat16 product as int16: among positive numbers the order is the same."""
    return F.linear(x_Cr, weight_Fr, bias_F).view(torch.int16)


def largest(
    score_CF: Int[Tensor, "c f"],
    x_Cr: Float[Tensor, "c r"],
    weight_Fr: Float[Tensor, "f r"],
    bias_F: Float[Tensor, " f"],
    k: int,
    *,
    spare: int | None = None,
    select: Callable[..., None] | None = None,
) -> Found:
    """Return latents [C, k], pre-activations [C, k] and how many of each row are filled [C].

    `select` is the inner loop, compiled unless another is given.
    """
    select = compiled() if select is None else select
    wanted = k + (SPARE if spare is None else spare)
    rows = len(x_Cr)
    latent_Ck, pre_Ck = torch.zeros(rows, k, dtype=torch.int64), torch.zeros(rows, k)
    count_C = torch.zeros(rows, dtype=torch.int64)
    arrays = (score_CF, x_Cr, weight_Fr, bias_F, latent_Ck, pre_Ck, count_C)
    share_rows(select, arrays, rows, wanted)
    return latent_Ck, pre_Ck, count_C


def share_rows(
    loop: Callable[..., None], tensors: Sequence[Tensor], rows: int, *options: int
) -> None:
    """Call ``loop(*arrays, *options, first, last)`` on an even share of the rows in each thread."""
    arrays = [v.numpy() for v in tensors]
    threads = min(torch.get_num_threads(), max(1, rows // 64))
    if threads == 1:
        loop(*arrays, *options, 0, rows)
        return
    edges = np.linspace(0, rows, threads + 1).astype(int).tolist()

    def share(edge: tuple[int, int]) -> None:
        loop(*arrays, *options, *edge)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(share, itertools.pairwise(edges)))


@functools.cache
def multiplies_bfloat16(cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether this CPU says that it multiplies bfloat16; True where it says nothing at all.

    Where it does not, the product of candidates is emulated and the whole step takes about five
    times as long as with ``picker="exact"`` (measured on a CPU with AVX2 only).
    """
    try:
        text = Path(cpuinfo).read_text()
    except OSError:
        return True
    flags = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    if not flags:
        return True
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags[0].split())


def compiled(loop: Callable[..., None] | None = None) -> Callable[..., None]:
    """Return a loop (`select_rows`), compiled; ValueError says how to get numba."""
    fast = frozenset({"reassoc", "contract", "nsz"})
    found = compile_loop(loop or select_rows, fast, calls=(keep_largest,))
    if found is None:
        raise ValueError(
            'picker="candidates" needs numba, which is not installed: '
            "`pip install 'actstore[fast]'`, or use picker=\"exact\""
        )
    return found


def select_rows(
    score_CF: Any,
    x_Cr: Any,
    weight_Fr: Any,
    bias_F: Any,
    latent_Ck: Any,
    pre_Ck: Any,
    count_C: Any,
    wanted: int,
    first: int,
    last: int,
) -> None:
    """Fill rows ``first..last`` of the last three arrays before `wanted`; see the module.

    The lowest score that `wanted` entries reach is searched for by counting, beginning at that of
    the row before: counting runs at the speed of the cache, sorting does not.
    """
    latents, width = score_CF.shape[1], x_Cr.shape[1]
    candidate = np.empty(latents, np.int64)
    value = np.empty(latents, np.float32)
    guess = _TOP // 2
    for row in range(first, last):
        score = score_CF[row]
        low, high, probe, reach = 1, _TOP, guess, 8
        while high - low > 1:
            if not low < probe < high:
                probe = (low + high) // 2
            bound = np.int16(probe)
            count = 0
            for j in range(latents):
                count += score[j] >= bound
            if count >= wanted:
                low = probe
                probe += reach if high == _TOP else 0
            else:
                high = probe
                probe -= reach if low == 1 else 0
            reach *= 2
        guess = low
        bound = np.int16(low)
        found = 0
        for j in range(latents):
            if score[j] >= bound:
                candidate[found] = j
                found += 1
        for c in range(found):
            weight = weight_Fr[candidate[c]]
            total = np.float32(0.0)
            for i in range(width):
                total += x_Cr[row, i] * weight[i]
            value[c] = total + bias_F[candidate[c]]
        count_C[row] = keep_largest(candidate, value, found, latent_Ck[row], pre_Ck[row])


def keep_largest(candidate: Any, value: Any, found: int, latent_k: Any, pre_k: Any) -> int:
    """Keep the k largest of the first `found` values, and return how many there are."""
    k = len(latent_k)
    kept = min(k, found)
    least = np.float32(-np.inf)
    if found > k:
        least = np.partition(value[:found], found - k)[found - k]
    filled = 0
    for c in range(found):
        if value[c] > least and filled < kept:
            latent_k[filled] = candidate[c]
            pre_k[filled] = value[c]
            filled += 1
    for c in range(found):  # as many equal to the least as there is room for
        if value[c] == least and filled < kept:
            latent_k[filled] = candidate[c]
            pre_k[filled] = value[c]
            filled += 1
    return filled
