"""Running, editing, loading: behaviour that does not depend on the family."""

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import vitmodels
from vitmodels.edits import at_heads, at_tokens, replace, shift, zero
from vitmodels.model import VisionModel


@pytest.fixture(scope="module")
def model() -> VisionModel:
    return vitmodels.load("toy/digits-2l", pretrained=False, seed=3)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(3, 1, 20, 20, generator=torch.Generator().manual_seed(0))


def _n_hooks(model: VisionModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules())


def test_stop_early_stops(model: VisionModel, x: Tensor) -> None:
    calls: list[str] = []
    handles = [
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
        for i, block in enumerate(model.module.blocks)
    ]
    model.run(x, "blocks.0.resid_post")
    assert calls == [0]
    model.run(x, "blocks.0.z")
    assert calls == [0]
    model.run(x, "blocks.0.resid_post", stop_early=False)
    assert calls == [0, 0, 1]
    for handle in handles:
        handle.remove()
    assert _n_hooks(model) == 0


def test_reading_with_and_without_grad(model: VisionModel, x: Tensor) -> None:
    with torch.no_grad():
        plain = model.run(x, "blocks.1.resid_post")["blocks.1.resid_post"]
    with torch.inference_mode():
        assert torch.equal(model.run(x, "blocks.1.resid_post")["blocks.1.resid_post"], plain)
    given = x.clone().requires_grad_(True)
    value = model.run(given, "blocks.1.resid_post")["blocks.1.resid_post"]
    assert torch.equal(value, plain)
    (grad,) = torch.autograd.grad(value.sum(), given)
    assert grad.abs().sum() > 0


def test_edits_compose_and_nest(model: VisionModel, x: Tensor) -> None:
    site = "blocks.0.resid_post"
    plain = model.run(x, site)[site]
    with model.editing({site: lambda a: a + 1}):
        with model.editing({site: lambda a: a * 2, "blocks.1.mlp_out": zero}):
            got = model.run(x, [site, "blocks.1.mlp_out"])
            assert torch.allclose(got[site], (plain + 1) * 2)
            assert not got["blocks.1.mlp_out"].any()
        assert torch.allclose(model.run(x, site)[site], plain + 1)
        output = model(x)
    assert torch.equal(model.run(x, site)[site], plain)
    assert not torch.allclose(output, model(x))
    assert _n_hooks(model) == 0


def test_edit_in_place_does_not_reach_what_was_read(model: VisionModel, x: Tensor) -> None:
    plain = model.run(x, "blocks.*.resid_p*")

    def wipe(a: Tensor) -> Tensor:
        a[:] = 0
        return a

    with model.editing({"blocks.1.resid_pre": wipe}):
        got = model.run(x, "blocks.*.resid_p*")
    assert torch.equal(got["blocks.0.resid_post"], plain["blocks.0.resid_post"])
    assert not got["blocks.1.resid_pre"].any()


def test_exceptions_restore(model: VisionModel, x: Tensor) -> None:
    def fail(_: Tensor) -> Tensor:
        raise ArithmeticError("mine")

    for site in ("blocks.0.resid_mid", "blocks.0.pattern", "blocks.0.q"):
        with pytest.raises(ArithmeticError, match="mine"), model.editing({site: fail}):
            model(x)
        assert _n_hooks(model) == 0
    with torch.no_grad():  # a function mode left behind would call fail again
        assert torch.equal(model(x), model.module(x))


def test_splicing_keeps_the_graph(model: VisionModel, x: Tensor) -> None:
    scale = torch.ones(64, requires_grad=True)
    with model.editing({"blocks.0.resid_post": lambda a: a * scale}):
        model(x).sum().backward()
    assert scale.grad is not None
    assert scale.grad.abs().sum() > 0


