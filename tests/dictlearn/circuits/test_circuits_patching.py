"""Activation patching: exact, the same however it is batched, and clear about bad input."""

import pytest
import torch
from torch import Tensor

import vitmodels
from dictlearn import circuits
from dictlearn.circuits import metrics
from dictlearn.circuits.patching import agreement, patched_logits, recovered
from dictlearn.circuits.places import Place
from dictlearn.circuits.stacked import grows_at, place_edits, stacked
from vitmodels.registry import families
from vitmodels.weights import seeded

Pair = tuple[vitmodels.VisionModel, Tensor, Tensor]


def family_variant(family: str, variant: str) -> vitmodels.VisionModel:
    found = next(f for f in families() if f.name == family)
    with seeded(0):
        module = found.conformance()[variant]()
    return vitmodels.wrap(module, family=family, id=f"{family}/{variant}")


def inputs(model: vitmodels.VisionModel, items: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(items, *model.spec.input_shape, generator=generator)


@pytest.fixture(scope="module")
def pair() -> Pair:
    model = vitmodels.load("toy/digits-2l", pretrained=False, seed=0)
    return model, inputs(model, 3), inputs(model, 3, seed=1)


DIFFERENCE = metrics.logit_difference([0, 1, 2], 5)


@pytest.mark.parametrize(
    "sites",
    [["blocks.0.resid_pre"], ["blocks.1.resid_post"], ["blocks.*.attn_out", "blocks.*.mlp_out"]],
)
def test_patching_everything_restores_the_clean_output_bit_for_bit(
    pair: Pair, sites: list[str]
) -> None:
    model, clean, corrupted = pair
    if len(sites) == 2:  # everything the stream is a sum of
        parts = [f"blocks.{layer}.{p}" for layer in (0, 1) for p in ("attn_out", "mlp_out")]
        sites = ["embed", *parts]
    with torch.no_grad():
        wanted = model(clean)
        source = model.run(clean, sites)
    assert not torch.equal(wanted, model(corrupted))
    assert torch.equal(patched_logits(model, corrupted, source), wanted)
    # and among the rows of a big batch, against a plain pass of as many rows
    infos = model.sites()
    edits = place_edits([Place(site=sites[-1])] * 4, source, infos)
    outer = {s: place_edits([Place(site=s)] * 4, source, infos)[s] for s in sites[:-1]}
    with torch.no_grad():
        with stacked(model, corrupted, 4, sites[0], outer | edits) as batch:
            got = model(batch)
        with stacked(model, clean, 4, sites[0], {}) as batch:
            many = model(batch)
    assert len(got) == 12
    assert torch.equal(got, many)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_every_cell_is_what_one_patch_at_a_time_gives(pair: Pair, direction: str) -> None:
    model, clean, corrupted = pair
    found = circuits.activation_patching(
        model,
        clean,
        corrupted,
        "embed, blocks.*.{resid_post,z,pattern,mlp_out}, pooled",
        DIFFERENCE,
        direction=direction,  # type: ignore[arg-type]
        rows=20,
        per_item=True,
    )
    base, other = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    with torch.no_grad():
        source = model.run(other, "*")
    cells = [
        ("embed", ("position",), {"position": 7}, (slice(None), 7)),
        ("blocks.1.resid_post", ("position",), {"position": 0}, (slice(None), 0)),
        ("blocks.0.z", ("h",), {"head": 2, "position": 5}, (slice(None), 5, 2)),
        ("blocks.1.pattern", ("h",), {"head": 1, "position": 0}, (slice(None), 1, 0)),
        ("blocks.0.mlp_out", ("position",), {"position": 25}, (slice(None), 25)),
        ("pooled", (), {}, (slice(None),)),
    ]
    for site, _, where, index in cells:

        def edit(value: Tensor, site: str = site, index: tuple[object, ...] = index) -> Tensor:
            value[index] = source[site][index]
            return value

        with torch.no_grad(), model.editing({site: edit}):
            wanted = DIFFERENCE(model(base))
        part = site.rpartition(".")[2]
        chosen = {**where, "layer": int(site.split(".")[1])} if "." in site else where
        got = torch.from_numpy(found[part].sel(chosen).values)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert found["z"].dims == ("layer", "head", "position", "item")
    assert found["embed"].dims == ("position", "item")
    assert found["resid_post"].sizes == {"layer": 2, "position": 26, "item": 3}
    assert found["kind"].values.tolist() == ["cls"] + ["patch"] * 25
    assert found["row"].values[-1] == 4
    assert found["column"].values[1] == 0
    assert found.attrs["clean"] == pytest.approx(float(DIFFERENCE(model(clean)).mean()))


def test_recovered_is_one_where_all_is_patched(pair: Pair) -> None:
    model, clean, corrupted = pair
    found = circuits.activation_patching(
        model, clean, corrupted, "blocks.*.resid_post", DIFFERENCE, over=()
    )
    share = recovered(found)["resid_post"]
    assert share.values == pytest.approx([1.0, 1.0], abs=1e-4)
    same = circuits.activation_patching(model, clean, clean, "embed", DIFFERENCE, over=())
    with pytest.raises(ValueError, match="the same metric"):
        recovered(same)


def test_groups_of_tokens_and_single_tokens(pair: Pair) -> None:
    model, clean, corrupted = pair
    found = circuits.activation_patching(
        model,
        clean,
        corrupted,
        "blocks.0.resid_post",
        DIFFERENCE,
        positions={"class": "cls", "first row": range(1, 6), "two apart": [3, 20]},
    )
    assert found["position"].values.tolist() == ["class", "first row", "two apart"]
    single = circuits.activation_patching(
        model, clean, corrupted, "blocks.0.resid_post", DIFFERENCE, positions=[0]
    )
    assert float(single["resid_post"].sel(position=0)[0]) == pytest.approx(
        float(found["resid_post"].sel(position="class")[0]), abs=1e-5
    )


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("timm_vit", "registers"),
        ("timm_vit", "no_cls_gap"),
        ("timm_vit", "siglip_map"),
        ("hf_vivit", None),
        ("hf_timesformer", None),
        ("timm_swin", None),
    ],
)
def test_images_and_video_of_other_families(family: str, variant: str | None) -> None:
    """The batch may grow within the model or not: the values are the same."""
    names = next(f for f in families() if f.name == family).conformance()
    model = family_variant(family, variant or next(iter(names)))
    clean, corrupted = inputs(model, 2), inputs(model, 2, seed=1)
    site = [n for n in model.anatomy.taps if n.endswith("resid_post")][-2]
    metric = metrics.logit(1)
    found = circuits.activation_patching(
        model, clean, corrupted, site, metric, positions=[1, 2, -1], per_item=True
    )
    with torch.no_grad():
        source = model.run(clean, site)[site]

    def edit(value: Tensor) -> Tensor:
        value[:, -1] = source[:, -1]
        return value

    with torch.no_grad(), model.editing({site: edit}):
        wanted = metric(model(corrupted))
    got = torch.from_numpy(found["resid_post"].isel(layer=0, position=-1).values)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    if family == "hf_vivit":
        assert "time" in found.coords


