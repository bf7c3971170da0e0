"""The plain losses, term by term, against formulas of the papers written out token by token.

Nothing here calls `Dictionary.encode`, a selection or a loss of the package: only parameters are
shared. Gradients are those of autograd through the written formula, and for the threshold of
JumpReLU, where the formula has none, the estimator of the paper in closed form.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dictlearn.config import BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, Sparsify, TopK
from dictlearn.dictionary import Dictionary
from dictlearn.losses import AuxK, plain_losses

TOKENS, LATENTS = 7, 12
READS, WRITES = {"a": 5}, {"a": 5, "b": 3}


def made(sparsify: Sparsify, wiring: str = "sae") -> tuple[Dictionary, Tensor, Tensor]:
    """Return a dictionary with every parameter at random, inputs and targets, in float64."""
    writes = READS if wiring == "sae" else WRITES
    d = Dictionary(READS, writes, latents=LATENTS, sparsify=sparsify, skip=wiring == "skip")
    d = d.double()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in d.named_parameters():
            value = torch.randn(p.shape, generator=g, dtype=torch.float64)
            p.copy_(0.2 + 0.1 * value.abs() if "threshold" in name else 0.5 * value)
        if isinstance(sparsify, Gated):  # it has none
            d.b_enc.zero_()
    x = torch.randn(TOKENS, 5, generator=g, dtype=torch.float64)
    t = x if wiring == "sae" else torch.randn(TOKENS, d.config.d_write, generator=g).double()
    return d, x, t


def pre_of(d: Dictionary, x: Tensor, *, gated: bool = False) -> list[list[Tensor]]:
    """``(x - center) . W_enc[:, i] + b_enc[i]`` of every token and latent."""
    center = d.b_dec if d.config.input.center == "b_dec" else d.b_in
    return [
        [(row - center) @ d.W_enc[:, i] + (0.0 if gated else d.b_enc[i]) for i in range(LATENTS)]
        for row in x
    ]


def error(d: Dictionary, acts: list[list[Tensor]], x: Tensor, t: Tensor, upto: int) -> Tensor:
    """Mean over tokens and channels of the squared error of latents below `upto`."""
    total = torch.zeros((), dtype=torch.float64)
    for row, target, f in zip(x, t, acts, strict=True):
        y = d.b_dec + (d.W_skip @ row if d.config.skip else 0.0)
        for i in range(upto):
            y = y + f[i] * d.W_dec[i]
        total = total + ((y - target) ** 2).sum()
    return total / t.numel()


def relu(v: Tensor) -> Tensor:
    return v if v.item() > 0 else 0.0 * v


def kept(pre: list[list[Tensor]], k: int, *, batch: bool) -> list[list[Tensor]]:
    """Keep the k largest of a token, or k a token of the batch, after ReLU; 0 elsewhere."""
    acts = [[relu(v) for v in row] for row in pre]
    if batch:
        order = sorted((v.item(), b, i) for b, row in enumerate(acts) for i, v in enumerate(row))
        chosen = {(b, i) for _, b, i in order[-k * len(acts) :]}
    else:
        chosen = set()
        for b, row in enumerate(pre):
            ranked = sorted(range(LATENTS), key=lambda i: row[i].item())
            chosen |= {(b, i) for i in ranked[-k:]}
    return [
        [v if (b, i) in chosen else 0.0 * v for i, v in enumerate(row)]
        for b, row in enumerate(acts)
    ]


def of_tokens(values: list[list[Tensor]], term: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Sum of a term over latents, mean over tokens."""
    summed = [term(v, i) for row in values for i, v in enumerate(row)]
    return torch.stack(summed).sum() / len(values)


def l1(d: Dictionary, x: Tensor, t: Tensor, p: float) -> tuple[dict[str, Tensor], list[int]]:
    config = d.config.sparsify
    assert isinstance(config, ReLU)
    acts = [[relu(v) for v in row] for row in pre_of(d, x)]

    def term(f: Tensor, i: int) -> Tensor:
        power = f**p if f.item() > 0 else 0.0 * f
        return power * (d.W_dec[i].square().sum().sqrt() if config.decoder_norm else 1.0)

    return {
        "mse": error(d, acts, x, t, LATENTS),
        "penalty": config.l1 * of_tokens(acts, term),
    }, [LATENTS]


