"""What the scores of attention are measured by: weights over (query, key), distances, analogies.

Shape legend: B items, Q queries, K keys, N patches.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitmodels.spec import TokenGrid


def coordinates(grid: TokenGrid) -> Int[Tensor, "patches axes"]:
    """(time,) row and column of every patch."""
    axes = [torch.arange(n) for n in grid.patch]
    return torch.cartesian_prod(*axes).reshape(-1, len(grid.patch))


def masks(grid: TokenGrid) -> dict[str, Float[Tensor, "query key"]]:
    """Return weights by score: their product with a pattern, summed, is the score.

    Each is 1 / (number of queries that count) at the keys that count, 0 elsewhere; scores without
    such queries or keys are left out.
    """
    place_NA = coordinates(grid)
    patches = grid.slice("patch")
    if not grid.count("patch"):
        return {}
    found: dict[str, Bool[Tensor, "patches keys"]] = {}
    for kind in ("cls", "register"):
        keys = torch.zeros(grid.n_tokens, dtype=torch.bool)
        keys[grid.slice(kind)] = True
        found[kind] = keys.expand(len(place_NA), -1)
    row, column = place_NA[:, -2], place_NA[:, -1]
    height, width = grid.patch[-2:]
    top, side = (row == 0) | (row == height - 1), (column == 0) | (column == width - 1)
    found["corner"] = _among_patches(grid, (top & side).expand(len(row), -1))
    found["edge"] = _among_patches(grid, (top | side).expand(len(row), -1))
    offset_NNA = place_NA[None] - place_NA[:, None]
    steps = {
        "itself": (0, 0, 0),
        "left": (0, 0, -1),
        "right": (0, 0, 1),
        "above": (0, -1, 0),
        "below": (0, 1, 0),
    }
    if len(grid.patch) == 3:
        steps |= {"previous_frame": (-1, 0, 0), "next_frame": (1, 0, 0)}
        found["same_frame"] = _among_patches(grid, offset_NNA[..., 0] == 0)
    for name, step in steps.items():
        wanted = torch.tensor(step[-len(grid.patch) :])
        found[name] = _among_patches(grid, (offset_NNA == wanted).all(-1))
    result = {}
    for name, keys_NK in found.items():
        queries = keys_NK.any(-1)
        if bool(queries.any()):
            weight_QK = torch.zeros(grid.n_tokens, grid.n_tokens)
            weight_QK[patches] = keys_NK.float() / queries.sum()
            result[name] = weight_QK
    return result


def patch_distances(grid: TokenGrid) -> dict[str, Float[Tensor, "patches patches"]]:
    """Return distances between patches: in space, and for clips in time, in patches."""
    place_NA = coordinates(grid).float()
    space_N2 = place_NA[:, -2:]
    found = {"distance": (space_N2[:, None] - space_N2[None]).square().sum(-1).sqrt()}
    if len(grid.patch) == 3:
        found["time_distance"] = (place_NA[:, None, 0] - place_NA[None, :, 0]).abs()
    return found


def successors(
    content_BNd: Float[Tensor, "items patches d"], grid: TokenGrid
) -> tuple[Int[Tensor, "items patches"], Bool[Tensor, "patches patches"]]:
    """Return what followed the patch most like each patch, in the frames before.

    Returns
    -------
    tuple
        The place after the most similar earlier patch ``[B, N]`` (0 where there is none); and
        the places that this could have been ``[N, N]``, none for the first two frames.
    """
    time_N = coordinates(grid)[:, 0]
    frame = math.prod(grid.patch[1:])
    # A key may be matched two frames back or further: what followed it is then before the query.
    earlier_NN = time_N[None] <= time_N[:, None] - 2
    unit_BNd = F.normalize(content_BNd.float().cpu(), dim=-1)
    alike_BNN = unit_BNd @ unit_BNd.transpose(1, 2)
    best_BN = alike_BNN.masked_fill(~earlier_NN, -math.inf).argmax(-1)
    allowed_NN = torch.zeros_like(earlier_NN)
    allowed_NN[:, frame:] = earlier_NN[:, :-frame] if len(time_N) > frame else False
    target_BN = torch.where(earlier_NN.any(-1), best_BN + frame, 0)
    return target_BN, allowed_NN


def _among_patches(
    grid: TokenGrid, keys_NN: Bool[Tensor, "patches patches"]
) -> Bool[Tensor, "patches keys"]:
    """Return the same over all keys."""
    before = grid.slice("patch").start
    after = grid.n_tokens - grid.slice("patch").stop
    return F.pad(keys_NN, (before, after), value=False)
