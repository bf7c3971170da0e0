"""What a training step selects: the entries that carry value or gradient, for every strategy.

The encoder product runs in chunks of rows that stay in cache, and each chunk is reduced to its
entries at once: pre-activations [B, F] never exist in memory as a whole.

Shapes: B tokens, F latents, C rows of a chunk, N entries, r = width read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dictlearn.candidates import largest, multiplies_bfloat16, scores
from dictlearn.config import BatchTopK, Gated, JumpReLU, ReLU, Sparsify, TopK
from dictlearn.dictionary import Dictionary
from dictlearn.eightbit import largest_exact, multiplies_int8
from dictlearn.gemm import Backend, linear
from dictlearn.sharding import Shards
from dictlearn.sparsify import GatedSelection, JumpReLUSelection, TopKSelection

_CHUNK_BYTES = 24 << 20
_SAMPLE = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Picks:
    """Entries of a batch, sorted by row; where a strategy needs it, inactive ones among them."""

    row: Int[Tensor, " n"]
    latent: Int[Tensor, " n"]
    pre: Float[Tensor, " n"]
    """Pre-activation of each entry."""
    offset: Int[Tensor, " b+1"]
    """Where the entries of each row start."""
    smallest_kept: Float[Tensor, ""] | None = None
    """Smallest activation kept in the batch (BatchTopK)."""


Chunk = tuple[int, Tensor]
Gather = Callable[[Tensor], Tensor]
Picker = Literal["exact", "candidates"]
Found = tuple[Tensor, Tensor, Tensor]


def pre_chunks(
    dictionary: Dictionary, x_Br: Float[Tensor, "b r"], backend: Backend
) -> Iterator[Chunk]:
    """Yield (first row, pre-activations of a chunk [C, F]); `x_Br` is centred already."""
    rows = x_Br.shape[0]
    step = rows
    if x_Br.device.type == "cpu":
        step = max(64, _CHUNK_BYTES // (4 * dictionary.latents))
    weight_Fr = dictionary.W_enc.T
    for start in range(0, rows, step):
        yield start, linear(x_Br[start : start + step], weight_Fr, dictionary.b_enc, backend)


def pick(
    dictionary: Dictionary,
    x_Br: Float[Tensor, "b r"],
    backend: Backend = "default",
    max_density: float = 1.0,
    gather: Gather | None = None,
    shards: Shards | None = None,
    picker: Picker = "exact",
) -> Picks | None:
    """Select the entries of a training step.

    Returns None when the first chunk has more than ``max_density * C * F`` entries: the dense step
    is then cheaper. `picker` is that of TopK (`TrainConfig.picker`). `gather` concatenates values
    over the ranks of a data parallel run, where the batch of BatchTopK is the global one. With
    `shards` the largest are those of all ranks' latents.
    """
    config = dictionary.config.sparsify
    by_candidates = picker == "candidates" and takes_candidates(config) and shards is None
    if by_candidates and x_Br.device.type == "cpu":
        return _pick_candidates(dictionary, x_Br)
    chunks = pre_chunks(dictionary, x_Br, backend)
    if isinstance(config, TopK):
        picks = _pick_top(dictionary, chunks, x_Br.shape[0])
        return picks if shards is None else _among_all(picks, config.k, shards)
    if isinstance(config, BatchTopK):
        return _pick_batch_top(dictionary, chunks, x_Br, gather, shards)
    lower_F = _lower_bound(dictionary)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for start, pre_CF in chunks:
        mask_CF = pre_CF > lower_F
        row, latent = mask_CF.nonzero(as_tuple=True)
        if start == 0 and row.numel() > max_density * pre_CF.numel():
            return None
        found.append((row + start, latent, pre_CF[row, latent]))
    return _join(found, x_Br.shape[0])


def _lower_bound(dictionary: Dictionary) -> Tensor:
    """Per latent (or scalar), the pre-activation below which an entry has no part in the step."""
    config = dictionary.config.sparsify
    if isinstance(config, ReLU):
        return dictionary.b_enc.new_zeros(())
    if isinstance(config, JumpReLU):
        theta_F = cast(JumpReLUSelection, dictionary.sparsify).threshold.detach()
        return theta_F - config.bandwidth / 2
    if isinstance(config, Gated):
        return -cast(GatedSelection, dictionary.sparsify).b_gate.detach()
    raise ValueError(f"no sparse step for {config}")


def _pick_top(dictionary: Dictionary, chunks: Iterator[Chunk], rows: int) -> Picks:
    selection = cast(TopKSelection, dictionary.sparsify)
    values, indices = [], []
    for _, pre_CF in chunks:
        value_CK, index_CK = selection.top_pre(pre_CF)
        values.append(value_CK)
        indices.append(index_CK)
    pre_BK, latent_BK = torch.cat(values), torch.cat(indices)
    k = pre_BK.shape[1]
    device = pre_BK.device
    return Picks(
        row=torch.arange(rows, device=device).repeat_interleave(k),
        latent=latent_BK.flatten(),
        pre=pre_BK.flatten(),
        offset=torch.arange(0, rows * k + 1, k, device=device),
    )


def takes_candidates(config: Sparsify) -> bool:
    """Whether `dictlearn.candidates` can pick for a strategy."""
    return isinstance(config, TopK) and config.relu and not config.group_max


def _pick_candidates(dictionary: Dictionary, x_Br: Float[Tensor, "b r"]) -> Picks:
    k = cast(TopK, dictionary.config.sparsify).k
    weight_Fr = dictionary.W_enc.detach().T.contiguous()
    bias_F = dictionary.b_enc.detach()
    if not multiplies_bfloat16() and multiplies_int8():
        chunk = max(64, _CHUNK_BYTES // (4 * dictionary.latents))
        latent_Bk, pre_Bk, count_B = largest_exact(x_Br, weight_Fr, bias_F, k, chunk)
        row, column = (torch.arange(k) < count_B[:, None]).nonzero(as_tuple=True)
        return _join([(row, latent_Bk[row, column], pre_Bk[row, column])], x_Br.shape[0])
    half_Fr, half_F = weight_Fr.to(torch.bfloat16), bias_F.to(torch.bfloat16)
    half_Br = x_Br.to(torch.bfloat16)
    rows = x_Br.shape[0]
    step = max(64, _CHUNK_BYTES // (2 * dictionary.latents))
    found: list[Found] = []
    for start in range(0, rows, step):
        score_CF = scores(half_Br[start : start + step], half_Fr, half_F)
        here = (score_CF, x_Br[start : start + step].contiguous(), weight_Fr, bias_F)
        latent_Ck, pre_Ck, count_C = largest(*here, k)
        row, column = (torch.arange(k) < count_C[:, None]).nonzero(as_tuple=True)
        found.append((row + start, latent_Ck[row, column], pre_Ck[row, column]))
    return _join(found, rows)


def _among_all(picks: Picks, k: int, shards: Shards) -> Picks:
    """Keep what is among the k largest of all ranks' latents."""
    rows = picks.offset.numel() - 1
    keep_N = shards.largest(picks.pre.view(rows, -1), k).flatten()
    return _join([(picks.row[keep_N], picks.latent[keep_N], picks.pre[keep_N])], rows)