def test_the_batch_grows_where_the_first_block_begins(pair: Pair) -> None:
    model, clean, _ = pair
    assert grows_at(model, clean, "blocks.1.mlp_out") == "blocks.1.resid_pre"
    assert grows_at(model, clean, "logits") == "blocks.1.resid_post"
    assert grows_at(model, clean, "blocks.0.resid_post") == "blocks.0.resid_post"
    assert grows_at(model, clean, "embed") is None
    rows = {}

    def count(name: str) -> object:
        return lambda module, args: rows.__setitem__(name, len(args[0]))

    blocks = model.module.blocks
    handles = [blocks[i].register_forward_pre_hook(count(str(i))) for i in (0, 1)]  # type: ignore
    with torch.no_grad(), stacked(model, clean, 5, "blocks.1.mlp_out", {}) as batch:
        logits = model(batch)
    for handle in handles:
        handle.remove()
    assert rows["0"] == 3
    assert len(logits) == 15


def test_agreement_of_results(pair: Pair) -> None:
    model, clean, corrupted = pair
    found = circuits.activation_patching(
        model, clean, corrupted, "blocks.*.{resid_post,mlp_out}", DIFFERENCE
    )
    same = agreement(found, 3 * found + 1)
    assert same["part"].values.tolist() == ["mlp_out", "resid_post", "all"]
    assert same["pearson"].values[:2] == pytest.approx([1, 1])
    assert same["spearman"].values[:2] == pytest.approx([1, 1])
    assert agreement(found, -found)["spearman"].values == pytest.approx([-1, -1, -1])
    with pytest.raises(ValueError, match="share no part"):
        agreement(found, found.rename(resid_post="a", mlp_out="b"))


