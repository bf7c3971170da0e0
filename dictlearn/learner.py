"""One dictionary in training: optimiser, constraint, dead latents, and its whole state.

Shapes: B tokens, F latents, r = width read, w = width written.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dictlearn.archetypes import Hull
from dictlearn.candidates import compiled, multiplies_bfloat16
from dictlearn.config import BatchTopK
from dictlearn.densestep import check_compiled, compiled_losses
from dictlearn.dictionary import Dictionary
from dictlearn.distributed import Ranks
from dictlearn.eightbit import multiplies_int8
from dictlearn.gemm import Backend
from dictlearn.kernels import Step, StepResult, has_sparse_step, step
from dictlearn.losses import AuxK, prefixes_of
from dictlearn.picks import Gather, takes_candidates
from dictlearn.schedule import TrainConfig
from dictlearn.sharding import Shards
from dictlearn.sparsify import GatedSelection
from dictlearn.upkeep import L0Controller, WeightAverage, resample

log = logging.getLogger(__name__)

_TINY = 1e-12


@dataclass(kw_only=True)
class Learner:
    """A dictionary, its optimiser and what else it needs to go on from any step.

    The optimiser works on views of the parameters in which each latent's row is contiguous, so
    that its fused kernel applies.
    """

    name: str
    """Of its folder and its rows in the log."""
    dictionary: Dictionary
    """In training units; see `Dictionary.rescale_sites`."""
    config: TrainConfig
    """Schedules and options."""
    backend: Backend = "default"
    """Of the encoder product."""
    failed: str = ""
    """Why training stopped early; empty while all is well."""
    ranks: Ranks = field(default_factory=Ranks)
    """Processes that share the batch."""
    shards: Shards | None = None
    """Where the latents are divided over ranks: `dictionary` holds those of this one."""
    stopped: str = ""
    """Why the held-out loss ended training early; empty while it improves."""

    def __post_init__(self) -> None:
        d = self.dictionary
        options = d.config.input
        if options.norm != "none" or d.config.decode_scale:
            what = f"input norm {options.norm!r}" if options.norm != "none" else "decode_scale"
            raise ValueError(
                f"dictionary {self.name!r} has {what}, which can be evaluated but not trained; "
                "train with TrainConfig(normalize='scale') instead"
            )
        if self.shards is not None and not has_sparse_step(d):
            raise ValueError(
                f"dictionary {self.name!r} has no sparse step ({d.config.sparsify}"
                f"{', latent_norm' if d.config.latent_norm else ''}), so its latents cannot be "
                "divided over ranks; leave shard_latents out"
            )
        self.whole_config = d.config if self.shards is None else self.shards.config
        batch_top = isinstance(d.config.sparsify, BatchTopK)
        if batch_top and self.ranks.world > 1 and not has_sparse_step(d):
            raise ValueError(
                f"dictionary {self.name!r}: BatchTopK with latent_norm is trained on one rank "
                f"only, not on {self.ranks.world}: its dense step knows no threshold of all ranks"
            )
        if self.config.picker == "candidates" and takes_candidates(d.config.sparsify):
            compiled()  # says now what is not installed
            if d.device.type == "cpu" and not (multiplies_bfloat16() or multiplies_int8()):
                log.warning(
                    "%s: this CPU has no fast product of bfloat16 or 8 bits that is known here, so "
                    "picker='candidates' is several times slower than picker='exact'; start the "
                    "run with the latter",
                    self.name,
                )
        self.compiled = None
        if self.config.compile != "none":
            check_compiled(d.config, self.name)
            self.compiled = compiled_losses(self.config.compile)
        if self.config.precision == "bfloat16":
            self.backend = "bfloat16"
        if self.config.target_l0 and not d.config.latent_norm:
            fresh = self.config.init_decoder == "random" and not self.config.archetypes
            d.start_at_l0(self.config.target_l0, self.whole_config.latents, shorten=fresh)
        self.trained = {n: p for n, p in d.named_parameters() if p.requires_grad}
        if isinstance(d.sparsify, GatedSelection):
            del self.trained["b_enc"]
        self.hull = self._hull()
        self.unit = self.config.unit_decoder and self.hull is None
        self.views = {
            n: nn.Parameter(p.data.T if n == "W_enc" else p.data) for n, p in self.trained.items()
        }
        self.optimizer = torch.optim.Adam(
            list(self.views.values()),
            lr=1.0,
            betas=(self.config.beta1, self.config.beta2),
            fused=d.device.type in ("cpu", "cuda"),
        )
        self.since_fired_F = torch.zeros(d.latents, dtype=torch.int64, device=d.device)
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self.best = torch.tensor([math.inf, 0.0], dtype=torch.float64)
        c = self.config
        self.controller = L0Controller(c.target_l0, c.l0_gain) if c.target_l0 else None
        self.average = WeightAverage(self.trained, c.ema) if c.ema else None
        if self.unit:
            self._renormalize()

    def _hull(self) -> Hull | None:
        """Let the factors of an archetypal decoder be trained in its place."""
        if not self.config.archetypes:
            return None
        hull = Hull(self.dictionary.W_dec, self.config.archetypes, self.config.relax)
        del self.trained["W_dec"]
        self.trained |= hull.parameters
        return hull

    def train_step(
        self, x_Br: Float[Tensor, "b r"], target_Bw: Float[Tensor, "b w"], number: int
    ) -> StepResult:
        """Take optimiser step `number` (from 0) on a batch."""
        config, d = self.config, self.dictionary
        matryoshka = self.whole_config.matryoshka
        sampled = matryoshka.sampled if matryoshka else 0
        drawn = torch.rand(sampled, generator=self.generator).tolist() if sampled else []
        options = Step(
            prefixes=prefixes_of(matryoshka, self.whole_config.latents, drawn),
            progress=number / config.steps,
            penalty_scale=config.penalty_scale(number) * self._controlled(),
            aux=self._aux(),
            backend=self.backend,
            gather=self.gather,
            max_density=config.max_density,
            compiled=self.compiled,
            picker=config.picker,
            shards=self.shards,
        )
        result = step(d, x_Br, target_Bw, options)
        self.ranks.reduce(result)
        tokens = x_Br.shape[0] * self.ranks.world
        self.since_fired_F += tokens
        self.since_fired_F.masked_fill_(result.fired_F > 0, 0)
        self._update(result, number)
        if self.failed:
            return result
        if self.controller is not None:
            self.controller.update(self.active(result) / tokens)
        if self.average is not None:
            self.average.update()
        every, done = config.resample_every, number + 1
        if every and done % every == 0 and done <= config.resample_until * config.steps:
            dead_F = self.dead()
            moments = {n: self.optimizer.state[v] for n, v in self.views.items()}
            resample(d, dead_F, x_Br, target_Bw, moments, self.generator)
            self.since_fired_F.masked_fill_(dead_F, 0)
            inner = [v for slot in moments.values() for v in slot.values()]
            self.ranks.spread([v.data for v in self.views.values()] + inner)
            self.generator.set_state(self.ranks.same(self.generator.get_state()))
        return result

    @property
    def gather(self) -> Gather | None:
        """Concatenates values over the ranks that share the batch, or the latents."""
        if self.shards is not None:
            return Ranks(rank=self.shards.rank, world=self.shards.world).gather
        return self.ranks.gather if self.ranks.world > 1 else None

    def active(self, result: StepResult) -> float:
        """Return the active entries of the batch; every rank must ask."""
        return float(self._of_all(result.fired_F.sum()))

    def dead_share(self) -> float:
        """Return the share of latents that are dead; every rank must ask."""
        return float(self._of_all(self.dead().sum())) / self.whole_config.latents

    def _of_all(self, value: Tensor) -> Tensor:
        return value if self.shards is None else self.shards.sum(value)

    def _controlled(self) -> float:
        return self.controller.factor if self.controller is not None else 1.0

    @torch.no_grad()
    def error(self, x_Br: Float[Tensor, "b r"], target_Bw: Float[Tensor, "b w"]) -> float:
        """Mean squared error of the reconstruction, under the rule of inference."""
        d = self.dictionary
        y_Bw = d.decode_entries(d.encode_entries(x_Br), x_Br)
        return float((y_Bw - target_Bw).square().mean())

    def note_validation(self, fvu: float, done: int) -> bool:
        """Remember the best held-out FVU; say whether `patience` has run out."""
        patience = self.config.patience
        if fvu < float(self.best[0]):
            self.best[0], self.best[1] = fvu, done
        elif patience and done - int(self.best[1]) >= patience * self.config.validate_every:
            self.stopped = (
                f"{self.name}: held-out FVU has not improved since step {int(self.best[1])} "
                f"({float(self.best[0]):.4f}, now {fvu:.4f})"
            )
        return bool(self.stopped)

    def finish(self) -> None:
        """Put the averaged weights in place, where they were asked for."""
        if self.average is not None:
            self.average.apply()
            self._constrain()

    @torch.no_grad()
    def _update(self, result: StepResult, number: int) -> None:
        if self.hull is not None:
            self.hull.backward()
        for name, view in self.views.items():
            grad = self.trained[name].grad
            view.grad = grad.T if name == "W_enc" and grad is not None else grad
        self.ranks.average([v.grad for v in self.views.values() if v.grad is not None])
        config = self.config
        if self.unit:
            row_grad, row = self.views["W_dec"].grad, self.views["W_dec"]
            if row_grad is not None:
                along_F1 = (row_grad * row).sum(1, keepdim=True)
                row_grad.addcmul_(row, along_F1, value=-1.0)
        named = {n: v.grad for n, v in self.views.items() if v.grad is not None}
        grads = list(named.values())
        if self.shards is None:
            self.grad_norm = torch.stack([torch.linalg.vector_norm(g) for g in grads]).norm()
        else:
            self.grad_norm = self.shards.norm(named)
        self.lr = config.learning_rate(number, self.whole_config.latents)
        if self.grad_norm.device.type == "cpu":  # elsewhere a check would wait for the device
            self.check(result, number)
            if self.failed:
                return
        if config.clip:
            factor = (config.clip / (self.grad_norm + _TINY)).clamp(max=1.0)
            if factor.device.type != "cpu" or float(factor) < 1.0:
                torch._foreach_mul_(grads, factor)
        self.optimizer.param_groups[0]["lr"] = self.lr
        self.optimizer.step()
        self._constrain()

    def _constrain(self) -> None:
        if self.hull is not None:
            self.hull.project()
        elif self.unit:
            self._renormalize()

    @torch.no_grad()
    def _renormalize(self) -> None:
        row = self.dictionary.W_dec
        row.div_(torch.linalg.vector_norm(row, dim=1, keepdim=True).clamp(min=_TINY))

    def dead(self) -> Tensor:
        """Return which latents have not fired for `TrainConfig.dead_tokens()` tokens."""
        return self.since_fired_F >= self.config.dead_tokens()

    def _aux(self) -> AuxK | None:
        config = self.config
        k = self.dictionary.config.d_write // 2 if config.aux_k is None else config.aux_k
        if not k or not config.aux_coefficient:
            return None
        return AuxK(dead_F=self.dead(), k=max(1, k), coefficient=config.aux_coefficient)

    # ---- state -------------------------------------------------------------------------------
    def state(self) -> dict[str, Tensor]:
        """Every tensor a resumed run needs, by name; gathered, so every rank must ask."""
        out = {f"weights.{k}": v for k, v in self.dictionary.state_dict().items()}
        for name, view in self.views.items():
            for key, value in self.optimizer.state[view].items():
                out[f"adam.{name}.{key}"] = value
        out["since_fired"] = self.since_fired_F
        out["generator"] = self.generator.get_state()
        out["best"] = self.best
        if self.hull is not None:
            out |= self.hull.state()
        if self.controller is not None:
            out["controller"] = self.controller.log_factor
        if self.average is not None:
            out |= {f"ema.{k}": v for k, v in self.average.sums.items()}
            out["ema_count"] = self.average.count
        return out if self.shards is None else self.shards.whole(out)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `state`; parameters are filled in place."""
        if self.shards is not None:
            tensors = self.shards.share(tensors)
        weights = {k[8:]: v for k, v in tensors.items() if k.startswith("weights.")}
        self.dictionary.load_state_dict(weights)
        for name, view in self.views.items():
            prefix = f"adam.{name}."
            slot: dict[str, Any] = {
                k[len(prefix) :]: v.to(view.device)
                for k, v in tensors.items()
                if k.startswith(prefix)
            }
            if slot:
                self.optimizer.state[view] = slot
        self.since_fired_F.copy_(tensors["since_fired"])
        self.generator.set_state(tensors["generator"])
        self.best.copy_(tensors["best"])
        if self.hull is not None:
            self.hull.load_state(tensors)
        if self.controller is not None:
            self.controller.log_factor.copy_(tensors["controller"])
        if self.average is not None:
            for name, value in self.average.sums.items():
                value.copy_(tensors[f"ema.{name}"])
            self.average.count.copy_(tensors["ema_count"])

    @torch.no_grad()
    def fill(self, whole: Dictionary) -> None:
        """Write the weights, gathered where they are divided, into the whole dictionary."""
        if self.shards is not None:
            whole.load_state_dict(self.shards.whole(self.dictionary.state_dict()))

    def check(self, result: StepResult, number: int) -> None:
        """Note a loss or gradient that is not finite in `failed`; the weights then stay."""
        loss = float(sum(result.losses.values()))
        if math.isfinite(loss) and math.isfinite(float(self.grad_norm)):
            return
        terms = ", ".join(f"{k} {float(v):.3g}" for k, v in result.losses.items())
        self.failed = (
            f"the loss of {self.name!r} is {loss} at step {number} ({terms}; gradient norm "
            f"{float(self.grad_norm):.3g}, learning rate {self.lr:.2g}). Lower the learning rate, "
            "or check the data with `actstore verify`"
        )
