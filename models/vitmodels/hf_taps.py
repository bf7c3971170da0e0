"""Taps and calls that the families of transformers share.

Shape legend: B batch, P tokens, D width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from typing import Any

import torch
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
    registers: int = 0
    """Tokens without a position, put in after the first token when positions are added."""

    def attach(self, wire: Wire, wiring: Wiring) -> None:
        """Shift the output of the embedding."""

        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            tokens_BPD = output[0] if isinstance(output, tuple) else output
            value_BPD = self.position().to(tokens_BPD).expand(tokens_BPD.shape[0], -1, -1)
            new_BPD = wire(value_BPD)
            if not wire.writes:
                return None
            shift_BPD = new_BPD - value_BPD
            if self.registers:
                first_B1D, rest_BND = shift_BPD[:, :1], shift_BPD[:, 1:]
                none_BRD = torch.zeros_like(tokens_BPD[:, : self.registers])
                shift_BPD = torch.cat([first_B1D, none_BRD, rest_BND], dim=1)
            tokens_BPD = tokens_BPD + shift_BPD
            return (tokens_BPD, *output[1:]) if isinstance(output, tuple) else tokens_BPD

        wiring.after(self.module, hook)


@dataclass(frozen=True, kw_only=True)
class Call:
    """How to call a module of transformers: ``(module, x) -> one field of what it returns``."""

    field: str
    """``logits``, ``pooler_output``, ``last_hidden_state``, ``image_embeds``."""
    token: int | None = None
    """Which token of the field, None for all of it."""
    argument: str = "pixel_values"
    """Name of the argument that takes `x`."""
    options: Mapping[str, Any] = dataclass_field(default_factory=dict)
    """Further arguments."""

    def __call__(self, module: Any, x: Any) -> Tensor:
        """Run the module."""
        value: Tensor = module(**{self.argument: x}, **self.options)[self.field]
        return value if self.token is None else value[:, self.token]

    def resampled(self, resample: bool) -> "Call":
        """Return the call that lets the library resample its positions to the input's size."""
        return replace(self, options={"interpolate_pos_encoding": True}) if resample else self


def read_map(output: Tensor) -> Tensor:
    """``[B, D, *grid] -> [B, N, D]``."""
    return output.flatten(2).transpose(1, 2)


def write_map(output: Tensor, value: Tensor) -> Tensor:
    """``[B, N, D] -> [B, D, *grid]``."""
    return value.transpose(1, 2).reshape(output.shape)


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


def learned_positions(
    embeddings: Any, grid: TokenGrid, size: tuple[int, int] | None, registers: int = 0
) -> PositionTap:
    """Return the tap of learned positions, resampled to `size` pixels by the library if given."""
    patches = grid.count("patch")
    kinds = TokenGrid(cls=grid.cls, register=0, patch=grid.patch)

    def position() -> Tensor:
        table: Tensor = embeddings.position_embeddings
        if size is not None:  # of its first argument the library asks only the shape
            like = table[:, :1].expand(1, patches + grid.cls, -1)
            table = embeddings.interpolate_pos_encoding(like, *size)
        return table

    return PositionTap(module=embeddings, position=position, registers=registers, grid=kinds)


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
    """Return the tap of the patch embedding, before CLS and positions.

    `module` returns ``[B, N, D]``, or is the convolution itself.
    """
    patches = TokenGrid(cls=0, register=0, patch=grid.patch)
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        return OutputTap(module=module, grid=patches, read=read_map, write=write_map)
    return OutputTap(module=module, grid=patches)


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
