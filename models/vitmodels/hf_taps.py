"""Taps that the families of transformers share.

Shape legend: B batch, P tokens, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitmodels.attention import PARTS
from vitmodels.blocks import block_taps
from vitmodels.spec import TokenGrid
from vitmodels.taps import OutputTap, Tap, Wire, Wiring

Read = Callable[[Any], Tensor]
Write = Callable[[Any, Tensor], Any]


@dataclass(frozen=True, kw_only=True)
class PositionTap(Tap):
    """Position embeddings, repeated over the batch; an edit shifts the embedded tokens.

    ``tokens[b, p] = patches[b, p] + position[p]``: the sum happens inside of the library's
    embedding module, so the edited position enters as ``tokens + (edited - position)``.
    """

    module: nn.Module
    """Module that returns the embedded tokens (or a tuple that begins with them)."""
    position: Callable[[], Tensor]
    """Returns the position embeddings ``[1, P, D]``; asked in every pass."""

    def attach(self, wire: Wire, wiring: Wiring) -> None:
        """Shift the output of the embedding."""

        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            tokens_BPD = output[0] if isinstance(output, tuple) else output
            value_BPD = self.position().to(tokens_BPD).expand(tokens_BPD.shape[0], -1, -1)
            new_BPD = wire(value_BPD)
            if not wire.writes:
                return None
            tokens_BPD = tokens_BPD + (new_BPD - value_BPD)
            return (tokens_BPD, *output[1:]) if isinstance(output, tuple) else tokens_BPD

        wiring.after(self.module, hook)


def read_field(name: str) -> Read:
    """Return a reader of one field of a model output of transformers."""

    def read(output: Any) -> Tensor:
        value: Tensor = output[name]
        return value

    return read


def write_field(name: str) -> Write:
    """Return a writer of one field of a model output of transformers."""

    def write(output: Any, value: Tensor) -> Any:
        return type(output)(**{**output, name: value})

    return write


def field_tap(module: nn.Module, name: str) -> OutputTap:
    """Return the tap of one field of a module's output."""
    return OutputTap(module=module, read=read_field(name), write=write_field(name))


def _first_token(output: Tensor) -> Tensor:
    return output[:, 0]


def _set_first_token(output: Tensor, value: Tensor) -> Tensor:
    new = output.clone()
    new[:, 0] = value
    return new


def cls_tap(module: nn.Module) -> OutputTap:
    """Return the tap of the first token of a module's output, ``[B, D]``."""
    return OutputTap(module=module, read=_first_token, write=_set_first_token)


def patches_tap(module: nn.Module, grid: TokenGrid) -> OutputTap:
    """Return the tap of the patch embedding, before CLS and positions."""
    return OutputTap(module=module, grid=TokenGrid(cls=0, register=0, patch=grid.patch))


def hf_block_taps(
    name: str,
    *,
    block: Any,
    attn: Any,
    proj: nn.Linear,
    norm1: nn.Module,
    norm2: nn.Module,
    mlp: nn.Module,
    mlp_first: nn.Module | None,
    mlp_last: nn.Module,
    heads: int,
    attn_added: nn.Module | None = None,
    mlp_added: nn.Module | None = None,
    scope: nn.Module | None = None,
) -> dict[str, Tap]:
    """Return the taps of one pre-norm block of transformers.

    As :func:`vitmodels.blocks.block_taps`. ``attn_in`` and ``mlp_in`` are read where the norms
    return them: some attention modules take their input by keyword.
    """
    taps = block_taps(
        name,
        block=block,
        attn=attn,
        proj=proj,
        attn_added=attn_added or attn,
        heads=heads,
        norm2=norm2,
        mlp=mlp,
        mlp_first=mlp_first,
        mlp_last=mlp_last,
        mlp_added=mlp_added or mlp,
        scope=scope,
        parts=PARTS,
    )
    taps[f"{name}.attn_in"] = OutputTap(module=norm1)
    taps[f"{name}.mlp_in"] = OutputTap(module=norm2)
    return taps