def test_grad_of_matches_finite_differences() -> None:
    model = vitmodels.load("toy/digits-2l", pretrained=False, seed=3, dtype=torch.float64)
    x = torch.randn(2, 1, 20, 20, generator=torch.Generator().manual_seed(0)).double()
    for site in ("blocks.0.pattern", "blocks.1.resid_mid", "blocks.0.v"):
        got = model.run(x, site, grad_of=lambda out: out[:, 3].sum())
        direction = torch.randn(
            got[site].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
        with model.editing({site: lambda a, d=direction: a + 1e-5 * d}):
            up = model(x)[:, 3].sum()
        with model.editing({site: lambda a, d=direction: a - 1e-5 * d}):
            down = model(x)[:, 3].sum()
        expected = (up - down) / 2e-5
        assert torch.allclose((got[f"{site}.grad"] * direction).sum(), expected, rtol=1e-5)


def test_compiled_blocks(x: Tensor) -> None:
    model = vitmodels.load("toy/digits-2l", pretrained=False, seed=3)
    with torch.no_grad():
        plain = model.run(x, "*", stop_early=False)
        traced: list[int] = []

        def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
            traced.append(len(graph.graph.nodes))
            return graph

        model.compile(backend=backend)
        torch.testing.assert_close(model(x), plain["logits"])
        assert traced, "nothing was compiled"
        graphs = len(traced)
        border = model.run(x, "blocks.1.resid_pre,final")
        torch.testing.assert_close(border["final"], plain["final"])
        inside = model.run(x, "blocks.*.pattern,blocks.*.mlp_out", stop_early=False)
        for name, value in inside.items():
            assert torch.equal(value, plain[name]), name
        with model.editing({"blocks.1.mlp_out": zero}):
            got = model.run(x, "blocks.1.{resid_mid,resid_post}")
            edited = model(x)
        assert torch.equal(got["blocks.1.resid_mid"], got["blocks.1.resid_post"])
        assert not torch.allclose(edited, plain["logits"])
        with model.editing({"blocks.0.resid_post": zero}):
            assert not model.run(x, "blocks.1.resid_pre")["blocks.1.resid_pre"].any()
        assert list(model.sites()) == list(plain)
        assert len(traced) == graphs
    torch._dynamo.reset()


def test_edit_helpers(model: VisionModel, x: Tensor) -> None:
    sites = model.sites()
    plain = model.run(x, "blocks.0.z,blocks.0.pattern,blocks.0.resid_post")
    with model.editing({"blocks.0.z": at_heads([0, 2], zero)}):
        z = model.run(x, "blocks.0.z")["blocks.0.z"]
    assert not z[:, :, [0, 2]].any()
    assert torch.equal(z[:, :, [1, 3]], plain["blocks.0.z"][:, :, [1, 3]])
    pattern = sites["blocks.0.pattern"]
    with model.editing({"blocks.0.pattern": at_heads(1, zero, axes=pattern.axes)}):
        got = model.run(x, "blocks.0.pattern,blocks.0.z")
    assert not got["blocks.0.pattern"][:, 1].any()
    assert not got["blocks.0.z"][:, :, 1].any()
    assert torch.allclose(got["blocks.0.z"][:, :, 0], plain["blocks.0.z"][:, :, 0], atol=1e-6)
    with model.editing({"blocks.0.pattern": at_tokens("cls", zero, pattern)}):
        got = model.run(x, "blocks.0.pattern")
    assert not got["blocks.0.pattern"][:, :, 0].any()
    assert got["blocks.0.pattern"][:, :, 1:].any()
    post = sites["blocks.0.resid_post"]
    direction = torch.arange(64.0)
    with model.editing({"blocks.0.resid_post": at_tokens("patch", shift(direction, 2.0), post)}):
        got = model.run(x, "blocks.0.resid_post")
    moved = got["blocks.0.resid_post"] - plain["blocks.0.resid_post"]
    assert not moved[:, 0].any()
    assert torch.allclose(moved[:, 1:], 2 * direction.expand(3, 25, 64), atol=1e-4)
    with model.editing({"blocks.0.resid_post": replace(torch.ones(64))}):
        assert (model.run(x, "blocks.0.resid_post")["blocks.0.resid_post"] == 1).all()
    with (
        pytest.raises(ValueError, match="no number 9"),
        model.editing({"blocks.0.z": at_heads(9, zero)}),
    ):
        model(x)


@pytest.mark.parametrize(
    ("site", "edit", "message"),
    [
        ("blocks.9.resid_post", zero, r"nearest: blocks\."),
        ("blocks.0.resid_post", 3, "must be a function, not int"),
        ("blocks.0.resid_post", lambda a: a[:, :1], r"returned \(3, 1, 64\).*\(3, 26, 64\)"),
        ("blocks.0.resid_post", lambda a: None, "returned NoneType"),
    ],
)
def test_wrong_edits(model: VisionModel, x: Tensor, site: str, edit, message: str) -> None:
    with pytest.raises(ValueError, match=message), model.editing({site: edit}):
        model(x)
    assert _n_hooks(model) == 0


def test_run_inside_of_an_edit_is_refused(model: VisionModel, x: Tensor) -> None:
    def patch(value: Tensor) -> Tensor:
        return model.run(x.flip(0), "blocks.0.z")["blocks.0.z"]

    with (
        model.editing({"blocks.0.z": patch}),
        pytest.raises(ValueError, match="get the values first, then edit"),
    ):
        model.run(x, "logits")
    assert _n_hooks(model) == 0
    other = model.run(x.flip(0), "blocks.0.z")["blocks.0.z"]
    with model.editing({"blocks.0.z": replace(other)}):
        assert torch.equal(model.run(x, "blocks.0.z")["blocks.0.z"], other)


def test_sites_of_a_giant_take_less_than_a_second() -> None:
    model = vitmodels.load("timm/vit_giant_patch14_dinov2", device="meta")
    start = time.process_time()
    sites = model.sites()
    assert time.process_time() - start < 1
    assert sites["blocks.39.pattern"].shape == (24, 1370, 1370)


def test_wrong_inputs(model: VisionModel, x: Tensor) -> None:
    with pytest.raises(ValueError, match="looks like clips"):
        model(torch.zeros(1, 8, 1, 20, 20))
    with pytest.raises(ValueError, match=r"takes inputs of \(1, 20, 20\), got \(1, 28, 28\)"):
        model.run(torch.zeros(1, 1, 28, 28), "embed")
    with pytest.raises(ValueError, match=r"see model\.transform"):
        model([1, 2])  # type: ignore[arg-type]
    with torch.inference_mode(), pytest.raises(ValueError, match=r"outside of torch\.inference"):
        model.run(x, "embed", grad_of=lambda out: out.sum())
    with pytest.raises(ValueError, match="must return a scalar"):
        model.run(x, "embed", grad_of=lambda out: out)


def test_seed_and_digest() -> None:
    one = vitmodels.load("toy/digits-1l", pretrained=False, seed=0)
    state = torch.random.get_rng_state()
    same = vitmodels.load("toy/digits-1l", pretrained=False, seed=0)
    other = vitmodels.load("toy/digits-1l", pretrained=False, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.spec == same.spec
    assert one.spec.weights != other.spec.weights
    half = vitmodels.load("toy/digits-1l", pretrained=False, dtype=torch.bfloat16)
    assert half.spec.weights != one.spec.weights
    assert one.spec.transform == one.transform.describe()


def test_meta_device_lists_sites_without_weights() -> None:
    model = vitmodels.load("timm/vit_base_patch16_224", device="meta")
    assert all(p.is_meta for p in model.module.parameters())
    assert model.sites()["blocks.11.resid_post"].shape == (197, 768)
    assert model.spec.weights == "meta"


def test_wrap_finds_the_family() -> None:
    from timm.models.vision_transformer import VisionTransformer

    module = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    model = vitmodels.wrap(module, id="mine")
    assert (model.spec.family, model.spec.d_head) == ("timm_vit", 8)
    with pytest.raises(ValueError, match=r"no family describes torch\.nn.*adding-a-model"):
        vitmodels.wrap(nn.Linear(2, 2))


def test_unknown_models() -> None:
    with pytest.raises(ValueError, match=r"nearest: timm/vit_small_patch16_224.*list_models"):
        vitmodels.load("timm/vit_smal_patch16_224")
    with pytest.raises(ValueError, match=r"timm/resnet18' cannot be served.*timm\.models\.resnet"):
        vitmodels.load("timm/resnet18")
    with pytest.raises(ValueError, match="nearest: toy/digits-"):
        vitmodels.load("toy/digits-9l")
    with pytest.raises(ValueError, match=r"no checkpoint 'augregg_in21k'.*augreg_in21k"):
        vitmodels.load("timm/vit_base_patch16_224.augregg_in21k")


def test_local_weights(tmp_path: Path, x: Tensor, model: VisionModel) -> None:
    state = model.module.state_dict()
    for path, save in (
        (tmp_path / "w.safetensors", save_file),
        (tmp_path / "w.pt", torch.save),
        (tmp_path / "nested.pt", lambda sd, p: torch.save({"state_dict": sd, "epoch": 3}, p)),
    ):
        save(state, path)
        again = vitmodels.load("toy/digits-2l", weights=path)
        assert torch.equal(again(x), model(x))
        assert again.spec.weights == model.spec.weights


def test_wrong_weights(tmp_path: Path, model: VisionModel) -> None:
    with pytest.raises(FileNotFoundError, match="no weights file"):
        vitmodels.load("toy/digits-2l", weights=tmp_path / "none.safetensors")
    save_file(model.module.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"blocks\.1\.\S+ \(64,\) has no place"):
        vitmodels.load("toy/digits-1l", weights=tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"does not fit timm/test_vit: .* \(1, 26, 64\)"):
        vitmodels.load("timm/test_vit", weights=tmp_path / "w.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a safetensors file"):
        vitmodels.load("toy/digits-2l", weights=tmp_path / "bad.safetensors")
    torch.save({"a": [1, 2]}, tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        vitmodels.load("toy/digits-2l", weights=tmp_path / "list.pt")


def test_position_embedding_is_resampled(tmp_path: Path) -> None:
    big = vitmodels.load("timm/test_vit", pretrained=False)
    save_file(big.module.state_dict(), tmp_path / "w.safetensors")
    small = vitmodels.load("timm/test_vit", weights=tmp_path / "w.safetensors", img_size=96)
    assert small.spec.input_shape == (3, 96, 96)
    assert small.spec.grid.patch == (6, 6)
    assert small.transform.describe()["input_size"] == [3, 96, 96]
    assert torch.equal(small.module.blocks[0].attn.qkv.weight, big.module.blocks[0].attn.qkv.weight)


def test_real_weights(shared: Path) -> None:
    path = shared / "data/vit_small_patch14_dinov2_derived.safetensors"
    for size, grid in ((224, (16, 16)), (98, (7, 7))):
        model = vitmodels.load("timm/vit_small_patch14_dinov2", weights=path, img_size=size)
        assert model.spec.grid.patch == grid
        from PIL import Image

        photo = next(iter(sorted((shared / "data/photos").glob("*/*.jpg"))))
        x = model.transform(Image.open(photo))[None]
        assert x.shape == (1, 3, size, size)
        with torch.inference_mode():
            assert torch.isfinite(model.run(x, "blocks.7.resid_post")["blocks.7.resid_post"]).all()
