"""A head of one's own behind a model that stays as it is: zero-shot vectors, a linear probe."""

import dataclasses
from typing import Any

from torch import Tensor, nn

from vitmodels.family import call_module
from vitmodels.model import VisionModel
from vitmodels.taps import OutputTap


class Headed(nn.Module):
    """A tower, unmodified, and a head behind it."""

    def __init__(self, model: VisionModel, head: nn.Module) -> None:
        super().__init__()
        self.tower = model.module
        self.head = head
        self._call = model.anatomy.call

    def forward(self, x: Any) -> Tensor:
        """Return logits ``[B, C]``."""
        logits: Tensor = self.head(self._call(self.tower, x))
        return logits


def with_head(model: VisionModel, head: nn.Module, n_classes: int) -> VisionModel:
    """Return the model with a site ``logits``: its module runs tower and head.

    Its spec is that of the tower, so that stores harvested from the tower accept it.
    """
    anatomy = dataclasses.replace(
        model.anatomy,
        taps={**model.anatomy.taps, "logits": OutputTap(module=head)},
        n_classes=n_classes,
        call=call_module,
    )
    return VisionModel(module=Headed(model, head).eval(), anatomy=anatomy, spec=model.spec)
