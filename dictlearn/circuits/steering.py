"""Steering by latents and clamping them: edits for ``model.editing``.

::

    steer    y' = y + amount * scale_f * W_dec[f]
    clamp    y' = y + decode(f with some latents set) - decode(f)

so a clamp keeps the error term: what the dictionary does not explain stays as it was, and a clamp
to the value that a latent has changes nothing. Templeton et al. 2024, "Scaling monosemanticity".

Shape legend: N tokens, F latents, r width read, w width written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dictlearn.circuits.places import token_numbers
from dictlearn.dictionary import Dictionary
from vitmodels.model import VisionModel
from vitmodels.spec import SiteInfo, expand_sites
from vitmodels.taps import Edit

if TYPE_CHECKING:
    from actstore.store import Store

Where = str | int | Sequence[int] | None
"""Tokens: a kind, a number, numbers, or None for all."""


def load_for(model: VisionModel, path: str | Path, store: Store | None = None) -> Dictionary:
    """Load a dictionary of the native format that was trained on this model (and store).

    Raises
    ------
    ValueError
        It was trained on another model or store (the fields that differ are named), or does not
        fit the model's sites.
    """
    from dictlearn.formats.native import describe, load

    about = describe(path).get("about", {})
    there, here = about.get("model") or {}, model.spec.to_json()
    fields = [k for k in ("id", "weights", "revision", "d_model") if k in there]
    if differing := [k for k in fields if there[k] != here[k]]:
        lines = [f"  {key}: {there[key]!r} -> {here[key]!r}" for key in differing]
        raise ValueError(
            f"the dictionary at {path} was trained on another model (there -> here):\n"
            + "\n".join(lines)
            + "\nload that model by vitmodels.load(id), or take a dictionary of this one"
        )
    if store is not None and about.get("store") not in (None, store.fingerprint):
        raise ValueError(
            f"the dictionary at {path} was trained on a store with fingerprint "
            f"{about['store']}, not on {store.url} ({store.fingerprint}); pass its own store"
        )
    dictionary = load(path, model.device)
    check_dictionary(model, dictionary)
    return dictionary


def check_dictionary(model: VisionModel, dictionary: Dictionary) -> dict[str, SiteInfo]:
    """Return the sites of a dictionary, after checking that the model has them in these widths.

    Raises
    ------
    ValueError
        A site is absent (the nearest is named), or of another width.
    """
    config = dictionary.config
    infos = model.sites()
    for site, width in {**config.reads, **config.writes}.items():
        expand_sites(site, model.anatomy.taps)
        if infos[site].width != width:
            raise ValueError(
                f"the dictionary takes {width} channels at {site}, {model.spec.id} has "
                f"{infos[site].width} there: it was trained on another model"
            )
    return {site: infos[site] for site in {**config.reads, **config.writes}}


def tokens_of(value: Tensor, info: SiteInfo, where: Where = None) -> Tensor:
    """Return the tokens of a site's value as ``[items, tokens, channels]``."""
    axis = info.token_axis
    if axis is None:
        return value.reshape(len(value), 1, -1)
    rows = value.movedim(axis + 1, 1)
    return (rows if where is None else rows[:, list(token_numbers(info, where))]).flatten(2)


def _added(info: SiteInfo, where: Where, delta: Callable[[], Tensor]) -> Edit:
    """Edit that adds ``[items, tokens, channels]`` (or broadcasting to it) to some tokens."""

    def edit(value: Tensor) -> Tensor:
        new = delta().to(value)
        axis = info.token_axis
        if axis is None:
            return value + new.expand(len(value), 1, info.width).reshape(value.shape)
        rows = value.movedim(axis + 1, 1)
        index = list(range(rows.shape[1])) if where is None else list(token_numbers(info, where))
        rest = rows.shape[2:]
        shape = (len(value), len(index), info.width)
        rows = rows.index_add(
            1,
            torch.tensor(index, device=value.device),
            new.expand(shape).reshape(*shape[:2], *rest),
        )
        return rows.movedim(1, axis + 1)

    return edit


