"""Tuned lens: an affine map a layer to the last layer's stream, trained off a store.

::

    h'_l    = h_l + h_l A_l^T + b_l                                   A, b = 0: the logit lens
    loss_l  = KL( softmax(tail(h_last)) || softmax(tail(h'_l)) )      token by token

Belrose et al. 2023 (arXiv:2303.08112), equations 2 to 4. The tail is the model's own, held fixed,
and reads single tokens as `dictlearn.circuits.lens` says; the activations are the store's, so that
no image is run through the blocks.

Shape legend: B tokens, L layers, D channels, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import xarray as xr
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dictlearn.circuits.lens import Tail
from vitmodels.model import VisionModel
from vitmodels.names import Site
from vitmodels.spec import expand_sites

if TYPE_CHECKING:
    from actstore.batching import Batch
    from actstore.store import Store

_FORMAT = "dictlearn tuned lens 1"


@dataclass(frozen=True, kw_only=True)
class LensConfig:
    """How a tuned lens is trained."""

    steps: int = 250
    """Optimiser steps."""
    batch_size: int = 256
    """Tokens a step."""
    lr: float = 1e-3
    """Of Adam, falling linearly to 0."""
    tokens: str = "cls"
    """Token kinds, as in `actstore.batches`: those that a lens is to read."""
    holdout: float = 0.1
    """Share of the items kept for the divergences that are reported."""
    seed: int = 0
    """Of the order of the tokens."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"steps and batch_size must be positive: {self}")
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, not {self.lr}")
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout must be a fraction in (0, 1), not {self.holdout}")