def _pick_batch_top(
    dictionary: Dictionary,
    chunks: Iterator[Chunk],
    x_Br: Float[Tensor, "b r"],
    gather: Gather | None,
    shards: Shards | None = None,
) -> Picks:
    """Keep the k * B largest of ``relu(pre)`` by a bound that only entries in question pass.

    The bound comes from a sample of the first chunk, set so that about half again as many entries
    pass as are kept. If it turns out too high, the pass is made once more with bound 0.
    """
    k = cast(BatchTopK, dictionary.config.sparsify).k
    rows = x_Br.shape[0]
    n_keep = k * rows
    latents = dictionary.latents if shards is None else shards.config.latents
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    bound: Tensor | None = None
    for start, pre_CF in chunks:
        if bound is None:
            bound = _sample_bound(pre_CF, 1.5 * k / latents)
        row, latent = (pre_CF > bound).nonzero(as_tuple=True)
        found.append((row + start, latent, pre_CF[row, latent]))
    all_picks = _join(found, rows)
    if bound is not None and gather is not None:
        found, least = _global_least(
            dictionary, x_Br, found, bound, n_keep, gather, alike=shards is not None
        )
        kept = [_above(found, least)]
        return dataclasses.replace(_join(kept, rows), smallest_kept=least)
    if all_picks.pre.numel() < n_keep and bound is not None and bool(bound > 0):
        all_picks = _join(_all_positive(dictionary, x_Br), rows)
    if all_picks.pre.numel() > n_keep:
        kept_N = all_picks.pre.topk(n_keep, sorted=False).indices.sort().values
        all_picks = _join(
            [(all_picks.row[kept_N], all_picks.latent[kept_N], all_picks.pre[kept_N])], rows
        )
    smallest = all_picks.pre.min() if all_picks.pre.numel() else x_Br.new_zeros(())
    return Picks(
        row=all_picks.row,
        latent=all_picks.latent,
        pre=all_picks.pre,
        offset=all_picks.offset,
        smallest_kept=smallest,
    )


