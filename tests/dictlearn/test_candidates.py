"""Candidates in bfloat16, settled in float32: the compiled loop, its plain twin, exact top k."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from actstore.compile import compile_loop
from actstore.store import Store
from dictlearn.candidates import (
    largest,
    multiplies_bfloat16,
    scores,
    select_rows,
)
from dictlearn.config import BatchTopK, TopK
from dictlearn.dictionary import Dictionary
from dictlearn.eightbit import multiplies_int8
from dictlearn.kernels import Step, dense_step, sparse_step
from dictlearn.learner import Learner
from dictlearn.losses import AuxK
from dictlearn.picks import pick
from dictlearn.schedule import TrainConfig
from dictlearn.trainer import train

SITE = {"blocks.0.resid_post": 16}


def whole_numbers(rows: int, latents: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Factors whose products and sums bfloat16 and float32 both hold exactly."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (rows, 12), generator=generator).float()
    weight = torch.randint(-2, 3, (latents, 12), generator=generator).float()
    return x, weight, torch.zeros(latents)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize(("latents", "k", "spare"), [(5, 1, 0), (40, 6, 3), (40, 33, 9), (9, 9, 2)])
def test_the_compiled_loop_equals_its_plain_twin(
    rows: int, latents: int, k: int, spare: int
) -> None:
    x, weight, bias = whole_numbers(rows, latents)
    score = scores(*(v.bfloat16() for v in (x, weight, bias)))
    fast = largest(score, x, weight, bias, k, spare=spare)
    plain = largest(score, x, weight, bias, k, spare=spare, select=select_rows)
    for one, other in zip(fast, plain, strict=True):
        assert torch.equal(one, other)
    exact = torch.nn.functional.linear(x, weight)
    for row, (latent, pre, count) in enumerate(zip(*fast, strict=True)):
        n = int(count)
        assert n == min(k, int((exact[row] > 0).sum()))
        assert len(set(latent[:n].tolist())) == n
        assert torch.equal(pre[:n], exact[row, latent[:n]])
        best = exact[row].topk(n).values
        assert torch.equal(pre[:n].sort(descending=True).values, best)


def test_threads_share_the_rows() -> None:
    x, weight, bias = whole_numbers(300, 64)
    score = scores(*(v.bfloat16() for v in (x, weight, bias)))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(largest(score, x, weight, bias, 5))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("bfloat16", "most"),
    [
        (True, 2),
        pytest.param(False, 0, marks=pytest.mark.skipif(not multiplies_int8(), reason="no AVX")),
    ],
)
def test_few_tokens_lose_a_latent(
    bfloat16: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 16 spare candidates absorb what bfloat16 confuses; the bound of 8 bits leaves none."""
    monkeypatch.setattr("dictlearn.picks.multiplies_bfloat16", lambda: bfloat16)
    d = Dictionary({"a": 64}, latents=1024, sparsify=TopK(16)).requires_grad_(False)
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(1))
    picked, exact = pick(d, x, picker="candidates"), pick(d, x)
    assert picked is not None
    assert exact is not None
    ours = set(zip(picked.row.tolist(), picked.latent.tolist(), strict=True))
    theirs = set(zip(exact.row.tolist(), exact.latent.tolist(), strict=True))
    assert len(theirs - ours) <= most
    assert len(picked.row) == len(ours) == len(theirs)
    value = d.pre_activations(x)[picked.row, picked.latent]
    torch.testing.assert_close(picked.pre, value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_gradients_equal_those_of_the_dense_step(
    bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dictlearn.picks.multiplies_bfloat16", lambda: bfloat16)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(200, 64, generator=generator)
    found = {}
    for name in ("dense", "candidates"):
        d = Dictionary({"a": 64}, latents=256, sparsify=TopK(8), seed=3)
        dead = torch.arange(256) % 5 == 0
        step = Step(picker="candidates", aux=AuxK(dead_F=dead, k=6, coefficient=0.03))
        result = sparse_step(d, x, x, step) if name == "candidates" else dense_step(d, x, x, step)
        assert result is not None
        found[name] = (result, {n: p.grad for n, p in d.named_parameters()})
    (dense, dense_grads), (fast, fast_grads) = found.values()
    assert fast.sparse
    assert torch.equal(dense.fired_F, fast.fired_F)
    for name, loss in dense.losses.items():
        torch.testing.assert_close(fast.losses[name], loss, atol=1e-6, rtol=1e-5)
    for name, grad in dense_grads.items():
        torch.testing.assert_close(fast_grads[name], grad, atol=1e-6, rtol=1e-4)


def test_a_run_by_candidates(store: Store, tmp_path: Path) -> None:
    def run(picker: str) -> list[Dictionary]:
        both = [Dictionary(SITE, latents=64, sparsify=s) for s in (TopK(3), BatchTopK(3))]
        config = TrainConfig(steps=30, batch_size=64, lr=5e-3, picker=picker)  # type: ignore[arg-type]
        return [d.dictionary for d in train(store, both, config, out=tmp_path / picker)]

    exact, fast = run("exact"), run("candidates")
    for one, other in zip(exact, fast, strict=True):
        np.testing.assert_allclose(one.W_dec.detach(), other.W_dec.detach(), atol=2e-3)
    assert torch.equal(exact[1].W_dec, fast[1].W_dec)  # other kinds stay exact


def test_without_numba(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    compile_loop.cache_clear()
    monkeypatch.setitem(sys.modules, "numba", None)
    d = Dictionary(SITE, latents=64, sparsify=TopK(3))
    try:
        with pytest.raises(ValueError, match=r"needs numba.*pip install 'actstore\[fast\]'"):
            train(store, d, TrainConfig(steps=2, batch_size=64, picker="candidates"))
    finally:
        compile_loop.cache_clear()
    with pytest.raises(ValueError, match="picker='fast' is not exact or candidates"):
        TrainConfig(picker="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "native"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 f16c\n", False),
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("Features\t: fp asimd\n", False),
        ("processor : 0\n", True),
    ],
)
def test_a_cpu_without_bfloat16_is_told_by_its_flags(
    tmp_path: Path, text: str, native: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert multiplies_bfloat16(str(tmp_path / "cpuinfo")) is native
    assert multiplies_bfloat16(str(tmp_path / "nothing"))


@pytest.mark.parametrize("int8", [False, True])
def test_candidates_on_a_cpu_without_fast_products_are_warned_of(
    int8: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dictlearn.learner.multiplies_bfloat16", lambda: False)
    monkeypatch.setattr("dictlearn.learner.multiplies_int8", lambda: int8)
    dictionary = Dictionary(SITE, latents=32, sparsify=TopK(4))
    Learner(name="one", dictionary=dictionary, config=TrainConfig(picker="candidates"))
    assert ("no fast product of bfloat16 or 8 bits" in caplog.text) is not int8
    assert ("picker='exact'" in caplog.text) is not int8
