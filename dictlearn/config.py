"""What a dictionary is, as data: sparsity rules, input treatment, wiring. Imports no torch.

A strategy is a small frozen dataclass. The code that executes one is in `dictlearn.sparsify`
(selection), `dictlearn.losses` (its training loss, plain) and `dictlearn.kernels` (its training
loss, sparse).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

Center = Literal["b_dec", "b_in", "none"]
Norm = Literal["none", "constant_norm", "layer_norm"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class ReLU:
    """``f = relu(pre)``, trained with ``l1 * sum_i |f_i|^p * w_i``.

    ``w_i`` is the norm of decoder row i (Anthropic, "Update on how we train SAEs", April 2024)
    or 1 (Bricken et al. 2023, "Towards Monosemanticity"). ``p`` falls linearly from 1 to `p_end`
    between `anneal_start` and the end of training (P-annealing: Karvonen et al. 2024,
    arXiv:2408.00113, equation 4, where the coefficient is kept constant here).
    """

    _: KW_ONLY
    l1: float = 1e-3
    """Coefficient of the penalty; the squared error is a mean over channels of unit variance."""
    decoder_norm: bool = True
    """Weight each latent by the norm of its decoder row."""
    function: Literal["relu", "tanh_relu"] = "relu"
    """``tanh_relu`` is ``tanh(relu(pre))``."""
    p_end: float = 1.0
    """Exponent at the end of training; 1 means plain L1."""
    anneal_start: float = 0.25
    """Fraction of the training after which p starts to fall."""

    def __post_init__(self) -> None:
        _require(self.l1 >= 0, f"ReLU.l1 must be >= 0, got {self.l1}")
        _require(0 < self.p_end <= 1, f"ReLU.p_end must be in (0, 1], got {self.p_end}")
        _require(self.function in ("relu", "tanh_relu"), f"ReLU.function: {self.function!r}")


@dataclass(frozen=True)
class TopK:
    """The k largest pre-activations of a token, then ReLU (Gao et al. 2024, arXiv:2406.04093)."""

    k: int
    """Latents kept for a token."""
    _: KW_ONLY
    relu: bool = True
    """Cut negative values among the k kept; False lets them through (saev)."""
    group_max: bool = False
    """Keep the largest of each of k contiguous groups of latents instead (sparsify's groupmax)."""

    def __post_init__(self) -> None:
        _require(self.k >= 1, f"TopK.k must be >= 1, got {self.k}")


@dataclass(frozen=True)
class BatchTopK:
    """The k * B largest activations of a batch of B tokens (arXiv:2412.06410, Bussmann et al.).

    At inference ``f = relu(pre) where pre > threshold``: the threshold is a running mean of the
    smallest activation kept in training. Unset (negative), it is plain ReLU.
    """

    k: int
    """Mean number of latents kept for a token."""
    _: KW_ONLY
    threshold_momentum: float = 0.99
    """Share of the old value in the running mean of the threshold."""
    strict: bool = True
    """``pre > threshold``; False means ``>=``."""

    def __post_init__(self) -> None:
        _require(self.k >= 1, f"BatchTopK.k must be >= 1, got {self.k}")
        _require(
            0 <= self.threshold_momentum < 1,
            f"BatchTopK.threshold_momentum must be in [0, 1), got {self.threshold_momentum}",
        )


@dataclass(frozen=True)
class JumpReLU:
    """``f = pre where pre > theta`` and pre > 0 (Rajamanoharan et al. 2024, arXiv:2407.14435).

    Penalty ``l0``: ``l0 * sum_i H(pre_i - theta_i)``; gradients to theta by the straight-through
    estimator with a rectangular kernel of width `bandwidth` (equations 11 and 12 there). Penalty
    ``tanh``: ``l0 * sum_i tanh(c f_i |d_i|)`` (Anthropic, "Circuits Updates - January 2025").
    """

    _: KW_ONLY
    threshold: float | None = None
    """Initial theta, in units of the pre-activation of inputs with unit variance per channel. By
    default 0.1 or, trained with ``TrainConfig.target_l0``, what gives about that L0 at the start
    (`Dictionary.start_at_l0`)."""
    l0: float = 1e-3
    """Coefficient of the penalty."""
    bandwidth: float = 0.1
    """Width of the rectangular kernel."""
    penalty: Literal["l0", "tanh"] = "l0"
    """Which penalty drives the sparsity."""
    tanh_scale: float = 4.0
    """c of the tanh penalty."""
    strict: bool = True
    """``pre > theta``; False means ``>=`` (overcomplete)."""
    positive: bool = True
    """Also require ``pre > 0``."""

    def __post_init__(self) -> None:
        _require(self.bandwidth > 0, f"JumpReLU.bandwidth must be > 0, got {self.bandwidth}")
        _require(self.l0 >= 0, f"JumpReLU.l0 must be >= 0, got {self.l0}")
        _require(self.penalty in ("l0", "tanh"), f"JumpReLU.penalty: {self.penalty!r}")


@dataclass(frozen=True)
class Gated:
    """Gate and magnitude share their directions (Rajamanoharan et al. 2024, arXiv:2404.16014).

    With ``u = x_c W_enc``: ``f = 1[u + b_gate > 0] * relu(exp(r_mag) * u + b_mag)``. Loss
    (equation 8 there): reconstruction + ``l1 * sum relu(u + b_gate)`` + the reconstruction error of
    ``relu(u + b_gate)`` through a frozen copy of the decoder. The dictionary has no b_enc.
    """

    _: KW_ONLY
    l1: float = 1e-3
    """Coefficient of the penalty on the gate."""
    k: int | None = None
    """Keep only the k largest magnitudes of a token before gating (Prisma's gated top-k)."""

    def __post_init__(self) -> None:
        _require(self.l1 >= 0, f"Gated.l1 must be >= 0, got {self.l1}")
        _require(self.k is None or self.k >= 1, f"Gated.k must be >= 1, got {self.k}")


Sparsify = ReLU | TopK | BatchTopK | JumpReLU | Gated
STRATEGIES: dict[str, type[Sparsify]] = {
    c.__name__: c for c in (ReLU, TopK, BatchTopK, JumpReLU, Gated)
}


@dataclass(frozen=True, kw_only=True)
class Matryoshka:
    """Reconstruct from prefixes of the latents too: loss = mean over prefixes (arXiv:2503.17547).

    Fixed prefixes are Bussmann et al. 2025; prefixes sampled at every step are the variant of
    Nabeshima et al. 2024 ("Matryoshka Sparse Autoencoders", LessWrong).
    """

    prefixes: tuple[int, ...] = ()
    """Fixed prefix lengths, ascending; the full width is always added as the last one."""
    sampled: int = 0
    """Prefixes drawn at every step, log-uniform between 1 and the full width, besides the fixed."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefixes", tuple(self.prefixes))
        ascending = all(a < b for a, b in zip(self.prefixes, self.prefixes[1:], strict=False))
        _require(
            ascending and all(p > 0 for p in self.prefixes),
            f"Matryoshka.prefixes must be positive and ascending, got {self.prefixes}",
        )
        _require(self.sampled >= 0, f"Matryoshka.sampled must be >= 0, got {self.sampled}")
        _require(bool(self.prefixes or self.sampled), "Matryoshka needs prefixes or sampled > 0")


@dataclass(frozen=True, kw_only=True)
class Input:
    """How the input is treated before the encoder, and what of it is undone after the decoder."""

    center: Center = "b_dec"
    """What is subtracted: the decoder bias, a bias of its own (`b_in`, not trained), or nothing."""
    norm: Norm = "none"
    """Per token: ``constant_norm`` is ``x * sqrt(d) / |x|``; ``layer_norm`` is
    ``(x - mean) / (std + eps)`` with the unbiased standard deviation. Only with one read site."""
    denormalize: bool = True
    """Undo `norm` on the output with the input's own statistics."""
    eps: float = 1e-5
    """Added to the standard deviation (layer_norm) or to the norm (constant_norm: 0 elsewhere)."""

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("center", self.center, ("b_dec", "b_in", "none")),
            ("norm", self.norm, ("none", "constant_norm", "layer_norm")),
        ):
            _require(value in allowed, f"Input.{name}={value!r} is not one of {allowed}")


