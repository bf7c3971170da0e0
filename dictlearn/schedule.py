"""How a training run goes: its configuration and schedules. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Shape = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Configuration of `dictlearn.train`; saved beside the weights as JSON."""

    steps: int = 2000
    """Optimiser steps."""
    batch_size: int = 4096
    """Tokens of a step."""
    lr: float | None = None
    """Peak learning rate of Adam; by default ``1e-3 / sqrt(latents / 2048)``, at most 2e-3,
    whatever the number of steps. Meant for thousands of steps: runs of 150 steps on 3,072
    latents and of 600 on 1,536 ended with a lower FVU at 4e-3 (``docs/results/quality.md``)."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises linearly from 0."""
    decay: float = 0.2
    """Share of the steps, at the end, in which it falls to 0."""
    decay_shape: Shape = "linear"
    """Shape of the fall: linear, cosine (half a period), or constant for none."""
    beta1: float = 0.9
    """Adam's first moment decay."""
    beta2: float = 0.999
    """Adam's second moment decay."""
    clip: float = 1.0
    """Largest norm of the gradient; larger ones are scaled down. 0 switches it off."""
    unit_decoder: bool = True
    """Keep every decoder row at norm 1; the gradient is projected on the tangent first."""
    normalize: Literal["scale", "none"] = "scale"
    """``scale`` divides every site by the root of its mean channel variance (of the store's
    statistics); the factor is folded into the weights at the end."""
    init_bias: Literal["mean", "zero"] = "mean"
    """Initial b_dec (and b_in): the mean of the store's statistics, or zero."""
    init_decoder: Literal["random", "points", "kmeans", "nmf"] = "random"
    """First decoder rows: as the dictionary was made, tokens of the store, centroids of KMeans, or
    parts of a non-negative factorisation (the last two need scikit-learn); `dictlearn.starts`."""
    archetypes: int = 0
    """Keep decoder rows in the convex hull of so many tokens, or centroids with
    ``init_decoder="kmeans"``, instead of at norm 1 (`dictlearn.archetypes`); 0 does not."""
    relax: float = 0.0
    """How far from the hull rows may be, in mean norms of the centred points."""
    aux_k: int | None = None
    """Dead latents used by the auxiliary loss for a token; half the width written by default;
    0 switches it off."""
    aux_coefficient: float = 1 / 32
    """Weight of the auxiliary loss."""
    dead_after: int | None = None
    """Tokens without firing after which a latent is dead; by default a twentieth of the run's
    tokens, at most 10 million."""
    penalty_warmup: float = 0.1
    """Share of the steps in which the sparsity penalty rises linearly from 0."""
    target_l0: float | None = None
    """Steer the penalty of ReLU, JumpReLU or Gated so that the mean L0 approaches this; JumpReLU
    also starts there, if it was given no threshold (`Dictionary.start_at_l0`)."""
    l0_gain: float = 0.03
    """Speed of that controller: change of the log factor a step, for an L0 off by e."""
    ema: float = 0.0
    """Momentum of an average of the weights, which is what the run ends with; 0 keeps none."""
    resample_every: int = 0
    """Steps between resamplings of dead latents; 0 for none."""
    resample_until: float = 0.5
    """Share of the run after which nothing is resampled any more."""
    threshold_batches: int = 16
    """Batches, after the last step, over which the inference threshold of BatchTopK is set anew
    with the final weights; 0 keeps the running mean of the training."""
    validate_every: int = 0
    """Steps between measurements of the FVU on the held-out items; needs `holdout`; 0 for none."""
    validation_batches: int = 8
    """Batches of such a measurement."""
    patience: int = 0
    """Measurements without improvement after which a dictionary stops; 0 never stops one."""
    tokens: str | None = None
    """Token kinds to read, ``cls,patch``; every kind stored by default."""
    holdout: float = 0.0
    """Share of the items never trained on (evaluate with the same `split_seed`)."""
    split_seed: int = 0
    """Key of the held-out split."""
    seed: int = 0
    """Key of the order of the batches and of every random choice of the run."""
    streams: int = 1
    """Canonical streams of the reader: data parallel runs need a multiple of their ranks, and the
    same number gives the same batches whatever the ranks."""
    shard_latents: bool = False
    """Divide the latents, not the batch, over the ranks: for dictionaries too wide for one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the encoder product, and of every product of a dense step (autocast); weights,
    gradients and all else are float32."""
    compile: Literal["none", "inductor", "aot_eager", "eager"] = "none"
    """Backend of `torch.compile` for the losses of dense steps (kinds with no sparse step, or too
    dense for it); ``none`` runs them as they are."""
    gemm: Literal["auto", "default", "onednn"] = "auto"
    """Backend of the encoder product on CPU; ``auto`` times them at the start and records it."""
    picker: Literal["exact", "candidates"] = "exact"
    """How TopK finds its latents on CPU: by the exact product, or by one in bfloat16 or 8 bits
    whose best are computed again in float32 (`dictlearn.candidates`, `dictlearn.eightbit`; needs
    numba, the extra ``fast``). Other kinds and devices, and divided latents, are always exact."""
    max_density: float = 0.05
    """Share of active latents above which the dense step is used; at 0.05 the sparse one took 0.36
    of its time and at 0.08 0.66 (`benchmarks/train_step.py --crossover`, one CPU thread)."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0 writes none."""
    keep: int = 2
    """Checkpoints kept."""
    log_every: int = 20
    """Steps between rows of the log."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("steps", 1, math.inf),
            ("batch_size", 1, math.inf),
            ("log_every", 1, math.inf),
            ("keep", 1, math.inf),
            ("streams", 1, math.inf),
            ("checkpoint_every", 0, math.inf),
            ("archetypes", 0, math.inf),
            ("relax", 0, math.inf),
            ("warmup", 0, 1),
            ("decay", 0, 1),
            ("penalty_warmup", 0, 1),
            ("holdout", 0, 0.9),
            ("clip", 0, math.inf),
            ("aux_coefficient", 0, math.inf),
            ("max_density", 0, 1),
            ("ema", 0, 0.999999),
            ("resample_every", 0, math.inf),
            ("resample_until", 0, 1),
            ("validate_every", 0, math.inf),
            ("validation_batches", 1, math.inf),
            ("threshold_batches", 0, math.inf),
            ("patience", 0, math.inf),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"TrainConfig.{name} = {value} is outside [{low}, {high}]")
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"TrainConfig.lr must be > 0, got {self.lr}")
        if self.target_l0 is not None and self.target_l0 <= 0:
            raise ValueError(f"TrainConfig.target_l0 must be > 0, got {self.target_l0}")
        if (self.validate_every or self.patience) and not self.holdout:
            raise ValueError(
                "validate_every and patience need held-out items: set holdout, say 0.1"
            )
        if self.picker not in ("exact", "candidates"):
            raise ValueError(f"TrainConfig.picker={self.picker!r} is not exact or candidates")
        kinds = ("random", "points", "kmeans", "nmf")
        if self.init_decoder not in kinds:
            raise ValueError(
                f"TrainConfig.init_decoder={self.init_decoder!r} is not one of {kinds}"
            )
        if self.archetypes and self.init_decoder == "nmf":
            raise ValueError(
                "parts of NMF are no data points: archetypes excludes init_decoder=nmf"
            )
        if self.relax and not self.archetypes:
            raise ValueError("relax is the distance from a hull: set archetypes, say 2000")
        if self.archetypes and self.resample_every:
            raise ValueError(
                "resampled rows would leave the hull: archetypes excludes resample_every"
            )
        if self.shard_latents:
            self._check_sharded()
        if self.patience and not self.validate_every:
            raise ValueError("patience counts measurements: set validate_every")
        if self.warmup + self.decay > 1:
            raise ValueError(
                f"TrainConfig.warmup + decay = {self.warmup + self.decay} is more than the run"
            )

    def _check_sharded(self) -> None:
        for name, plain in (
            ("archetypes", 0),
            ("resample_every", 0),
            ("validate_every", 0),
            ("init_decoder", "random"),
        ):
            if (value := getattr(self, name)) != plain:
                raise ValueError(
                    f"shard_latents excludes {name} (it is {value!r}): that needs every latent "
                    "on one rank"
                )

    def learning_rate(self, step: int, latents: int) -> float:
        """Learning rate of step `step` (from 0) for a dictionary of `latents`."""
        peak = self.lr or min(2e-3, 1e-3 / math.sqrt(latents / 2048))
        return peak * self.schedule(step)

    def schedule(self, step: int) -> float:
        """Factor of the learning rate at `step`: rise, plateau, fall to 0 after the last step."""
        rise = round(self.warmup * self.steps)
        fall = round(self.decay * self.steps)
        up = (step + 1) / rise if rise else 1.0
        left = (self.steps - step) / fall if fall and self.decay_shape != "constant" else 1.0
        left = min(left, 1.0)
        if self.decay_shape == "cosine":
            left = 0.5 - 0.5 * math.cos(math.pi * left)
        return min(up, 1.0) * left

    def penalty_scale(self, step: int) -> float:
        """Factor of the sparsity penalty at `step`."""
        rise = round(self.penalty_warmup * self.steps)
        return min((step + 1) / rise, 1.0) if rise else 1.0

    def dead_tokens(self) -> int:
        """Tokens without firing after which a latent is dead."""
        if self.dead_after is not None:
            return self.dead_after
        return min(10_000_000, self.steps * self.batch_size // 20)

    def to_json(self) -> dict[str, Any]:
        """JSON-able form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainConfig:
        """Inverse of `to_json`; an unknown key is an error that names the nearest."""
        names = [f.name for f in dataclasses.fields(cls)]
        for key in data:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)
                raise ValueError(f"TrainConfig has no field {key!r}; nearest: {near[0]}")
        return cls(**data)


_OF_THE_DATA = (
    "steps",
    "batch_size",
    "tokens",
    "seed",
    "holdout",
    "split_seed",
    "normalize",
    "validate_every",
    "threshold_batches",
    "streams",
    "shard_latents",
)


def check_agree(configs: Sequence[TrainConfig], count: int) -> None:
    """Refuse configurations of one run that would read different batches.

    Raises
    ------
    ValueError
        The message names the field that differs.
    """
    if len(configs) != count:
        raise ValueError(f"{count} dictionaries but {len(configs)} configurations; give one each")
    for name in _OF_THE_DATA:
        values = {getattr(c, name) for c in configs}
        if len(values) > 1:
            raise ValueError(
                f"dictionaries of one run are trained on the same batches, so {name} must agree; "
                f"got {sorted(map(str, values))}"
            )
