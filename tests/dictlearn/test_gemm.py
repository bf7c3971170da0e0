"""The encoder product's backends agree, and the private oneDNN operator is still what it was."""

import pytest
import torch

from dictlearn.gemm import choose_backend, has_onednn, linear


def factors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(50, 24), (70, 24), (70,)]
    x, weight, bias = (torch.randn(s, generator=generator) for s in shapes)
    return x, weight, bias


def test_onednn_operator_has_the_signature_we_use() -> None:
    if not has_onednn():
        pytest.skip("this build of PyTorch has no oneDNN operator")
    x, weight, bias = factors()
    torch.testing.assert_close(linear(x, weight, bias, "onednn"), x @ weight.T + bias)
    torch.testing.assert_close(linear(x, weight, None, "onednn"), x @ weight.T)


def test_bfloat16_backend_rounds_and_returns_float32() -> None:
    x, weight, bias = factors()
    found = linear(x, weight, bias, "bfloat16")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, x @ weight.T + bias, atol=0.1, rtol=0.02)
    assert not torch.equal(found, x @ weight.T + bias)


def test_small_products_are_not_timed() -> None:
    assert choose_backend(8, 16, 32, torch.device("cpu")) == "default"


def test_large_products_get_a_backend_that_exists() -> None:
    assert choose_backend(4096, 512, 2048, torch.device("cpu")) in ("default", "onednn")
