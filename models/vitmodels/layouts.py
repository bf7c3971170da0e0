"""Values that a library keeps in another layout than a site does: folded frames, other orders.

A model with attention over time and over space folds one of them into the batch. Its sites
still are ``[batch, token, ...]``, tokens by time, height, width.

Shape legend: B batch, T frames, N patches a frame, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vitmodels.taps import Tap, Wire, Wiring

Convert = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one kind of tensor of the library is a value of a site, and back."""

    to_site: Convert
    """Library -> site."""
    from_site: Convert
    """Its inverse."""


@dataclass(frozen=True, kw_only=True)
class ClipLayouts:
    """The layouts of a clip of T frames of N patches, kept by place, then time."""

    frames: int
    """T."""
    patches: int
    """N."""

    @property
    def stream(self) -> Layout:
        """``[B, 1 + N T, ...] <-> [B, 1 + T N, ...]``."""
        lines = self.lines

        def to_site(x: Tensor) -> Tensor:
            return torch.cat([x[:, :1], lines.to_site(x[:, 1:])], dim=1)

        def from_site(x: Tensor) -> Tensor:
            return torch.cat([x[:, :1], lines.from_site(x[:, 1:])], dim=1)

        return Layout(to_site=to_site, from_site=from_site)

    @property
    def lines(self) -> Layout:
        """``[B, N T, ...] <-> [B, T N, ...]``, or from lines folded, ``[B N, T, ...]``."""
        t, n = self.frames, self.patches

        def to_site(x: Tensor) -> Tensor:
            return x.reshape(-1, n, t, *x.shape[2:]).transpose(1, 2).flatten(1, 2)

        def from_site(x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], t, n, *x.shape[2:]).transpose(1, 2).flatten(1, 2)

        return Layout(to_site=to_site, from_site=from_site)

    @property
    def folded(self) -> Layout:
        """``[B N, T, ...] <-> [B, T N, ...]``."""
        lines, t = self.lines, self.frames

        def from_site(x: Tensor) -> Tensor:
            return lines.from_site(x).reshape(-1, t, *x.shape[2:])

        return Layout(to_site=lines.to_site, from_site=from_site)

    @property
    def images(self) -> Layout:
        """``[B T, N, ...] <-> [B, T N, ...]``."""
        t, n = self.frames, self.patches
        return Layout(
            to_site=lambda x: x.reshape(-1, t * n, *x.shape[2:]),
            from_site=lambda x: x.reshape(-1, n, *x.shape[2:]),
        )

    @property
    def framed(self) -> Layout:
        """``[B T, 1 + N, ...] <-> [B, T + T N, ...]``: the copies of CLS, then the patches."""
        t, n = self.frames, self.patches

        def to_site(x: Tensor) -> Tensor:
            x = x.reshape(-1, t, n + 1, *x.shape[2:])
            return torch.cat([x[:, :, 0], x[:, :, 1:].flatten(1, 2)], dim=1)

        def from_site(x: Tensor) -> Tensor:
            patches = x[:, t:].reshape(x.shape[0], t, n, *x.shape[2:])
            return torch.cat([x[:, :t, None], patches], dim=2).flatten(0, 1)

        return Layout(to_site=to_site, from_site=from_site)


def queries(layout: Layout) -> Layout:
    """Apply a layout of tokens to the queries of ``[batch, H, query, key]``."""

    def to_site(x: Tensor) -> Tensor:
        return layout.to_site(x.transpose(1, 2)).transpose(1, 2)

    def from_site(x: Tensor) -> Tensor:
        return layout.from_site(x.transpose(1, 2)).transpose(1, 2)

    return Layout(to_site=to_site, from_site=from_site)


def keys(layout: Layout) -> Layout:
    """Apply a layout of tokens to queries and keys of ``[batch, H, query, key]``."""
    rows = queries(layout)

    def to_site(x: Tensor) -> Tensor:
        return rows.to_site(rows.to_site(x).transpose(2, 3)).transpose(2, 3)

    def from_site(x: Tensor) -> Tensor:
        return rows.from_site(rows.from_site(x).transpose(2, 3)).transpose(2, 3)

    return Layout(to_site=to_site, from_site=from_site)


@dataclass(frozen=True, kw_only=True)
class LaidOutTap(Tap):
    """A tap whose value has another layout at the site than in the library."""

    inner: Tap
    """Where the library's tensor is."""
    layout: Layout
    """What it is at the site."""

    def attach(self, wire: Wire, wiring: Wiring) -> None:
        """Attach the inner tap to a wire that converts."""
        self.inner.attach(_ConvertingWire(wire, self.layout), wiring)


class _ConvertingWire(Wire):
    def __init__(self, wire: Wire, layout: Layout) -> None:
        super().__init__(wire.name)
        self.wire, self.layout, self.writes = wire, layout, wire.writes

    def __call__(self, value: Tensor) -> Tensor:
        new = self.wire(self.layout.to_site(value))
        return self.layout.from_site(new) if self.writes else value