def gated(d: Dictionary, x: Tensor, t: Tensor, p: float) -> tuple[dict[str, Tensor], list[int]]:
    config, s = d.config.sparsify, d.sparsify
    assert isinstance(config, Gated)
    u = pre_of(d, x, gated=True)
    gate = [[relu(v + s.b_gate[i]) for i, v in enumerate(row)] for row in u]
    acts = [
        [
            relu(s.r_mag[i].exp() * v + s.b_mag[i]) if g.item() > 0 else 0.0 * v
            for i, (v, g) in enumerate(zip(row, open_, strict=True))
        ]
        for row, open_ in zip(u, gate, strict=True)
    ]
    frozen = d.W_dec.detach(), d.b_dec.detach()
    through = torch.zeros((), dtype=torch.float64)
    for row, target, f in zip(x, t, gate, strict=True):
        y = frozen[1] + (d.W_skip.detach() @ row if d.config.skip else 0.0)
        for i in range(LATENTS):
            y = y + f[i] * frozen[0][i]
        through = through + ((y - target) ** 2).sum()
    return {
        "mse": error(d, acts, x, t, LATENTS),
        "penalty": config.l1 * of_tokens(gate, lambda g, i: g),
        "gate": through / t.numel(),
    }, [LATENTS]


def top(d: Dictionary, x: Tensor, t: Tensor, p: float) -> tuple[dict[str, Tensor], list[int]]:
    config = d.config.sparsify
    assert isinstance(config, TopK | BatchTopK)
    acts = kept(pre_of(d, x), config.k, batch=isinstance(config, BatchTopK))
    return {"mse": error(d, acts, x, t, LATENTS)}, [LATENTS]


def nested(d: Dictionary, x: Tensor, t: Tensor, p: float) -> tuple[dict[str, Tensor], list[int]]:
    config = d.config.sparsify
    assert isinstance(config, TopK | BatchTopK)
    acts = kept(pre_of(d, x), config.k, batch=isinstance(config, BatchTopK))
    prefixes = [3, 8, LATENTS]
    return {"mse": sum(error(d, acts, x, t, m) for m in prefixes) / 3}, prefixes  # type: ignore[dict-item]


CASES = [
    (ReLU(l1=0.3), l1, 1.0),
    (ReLU(l1=0.3, decoder_norm=False), l1, 1.0),
    (ReLU(l1=0.3, p_end=0.4, anneal_start=0.5), l1, 0.7),  # p falls from 1 to 0.4; halfway here
    (TopK(3), top, 1.0),
    (BatchTopK(3), top, 1.0),
    (TopK(3), nested, 1.0),
    (BatchTopK(3), nested, 1.0),
    (Gated(l1=0.3), gated, 1.0),
]


def name_of(value: object) -> str:
    """Return an id that is the same in every process."""
    return getattr(value, "__name__", None) or str(value)


