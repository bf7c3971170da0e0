"""A clip: frames, a slider for time, attention over space and time."""

from pathlib import Path
from typing import Any

import pytest
import torch

import actstore
import dictlearn
import vitmodels
from dictlearn.dictionary import Dictionary
from dictlearn.viz.site.build import SiteOptions, build

pytestmark = pytest.mark.xdist_group("viewer")


class Clips:
    """Five clips of four frames."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return {"image": torch.randn(4, 3, 32, 32, generator=generator), "label": index % 2}


def test_a_clip_has_a_time_slider(reader: Any, tmp_path: Path) -> None:
    from vitmodels.families.hf_vivit import FAMILY

    model = vitmodels.wrap(FAMILY.conformance()["classifier"]().eval())
    data = Clips()
    site = "blocks.0.resid_post"
    store = actstore.harvest(
        model=model, data=data, sites=site, out=tmp_path / "acts.zarr", device="cpu"
    )
    grid = store.grid(site).patch
    assert len(grid) == 3
    d = Dictionary({site: model.spec.d_model}, latents=24, sparsify=dictlearn.TopK(3))
    out = tmp_path / "site"
    build(store, {"clips": (d, tmp_path)}, out, SiteOptions(items=2), model=model, data=data)
    assert len(list((out / "pictures").rglob("*.webp"))) == 2 * 4
    assert len(list((out / "data" / "attention").iterdir())) == 2 * model.spec.n_layers

    page = reader.page
    page.goto(f"{(out / 'index.html').as_uri()}#/items")
    page.locator("a.card").first.click()
    page.wait_for_selector("#time")
    assert page.locator("#time").get_attribute("max") == str(grid[0] - 1)
    assert page.locator(".stage img").get_attribute("src").endswith("-1.webp")
    page.locator("#time").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".stage img").get_attribute("src").endswith("-3.webp")
    page.wait_for_function(
        "() => document.querySelector('.stage-caption').innerText.includes('from time 1, row')"
    )
    slot = grid[1] * grid[2]
    assert f"token={1 + slot + (grid[1] // 2) * grid[2] + grid[2] // 2}" in page.url