@dataclass(frozen=True, kw_only=True)
class DictionaryConfig:
    """The whole description of a `Dictionary`; saved beside its weights as JSON."""

    reads: dict[str, int]
    """Sites read and their widths, in the order of the rows of W_enc."""
    writes: dict[str, int]
    """Sites written and their widths, in the order of the columns of W_dec."""
    latents: int
    """F, the number of latents."""
    sparsify: Sparsify
    """Which latents are active."""
    skip: bool = False
    """Add ``x_raw @ W_skip.T`` to the output, before denormalising."""
    input: Input = field(default_factory=Input)
    """Centring and normalisation of the input."""
    matryoshka: Matryoshka | None = None
    """Prefixes of the training loss."""
    latent_norm: bool = False
    """LayerNorm (biased variance, eps 1e-5, gain and bias) over the pre-activations."""
    decode_scale: bool = False
    """Activations are multiplied by a factor per latent in the decoder only."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "reads", dict(self.reads))
        object.__setattr__(self, "writes", dict(self.writes))
        for name, sites in (("reads", self.reads), ("writes", self.writes)):
            _require(bool(sites), f"a dictionary needs at least one site in {name}")
            bad = {s: w for s, w in sites.items() if w < 1}
            _require(not bad, f"widths in {name} must be >= 1, got {bad}")
        _require(self.latents >= 1, f"latents must be >= 1, got {self.latents}")
        if self.input.center == "b_dec":
            _require(
                list(self.reads.items()) == list(self.writes.items()),
                'center="b_dec" subtracts the decoder bias from the input, so reads and writes '
                f"must be the same sites and widths; they are {self.reads} and {self.writes}. "
                'Use Input(center="b_in") or Input(center="none")',
            )
        if self.input.norm != "none":
            _require(
                len(self.reads) == 1,
                f"input norm {self.input.norm!r} needs one read site, got {list(self.reads)}",
            )
        k = getattr(self.sparsify, "k", None)
        if k is not None:
            _require(
                k <= self.latents,
                f"{type(self.sparsify).__name__}.k = {k} is more than the {self.latents} latents",
            )
        if isinstance(self.sparsify, TopK) and self.sparsify.group_max:
            _require(
                self.latents % self.sparsify.k == 0,
                f"group_max needs latents divisible by k, got {self.latents} and {self.sparsify.k}",
            )
        if self.matryoshka and self.matryoshka.prefixes:
            _require(
                self.matryoshka.prefixes[-1] <= self.latents,
                f"Matryoshka prefix {self.matryoshka.prefixes[-1]} > {self.latents} latents",
            )

    @property
    def d_read(self) -> int:
        """Total width read."""
        return sum(self.reads.values())

    @property
    def d_write(self) -> int:
        """Total width written."""
        return sum(self.writes.values())

    @property
    def sites(self) -> list[str]:
        """Every site read or written, without repetition, reads first."""
        return list(dict.fromkeys([*self.reads, *self.writes]))

    def to_json(self) -> dict[str, Any]:
        """JSON-able description; the sparsity carries its kind."""
        out = dataclasses.asdict(self)
        out["sparsify"] = {"kind": type(self.sparsify).__name__, **out["sparsify"]}
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DictionaryConfig:
        """Inverse of `to_json`; unknown keys are an error that names the nearest known one."""
        fields = dict(data)
        fields["sparsify"] = sparsify_from_json(fields["sparsify"])
        if fields.get("input") is not None:
            fields["input"] = Input(**_known(Input, fields["input"]))
        if fields.get("matryoshka") is not None:
            fields["matryoshka"] = Matryoshka(**_known(Matryoshka, fields["matryoshka"]))
        return cls(**_known(cls, fields))


def sparsify_from_json(data: Mapping[str, Any]) -> Sparsify:
    """Build a strategy from ``{"kind": name, **fields}``."""
    fields = dict(data)
    kind = fields.pop("kind", None)
    if kind not in STRATEGIES:
        near = difflib.get_close_matches(str(kind), STRATEGIES, n=1, cutoff=0.0)
        raise ValueError(
            f"unknown sparsity {kind!r}; known: {', '.join(STRATEGIES)}; nearest: {near[0]}"
        )
    return STRATEGIES[kind](**_known(STRATEGIES[kind], fields))


def _known(cls: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(cls)]
    for key in data:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)
            raise ValueError(f"{cls.__name__} has no field {key!r}; nearest: {near[0]}")
    return dict(data)
