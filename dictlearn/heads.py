"""Heads: what turns a model's value at a site into logits, so that a splice has a price.

Three kinds: the model's own classifier, a zero-shot classifier at its trained temperature or at 1,
and a linear probe fitted on a store. One pass of the model serves any number of them.

Shapes: N images, T tokens of a site, d channels, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from actstore.reader import sequential
from actstore.selection import Split
from dictlearn.starts import scikit

if TYPE_CHECKING:
    from actstore.store import Store
    from vitmodels.spec import SiteInfo

log = logging.getLogger(__name__)

KINDS = ("model", "zero-shot", "probe")
_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class ModelHead:
    """The model's own logits, ``scale * (logits - bias)``."""

    name: str = "model"
    """In reports."""
    site: str = "logits"
    """Where it reads."""
    scale: float = 1.0
    """Factor; another temperature than the model's."""
    bias: float = 0.0
    """Subtracted first; the same for all classes, it changes no probability."""

    def __call__(self, value: Tensor, info: SiteInfo) -> Float[Tensor, "n c"]:
        """Return logits in float32."""
        return self.scale * (value.float().flatten(1) - self.bias)


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """Linear probe: ``logits = (x - mean_d) @ weight_dC + bias_C``, x a token or a mean of tokens.

    Fitted on a store by `fit_probe` (Alain and Bengio 2016, arXiv:1610.01644).
    """

    site: str
    """Where it reads; an edit has an effect only at this site or before."""
    kind: str
    """Token kind; the mean over its tokens is taken."""
    mean_d: Float[Tensor, " d"]
    """Mean of x over the images it was fitted on."""
    weight_dC: Float[Tensor, "d c"]
    """Directions."""
    bias_C: Float[Tensor, " c"]
    """Logits of the mean."""
    accuracy: float
    """Share of the images it was fitted on that it gets right."""

    @property
    def name(self) -> str:
        """In reports."""
        return f"probe {self.site} {self.kind}"

    def __call__(self, value: Tensor, info: SiteInfo) -> Float[Tensor, "n c"]:
        """Return logits in float32 for the value of its site in a forward pass."""
        x_Nd = value.float()
        axis = info.token_axis
        if axis is not None and info.grid is not None:
            x_NTd = x_Nd.movedim(axis + 1, 1)[:, info.grid.slice(self.kind)].flatten(2)
            x_Nd = x_NTd.mean(1)
        return self.logits(x_Nd.flatten(1))

    def logits(self, x_Nd: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
        """Return logits for features as `features` gives them."""
        device = x_Nd.device
        centred_Nd = x_Nd - self.mean_d.to(device)
        return centred_Nd @ self.weight_dC.to(device) + self.bias_C.to(device)


Head = ModelHead | Probe


def model_heads(model: Any) -> list[Head]:
    """Heads behind a model's logits: one, or for a zero-shot model two.

    A zero-shot model (`vitmodels.zeroshot`) at a trained scale also gets the head at scale 1, from
    the same pass.

    Raises
    ------
    ValueError
        The model has no classification head.
    """
    if "logits" not in model.sites():
        raise ValueError(
            f"{model.spec.id} has no classification head, so it has no loss to compare; evaluate "
            "without model=, with a zero-shot classifier (vitmodels.zeroshot) or with a probe "
            "(dictlearn.heads.fit_probe, `dictlearn eval --head probe`)"
        )
    from vitmodels.zeroshot import ZeroShotHead

    tail = getattr(model.module, "head", None)
    if not isinstance(tail, ZeroShotHead):
        return [ModelHead()]
    if tail.scale == 1:
        return [ModelHead(name="zero-shot at 1")]
    return [
        ModelHead(name=f"zero-shot at {tail.scale:.4g}"),
        ModelHead(name="zero-shot at 1", scale=1.0 / tail.scale, bias=tail.bias),
    ]


def features(
    store: Store, site: str, kind: str, items: Split | np.ndarray | None = None
) -> tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"]]:
    """Mean over the tokens of a kind for every item chosen, and the items' store positions."""
    spec = store.spec(site, kind)
    size = 1 + max(store.table()["position"].to_pylist(), default=0)
    sum_Id = np.zeros((size, spec.channels), np.float32)
    count_I = np.zeros(size, np.int64)
    for batch in sequential(store, site, _ROWS, tokens=kind, items=items, dtype=np.float32):
        np.add.at(sum_Id, batch.item, batch.acts)
        count_I += np.bincount(batch.item, minlength=size)
    found = count_I.nonzero()[0]
    mean_Nd = sum_Id[found] / count_I[found, None].astype(np.float32)
    return mean_Nd, found


def labels(store: Store, positions: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Labels of items by store position.

    Raises
    ------
    ValueError
        Some of the items have none.
    """
    table = store.table()
    by_position = dict(zip(table["position"].to_pylist(), table["label"].to_pylist(), strict=True))
    found = [by_position[int(p)] for p in positions]
    missing = sum(v is None or v < 0 for v in found)
    if missing:
        raise ValueError(
            f"{missing} of {len(found)} items of {store.url} have no label; this needs a data set "
            "with labels, or a store written with a column `label`"
        )
    return np.array(found, np.int64)


def default_probe_site(store: Store, sites: Sequence[str] = ()) -> tuple[str, str]:
    """Return the last site stored, not before any of `sites`, and CLS there or patches."""
    order = list(store.sites)
    first = max((order.index(s) for s in sites if s in order), default=0)
    site = order[max(first, len(order) - 1)]
    kinds = store.kinds(site)
    return site, "cls" if "cls" in kinds else kinds[0]


def fit_probe(
    store: Store,
    site: str | None = None,
    *,
    kind: str | None = None,
    items: Split | np.ndarray | None = None,
    c: float = 1.0,
) -> Probe:
    """Fit a multinomial logistic regression from activations to the labels of the index.

    Features are divided by the root of their mean channel variance, then scikit-learn's
    ``LogisticRegression(C=c)`` (L2 penalty, L-BFGS) is fitted; the factor is folded into the
    weights.

    Parameters
    ----------
    store
        Has labels.
    site, kind
        Where the probe reads; the last site stored, CLS where there is one, by default.
    items
        Items to fit on: not those that are evaluated.
    c
        Inverse of the strength of the penalty.

    Raises
    ------
    ValueError
        No labels, one class only, or scikit-learn is not installed.
    """
    if site is None:
        site, default = default_probe_site(store)
        kind = kind or default
    kind = kind or ("cls" if "cls" in store.kinds(site) else store.kinds(site)[0])
    x_Nd, found = features(store, site, kind, items)
    label_N = labels(store, found)
    classes = int(label_N.max()) + 1
    if len(np.unique(label_N)) < 2:
        raise ValueError(f"a probe needs two classes at least; all items are of {label_N[0]}")
    mean_d = x_Nd.mean(0)
    scale = float(x_Nd.var(0).mean()) ** -0.5
    linear = scikit("linear_model", "a linear probe")
    model = linear.LogisticRegression(C=c, max_iter=300, tol=1e-3)
    scaled_Nd = (x_Nd - mean_d) * scale
    model.fit(scaled_Nd, label_N)
    weight_Cd, bias_C = model.coef_, model.intercept_
    if len(weight_Cd) == 1:  # two classes: scikit-learn keeps one direction
        weight_Cd = np.concatenate([-weight_Cd / 2, weight_Cd / 2])
        bias_C = np.concatenate([-bias_C / 2, bias_C / 2])
    weight_dC = torch.zeros(x_Nd.shape[1], classes)
    all_bias_C = torch.full((classes,), -1e4)  # classes that no item has are never predicted
    weight_dC[:, model.classes_] = torch.from_numpy(weight_Cd.T * scale).float()
    all_bias_C[model.classes_] = torch.from_numpy(bias_C).float()
    probe = Probe(
        site=site,
        kind=kind,
        mean_d=torch.from_numpy(mean_d),
        weight_dC=weight_dC,
        bias_C=all_bias_C,
        accuracy=float((model.predict(scaled_Nd) == label_N).mean()),
    )
    log.info("%s: %.1f %% of %d items", probe.name, 100 * probe.accuracy, len(label_N))
    return probe
