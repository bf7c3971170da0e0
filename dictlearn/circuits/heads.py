"""A head for a model without one: a linear probe of its features.

::

    logits = features @ weight.T + bias

The features are what the module returns: the pooled token or the mean of the patches, after the
final norm.

Shape legend: B items, C classes, D features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitmodels.headed import with_head
from vitmodels.model import VisionModel

if TYPE_CHECKING:
    from actstore.store import Store


def with_probe(
    model: VisionModel,
    weight_CD: Float[Tensor, "classes features"],
    bias_C: Float[Tensor, " classes"] | None = None,
) -> VisionModel:
    """Return the model with a site ``logits`` behind its features; its module runs both.

    Raises
    ------
    ValueError
        The model has a head, or its features are not of the probe's width.
    """
    sites = model.sites()
    if "logits" in sites:
        raise ValueError(
            f"{model.spec.id} has a head of {sites['logits'].shape[-1]} classes already: use the "
            "model as it is, or load it without its head for a probe"
        )
    name = next((n for n in ("projection", "pooled") if n in sites), None)
    width = weight_CD.shape[1]
    if name is None or sites[name].shape != (width,):
        found = "no pooled features" if name is None else f"features of {sites[name].shape}"
        raise ValueError(f"{model.spec.id} has {found}, the probe takes {width} numbers")
    head = nn.Linear(width, len(weight_CD), device=model.device, dtype=model.dtype)
    with torch.no_grad():
        head.weight.copy_(weight_CD)
        head.bias.zero_() if bias_C is None else head.bias.copy_(bias_C)
    head.requires_grad_(False)
    return with_head(model, head, len(weight_CD))


def fit_probe(
    store: Store, site: str = "pooled", *, classes: int | None = None, penalty: float = 1e-3
) -> tuple[Float[Tensor, "classes features"], Float[Tensor, " classes"]]:
    """Fit a multinomial logistic regression of a store's labels on a site without tokens.

    Minimises mean cross-entropy ``+ penalty / 2 * |weight|^2`` of standardised features by L-BFGS;
    the standardisation is folded into what is returned.

    Parameters
    ----------
    store
        Holds `site` (``pooled`` or ``projection``, one vector an item) and labels.
    site
        Features of the probe.
    classes
        C; by default one more than the largest label.
    penalty
        Strength of the penalty.

    Returns
    -------
    tuple
        weight [C, D] and bias [C], for :func:`with_probe`.

    Raises
    ------
    ValueError
        The site has tokens, or there are no labels.
    KeyError
        The store does not hold the site.
    """
    kinds = store.kinds(site)
    if kinds != ("item",):
        raise ValueError(
            f"{site} of {store.url} has tokens ({', '.join(kinds)}); a probe takes one vector an "
            "item: harvest 'pooled' (or 'projection')"
        )
    rows = [r for r in store.table().select(["position", "label"]).to_pylist()]
    rows = [r for r in rows if r["label"] is not None and r["label"] >= 0]
    if not rows:
        raise ValueError(f"{store.url} has no labels in its index, so no probe can be fitted")
    import numpy as np

    positions = np.asarray([r["position"] for r in rows])
    x_BD = torch.from_numpy(np.asarray(store.items(positions, site, "item"), np.float32))
    x_BD = x_BD.reshape(len(rows), -1)
    label_B = torch.tensor([r["label"] for r in rows])
    count = int(label_B.max()) + 1 if classes is None else classes
    mean_D, std_D = x_BD.mean(0), x_BD.std(0, unbiased=False).clamp_min(1e-6)
    z_BD = (x_BD - mean_D) / std_D
    w_CD = torch.zeros(count, x_BD.shape[1], requires_grad=True)
    b_C = torch.zeros(count, requires_grad=True)
    solver = torch.optim.LBFGS([w_CD, b_C], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(z_BD @ w_CD.T + b_C, label_B) + penalty / 2 * w_CD.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    weight_CD = (w_CD / std_D).detach()
    return weight_CD, (b_C - (w_CD / std_D) @ mean_D).detach()
