"""Which latents are active: one small module a strategy, holding the parameters it needs.

`Selection.forward` is the rule at inference. `Selection.training_rule` is the rule under training,
where it differs (BatchTopK). Both map pre-activations to dense activations; `Selection.entries`
gives the active ones only.

Shapes: B tokens, F latents, K kept for a token, N active entries in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dictlearn.config import BatchTopK, Gated, JumpReLU, ReLU, Sparsify, TopK

START = 0.1
"""Initial theta of JumpReLU where nothing is known about the L0 wanted."""


@dataclass(frozen=True, kw_only=True)
class Entries:
    """Active entries of a batch of codes, sorted by row."""

    row: Int[Tensor, " n"]
    """Token of each entry, ascending."""
    latent: Int[Tensor, " n"]
    """Latent of each entry."""
    value: Float[Tensor, " n"]
    """Activation of each entry; entries whose value is 0 are inactive and may be present."""
    n_rows: int
    """B."""

    def offsets(self) -> Int[Tensor, " rows+1"]:
        """Where the entries of each row start; the last one is their number."""
        count_B = torch.bincount(self.row, minlength=self.n_rows)
        return torch.cat([count_B.new_zeros(1), count_B.cumsum(0)])


def entries_from_dense(acts_BF: Float[Tensor, "b f"]) -> Entries:
    """Read off the non-zero entries of dense codes."""
    row_N, latent_N = acts_BF.nonzero(as_tuple=True)
    return Entries(
        row=row_N, latent=latent_N, value=acts_BF[row_N, latent_N], n_rows=acts_BF.shape[0]
    )


class Selection(nn.Module):
    """Base: what every strategy offers. `config` is the strategy's dataclass."""

    def __init__(self, config: Sparsify) -> None:
        super().__init__()
        self.config = config

    def forward(self, pre_BF: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
        """Activations at inference."""
        raise NotImplementedError

    def training_rule(self, pre_BF: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
        """Activations in training, differentiable; the inference rule unless overridden."""
        return cast(Tensor, self(pre_BF))

    def entries(self, pre_BF: Float[Tensor, "b f"]) -> Entries:
        """Active entries at inference."""
        return entries_from_dense(self(pre_BF))


class ReLUSelection(Selection):
    """``relu(pre)`` or ``tanh(relu(pre))``."""

    def forward(self, pre_BF: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
        """See the class."""
        acts_BF = pre_BF.relu()
        return acts_BF.tanh() if cast(ReLU, self.config).function == "tanh_relu" else acts_BF


class TopKSelection(Selection):
    """The k largest of a row, or the largest of each of k contiguous groups."""

    def top(self, pre_BF: Float[Tensor, "b f"]) -> tuple[Float[Tensor, "b k"], Int[Tensor, "b k"]]:
        """Values and latents kept; order within a row is unspecified."""
        value_BK, index_BK = self.top_pre(pre_BF)
        return (value_BK.relu() if cast(TopK, self.config).relu else value_BK), index_BK

    def top_pre(
        self, pre_BF: Float[Tensor, "b f"]
    ) -> tuple[Float[Tensor, "b k"], Int[Tensor, "b k"]]:
        """As `top`, before ReLU."""
        config = cast(TopK, self.config)
        if config.group_max:
            grouped_BKg = pre_BF.reshape(pre_BF.shape[0], config.k, -1)
            value_BK, index_BK = grouped_BKg.max(dim=2)
            start_K = torch.arange(config.k, device=pre_BF.device) * grouped_BKg.shape[2]
            return value_BK, index_BK + start_K
        kept = pre_BF.topk(config.k, dim=1, sorted=False)
        return kept.values, kept.indices

    def forward(self, pre_BF: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
        """See the class."""
        value_BK, index_BK = self.top(pre_BF)
        return torch.zeros_like(pre_BF).scatter(1, index_BK, value_BK)

    def entries(self, pre_BF: Float[Tensor, "b f"]) -> Entries:
        """Exactly k entries a row, zeros among them where ReLU cut."""
        value_BK, index_BK = self.top(pre_BF)
        n_rows, k = value_BK.shape
        row_N = torch.arange(n_rows, device=pre_BF.device).repeat_interleave(k)
        return Entries(
            row=row_N, latent=index_BK.reshape(-1), value=value_BK.reshape(-1), n_rows=n_rows
        )


class BatchTopKSelection(Selection):
    """Threshold at inference; the k * B largest of the batch in training.

    The buffer `threshold` is -1 until the first training step.
    """

    threshold: Tensor

    def __init__(self, config: BatchTopK) -> None:
        super().__init__(config)
        self.register_buffer("threshold", torch.tensor(-1.0))

    def forward(self, pre_BF: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
        """See the class."""
        strict = cast(BatchTopK, self.config).strict
        keep_BF = pre_BF > self.threshold if strict else pre_BF >= self.threshold
        return pre_BF.relu() * keep_BF

    def training_rule(self, pre_BF: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
        """Keep the k * B largest of ``relu(pre)``."""
        acts_BF = pre_BF.relu()
        n_keep = cast(BatchTopK, self.config).k * pre_BF.shape[0]
        index_N = acts_BF.flatten().topk(n_keep, sorted=False).indices
        mask_BF = torch.zeros_like(acts_BF).flatten().scatter(0, index_N, 1.0).view_as(acts_BF)
        return acts_BF * mask_BF

    @torch.no_grad()
    def update_threshold(self, smallest_kept: Float[Tensor, ""]) -> None:
        """Move the running threshold towards the smallest activation kept in a batch."""
        momentum = cast(BatchTopK, self.config).threshold_momentum
        moved = momentum * self.threshold + (1 - momentum) * smallest_kept
        self.threshold.copy_(torch.where(self.threshold < 0, smallest_kept, moved))


class _Step(torch.autograd.Function):
    """``H(pre - theta)`` with the rectangular straight-through gradient to theta."""

    @staticmethod
    def forward(ctx, pre, theta, bandwidth, strict):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(pre, theta)
        ctx.bandwidth = bandwidth
        return (pre > theta if strict else pre >= theta).to(pre.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        pre, theta = ctx.saved_tensors
        window = ((pre - theta).abs() < ctx.bandwidth / 2).to(grad.dtype)
        return None, (-grad * window / ctx.bandwidth).sum(0), None, None


class JumpReLUSelection(Selection):
    """``pre * H(pre - theta)``; parameter `threshold` [F] is theta."""

    def __init__(self, config: JumpReLU, latents: int) -> None:
        super().__init__(config)
        first = START if config.threshold is None else config.threshold
        self.threshold = nn.Parameter(torch.full((latents,), first))

    def gate(self, pre_BF: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
        """``H(pre - theta)``, differentiable in theta by the straight-through estimator."""
        config = cast(JumpReLU, self.config)
        return cast(Tensor, _Step.apply(pre_BF, self.threshold, config.bandwidth, config.strict))

    def forward(self, pre_BF: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
        """See the class. d/d theta of ``pre H`` is ``-theta/eps`` in the window (equation 11)."""
        positive = cast(JumpReLU, self.config).positive
        gate_BF = self.gate(pre_BF)
        cut_BF = pre_BF.relu() if positive else pre_BF
        if not (torch.is_grad_enabled() and self.threshold.requires_grad):
            return cut_BF * gate_BF
        # values: pre * H; gradient to pre: H; gradient to theta: -(theta / eps) * window
        hard_BF = gate_BF.detach()
        return cut_BF * hard_BF + self.threshold.detach() * (gate_BF - hard_BF)


class GatedSelection(Selection):
    """Gate and magnitude paths over shared directions; its input is ``u`` (no b_enc)."""

    def __init__(self, config: Gated, latents: int) -> None:
        super().__init__(config)
        self.b_gate = nn.Parameter(torch.zeros(latents))
        self.b_mag = nn.Parameter(torch.zeros(latents))
        self.r_mag = nn.Parameter(torch.zeros(latents))

    def forward(self, pre_BF: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
        """See the class."""
        mag_BF = (self.r_mag.exp() * pre_BF + self.b_mag).relu()
        k = cast(Gated, self.config).k
        if k is not None:
            value_BK, index_BK = mag_BF.topk(k, dim=1)
            mag_BF = torch.zeros_like(mag_BF).scatter(1, index_BK, value_BK)
        return mag_BF * (pre_BF + self.b_gate > 0)


def build(config: Sparsify, latents: int) -> Selection:
    """Return the module that executes `config` over `latents` latents."""
    match config:
        case ReLU():
            return ReLUSelection(config)
        case TopK():
            return TopKSelection(config)
        case BatchTopK():
            return BatchTopKSelection(config)
        case JumpReLU():
            return JumpReLUSelection(config, latents)
        case Gated():
            return GatedSelection(config, latents)
