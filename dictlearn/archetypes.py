"""Decoder rows kept in, or near, the convex hull of data points.

Archetypal and relaxed archetypal SAE (Fel et al. 2025, arXiv:2502.12892): with data points C, the
decoder is::

    W_dec = A C + L        A >= 0, rows of A sum to 1, |L_i| <= relax

which ties every atom to the data and makes dictionaries of different seeds alike. Here the points
are centred by the initial b_dec and divided by their mean norm: the decoder bias is added to every
reconstruction, and latents keep the scale they have with decoder rows of norm 1. A and L are what
the optimiser sees; after its step each row of A goes to the nearest point of the simplex (the
paper's code cuts at 0 and divides by the sum, which blends a row with all points at the noise of
one Adam step) and each row of L is shortened to `relax`.

Shapes: F latents, P points, w = width written.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

_PASSES = 16
_TINY = 1e-12


class Hull:
    """The factors of a decoder, their gradients and their constraints.

    Parameters
    ----------
    decoder
        ``W_dec`` [F, w]; written by `begin` and `project`.
    points
        P.
    relax
        Largest norm of a row of L, in units of the mean norm of the centred points; 0 keeps the
        rows inside of the hull.
    """

    def __init__(self, decoder: nn.Parameter, points: int, relax: float) -> None:
        self.decoder, self.relax = decoder, relax
        latents, width = decoder.shape
        self.points_Pw = decoder.new_zeros(points, width).detach()
        self.share_FP = nn.Parameter(decoder.new_zeros(latents, points).detach())
        self.beside_Fw = nn.Parameter(decoder.new_zeros(latents, width).detach())

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """A, and L if there is any, by name."""
        both = {"hull.share": self.share_FP, "hull.beside": self.beside_Fw}
        return both if self.relax else {"hull.share": self.share_FP}

    @torch.no_grad()
    def begin(
        self,
        points_Pw: Float[Tensor, "p w"],
        center_w: Float[Tensor, " w"],
        generator: torch.Generator,
    ) -> None:
        """Set the points; row i starts at point i, rows beyond P halfway between two points."""
        centred_Pw = points_Pw - center_w
        norm = torch.linalg.vector_norm(centred_Pw, dim=1).mean().clamp(min=_TINY)
        self.points_Pw.copy_(centred_Pw / norm)
        latents, points = self.share_FP.shape
        row_F = torch.arange(latents)
        first_F, second_F = row_F % points, row_F % points
        if latents > points:
            drawn = torch.randint(points, (2, latents - points), generator=generator)
            first_F[points:], second_F[points:] = drawn[0], drawn[1]
        self.share_FP.zero_()
        half = torch.full((latents,), 0.5, device=self.share_FP.device)
        for column_F in (first_F, second_F):
            at = (row_F.to(half.device), column_F.to(half.device))
            self.share_FP.data.index_put_(at, half, accumulate=True)
        self.beside_Fw.zero_()
        self.project()

    @torch.no_grad()
    def backward(self) -> None:
        """Chain rule: ``dA = dW_dec C.T``, ``dL = dW_dec``."""
        grad_Fw = self.decoder.grad
        if grad_Fw is None:
            return
        self.share_FP.grad = grad_Fw @ self.points_Pw.T
        if self.relax:
            self.beside_Fw.grad = grad_Fw

    @torch.no_grad()
    def project(self) -> None:
        """Bring A and L back into their sets and write the decoder."""
        self.share_FP.copy_(nearest_on_simplex(self.share_FP))
        torch.mm(self.share_FP, self.points_Pw, out=self.decoder.data)
        if self.relax:
            norm_F1 = torch.linalg.vector_norm(self.beside_Fw, dim=1, keepdim=True)
            self.beside_Fw.mul_((self.relax / norm_F1.clamp(min=_TINY)).clamp(max=1.0))
            self.decoder.data.add_(self.beside_Fw)

    def state(self) -> dict[str, Tensor]:
        """Every tensor a resumed run needs."""
        return {"hull.points": self.points_Pw, **self.parameters}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `state`, in place."""
        for name, value in self.state().items():
            value.copy_(tensors[name])


@torch.no_grad()
def nearest_on_simplex(value_FP: Float[Tensor, "f p"]) -> Float[Tensor, "f p"]:
    """Project every row on ``{a >= 0, sum a = 1}``: ``max(v - t, 0)`` with t so that it sums to 1.

    t by Michelot's passes (J. Optim. Theory Appl. 50, 1986): ``t = (sum of v above t - 1) / their
    number``, which only grows. A fixed number of passes, so that a device need not be waited for;
    rows that need more are divided by their sum.
    """
    t_F1 = (value_FP.sum(1, keepdim=True) - 1.0) / value_FP.shape[1]
    for _ in range(_PASSES):
        above_FP = value_FP > t_F1
        count_F1 = above_FP.sum(1, keepdim=True).clamp(min=1)
        t_F1 = ((value_FP * above_FP).sum(1, keepdim=True) - 1.0) / count_F1
    out_FP = (value_FP - t_F1).clamp_(min=0)
    return out_FP / out_FP.sum(1, keepdim=True).clamp(min=_TINY)
