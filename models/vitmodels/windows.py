"""Attention in windows: between windows folded into the batch and tokens in image order.

A kernel sees ``[B * nW, n, ...]``: nW windows an image, each of n = wh * ww tokens, of an image
that was rolled by a shift before it was cut. A site has ``[B, H * W, ...]`` in image order, so
that its tokens are those of the residual stream. Patterns are ``[B, head, query, key]`` with all
queries of the image and, as keys, the n tokens of the query's own window.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Geometry of one windowed attention without padding."""

    grid: tuple[int, int]
    """Tokens of the image, (height, width)."""
    window: tuple[int, int]
    """Tokens of a window, (height, width)."""
    shift: tuple[int, int] = (0, 0)
    """How far the image was rolled, (up, left), before it was cut."""

    def __post_init__(self) -> None:
        if any(n % w for n, w in zip(self.grid, self.window, strict=True)):
            raise ValueError(f"a grid of {self.grid} is not cut into windows of {self.window}")

    def to_image(self, value: Tensor) -> Tensor:
        """``[B * nW, n, ...] -> [B, H * W, ...]``."""
        (high, wide), (wh, ww) = self.grid, self.window
        rest = value.shape[2:]
        cut = value.reshape(-1, high // wh, wide // ww, wh, ww, *rest)
        image = cut.transpose(2, 3).reshape(-1, high, wide, *rest)
        if any(self.shift):
            image = image.roll(self.shift, dims=(1, 2))
        return image.flatten(1, 2)

    def from_image(self, value: Tensor) -> Tensor:
        """Invert :meth:`to_image`."""
        (high, wide), (wh, ww) = self.grid, self.window
        rest = value.shape[2:]
        image = value.reshape(-1, high, wide, *rest)
        if any(self.shift):
            image = image.roll((-self.shift[0], -self.shift[1]), dims=(1, 2))
        cut = image.reshape(-1, high // wh, wh, wide // ww, ww, *rest)
        return cut.transpose(2, 3).reshape(-1, wh * ww, *rest)

    def heads_to_image(self, value: Tensor) -> Tensor:
        """``[B * nW, heads, n, K] -> [B, H * W, heads, K]``: q, k, v, z of a kernel."""
        return self.to_image(value.transpose(1, 2))

    def heads_from_image(self, value: Tensor) -> Tensor:
        """Invert :meth:`heads_to_image`."""
        return self.from_image(value).transpose(1, 2)

    def pattern_to_image(self, value: Tensor) -> Tensor:
        """``[B * nW, heads, n, n] -> [B, heads, H * W, n]``."""
        return self.heads_to_image(value).transpose(1, 2)

    def pattern_from_image(self, value: Tensor) -> Tensor:
        """Invert :meth:`pattern_to_image`."""
        return self.heads_from_image(value.transpose(1, 2))
