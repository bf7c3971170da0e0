"""One training step on sparse codes: losses and gradients, never materialising dense codes.

    selection -> decode and residual -> gradient by latent

The encoder product is the only dense one left; everything else touches the active entries only.
`dictlearn.losses.plain_losses` under autograd is the specification: `dense_step` runs it, and the
tests hold `sparse_step` to its values and gradients.

Shapes: B tokens, F latents, N entries, G groups between Matryoshka prefixes (1 without), r = width
read, w = width written. A bag is a pair (group, token): bag = group * B + token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dictlearn.config import Gated, JumpReLU, ReLU, TopK
from dictlearn.densestep import Losses, dense_losses
from dictlearn.dictionary import Dictionary
from dictlearn.gemm import Backend
from dictlearn.losses import AuxK, aux_loss, exponent
from dictlearn.picks import Gather, Picker, Picks, pick
from dictlearn.segments import ByLatent, bag_sum_and_dot, dot
from dictlearn.sharding import Shards
from dictlearn.sparsify import BatchTopKSelection, GatedSelection, JumpReLUSelection


@dataclass(kw_only=True)
class StepResult:
    """What a step found; gradients are in ``.grad`` of the dictionary's parameters."""

    losses: dict[str, Float[Tensor, ""]]
    """Terms of the loss, as `plain_losses` names them."""
    error: Float[Tensor, ""]
    """Mean squared error of the full reconstruction."""
    fired_F: Int[Tensor, " f"]
    """Tokens on which each latent was active."""
    sparse: bool
    """Whether the sparse step ran."""


@dataclass(kw_only=True)
class Step:
    """Arguments of a step besides the data."""

    prefixes: Sequence[int] | None = None
    """Matryoshka prefixes of this step, ascending, the full width last."""
    progress: float = 1.0
    """Share of the training done (P-annealing)."""
    penalty_scale: float = 1.0
    """Factor of the sparsity penalty (warm-up, controller)."""
    aux: AuxK | None = None
    """Auxiliary loss of dead latents."""
    backend: Backend = "default"
    """Of the encoder product."""
    gather: Gather | None = None
    """Concatenates values over the ranks of a data parallel run (BatchTopK)."""
    max_density: float = 0.05
    """Share of active entries above which the dense step is used."""
    compiled: Losses | None = None
    """The losses of the dense step, compiled."""
    picker: Picker = "exact"
    """How TopK finds its entries."""
    shards: Shards | None = None
    """Latents are divided over ranks; the sparse step then never gives way to the dense one."""


def step(
    dictionary: Dictionary,
    x_Br: Float[Tensor, "b r"],
    target_Bw: Float[Tensor, "b w"],
    options: Step,
) -> StepResult:
    """Losses and gradients by the sparse step, or by the dense one where that is faster."""
    if has_sparse_step(dictionary):
        result = sparse_step(dictionary, x_Br, target_Bw, options)
        if result is not None:
            return result
    return dense_step(dictionary, x_Br, target_Bw, options)


def has_sparse_step(dictionary: Dictionary) -> bool:
    """Whether the strategy and options of a dictionary are covered by `sparse_step`."""
    c = dictionary.config
    gated_top = isinstance(c.sparsify, Gated) and c.sparsify.k is not None
    loose = isinstance(c.sparsify, JumpReLU) and not (c.sparsify.positive and c.sparsify.strict)
    plain = not (c.latent_norm or c.decode_scale) and c.input.norm == "none"
    return plain and not gated_top and not loose


def dense_step(
    dictionary: Dictionary,
    x_Br: Float[Tensor, "b r"],
    target_Bw: Float[Tensor, "b w"],
    options: Step,
) -> StepResult:
    """`plain_losses` and its gradients by autograd."""
    for parameter in dictionary.parameters():
        parameter.grad = None
    with torch.enable_grad():
        losses = dense_losses(dictionary, x_Br, target_Bw, options)
        torch.autograd.backward(torch.stack(list(losses.values())).sum())
    with torch.no_grad():
        acts_BF = dictionary.sparsify.training_rule(dictionary.pre_activations(x_Br))
        y_Bw = dictionary.decode(acts_BF, x_Br)
        active_BF = acts_BF != 0
        if isinstance(dictionary.sparsify, BatchTopKSelection):
            kept = acts_BF[acts_BF > 0]
            if kept.numel():
                dictionary.sparsify.update_threshold(kept.min())
        return StepResult(
            losses={k: v.detach() for k, v in losses.items()},
            error=(y_Bw - target_Bw).square().mean(),
            fired_F=active_BF.sum(0),
            sparse=False,
        )


