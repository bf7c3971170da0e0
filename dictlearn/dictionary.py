"""The one module: an encoder over some sites, a sparse code, a decoder onto some sites.

Shapes: B tokens, F latents, K active, r = width read, w = width written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dictlearn.config import (
    BatchTopK,
    DictionaryConfig,
    Input,
    JumpReLU,
    Matryoshka,
    Sparsify,
    TopK,
)
from dictlearn.sparsify import START, Entries, JumpReLUSelection, build

if TYPE_CHECKING:
    from typing import Self

_LATENT_NORM_EPS = 1e-5


def _encoder_scale(sparsify: Sparsify, latents: int, width: int) -> float:
    """Length of the initial encoder rows: least squares for random directions.

    For inputs of unit variance a channel, pre-activations are about standard normal and the k
    largest of F about ``sqrt(2 ln(F / k))``; they overlap along the input, so their sum overshoots
    by ``1 + 2 k ln(F / k) / w``, which is what the rows are divided by.
    """
    if not isinstance(sparsify, TopK | BatchTopK):
        return 1.0
    return 1.0 / (1.0 + 2.0 * sparsify.k * math.log(max(latents / sparsify.k, 1.0)) / width)


class Dictionary(nn.Module):
    """Sparse autoencoder, transcoder or crosscoder: ``reads`` and ``writes`` decide which.

    With x the sites read, concatenated::

        x_n = norm(x)                                       Input.norm
        pre = (x_n - c) @ W_enc + b_enc                     c = b_dec, b_in or 0: Input.center
        pre = layer_norm(pre) * ln_gain + ln_bias           only if latent_norm
        f   = select(pre)                                   sparsify
        y   = (f * scale) @ W_dec + b_dec + x @ W_skip.T    scale if decode_scale; W_skip if skip
        y   = denorm(y)                                     with x's statistics; Input.denormalize

    An SAE reads and writes the same site (Bricken et al. 2023), a transcoder reads the input of a
    block and writes its output (Dunefsky et al. 2024, arXiv:2406.11944; with ``skip=True`` Paulo et
    al. 2025, arXiv:2501.18823), a crosscoder reads and writes several sites (Lindsey et al. 2024),
    a cross-layer transcoder reads one layer and writes it and later ones (Ameisen et al. 2025).

    Parameters
    ----------
    reads, writes
        Site names and widths, in order; `writes` defaults to `reads`.
    latents
        F.
    sparsify
        Strategy of `dictlearn.config`; its own parameters live in ``self.sparsify``
        (``threshold`` of BatchTopK [] and JumpReLU [F]; ``b_gate``, ``b_mag``, ``r_mag`` [F] of
        Gated, for which ``b_enc`` stays 0).
    skip
        Adds ``W_skip`` [w, r], applied to the raw (not centred, not normalised) input.
    input
        Centring and normalisation. Default: centre by ``b_dec`` when reads == writes, otherwise by
        ``b_in`` [r], a mean of the input that is set once and not trained.
    matryoshka
        Prefixes of the training loss; nothing changes at inference.
    latent_norm
        LayerNorm over the pre-activations: ``ln_gain``, ``ln_bias`` [F].
    decode_scale
        ``scale`` [F] multiplies activations in the decoder only.
    seed
        Of the initial weights: decoder rows uniform on the sphere, encoder its transpose, shortened
        where k is known so that the first reconstruction is not too long.

    Attributes
    ----------
    W_enc : [r, F], b_enc : [F], W_dec : [F, w], b_dec : [w]
        ``W_enc`` is stored so that each latent's row is contiguous (``W_enc.T.is_contiguous()``).
    """

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_enc: nn.Parameter
    b_dec: nn.Parameter

    def __init__(
        self,
        reads: Mapping[str, int],
        writes: Mapping[str, int] | None = None,
        *,
        latents: int,
        sparsify: Sparsify,
        skip: bool = False,
        input: Input | None = None,
        matryoshka: Matryoshka | None = None,
        latent_norm: bool = False,
        decode_scale: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        writes = reads if writes is None else writes
        same = list(reads.items()) == list(writes.items())
        self.config = DictionaryConfig(
            reads=dict(reads),
            writes=dict(writes),
            latents=latents,
            sparsify=sparsify,
            skip=skip,
            input=input or Input(center="b_dec" if same else "b_in"),
            matryoshka=matryoshka,
            latent_norm=latent_norm,
            decode_scale=decode_scale,
        )
        d_read, d_write = self.config.d_read, self.config.d_write
        generator = torch.Generator().manual_seed(seed)
        dec_Fw = F.normalize(torch.randn(latents, d_write, generator=generator), dim=1)
        enc_Fr = dec_Fw.clone()
        if not same:
            enc_Fr = F.normalize(torch.randn(latents, d_read, generator=generator), dim=1)
        enc_Fr *= _encoder_scale(sparsify, latents, d_write)
        self.W_enc = nn.Parameter(enc_Fr.T)
        self.b_enc = nn.Parameter(torch.zeros(latents))
        self.W_dec = nn.Parameter(dec_Fw)
        self.b_dec = nn.Parameter(torch.zeros(d_write))
        if self.config.input.center == "b_in":
            self.b_in = nn.Parameter(torch.zeros(d_read), requires_grad=False)
        if skip:
            self.W_skip = nn.Parameter(torch.zeros(d_write, d_read))
        if latent_norm:
            self.ln_gain = nn.Parameter(torch.ones(latents))
            self.ln_bias = nn.Parameter(torch.zeros(latents))
        if decode_scale:
            self.scale = nn.Parameter(torch.ones(latents))
        self.sparsify = build(sparsify, latents)

    @classmethod
    def from_config(cls, config: DictionaryConfig, seed: int = 0) -> Self:
        """Build a dictionary with fresh weights from its description."""
        return cls(
            config.reads,
            config.writes,
            latents=config.latents,
            sparsify=config.sparsify,
            skip=config.skip,
            input=config.input,
            matryoshka=config.matryoshka,
            latent_norm=config.latent_norm,
            decode_scale=config.decode_scale,
            seed=seed,
        )

    @property
    def latents(self) -> int:
        """F."""
        return self.config.latents

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_dec.device

    def extra_repr(self) -> str:
        """Sites, widths and size, for printing."""
        c = self.config
        return f"reads={c.reads}, writes={c.writes}, latents={c.latents}, {c.sparsify}"

    # ---- input -------------------------------------------------------------------------------
    def normalize(
        self, x_Br: Float[Tensor, "b r"]
    ) -> tuple[Float[Tensor, "b r"], Float[Tensor, "b 1"] | None, Float[Tensor, "b 1"] | None]:
        """Input after `Input.norm`, with the shift and scale that undo it (None: identity)."""
        options = self.config.input
        if options.norm == "constant_norm":
            factor_B1 = (x_Br.norm(dim=1, keepdim=True) + options.eps) / x_Br.shape[1] ** 0.5
            return x_Br / factor_B1, None, factor_B1
        if options.norm == "layer_norm":
            mean_B1 = x_Br.mean(dim=1, keepdim=True)
            centred_Br = x_Br - mean_B1
            std_B1 = centred_Br.std(dim=1, keepdim=True)
            return centred_Br / (std_B1 + options.eps), mean_B1, std_B1
        return x_Br, None, None

    def center(self) -> Float[Tensor, " r"] | None:
        """Return what is subtracted from the normalised input."""
        which = self.config.input.center
        if which == "b_dec":
            return self.b_dec
        return self.b_in if which == "b_in" else None

    def pre_activations(self, x_Br: Float[Tensor, "b r"]) -> Float[Tensor, "b f"]:
        """Values the selection sees, from the raw input."""
        self._check_width(x_Br, self.config.d_read, "read")
        x_Br = self.normalize(x_Br)[0]
        center_r = self.center()
        if center_r is not None:
            x_Br = x_Br - center_r
        pre_BF = F.linear(x_Br, self.W_enc.T, self.b_enc)
        if self.config.latent_norm:
            pre_BF = F.layer_norm(
                pre_BF, (self.latents,), self.ln_gain, self.ln_bias, _LATENT_NORM_EPS
            )
        return pre_BF

    # ---- codes -------------------------------------------------------------------------------
    def encode(self, x_Br: Float[Tensor, "b r"]) -> Float[Tensor, "b f"]:
        """Dense activations at inference."""
        acts_BF: Tensor = self.sparsify(self.pre_activations(x_Br))
        return acts_BF

    def encode_entries(self, x_Br: Float[Tensor, "b r"]) -> Entries:
        """Active entries at inference, as flat lists."""
        return self.sparsify.entries(self.pre_activations(x_Br))

    def encode_sparse(
        self, x_Br: Float[Tensor, "b r"]
    ) -> tuple[Float[Tensor, "b k"], Int[Tensor, "b k"]]:
        """Values and latents of the active entries, K columns.

        K is k for TopK, otherwise the largest number active in any row; shorter rows are filled
        with value 0 at latent 0.
        """
        entries = self.encode_entries(x_Br)
        offset_B = entries.offsets()
        count_B = offset_B.diff()
        width = int(count_B.max()) if count_B.numel() else 0
        column_N = (
            torch.arange(entries.row.numel(), device=x_Br.device) - offset_B[:-1][entries.row]
        )
        value_BK = entries.value.new_zeros(entries.n_rows, width)
        index_BK = entries.latent.new_zeros(entries.n_rows, width)
        at = (entries.row, column_N)
        return value_BK.index_put(at, entries.value), index_BK.index_put(at, entries.latent)

    def decode(
        self, acts_BF: Float[Tensor, "b f"], x_Br: Float[Tensor, "b r"] | None = None
    ) -> Float[Tensor, "b w"]:
        """Output for dense activations; `x_Br` is needed with `skip` or a normalised input."""
        if self.config.decode_scale:
            acts_BF = acts_BF * self.scale
        return self._finish(acts_BF @ self.W_dec, x_Br)

    def decode_sparse(
        self,
        value_BK: Float[Tensor, "b k"],
        index_BK: Int[Tensor, "b k"],
        x_Br: Float[Tensor, "b r"] | None = None,
    ) -> Float[Tensor, "b w"]:
        """Output for sparse activations as `encode_sparse` returns them."""
        if self.config.decode_scale:
            value_BK = value_BK * self.scale[index_BK]
        y_Bw = F.embedding_bag(index_BK, self.W_dec, per_sample_weights=value_BK, mode="sum")
        return self._finish(y_Bw, x_Br)

    def decode_entries(
        self, entries: Entries, x_Br: Float[Tensor, "b r"] | None = None
    ) -> Float[Tensor, "b w"]:
        """Output for active entries as `encode_entries` returns them."""
        value_N = entries.value
        if self.config.decode_scale:
            value_N = value_N * self.scale[entries.latent]
        y_Bw = F.embedding_bag(
            entries.latent,
            self.W_dec,
            entries.offsets(),
            per_sample_weights=value_N,
            mode="sum",
            include_last_offset=True,
        )
        return self._finish(y_Bw, x_Br)

    def forward(self, x_Br: Float[Tensor, "b r"]) -> Float[Tensor, "b w"]:
        """Output for an input, dense."""
        return self.decode(self.encode(x_Br), x_Br)

    def _finish(
        self, y_Bw: Float[Tensor, "b w"], x_Br: Float[Tensor, "b r"] | None
    ) -> Float[Tensor, "b w"]:
        y_Bw = y_Bw + self.b_dec
        options = self.config.input
        undo = options.norm != "none" and options.denormalize
        if x_Br is None:
            if self.config.skip or undo:
                raise ValueError(
                    "decode needs the input x too: this dictionary has "
                    + ("a skip path" if self.config.skip else f"input norm {options.norm!r}")
                )
            return y_Bw
        if self.config.skip:
            y_Bw = y_Bw + x_Br @ self.W_skip.T
        if undo:
            _, shift_B1, factor_B1 = self.normalize(x_Br)
            y_Bw = y_Bw * factor_B1 if factor_B1 is not None else y_Bw
            y_Bw = y_Bw + shift_B1 if shift_B1 is not None else y_Bw
        return y_Bw

    def _check_width(self, x_Br: Tensor, width: int, verb: str) -> None:
        if x_Br.ndim != 2 or x_Br.shape[1] != width:
            sites = self.config.reads if verb == "read" else self.config.writes
            raise ValueError(
                f"expected an input [batch, {width}] (the sites {verb}: {sites}), "
                f"got {list(x_Br.shape)}"
            )

    @torch.no_grad()
    def start_at_l0(self, l0: float, latents: int | None = None, *, shorten: bool = True) -> None:
        """Start a JumpReLU that was not given a threshold, and not trained, at about that L0.

        As for TopK, encoder rows are shortened so that the first reconstruction is not too long;
        theta is the quantile of normal pre-activations of that length. From 0.1, half of the
        latents would be active, and hundreds of steps go into raising theta. `latents`: of the
        whole dictionary, where this is a part; without `shorten` theta fits rows of norm 1.
        """
        selection, rule = self.sparsify, self.config.sparsify
        if not isinstance(selection, JumpReLUSelection) or not isinstance(rule, JumpReLU):
            return
        total = latents or self.latents
        if rule.threshold is not None or bool((selection.threshold != START).any()):
            return
        share = min(max(l0 / total, 1e-6), 0.5)
        factor = 1.0
        if shorten:
            top = TopK(max(1, min(round(l0), total)))
            factor = _encoder_scale(top, total, self.config.d_write)
        self.W_enc.mul_(factor)
        selection.threshold.fill_(factor * NormalDist().inv_cdf(1.0 - share))

    # ---- sites -------------------------------------------------------------------------------
    def split(self, y_Bw: Float[Tensor, "b w"]) -> dict[str, Float[Tensor, "b _"]]:
        """Cut an output into the sites written."""
        parts = torch.split(y_Bw, list(self.config.writes.values()), dim=1)
        return dict(zip(self.config.writes, parts, strict=True))

    def gather(
        self, acts: Float[Tensor, "b _"], slices: Mapping[str, slice], *, write: bool = False
    ) -> Float[Tensor, "b _"]:
        """Cut the sites read (or written) out of a batch whose channels hold several sites.

        Raises
        ------
        KeyError
            A site is not in the batch.
        ValueError
            The width of a site differs.
        """
        sites = self.config.writes if write else self.config.reads
        for site, width in sites.items():
            if site not in slices:
                raise KeyError(f"site {site!r} is not in this batch; it has {list(slices)}")
            found = slices[site].stop - slices[site].start
            if found != width:
                raise ValueError(
                    f"the dictionary expects {width} channels at {site!r}, the batch has {found}"
                )
        parts = [acts[:, slices[site]] for site in sites]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    @torch.no_grad()
    def rescale_sites(self, factors: Mapping[str, float]) -> None:
        """Fold input factors into the weights: afterwards ``new(x) == old(x * c) / c`` by site.

        A dictionary trained on activations multiplied by `factors` then takes and returns raw
        activations. Activations of latents are unchanged.
        """
        if self.config.input.norm != "none":
            raise ValueError(f"factors cannot be folded into input norm {self.config.input.norm!r}")
        read_r = self._factor_vector(self.config.reads, factors)
        write_w = self._factor_vector(self.config.writes, factors)
        self.W_enc.mul_(read_r[:, None])
        self.W_dec.div_(write_w)
        self.b_dec.div_(write_w)
        if self.config.input.center == "b_in":
            self.b_in.div_(read_r)
        if self.config.skip:
            self.W_skip.mul_(read_r).div_(write_w[:, None])

    def _factor_vector(self, sites: Mapping[str, int], factors: Mapping[str, float]) -> Tensor:
        return torch.cat(
            [torch.full((w,), factors[s], device=self.device) for s, w in sites.items()]
        )

    def save(self, path: str | Path, **extra: Any) -> Path:
        """Write the native format (weights as safetensors, description as JSON) into a folder."""
        from dictlearn.formats.native import save

        return save(self, path, **extra)