def test_metrics() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]])
    torch.testing.assert_close(metrics.logit([0, 2])(logits), torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(metrics.logit_difference(0, [1, 2])(logits), torch.tensor([2, -0.5]))
    p = logits.softmax(-1)
    torch.testing.assert_close(metrics.probability(1)(logits), p[:, 1])
    torch.testing.assert_close(metrics.cross_entropy([0, 1])(logits), -p[[0, 1], [0, 1]].log())
    assert metrics.accuracy([0, 0])(logits).tolist() == [1.0, 0.0]
    torch.testing.assert_close(metrics.kl_divergence(logits)(logits), torch.zeros(2))
    assert bool((metrics.kl_divergence(logits)(logits.flip(0)) > 0).all())
    with pytest.raises(ValueError, match="class 3 is not among the 3"):
        metrics.logit(3)(logits)
    with pytest.raises(ValueError, match="2 items and 3 classes"):
        metrics.logit([0, 1, 2])(logits)
    with pytest.raises(ValueError, match="returned \\[2, 3\\]"):
        metrics.values_of(lambda x: x, logits)


def test_bad_input_says_what_to_do(pair: Pair) -> None:
    model, clean, corrupted = pair

    def patch(sites: str, **options: object) -> None:
        circuits.activation_patching(model, clean, corrupted, sites, DIFFERENCE, **options)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=r"no site matches .*nearest: blocks.1.resid_post"):
        patch("blocks.1.resid_pots")
    with pytest.raises(ValueError, match="can be cut along head, position"):
        patch("embed", over=("channel",))
    with pytest.raises(ValueError, match="no register tokens; it has cls, patch"):
        patch("embed", positions="register")
    with pytest.raises(ValueError, match="26 tokens, there is no token 99"):
        patch("embed", positions=[99])
    with pytest.raises(ValueError, match="no tokens to choose from"):
        patch("pooled", positions="cls")
    with pytest.raises(ValueError, match="'denoise' patches clean values"):
        patch("embed", direction="back")
    with pytest.raises(ValueError, match="pairs of one shape"):
        circuits.activation_patching(model, clean, corrupted[:1], "embed", DIFFERENCE)
    headless = family_variant("timm_vit", "no_head")
    x = inputs(headless, 1)
    with pytest.raises(ValueError, match=r"no classification head.*probe.*load_zero_shot"):
        circuits.activation_patching(headless, x, x, "embed", DIFFERENCE)
    swin = family_variant(
        "timm_swin", next(iter(next(f for f in families() if f.name == "timm_swin").conformance()))
    )
    x = inputs(swin, 1)
    with pytest.raises(ValueError, match="two calls"):
        circuits.activation_patching(
            swin, x, x, "blocks.*.resid_post", metrics.logit(0), positions=None
        )
