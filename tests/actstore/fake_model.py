"""A model that obeys the contract of vitmodels and costs nothing: for tests of the store."""

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vitmodels.spec import ModelSpec, SiteInfo, TokenGrid, expand_sites

WIDTH = 12
GRID = TokenGrid(cls=1, register=2, patch=(5, 5))


class FakeModel:
    """Four fixed linear maps of 4 x 4 pixel patches; every block adds one."""

    def __init__(self, *, scale: float = 1.0, delay: float = 0.0, seed: int = 0) -> None:
        self.device = torch.device("cpu")
        self.delay = delay
        self.scale = scale
        self.batches: list[int] = []
        generator = torch.Generator().manual_seed(seed)
        self._weights = torch.randn(4, 16, WIDTH, generator=generator)
        self._special = torch.randn(3, WIDTH, generator=generator)
        self.spec = ModelSpec(
            id="fake/linear",
            family="fake",
            backend="fake 1",
            weights=f"seed:{seed}",
            d_model=WIDTH,
            n_layers=4,
            n_heads=2,
            d_head=6,
            d_mlp=24,
            n_classes=10,
            grid=GRID,
            input_shape=(1, 20, 20),
            transform={"kind": "grey"},
        )

    def sites(self) -> dict[str, SiteInfo]:
        found = {}
        n = GRID.n_tokens
        for layer in range(4):
            name = f"blocks.{layer}.resid_post"
            found[name] = SiteInfo(
                name=name, axes=("token", "channel"), shape=(n, WIDTH), grid=GRID
            )
            name = f"blocks.{layer}.pattern"
            found[name] = SiteInfo(
                name=name, axes=("head", "query", "key"), shape=(2, n, n), grid=GRID
            )
        found["logits"] = SiteInfo(name="logits", axes=("class",), shape=(10,))
        return found

    def transform(self, image) -> Tensor:
        pixels = np.asarray(image.convert("L").resize((20, 20)), dtype=np.float32)
        return torch.from_numpy(pixels / 255)[None]

    def run(self, x: Tensor, sites: Sequence[str], stop_early: bool = True) -> dict[str, Tensor]:
        self.batches.append(len(x))
        time.sleep(self.delay)
        patches = x.unfold(2, 4, 4).unfold(3, 4, 4).reshape(len(x), 25, 16)
        special = self._special.expand(len(x), -1, -1)
        values, stream = {}, 0
        for layer in range(4):
            stream = stream + patches @ self._weights[layer] * self.scale
            tokens = torch.cat([special + layer, stream], dim=1)
            values[f"blocks.{layer}.resid_post"] = tokens
            heads = tokens.reshape(len(x), -1, 2, 6).transpose(1, 2)
            values[f"blocks.{layer}.pattern"] = (heads @ heads.transpose(2, 3)).softmax(-1)
        values["logits"] = values["blocks.3.resid_post"][:, 0, :10]
        return {name: values[name] for name in expand_sites(sites, values)}


def harvest_digits(out: str, delay: float = 0.0, **options) -> None:
    """Harvest digits with the fake model; the target of processes that are killed."""
    from actstore.harvester import harvest

    options = {"limit": 200, "sites": "blocks.{1,3}.resid_post", "batch_size": 8, **options}
    harvest(model=FakeModel(delay=delay), data="digits", out=out, **options)


def objects(root, folder: str = "acts") -> dict[str, bytes]:
    """Return every object of a store below a folder, by path."""
    from pathlib import Path

    base = Path(root)
    return {
        str(path.relative_to(base)): path.read_bytes()
        for path in sorted((base / folder).rglob("*"))
        if path.is_file()
    }