@pytest.mark.parametrize("wiring", ["sae", "transcoder", "skip"])
@pytest.mark.parametrize(("sparsify", "formula", "p"), CASES, ids=name_of)
def test_losses_and_gradients_equal_the_formula(
    sparsify: Sparsify,
    formula: Callable[..., tuple[dict[str, Tensor], list[int]]],
    p: float,
    wiring: str,
) -> None:
    d, x, t = made(sparsify, wiring)
    expected, prefixes = formula(d, x, t, p)
    found = plain_losses(d, x, t, prefixes=prefixes, progress=0.75 if p < 1 else 0.0)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
    absent = {"b_enc"} if isinstance(sparsify, Gated) else set()
    trained = [q for n, q in d.named_parameters() if q.requires_grad and n not in absent]
    pairs = [
        torch.autograd.grad(sum(terms.values()), trained, allow_unused=True)  # type: ignore[arg-type]
        for terms in (found, expected)
    ]
    for one, other, q in zip(*pairs, trained, strict=True):
        zero = torch.zeros_like(q)
        torch.testing.assert_close(
            zero if one is None else one, zero if other is None else other, rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("penalty", ["l0", "tanh"])
def test_jump_relu_is_equations_11_and_12(penalty: str) -> None:
    """Rajamanoharan et al. 2024: ``-theta/eps K`` and ``-1/eps K``, K the kernel's window."""
    rule = JumpReLU(l0=0.3, bandwidth=0.6, penalty=penalty)  # type: ignore[arg-type]
    d, x, t = made(rule)
    theta = d.sparsify.threshold
    pre = pre_of(d, x)
    acts = [
        [v if v.item() > theta[i].item() else 0.0 * v for i, v in enumerate(row)] for row in pre
    ]
    expected = {"mse": error(d, acts, x, t, LATENTS)}
    norm = [w.square().sum().sqrt() for w in d.W_dec]
    if penalty == "tanh":
        term = of_tokens(acts, lambda f, i: torch.tanh(rule.tanh_scale * f * norm[i]))
        expected["penalty"] = rule.l0 * term
    else:
        on = sum(v.item() > theta[i].item() for row in pre for i, v in enumerate(row))
        expected["penalty"] = torch.tensor(rule.l0 * on / TOKENS, dtype=torch.float64)
    found = plain_losses(d, x, t)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)

    # dL/dtheta_i = sum over tokens of dL/df * (-theta/eps) K + (l0 / B) (-1/eps) K
    f = torch.tensor([[v.item() for v in row] for row in acts], dtype=torch.float64)
    f.requires_grad_(True)
    y = f @ d.W_dec.detach() + d.b_dec.detach()
    loss = (y - t).square().mean()
    if penalty == "tanh":
        scaled = torch.stack(norm).detach() * rule.tanh_scale
        loss = loss + rule.l0 * (f * scaled).tanh().sum() / TOKENS
    (df,) = torch.autograd.grad(loss, f)
    window = torch.tensor(
        [
            [abs(v.item() - theta[i].item()) < rule.bandwidth / 2 for i, v in enumerate(row)]
            for row in pre
        ],
        dtype=torch.float64,
    )
    assert 0 < window.mean() < 1
    wanted = (df * -theta.detach() / rule.bandwidth * window).sum(0)
    if penalty == "l0":
        wanted = wanted - rule.l0 / TOKENS / rule.bandwidth * window.sum(0)
    (dtheta,) = torch.autograd.grad(sum(found.values()), theta, retain_graph=True)  # type: ignore[arg-type]
    torch.testing.assert_close(dtheta, wanted)

    others = [d.W_enc, d.b_enc, d.W_dec, d.b_dec]
    smooth = expected["mse"] + (expected["penalty"] if penalty == "tanh" else 0.0)
    grads = torch.autograd.grad(smooth, others)
    for one, other in zip(
        torch.autograd.grad(sum(found.values()), others),  # type: ignore[arg-type]
        grads,
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_the_auxiliary_loss_is_that_of_gao() -> None:
    """``c min(n/k, 1) |e_hat - e|^2``, e_hat of the k largest among n dead latents, no bias."""
    d, x, t = made(TopK(3))
    dead = torch.zeros(LATENTS, dtype=torch.bool)
    dead[[1, 4, 5, 9, 11]] = True
    for k in (2, 8):
        found = plain_losses(d, x, t, aux=AuxK(dead_F=dead, k=k, coefficient=0.25))["aux"]
        pre = pre_of(d, x)
        acts = kept(pre, 3, batch=False)
        total = torch.zeros((), dtype=torch.float64)
        for b in range(TOKENS):
            e = t[b] - d.b_dec - sum(acts[b][i] * d.W_dec[i] for i in range(LATENTS))
            alive = sorted((i for i in range(LATENTS) if dead[i]), key=lambda i: pre[b][i].item())
            e_hat = sum(relu(pre[b][i]) * d.W_dec[i] for i in alive[-k:])
            total = total + ((e_hat - e.detach()) ** 2).sum()
        expected = 0.25 * min(5 / k, 1) * total / t.numel()
        torch.testing.assert_close(found, expected)
        trained = [d.W_enc, d.b_enc, d.W_dec, d.b_dec]
        for one, other in zip(
            torch.autograd.grad(found, trained),
            torch.autograd.grad(expected, trained, allow_unused=True),
            strict=True,
        ):
            assert other is not None
            torch.testing.assert_close(one, other)


def test_sampled_prefixes_are_log_uniform() -> None:
    from dictlearn.losses import prefixes_of

    assert prefixes_of(Matryoshka(prefixes=(4,), sampled=2), 256, [0.0, 0.5]) == [1, 4, 16, 256]
    assert prefixes_of(None, 256) == [256]
