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

from actstore.aligned import Aligned, sequential
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
    store: Store | Aligned,
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
        Evaluate about so many tokens: all tokens of items spread evenly over those chosen.
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
    chosen, total = _chosen(store, sites[0], kinds, items, limit)
    options: dict[str, Any] = {"tokens": kinds, "items": chosen, "dtype": np.float32}
    batches = sequential(store, sites, batch_size, **options)
    try:
        for batch in batches:
            x_all = torch.from_numpy(batch.acts).to(device)
            tally.add(x_all, batch.slices, torch.from_numpy(batch.token).long().to(device))
            if on_event is not None:
                on_event(tally.tokens, total)
    finally:
        batches.close()  # type: ignore[attr-defined]
    found: list[Substitution] = []
    if model is not None and model is not False:
        from dictlearn.substitution import substitute

        if isinstance(store, Aligned):
            raise ValueError(
                "the substitution loss runs one model, and these are stores of several: leave "
                "model out, or evaluate a dictionary of one store"
            )

        options = {"data": data, "kinds": kinds, "items": items, "images": images}
        found = substitute(dictionary, store, model=model, heads=heads, **options)
    return tally.report(
        items="all" if items is None else str(items),
        substitution=found[0] if found else None,
        other_heads=tuple(found[1:]),
        about=dict(about or {}),
    )


def _kinds(store: Store | Aligned, sites: Sequence[str], tokens: str | None) -> tuple[str, ...]:
    stored = store.kinds(sites[0])
    if tokens is None:
        return stored
    wanted = [t.strip() for t in tokens.split(",") if t.strip()]
    for kind in wanted:
        store.spec(sites[0], kind)
    return tuple(k for k in stored if k in wanted)


