"""A logit is the sum of its parts, in every family whose head is affine behind its norms."""

import importlib.metadata

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

import vitmodels
from dictlearn.circuits.heads import with_probe
from dictlearn.circuits.logit_attribution import attribute_logits, total
from dictlearn.config import BatchTopK, Input, TopK
from dictlearn.dictionary import Dictionary
from vitmodels.edits import at_heads, zero
from vitmodels.family import Family
from vitmodels.headed import with_head
from vitmodels.registry import families
from vitmodels.weights import seeded
from vitmodels.zeroshot import ZeroShotHead

NOT_AFFINE = {
    "hf_vjepa2/classifier": "pools by attention",
    "timm_vit/siglip_map": "pools by attention",
    "timm_eva/perception": "pools by attention",
    "timm_naflex/map": "pools by attention",
    "timm_naflex/factorized": "pools by attention",
    "timm_hiera/units": "the stream is pooled",
    "timm_hiera/global": "the stream is pooled",
    "timm_parallel/differential": "no sites for what its branches add",
}
"""Variants that must be refused, and the reason given."""


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


VARIANTS = [
    pytest.param(family, name, id=f"{family.name}-{name}")
    for family in families()
    if _installed(family.backend) and family.prefix != "open_clip_text"
    for name in family.conformance()
]


def variant(family: str, name: str) -> tuple[vitmodels.VisionModel, Tensor]:
    """Build a variant with no zero biases and no tiny LayerScale."""
    found = next(f for f in families() if f.name == family)
    with seeded(0):
        module = found.conformance()[name]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise.to(parameter.dtype))
    model = vitmodels.wrap(module, family=family, id=f"{family}/{name}")
    return model, torch.randn(2, *model.spec.input_shape, generator=generator)


@pytest.mark.parametrize(("family", "name"), VARIANTS)
def test_the_parts_sum_to_the_logit(family: Family, name: str) -> None:
    """Or the model is refused by name."""
    model, x = variant(family.name, name)
    if "logits" not in model.anatomy.taps:
        with pytest.raises(ValueError, match=r"no classification head.*probe"):
            attribute_logits(model, x)
        return
    if why := NOT_AFFINE.get(model.spec.id):
        with pytest.raises(ValueError, match=f"(?s)does not hold for {model.spec.id}.*{why}"):
            attribute_logits(model, x)
        return
    parts = attribute_logits(model, x, [0, 3])
    with torch.no_grad():
        logits = model(x)[:, [0, 3]].numpy()
    assert parts["logit"].values == pytest.approx(logits)
    assert total(parts).values == pytest.approx(logits, abs=1e-4)
    others = [float(np.abs(value).max()) for name, value in parts.items() if name != "bias"]
    assert max(others) > 1e-2  # it is not all one big bias
    assert {"bias", "embed"} < set(parts.data_vars)


