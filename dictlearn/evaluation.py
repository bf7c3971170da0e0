"""Evaluate a dictionary on a store, one pass, bounded memory.

Shapes: B tokens, F latents, r = width read, w = width written, T token numbers of the site.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from actstore.reader import sequential
from actstore.selection import Split
from dictlearn.dictionary import Dictionary
from dictlearn.report import DENSITY_EDGES, Report, Substitution
from dictlearn.scaling import check_sites

if TYPE_CHECKING:
    from actstore.store import Store
    from dictlearn.heads import Head

log = logging.getLogger(__name__)

_CHUNK_BYTES = 24 << 20


def evaluate(
    dictionary: Dictionary,
    store: Store,
    *,
    tokens: str | None = None,
    items: Split | np.ndarray | None = None,
    batch_size: int = 4096,
    limit: int | None = None,
    model: Any = None,
    heads: Sequence[Head] | None = None,
    data: Any = None,
    images: int | None = 1000,
    device: str | torch.device = "cpu",
    about: Mapping[str, Any] | None = None,
    on_event: Callable[[int, int], None] | None = None,
) -> Report:
    """Stream a store through a dictionary and report sparsity and reconstruction.

    Parameters
    ----------
    dictionary
        In raw units, as `train` leaves it or `load` returns it.
    store
        Holds the sites read and written.
    tokens
        Token kinds, ``cls,patch``; every kind stored by default.
    items
        Which items; for those held out in training
        ``Split(half="validation", holdout=..., seed=config.split_seed)``.
    batch_size
        Tokens at a time.
    limit
        Stop after about so many tokens.
    model
        A `vitmodels.VisionModel`, or True to load the one the manifest names: adds the
        substitution loss.
    heads
        What turns the model's values into logits: `dictlearn.heads`; its own head by default.
    data
        The images; those of the manifest by default.
    images
        How many images the substitution loss is measured on; None for all.
    device
        Where to compute.
    about
        Kept in the report.
    on_event
        Called with (tokens done, tokens in all).

    Raises
    ------
    KeyError, ValueError
        Sites or widths do not fit, or the model or data is not the store's.
    """
    check_sites(dictionary, store)
    sites = dictionary.config.sites
    kinds = _kinds(store, sites, tokens)
    dictionary.to(device)
    tally = _Tally(dictionary, store, kinds)
    options: dict[str, Any] = {"tokens": kinds, "items": items, "dtype": np.float32}
    total = _count(store, sites[0], kinds, items)
    total = total if limit is None else min(total, limit)
    batches = sequential(store, sites, batch_size, **options)
    try:
        for batch in batches:
            x_all = torch.from_numpy(batch.acts).to(device)
            tally.add(x_all, batch.slices, torch.from_numpy(batch.token).long().to(device))
            if on_event is not None:
                on_event(tally.tokens, total)
            if limit is not None and tally.tokens >= limit:
                break
    finally:
        batches.close()  # type: ignore[attr-defined]
    found: list[Substitution] = []
    if model is not None and model is not False:
        from dictlearn.substitution import substitute

        options = {"data": data, "kinds": kinds, "items": items, "images": images}
        found = substitute(dictionary, store, model=model, heads=heads, **options)
    return tally.report(
        items="all" if items is None else str(items),
        substitution=found[0] if found else None,
        other_heads=tuple(found[1:]),
        about=dict(about or {}),
    )


def _kinds(store: Store, sites: Sequence[str], tokens: str | None) -> tuple[str, ...]:
    stored = store.kinds(sites[0])
    if tokens is None:
        return stored
    wanted = [t.strip() for t in tokens.split(",") if t.strip()]
    for kind in wanted:
        store.spec(sites[0], kind)
    return tuple(k for k in stored if k in wanted)


def _count(store: Store, site: str, kinds: Sequence[str], items: Split | np.ndarray | None) -> int:
    from actstore.selection import Selection

    selection = Selection(store, site, tokens=kinds, items=items)
    return int(selection.counts.sum()) * sum(column.width for column in selection.columns)


class _Tally:
    """Sums of one pass; float64 where they grow."""

    def __init__(self, dictionary: Dictionary, store: Store, kinds: Sequence[str]) -> None:
        self.dictionary, self.store, self.kinds = dictionary, store, kinds
        c = dictionary.config
        device = dictionary.device
        site = c.sites[0]
        specs = [store.spec(site, kind) for kind in kinds]
        n_tokens = max(s.first + s.tokens for s in specs)
        self.kind_T = torch.full((n_tokens,), -1, dtype=torch.long, device=device)
        for i, spec in enumerate(specs):
            self.kind_T[spec.first : spec.first + spec.tokens] = i
        k = len(kinds)
        f64 = torch.float64
        self.shift_w = torch.cat([_mean(store, s, kinds) for s in c.writes]).to(device)
        self.l0_T = torch.zeros(n_tokens, dtype=f64, device=device)
        self.count_T = torch.zeros(n_tokens, dtype=torch.long, device=device)
        self.error_kw = torch.zeros(k, c.d_write, dtype=f64, device=device)
        self.square_kw = torch.zeros(k, c.d_write, dtype=f64, device=device)
        self.sum_kw = torch.zeros(k, c.d_write, dtype=f64, device=device)
        self.cosine = 0.0
        self.fired_F = torch.zeros(c.latents, dtype=torch.long, device=device)
        self.tokens = 0

    @torch.no_grad()
    def add(self, acts: Tensor, slices: Mapping[str, slice], token_B: Tensor) -> None:
        """Add a batch, in chunks of rows whose pre-activations stay small."""
        d = self.dictionary
        rows = max(64, _CHUNK_BYTES // (4 * d.latents))
        x_Br, t_Bw = d.gather(acts, slices), d.gather(acts, slices, write=True)
        for start in range(0, len(acts), rows):
            here = slice(start, start + rows)
            self._add(x_Br[here], t_Bw[here], token_B[here])
        self.tokens += len(acts)

    def _add(self, x_Br: Tensor, t_Bw: Tensor, token_B: Tensor) -> None:
        d = self.dictionary
        entries = d.encode_entries(x_Br)
        y_Bw = d.decode_entries(entries, x_Br)
        active_N = entries.value != 0
        l0_B = torch.bincount(entries.row[active_N], minlength=len(x_Br))
        self.fired_F += torch.bincount(entries.latent[active_N], minlength=d.latents)
        self.l0_T.index_add_(0, token_B, l0_B.double())
        self.count_T += torch.bincount(token_B, minlength=len(self.count_T))
        kind_B = self.kind_T[token_B]
        centred_Bw = t_Bw - self.shift_w
        error_Bw = y_Bw - t_Bw
        for k in range(len(self.kinds)):
            mask_B = kind_B == k
            if len(self.kinds) > 1:
                centred, error = centred_Bw[mask_B], error_Bw[mask_B]
            else:
                centred, error = centred_Bw, error_Bw
            self.sum_kw[k] += centred.sum(0, dtype=torch.float64)
            self.square_kw[k] += centred.square().sum(0, dtype=torch.float64)
            self.error_kw[k] += error.square().sum(0, dtype=torch.float64)
        cosine_B = torch.nn.functional.cosine_similarity(y_Bw, t_Bw, dim=1)
        self.cosine += float(cosine_B.sum(dtype=torch.float64))

    def report(self, **more: Any) -> Report:
        """Divide the sums."""
        c, n = self.dictionary.config, max(1, self.tokens)
        valid_T = self.count_T > 0
        count_k = torch.stack(
            [self.count_T[self.kind_T == k].sum() for k in range(len(self.kinds))]
        )
        l0_k = torch.stack([self.l0_T[self.kind_T == k].sum() for k in range(len(self.kinds))])
        variance_kw = self.square_kw - self.sum_kw.square() / count_k.clamp(min=1)[:, None]
        variance_w = self.square_kw.sum(0) - self.sum_kw.sum(0).square() / n
        error_w = self.error_kw.sum(0)
        by_site, at = {}, 0
        for site, width in c.writes.items():
            cut = slice(at, at + width)
            by_site[site] = _ratio(error_w[cut].sum(), variance_w[cut].sum())
            at += width
        rate_F = (self.fired_F.double() / n).cpu().numpy()
        with np.errstate(divide="ignore"):
            log_F = np.where(rate_F > 0, np.log10(rate_F), -np.inf)
        histogram = np.histogram(np.clip(log_F, -99, 0), bins=[-100, *DENSITY_EDGES])[0]
        positions = valid_T.nonzero().flatten().tolist()
        return Report(
            store=self.store.fingerprint,
            reads=tuple(c.reads),
            writes=tuple(c.writes),
            latents=c.latents,
            tokens=self.tokens,
            l0=float(self.l0_T.sum()) / n,
            l0_by_kind={
                kind: float(l0_k[i]) / max(1, int(count_k[i])) for i, kind in enumerate(self.kinds)
            },
            l0_by_position={t: float(self.l0_T[t]) / int(self.count_T[t]) for t in positions},
            fvu=_ratio(error_w.sum(), variance_w.sum()),
            fvu_by_kind={
                kind: _ratio(self.error_kw[i].sum(), variance_kw[i].sum())
                for i, kind in enumerate(self.kinds)
            },
            fvu_by_site=by_site,
            cosine=self.cosine / n,
            mse=float(error_w.sum()) / (n * c.d_write),
            dead=float((self.fired_F == 0).double().mean()),
            dense=float((rate_F > 0.1).mean()),
            density=tuple(int(v) for v in histogram),
            **more,
        )


def _ratio(error: Tensor, variance: Tensor) -> float:
    return float(error / variance) if float(variance) > 0 else math.nan


def _mean(store: Store, site: str, kinds: Sequence[str]) -> Tensor:
    """Mean of a site over the kinds, only to keep sums of squares small."""
    parts = [store.stats(site, kind) for kind in kinds]
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    return torch.from_numpy(total.mean).float()
