"""The three products of a sparse code: decode, dot with the decoder, sum by latent.

All are built on `embedding_bag`, which sums weighted rows of a table by bag without materialising
them: bags are rows (tokens) in the decoder and latents in the gradient. The sum by latent needs the
entries sorted by latent, which is one radix sort of 16-bit keys.

Shapes: N entries, B rows, F latents, w = width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def bag_sum(
    table_Tw: Float[Tensor, "t w"],
    index_N: Int[Tensor, " n"],
    offset_B: Int[Tensor, " b+1"],
    weight_N: Float[Tensor, " n"],
) -> Float[Tensor, "b w"]:
    """``out[b] = sum over the entries n of bag b of weight[n] * table[index[n]]``."""
    return F.embedding_bag(
        index_N,
        table_Tw,
        offset_B,
        per_sample_weights=weight_N,
        mode="sum",
        include_last_offset=True,
    )


def bag_sum_and_dot(
    table_Tw: Float[Tensor, "t w"],
    index_N: Int[Tensor, " n"],
    offset_B: Int[Tensor, " b+1"],
    weight_N: Float[Tensor, " n"],
) -> tuple[Float[Tensor, "b w"], Float[Tensor, " n"]]:
    """`bag_sum`, and its weights as a leaf that `dot` differentiates."""
    leaf_N = weight_N.detach().requires_grad_()
    with torch.enable_grad():
        out_Bw = bag_sum(table_Tw.detach(), index_N, offset_B, leaf_N)
    return out_Bw, leaf_N


def dot(
    out_Bw: Float[Tensor, "b w"], leaf_N: Float[Tensor, " n"], grad_Bw: Float[Tensor, "b w"]
) -> Float[Tensor, " n"]:
    """Second half of `bag_sum_and_dot`: ``grad[b(n)] . table[index[n]]`` for every entry."""
    return torch.autograd.grad(out_Bw, leaf_N, grad_Bw)[0]


@dataclass(frozen=True, kw_only=True)
class ByLatent:
    """Entries sorted by latent: the plan of every sum by latent of one step."""

    order: Int[Tensor, " n"]
    """Permutation that sorts the entries by latent, stable."""
    offset: Int[Tensor, " f+1"]
    """Where the entries of each latent start in that order."""

    @classmethod
    def plan(cls, latent_N: Int[Tensor, " n"], latents: int) -> ByLatent:
        """Sort once; the sums then share it."""
        count_F = torch.bincount(latent_N, minlength=latents)
        order_N = sort_by_latent(latent_N, latents)
        offset = torch.cat([count_F.new_zeros(1), count_F.cumsum(0)])
        return cls(order=order_N, offset=offset)

    def outer(
        self,
        weight_N: Float[Tensor, " n"],
        index_N: Int[Tensor, " n"],
        table_Tw: Float[Tensor, "t w"],
    ) -> Float[Tensor, "f w"]:
        """``out[f] = sum over the entries of latent f of weight[n] * table[index[n]]``."""
        return bag_sum(table_Tw, index_N[self.order], self.offset, weight_N[self.order])

    def total(self, weight_N: Float[Tensor, " n"]) -> Float[Tensor, " f"]:
        """``out[f] = sum over the entries of latent f of weight[n]``."""
        one_11 = weight_N.new_ones(1, 1)
        zero_N = torch.zeros_like(self.order)
        return bag_sum(one_11, zero_N, self.offset, weight_N[self.order]).flatten()


def sort_by_latent(latent_N: Int[Tensor, " n"], latents: int) -> Int[Tensor, " n"]:
    """Return a stable argsort of latent numbers.

    On CPU a least-significant-digit radix sort over 16-bit digits (numpy sorts 16-bit keys by
    radix): 131,072 entries in half a millisecond.
    """
    if latent_N.device.type != "cpu":
        return latent_N.argsort(stable=True)
    keys = latent_N.numpy()
    order = np.argsort((keys & 0xFFFF).astype(np.uint16), kind="stable")
    if latents > 1 << 16:
        high = (keys >> 16).astype(np.uint16)
        order = order[np.argsort(high[order], kind="stable")]
    return torch.from_numpy(order)
