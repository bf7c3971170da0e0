"""Parts of a logit by latent: a site's value as latents, constant terms and error.

::

    value = sum over f of  act_f * scale_f * W_dec[f] * factor   latents
          + everything else that the dictionary puts out          code_bias
          + value - output                                        error

Shape legend: N tokens of the batch, B items, T tokens, C classes, F latents, w width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from dictlearn.circuits.stacked import Batch
from dictlearn.circuits.steering import check_dictionary, output_factor, tokens_of
from dictlearn.dictionary import Dictionary
from dictlearn.sparsify import Entries
from vitmodels.model import VisionModel
from vitmodels.spec import SiteInfo


@dataclass(frozen=True, kw_only=True)
class Coded:
    """A dictionary's code of one batch."""

    dictionary: Dictionary
    entries: Entries
    """Active latents of every token, N = B x T of them."""
    weight: Tensor
    """Of every active latent: activation * scale * factor ``[entries]``."""
    outputs: dict[str, Tensor]
    """Site written -> output ``[B, T, w]``."""
    infos: dict[str, SiteInfo]


def coded(model: VisionModel, x: Batch, dictionary: Dictionary) -> Coded:
    """Encode the tokens of a batch.

    Raises
    ------
    ValueError
        The dictionary does not fit the model.
    """
    infos = check_dictionary(model, dictionary)
    config = dictionary.config
    with torch.no_grad():
        found = model.run(x, list(config.reads))
        taken = [tokens_of(found[site], infos[site]).float() for site in config.reads]
        items, tokens = taken[0].shape[:2]
        x_Nr = torch.cat([t.flatten(0, 1) for t in taken], dim=1)
        entries = dictionary.encode_entries(x_Nr)
        out = dictionary.split(dictionary.decode_entries(entries, x_Nr))
        weight = entries.value
        if config.decode_scale:
            weight = weight * dictionary.scale[entries.latent]
        factor_N1 = output_factor(dictionary, x_Nr)
        if factor_N1 is not None:
            weight = weight * factor_N1[entries.row, 0]
    return Coded(
        dictionary=dictionary,
        entries=entries,
        weight=weight,
        outputs={site: value.view(items, tokens, -1) for site, value in out.items()},
        infos=infos,
    )


def latent_parts(
    codes: Sequence[Coded], grad: Mapping[str, Tensor | None], values: Mapping[str, Tensor]
) -> dict[str, xr.DataArray]:
    """Return ``latents`` [dictionary, item, class, latent], ``code_bias`` and ``error`` [.., site].

    Parameters
    ----------
    codes
        Of every dictionary.
    grad
        Site -> gradient of the logits ``[C, B, *shape]``; None where the site has no effect.
    values
        Site -> value ``[B, *shape]``.
    """
    sites = [s for s in dict.fromkeys(s for c in codes for s in c.outputs) if grad[s] is not None]
    if not sites:
        raise ValueError(
            "no site that the dictionaries write has a direct path to the logits: a dictionary "
            "further up the stream replaces them"
        )
    width = max(code.dictionary.latents for code in codes)
    latent, bias, error = [], [], []
    for code in codes:
        parts = [
            _of_site(code, site, _tokens(grad[site], code.infos[site]))
            for site in sites
            if site in code.outputs
        ]
        dense = torch.stack(parts).sum(0)
        latent.append(torch.nn.functional.pad(dense, (0, width - dense.shape[-1])))
    for site in sites:
        grad_CBTw = _tokens(grad[site], _info(codes, site))
        mine = [code for code in codes if site in code.outputs]
        output = torch.stack([code.outputs[site] for code in mine]).sum(0).double()
        coded_CB = torch.stack([_of_site(code, site, grad_CBTw).sum(-1) for code in mine]).sum(0)
        value = tokens_of(values[site].detach(), _info(codes, site)).double()
        bias.append((grad_CBTw * output).sum((-2, -1)) - coded_CB)
        error.append((grad_CBTw * (value - output)).sum((-2, -1)))
    names = [next(iter(code.dictionary.config.reads)) for code in codes]
    dims = ("class", "item")
    return {
        "latents": xr.DataArray(
            _array(latent), dims=("dictionary", *dims, "latent"), coords={"dictionary": names}
        ),
        "code_bias": xr.DataArray(_array(bias), dims=("site", *dims), coords={"site": sites}),
        "error": xr.DataArray(_array(error), dims=("site", *dims), coords={"site": sites}),
    }


def _info(codes: Sequence[Coded], site: str) -> SiteInfo:
    return next(code.infos[site] for code in codes if site in code.infos)


def _tokens(grad: Tensor | None, info: SiteInfo) -> Tensor:
    """``[C, B, *shape]`` as ``[C, B, T, w]``."""
    if grad is None:
        raise ValueError(f"site {info.name} has no path to the logits")
    rows = tokens_of(grad.flatten(0, 1), info)
    return rows.reshape(*grad.shape[:2], *rows.shape[1:]).double()


def _of_site(code: Coded, site: str, grad_CBTw: Tensor) -> Tensor:
    """Parts of the latents ``[C, B, F]`` through one site."""
    start = 0
    for name, width in code.dictionary.config.writes.items():
        if name == site:
            break
        start += width
    rows_fw = code.dictionary.W_dec.detach()[:, start : start + grad_CBTw.shape[-1]].double()
    classes, items, tokens = grad_CBTw.shape[:3]
    flat_CNw = grad_CBTw.flatten(1, 2)
    latents = code.dictionary.latents
    result = grad_CBTw.new_zeros(classes, items * latents)
    row, latent = code.entries.row, code.entries.latent
    cell = row // tokens * latents + latent
    for c in range(classes):
        for some in torch.split(torch.arange(len(row), device=row.device), 65536):
            product = (flat_CNw[c, row[some]] * rows_fw[latent[some]]).sum(-1)
            result[c].index_add_(0, cell[some], product * code.weight[some].double())
    return result.view(classes, items, latents)


def _array(values: Sequence[Tensor]) -> np.ndarray:
    array: np.ndarray = torch.stack(list(values)).cpu().numpy()
    return array
