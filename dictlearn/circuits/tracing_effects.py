"""Interventions on latents: what a graph predicts of them, and what they do.

Four ways to run the model with latents changed, each a pass over one input:

``fixed``
    the replacement model: attention, norms, errors, and which latents are active, held fixed. This
    is what the edges describe, for a change of any size;
``frozen``
    the same, but latents behind the change may switch on and off. Under TopK one that comes in
    puts another out, so that even a small change can have effects by jumps;
``replaced``
    attention patterns and norms live too;
``model``
    the model itself, its own MLPs, with ``change * d_f`` added where the latent writes.

Predictions come from the edges: the direct effect, or the sum over all paths,
``dv = (I - W)^-1 dv_0`` with ``W[t, s] = weights[t, s] / value_s``.

Shapes: T tokens, D channels, F latents, N nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dictlearn.circuits.graph import Graph
from dictlearn.circuits.replacement import Outs, Replacement
from dictlearn.circuits.replacement_parts import Transcoders

if TYPE_CHECKING:
    from vitmodels.taps import Edit

Way = Literal["fixed", "frozen", "replaced", "model"]
Change = tuple[int, int, int]
"""(layer, token, latent)."""


def predict(
    graph: Graph, changes: Mapping[str, float], *, direct: bool = False
) -> Float[np.ndarray, " node"]:
    """Return the change of every node's value that the edges predict.

    Parameters
    ----------
    graph
        Whole, or pruned (then only what its edges carry).
    changes
        Node id -> change of its value; for patches, positions and errors in units of the whole
        node (-1 takes it away).
    direct
        Only the effect along single edges.

    Raises
    ------
    KeyError
        No such node.
    ValueError
        A logit, or a latent of value 0.
    """
    value = np.array([node.value for node in graph.nodes])
    start = np.zeros(len(value))
    for id, change in changes.items():
        number = graph.number(id)
        if graph.nodes[number].kind == "logit":
            raise ValueError(f"{id} is a logit; change what comes before it")
        start[number] = change
    safe = np.where(value == 0, 1.0, value)
    source = [i for i, node in enumerate(graph.nodes) if node.kind != "logit"]
    total, now = start.copy(), start
    while now[source].any():
        now[value == 0] = 0
        now = graph.weights[:, source].astype(np.float64) @ (now[source] / safe[source])
        total = total + now
        if direct:
            break
    return total


def measure(
    replacement: Replacement,
    changes: Mapping[Change, float],
    *,
    way: Way = "fixed",
    sites: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Run with activations of latents changed, and return the change of what follows.

    Parameters
    ----------
    replacement
        The model on one input.
    changes
        (layer, token, latent) -> what is added to its activation.
    way
        See the module.
    sites
        Sites to return the change of, as the model names them; besides, ``latents.L`` [T, F] is
        the change of the activations of layer L. By default the readout sites.

    Returns
    -------
    dict[str, Tensor]
        Site -> value with the changes minus value without, no batch.

    Raises
    ------
    ValueError
        A change of a latent that does not exist, an unknown way.
    """
    if way not in get_args(Way):
        raise ValueError(f"way is one of {', '.join(get_args(Way))}, not {way!r}")
    _check_changes(replacement, changes)
    sites = list(replacement.values) if sites is None else list(sites)
    added = _added(replacement, changes)
    with torch.no_grad():
        with_changes = _run(replacement, added, changes, way, sites)
        without = _run(replacement, {}, {}, way, sites)
    return {name: with_changes[name] - without[name] for name in with_changes}


def _check_changes(replacement: Replacement, changes: Mapping[Change, float]) -> None:
    for layer, token, latent in changes:
        if not (
            0 <= layer < replacement.n_layers
            and 0 <= token < len(replacement.embed)
            and 0 <= latent < replacement.parts.dictionaries[layer].latents
        ):
            raise ValueError(
                f"no latent (layer {layer}, token {token}, latent {latent}): there are "
                f"{replacement.n_layers} layers, {len(replacement.embed)} tokens and "
                f"{[d.latents for d in replacement.parts.dictionaries]} latents"
            )


def _added(replacement: Replacement, changes: Mapping[Change, float]) -> dict[int, Tensor]:
    """Return what the changes add to the output of each MLP, [T, D] by layer."""
    added: dict[int, Tensor] = {}
    for (layer, token, latent), change in changes.items():
        code = replacement.codes[layer]
        at = torch.tensor([token], device=replacement.embed.device)
        which = torch.tensor([latent], device=replacement.embed.device)
        for write in code.writes:
            row_D = code.decoder_rows(write, at, which)[0]
            made = added.setdefault(write, torch.zeros_like(replacement.embed))
            made[token] += change * row_D
    return added


