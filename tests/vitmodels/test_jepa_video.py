"""V-JEPA 1 on timm's ViT: the published layout loads, and the output is the encoder's formula."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitmodels
from vitmodels.families import jepa_video

pytest.importorskip("transformers")

SMALL = {"img_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 4}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish one more encoder: the largest there is, made small."""
    monkeypatch.setitem(jepa_video._SIZES, "small", SMALL)


def _state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    module = jepa_video.encoder(patch_size=16, **SMALL)
    return {
        key: 0.3 * torch.randn(value.shape, generator=generator)
        for key, value in module.state_dict().items()
    }


def _formula(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Compute the encoder of arXiv:2404.08471 from its weights, in float64: [B, T, C, H, W]."""
    w = {key: value.double() for key, value in state.items()}

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, value: Tensor) -> Tensor:
        return F.layer_norm(value, (24,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    boxes = x.double().unfold(1, 2, 2).unfold(3, 16, 16).unfold(4, 16, 16)  # B t C h w 2 16 16
    boxes = boxes.permute(0, 1, 3, 4, 2, 5, 6, 7).flatten(4).flatten(1, 3)
    kernel = w["patch_embed.proj.weight"].flatten(1)
    r = boxes @ kernel.T + w["patch_embed.proj.bias"] + w["pos_embed"]
    for i in range(2):
        qkv = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", r))
        q, k, v = qkv.unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 1, 4)
        z = ((q @ k.transpose(-1, -2)) / 6**0.5).softmax(-1) @ v
        r = r + linear(f"blocks.{i}.attn.proj", z.transpose(1, 2).flatten(2))
        hidden = F.gelu(linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", r)))
        r = r + linear(f"blocks.{i}.mlp.fc2", hidden)
    return norm("norm", r)


@pytest.mark.usefixtures("small")
def test_a_published_checkpoint_loads_and_gives_the_formula(tmp_path: Path) -> None:
    state = _state()
    saved = {f"module.backbone.{key}": value for key, value in state.items()}
    other = {key: torch.zeros_like(value) for key, value in saved.items()}
    checkpoint = {"encoder": other, "predictor": {}, "target_encoder": saved, "epoch": 90}
    torch.save(checkpoint, tmp_path / "vith16.pth.tar")
    model = vitmodels.load("vjepa/small", weights=tmp_path / "vith16.pth.tar")
    x = torch.randn(2, 16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model(x)
        acts = model.run(x, "final,blocks.1.resid_post", stop_early=False)
    assert torch.equal(acts["final"], out)
    torch.testing.assert_close(out.double(), _formula(state, x), rtol=1e-4, atol=1e-4)


def test_tokens_run_over_time_then_height_then_width() -> None:
    model = vitmodels.wrap(jepa_video.encoder(frames=4, patch_size=8, **SMALL), id="small")
    assert model.spec.family == "jepa_video"
    assert model.spec.grid.patch == (2, 2, 2)
    x = torch.zeros(1, 4, 3, 16, 16)
    x[0, 3, :, 0, 15] = 1.0  # second tubelet, upper row, right column
    with torch.no_grad():
        tokens = model.run(x, "patch_embed")["patch_embed"]
        empty = model.run(torch.zeros_like(x), "patch_embed")["patch_embed"]
    assert (tokens != empty).any(-1).nonzero().tolist() == [[0, 1 * 4 + 0 * 2 + 1]]


def test_published_sizes_build_without_memory() -> None:
    for name, side, width in (("vitl16", 14, 1024), ("vith16", 14, 1280), ("vith16-384", 24, 1280)):
        model = vitmodels.load(f"vjepa/{name}", device="meta")
        assert model.sites()["blocks.0.resid_post"].shape == (8 * side * side, width)
        assert model.spec.grid.kinds == ("patch",)


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    with pytest.raises(ValueError, match=r"takes frames of 16 x 16, not 32"):
        vitmodels.load("vjepa/small", pretrained=False, img_size=32)
    torch.save({"target_encoder": {"module.backbone.pos_embed": torch.zeros(1)}}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"does not fit vjepa/small: pos_embed is \(1,\)"):
        vitmodels.load("vjepa/small", weights=tmp_path / "w.pt")

    def refuse(*args: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"vjepa/small could .*no route.*weights="):
        vitmodels.load("vjepa/small")
    model = vitmodels.load("vjepa/small", pretrained=False)
    with pytest.raises(ValueError, match="takes clips"):
        model(torch.zeros(1, 3, 16, 16))
    assert isinstance(model.module, nn.Module)
