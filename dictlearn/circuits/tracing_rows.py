"""Rows of an attribution graph: direct effects of every source on some targets, by one backward.

Sources stand in blocks: patches, positions, then the latents of every layer, then the errors of
every layer. A row holds the effects of all of them on one target; those of a later layer are 0.

Shapes: B targets, T tokens, D channels, N latents of a layer, K most latents of a token, S sources.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dictlearn.circuits.graph import Node
from dictlearn.circuits.replacement import Replacement, stacked
from dictlearn.circuits.tracing_readout import Readout


class Rows:
    """The frozen model's graph of operations for one input, asked for rows.

    Parameters
    ----------
    replacement
        The model on one input.
    batch
        Rows of one backward pass; the memory of `batch` forward passes is held.
    """

    def __init__(self, replacement: Replacement, batch: int) -> None:
        self.replacement, self.batch = replacement, batch
        r = replacement
        tokens = len(r.embed)
        self.counts = [len(e.token) for e in r.entries]
        self.n_latents = sum(self.counts)
        self.has_position = not torch.equal(r.content, r.embed)
        self._inputs = self._input_sources()
        self.first_latent = len(self._inputs)
        self.n_sources = self.first_latent + self.n_latents + r.n_layers * tokens
        self._layer_of = np.repeat(np.arange(r.n_layers), self.counts)
        starts = np.cumsum([0, *self.counts])
        self._number_in_layer = np.arange(self.n_latents) - starts[self._layer_of]
        leaves = [r.embed, *(r.leaf(layer) for layer in range(r.n_layers))]
        with torch.enable_grad():
            self._embed, *self._outs = stacked(leaves, batch)
            sites = [f"blocks.{layer}.mlp_in" for layer in range(r.n_layers)]
            self._values = r.frozen_pass(self._embed, r.leaves(self._outs), [*sites, *r.affine])
        with torch.no_grad():
            zero = [torch.zeros_like(v)[None] for v in leaves]
            self._at_zero = r.frozen_pass(zero[0], r.leaves(zero[1:]), [*sites, *r.affine])
        self._vectors = [self._decoders(layer) for layer in range(r.n_layers)]

    # ---- sources -----------------------------------------------------------------------------
    def _input_sources(self) -> list[tuple[str, int]]:
        """(embed or position, token) of every input that is not zero."""
        r = self.replacement
        position = r.embed - r.content
        return [("embed", t) for t in range(len(r.embed)) if bool(r.content[t].any())] + [
            ("position", t) for t in range(len(r.embed)) if bool(position[t].any())
        ]

    def sources(self) -> list[Node]:
        """Return the node of every source, in their order."""
        r = self.replacement
        grid = r.model.spec.grid
        kinds = [kind for kind in grid.order for _ in range(grid.count(kind))]
        first = grid.slice("patch").start

        def node(kind: str, layer: int, token: int, latent: int = -1, value: float = 1.0) -> Node:
            place: tuple[int, ...] = ()
            if kinds[token] == "patch":
                place = tuple(int(i) for i in np.unravel_index(token - first, grid.patch))
            words = {"latent": (layer, token, latent), "error": (layer, token)}.get(kind, (token,))
            return Node(
                id="/".join([kind, *map(str, words)]),
                kind=kind,  # type: ignore[arg-type]
                layer=layer,
                token=token,
                token_kind=kinds[token],
                place=place,
                latent=latent,
                value=value,
            )

        nodes = [node(kind, -1, token) for kind, token in self._inputs]
        for layer, e in enumerate(r.entries):
            rows = zip(e.token.tolist(), e.latent.tolist(), e.value.tolist(), strict=True)
            nodes += [node("latent", layer, t, f, v) for t, f, v in rows]
        for layer in range(r.n_layers):
            nodes += [node("error", layer, token) for token in range(len(r.embed))]
        return nodes

    def batches(self, numbers: Int[np.ndarray, " n"]) -> Iterator[Int[np.ndarray, " b"]]:
        """Cut latents (source numbers) into batches of one layer each."""
        layer = self._layer_of[numbers - self.first_latent]
        for one in np.unique(layer):
            mine = numbers[layer == one]
            for start in range(0, len(mine), self.batch):
                yield mine[start : start + self.batch]

    # ---- rows --------------------------------------------------------------------------------
    def of_latents(self, numbers: Int[np.ndarray, " b"]) -> tuple[Tensor, Tensor]:
        """Return rows [b, S] and biases [b] of latents of one layer, by source number."""
        r = self.replacement
        layer = int(self._layer_of[numbers[0] - self.first_latent])
        inside = torch.from_numpy(self._number_in_layer[numbers - self.first_latent])
        inside = inside.to(r.embed.device)
        entries = r.entries[layer]
        token_b, latent_b = entries.token[inside], entries.latent[inside]
        row_bD = r.codes[layer].encoder_rows(token_b, latent_b)
        site = f"blocks.{layer}.mlp_in"
        seeds = torch.zeros_like(self._values[site])
        b = torch.arange(len(inside), device=row_bD.device)
        seeds[b, token_b] = row_bD
        constant = r.codes[layer].encoder_constant(latent_b).double()
        constant += (self._at_zero[site][0][token_b].double() * row_bD.double()).sum(-1)
        return self._rows(site, seeds, layer, len(inside), constant)

    def of_readouts(self, readouts: Sequence[Readout]) -> tuple[Tensor, Tensor]:
        """Return rows [b, S] and biases [b] of readouts, at most a batch of them."""
        rows, biases = [], []
        for site, group in itertools.groupby(readouts, key=lambda one: one.site):
            value, at_zero = self._values[site], self._at_zero[site][0].double()
            directions = [readout.direction.to(value) for readout in group]
            seeds = torch.zeros_like(value)
            seeds[: len(directions)] = torch.stack(directions)
            constant = torch.stack([(d.double() * at_zero).sum() for d in directions])
            row, bias = self._rows(
                site, seeds, self.replacement.n_layers, len(directions), constant
            )
            rows.append(row)
            biases.append(bias)
        return torch.cat(rows), torch.cat(biases)

    def _rows(
        self, site: str, seeds: Tensor, layer: int, count: int, constant: Float[Tensor, " b"]
    ) -> tuple[Tensor, Tensor]:
        """Go backward from `seeds` at a site; sources are those before `layer`."""
        r = self.replacement
        leaves = [self._embed, *self._outs[:layer]]
        grads = torch.autograd.grad(
            self._values[site], leaves, grad_outputs=seeds, retain_graph=True, allow_unused=True
        )
        grad_e, *grad_o = (
            torch.zeros_like(leaf[:count]) if g is None else g[:count]
            for g, leaf in zip(grads, leaves, strict=True)
        )
        with torch.no_grad():
            content_bT = torch.einsum("btd,td->bt", grad_e, r.content)
            position_bT = torch.einsum("btd,td->bt", grad_e, r.embed - r.content)
            both = {"embed": content_bT, "position": position_bT}
            inputs = [both[kind][:, token] for kind, token in self._inputs]
            columns = [torch.stack(inputs, dim=1)]
            columns += [self._latents(source, grad_o, count) for source in range(r.n_layers)]
            for source in range(r.n_layers):
                if source < layer:
                    columns.append(torch.einsum("btd,td->bt", grad_o[source], r.error[source]))
                else:
                    columns.append(torch.zeros_like(content_bT))
            bias = constant
            for grad, made in zip(grad_o, r.bias, strict=False):
                bias = bias + torch.einsum("btd,td->b", grad.double(), made.expand_as(
                    r.embed).double())  # fmt: skip
        return torch.cat(columns, dim=1), bias

    def _decoders(self, layer: int) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Token and column of a layer's latents, and their vectors [T, K, D] by write."""
        r = self.replacement
        e = r.entries[layer]
        count_T = torch.bincount(e.token, minlength=len(r.embed))
        start_T = count_T.cumsum(0) - count_T
        column_N = torch.arange(len(e.token), device=e.token.device) - start_T[e.token]
        width = int(count_T.max()) if len(e.token) else 0
        vectors = {}
        for write in r.codes[layer].writes:
            rows_ND = r.codes[layer].decoder_rows(write, e.token, e.latent) * e.value[:, None]
            padded = rows_ND.new_zeros(len(r.embed), width, rows_ND.shape[1])
            vectors[write] = padded.index_put((e.token, column_N), rows_ND)
        return e.token, column_N, vectors

    def _latents(self, source: int, grad_o: Sequence[Tensor], count: int) -> Float[Tensor, "b n"]:
        """Effects of the latents of one layer through all the layers they write."""
        token_N, column_N, vectors = self._vectors[source]
        total = self._embed.new_zeros(count, len(token_N))
        for write, padded_TKD in vectors.items():
            if write < len(grad_o):
                part_bTK = torch.einsum("btd,tkd->btk", grad_o[write], padded_TKD)
                total = total + part_bTK[:, token_N, column_N]
        return total

    def fold(
        self, weights: Float[np.ndarray, "r s"], rest: Int[np.ndarray, " n"]
    ) -> Float[np.ndarray, "r s"]:
        """Add the effects of some latents to the errors of their layers and tokens."""
        inside = rest - self.first_latent
        layer = self._layer_of[inside]
        token = np.concatenate([e.token.numpy(force=True) for e in self.replacement.entries])
        tokens = len(self.replacement.embed)
        error = self.first_latent + self.n_latents + layer * tokens + token[inside]
        folded = weights.copy()
        np.add.at(folded.T, error, weights[:, rest].T)
        return folded
