"""The forward pass of a harvest: precision, compilation, and what happens when memory runs out."""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

AUTOCAST = ("bfloat16", "float16")
"""Types a forward pass may run in instead of the type of the weights."""


class Forward:
    """Runs inputs through a model as a manifest's `compute` says, in pieces that fit.

    When the device runs out of memory the batch is halved, and stays so: a harvest goes on. The
    values of smaller batches may differ in their last bits from those of the planned ones.

    Parameters
    ----------
    model
        A `VisionModel`; compiled block by block where `compute` has ``compile``.
    sites
        Sites to read.
    compute
        Of the manifest; ``autocast`` names the type of the forward pass.

    Attributes
    ----------
    largest : int or None
        Items of a piece after memory ran out; None while whole batches fit.
    """

    def __init__(self, model: Any, sites: Sequence[str], compute: Mapping[str, Any]) -> None:
        self._model, self._sites = model, list(sites)
        self._device = torch.device(model.device)
        self._autocast: torch.dtype | None = None
        if name := compute.get("autocast"):
            self._autocast = getattr(torch, str(name))
        if compute.get("compile"):
            model.compile()
        self.largest: int | None = None

    def __call__(
        self, inputs: Sequence[Tensor], take: Callable[[Mapping[str, Tensor]], None]
    ) -> None:
        """Give the values of all inputs to `take`, a piece after the other, in order.

        Raises
        ------
        ValueError
            When the device has no memory for a single item.
        """
        start = 0
        while start < len(inputs):
            stop = min(len(inputs), start + (self.largest or len(inputs)))
            values = self._run(inputs[start:stop])
            if values is None:
                self._halve(stop - start)
                continue
            take(values)
            start = stop

    def _run(self, inputs: Sequence[Tensor]) -> dict[str, Tensor] | None:
        """Return the values of a piece, or None when there is no memory for it."""
        x = torch.stack(list(inputs))
        if self._device.type == "cuda":
            x = x.pin_memory()
        cast: Any = contextlib.nullcontext()
        if self._autocast is not None:
            cast = torch.autocast(self._device.type, dtype=self._autocast)
        try:
            with torch.inference_mode(), cast:
                values: dict[str, Tensor] = self._model.run(
                    x.to(self._device, non_blocking=True), sites=self._sites, stop_early=True
                )
        except torch.OutOfMemoryError:
            return None
        return values

    def _halve(self, tried: int) -> None:
        if tried == 1:
            raise ValueError(
                f"{self._device} has no memory for a single item of {self._model.spec.id}: free "
                "some, take --autocast bfloat16, a smaller model or --img-size, or --device cpu"
            )
        self.largest = (tried + 1) // 2
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning("out of memory with %d items a batch, going on with %d", tried, self.largest)


def check_compute(autocast: str | None) -> None:
    """Refuse a type that autocast does not know.

    Raises
    ------
    ValueError
        Naming the allowed ones.
    """
    if autocast is not None and autocast not in AUTOCAST:
        raise ValueError(f"autocast {autocast!r} is none of {', '.join(AUTOCAST)}")
