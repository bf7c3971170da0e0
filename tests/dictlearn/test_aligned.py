"""Stores of two models as one: a crosscoder over both, and stores that do not fit."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import actstore
from actstore.aligned import align, open_aligned, sequential
from actstore.aligned_loader import AlignedLoader
from actstore.store import Store
from dictlearn.cli import main
from dictlearn.config import TopK
from dictlearn.dictionary import Dictionary
from dictlearn.evaluation import evaluate
from dictlearn.progress import TrainEvent
from dictlearn.schedule import TrainConfig
from dictlearn.trainer import train

SITE = "blocks.0.resid_post"
BOTH = {f"a.{SITE}": 16, f"b.{SITE}": 24}
CONFIG = TrainConfig(steps=30, batch_size=60, lr=2e-2, holdout=0.2, checkpoint_every=10)


def write(folder: Path, name: str, width: int, **options: object) -> Store:
    """A linear view of codes that all stores share; every value knows its item and token."""
    tokens, items, key = (options.pop(k, v) for k, v in (("tokens", 9), ("items", 60), ("key", "")))
    rng = np.random.default_rng(7)
    codes = (rng.random((items, tokens, 24)) < 0.15) * rng.random((items, tokens, 24))
    values = codes @ np.random.default_rng(width).normal(size=(24, width))
    arrays = {SITE: {"cls": values[:, :1], "patch": values[:, 1:]}}
    defaults = {"items_per_part": 10, "seed": 3, "dtype": "float32"}
    rows = {"label": np.arange(items) % 3, "key": [f"{key}{i}" for i in range(items)]}
    return actstore.write_arrays(
        folder / f"{name}.zarr",
        arrays,
        table=rows,
        **(defaults | options),  # type: ignore[arg-type]
    )


@pytest.fixture
def stores(tmp_path: Path) -> tuple[Store, Store]:
    return write(tmp_path, "a", 16), write(tmp_path, "b", 24, dtype="float16")


def test_rows_correspond(stores: tuple[Store, Store]) -> None:
    joined = align(a=stores[0], b=stores[1])
    assert joined.sites == tuple(BOTH)
    loader = AlignedLoader(joined, list(BOTH)[::-1], 50, epochs=1)
    seen = 0
    for batch in loader:
        seen += len(batch)
        for name, store in zip("ab", stores, strict=True):
            got = batch.site(f"{name}.{SITE}").numpy()
            every = np.concatenate(
                [store.items(batch.item.numpy(), SITE, k) for k in ("cls", "patch")], 1
            )
            expected = every[np.arange(len(batch)), batch.token.numpy()]
            np.testing.assert_array_equal(got, expected.astype(np.float32))
    assert seen == 540
    opened = open_aligned(f"a={stores[0].url},b={stores[1].url}")
    assert opened.fingerprint == joined.fingerprint
    assert open_aligned(stores[0].url).fingerprint == stores[0].fingerprint
    rows = sum(len(b) for b in sequential(joined, list(BOTH), 64, tokens="patch"))
    assert rows == 480


def test_a_crosscoder_over_two_models(stores: tuple[Store, Store], tmp_path: Path) -> None:
    joined = align(a=stores[0], b=stores[1])

    def fresh() -> list[Dictionary]:
        crosscoder = Dictionary(BOTH, latents=80, sparsify=TopK(6))
        over = Dictionary({f"a.{SITE}": 16}, {f"b.{SITE}": 24}, latents=64, sparsify=TopK(6))
        return [crosscoder, over]

    whole = train(joined, fresh(), CONFIG)
    report = evaluate(whole[0].dictionary, joined)
    assert report.fvu < 0.6
    assert set(report.fvu_by_site) == set(BOTH)

    class Killed(BaseException):
        pass

    def kill(event: TrainEvent) -> None:
        if event.kind == "checkpoint" and event.step == 20:
            raise Killed

    with pytest.raises(Killed):
        train(joined, fresh(), CONFIG, out=tmp_path / "run", on_event=kill)
    again = train(joined, fresh(), CONFIG, out=tmp_path / "run")
    for one, other in zip(whole, again, strict=True):
        for name, value in one.dictionary.state_dict().items():
            assert torch.equal(other.dictionary.state_dict()[name], value)
    both = f"a={stores[0].url},b={stores[1].url}"
    assert main(["eval", str(tmp_path / "run"), "--store", both, "--device", "cpu"]) == 0
    swapped = align(a=stores[0], b=write(tmp_path, "c", 24, dtype="bfloat16"))
    with pytest.raises(ValueError, match="The activations changed since this run began"):
        train(swapped, fresh(), CONFIG, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 4}, "order of the items: .*'seed': 3.* and .*'seed': 4"),
        ({"items": 50}, "items: 60 and 50"),
        ({"items_per_part": 20}, "items per part: 10 and 20.*--items-per-part 10"),
        ({"key": "x"}, "index: different items at the same positions"),
    ],
)
def test_stores_of_other_items(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"do not hold the same items.*{message}"):
        align(a=write(tmp_path, "a", 16), b=write(tmp_path, "b", 24, **options))


def test_tokens_that_do_not_correspond(tmp_path: Path) -> None:
    joined = align(a=write(tmp_path, "a", 16), b=write(tmp_path, "b", 24, tokens=5))
    d = Dictionary(BOTH, latents=80, sparsify=TopK(4))
    with pytest.raises(ValueError, match=r"a: 9 tokens.*b: 5 tokens.*such as tokens='cls'"):
        train(joined, d, CONFIG)
    train(joined, d, dataclasses.replace(CONFIG, steps=2, batch_size=20, tokens="cls"))


def test_names(stores: tuple[Store, Store]) -> None:
    with pytest.raises(ValueError, match="at least two stores"):
        align(a=stores[0])
    joined = align(a=stores[0], b=stores[1])
    with pytest.raises(
        KeyError, match=r"have no site 'c.blocks.0.resid_post'; nearest: [ab].blocks"
    ):
        train(joined, Dictionary({f"c.{SITE}": 16}, latents=80, sparsify=TopK(4)), CONFIG)
    with pytest.raises(
        ValueError, match=r"has 12 channels at 'a.blocks.0.resid_post', .* stores 16"
    ):
        train(joined, Dictionary({f"a.{SITE}": 12}, latents=80, sparsify=TopK(4)), CONFIG)
