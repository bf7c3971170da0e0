"""One module for every wiring: encode, decode, save, load."""

from pathlib import Path

import pytest
import torch

from dictlearn.config import (
    BatchTopK,
    DictionaryConfig,
    Gated,
    Input,
    JumpReLU,
    Matryoshka,
    ReLU,
    Sparsify,
    TopK,
)
from dictlearn.dictionary import Dictionary
from dictlearn.formats import load, save

KINDS: list[Sparsify] = [
    ReLU(),
    ReLU(function="tanh_relu"),
    TopK(4),
    TopK(4, relu=False),
    TopK(4, group_max=True),
    BatchTopK(3),
    JumpReLU(),
    Gated(),
    Gated(k=5),
]
INPUTS = [
    Input(),
    Input(center="b_in"),
    Input(center="none"),
    Input(norm="layer_norm"),
    Input(norm="constant_norm", center="none"),
    Input(norm="layer_norm", denormalize=False),
]


def random_parameters(dictionary: Dictionary, seed: int = 1) -> Dictionary:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return dictionary


def inputs(rows: int = 10, width: int = 12) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sparsify", KINDS, ids=str)
@pytest.mark.parametrize("skip", [False, True])
def test_sparse_and_dense_codes_decode_to_the_same(sparsify: Sparsify, skip: bool) -> None:
    d = random_parameters(
        Dictionary({"a": 12}, latents=40, sparsify=sparsify, skip=skip, decode_scale=True)
    )
    x = inputs()
    value, index = d.encode_sparse(x)
    torch.testing.assert_close(d.decode_sparse(value, index, x), d(x))
    torch.testing.assert_close(d.decode_entries(d.encode_entries(x), x), d(x))
    acts = d.encode(x)
    assert (acts != 0).any()
    assert (acts == 0).any()


@pytest.mark.parametrize("sparsify", KINDS, ids=str)
@pytest.mark.parametrize("options", INPUTS, ids=str)
def test_save_and_load_give_equal_outputs(
    tmp_path: Path, sparsify: Sparsify, options: Input
) -> None:
    d = random_parameters(
        Dictionary({"a": 12}, latents=40, sparsify=sparsify, input=options, latent_norm=True)
    )
    again = load(save(d, tmp_path / "d", about={"store": "abc"}))
    assert again.config == d.config
    assert torch.equal(again(inputs()), d(inputs()))
    assert again.W_enc.T.is_contiguous()


def test_forward_is_the_equation_of_the_docstring() -> None:
    d = random_parameters(Dictionary({"a": 12}, latents=40, sparsify=TopK(4), skip=True))
    x = inputs()
    pre = (x - d.b_dec) @ d.W_enc + d.b_enc
    kept = torch.zeros_like(pre)
    for b in range(len(x)):
        for f in pre[b].argsort(descending=True)[:4]:
            kept[b, f] = pre[b, f].clamp(min=0)
    torch.testing.assert_close(d.encode(x), kept)
    torch.testing.assert_close(d(x), kept @ d.W_dec + d.b_dec + x @ d.W_skip.T)


def test_layer_norm_is_undone_with_the_unbiased_deviation() -> None:
    d = random_parameters(
        Dictionary({"a": 12}, latents=40, sparsify=ReLU(), input=Input(norm="layer_norm"))
    )
    x = inputs() * 3 + 5
    mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    pre = ((x - mean) / (std + 1e-5) - d.b_dec) @ d.W_enc + d.b_enc
    torch.testing.assert_close(d(x), (pre.relu() @ d.W_dec + d.b_dec) * std + mean)


def test_group_max_keeps_the_largest_of_each_contiguous_group() -> None:
    d = Dictionary({"a": 12}, latents=40, sparsify=TopK(4, group_max=True))
    acts = d.encode(inputs()).reshape(10, 4, 10)
    assert ((acts > 0).sum(2) <= 1).all()
    pre = d.pre_activations(inputs()).reshape(10, 4, 10)
    torch.testing.assert_close(acts.amax(2), pre.amax(2).relu())


