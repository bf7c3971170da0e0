"""What a graph explains: directions at a site behind the blocks, such as the logit of a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dictlearn.circuits.replacement import Replacement
from vitmodels.zeroshot import ZeroShotHead


@dataclass(frozen=True, kw_only=True, eq=False)
class Readout:
    """A number to explain: ``sum(direction * value of the site)``."""

    name: str
    """For people: ``3``, ``tabby cat``."""
    site: str
    """``logits``, ``projection``, ``pooled`` or ``final``."""
    direction: Float[Tensor, "*shape"]
    """Of the shape of the site's value without its batch."""
    probability: float = 1.0
    """Weight in the influence."""
    index: int = -1
    """Class number; -1 for other directions."""

    def value(self, replacement: Replacement) -> float:
        """Return the number itself, on the model."""
        value = replacement.values[self.site][0]
        return float((value.double() * self.direction.to(value).double()).sum())


def class_readouts(
    replacement: Replacement,
    classes: Sequence[int] | None = None,
    *,
    contrast: int | str | None = "mean",
    names: Sequence[str] | None = None,
    most: int = 10,
    share: float = 0.95,
) -> list[Readout]:
    """Return the logits of some classes as readouts.

    Parameters
    ----------
    replacement
        Of a model with logits, whose values decide which classes are likeliest. With a zero-shot
        head the readouts are at ``projection``, the length of the embedding held fixed.
    classes
        Class numbers; by default the likeliest until they hold `share` of the probability, at
        most `most` (as Ameisen et al. 2025 do).
    contrast
        What is subtracted from each logit: ``"mean"`` over the classes (which no softmax sees), a
        class number, or None.
    names
        Names of all classes.

    Raises
    ------
    ValueError
        No logits (the message says what there is instead), a class out of range.
    """
    if "logits" not in replacement.values:
        raise ValueError(
            f"{replacement.model.spec.id} has no logits; give readouts at "
            f"{', '.join(replacement.affine) or 'a site behind the blocks'}, or a zero-shot head: "
            "vitmodels.zeroshot.zero_shot"
        )
    logits_C = replacement.values["logits"][0]
    n_classes = len(logits_C)
    p_C = logits_C.double().softmax(-1)
    if classes is None:
        order = p_C.argsort(descending=True)
        count = int((p_C[order].cumsum(0) < share).sum()) + 1
        classes = order[: min(count, most)].tolist()
    asked = [*classes, *([contrast] if isinstance(contrast, int) else [])]
    if bad := [c for c in asked if not 0 <= c < n_classes]:
        raise ValueError(
            f"class {bad[0]} of {replacement.model.spec.id} does not exist: 0 to {n_classes - 1}"
        )
    if isinstance(contrast, str) and contrast != "mean":
        raise ValueError(f"contrast is 'mean', a class number or None, not {contrast!r}")
    against_C = torch.zeros_like(logits_C)
    if contrast == "mean":
        against_C += 1 / n_classes
    elif isinstance(contrast, int):
        against_C[contrast] = 1
    site, rows_C = _class_rows(replacement)
    directions = torch.eye(n_classes).to(logits_C)[list(classes)] - against_C
    return [
        Readout(
            name=names[c] if names is not None else str(c),
            site=site,
            direction=direction_C if rows_C is None else direction_C @ rows_C,
            probability=float(p_C[c]),
            index=c,
        )
        for c, direction_C in zip(classes, directions, strict=True)
    ]


def _class_rows(replacement: Replacement) -> tuple[str, Tensor | None]:
    """Return the site to read classes at, and the direction of each class there, [C, E].

    A zero-shot head scores by cosines; with the length of the image's embedding held fixed, like
    the denominators of the norms, these are affine in the projection.
    """
    head = getattr(replacement.model.module, "head", None)
    if not isinstance(head, ZeroShotHead) or "projection" not in replacement.affine:
        return "logits", None
    length = replacement.values["projection"][0].norm()
    return "projection", head.scale / length * head.weight_CE


def check_readouts(replacement: Replacement, readouts: Sequence[Readout]) -> None:
    """Refuse readouts that cannot be traced; see `dictlearn.circuits.tracing.trace`."""
    if not readouts:
        raise ValueError("nothing to explain: give at least one readout")
    for readout in readouts:
        if readout.site not in replacement.values:
            raise ValueError(
                f"readout {readout.name!r} is at {readout.site!r}; "
                f"{replacement.model.spec.id} has {', '.join(replacement.values) or 'no such site'}"
            )
        if readout.site not in replacement.affine:
            raise ValueError(
                f"{readout.site} of {replacement.model.spec.id} is not affine in the stream once "
                "attention and norms are held fixed (pooling by attention, tanh or a normalised "
                "embedding), so it has no direct effects; give readouts at "
                f"{', '.join(replacement.affine) or 'no site: none behind the blocks is affine'}"
            )
        shape = tuple(replacement.values[readout.site].shape[1:])
        if tuple(readout.direction.shape) != shape:
            raise ValueError(
                f"the direction of readout {readout.name!r} has shape "
                f"{tuple(readout.direction.shape)}, {readout.site} has {shape}"
            )
        if not readout.probability > 0:
            raise ValueError(f"the probability of readout {readout.name!r} must be > 0")
