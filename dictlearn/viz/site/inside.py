"""What the model does on one item: attention, logits by layer, the effect of a reconstruction.

Computed when the site is built, for the few items that have a page of their own.

Shapes: L layers, H heads, Q queries, K keys, T tokens, t tokens of the dictionary's kinds,
d channels, C classes, F latents, w width written.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dictlearn.dictionary import Dictionary
from dictlearn.viz.site.shards import pack, short
from vitmodels.spec import SiteInfo

log = logging.getLogger(__name__)

LEVELS = 31
"""Steps in which attention is kept: ``round(31 sqrt(p / largest of the row))``."""

MAX_PATTERN = 16 << 20
"""Values of one layer's attention pattern above which it is left out (clips of many tokens)."""

CLASSES = 5
"""Classes listed of a prediction."""


class Inside:
    """Runs one model, item by item.

    Parameters
    ----------
    model
        The model of the store.
    dictionaries
        Dictionary and the token kinds it is spliced in for, by folder name of the site.
    """

    def __init__(
        self, model: Any, dictionaries: Mapping[str, tuple[Dictionary, Sequence[str]]]
    ) -> None:
        self.model, self.dictionaries = model, dictionaries
        self.infos: dict[str, SiteInfo] = model.sites()
        self.has_head = "logits" in self.infos and not model.anatomy.vocabulary
        self.stream = self._stream()
        self.patterns = self._patterns()

    @property
    def classes(self) -> int:
        """C, 0 without a head."""
        return int(np.prod(self.infos["logits"].shape)) if self.has_head else 0

    def _stream(self) -> dict[int, str]:
        """Residual stream by layer, of those layers that look like the last."""
        found = {
            int(m[1]): name
            for name in self.infos
            if (m := re.fullmatch(r"blocks\.(\d+)\.resid_post", name))
        }
        if not found or self.infos[found[max(found)]].reason:
            return {}
        shape = self.infos[found[max(found)]].shape
        return {n: found[n] for n in sorted(found) if self.infos[found[n]].shape == shape}

    def _patterns(self) -> dict[int, str]:
        """Attention by layer, where queries and keys are the tokens of the grid."""
        found = {}
        for name, info in self.infos.items():
            match = re.fullmatch(r"blocks\.(\d+)\.pattern", name)
            if match is None or info.axes != ("head", "query", "key"):
                continue
            square = info.shape[1] == info.shape[2] == self.model.spec.grid.n_tokens
            if square and int(np.prod(info.shape)) <= MAX_PATTERN:
                found[int(match[1])] = name
        return found

    def without_attention(self) -> str:
        """Return why there is no attention to show; empty when there is."""
        if self.patterns:
            return ""
        if not any(name.endswith(".pattern") for name in self.infos):
            return f"{self.model.spec.id} has no site for its attention pattern"
        return "its attention is not one square pattern over all tokens, or too large to keep"

    @torch.no_grad()
    def item(self, x: Tensor) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        """Return what the page of one item says, and the packed attention by layer."""
        reads = [s for d, _ in self.dictionaries.values() for s in d.config.reads]
        sites = [*reads, *self.stream.values(), *self.patterns.values()]
        sites += ["logits"] if self.has_head else []
        batch = x[None]
        read = self.model.run(batch, sites=list(dict.fromkeys(sites)), stop_early=False)
        out = read["logits"] if self.has_head else self.model(batch)
        clean = out.float().flatten()
        page: dict[str, Any] = {"effect": {}}
        if self.has_head:
            page["clean"] = prediction(clean)
            page["lens"] = self._lens(batch, read)
        for name, (dictionary, kinds) in self.dictionaries.items():
            page["effect"][name] = self._effect(batch, read, clean, dictionary, kinds)
        attention = {n: quantise(read[site][0]) for n, site in self.patterns.items()}
        return page, attention

    def _lens(self, batch: Tensor, read: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """Logits when the residual stream of each layer takes the place of the last one's."""
        if not self.stream:
            return []
        stacked = torch.cat([read[site] for site in self.stream.values()])
        last = self.stream[max(self.stream)]
        with self.model.editing({last: lambda value: stacked.to(value)}):
            logits_LC = self.model(batch.expand(len(stacked), *batch.shape[1:])).float()
        return [
            {"layer": layer, **prediction(row)}
            for layer, row in zip(self.stream, logits_LC.flatten(1), strict=True)
        ]

    def _effect(
        self,
        batch: Tensor,
        read: Mapping[str, Tensor],
        clean: Tensor,
        dictionary: Dictionary,
        kinds: Sequence[str],
    ) -> dict[str, Any]:
        """Say what the model predicts with the dictionary's output at the sites it writes."""
        config = dictionary.config
        for site in config.writes:
            if self.infos[site].reason:
                return {"reason": f"{site} is read-only: {self.infos[site].reason}"}
        taken = [take(read[s], self.infos[s], kinds).float() for s in config.reads]
        x_Br = torch.cat([v.flatten(0, 1) for v in taken], dim=1)
        y = dictionary.split(dictionary.decode_entries(dictionary.encode_entries(x_Br), x_Br))
        with self.model.editing({s: put(self.infos[s], kinds, v) for s, v in y.items()}):
            spliced = self.model(batch).float().flatten()
        if self.has_head:
            p, q = clean.log_softmax(0), spliced.log_softmax(0)
            return {**prediction(spliced), "kl": short(float((p.exp() * (p - q)).sum()))}
        return {
            "cosine": short(float(F.cosine_similarity(clean, spliced, dim=0)), 5),
            "distance": short(float((clean - spliced).norm() / clean.norm().clamp_min(1e-12))),
        }

    def logit_effects(
        self, dictionary: Dictionary, inputs: Sequence[Tensor]
    ) -> tuple[Float[np.ndarray, "f c"] | None, str]:
        """Return what a unit of each latent adds to every logit, and why not where it is None.

        The direct path: ``W_dec @ J.T`` with J [C, d] the gradient of the logits for a shift of
        all tokens of the last residual stream, mean over some inputs; less the mean over classes,
        which the softmax does not see.
        """
        if not self.has_head:
            return None, f"{self.model.spec.id} has no classification head"
        writes = list(dictionary.config.writes)
        width = self.infos[self.stream[max(self.stream)]].shape[-1] if self.stream else -1
        adds = re.compile(r"blocks\.\d+\.(resid_\w+|mlp_out|attn_out)|embed")
        if len(writes) != 1 or not adds.fullmatch(writes[0]):
            return None, "it does not write to one place of the residual stream"
        if dictionary.config.writes[writes[0]] != width or not inputs:
            return None, "the width it writes is not that of the last residual stream"
        shift = torch.zeros(width, device=self.model.device, requires_grad=True)
        last = self.stream[max(self.stream)]
        with torch.enable_grad(), self.model.editing({last: lambda a: a.detach() + shift.to(a)}):
            logits_C = self.model(torch.stack(list(inputs))).float().flatten(1).mean(0)
        rows = [torch.autograd.grad(c, shift, retain_graph=True)[0] for c in logits_C]
        with torch.no_grad():
            effect_FC = dictionary.W_dec.detach().float() @ torch.stack(rows).T.to(
                dictionary.device
            )
            if dictionary.config.decode_scale:
                effect_FC *= dictionary.scale[:, None]
            effect_FC -= effect_FC.mean(1, keepdim=True)
        return effect_FC.cpu().numpy(), ""


def prediction(logits_C: Tensor) -> dict[str, Any]:
    """Return the likeliest classes: [class, probability, logit], likeliest first."""
    best = logits_C.topk(min(CLASSES, len(logits_C)))
    p = logits_C.softmax(0)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return {"classes": [[c, short(float(p[c])), short(value)] for c, value in rows]}


def quantise(pattern_HQK: Float[Tensor, "h q k"]) -> dict[str, Any]:
    """Pack an attention pattern: `LEVELS` steps of the square root, relative to each row's top."""
    top_HQ1 = pattern_HQK.amax(-1, keepdim=True).clamp_min(1e-12)
    codes = (LEVELS * (pattern_HQK.clamp_min(0) / top_HQ1).sqrt()).round().to(torch.uint8)
    top = (top_HQ1.clamp(max=1) * 65534).round().to(torch.int32)
    return {
        "shape": list(pattern_HQK.shape),
        "levels": LEVELS,
        "data": pack(codes.cpu().numpy()),
        "top": pack(top.cpu().numpy().astype(np.uint16)),
    }


def take(value: Tensor, info: SiteInfo, kinds: Sequence[str]) -> Tensor:
    """Tokens of some kinds as [N, t, d], laid out as a store does."""
    axis = info.token_axis
    if axis is None:
        return value.reshape(len(value), 1, -1)
    return value.movedim(axis + 1, 1)[:, _index(info, kinds).to(value.device)].flatten(2)


def put(info: SiteInfo, kinds: Sequence[str], new_Bw: Tensor) -> Callable[[Tensor], Tensor]:
    """Inverse of `take` for one item, as an edit: the other tokens keep their values."""

    def edit(value: Tensor) -> Tensor:
        fitting = new_Bw.to(value)
        axis = info.token_axis
        if axis is None:
            return fitting.view(value.shape)
        rows = value.movedim(axis + 1, 1)
        rows[:, _index(info, kinds).to(value.device)] = fitting.reshape(1, -1, *rows.shape[2:])
        return value

    return edit


def _index(info: SiteInfo, kinds: Sequence[str]) -> Tensor:
    cuts = [info.grid.slice(k) for k in kinds] if info.grid is not None else []
    return torch.cat([torch.arange(cut.start, cut.stop) for cut in cuts])