@torch.no_grad()
def sparse_step(
    dictionary: Dictionary,
    x_Br: Float[Tensor, "b r"],
    target_Bw: Float[Tensor, "b w"],
    options: Step,
) -> StepResult | None:
    """See the module. Returns None when more than `max_density` of the entries are active."""
    center_r = dictionary.center()
    xc_Br = x_Br if center_r is None else x_Br - center_r.detach()
    shards = options.shards
    density = options.max_density if shards is None else 1.0
    picks = pick(
        dictionary, xc_Br, options.backend, density, options.gather, shards, options.picker
    )
    if picks is None:
        return None
    for parameter in dictionary.parameters():
        parameter.grad = None
    run = _Run(dictionary, x_Br, xc_Br, target_Bw, picks, options)
    run.decode()
    run.backward()
    if options.aux is not None:
        run.add_aux(options.aux)
    if picks.smallest_kept is not None:
        cast(BatchTopKSelection, dictionary.sparsify).update_threshold(picks.smallest_kept)
    return StepResult(losses=run.losses, error=run.error, fired_F=run.fired_F, sparse=True)


class _Run:
    """State of one sparse step, so that its phases read one after another."""

    losses: dict[str, Tensor]
    error: Tensor
    fired_F: Tensor

    def __init__(
        self,
        dictionary: Dictionary,
        x_Br: Tensor,
        xc_Br: Tensor,
        target_Bw: Tensor,
        picks: Picks,
        options: Step,
    ) -> None:
        self.d, self.x_Br, self.xc_Br, self.target_Bw = dictionary, x_Br, xc_Br, target_Bw
        self.options = options
        self.config = dictionary.config.sparsify
        self.W_Fw = dictionary.W_dec.detach()
        self.rows = x_Br.shape[0]
        self.row_N, self.latent_N, self.pre_N = picks.row, picks.latent, picks.pre
        self.offset = picks.offset
        prefixes = list(options.prefixes or [dictionary.latents])
        self.groups = len(prefixes)
        self.bag_N = self.row_N
        if self.groups > 1:
            self._sort_by_group(prefixes)
        self.plan = ByLatent.plan(self.latent_N, dictionary.latents)
        self.losses = {}

    def _sort_by_group(self, prefixes: list[int]) -> None:
        """Reorder the entries by bag, group first."""
        first = 0 if self.options.shards is None else self.options.shards.first
        bound = torch.tensor(prefixes, device=self.latent_N.device) - first
        group_N = torch.searchsorted(bound, self.latent_N, right=True)
        order_N = group_N.argsort(stable=True)
        group_N = group_N[order_N]
        self.row_N, self.latent_N = self.row_N[order_N], self.latent_N[order_N]
        self.pre_N = self.pre_N[order_N]
        self.bag_N = group_N * self.rows + self.row_N
        count = torch.bincount(self.bag_N, minlength=self.groups * self.rows)
        self.offset = torch.cat([count.new_zeros(1), count.cumsum(0)])

    # ---- forward -----------------------------------------------------------------------------
    def decode(self) -> None:
        """Activations, reconstructions of every prefix, residuals, the losses they give."""
        self.value_N, self.slope_N = self._activate()
        self.fired_F = self.plan.total((self.value_N != 0).to(self.value_N.dtype)).long()
        self.out, self.leaf_N = bag_sum_and_dot(self.W_Fw, self.latent_N, self.offset, self.value_N)
        y_GBw = self._of_all(self.out.detach()).view(self.groups, self.rows, -1)
        base_Bw = self.d.b_dec.detach() - self.target_Bw
        if self.d.config.skip:
            base_Bw = torch.addmm(base_Bw, self.x_Br, self.d.W_skip.detach().T)
        residual_GBw = (y_GBw if self.groups == 1 else y_GBw.cumsum(0)) + base_Bw
        self.residual_Bw = residual_GBw[-1]
        self.base_Bw = base_Bw
        squared_G = torch.linalg.vector_norm(residual_GBw.flatten(1), dim=1).square()
        count = self.target_Bw.numel()
        self.losses["mse"] = squared_G.mean() / count
        self.error = squared_G[-1] / count
        scale = 2.0 / (count * self.groups)
        if self.groups == 1:
            self.grad_Bagw = residual_GBw[0] * scale
            self.grad_Bw = self.grad_Bagw
        else:
            # latents of group g are in the reconstructions of prefixes g, g + 1, ...
            suffix_GBw = residual_GBw.flip(0).cumsum(0).flip(0) * scale
            self.grad_Bagw = suffix_GBw.flatten(0, 1)
            self.grad_Bw = suffix_GBw[0]

    def _of_all(self, value: Tensor) -> Tensor:
        """Sum over the ranks among which the latents are divided."""
        shards = self.options.shards
        return value if shards is None else shards.sum(value.clone())

    def _activate(self) -> tuple[Tensor, Tensor]:
        """Value of every entry and d value / d pre."""
        pre_N = self.pre_N
        if isinstance(self.config, TopK) and not self.config.relu:
            return pre_N, torch.ones_like(pre_N)
        if isinstance(self.config, JumpReLU):
            theta_N = cast(JumpReLUSelection, self.d.sparsify).threshold.detach()[self.latent_N]
            on_N = ((pre_N > theta_N) & (pre_N > 0)).to(pre_N.dtype)
            return pre_N * on_N, on_N
        if isinstance(self.config, Gated):
            selection = cast(GatedSelection, self.d.sparsify)
            self.gain_N = selection.r_mag.detach().exp()[self.latent_N]
            mag_N = self.gain_N * pre_N + selection.b_mag.detach()[self.latent_N]
            on_N = (mag_N > 0).to(pre_N.dtype)
            return mag_N.relu(), on_N
        value_N = pre_N.relu()
        if isinstance(self.config, ReLU) and self.config.function == "tanh_relu":
            value_N = value_N.tanh()
            return value_N, (1 - value_N.square()) * (value_N > 0)
        return value_N, (value_N > 0).to(pre_N.dtype)

    # ---- backward ----------------------------------------------------------------------------
    def backward(self) -> None:
        """Gradients of reconstruction and penalty."""
        d = self.d
        dvalue_N = dot(self.out, self.leaf_N, self.grad_Bagw)
        dec_grad_Fw = self.plan.outer(self.value_N, self.bag_N, self.grad_Bagw)
        dvalue_N = self._penalty(dvalue_N, dec_grad_Fw)
        dpre_N = dvalue_N * self.slope_N
        if isinstance(self.config, JumpReLU):
            self._jump(dvalue_N)
        if isinstance(self.config, Gated):
            dpre_N = self._gated(dpre_N)
        d.W_dec.grad = dec_grad_Fw
        d.W_enc.grad = self.plan.outer(dpre_N, self.row_N, self.xc_Br).T
        sum_F = self.plan.total(dpre_N)
        d.b_enc.grad = sum_F
        d.b_dec.grad = self.grad_Bw.sum(0)
        if d.config.input.center == "b_dec":
            d.b_dec.grad -= self._of_all(d.W_enc.detach() @ sum_F)
        if "penalty" in self.losses:
            self.losses["penalty"] = self._of_all(self.losses["penalty"])
        if d.config.skip:
            d.W_skip.grad = self.grad_Bw.T @ self.x_Br

    def _penalty(self, dvalue_N: Tensor, dec_grad_Fw: Tensor) -> Tensor:
        """Add the gradient of ReLU's and JumpReLU's penalties to values and decoder."""
        config, scale = self.config, self.options.penalty_scale
        if isinstance(config, ReLU):
            p = exponent(config, self.options.progress)
            active_N = self.value_N > 0
            safe_N = torch.where(active_N, self.value_N, 1.0)
            power_N = torch.where(active_N, safe_N.pow(p), 0.0)
            slope_N = torch.where(active_N, p * safe_N.pow(p - 1), 0.0)
            factor = scale * config.l1 / self.rows
            if not config.decoder_norm:
                self.losses["penalty"] = factor * power_N.sum()
                return dvalue_N + factor * slope_N
            norm_F = torch.linalg.vector_norm(self.W_Fw, dim=1)
            total_F = self.plan.total(power_N)
            self.losses["penalty"] = factor * total_F @ norm_F
            self._add_norm_gradient(dec_grad_Fw, factor * total_F, norm_F)
            return torch.addcmul(dvalue_N, slope_N, norm_F[self.latent_N], value=factor)
        if isinstance(config, JumpReLU) and config.penalty == "tanh":
            norm_F = torch.linalg.vector_norm(self.W_Fw, dim=1)
            norm_N = norm_F[self.latent_N]
            tanh_N = (config.tanh_scale * self.value_N * norm_N).tanh()
            factor = scale * config.l0 / self.rows
            self.losses["penalty"] = factor * tanh_N.sum()
            slope_N = factor * config.tanh_scale * (1 - tanh_N.square())
            total_F = self.plan.total(slope_N * self.value_N)
            self._add_norm_gradient(dec_grad_Fw, total_F, norm_F)
            return torch.addcmul(dvalue_N, slope_N, norm_N)
        return dvalue_N

    def _add_norm_gradient(self, dec_grad_Fw: Tensor, weight_F: Tensor, norm_F: Tensor) -> None:
        """``d |d_i| / d d_i = d_i / |d_i|``."""
        dec_grad_Fw.addcmul_(self.W_Fw, (weight_F / norm_F)[:, None])

    def _jump(self, dvalue_N: Tensor) -> None:
        """Straight-through gradient to theta (arXiv:2407.14435, equations 11 and 12)."""
        config = cast(JumpReLU, self.config)
        selection = cast(JumpReLUSelection, self.d.sparsify)
        theta_N = selection.threshold.detach()[self.latent_N]
        window_N = ((self.pre_N - theta_N).abs() < config.bandwidth / 2).to(dvalue_N.dtype)
        dtheta_N = -theta_N * dvalue_N
        if config.penalty == "l0":
            factor = self.options.penalty_scale * config.l0 / self.rows
            self.losses["penalty"] = factor * (self.pre_N > theta_N).to(dvalue_N.dtype).sum()
            dtheta_N = dtheta_N - factor
        selection.threshold.grad = self.plan.total(dtheta_N * window_N / config.bandwidth)

    def _gated(self, dmag_N: Tensor) -> Tensor:
        """Gradient to ``u`` from the magnitudes, and from the gate by its own losses."""
        selection = cast(GatedSelection, self.d.sparsify)
        gate_N = self.pre_N + selection.b_gate.detach()[self.latent_N]
        factor = self.options.penalty_scale * cast(Gated, self.config).l1 / self.rows
        self.losses["penalty"] = factor * gate_N.sum()
        ordered = self.groups == 1
        order_N = slice(None) if ordered else self.row_N.argsort(stable=True)
        count_B = torch.bincount(self.row_N, minlength=self.rows)
        offset = torch.cat([count_B.new_zeros(1), count_B.cumsum(0)])
        y_Bw, leaf_N = bag_sum_and_dot(self.W_Fw, self.latent_N[order_N], offset, gate_N[order_N])
        residual_Bw = self._of_all(y_Bw.detach()) + self.base_Bw
        self.losses["gate"] = residual_Bw.square().mean()
        dgate_N = torch.empty_like(gate_N)
        dgate_N[order_N] = dot(y_Bw, leaf_N, residual_Bw * (2.0 / self.target_Bw.numel()))
        dgate_N += factor
        gained_N = dmag_N * self.gain_N
        selection.b_gate.grad = self.plan.total(dgate_N)
        selection.b_mag.grad = self.plan.total(dmag_N)
        selection.r_mag.grad = self.plan.total(gained_N * self.pre_N)
        return dgate_N + gained_N

    def add_aux(self, aux: AuxK) -> None:
        """Add the loss of dead latents, dense over those alone."""
        dead = aux.dead_F.nonzero().flatten()
        shards = self.options.shards
        n_dead = dead.numel() if shards is None else int(self._of_all(aux.dead_F.sum()))
        if not n_dead:
            return
        d = self.d
        enc_rD = d.W_enc.detach()[:, dead].requires_grad_()
        bias_D = d.b_enc.detach()[dead].requires_grad_()
        dec_Dw = self.W_Fw[dead].requires_grad_()
        with torch.enable_grad():
            pre_BD = torch.addmm(bias_D, self.xc_Br, enc_rD)
            leaves = (enc_rD, bias_D, dec_Dw)
            if shards is None:
                loss = aux_loss(pre_BD, dec_Dw, -self.residual_Bw, aux)
                enc_g, bias_g, dec_g = torch.autograd.grad(loss, leaves)
            else:
                e_hat_Bw = shards.dead_decoding(pre_BD, dec_Dw, min(aux.k, n_dead))
                error_Bw = self._of_all(e_hat_Bw.detach()) + self.residual_Bw
                scale = aux.coefficient * min(n_dead / aux.k, 1.0)
                loss = scale * error_Bw.square().mean()
                slope_Bw = error_Bw * (2.0 * scale / error_Bw.numel())
                enc_g, bias_g, dec_g = torch.autograd.grad(e_hat_Bw, leaves, slope_Bw)
        self.losses["aux"] = loss.detach()
        cast(Tensor, d.W_enc.grad).T.index_add_(0, dead, enc_g.T)
        cast(Tensor, d.W_dec.grad).index_add_(0, dead, dec_g)
        cast(Tensor, d.b_enc.grad).index_add_(0, dead, bias_g)
        if d.config.input.center == "b_dec":
            cast(Tensor, d.b_dec.grad).sub_(self._of_all(enc_rD.detach() @ bias_g))