def _all_positive(dictionary: Dictionary, x_Br: Float[Tensor, "b r"]) -> list[Found]:
    """Return every positive entry, by a pass with bound 0."""
    found = []
    for start, pre_CF in pre_chunks(dictionary, x_Br, "default"):
        row, latent = (pre_CF > 0).nonzero(as_tuple=True)
        found.append((row + start, latent, pre_CF[row, latent]))
    return found


def _global_least(
    dictionary: Dictionary,
    x_Br: Float[Tensor, "b r"],
    found: list[Found],
    bound: Tensor,
    n_keep: int,
    gather: Gather,
    *,
    alike: bool = False,
) -> tuple[list[Found], Tensor]:
    """Return a rank's candidates, and the smallest value kept in the batch of all ranks.

    That value is right when no rank left out larger ones by its bound; otherwise those ranks look
    again with bound 0. Every rank sees the same numbers and so takes the same way. `alike`: the
    ranks have the same tokens and different latents, so `n_keep` is that of all.
    """
    bound_R = gather(bound.reshape(1))
    total = n_keep if alike else n_keep * bound_R.numel()

    def least_of(found: list[Found]) -> tuple[Tensor, bool]:
        value_N = gather(torch.cat([pre for _, _, pre in found]))
        if value_N.numel() > total:
            return value_N.topk(total, sorted=False).values.min(), True
        least = value_N.min() if value_N.numel() else bound.new_zeros(())
        return least, value_N.numel() == total

    least, full = least_of(found)
    needed = least if full else least.new_zeros(())
    if bool((bound_R > needed).any()):
        if bool(bound > needed):
            found = _all_positive(dictionary, x_Br)
        least, _ = least_of(found)
    return found, least


def _above(found: list[Found], least: Tensor) -> Found:
    row, latent, pre = (torch.cat(parts) for parts in zip(*found, strict=True))
    keep_N = pre >= least
    return row[keep_N], latent[keep_N], pre[keep_N]


def _sample_bound(pre_CF: Float[Tensor, "c f"], fraction: float) -> Tensor:
    """Positive value that about `fraction` of the entries exceed, from an even sample."""
    flat = pre_CF.flatten()
    sample = flat[:: max(1, flat.numel() // _SAMPLE)]
    n_above = min(sample.numel(), max(1, round(fraction * sample.numel())))
    return sample.topk(n_above, sorted=False).values.min().clamp(min=0.0)


def _join(found: list[tuple[Tensor, Tensor, Tensor]], rows: int) -> Picks:
    row, latent, pre = (torch.cat(parts) for parts in zip(*found, strict=True))
    count_B = torch.bincount(row, minlength=rows)
    offset = torch.cat([count_B.new_zeros(1), count_B.cumsum(0)])
    return Picks(row=row, latent=latent, pre=pre, offset=offset)
