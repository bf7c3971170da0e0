"""Metrics of logits: what patching and attribution measure, one number an item.

A metric is any function ``logits [B, C] -> [B]`` (or a scalar, which then stands for every item).
Attribution differentiates it, so `accuracy`, which is a step function, is for patching only.

Shape legend: B items, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Metric = Callable[[Tensor], Tensor]
"""``logits [B, C] -> values [B]``."""
Classes = int | Sequence[int] | Tensor
"""One class for all items, or one an item."""


def values_of(metric: Metric, logits_BC: Float[Tensor, "items classes"]) -> Float[Tensor, " items"]:
    """Return one value an item, from a metric that gives [B] or a scalar.

    Raises
    ------
    ValueError
        The metric returns another shape.
    """
    value = metric(logits_BC)
    if not isinstance(value, Tensor) or value.shape not in ((), (len(logits_BC),)):
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"a metric takes logits [items, classes] and returns [items] or a scalar; for logits "
            f"{list(logits_BC.shape)} it returned {got}"
        )
    return value.expand(len(logits_BC))


def logit_difference(target: Classes, other: Classes) -> Metric:
    """``logit[target] - logit[other]``."""

    def metric(logits_BC: Tensor) -> Tensor:
        return _pick(logits_BC, target) - _pick(logits_BC, other)

    return metric


def logit(target: Classes) -> Metric:
    """``logit[target]``."""

    def metric(logits_BC: Tensor) -> Tensor:
        return _pick(logits_BC, target)

    return metric


def probability(target: Classes) -> Metric:
    """``softmax(logits)[target]``."""

    def metric(logits_BC: Tensor) -> Tensor:
        return _pick(logits_BC.softmax(-1), target)

    return metric


def cross_entropy(target: Classes) -> Metric:
    """``-log softmax(logits)[target]``, in nats."""

    def metric(logits_BC: Tensor) -> Tensor:
        return -_pick(logits_BC.log_softmax(-1), target)

    return metric


def kl_divergence(reference_BC: Float[Tensor, "items classes"]) -> Metric:
    """``KL(softmax(reference) || softmax(logits))``, in nats; the reference has the same items."""

    def metric(logits_BC: Tensor) -> Tensor:
        log_q_BC = reference_BC.to(logits_BC).log_softmax(-1)
        if log_q_BC.shape != logits_BC.shape:
            raise ValueError(
                f"the reference of kl_divergence has {list(log_q_BC.shape)} logits, the batch "
                f"{list(logits_BC.shape)}; take it from the same items and model"
            )
        return F.kl_div(logits_BC.log_softmax(-1), log_q_BC, reduction="none", log_target=True).sum(
            -1
        )

    return metric


def accuracy(target: Classes) -> Metric:
    """1 where the largest logit is that of the target, 0 elsewhere; not differentiable."""

    def metric(logits_BC: Tensor) -> Tensor:
        return (logits_BC.argmax(-1) == _index(logits_BC, target)).to(logits_BC.dtype)

    return metric


def _index(logits_BC: Tensor, classes: Classes) -> Tensor:
    index_B = torch.as_tensor(classes, device=logits_BC.device)
    if index_B.dim() and index_B.shape != logits_BC.shape[:1]:
        raise ValueError(
            f"give one class, or one an item: there are {len(logits_BC)} items and "
            f"{index_B.numel()} classes were given"
        )
    count = logits_BC.shape[-1]
    low, high = int(index_B.min()), int(index_B.max())
    if low < 0 or high >= count:
        raise ValueError(f"class {low if low < 0 else high} is not among the {count} of the head")
    return index_B.long().expand(len(logits_BC))


def _pick(values_BC: Tensor, classes: Classes) -> Tensor:
    return values_BC.gather(-1, _index(values_BC, classes)[:, None])[:, 0]
