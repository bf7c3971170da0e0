"""TimeSformer's two attentions against the library's own tensors and their definitions."""

import pytest
import torch
from torch import Tensor

import vitmodels
from vitmodels.hf_backend import small
from vitmodels.layouts import ClipLayouts, keys, queries
from vitmodels.model import VisionModel

pytest.importorskip("transformers")

T, SIDE, H = 3, 4, 4
N = SIDE * SIDE
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def model() -> VisionModel:
    make = small(
        "TimesformerForVideoClassification",
        num_labels=7,
        image_size=32,
        patch_size=8,
        num_frames=T,
        intermediate_size=48,
    )
    return vitmodels.wrap(make(), id="timesformer")


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(2, T, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def acts(model: VisionModel, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return model.run(x, list(model.sites()), stop_early=False)


def test_the_stream_is_that_of_the_library_by_time_then_place(
    model: VisionModel, x: Tensor, acts: dict[str, Tensor]
) -> None:
    with torch.no_grad():
        told = model.module(x, output_hidden_states=True)
    assert torch.equal(acts["logits"], told.logits)
    for i, hidden in enumerate(told.hidden_states[:-1]):
        found = acts[f"blocks.{i}.resid_pre"]
        assert torch.equal(found[:, 0], hidden[:, 0])
        for t in range(T):
            for n in range(N):
                assert torch.equal(found[:, 1 + t * N + n], hidden[:, 1 + n * T + t])


def test_the_pattern_over_space_is_that_of_the_library(
    model: VisionModel, x: Tensor, acts: dict[str, Tensor]
) -> None:
    with torch.no_grad():
        told = model.module(x, output_attentions=True)
    for i, attention in enumerate(told.attentions):
        by_frame = attention.reshape(2, T, H, N + 1, N + 1)
        found = acts[f"blocks.{i}.spatial.pattern"]
        assert found.shape == (2, H, T + T * N, N + 1)
        for t in range(T):
            assert torch.equal(found[:, :, t], by_frame[:, t, :, 0])
            rows = found[:, :, T + t * N : T + (t + 1) * N]
            assert torch.equal(rows, by_frame[:, t, :, 1:])


def test_time_attends_to_the_same_place_in_every_frame(acts: dict[str, Tensor]) -> None:
    for i in range(3):
        name = f"blocks.{i}.temporal"
        q, k, v = (acts[f"{name}.{part}"].reshape(2, T, N, H, -1) for part in "qkv")
        scores = torch.einsum("btnhd,bsnhd->bhtns", q, k) / q.shape[-1] ** 0.5
        pattern = scores.softmax(-1)
        shape = (2, H, T * N, T)
        torch.testing.assert_close(acts[f"{name}.scores"], scores.reshape(shape), **CLOSE)
        torch.testing.assert_close(acts[f"{name}.pattern"], pattern.reshape(shape), **CLOSE)
        z = torch.einsum("bhtns,bsnhd->btnhd", pattern, v).flatten(1, 2)
        torch.testing.assert_close(acts[f"{name}.z"], z, **CLOSE)


def test_space_attends_within_its_frame(model: VisionModel, acts: dict[str, Tensor]) -> None:
    for i in range(3):
        name = f"blocks.{i}.spatial"
        block = model.module.timesformer.encoder.layer[i]

        def frames(part: str, name: str = name) -> Tensor:
            value = acts[f"{name}.{part}"]
            patches = value[:, T:].reshape(2, T, N, *value.shape[2:])
            return torch.cat([value[:, :T, None], patches], dim=2)

        q, k, v = (frames(part) for part in "qkv")
        scores = torch.einsum("btqhd,btkhd->bthqk", q, k) / q.shape[-1] ** 0.5
        z = torch.einsum("bthqk,btkhd->btqhd", scores.softmax(-1), v)
        torch.testing.assert_close(frames("z"), z, **CLOSE)
        total = acts[f"{name}.head_out"].sum(-2) + block.attention.output.dense.bias
        torch.testing.assert_close(total, acts[f"{name}.attn_out"], **CLOSE)


def test_what_the_attentions_add_to_the_stream(acts: dict[str, Tensor]) -> None:
    for i in range(3):
        pre, mid = acts[f"blocks.{i}.resid_pre"], acts[f"blocks.{i}.resid_mid"]
        between = pre[:, 1:] + acts[f"blocks.{i}.temporal.attn_out"]
        seen = acts[f"blocks.{i}.spatial.resid_pre"]
        torch.testing.assert_close(seen[:, T:], between, **CLOSE)
        torch.testing.assert_close(seen[:, :T], pre[:, :1].expand(-1, T, -1), **CLOSE)
        added = acts[f"blocks.{i}.spatial.attn_out"]
        torch.testing.assert_close(mid[:, 1:], between + added[:, T:], **CLOSE)
        torch.testing.assert_close(mid[:, 0], pre[:, 0] + added[:, :T].mean(1), **CLOSE)


def test_positions_are_of_place_and_of_time(acts: dict[str, Tensor]) -> None:
    sum_ = acts["patch_embed"] + acts["pos_embed"][:, 1:]
    torch.testing.assert_close(acts["embed"][:, 1:], sum_, **CLOSE)


def test_an_edit_of_one_frame_stays_in_it_until_time_mixes(model: VisionModel, x: Tensor) -> None:
    def edit(v: Tensor) -> Tensor:
        v[:, T : T + N] = 0
        return v

    sites = "blocks.0.spatial.z,blocks.0.temporal.z"
    with torch.no_grad():
        before = model.run(x, sites)
        with model.editing({"blocks.0.spatial.v": edit}):
            after = model.run(x, sites)
    assert torch.equal(before["blocks.0.temporal.z"], after["blocks.0.temporal.z"])
    changed = (before["blocks.0.spatial.z"] != after["blocks.0.spatial.z"]).any(-1).any(-1)
    expected = torch.zeros(T + T * N, dtype=torch.bool)
    expected[0] = True  # the copy of CLS of the first frame
    expected[T : T + N] = True
    assert torch.equal(changed, expected.expand(2, -1))


def test_only_the_stream_between_the_attentions_is_read_only(model: VisionModel) -> None:
    closed = {name: s.reason for name, s in model.sites().items() if not s.editable}
    assert set(closed) == {f"blocks.{i}.spatial.resid_pre" for i in range(3)}
    with pytest.raises(ValueError, match=r"read-only.*edit temporal\.attn_out"):
        model.editing({"blocks.1.spatial.resid_pre": torch.zeros_like})


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("patches", [1, 6])
def test_layouts_are_one_to_one(frames: int, patches: int) -> None:
    layouts = ClipLayouts(frames=frames, patches=patches)
    shapes = {
        "stream": (2, 1 + frames * patches, 3),
        "lines": (2, frames * patches, 3),
        "folded": (2 * patches, frames, 3),
        "images": (2 * frames, patches, 3),
        "framed": (2 * frames, 1 + patches, 3),
    }
    for name, shape in shapes.items():
        layout = getattr(layouts, name)
        value = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
        site = layout.to_site(value)
        assert site.shape[0] == 2
        assert torch.equal(layout.from_site(site), value), name
        wide = value[:, None].expand(-1, 4, -1, -1)
        rows = queries(layout)
        assert torch.equal(rows.from_site(rows.to_site(wide)), wide), name
    both = keys(layouts.stream)
    square = torch.randn(2, 4, *(1 + frames * patches,) * 2)
    assert torch.equal(both.from_site(both.to_site(square)), square)