class TunedLens:
    """Affine maps by site; call it as ``translate`` of `dictlearn.circuits.lens.logit_lens`.

    Parameters
    ----------
    maps
        Site -> (A [D, D], b [D]). A site that has none is read as it is.
    model, weights
        Id and weights digest of the model it belongs to.
    """

    def __init__(
        self, maps: dict[str, tuple[Tensor, Tensor]], *, model: str = "", weights: str = ""
    ) -> None:
        self.maps = maps
        self.model = model
        self.weights = weights

    def __call__(self, site: str, stream: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Stream of `site` as of the last layer."""
        if site not in self.maps:
            return stream
        a_DD, b_D = (t.to(stream) for t in self.maps[site])
        return stream + F.linear(stream, a_DD, b_D)

    def save(self, path: str | Path) -> Path:
        """Write ``<site>.A`` and ``<site>.b`` to one safetensors file."""
        file = Path(path)
        tensors = {}
        for site, (a_DD, b_D) in self.maps.items():
            tensors[f"{site}.A"] = a_DD.detach().cpu().contiguous()
            tensors[f"{site}.b"] = b_D.detach().cpu().contiguous()
        about = {"format": _FORMAT, "model": self.model, "weights": self.weights}
        temporary = file.with_name(f".{file.name}.writing")
        save_file(tensors, temporary, metadata={"about": json.dumps(about)})
        temporary.replace(file)
        return file

    @classmethod
    def load(cls, path: str | Path, model: VisionModel | None = None) -> TunedLens:
        """Read a file of `save`.

        Raises
        ------
        FormatError
            It is no tuned lens.
        ValueError
            It was trained on another model than the one given.
        """
        from actstore.manifest import FormatError

        with safe_open(Path(path), framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            if about.get("format") != _FORMAT:
                raise FormatError(
                    f"{path} is no tuned lens of this release (its format is "
                    f"{about.get('format')!r}, expected {_FORMAT!r})"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if model is not None and about["weights"] != model.spec.weights:
            raise ValueError(
                f"the tuned lens at {path} belongs to {about['model']} ({about['weights']}), not "
                f"to {model.spec.id} ({model.spec.weights}); train one by fit_tuned_lens"
            )
        sites = [name.removesuffix(".A") for name in tensors if name.endswith(".A")]
        maps = {site: (tensors[f"{site}.A"], tensors[f"{site}.b"]) for site in sites}
        return cls(maps, model=about["model"], weights=about["weights"])


def fit_tuned_lens(
    model: VisionModel,
    store: Store,
    sites: str | Sequence[str] = "blocks.*.resid_post",
    config: LensConfig | None = None,
) -> tuple[TunedLens, xr.Dataset]:
    """Train a tuned lens off a store.

    Parameters
    ----------
    model
        The one the store was harvested from, with a head.
    store
        Holds `sites` and the stream behind the last block.
    sites
        Places to read.
    config
        See `LensConfig`.

    Returns
    -------
    tuple
        The lens; and the mean KL divergence from the model's prediction on items held out, in
        nats, by layer: ``logit_lens`` and ``tuned_lens``.

    Raises
    ------
    ValueError
        A store of another model, a model without a head, a site that is not in the store.
    """
    from actstore.verify import check_model

    config = config or LensConfig()
    check_model(store, model)
    tail = Tail(model)
    names = [n for n in expand_sites(sites, store.sites) if n != tail.site]
    if tail.site not in store.sites:
        raise ValueError(
            f"{store.url} does not hold {tail.site}, which the lens is trained towards; it has "
            f"{', '.join(store.sites)}. Harvest it too: --sites 'blocks.*.resid_post'"
        )
    if not names:
        raise ValueError(f"nothing to train: {tail.site} is the last layer itself")
    maps = {
        site: (
            torch.zeros(tail.width, tail.width, device=model.device, requires_grad=True),
            torch.zeros(tail.width, device=model.device, requires_grad=True),
        )
        for site in names
    }
    lens = TunedLens(maps, model=model.spec.id, weights=model.spec.weights)
    solver = torch.optim.Adam([p for pair in maps.values() for p in pair], lr=config.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(solver, lambda step: 1 - step / config.steps)
    for _, batch in zip(
        range(config.steps), _batches(model, store, names, tail, config, "train"), strict=False
    ):
        solver.zero_grad()
        with torch.enable_grad():
            _divergences(tail, batch, names, lens).sum().backward()  # type: ignore[no-untyped-call]
        solver.step()
        schedule.step()
    lens.maps = {site: (a.detach(), b.detach()) for site, (a, b) in maps.items()}
    return lens, _held_out(model, store, names, tail, config, lens)


def _batches(
    model: VisionModel,
    store: Store,
    names: Sequence[str],
    tail: Tail,
    config: LensConfig,
    half: str,
) -> Iterator[Batch]:
    from actstore.loader import TokenLoader
    from actstore.selection import Split

    loader = TokenLoader(
        store,
        [*names, tail.site],
        config.batch_size,
        tokens=config.tokens,
        items=Split(half=half, holdout=config.holdout),
        seed=config.seed,
        epochs=None if half == "train" else 1,
        device=model.device,
    )
    return iter(loader)


def _divergences(tail: Tail, batch: Batch, names: Sequence[str], lens: TunedLens) -> Tensor:
    """Mean KL of every layer ``[L]``."""
    with torch.no_grad():
        goal_BC = tail.of_tokens(batch.site(tail.site)).log_softmax(-1)
    rows = torch.cat([lens(site, batch.site(site)) for site in names])
    log_LBC = tail.of_tokens(rows).log_softmax(-1).view(len(names), len(goal_BC), -1)
    return (goal_BC.exp() * (goal_BC - log_LBC)).sum(-1).mean(-1)


def _held_out(
    model: VisionModel,
    store: Store,
    names: Sequence[str],
    tail: Tail,
    config: LensConfig,
    lens: TunedLens,
) -> xr.Dataset:
    plain, tuned = torch.zeros(len(names)), torch.zeros(len(names))
    count = 0
    with torch.no_grad():
        for batch in _batches(model, store, names, tail, config, "validation"):
            plain += len(batch) * _divergences(tail, batch, names, TunedLens({})).cpu()
            tuned += len(batch) * _divergences(tail, batch, names, lens).cpu()
            count += len(batch)
    if not count:
        raise ValueError(f"no item of {store.url} was held out: raise holdout={config.holdout}")
    layers = [Site.parse(name).layer for name in names]
    return xr.Dataset(
        {
            "logit_lens": ("layer", (plain / count).numpy()),
            "tuned_lens": ("layer", (tuned / count).numpy()),
        },
        coords={"layer": layers},
        attrs={"tokens": count, "kinds": config.tokens},
    )
