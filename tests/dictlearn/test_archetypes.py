"""Decoders in the hull of data, and dictionaries that start from data points or centroids."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from actstore.store import Store
from dictlearn import starts
from dictlearn.archetypes import Hull, nearest_on_simplex
from dictlearn.config import BatchTopK, Gated, JumpReLU, ReLU, Sparsify, TopK
from dictlearn.dictionary import Dictionary
from dictlearn.formats import load
from dictlearn.kernels import Step, dense_step
from dictlearn.learner import Learner
from dictlearn.losses import plain_losses
from dictlearn.schedule import TrainConfig
from dictlearn.starts import centroids, scikit
from dictlearn.trainer import train

SITE = {"blocks.0.resid_post": 16}
OTHER = {"blocks.1.resid_post": 24}
KINDS = [TopK(4), BatchTopK(4), ReLU(l1=3e-3), JumpReLU(l0=1e-3), Gated(l1=3e-3)]


def rows(store: Store, site: str) -> torch.Tensor:
    both = [store.dask(site, k).compute() for k in ("cls", "patch")]
    return torch.from_numpy(np.concatenate(both, 1)).flatten(0, 1).float()


def by_enumeration(v: np.ndarray) -> np.ndarray:
    """Project on the simplex by trying every support (the definition, for a few numbers)."""
    best, at = np.inf, v
    for size in range(1, len(v) + 1):
        for support in itertools.combinations(range(len(v)), size):
            a = np.zeros_like(v)
            a[list(support)] = v[list(support)] + (1 - v[list(support)].sum()) / size
            if a.min() >= -1e-12 and ((a - v) ** 2).sum() < best:
                best, at = ((a - v) ** 2).sum(), a
    return at


def test_nearest_on_simplex_is_the_nearest() -> None:
    values = np.random.default_rng(0).normal(size=(40, 6)) * 2
    found = nearest_on_simplex(torch.from_numpy(values))
    wanted = np.stack([by_enumeration(v) for v in values])
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-9)


def test_a_step_of_noise_does_not_blend_all_points() -> None:
    """One Adam step moves every share; the projection takes nearly all of it back."""
    generator = torch.Generator().manual_seed(0)
    share = torch.eye(8, 1000) + 1e-3 * torch.randn(8, 1000, generator=generator).sign()
    out = nearest_on_simplex(share)
    assert float(out.diagonal().min()) > 0.99
    torch.testing.assert_close(out.sum(1), torch.ones(8))
    hard = nearest_on_simplex(torch.rand(50, 3000, generator=generator).pow(30) * 1e3)
    assert float(hard.min()) >= 0
    torch.testing.assert_close(hard.sum(1), torch.ones(50))


@pytest.mark.parametrize("sparsify", KINDS, ids=str)
def test_gradients_equal_autograd_through_the_formula(sparsify: Sparsify) -> None:
    generator = torch.Generator().manual_seed(0)
    d = Dictionary(SITE, latents=12, sparsify=sparsify)
    hull = Hull(d.W_dec, 7, relax=0.3)
    hull.begin(torch.randn(7, 16, generator=generator), d.b_dec.detach() + 0.1, generator)
    hull.share_FP.data.add_(0.1 * torch.rand(12, 7, generator=generator))
    hull.beside_Fw.data.add_(torch.randn(12, 16, generator=generator))
    hull.project()
    assert float(hull.beside_Fw.detach().norm(dim=1).max()) == pytest.approx(0.3)
    x = torch.randn(32, 16, generator=generator)
    dense_step(d, x, x, Step())
    hull.backward()

    share = hull.share_FP.detach().clone().requires_grad_()
    beside = hull.beside_Fw.detach().clone().requires_grad_()
    formula = share @ hull.points_Pw + beside
    torch.testing.assert_close(d.W_dec.detach(), formula.detach())
    parameters = {**dict(d.named_parameters()), "W_dec": formula}
    with torch.enable_grad():
        loss = torch.func.functional_call(_Loss(d), {f"d.{k}": v for k, v in parameters.items()}, x)
        loss.backward()
    assert share.grad is not None
    assert float(share.grad.abs().max()) > 0
    torch.testing.assert_close(hull.share_FP.grad, share.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(hull.beside_Fw.grad, beside.grad, atol=1e-6, rtol=1e-5)


class _Loss(torch.nn.Module):
    def __init__(self, d: Dictionary) -> None:
        super().__init__()
        self.d = d

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(list(plain_losses(self.d, x, x).values())).sum()


@pytest.mark.parametrize("sparsify", [TopK(4), BatchTopK(4), JumpReLU(l0=1e-3)], ids=str)
def test_an_archetypal_dictionary_learns_inside_of_the_hull(
    store: Store, sparsify: Sparsify
) -> None:
    config = TrainConfig(
        steps=200, batch_size=128, lr=8e-3, archetypes=120, normalize="none", ema=0.9
    )
    d = Dictionary(SITE, latents=48, sparsify=sparsify)
    (done,) = train(store, d, config)
    x = rows(store, "blocks.0.resid_post")
    with torch.no_grad():
        fvu = float((d(x) - x).square().sum() / (x - x.mean(0)).square().sum())
    assert fvu < 0.45
    assert done.metrics["fvu"] < 0.45
    # inside of the hull of all tokens: no direction in which an atom goes beyond every token
    points = x - x.mean(0)
    direction = torch.randn(16, 4000, generator=torch.Generator().manual_seed(1))
    direction = torch.cat([direction, d.W_dec.detach().T], 1)
    scale = _mean_norm_of_the_points(store, d)
    reach = (d.W_dec.detach() * scale @ direction).amax(0)
    assert bool((reach <= (points @ direction).amax(0) + 1e-3).all())


def _mean_norm_of_the_points(store: Store, d: Dictionary) -> float:
    """Upper bound of the unit the points were divided by: no smaller value passes for larger."""
    x = rows(store, "blocks.0.resid_post")
    return 0.8 * float((x - x.mean(0)).norm(dim=1).mean())


def test_state_holds_the_hull_and_the_decoder_is_its_product(store: Store, tmp_path: Path) -> None:
    config = TrainConfig(
        steps=40, batch_size=64, lr=5e-3, archetypes=20, relax=0.1, checkpoint_every=10
    )

    def run(name: str, stop: int | None) -> None:
        def on_event(event: object) -> None:
            if stop is not None and getattr(event, "step", 0) >= stop:
                raise KeyboardInterrupt

        d = Dictionary(SITE, latents=48, sparsify=TopK(4))
        train(store, d, config, out=tmp_path / name, on_event=on_event)

    run("whole", None)
    with pytest.raises(KeyboardInterrupt):
        run("cut", 20)
    run("cut", None)
    a, b = (load(tmp_path / n / "blocks.0.resid_post").state_dict() for n in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)

    d = Dictionary(SITE, latents=48, sparsify=TopK(4))
    learner = Learner(name="a", dictionary=d, config=config)
    from dictlearn import checkpoint

    newest = checkpoint.latest(tmp_path / "whole")
    assert newest is not None
    checkpoint.read(newest, [learner])
    assert learner.hull is not None
    share, beside = learner.hull.share_FP.detach(), learner.hull.beside_Fw.detach()
    assert float(share.min()) >= 0
    torch.testing.assert_close(share.sum(1), torch.ones(48))
    assert float((share > 0).sum(1).float().mean()) < 20
    assert 0 < float(beside.norm(dim=1).max()) <= 0.1 + 1e-6
    torch.testing.assert_close(d.W_dec.detach(), share @ learner.hull.points_Pw + beside)


def test_rows_start_at_tokens(store: Store) -> None:
    d = Dictionary(SITE, latents=48, sparsify=TopK(4))
    t = Dictionary(SITE, OTHER, latents=48, sparsify=TopK(4))
    config = TrainConfig(
        steps=1, batch_size=64, lr=1e-12, init_decoder="points", normalize="none", clip=0
    )
    train(store, [d, t], config)
    x, y = rows(store, "blocks.0.resid_post"), rows(store, "blocks.1.resid_post")
    unit = torch.nn.functional.normalize
    inputs, outputs = unit(x - x.mean(0), dim=1), unit(y - y.mean(0), dim=1)
    same = d.W_dec.detach() @ inputs.T
    assert float(same.amax(1).min()) > 0.9999
    assert len(set(same.argmax(1).tolist())) > 44  # some tokens of the store are equal
    torch.testing.assert_close(d.W_enc.T, d.W_dec, atol=1e-6, rtol=0)
    read, wrote = t.W_enc.detach().T @ inputs.T, t.W_dec.detach() @ outputs.T
    assert float(torch.minimum(read, wrote).amax(1).min()) > 0.9999  # of one token


def test_centroids_are_those_of_the_clusters() -> None:
    pytest.importorskip("sklearn")
    generator = torch.Generator().manual_seed(0)
    middle = 10 * torch.randn(5, 8, generator=generator)
    of = torch.arange(500) % 5
    target = middle[of] + 0.1 * torch.randn(500, 8, generator=generator)
    source = torch.cat([target[:, :3] * 2, torch.ones(500, 1)], 1)
    found_source, found = centroids(source, target, 5)
    distance = torch.cdist(found, middle)
    assert sorted(distance.argmin(1).tolist()) == [0, 1, 2, 3, 4]
    assert float(distance.amin(1).max()) < 0.2
    torch.testing.assert_close(found_source[:, :3], 2 * found[:, :3], atol=0.1, rtol=0)
    with pytest.raises(ValueError, match=r"600 clusters are asked for of 500 tokens"):
        centroids(source, target, 600)


def test_starting_from_centroids_begins_nearer(store: Store) -> None:
    pytest.importorskip("sklearn")
    fvu = {}
    for how in ("random", "kmeans"):
        d = Dictionary(SITE, latents=32, sparsify=TopK(1))
        config = TrainConfig(steps=1, batch_size=256, lr=1e-12, init_decoder=how, clip=0)  # type: ignore[arg-type]
        fvu[how] = train(store, d, config)[0].metrics["fvu"]
    assert fvu["kmeans"] < 0.9 * fvu["random"]
    d = Dictionary(SITE, latents=40, sparsify=TopK(4))
    config = TrainConfig(steps=60, batch_size=64, lr=5e-3, init_decoder="kmeans", archetypes=30)
    assert train(store, d, config)[0].metrics["fvu"] < 0.6


def test_errors(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    d = Dictionary(SITE, latents=48, sparsify=TopK(4))
    with pytest.raises(ValueError, match=r"600 data points \(archetypes\), an epoch .* has 512"):
        train(store, d, TrainConfig(steps=1, batch_size=64, archetypes=600))
    with pytest.raises(ValueError, match=r"set archetypes"):
        TrainConfig(relax=0.1)
    with pytest.raises(ValueError, match=r"would leave the hull"):
        TrainConfig(archetypes=5, resample_every=10)
    with pytest.raises(ValueError, match=r"init_decoder='means' is not one of"):
        TrainConfig(init_decoder="means")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ValueError, match=r"KMeans needs scikit-learn.*pip install 'actstore"):
        scikit("cluster", "KMeans")


def test_parts_of_a_factorisation() -> None:
    """Planted signed directions, each seen alone, come back; the inputs are those that use them."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(6, 10, generator=generator), dim=1)
    which = torch.arange(600) % 6
    strength = 1 + torch.rand(600, 1, generator=generator)
    center = torch.randn(10, generator=generator)
    target = center + strength * atoms[which]
    x = torch.nn.functional.one_hot(which, 6).float()
    mean, part = starts.parts(x, target, center, 6, seed=0)
    cosine = torch.nn.functional.normalize(part - center, dim=1) @ atoms.T
    assert (cosine.max(0).values > 0.9).all()
    assert torch.equal(mean.argmax(1), cosine.argmax(1))
    with pytest.raises(ValueError, match="7 parts are asked for of 6 tokens"):
        starts.parts(x[:6], target[:6], center, 7)


def test_a_decoder_that_starts_from_a_factorisation(store: Store) -> None:
    d = Dictionary({"blocks.0.resid_post": 16}, latents=20, sparsify=TopK(3))
    config = TrainConfig(steps=1, batch_size=64, lr=1e-9, init_decoder="nmf", normalize="none")
    before = d.W_dec.detach().clone()
    train(store, d, config)
    assert not torch.allclose(d.W_dec, before)
    torch.testing.assert_close(d.W_dec.norm(dim=1), torch.ones(20))
    torch.testing.assert_close(d.W_enc.T, d.W_dec, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="archetypes excludes init_decoder=nmf"):
        TrainConfig(init_decoder="nmf", archetypes=10)
