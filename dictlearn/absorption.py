"""Feature absorption: a class's own latent stays silent where a more special one speaks for it.

Definitions of Chanin et al. 2024 ("A is for Absorption", arXiv:2409.14507, section 4), with class
labels in place of first letters. For a class c, a linear probe with direction p_c:

1. *Main latents*: k-sparse probing (Gurnee et al. 2023, arXiv:2305.01610): latents by difference of
   their mean activations, k = 1, 2, ... as long as one more raises F1 by more than `split`.
2. *Missed*: tokens of class c that the probe gets right and on which no main latent is active.
3. *Absorbed*: missed tokens on which another latent i with cos(d_i, p_c) above `alignment` carries
   the largest contribution f_i d_i . p_c of all, and at least `share` of the sum of positive ones.

Shapes: N tokens, d channels, C classes, F latents, k main latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int

from actstore.reader import sequential
from actstore.selection import Split
from dictlearn.dictionary import Dictionary
from dictlearn.heads import Probe, fit_probe, labels
from dictlearn.scaling import check_sites
from dictlearn.starts import scikit

if TYPE_CHECKING:
    from actstore.store import Store

_ROWS = 2048
_MOST_MAIN = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Absorption:
    """Absorption of every class."""

    classes: pa.Table
    """A row for each class: label, name, main (latents), f1, positives (tokens the probe gets
    right), missed, absorbed, absorber (the most frequent absorbing latent, null without)."""
    probe_accuracy: float
    """Share of the tokens examined that the probe gets right."""

    @property
    def rate(self) -> float:
        """Absorbed tokens among those of their class that the probe gets right."""
        return self._of("absorbed")

    @property
    def missed(self) -> float:
        """Missed tokens among those; what is missed and not absorbed is simply not represented."""
        return self._of("missed")

    def _of(self, column: str) -> float:
        total = sum(self.classes["positives"].to_pylist())
        return float(sum(self.classes[column].to_pylist()) / max(1, total))

    def save(self, path: str | Path) -> Path:
        """Write the table as parquet."""
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(self.classes, file)
        return file


def absorption(
    store: Store,
    dictionary: Dictionary,
    *,
    kind: str | None = None,
    items: Split | None = None,
    limit: int = 50_000,
    probe: Probe | None = None,
    split: float = 0.03,
    alignment: float = 0.1,
    share: float = 0.5,
) -> Absorption:
    """Measure absorption of the classes of a store's labels.

    Parameters
    ----------
    store
        Has labels, and the one site that the dictionary reads and writes.
    dictionary
        An SAE.
    kind
        Token kind; CLS where there is one. Every token has the label of its item.
    items
        Items examined; probe and main latents are found on the others. Half of them by default.
    limit
        Tokens of either half at most.
    probe
        Of the same site and kind; fitted here by default.
    split, alignment, share
        Thresholds of the definitions above.

    Raises
    ------
    ValueError
        The store has no labels, or the dictionary is no SAE of one site.
    """
    check_sites(dictionary, store)
    c = dictionary.config
    if len(c.reads) != 1 or list(c.reads) != list(c.writes):
        raise ValueError(
            "absorption compares decoder rows with directions at the input: it needs a dictionary "
            f"that reads and writes one site, this reads {list(c.reads)}, writes {list(c.writes)}"
        )
    (site,) = c.reads
    kind = kind or ("cls" if "cls" in store.kinds(site) else store.kinds(site)[0])
    items = items or Split(half="validation", holdout=0.5)
    rest = Split(half="train", holdout=items.holdout, seed=items.seed)
    if probe is None:
        probe = fit_probe(store, site, kind=kind, items=rest)
    _, codes_fit, label_fit = _encoded(store, dictionary, site, kind, rest, limit)
    x_Nd, codes, label_N = _encoded(store, dictionary, site, kind, items, limit)
    with torch.no_grad():
        right_N = (probe.logits(torch.from_numpy(x_Nd)).argmax(1).numpy()) == label_N
        row_Fd = dictionary.W_dec.float().cpu().numpy()
    weight_dC = probe.weight_dC.numpy()
    directions_dC = weight_dC - weight_dC.mean(1, keepdims=True)
    names = _names(store)
    rows = []
    for label in np.unique(np.concatenate([label_fit, label_N])).tolist():
        main, f1 = main_latents(codes_fit, label_fit == label, split=split)
        p_d = directions_dC[:, label]
        p_d = p_d / max(float(np.linalg.norm(p_d)), 1e-12)
        chosen = codes[(right_N & (label_N == label)).nonzero()[0]]
        missed, absorbers = absorbed(chosen, row_Fd, p_d, main, alignment=alignment, share=share)
        rows.append(
            {
                "label": label,
                "name": names.get(label),
                "main": main,
                "f1": f1,
                "positives": chosen.shape[0],
                "missed": missed,
                "absorbed": len(absorbers),
                "absorber": int(np.bincount(absorbers).argmax()) if len(absorbers) else None,
            }
        )
    return Absorption(classes=pa.Table.from_pylist(rows), probe_accuracy=float(right_N.mean()))


def main_latents(codes: Any, is_class_N: np.ndarray, *, split: float) -> tuple[list[int], float]:
    """Latents that together tell a class, and the F1 of a logistic regression on them.

    `codes` is a sparse matrix [N, F]. Candidates come by difference of mean activations; one more
    is taken while it raises F1 by more than `split`.
    """
    linear, metrics = scikit("linear_model", "k-sparse probing"), scikit("metrics", "F1")
    n_class = max(1, int(is_class_N.sum()))
    inside_F = np.asarray(codes[is_class_N.nonzero()[0]].sum(0)).ravel() / n_class
    outside_F = np.asarray(codes[(~is_class_N).nonzero()[0]].sum(0)).ravel()
    outside_F = outside_F / max(1, len(is_class_N) - n_class)
    ranked_F = np.argsort(inside_F - outside_F, kind="stable")[::-1]
    order = [int(i) for i in ranked_F[:_MOST_MAIN] if inside_F[i] > outside_F[i]]
    best, chosen = 0.0, order[:1]
    if not is_class_N.any() or is_class_N.all():
        return [], 0.0
    for k in range(1, len(order) + 1):
        x_Nk = codes[:, order[:k]].toarray()
        scale_k = np.maximum(x_Nk.std(0), 1e-12)
        model = linear.LogisticRegression(class_weight="balanced", max_iter=200)
        model.fit(x_Nk / scale_k, is_class_N)
        f1 = float(metrics.f1_score(is_class_N, model.predict(x_Nk / scale_k)))
        if k > 1 and f1 <= best + split:
            break
        best, chosen = f1, order[:k]
    return chosen, best


def absorbed(
    codes: Any,
    row_Fd: Float[np.ndarray, "f d"],
    p_d: Float[np.ndarray, " d"],
    main: Sequence[int],
    *,
    alignment: float,
    share: float,
) -> tuple[int, Int[np.ndarray, " n"]]:
    """Count the tokens missed, and return the absorbing latent of each one absorbed.

    `codes` is a sparse matrix [N, F] of tokens of one class that the probe gets right, `p_d` the
    probe's direction at norm 1.
    """
    along_F = row_Fd @ p_d
    cosine_F = along_F / np.maximum(np.linalg.norm(row_Fd, axis=1), 1e-12)
    may_F = cosine_F > alignment
    may_F[list(main)] = False
    missed, absorbers = 0, []
    for i in range(codes.shape[0]):
        cut = slice(codes.indptr[i], codes.indptr[i + 1])
        latent, value = codes.indices[cut], codes.data[cut]
        if np.isin(latent, main).any():
            continue
        missed += 1
        given = value * along_F[latent]
        if not len(given) or given.max() <= 0:
            continue
        best = int(given.argmax())
        if may_F[latent[best]] and given[best] >= share * given[given > 0].sum():
            absorbers.append(int(latent[best]))
    return missed, np.array(absorbers, np.int64)


@torch.no_grad()
def _encoded(
    store: Store, dictionary: Dictionary, site: str, kind: str, items: Split, limit: int
) -> tuple[Float[np.ndarray, "n d"], Any, Int[np.ndarray, " n"]]:
    """Tokens, their codes as a sparse matrix [N, F], and labels."""
    from scipy.sparse import csr_array, vstack

    parts, codes, item = [], [], []
    seen = 0
    batches = sequential(store, site, _ROWS, tokens=kind, items=items, dtype=np.float32)
    try:
        for batch in batches:
            x = torch.from_numpy(batch.acts).to(dictionary.device)
            entries = dictionary.encode_entries(x)
            on = entries.value != 0
            value, latent, row = (
                v[on].cpu().numpy() for v in (entries.value, entries.latent, entries.row)
            )
            codes.append(csr_array((value, (row, latent)), (len(x), dictionary.latents)))
            parts.append(np.array(batch.acts))
            item.append(np.array(batch.item))
            seen += len(x)
            if seen >= limit:
                break
    finally:
        batches.close()  # type: ignore[attr-defined]
    return np.concatenate(parts), vstack(codes).tocsr(), labels(store, np.concatenate(item))


def _names(store: Store) -> dict[int, str | None]:
    table = store.table()
    return dict(zip(table["label"].to_pylist(), table["label_name"].to_pylist(), strict=True))
