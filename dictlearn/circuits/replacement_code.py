"""One transcoder around one input: its input norm held fixed, so that active latents are affine.

With m and s the mean and the scale of each token's input (`Input.norm`), held at one input x::

    pre = ((x - m) / s - c) @ W_enc + b_enc          a = slope * pre + offset where active
    out = (sum_f a_f d_f + b_dec + x @ W_skip.T) * s + m

m is the mean of the live input (a linear map); s is fixed. Slope is 1 and offset 0 but for gated
dictionaries (``exp(r_mag)`` and ``b_mag``).

Shapes: B copies, T tokens, D channels, F latents, N entries.
"""

from __future__ import annotations

import re

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dictlearn.dictionary import Dictionary
from dictlearn.sparsify import GatedSelection


class FrozenTranscoder:
    """A transcoder with its input's scale held fixed.

    Parameters
    ----------
    dictionary
        Reads one ``mlp_in`` and writes some ``mlp_out``.
    x_TD
        What it reads, in the input that everything is held fixed around.
    """

    def __init__(self, dictionary: Dictionary, x_TD: Float[Tensor, "t d"]) -> None:
        self.dictionary = dictionary
        config = dictionary.config
        self.centred = config.input.norm == "layer_norm"
        _, _, scale_T1 = dictionary.normalize(x_TD)
        eps = config.input.eps if self.centred else 0.0
        self.scale_T1 = None if scale_T1 is None else (scale_T1 + eps).detach()
        undo = config.input.norm != "none" and config.input.denormalize
        self.undo_T1 = scale_T1.detach() if undo and scale_T1 is not None else None
        self.has_linear = config.skip or (self.centred and undo)
        self.writes: dict[int, slice] = {}
        start = 0
        for site, width in config.writes.items():
            found = re.search(r"\d+", site)
            self.writes[int(found.group()) if found else -1] = slice(start, start + width)
            start += width
        self.slope_F, self.offset_F = torch.ones_like(dictionary.b_enc), None
        if isinstance(dictionary.sparsify, GatedSelection):
            self.slope_F = dictionary.sparsify.r_mag.detach().exp()
            self.offset_F = dictionary.sparsify.b_mag.detach()

    def pre_activations(self, x_BTD: Float[Tensor, "b t d"]) -> Float[Tensor, "b t f"]:
        """Return what the selection sees of any stream, with the scale held fixed."""
        x = x_BTD - x_BTD.mean(-1, keepdim=True) if self.centred else x_BTD
        x = x if self.scale_T1 is None else x / self.scale_T1
        center_D = self.dictionary.center()
        x = x if center_D is None else x - center_D
        return x @ self.dictionary.W_enc + self.dictionary.b_enc

    def activations(
        self, x_BTD: Float[Tensor, "b t d"], active_TF: Bool[Tensor, "t f"] | None = None
    ) -> Float[Tensor, "b t f"]:
        """Return the latents of any stream; with `active_TF`, those and no others are active."""
        pre_BTF = self.pre_activations(x_BTD)
        if active_TF is not None:
            value_BTF = pre_BTF * self.slope_F
            value_BTF = value_BTF if self.offset_F is None else value_BTF + self.offset_F
            return value_BTF * active_TF
        acts: Tensor = self.dictionary.sparsify(pre_BTF.flatten(0, 1))
        return acts.reshape(*x_BTD.shape[:2], -1)

    def encoder_rows(
        self, token_N: Int[Tensor, " n"], latent_N: Int[Tensor, " n"]
    ) -> Float[Tensor, "n d"]:
        """Return the derivative of the activation of entries by what is read."""
        w_ND = self.dictionary.W_enc.detach().T[latent_N] * self.slope_F[latent_N, None]
        if self.centred:
            w_ND = w_ND - w_ND.mean(-1, keepdim=True)
        return w_ND if self.scale_T1 is None else w_ND / self.scale_T1[token_N]

    def encoder_constant(self, latent_N: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Part of the activation of entries that does not depend on what is read."""
        constant_N = self.dictionary.b_enc.detach()[latent_N]
        center_D = self.dictionary.center()
        if center_D is not None:
            constant_N = constant_N - self.dictionary.W_enc.detach().T[latent_N] @ center_D.detach()
        constant_N = constant_N * self.slope_F[latent_N]
        return constant_N if self.offset_F is None else constant_N + self.offset_F[latent_N]

    def decoder_rows(
        self, layer: int, token_N: Int[Tensor, " n"], latent_N: Int[Tensor, " n"]
    ) -> Float[Tensor, "n d"]:
        """Return what entries write into a layer at activation 1."""
        rows_ND = self.dictionary.W_dec.detach()[latent_N, self.writes[layer]]
        if self.dictionary.config.decode_scale:
            rows_ND = rows_ND * self.dictionary.scale.detach()[latent_N, None]
        return rows_ND if self.undo_T1 is None else rows_ND * self.undo_T1[token_N]

    def bias_rows(self, layer: int) -> Float[Tensor, "*t d"]:
        """Return what the decoder bias writes into a layer, at every token or alike [D]."""
        bias_D = self.dictionary.b_dec.detach()[self.writes[layer]]
        return bias_D if self.undo_T1 is None else bias_D * self.undo_T1

    def linear(self, layer: int, x_BTD: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Return what goes past the latents into a layer."""
        made = torch.zeros_like(x_BTD)
        if self.dictionary.config.skip:
            made = made + x_BTD @ self.dictionary.W_skip.detach()[self.writes[layer]].T
            made = made if self.undo_T1 is None else made * self.undo_T1
        if self.centred and self.undo_T1 is not None:
            made = made + x_BTD.mean(-1, keepdim=True)
        return made

    def output(
        self, layer: int, acts_BTF: Float[Tensor, "b t f"], x_BTD: Float[Tensor, "b t d"]
    ) -> Float[Tensor, "b t d"]:
        """Return what latents, bias and linear path write into a layer."""
        if self.dictionary.config.decode_scale:
            acts_BTF = acts_BTF * self.dictionary.scale
        made = acts_BTF @ self.dictionary.W_dec[:, self.writes[layer]]
        made = made if self.undo_T1 is None else made * self.undo_T1
        made = made + self.bias_rows(layer)
        return made + self.linear(layer, x_BTD) if self.has_linear else made
