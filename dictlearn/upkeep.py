"""What a trainer does besides gradient steps: control L0, average weights, revive dead latents.

Each is a small object with its own tensors in the checkpoint. Shapes: B tokens, F latents,
r = width read, w = width written, D dead latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dictlearn.dictionary import Dictionary


class L0Controller:
    """Drives the sparsity penalty so that the mean L0 approaches a target.

    ``log c += gain * clamp(log(L0 / target), -1, 1)`` at every step, c the factor of the penalty:
    an integral controller in log space, clamped so that a dense start does not wind it up.
    """

    def __init__(self, target: float, gain: float) -> None:
        self.target, self.gain = target, gain
        self.log_factor = torch.zeros((), dtype=torch.float64)

    @property
    def factor(self) -> float:
        """Factor of the penalty."""
        return math.exp(float(self.log_factor))

    def update(self, l0: float) -> None:
        """Take the L0 of a step into account."""
        error = math.log(max(l0, 1e-6) / self.target)
        self.log_factor += self.gain * min(max(error, -1.0), 1.0)
        self.log_factor.clamp_(-10.0, 10.0)


class WeightAverage:
    """Exponential moving average of the parameters, bias corrected.

    ``a <- m a + (1 - m) w``; the average is ``a / (1 - m^n)`` after n updates.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], momentum: float) -> None:
        self.momentum = momentum
        self.parameters = dict(parameters)
        self.sums = {n: torch.zeros_like(p) for n, p in self.parameters.items()}
        self.count = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def update(self) -> None:
        """Add the present parameters."""
        sums, now = list(self.sums.values()), list(self.parameters.values())
        torch._foreach_lerp_(sums, [p.data for p in now], 1.0 - self.momentum)
        self.count += 1

    @torch.no_grad()
    def apply(self) -> None:
        """Put the average into the parameters."""
        if not int(self.count):
            return
        correction = 1.0 - self.momentum ** int(self.count)
        for name, parameter in self.parameters.items():
            parameter.copy_(self.sums[name] / correction)


@torch.no_grad()
def resample(
    dictionary: Dictionary,
    dead_F: Bool[Tensor, " f"],
    x_Br: Float[Tensor, "b r"],
    target_Bw: Float[Tensor, "b w"],
    moments: Mapping[str, Mapping[str, Tensor]],
    generator: torch.Generator,
) -> int:
    """Point dead latents at badly reconstructed tokens; returns how many were revived.

    Bricken et al. 2023, "Towards Monosemanticity", appendix "Neuron Resampling": tokens are drawn
    with probability proportional to the squared loss of their reconstruction; the decoder row is
    the centred token at norm 1, the encoder row its transpose at a fifth of the mean norm of the
    living ones, the bias 0, and the moments of Adam of these latents are cleared. Meant for
    strategies with a threshold: among the top k, rows that short seldom win.
    """
    dead = dead_F.nonzero().flatten().cpu()
    if not len(dead) or len(dead) == len(dead_F):
        return 0
    loss_B = (dictionary(x_Br) - target_Bw).square().sum(1).cpu()
    weight_B = loss_B.double().square()
    if float(weight_B.sum()) <= 0:
        return 0
    chosen = torch.multinomial(weight_B, len(dead), replacement=True, generator=generator)
    center_r = dictionary.center()
    enc_Dr = x_Br[chosen] if center_r is None else x_Br[chosen] - center_r
    dec_Dw = target_Bw[chosen] - dictionary.b_dec

    def unit(rows: Tensor) -> Tensor:
        return torch.nn.functional.normalize(rows, dim=1)

    alive_norm = dictionary.W_enc[:, ~dead_F].norm(dim=0).mean()
    dictionary.W_dec[dead] = unit(dec_Dw)
    dictionary.W_enc[:, dead] = (unit(enc_Dr) * (0.2 * alive_norm)).T
    dictionary.b_enc[dead] = 0.0
    for name in ("W_enc", "W_dec", "b_enc"):
        for key in ("exp_avg", "exp_avg_sq"):
            if name in moments and key in moments[name]:
                moments[name][key][dead] = 0.0
    return len(dead)