def test_transcoder_and_crosscoder_widths() -> None:
    t = Dictionary({"in": 6}, {"out": 9}, latents=20, sparsify=TopK(3), skip=True)
    assert t.config.input.center == "b_in"
    assert t(torch.ones(2, 6)).shape == (2, 9)
    c = Dictionary({"a": 6, "b": 4}, latents=20, sparsify=TopK(3))
    y = c(torch.ones(2, 10))
    assert {k: v.shape for k, v in c.split(y).items()} == {"a": (2, 6), "b": (2, 4)}


def test_folding_site_factors_keeps_activations() -> None:
    d = random_parameters(
        Dictionary({"a": 6, "b": 4}, {"b": 4, "c": 5}, latents=20, sparsify=TopK(3), skip=True)
    )
    factors = {"a": 2.0, "b": 0.5, "c": 4.0}
    x = inputs(width=10)
    scaled = torch.cat([x[:, :6] * 2.0, x[:, 6:] * 0.5], 1)
    acts, y = d.encode(scaled), d(scaled)
    d.rescale_sites(factors)
    torch.testing.assert_close(d.encode(x), acts)
    torch.testing.assert_close(d(x), torch.cat([y[:, :4] / 0.5, y[:, 4:] / 4.0], 1))


def test_config_round_trip_and_unknown_names() -> None:
    d = Dictionary(
        {"a": 6}, latents=20, sparsify=BatchTopK(3), matryoshka=Matryoshka(prefixes=(4, 8))
    )
    assert DictionaryConfig.from_json(d.config.to_json()) == d.config
    data = d.config.to_json()
    data["sparsify"] = {"kind": "TopKK", "k": 3}
    with pytest.raises(ValueError, match=r"unknown sparsity 'TopKK'.*nearest: TopK"):
        DictionaryConfig.from_json(data)
    data = d.config.to_json() | {"latent": 3}
    with pytest.raises(ValueError, match="no field 'latent'; nearest: latents"):
        DictionaryConfig.from_json(data)


def test_bad_descriptions_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"k = 30 is more than the 20 latents"):
        Dictionary({"a": 6}, latents=20, sparsify=TopK(30))
    with pytest.raises(ValueError, match=r"reads and writes must be the same"):
        Dictionary({"a": 6}, {"b": 6}, latents=20, sparsify=TopK(3), input=Input(center="b_dec"))
    with pytest.raises(ValueError, match=r"expected an input \[batch, 6\].*got \[2, 7\]"):
        Dictionary({"a": 6}, latents=20, sparsify=TopK(3))(torch.ones(2, 7))
    d = Dictionary({"a": 6}, latents=20, sparsify=TopK(3), skip=True)
    with pytest.raises(ValueError, match=r"decode needs the input x too.*skip path"):
        d.decode(torch.zeros(2, 20))
    with pytest.raises(KeyError, match=r"'b' is not in this batch"):
        Dictionary({"b": 6}, latents=9, sparsify=TopK(3)).gather(
            torch.ones(2, 6), {"a": slice(0, 6)}
        )
    with pytest.raises(ValueError, match=r"expects 6 channels at 'a', the batch has 5"):
        Dictionary({"a": 6}, latents=9, sparsify=TopK(3)).gather(
            torch.ones(2, 5), {"a": slice(0, 5)}
        )


def test_native_format_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no dictionary at .*nothing"):
        load(tmp_path / "nothing")
    folder = save(Dictionary({"a": 6}, latents=20, sparsify=TopK(3)), tmp_path / "d")
    other = save(Dictionary({"a": 6}, latents=21, sparsify=TopK(3)), tmp_path / "e")
    (folder / "dictionary.safetensors").write_bytes((other / "dictionary.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"W_dec: expected \[20, 6\], found \[21, 6\]"):
        load(folder)
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace('"version": 1', '"version": 9'))
    with pytest.raises(ValueError, match=r"version 9; this release reads up to 1"):
        load(other)
