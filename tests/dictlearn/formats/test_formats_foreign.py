"""Checkpoints that other libraries wrote give those libraries' activations and outputs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from actstore.manifest import FormatError
from dictlearn.config import BatchTopK, Gated, Matryoshka, TopK
from dictlearn.formats import detect, formats, load
from dictlearn.formats.registry import read

DATA = Path(__file__).parent / "data"
SHIPPED = sorted(p.parent for p in DATA.glob("*/*/case.json"))
FORMAT_OF = {"vit_prisma": "prisma"}


def check(case: Path) -> None:
    """Compare what one case loads to with what its own library computed."""
    expected = np.load(case / "io.npz")
    assert detect(case) == FORMAT_OF.get(case.parent.name, case.parent.name)
    dictionary = load(case)
    x = torch.from_numpy(expected["x"])
    with torch.no_grad():
        acts, y = dictionary.encode(x), dictionary(x)
        sparse = dictionary.decode_entries(dictionary.encode_entries(x), x)
    assert np.array_equal(acts.numpy() != 0, expected["acts"] != 0)
    np.testing.assert_allclose(acts, expected["acts"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(y, expected["y"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(sparse, expected["y"], rtol=0, atol=1e-5)
    assert all(p.dtype == torch.float32 for p in dictionary.parameters())


@pytest.mark.parametrize("case", SHIPPED, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_shipped_case_computes_what_its_library_computes(case: Path) -> None:
    check(case)


def test_shipped_cases_cover_every_format() -> None:
    found = {FORMAT_OF.get(c.parent.name, c.parent.name) for c in SHIPPED}
    assert found == set(formats()) - {"native"}
    assert {c.name[0] for c in SHIPPED if c.parent.name == "vit_prisma"} == set("ABCDE")


def test_every_shared_case_computes_what_its_library_computes(shared: Path) -> None:
    cases = sorted(p.parent for p in (shared / "fixtures" / "foreign").glob("*/*/case.json"))
    if not cases:
        pytest.skip("the shared folder holds no checkpoints of others")
    wrong = {}
    for case in cases:
        try:
            check(case)
        except (AssertionError, ValueError, KeyError, OSError) as error:
            wrong[f"{case.parent.name}/{case.name}"] = str(error).strip()[:300]
    assert not wrong, f"{len(wrong)} of {len(cases)}: {json.dumps(wrong, indent=1)}"


@pytest.mark.parametrize(
    ("case", "reads", "writes"),
    [
        ("sae_lens/topk_rescale", "blocks.3.resid_post", "blocks.3.resid_post"),
        ("vit_prisma/A_relu_layer_norm", "blocks.3.resid_post", "blocks.3.resid_post"),
        ("vit_prisma/D_skip_topk_layer_norm", "blocks.3.mlp_in", "blocks.3.mlp_out"),
        ("vit_prisma/E_relu_pkl_gz", "blocks.3.mlp_out", "blocks.3.mlp_out"),
        ("dictionary_learning/gated", "blocks.3.resid_post", "blocks.3.resid_post"),
        ("saev/v010_relu", "unnamed", "unnamed"),
    ],
)
def test_hooks_become_sites(case: str, reads: str, writes: str) -> None:
    config = load(DATA / case).config
    assert list(config.reads) == [reads]
    assert list(config.writes) == [writes]


def test_sites_that_no_file_records_are_told() -> None:
    sae = load(DATA / "saev" / "v010_relu", reads="blocks.7.resid_post")
    assert sae.config.reads == sae.config.writes == {"blocks.7.resid_post": 12}
    coder = load(DATA / "sparsify" / "groupmax_transcode_skip", reads="a", writes="b")
    assert coder.config.reads == {"a": 12}
    assert coder.config.writes == {"b": 12}
    with pytest.raises(ValueError, match=r"cannot read 'a' and write 'b'. Tell reads only"):
        load(DATA / "saev" / "v010_relu", reads="a", writes="b")


def test_the_hookpoint_folder_of_sparsify_is_the_site(tmp_path: Path) -> None:
    source = DATA / "sparsify" / "groupmax_transcode_skip"
    for name, reads, writes in (
        ("layers.5.mlp", "blocks.5.mlp_in", "blocks.5.mlp_out"),
        ("h.11", "blocks.11.resid_pre", "blocks.11.resid_post"),
        ("layers.2.self_attn", "blocks.2.attn_in", "blocks.2.attn_out"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("cfg.json", "sae.safetensors"):
            (folder / file).write_bytes((source / file).read_bytes())
        config = load(folder).config
        assert list(config.reads) == [reads]
        assert list(config.writes) == [writes]


def test_what_a_file_says_beyond_its_weights_is_kept() -> None:
    prisma = read(DATA / "vit_prisma" / "C_gated_layer_norm")
    assert isinstance(prisma.config.sparsify, Gated)
    assert prisma.about["model"] == "toy-vit"
    assert prisma.about["tokens"] == "cls,patch"
    assert prisma.about["config"]["l1_coefficient"] > 0
    json.dumps(prisma.about)
    matryoshka = read(DATA / "dictionary_learning" / "matryoshka").config
    assert matryoshka.matryoshka == Matryoshka(prefixes=(10, 20))
    assert isinstance(matryoshka.sparsify, BatchTopK)
    assert read(DATA / "saev" / "osu_topk_negative").config.sparsify == TopK(6, relu=False)


def test_of_several_prisma_checkpoints_the_last_is_taken(tmp_path: Path) -> None:
    source = DATA / "vit_prisma" / "A_relu_layer_norm"
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "n_images_900000.pt").write_bytes(b"an early checkpoint, damaged")
    x = torch.ones(1, 12)
    assert torch.equal(load(tmp_path)(x), load(source)(x))


def test_overcomplete_is_told_what_its_file_lacks(tmp_path: Path) -> None:
    source = DATA / "overcomplete" / "topk_batchnorm"
    (tmp_path / "sae.pt").write_bytes((source / "sae.pt").read_bytes())
    with pytest.raises(ValueError, match=r"tell kind= one of SAE, TopKSAE"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"does not hold k: tell top_k="):
        load(tmp_path, kind="TopKSAE")
    with pytest.raises(ValueError, match=r"tell running_threshold="):
        load(tmp_path, kind="BatchTopKSAE", top_k=4)
    with pytest.raises(ValueError, match=r"class 'TopK' is not supported; allowed: SAE, TopKSAE"):
        load(tmp_path, kind="TopK", top_k=4)
    told, x = load(tmp_path, kind="TopKSAE", top_k=4), torch.ones(1, 12)
    assert torch.equal(told(x), load(source)(x))
    other = load(tmp_path, kind="TopKSAE", top_k=4, normalization="identity")
    assert not torch.allclose(other(x), told(x))


def test_batch_topk_of_saev_without_a_threshold_is_topk_of_a_row(tmp_path: Path) -> None:
    header, _, body = (DATA / "saev" / "osu_topk_negative" / "sae.pt").read_bytes().partition(b"\n")
    content = json.loads(header)
    params = {"cls": "BatchTopK", "params": {"top_k": 6}}
    content |= {"schema": 2, "cfg": {**content["cfg"], "activation": params}}
    (tmp_path / "sae.pt").write_bytes(json.dumps(content).encode() + b"\n" + body)
    assert load(tmp_path).config.sparsify == TopK(6, relu=False)
    content["schema"] = 6
    (tmp_path / "sae.pt").write_bytes(json.dumps(content).encode() + b"\n" + body)
    with pytest.raises(FormatError, match=r"schema 6; this release reads up to 5"):
        load(tmp_path)
