"""Latents over time, from a store of clips: onset, persistence, duty cycle, motion, transitions.

A **track** is one place of one clip through all its frames (``level="patch"``), or a whole clip,
where a latent counts as active if it is so anywhere in the frame (``level="frame"``). A frame is a
step of the token grid: two pictures for a tubelet of two. With a_t whether a latent is active at
frame t of a track::

    rate[t]      = mean of a_t
    onset[t]     = share of the tracks on which it is ever active that begin at t
    persistence  = P(a_{t+1} | a_t)            chance = P(a_{t+1}), the same if frames were shuffled
    run          = mean length of a run of active frames
    duty         = mean share of active frames on tracks on which it is ever active
    motion       = mean step of the centre of its activation from frame to frame, in patches
    P(b_{t+lag} | a_t) of a pair, and its lift over P(b_{t+lag})

All are sums over clips, so a store is read once, a few clips at a time.

Shapes: N clips, T frames, P places of a frame (h x w), D channels, F latents, S chosen ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from dictlearn.scaling import check_sites

if TYPE_CHECKING:
    from actstore.store import Store
    from dictlearn.dictionary import Dictionary

Level = Literal["patch", "frame"]
Grid = tuple[int, int, int]
_CHUNK_BYTES = 64 << 20


def over_time(
    store: Store,
    dictionary: Dictionary,
    *,
    level: Level = "patch",
    limit: int | None = None,
    grid: Grid | None = None,
) -> xr.Dataset:
    """Say when each latent is active, how it begins, stays and moves.

    Parameters
    ----------
    store
        Clips, harvested with the patches of the sites that the dictionary reads.
    dictionary
        In raw units.
    level
        What a track is, see the module.
    limit
        Stop after so many clips, in the order of the store.
    grid
        Patches as (frames, rows, columns), for a store of arrays that does not know.

    Returns
    -------
    xarray.Dataset
        ``rate`` and ``onset`` (latent, time); ``persistence``, ``chance``, ``run``, ``duty``,
        ``active`` (tracks on which it is ever active) (latent); ``motion`` (latent, axis) with axis
        row, column. NaN where a latent never fires, or never in two frames in a row.

    Raises
    ------
    ValueError
        The store holds images, no patches, or an unknown level.
    KeyError
        A site is not in the store.
    """
    _check_level(level)
    frames, height, width = _grid(store, dictionary, grid)
    f = dictionary.latents
    fired, begun = torch.zeros(frames, f), torch.zeros(frames, f)
    runs, stays, could, ever = (torch.zeros(f, dtype=torch.float64) for _ in range(4))
    moved, moves = torch.zeros(2, f, dtype=torch.float64), torch.zeros(f, dtype=torch.float64)
    fired, begun = fired.double(), begun.double()
    tracks = 0
    for acts_NTPF in codes(store, dictionary, limit=limit, grid=grid):
        on = _tracks(acts_NTPF, level)  # [tracks, T, F], 0 or 1
        tracks += len(on)
        before = torch.cat([torch.zeros_like(on[:, :1]), on[:, :-1]], dim=1)
        seen = before.cummax(dim=1).values
        fired += on.sum(0)
        begun += (on * (1 - seen)).sum(0)
        runs += (on * (1 - before)).sum((0, 1))
        stays += (on[:, :-1] * on[:, 1:]).sum((0, 1))
        could += on[:, :-1].sum((0, 1))
        ever += on.amax(1).sum(0)
        step, pairs = _motion(acts_NTPF, height, width)
        moved += step
        moves += pairs
    total = fired.sum(0)
    later = fired[1:].sum(0) / max(1, tracks * (frames - 1))
    values = {
        "rate": (("latent", "time"), (fired / max(1, tracks)).T),
        "onset": (("latent", "time"), _divide(begun, ever).T),
        "persistence": (("latent",), _divide(stays, could)),
        "chance": (("latent",), later),
        "run": (("latent",), _divide(total, runs)),
        "duty": (("latent",), _divide(total, ever * frames)),
        "active": (("latent",), ever),
        "motion": (("latent", "axis"), _divide(moved, moves).T),
    }
    return xr.Dataset(
        {name: (dims, value.numpy()) for name, (dims, value) in values.items()},
        coords={
            "latent": np.arange(f),
            "time": np.arange(frames),
            "axis": ["row", "column"],
        },
        attrs={"site": "+".join(dictionary.config.reads), "level": level, "tracks": tracks},
    )


def transitions(
    store: Store,
    dictionary: Dictionary,
    latents: Sequence[int],
    *,
    lags: Sequence[int] = (1,),
    level: Level = "patch",
    limit: int | None = None,
    grid: Grid | None = None,
) -> xr.Dataset:
    """Say which latents follow which: patterns between frames.

    Parameters
    ----------
    store, dictionary, level, limit, grid
        See `over_time`.
    latents
        Numbers of the latents to pair, say the 100 of largest persistence.
    lags
        Distances in frames; 0 is activity together.

    Returns
    -------
    xarray.Dataset
        ``probability`` (source, target, lag): P(target active at t + lag | source active at t);
        ``lift``: over the target's own probability at those frames. NaN where the source, or for
        the lift the target, is never active.

    Raises
    ------
    ValueError
        As `over_time`; a latent or lag that does not exist.
    """
    _check_level(level)
    frames, _, _ = _grid(store, dictionary, grid)
    if bad := [n for n in latents if not 0 <= n < dictionary.latents]:
        raise ValueError(f"no latent {bad[0]}: 0 to {dictionary.latents - 1}")
    if bad := [lag for lag in lags if not 0 <= lag < frames]:
        raise ValueError(f"no lag {bad[0]} in clips of {frames} frames: 0 to {frames - 1}")
    size, chosen = len(latents), torch.tensor(list(latents), dtype=torch.long)
    both = torch.zeros(len(lags), size, size, dtype=torch.float64)
    source, target = torch.zeros(2, len(lags), size, dtype=torch.float64)
    slots = torch.zeros(len(lags), dtype=torch.float64)
    for acts_NTPF in codes(store, dictionary, limit=limit, grid=grid):
        on = _tracks(acts_NTPF[..., chosen], level)
        for i, lag in enumerate(lags):
            early = on[:, : frames - lag].flatten(0, 1)
            late = on[:, lag:].flatten(0, 1)
            both[i] += early.T @ late
            source[i] += early.sum(0)
            target[i] += late.sum(0)
            slots[i] += len(early)
    probability = _divide(both, source[:, :, None])
    lift = _divide(probability, (target / slots[:, None].clamp(min=1))[:, None, :])
    dims = ("lag", "source", "target")
    return xr.Dataset(
        {"probability": (dims, probability.numpy()), "lift": (dims, lift.numpy())},
        coords={"lag": list(lags), "source": list(latents), "target": list(latents)},
        attrs={"site": "+".join(dictionary.config.reads), "level": level},
    ).transpose("source", "target", "lag")


@torch.no_grad()
def codes(
    store: Store, dictionary: Dictionary, *, limit: int | None = None, grid: Grid | None = None
) -> Iterator[Float[Tensor, "n t p f"]]:
    """Yield the latents of a few clips at a time, dense, in the order of the store."""
    frames, height, width = _grid(store, dictionary, grid)
    places = height * width
    positions = np.asarray(store.table()["position"].to_pylist(), dtype=np.int64)[:limit]
    step = max(1, _CHUNK_BYTES // (4 * frames * places * dictionary.latents))
    for start in range(0, len(positions), step):
        cut = positions[start : start + step]
        parts = [store.items(cut, site, "patch") for site in dictionary.config.reads]
        x = np.concatenate([p.astype(np.float32, copy=False) for p in parts], axis=-1)
        acts = dictionary.encode(torch.from_numpy(x).flatten(0, 1).to(dictionary.device))
        yield acts.cpu().reshape(len(cut), frames, places, dictionary.latents)


def _tracks(acts_NTPF: Tensor, level: Level) -> Float[Tensor, "k t f"]:
    """Return 1 where a latent is active, by track."""
    on = (acts_NTPF != 0).float()
    return on.amax(2) if level == "frame" else on.transpose(1, 2).flatten(0, 1)


def _motion(acts_NTPF: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Sum of the steps of each latent's centre [2, F], and how many there are [F]."""
    weight = acts_NTPF.clamp(min=0)
    mass_NTF = weight.sum(2)
    rows = torch.arange(height).repeat_interleave(width).float()
    columns = torch.arange(width).repeat(height).float()
    grid_2P = torch.stack([rows, columns])
    centre = torch.einsum("ntpf,ap->antf", weight, grid_2P) / mass_NTF.clamp(min=1e-12)
    there = (mass_NTF[:, :-1] > 0) & (mass_NTF[:, 1:] > 0)
    step = (centre[:, :, 1:] - centre[:, :, :-1]) * there
    return step.sum((1, 2)).double(), there.sum((0, 1)).double()


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, NaN where b is 0."""
    return torch.where(b > 0, a / b.clamp(min=1e-300), torch.nan)


def _check_level(level: str) -> None:
    if level not in ("patch", "frame"):
        raise ValueError(f"level is 'patch' or 'frame', not {level!r}")


def _grid(store: Store, dictionary: Dictionary, given: Grid | None) -> Grid:
    """Return frames, rows and columns of the clips of a store."""
    check_sites(dictionary, store)
    patch: tuple[int, ...] = given or ()
    for site in dictionary.config.reads:
        if "patch" not in store.kinds(site):
            raise ValueError(
                f"{store.url} holds {', '.join(store.kinds(site))} at {site}, no patches; "
                "harvest with --tokens patch"
            )
        patch = given or store.grid(site).patch
        if len(patch) != 3:
            raise ValueError(
                f"{store.url} holds images at {site} (patches {patch}), and these have no time. "
                "Harvest clips with a video model: actstore harvest --data video:FOLDER ..."
            )
        if store.spec(site, "patch").tokens != int(np.prod(patch)):
            raise ValueError(
                f"{store.url} holds {store.spec(site, 'patch').tokens} patches of an item at "
                f"{site}, {patch} has {int(np.prod(patch))}: tracks need all of them, harvested "
                "without --tokens-per-item"
            )
    frames, height, width = patch
    return frames, height, width