def _chosen(
    store: Store | Aligned,
    site: str,
    kinds: Sequence[str],
    items: Split | np.ndarray | None,
    limit: int | None,
) -> tuple[Split | np.ndarray | None, int]:
    """Items to read for about `limit` tokens, and how many tokens they have.

    Rows lie by position in a part, so the first ones of a pass are all of one position; whole items
    keep kinds and positions in their proportion.
    """
    from actstore.selection import Selection

    home, inner = store.home(site) if isinstance(store, Aligned) else (store, site)
    selection = Selection(home, inner, tokens=kinds, items=items)
    width = sum(column.width for column in selection.columns)
    there = int(selection.counts.sum())
    wanted = there if limit is None else max(1, -(-limit // width))
    if wanted >= there:
        return items, there * width
    size = home.manifest.items_per_part
    positions = []
    for part, count in zip(selection.parts.tolist(), selection.counts.tolist(), strict=True):
        rows = selection.rows(part)
        positions.append(part * size + (np.arange(count) if rows is None else rows))
    at = np.linspace(0, there - 1, wanted).round().astype(np.int64)
    return np.concatenate(positions)[at], wanted * width


class _Tally:
    """Sums of one pass; float64 where they grow."""

    def __init__(
        self, dictionary: Dictionary, store: Store | Aligned, kinds: Sequence[str]
    ) -> None:
        self.dictionary, self.store, self.kinds = dictionary, store, kinds
        c = dictionary.config
        device = dictionary.device
        site = c.sites[0]
        specs = [store.spec(site, kind) for kind in kinds]
        n_tokens = max(s.first + s.span for s in specs)
        self.kind_T = torch.full((n_tokens,), -1, dtype=torch.long, device=device)
        for i, spec in enumerate(specs):
            self.kind_T[spec.first : spec.first + spec.span] = i
        f64 = torch.float64
        self.shift_w = torch.cat([_mean(store, s, kinds) for s in c.writes]).to(device)
        self.l0_T = torch.zeros(n_tokens, dtype=f64, device=device)
        self.count_T = torch.zeros(n_tokens, dtype=torch.long, device=device)
        self.sum_Tw = torch.zeros(n_tokens, c.d_write, dtype=f64, device=device)
        by_site = (n_tokens, len(c.writes))
        self.square_TS = torch.zeros(by_site, dtype=f64, device=device)
        self.error_TS = torch.zeros(by_site, dtype=f64, device=device)
        self.cosine_TS = torch.zeros(by_site, dtype=f64, device=device)
        self.cosine_T = torch.zeros(n_tokens, dtype=f64, device=device)
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
        centred_Bw = t_Bw - self.shift_w
        square_BS, error_BS, cosine_BS = [], [], []
        for x, e, y, t in zip(
            *(d.split(v).values() for v in (centred_Bw, y_Bw - t_Bw, y_Bw, t_Bw)), strict=True
        ):
            square_BS.append(x.square().sum(1, dtype=torch.float64))
            error_BS.append(e.square().sum(1, dtype=torch.float64))
            cosine_BS.append(torch.nn.functional.cosine_similarity(y, t, dim=1).double())
        self.sum_Tw.index_add_(0, token_B, centred_Bw.double())
        self.square_TS.index_add_(0, token_B, torch.stack(square_BS, 1))
        self.error_TS.index_add_(0, token_B, torch.stack(error_BS, 1))
        self.cosine_TS.index_add_(0, token_B, torch.stack(cosine_BS, 1))
        cosine_B = torch.nn.functional.cosine_similarity(y_Bw, t_Bw, dim=1)
        self.cosine_T.index_add_(0, token_B, cosine_B.double())

    def _fvu(self, mask_T: Tensor, site: str | None = None) -> float:
        """FVU of some positions about their common mean, over all sites or one."""
        writes = self.dictionary.config.writes
        sum_w = self.sum_Tw[mask_T].sum(0)
        sites = list(writes) if site is None else [site]
        cut = [list(writes).index(s) for s in sites]
        parts = dict(zip(writes, torch.split(sum_w, list(writes.values())), strict=True))
        count = self.count_T[mask_T].sum().clamp(min=1)
        spread = self.square_TS[mask_T][:, cut].sum()
        for s in sites:
            spread = spread - parts[s].square().sum() / count
        return _ratio(self.error_TS[mask_T][:, cut].sum(), spread)

    def _mean(self, value_T: Tensor, mask_T: Tensor) -> float:
        return float(value_T[mask_T].sum()) / max(1, int(self.count_T[mask_T].sum()))

    def report(self, **more: Any) -> Report:
        """Divide the sums."""
        c, n = self.dictionary.config, max(1, self.tokens)
        every_T = self.count_T > 0
        kind_T = {kind: every_T & (self.kind_T == i) for i, kind in enumerate(self.kinds)}
        numbers = torch.arange(len(every_T), device=every_T.device)
        position_T = {t: numbers == t for t in every_T.nonzero().flatten().tolist()}
        rate_F = (self.fired_F.double() / n).cpu().numpy()
        with np.errstate(divide="ignore"):
            log_F = np.where(rate_F > 0, np.log10(rate_F), -np.inf)
        histogram = np.histogram(np.clip(log_F, -99, 0), bins=[-100, *DENSITY_EDGES])[0]
        return Report(
            store=self.store.fingerprint,
            reads=tuple(c.reads),
            writes=tuple(c.writes),
            latents=c.latents,
            tokens=self.tokens,
            l0=self._mean(self.l0_T, every_T),
            l0_by_kind={k: self._mean(self.l0_T, m) for k, m in kind_T.items()},
            l0_by_position={t: self._mean(self.l0_T, m) for t, m in position_T.items()},
            fvu=self._fvu(every_T),
            fvu_by_kind={k: self._fvu(m) for k, m in kind_T.items()},
            fvu_by_position={t: self._fvu(m) for t, m in position_T.items()},
            fvu_by_site={s: self._fvu(every_T, s) for s in c.writes},
            cosine=self._mean(self.cosine_T, every_T),
            cosine_by_kind={k: self._mean(self.cosine_T, m) for k, m in kind_T.items()},
            cosine_by_position={t: self._mean(self.cosine_T, m) for t, m in position_T.items()},
            cosine_by_site={
                s: self._mean(self.cosine_TS[:, i], every_T) for i, s in enumerate(c.writes)
            },
            mse=float(self.error_TS.sum()) / (n * c.d_write),
            dead=float((self.fired_F == 0).double().mean()),
            dense=float((rate_F > 0.1).mean()),
            density=tuple(int(v) for v in histogram),
            **more,
        )


def _ratio(error: Tensor, variance: Tensor) -> float:
    return float(error / variance) if float(variance) > 0 else math.nan


def _mean(store: Store | Aligned, site: str, kinds: Sequence[str]) -> Tensor:
    """Mean of a site over the kinds, only to keep sums of squares small."""
    parts = [store.stats(site, kind) for kind in kinds]
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    return torch.from_numpy(total.mean).float()
