"""The replacement model: equal to the model, affine, and refused where it cannot be."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import tracing_cases as cases
from torch import nn

import vitmodels
from dictlearn.circuits.replacement import replacement
from dictlearn.circuits.replacement_norms import frozen, recording
from dictlearn.circuits.replacement_parts import transcoders
from dictlearn.circuits.tracing import Readout, class_readouts, trace
from dictlearn.circuits.tracing_effects import measure
from dictlearn.config import ReLU, TopK
from dictlearn.dictionary import Dictionary
from dictlearn.formats import save
from vitmodels.families import hf_clip, hf_dinov2, hf_siglip, hf_vit, open_clip_vit, timm_vit
from vitmodels.headed import with_head
from vitmodels.model import VisionModel
from vitmodels.zeroshot import ZeroShotHead


@pytest.fixture(scope="module")
def model() -> VisionModel:
    return cases.toy()


@pytest.mark.parametrize("kind", cases.KINDS)
def test_nothing_changed_the_replacement_equals_the_model(model: VisionModel, kind: str) -> None:
    """Codes + bias + error + linear path give every MLP's output; so the logits are the model's."""
    x = cases.image(model)
    made = replacement(model, cases.KINDS[kind](), x)
    clean = model.run(x[None], ["blocks.*.mlp_in", "logits"])
    for way in ("frozen", "replaced"):
        effect = measure(made, {}, way=way, sites=["logits"])
        assert not effect["logits"].any()
    outs = made.leaves([made.leaf(layer)[None] for layer in range(2)])
    got = made.frozen_pass(made.embed[None], outs, ["blocks.*.mlp_in", "logits"])
    live = made.live_pass(1, outs, ["logits"])
    for name, value in clean.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(live["logits"], clean["logits"], rtol=1e-4, atol=1e-5)
    for code, entries, read, d in zip(
        made.codes, made.entries, made.mlp_in, made.parts.dictionaries, strict=True
    ):
        torch.testing.assert_close(code.activations(read[None])[0], d.encode(read))
        assert len(entries.token)


def test_no_hook_stays(model: VisionModel) -> None:
    x = cases.image(model)
    before = model(x[None])
    replacement(model, cases.pair(), x)
    for module in model.module.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert torch.equal(model(x[None]), before)


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.RMSNorm(6), nn.LayerNorm(6, bias=False)])
def test_a_frozen_norm_is_affine_and_right_where_it_was_recorded(norm: nn.Module) -> None:
    with torch.no_grad():
        for p in norm.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    root = nn.Sequential(norm)
    with recording(root) as recorded:
        clean = root(x)
    with frozen(recorded):
        torch.testing.assert_close(root(x), clean)
        twice = root(2 * x)
        zero = root(torch.zeros_like(x))
    torch.testing.assert_close(twice - zero, 2 * (clean - zero))
    assert not torch.allclose(root(2 * x), twice)
    assert not norm._forward_hooks


def test_a_norm_of_another_kind_is_named() -> None:
    class PowerNorm(nn.LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) ** 3

    root = nn.Sequential(nn.Identity(), PowerNorm(4))
    with (
        pytest.raises(ValueError, match=r"norm 1 \(PowerNorm\) is neither a layer norm nor an"),
        recording(root),
    ):
        root(torch.randn(2, 4))


FAMILIES = {
    **{f"timm {n}": (timm_vit, n) for n in ("plain", "distilled", "layer_scale", "clip", "swiglu")},
    **{f"timm {n}": (timm_vit, n) for n in ("registers", "siglip_map", "no_cls_gap", "post_norm")},
    "clip": (hf_clip, "projection"),
    "siglip": (hf_siglip, "pooled"),
    "vit": (hf_vit, "classifier"),
    "dinov2": (hf_dinov2, "registers"),
    "open_clip": (open_clip_vit, "layer_scale"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_columnar_families(name: str) -> None:
    """Edges and biases add up to every value, for each way of norms, gains, tokens and heads."""
    family, variant = FAMILIES[name]
    torch.manual_seed(0)
    module = family.FAMILY.conformance()[variant]().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    model = vitmodels.wrap(module)
    d = model.spec.d_model
    dictionaries = [
        Dictionary(
            {f"blocks.{i}.mlp_in": d}, {f"blocks.{i}.mlp_out": d}, latents=24, sparsify=TopK(2)
        )
        for i in range(model.spec.n_layers)
    ]
    x = torch.randn(model.spec.input_shape, generator=generator)
    made = replacement(model, dictionaries, x)
    site = made.affine[-1]
    direction = torch.randn(made.values[site].shape[1:], generator=generator)
    graph = trace(made, [Readout(name="any", site=site, direction=direction)], batch_size=16)
    assert graph.scores["residual"] < 1e-4
    assert len(graph.of_kind("latent")) > 20


def test_a_head_that_is_not_affine_is_no_place_for_a_readout() -> None:
    torch.manual_seed(0)
    model = vitmodels.wrap(hf_siglip.FAMILY.conformance()["pooled"]().eval())
    d = model.spec.d_model
    dictionaries = [
        Dictionary(
            {f"blocks.{i}.mlp_in": d}, {f"blocks.{i}.mlp_out": d}, latents=24, sparsify=TopK(2)
        )
        for i in range(model.spec.n_layers)
    ]
    made = replacement(model, dictionaries, torch.randn(model.spec.input_shape))
    assert "pooled" in made.values
    assert "pooled" not in made.affine
    readout = Readout(name="a", site="pooled", direction=torch.ones(d))
    with pytest.raises(ValueError, match=r"pooled of .* is not affine .* give readouts at .*final"):
        trace(made, [readout])
    with pytest.raises(ValueError, match=r"has no logits; give readouts at .*final"):
        trace(made)


def test_classes_of_a_zero_shot_head() -> None:
    """Cosines with the length held fixed: values are the logits, edges add up to them."""
    torch.manual_seed(0)
    tower = vitmodels.wrap(open_clip_vit.FAMILY.conformance()["gelu"]().eval())
    weight = nn.functional.normalize(torch.randn(5, 20), dim=1)
    head = ZeroShotHead(weight, scale=10.0, bias=0.0)
    model = with_head(tower, head, 5)
    d = model.spec.d_model
    dictionaries = [
        Dictionary(
            {f"blocks.{i}.mlp_in": d}, {f"blocks.{i}.mlp_out": d}, latents=24, sparsify=TopK(2)
        )
        for i in range(model.spec.n_layers)
    ]
    made = replacement(model, dictionaries, torch.randn(model.spec.input_shape))
    assert "logits" not in made.affine
    readouts = class_readouts(made, [2, 4], contrast=None)
    for readout in readouts:
        assert readout.site == "projection"
        logit = float(made.values["logits"][0, readout.index])
        assert readout.value(made) == pytest.approx(logit, rel=1e-4, abs=1e-5)
    assert trace(made, readouts).scores["residual"] < 1e-4
    between = class_readouts(made, [2], contrast=4)[0]
    assert between.value(made) == pytest.approx(
        readouts[0].value(made) - readouts[1].value(made), rel=1e-4, abs=1e-5
    )


def test_inference_mode_is_refused(model: VisionModel) -> None:
    x = cases.image(model)
    with torch.inference_mode(), pytest.raises(ValueError, match="tracing needs autograd"):
        replacement(model, cases.pair(), x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: vitmodels.load("toy/digits-2l-attn"),
            r"cannot be traced: transcoders read it, but at blocks.0.mlp_in it has no such site",
        ),
        (
            lambda: vitmodels.load("timm/swin_tiny_patch4_window7_224", pretrained=False),
            r"swin.* cannot be traced: attention patterns must be held fixed, but at blocks",
        ),
    ],
)
def test_models_that_cannot_be_traced(make: Callable[[], VisionModel], message: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=message):
        replacement(model, [], torch.zeros(model.spec.input_shape))


def test_a_nonlinear_part_is_found_by_measuring(model: VisionModel) -> None:
    """A block with an activation in its stream passes every check of names, and is refused."""
    other = vitmodels.load("toy/digits-2l")
    other.module.blocks[1].norm1 = nn.Sequential(other.module.blocks[1].norm1, nn.Tanh())
    bent = vitmodels.wrap(other.module)
    with pytest.raises(ValueError, match=r"cannot be traced: blocks\.1\.mlp_in is not affine"):
        replacement(bent, cases.pair(), cases.image(model))


def test_sae_instead_of_transcoder(model: VisionModel) -> None:
    sae = Dictionary({"blocks.0.mlp_out": 64}, latents=8, sparsify=TopK(2))
    message = r"dictionary mine reads blocks\.0\.mlp_out .*: it is an SAE; .* dictlearn train STORE"
    with pytest.raises(ValueError, match=message):
        transcoders(model, {"mine": sae, "b": cases.layer(1)})
    wrong = Dictionary(
        {"blocks.0.attn_in": 64}, {"blocks.0.mlp_out": 64}, latents=8, sparsify=TopK(2)
    )
    with pytest.raises(ValueError, match=r"reads blocks\.0\.attn_in .*needs transcoders"):
        transcoders(model, [wrong])
    back = cases.layer(1, [0, 1])
    with pytest.raises(ValueError, match="writes an earlier layer than it reads"):
        transcoders(model, [cases.layer(0), back])


def test_missing_and_double_layers(model: VisionModel) -> None:
    with pytest.raises(ValueError, match=r"has 2 layers, but no transcoder reads layer 1; train"):
        transcoders(model, [cases.layer(0)])
    with pytest.raises(ValueError, match=r"two transcoders read blocks\.0\.mlp_in"):
        transcoders(model, [cases.layer(0), cases.layer(0)])
    deep = cases.layer(2)
    with pytest.raises(ValueError, match=r"2 layers and no site blocks\.2\.mlp_in"):
        transcoders(model, [*cases.pair(), deep])


def test_another_width_and_unfit_kinds(model: VisionModel) -> None:
    wide = Dictionary(
        {"blocks.0.mlp_in": 32}, {"blocks.0.mlp_out": 32}, latents=8, sparsify=TopK(2)
    )
    with pytest.raises(ValueError, match=r"expects 32 channels at blocks\.0\.mlp_in, .* has 64"):
        transcoders(model, [wide, cases.layer(1)])
    with pytest.raises(ValueError, match="tanh_relu is not affine"):
        transcoders(model, cases.pair(sparsify=ReLU(function="tanh_relu")))
    with pytest.raises(ValueError, match="mixes all latents"):
        transcoders(model, cases.pair(latent_norm=True))


def test_transcoders_of_another_model(model: VisionModel, tmp_path: Path) -> None:
    """The digest of the weights tells it, not the name."""
    mine = model.spec.to_json()
    other = dataclasses.replace(model.spec, id="toy/other", weights="sha256:beef").to_json()
    for i, dictionary in enumerate(cases.pair()):
        save(dictionary, tmp_path / "good" / str(i), about={"model": mine})
        save(dictionary, tmp_path / "bad" / str(i), about={"model": other})
    parts = transcoders(model, tmp_path / "good")
    assert parts.names == ("0", "1")
    assert parts.paths[1].endswith("1")
    renamed = {**mine, "id": "the/same weights under another name"}
    save(cases.layer(0), tmp_path / "renamed" / "0", about={"model": renamed})
    save(cases.layer(1), tmp_path / "renamed" / "1", about={"model": renamed})
    assert len(transcoders(model, [tmp_path / "renamed"]).dictionaries) == 2
    with pytest.raises(ValueError, match=r"trained on another model: weights 'sha256:beef' .*toy/"):
        transcoders(model, tmp_path / "bad")
    with pytest.raises(FileNotFoundError, match="no dictionary at"):
        transcoders(model, tmp_path / "nowhere")


def test_one_input_at_a_time(model: VisionModel) -> None:
    x = cases.image(model)
    with pytest.raises(ValueError, match=r"one input of shape \(1, 20, 20\), got \(2, 1, 20, 20\)"):
        replacement(model, cases.pair(), x.expand(2, -1, -1, -1))
