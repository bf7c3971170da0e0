"""Zero-shot heads: class names, through a text tower, as a classifier behind an image tower.

::

    w_c    = normalize(mean over templates of normalize(text(template with class c)))
    logits = scale * normalize(image(x)) . w_c + bias

`scale` is the trained temperature's inverse (about 100 for CLIP) with the trained bias, or any
number: 1 gives cosines. Cross-entropies at the two are far apart (on 1,000 classes, at 1, a good
CLIP has about 6.76 and a guess log 1000 = 6.91), so say which one was taken.
arXiv:2103.00020, section 3.1.

Shape legend: B batch, C classes, E embedding.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitmodels.headed import with_head
from vitmodels.model import VisionModel
from vitmodels.registry import load, resolve

TEMPLATES = ("a photo of a {}.",)


class ZeroShotHead(nn.Module):
    """Scaled cosines between embeddings ``[B, E]`` and one vector a class."""

    weight_CE: Tensor

    def __init__(self, weight_CE: Tensor, *, scale: float, bias: float) -> None:
        super().__init__()
        self.register_buffer("weight_CE", weight_CE)
        self.scale, self.bias = scale, bias

    def forward(self, features_BE: Tensor) -> Tensor:
        """Return logits ``[B, C]``."""
        cosines_BC = F.normalize(features_BE, dim=-1) @ self.weight_CE.T
        return self.scale * cosines_BC + self.bias


def class_vectors(
    text: VisionModel, classes: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Float[Tensor, "classes embedding"]:
    """Return one normalised vector a class, by open_clip's own ``build_zero_shot_classifier``.

    Parameters
    ----------
    text
        A text tower, ``vitmodels.load("open_clip_text/...")``.
    classes
        Class names in the order of the labels.
    templates
        Sentences with ``{}`` for the name; their embeddings are averaged.

    Raises
    ------
    ValueError
        Not a text tower of open_clip, no class, or a template without ``{}``.
    """
    if not hasattr(text.module, "encode_text"):
        raise ValueError(
            f"{text.spec.id} is no text tower; load one by "
            "vitmodels.load('open_clip_text/<name of the image tower>')"
        )
    if isinstance(classes, str) or not classes:
        raise ValueError(f"classes must be a sequence of names, got {classes!r}")
    if isinstance(templates, str) or not templates or any("{}" not in t for t in templates):
        raise ValueError(f"templates must be sentences with '{{}}' for the name, got {templates!r}")
    import open_clip

    def tokenize(sentences: Sequence[str]) -> Tensor:
        return torch.stack([text.transform(sentence) for sentence in sentences])

    weight_EC: Tensor = open_clip.build_zero_shot_classifier(
        text.module, tokenize, list(classes), list(templates), device=text.device
    )
    return weight_EC.T.contiguous()


def zero_shot(
    model: VisionModel,
    text: VisionModel,
    classes: Sequence[str],
    *,
    templates: Sequence[str] = TEMPLATES,
    scale: float | None = None,
) -> VisionModel:
    """Return the image tower with a site ``logits``: its module runs tower and head.

    Parameters
    ----------
    model
        Image tower with a site ``projection``.
    text
        The text tower of the same checkpoint.
    classes, templates
        See :func:`class_vectors`.
    scale
        Factor of the cosines; None for the trained one, with the trained bias.

    Returns
    -------
    VisionModel
        Its spec is that of the tower, so that stores harvested from the tower accept it.

    Raises
    ------
    ValueError
        The towers do not share an embedding, or see :func:`class_vectors`.
    """
    weight_CE = class_vectors(text, classes, templates)
    projection = model.sites().get("projection")
    if projection is None or projection.shape != (weight_CE.shape[1],):
        found = "no projection" if projection is None else f"a projection of {projection.shape}"
        raise ValueError(
            f"{model.spec.id} has {found}, the text tower {text.spec.id} gives "
            f"{weight_CE.shape[1]} numbers: take both from one checkpoint"
        )
    bias = 0.0
    if scale is None:
        clip: Any = text.module
        scale = float(clip.logit_scale.exp())
        bias = 0.0 if clip.logit_bias is None else float(clip.logit_bias)
    head = ZeroShotHead(weight_CE.to(model.device, model.dtype), scale=scale, bias=bias)
    return with_head(model, head, len(classes))


def load_zero_shot(
    id: str,
    classes: Sequence[str],
    *,
    templates: Sequence[str] = TEMPLATES,
    scale: float | None = None,
    weights: str | Path | None = None,
    **options: Any,
) -> VisionModel:
    """Load both towers of a checkpoint of open_clip, and join them by :func:`zero_shot`.

    `options` are those of :func:`vitmodels.load` and go to both towers (``img_size`` to the
    image tower alone).
    """
    family, name = resolve(id)
    if family.prefix != "open_clip":
        raise ValueError(
            f"zero-shot heads need a text tower, and {id!r} is of family {family.name}; "
            "take a checkpoint of open_clip: vitmodels.list_models('open_clip/*')"
        )
    model = load(f"open_clip/{name}", weights=weights, **options)
    options.pop("img_size", None)
    text = load(f"open_clip_text/{name}", weights=weights, **options)
    return zero_shot(model, text, classes, templates=templates, scale=scale)