def steer(
    model: VisionModel,
    dictionary: Dictionary,
    amounts: Mapping[int, float],
    *,
    positions: Where = None,
) -> dict[str, Edit]:
    """Return edits that add decoder directions at the sites a dictionary writes.

    Parameters
    ----------
    model, dictionary
        Of one another.
    amounts
        Latent -> how much of it to add, in units of its activation.
    positions
        Tokens to steer.

    Returns
    -------
    dict
        For ``model.editing``.
    """
    infos = check_dictionary(model, dictionary)
    index_f, amount_f = _latents(dictionary, amounts)
    with torch.no_grad():
        out_w = (amount_f * _scale(dictionary, index_f)) @ dictionary.W_dec[index_f]
    parts = dictionary.split(out_w[None])
    return {
        site: _added(infos[site], positions, lambda part=part: part)  # type: ignore[misc]
        for site, part in parts.items()
    }


def clamp(
    model: VisionModel,
    dictionary: Dictionary,
    values: Mapping[int, float],
    *,
    positions: Where = None,
    reads: Mapping[str, Tensor] | None = None,
) -> dict[str, Edit]:
    """Return edits that hold latents at given activations, the error term kept.

    Parameters
    ----------
    model, dictionary
        Of one another.
    values
        Latent -> activation; 0 ablates it.
    positions
        Tokens to clamp.
    reads
        Values of the sites read, of a plain run of the same items. Needed where a site that is
        read comes behind one that is written (crosscoders).

    Returns
    -------
    dict
        For ``model.editing``.

    Raises
    ------
    ValueError
        A site read comes behind one written and there are no `reads`.
    """
    infos = check_dictionary(model, dictionary)
    config = dictionary.config
    order = list(model.anatomy.taps)
    first = min(order.index(site) for site in config.writes)
    late = [site for site in config.reads if order.index(site) > first]
    if late and reads is None:
        raise ValueError(
            f"the dictionary reads {late[0]} behind {order[first]}, which it writes; give the "
            "values of a plain run: reads=model.run(x, list(dictionary.config.reads))"
        )
    index_f, value_f = _latents(dictionary, values)
    seen: dict[str, Tensor] = dict(reads or {})
    delta: dict[str, Tensor] = {}

    def compute() -> dict[str, Tensor]:
        taken = [tokens_of(seen[s], infos[s], positions) for s in config.reads]
        shape = taken[0].shape[:2]
        x_Nr = torch.cat([t.reshape(-1, t.shape[-1]) for t in taken], dim=1)
        acts_Nf = dictionary.encode(x_Nr.float())[:, index_f]
        change_Nf = (value_f - acts_Nf) * _scale(dictionary, index_f)
        y_Nw = change_Nf @ dictionary.W_dec[index_f]
        factor_N1 = output_factor(dictionary, x_Nr.float())
        y_Nw = y_Nw if factor_N1 is None else y_Nw * factor_N1
        return {s: v.view(*shape, -1) for s, v in dictionary.split(y_Nw).items()}

    def taking(site: str) -> Edit:
        def edit(value: Tensor) -> Tensor:
            seen[site] = value
            delta.clear()
            return value

        return edit

    def giving(site: str) -> Edit:
        def ready() -> Tensor:
            if not delta:
                delta.update(compute())
            return delta[site]

        return _added(infos[site], positions, ready)

    edits: dict[str, Edit] = {}
    if reads is None:
        edits = {site: taking(site) for site in config.reads}
    for site in config.writes:
        give, take = giving(site), edits.get(site)
        edits[site] = give if take is None else (lambda v, t=take, g=give: g(t(v)))  # type: ignore[misc]
    return edits


def output_factor(dictionary: Dictionary, x_Nr: Tensor) -> Tensor | None:
    """Return what decoded values are multiplied by to undo the input's norm ``[N, 1]``, or None."""
    options = dictionary.config.input
    if options.norm == "none" or not options.denormalize:
        return None
    return dictionary.normalize(x_Nr)[2]


def _latents(dictionary: Dictionary, values: Mapping[int, float]) -> tuple[Tensor, Tensor]:
    if not values:
        raise ValueError("no latent was given: pass {latent: value}")
    if bad := [f for f in values if not 0 <= f < dictionary.latents]:
        raise ValueError(f"there is no latent {bad[0]}: the dictionary has {dictionary.latents}")
    device = dictionary.device
    index_f = torch.tensor(list(values), device=device)
    return index_f, torch.tensor(list(values.values()), dtype=torch.float32, device=device)


def _scale(dictionary: Dictionary, index_f: Tensor) -> Tensor:
    if not dictionary.config.decode_scale:
        return torch.ones_like(index_f, dtype=dictionary.W_dec.dtype)
    return dictionary.scale[index_f]
