"""Windowed attention: sites in image order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vitmodels
from vitmodels.families.timm_swin import FAMILY
from vitmodels.weights import seeded
from vitmodels.windows import Windows


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.integers(1, 3),
)
def test_round_trip(
    count: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], batch: int
) -> None:
    grid = (count[0] * window[0], count[1] * window[1])
    windows = Windows(grid=grid, window=window, shift=shift)
    n_windows, area = count[0] * count[1], window[0] * window[1]
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(batch * n_windows, 2, area, 5, generator=generator)
    image = windows.heads_to_image(kernel)
    assert image.shape == (batch, grid[0] * grid[1], 2, 5)
    assert torch.equal(windows.heads_from_image(image), kernel)
    pattern = torch.randn(batch * n_windows, 2, area, area, generator=generator)
    square = windows.pattern_to_image(pattern)
    assert square.shape == (batch, 2, grid[0] * grid[1], area)
    assert torch.equal(windows.pattern_from_image(square), pattern)


def test_order_is_that_of_the_image() -> None:
    image = torch.arange(36).reshape(1, 6, 6, 1)
    rolled = image.roll((-1, -1), dims=(1, 2))
    cut = rolled.reshape(1, 2, 3, 2, 3, 1).transpose(2, 3).reshape(4, 9, 1)
    windows = Windows(grid=(6, 6), window=(3, 3), shift=(1, 1))
    assert windows.to_image(cut).flatten().tolist() == list(range(36))
    with pytest.raises(ValueError, match="not cut into windows"):
        Windows(grid=(6, 5), window=(3, 3))


@pytest.mark.parametrize("variant", ["v1", "fused", "head_dim"])
def test_pattern_times_values_is_z(variant: str) -> None:
    with seeded(0):
        module = FAMILY.conformance()[variant]()
    model = vitmodels.wrap(module)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    block = module.layers[0].blocks[1]
    windows = Windows(
        grid=tuple(block.input_resolution),
        window=tuple(block.window_size),
        shift=tuple(block.shift_size),
    )
    assert any(windows.shift)
    with torch.no_grad():
        got = model.run(x, "blocks.1.{attn_in,q,k,v,scores,pattern,z}")
    pattern = windows.pattern_from_image(got["blocks.1.pattern"])
    v = windows.heads_from_image(got["blocks.1.v"])
    z = windows.heads_from_image(got["blocks.1.z"])
    torch.testing.assert_close(pattern @ v, z, rtol=1e-4, atol=1e-6)
    weight = block.attn.qkv.weight.chunk(3)[2]
    expected = torch.nn.functional.linear(
        got["blocks.1.attn_in"], weight, block.attn.qkv.bias.chunk(3)[2]
    )
    torch.testing.assert_close(got["blocks.1.v"].flatten(2), expected, rtol=1e-4, atol=1e-6)


def test_stages_have_their_own_grids() -> None:
    model = vitmodels.load("timm/swin_tiny_patch4_window7_224", device="meta")
    sites = model.sites()
    assert model.spec.n_layers == 12
    assert sites["blocks.0.resid_post"].shape == (56 * 56, 96)
    assert sites["blocks.11.resid_post"].shape == (49, 768)
    grid = sites["blocks.11.pattern"].grid
    assert grid is not None
    assert grid.patch == (7, 7)
    assert sites["blocks.1.pattern"].shape == (3, 56 * 56, 49)
