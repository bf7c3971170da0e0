"""From a model's values to stripes: pick tokens, cast, check the range, scatter into the buffer.

Legend: B items of a batch, T tokens, t tokens of a stripe, d channels, S items of a part.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, Float64, Int8, Int32, Int64, Num
from torch import Tensor

from actstore.manifest import ArraySpec, Manifest
from actstore.quantise import LIMIT, MOST
from actstore.writer import FLOAT16_MAX, PartBuffer, raise_range
from vitmodels.spec import SiteInfo

TORCH_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
}
"""Activation dtype -> torch dtype of the same bits."""


def tokens_of(
    value: Num[Tensor, "B ..."],
    info: SiteInfo,
    array: ArraySpec,
    chosen: Int32[np.ndarray, "B T"] | None = None,
) -> Num[Tensor, "B T d"]:
    """Return one token kind of a site's value as [item, token, channel].

    The token (or query) axis comes second; all other axes are flattened in C order, so that
    head outputs are stored as head * d_head and attention patterns as head * key. `chosen`
    holds the positions to keep of each item, where not all of them are.
    """
    axis = info.token_axis
    if axis is None:
        return value.reshape(len(value), 1, -1)
    value = value.movedim(axis + 1, 1)
    if chosen is not None:
        token = torch.from_numpy(chosen.astype(np.int64) + array.first).to(value.device)
        return value[torch.arange(len(value), device=value.device)[:, None], token].flatten(2)
    return value[:, array.first : array.first + array.tokens].flatten(2)


class Stager:
    """Bring batches of values into a part buffer, one batch behind the model on an accelerator.

    The copy from a device is asynchronous, into pinned memory: while batch i is copied, the
    model runs batch i + 1; `flush` waits for the last copy. On the CPU values are cast and
    scattered in one pass.
    """

    def __init__(self, manifest: Manifest, sites: Mapping[str, SiteInfo]) -> None:
        self._manifest = manifest
        self._sites = sites
        self._dtype = TORCH_DTYPES[manifest.dtype]
        self._scales: dict[tuple[ArraySpec, torch.device], Tensor] = {}
        self._pending: _Pending | None = None

    def put(self, buffer: PartBuffer, values: Mapping[str, Tensor]) -> None:
        """Take the values of one batch, of every site.

        Raises
        ------
        ValueError
            When a value of this or the batch before does not fit the stored dtype.
        """
        row, count = self._next_row(buffer), len(next(iter(values.values())))
        picked = {
            array: tokens_of(
                values[array.site],
                self._sites[array.site],
                array,
                buffer.positions[array.kind][row : row + count] if array.of else None,
            )
            for array in self._manifest.arrays
        }
        first = next(iter(picked.values()))
        # Of whole sites, not of picked tokens: a pass over contiguous memory is ten times faster.
        extremes = torch.stack([_extremes(values[site]) for site in self._manifest.sites])
        if first.device.type == "cpu":
            self._check(picked, extremes)
            self._scatter(buffer, picked)
            return
        pinned = first.device.type == "cuda"
        staged: dict[ArraySpec, Tensor] = {}
        losses: dict[ArraySpec, tuple[Tensor, Tensor]] = {}
        for array, value in picked.items():
            if self._manifest.scales:
                value, saturated, error = _quantise(value, self._scale(array, value.device))
                losses[array] = saturated, error
            target = torch.empty(value.shape, dtype=self._dtype, pin_memory=pinned)
            staged[array] = target.copy_(value, non_blocking=True)
        limits = torch.empty(extremes.shape, dtype=extremes.dtype, pin_memory=pinned)
        limits.copy_(extremes, non_blocking=True)
        event = torch.Event(first.device)
        event.record()
        self.flush()
        self._pending = (buffer, staged, limits, losses, event)

    def _next_row(self, buffer: PartBuffer) -> int:
        """Return the row that the next item gets, behind those that are on their way."""
        if self._pending is None or self._pending[0] is not buffer:
            return buffer.items
        return buffer.items + len(next(iter(self._pending[1].values())))

    def flush(self) -> None:
        """Wait for the batch on its way and put it into its buffer."""
        if self._pending is None:
            return
        buffer, staged, limits, losses, event = self._pending
        self._pending = None
        event.synchronize()
        self._check(staged, limits)
        self._scatter(buffer, staged)
        for array, (saturated, error) in losses.items():
            lost = error.cpu()
            if not limits.isfinite().all() and lost.isfinite().logical_not().any():
                channel = int(lost.isfinite().int().argmin())
                raise_range(array, channel, float("nan"), self._manifest.dtype)
            buffer.losses[array].add(saturated.cpu().numpy(), lost.clamp(max=MOST).numpy())

    def _check(self, values: Mapping[ArraySpec, Tensor], extremes: Tensor) -> None:
        limit = FLOAT16_MAX if self._manifest.dtype == "float16" else torch.finfo(torch.float32).max
        if bool((extremes.abs() <= limit).all()):
            return
        for array, value in values.items():
            bad = (value.float().abs() <= limit).logical_not().nonzero()
            if len(bad):
                where = tuple(bad[0].tolist())
                found = float(value[where])
                if math.isinf(found):  # already cast; the extremes know what it was
                    site = list(self._manifest.sites).index(array.site)
                    found = float(extremes[site].abs().max())
                raise_range(array, where[-1], found, self._manifest.dtype)

    def _scatter(self, buffer: PartBuffer, values: Mapping[ArraySpec, Tensor]) -> None:
        """Cast and move values [B, T, d] into the rows of the stripes [T/t, S, t, d]."""
        count = len(next(iter(values.values())))
        rows = buffer.take_rows(count)
        for array, value in values.items():
            stripes = torch.from_numpy(buffer.stripes[array])
            if self._manifest.dtype == "bfloat16":
                stripes = stripes.view(torch.bfloat16)
            shape = (count, array.n_stripes, array.stripe_tokens, array.channels)
            if self._manifest.scales and value.dtype is not torch.int8:
                value = torch.from_numpy(buffer.cast(array, value.float().numpy()))
            stripes[:, rows].copy_(value.reshape(shape).movedim(1, 0))

    def _scale(self, array: ArraySpec, device: torch.device) -> Tensor:
        """Return the scales of an array on a device."""
        if (array, device) not in self._scales:
            scale = torch.tensor(self._manifest.scale(array), device=device)
            self._scales[array, device] = scale
        return self._scales[array, device]


_Pending = tuple[
    PartBuffer,
    dict[ArraySpec, Tensor],
    Tensor,
    dict[ArraySpec, tuple[Tensor, Tensor]],
    torch.Event,
]
"""A batch on its way: its buffer, values, extremes, losses, and when it has arrived."""


def _quantise(
    value: Num[Tensor, "B T d"], scale: Float[Tensor, " d"]
) -> tuple[Int8[Tensor, "B T d"], Int64[Tensor, " d"], Float64[Tensor, " d"]]:
    """Return what `actstore.quantise.quantise` returns, on the device of the values.

    Values that are not finite give anything here; their extremes refuse them later.
    """
    x = value.float() / scale
    q = x.round()
    saturated = (q.abs() > LIMIT).sum((0, 1))
    q = q.clamp_(-LIMIT, LIMIT)
    error = (x - q).square_().sum((0, 1), dtype=torch.float64) * scale.double().square()
    return q.to(torch.int8), saturated, error


def _extremes(value: Num[Tensor, "B T d"]) -> Num[Tensor, " 2"]:
    """Return least and greatest value; NaN where there is one."""
    low, high = torch.aminmax(value.detach())
    return torch.stack([low, high]).float()
