"""Latents divided over ranks, for dictionaries too wide for one: every rank sees the whole batch.

Rank i of n holds latents ``[i F/n, (i + 1) F/n)``: their rows of every weight and of Adam. A step
needs three things of the other ranks: which of its entries are among the k largest of all (values
gathered, no weights), the sum of all partial reconstructions, and the sum of what flows to b_dec
through the encoder. What is not by latent (b_dec, W_skip) is alike on all ranks, since they see
the same sums. Checkpoints and dictionaries are gathered: their files are those of one process.

Shapes: B tokens, F latents, R ranks, K entries of a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from dictlearn.config import DictionaryConfig
from dictlearn.dictionary import Dictionary

_BY_LATENT = ("W_dec", "b_enc", "sparsify.", "since_fired", "ln_", "scale")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shards:
    """The share of one rank, and the exchange with the others."""

    rank: int
    """Number of this process."""
    world: int
    """Number of processes."""
    config: DictionaryConfig
    """Of the whole dictionary."""

    @property
    def count(self) -> int:
        """Latents of this rank."""
        return self.config.latents // self.world

    @property
    def first(self) -> int:
        """Number of this rank's first latent in the whole dictionary."""
        return self.rank * self.count

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over the ranks; `value` is overwritten."""
        dist.all_reduce(value)
        return value

    def largest(self, value_BK: Float[Tensor, "b k"], k: int) -> Bool[Tensor, "b k"]:
        """Return which of this rank's entries are among the k largest of their row in all ranks."""
        parts = [torch.empty_like(value_BK) for _ in range(self.world)]
        dist.all_gather(parts, value_BK.contiguous())
        every_Bn = torch.cat(parts, dim=1)
        kept_Bk = every_Bn.topk(min(k, every_Bn.shape[1]), dim=1, sorted=False).indices
        mask_Bn = torch.zeros_like(every_Bn, dtype=torch.bool).scatter_(1, kept_Bk, True)
        width = value_BK.shape[1]
        return mask_Bn[:, self.rank * width : (self.rank + 1) * width]

    def dead_decoding(
        self, pre_BD: Float[Tensor, "b dead"], dec_Dw: Float[Tensor, "dead w"], k: int
    ) -> Float[Tensor, "b w"]:
        """Decode those of this rank's dead latents that are among the k largest of all ranks'."""
        width = min(k, pre_BD.shape[1])
        kept = pre_BD.relu().topk(width, dim=1, sorted=False)
        padded_Bk = torch.nn.functional.pad(kept.values.detach(), (0, k - width))
        mask_Bk = self.largest(padded_Bk, k)[:, :width]
        acts_BD = torch.zeros_like(pre_BD).scatter(1, kept.indices, kept.values * mask_Bk)
        return acts_BD @ dec_Dw

    def norm(self, grads: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """Norm of the gradient of the whole dictionary."""
        by_latent = [g for name, g in grads.items() if latent_axis(f"adam.{name}", g) is not None]
        alike = [g for name, g in grads.items() if latent_axis(f"adam.{name}", g) is None]

        def squares(parts: list[Tensor]) -> Tensor:
            return torch.stack([torch.linalg.vector_norm(g).square() for g in parts]).sum()

        total = self.sum(squares(by_latent))
        return (total + squares(alike) if alike else total).sqrt()

    # ---- weights and states --------------------------------------------------------------------
    def cut(self, whole: Dictionary) -> Dictionary:
        """Return this rank's latents as a dictionary of their own."""
        config = dataclasses.replace(self.config, latents=self.count, matryoshka=None)
        mine = Dictionary.from_config(config).to(whole.device)
        mine.load_state_dict(self.share(whole.state_dict()))
        return mine

    def share(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's part of the tensors of a whole dictionary, or of its checkpoint."""
        out = {}
        for name, value in tensors.items():
            axis = latent_axis(name, value)
            out[name] = value if axis is None else value.narrow(axis, self.first, self.count)
        return out

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inverse of `share`; every rank gets all."""
        out = {}
        for name, value in tensors.items():
            axis = latent_axis(name, value)
            if axis is None:
                out[name] = value
                continue
            mine = value.detach().contiguous()
            parts = [torch.empty_like(mine) for _ in range(self.world)]
            dist.all_gather(parts, mine)
            out[name] = torch.cat(parts, dim=axis)
        return out


def latent_axis(name: str, value: Tensor) -> int | None:
    """Return which axis of a tensor of a dictionary, or of its checkpoint, counts latents."""
    if not value.ndim:
        return None
    if "W_enc" in name:
        return 0 if name.startswith("adam.") else 1  # Adam works on rows
    return 0 if any(part in name for part in _BY_LATENT) else None


def shards_of(config: DictionaryConfig, name: str, rank: int, world: int) -> Shards:
    """Return the share of a rank.

    Raises
    ------
    ValueError
        The latents cannot be divided so, or the dictionary has no sparse step.
    """
    count, rest = divmod(config.latents, world)
    if rest:
        raise ValueError(
            f"the {config.latents} latents of {name!r} cannot be divided by {world} ranks; "
            f"make them {config.latents + world - rest}"
        )
    if (k := getattr(config.sparsify, "k", None)) is not None and k > count:
        raise ValueError(f"{name!r}: k = {k} is more than the {count} latents of each rank")
    if getattr(config.sparsify, "group_max", False):
        raise ValueError(f"{name!r}: group_max picks by groups of latents, which are not divided")
    return Shards(rank=rank, world=world, config=config)