def _run(
    replacement: Replacement,
    added: Mapping[int, Tensor],
    changes: Mapping[Change, float],
    way: Way,
    sites: Sequence[str],
) -> dict[str, Tensor]:
    r = replacement
    reads = [f"blocks.{layer}.mlp_in" for layer in range(r.n_layers)]
    asked = list(dict.fromkeys([*reads, *sites]))
    active: list[Tensor | None] = [None] * r.n_layers
    if way == "fixed":
        active = [_active(r, layer) for layer in range(r.n_layers)]
    if way == "model":
        edits = {f"blocks.{layer}.mlp_out": _shift(value) for layer, value in added.items()}
        with r.model.editing(edits):
            got = r.model.run(r.x, sites=asked)
    else:
        outs = _live(r, added, active)
        got = (
            r.live_pass(1, outs, asked)
            if way == "replaced"
            else r.frozen_pass(r.embed[None], outs, asked)
        )
    out = {name: value[0].clone() for name, value in got.items() if name in sites}
    for layer, site in enumerate(reads):
        acts_TF = r.codes[layer].activations(got[site], active[layer])[0]
        for (at, token, latent), change in changes.items():
            if at == layer:
                acts_TF[token, latent] += change
        out[f"latents.{layer}"] = acts_TF
    return out


def _shift(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda old: old + value


def _active(r: Replacement, layer: int) -> Tensor:
    """Mask [T, F] of the latents that are active on the input."""
    e = r.entries[layer]
    latents = r.parts.dictionaries[layer].latents
    mask = torch.zeros(len(r.embed), latents, dtype=torch.bool, device=r.embed.device)
    mask[e.token, e.latent] = True
    return mask


def _live(r: Replacement, added: Mapping[int, Tensor], active: Sequence[Tensor | None]) -> Outs:
    """MLP outputs by the transcoders on what they read now, with the fixed errors and changes."""

    def give(layer: int, seen: list[Tensor]) -> Tensor:
        made = r.error[layer].expand_as(seen[layer])
        for source in range(layer + 1):
            code = r.codes[source]
            if layer in code.writes:
                acts = code.activations(seen[source], active[source])
                made = made + code.output(layer, acts, seen[source])
        return made + added[layer] if layer in added else made

    return give


def ablation(parts: Transcoders, latents: Mapping[int, Sequence[int]]) -> dict[str, Edit]:
    """Return edits of the model itself that take latents away, for any batch.

    Each latent is read off its layer's ``mlp_in`` as the pass goes, and ``a_f d_f`` is taken out of
    the ``mlp_out`` that it writes; MLPs, attention and norms are the model's own::

        with model.editing(ablation(parts, {2: [17, 40], 3: [5]})): logits = model(x)

    Parameters
    ----------
    parts
        See `dictlearn.circuits.replacement_parts.transcoders`.
    latents
        Layer -> latents.
    """
    removed: dict[int, Tensor] = {}
    edits: dict[str, Edit] = {}
    chosen = {layer: sorted(set(numbers)) for layer, numbers in latents.items() if len(numbers)}
    for layer, numbers in chosen.items():
        if not 0 <= layer < len(parts.dictionaries):
            raise ValueError(f"no layer {layer}: there are {len(parts.dictionaries)}")
        if bad := [n for n in numbers if not 0 <= n < parts.dictionaries[layer].latents]:
            raise ValueError(
                f"no latent {bad[0]} at layer {layer}: 0 to {parts.dictionaries[layer].latents - 1}"
            )
        edits[f"blocks.{layer}.mlp_in"] = _read_latents(parts, layer, numbers, removed)
    written = {write for layer in chosen for write in parts.writes(layer)}
    for write in sorted(written):
        edits[f"blocks.{write}.mlp_out"] = _take_out(parts, write, chosen, removed)
    return edits


def _read_latents(
    parts: Transcoders, layer: int, numbers: Sequence[int], removed: dict[int, Tensor]
) -> Edit:
    dictionary = parts.dictionaries[layer]
    others = torch.ones(dictionary.latents, dtype=torch.bool, device=dictionary.device)
    others[torch.tensor(list(numbers), device=dictionary.device)] = False

    def read(value: Tensor) -> Tensor:
        x = value.reshape(-1, value.shape[-1])
        with torch.no_grad():
            acts = dictionary.encode(x)
            without = dictionary.decode(acts.masked_fill(~others, 0.0), x)
            removed[layer] = (dictionary.decode(acts, x) - without).reshape(*value.shape[:-1], -1)
        return value

    return read


def _take_out(
    parts: Transcoders, write: int, chosen: Mapping[int, Sequence[int]], removed: dict[int, Tensor]
) -> Edit:
    cuts = {}
    for layer in chosen:
        start = 0
        for target, width in zip(
            parts.writes(layer), parts.dictionaries[layer].config.writes.values(), strict=True
        ):
            if target == write:
                cuts[layer] = slice(start, start + width)
            start += width

    def edit(value: Tensor) -> Tensor:
        for layer, cut in cuts.items():
            value = value - removed[layer][..., cut]
        return value

    return edit