@pytest.fixture(scope="module")
def digits() -> tuple[vitmodels.VisionModel, Tensor]:
    x = torch.randn(3, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    return vitmodels.load("toy/digits-2l"), x


def test_parts_of_the_last_layer_are_what_ablating_them_takes_away(
    digits: tuple[vitmodels.VisionModel, Tensor],
) -> None:
    """With the final norm held, zeroing a head of the last block takes away just its part."""
    from dictlearn.circuits.replacement_norms import frozen, recording

    model, x = digits
    plain_model = vitmodels.load("toy/digits-2l-attn")
    parts = attribute_logits(plain_model, x, class_names=[f"digit {i}" for i in range(10)])
    with torch.no_grad():
        with recording(plain_model.module) as norms:
            logits = plain_model(x)
        with frozen(norms), plain_model.editing({"blocks.1.z": at_heads(2, zero)}):
            without = plain_model(x)
    lost = parts["heads"].sel(layer=1, head=2).transpose("item", "class").values
    assert lost == pytest.approx((logits - without).numpy(), abs=1e-4)
    assert parts["class"].values[3] == "digit 3"
    assert set(attribute_logits(model, x).data_vars) == {
        "bias",
        "embed",
        "heads",
        "attn_bias",
        "mlp",
    }


def test_a_linear_head_reads_the_class_token_only(
    digits: tuple[vitmodels.VisionModel, Tensor],
) -> None:
    model, x = digits
    parts = attribute_logits(model, x, [4], by_position=True)
    assert parts["heads"].sizes["position"] == 26
    assert parts["kind"].values[0] == "cls"
    patches = parts["heads"].sel(layer=1).isel(position=slice(1, None))
    assert float(np.abs(patches).max()) == 0
    assert total(parts).values == pytest.approx(parts["logit"].values, abs=1e-4)


def _sae(site: str, seed: int = 0, **options: object) -> Dictionary:
    made = Dictionary(
        {site: 64},
        latents=options.pop("latents", 96),  # type: ignore[arg-type]
        sparsify=TopK(8),
        seed=seed,
        **options,  # type: ignore[arg-type]
    )
    with torch.no_grad():
        made.b_dec.normal_(generator=torch.Generator().manual_seed(seed))
    return made


@pytest.mark.parametrize(
    "dictionaries",
    [
        [_sae("blocks.1.mlp_out"), _sae("blocks.0.attn_out", latents=50)],
        [_sae("blocks.0.resid_post", decode_scale=True)],
        [
            _sae(
                "blocks.1.resid_post",
                input=Input(center="b_dec", norm="layer_norm", denormalize=True),
            )
        ],
        [
            Dictionary(
                {"blocks.0.mlp_in": 64},
                {"blocks.0.mlp_out": 64, "blocks.1.mlp_out": 64},
                latents=96,
                sparsify=BatchTopK(4),
                skip=True,
            ),
            Dictionary(
                {"blocks.1.mlp_in": 64}, {"blocks.1.mlp_out": 64}, latents=96, sparsify=TopK(4)
            ),
        ],
    ],
    ids=["branches", "stream", "last", "cross-layer"],
)
def test_latents_and_errors_are_parts_too(
    digits: tuple[vitmodels.VisionModel, Tensor], dictionaries: list[Dictionary]
) -> None:
    model, x = digits
    parts = attribute_logits(model, x, [1, 7], dictionaries=dictionaries)
    assert total(parts).values == pytest.approx(parts["logit"].values, abs=1e-4)
    assert float(np.abs(parts["latents"]).sum()) > 0
    plain = attribute_logits(model, x, [1, 7])
    written = {s for d in dictionaries for s in d.config.writes}
    replaced = (parts["latents"].sum(("latent", "dictionary")) + _sum(parts, "site")).transpose(
        "item", "class"
    )
    if written == {"blocks.1.resid_post"}:
        assert set(parts.data_vars) == {"bias", "latents", "code_bias", "error"}
        wanted = plain["logit"] - plain["bias"]
    elif written == {"blocks.0.resid_post"}:
        assert parts["mlp"]["layer"].values.tolist() == [1]
        wanted = plain["logit"] - plain["bias"]
        for name in ("heads", "attn_bias", "mlp"):
            wanted = wanted - parts[name].sum(
                [d for d in parts[name].dims if d in ("layer", "head")]
            )
    else:
        return
    assert replaced.values == pytest.approx(wanted.transpose("item", "class").values, abs=1e-4)


def _sum(parts: xr.Dataset, dim: str) -> xr.DataArray:
    found: xr.DataArray = (parts["code_bias"] + parts["error"]).sum(dim)
    return found


def test_a_latent_part_is_activation_times_direction(
    digits: tuple[vitmodels.VisionModel, Tensor],
) -> None:
    model, x = digits
    d = _sae("blocks.1.resid_post")
    parts = attribute_logits(model, x, [2], dictionaries=[d])["latents"].isel(dictionary=0)
    site = "blocks.1.resid_post"
    with torch.no_grad():
        value = model.run(x, site)[site][:, 0]
        acts = d.encode(model.run(x, site)[site].flatten(0, 1)).view(3, 26, -1)[:, 0]
        norm, head = model.module.norm, model.module.head
        spread = (value.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        rows = d.W_dec - d.W_dec.mean(-1, keepdim=True)
        wanted = acts * (rows @ (head.weight[2] * norm.weight)) / spread
    assert parts.sel({"class": 2}).values == pytest.approx(wanted.numpy(), abs=1e-5)


def test_zero_shot_heads_and_probes() -> None:
    model, x = variant("open_clip_vit", "gelu")
    width = model.sites()["projection"].shape[0]
    weight = torch.nn.functional.normalize(
        torch.randn(5, width, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    head = ZeroShotHead(weight, scale=30.0, bias=-2.0)
    zero_shot = with_head(model, head, 5)
    probed = with_probe(model, weight, torch.arange(5.0))
    for made in (zero_shot, probed):
        parts = attribute_logits(made, x)
        assert total(parts).values == pytest.approx(parts["logit"].values, abs=1e-3)
        assert parts.attrs["gap"] < 1e-4 * max(1, float(np.abs(parts["logit"]).max()))


def test_bad_input_says_what_to_do(digits: tuple[vitmodels.VisionModel, Tensor]) -> None:
    model, x = digits
    with pytest.raises(ValueError, match="class 10 is not among the 10"):
        attribute_logits(model, x, [10])
    two = [_sae("blocks.0.resid_post"), _sae("blocks.1.resid_post")]
    with pytest.raises(ValueError, match="give one of them"):
        attribute_logits(model, x, dictionaries=two)
    other = Dictionary({"blocks.1.mlp_out": 32}, latents=8, sparsify=TopK(2))
    with pytest.raises(ValueError, match="trained on another model"):
        attribute_logits(model, x, dictionaries=[other])
