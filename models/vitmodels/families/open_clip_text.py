"""open_clip's own text towers, for zero-shot heads and for looking inside of them.

A text tower is a model of its own: ``open_clip_text/<name>`` for every name of ``open_clip/``
whose text tower is not a model of transformers. Its sites are ``text.blocks.L.*`` and so on, its
input is ``[B, context]`` token ids, its transform is the tokenizer. Text tokens count as patches
in a grid of one row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitmodels import open_clip_backend as backend
from vitmodels import open_clip_names as naming
from vitmodels.families.open_clip_vit import first, resblock_taps
from vitmodels.family import Anatomy, Family, Request
from vitmodels.spec import TokenGrid
from vitmodels.taps import InputTap, OutputTap, PositionTap, Tap, Wire, Wiring


def call_text(module: Any, x: Any) -> Tensor:
    """Run the text tower: ``[B, context]`` ids ``-> [B, E]``, not normalised."""
    return first(getattr(module, "text", module)(x))


@dataclass(frozen=True, kw_only=True)
class PickTap(Tap):
    """The token that stands for the text, after the final norm."""

    embedding: nn.Module
    """Takes the token ids."""
    norm: nn.Module
    """The final norm."""
    pool: str
    """``argmax`` (the highest id is the end of text), ``eos``, ``first`` or ``last``."""
    eos: int
    """Id of the end of text, for ``eos``."""

    def attach(self, wire: Wire, wiring: Wiring) -> None:
        """Remember the ids, read the norm's output."""
        held: list[Tensor] = []

        def ids(_module: nn.Module, args: tuple[Any, ...], _kwargs: Any) -> None:
            held[:] = [args[0]]

        def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
            rows = torch.arange(output.shape[0], device=output.device)
            at = self._position(held.pop())
            value = wire(output[rows, at])
            return output.index_put((rows, at), value) if wire.writes else None

        wiring.before(self.embedding, ids)
        wiring.after(self.norm, hook)

    def _position(self, ids: Tensor) -> Tensor:
        if self.pool == "argmax":
            return ids.argmax(dim=-1)
        if self.pool == "eos":
            return (ids == self.eos).int().argmax(dim=-1)
        index = 0 if self.pool == "first" else ids.shape[1] - 1
        return torch.full((ids.shape[0],), index, device=ids.device)


class OpenClipText(Family):
    """``open_clip.transformer.TextTransformer``, alone or inside of a ``CustomTextCLIP``."""

    name = "open_clip_text"
    prefix = "open_clip_text"
    backend = "open_clip_torch"

    def names(self) -> Sequence[str]:
        """Return none: all names of ``open_clip/`` are understood, but are no image models."""
        return ()

    def claims(self, name: str) -> bool:
        """Accept a configuration whose text tower is open_clip's own, whatever its tag."""
        config, _ = naming.split(name)
        known = config in naming.config_names()
        return known and not naming.text_cfg(config).get("hf_model_name")

    def refusal(self, name: str) -> str | None:
        """Say which model of transformers the text tower is."""
        why = {
            config: f"its text tower is {told} of transformers, which has no taps here"
            for config in naming.config_names()
            if (told := naming.text_cfg(config).get("hf_model_name"))
        }
        return naming.refusal(name, why)

    def build(self, request: Request) -> nn.Module:
        """Build the text tower by open_clip's own classes."""
        return backend.build_text(request)

    def accepts(self, module: Any) -> bool:
        """Accept the tower, or what :meth:`build` gives."""
        text, visual = getattr(module, "text", module), getattr(module, "visual", None)
        return backend.is_a(text, "TextTransformer") and not hasattr(visual, "image_size")

    def anatomy(self, module: Any) -> Anatomy:
        """Describe the tower."""
        torch.backends.mha.set_fastpath_enabled(False)
        text = getattr(module, "text", module)
        length = int(text.context_length)
        words = TokenGrid(cls=0, patch=(1, length))
        summary = text.cls_emb is not None
        grid = TokenGrid(cls=int(summary), patch=(1, length), order=("register", "patch", "cls"))
        taps: dict[str, Tap] = {
            "text.token_embed": OutputTap(module=text.token_embedding, grid=words),
            "text.pos_embed": PositionTap(
                model=text, attribute="positional_embedding", after=text.transformer, skip=0
            ),
            "text.embed": InputTap(module=text.transformer),
        }
        for i, block in enumerate(text.transformer.resblocks):
            taps |= resblock_taps(f"text.blocks.{i}", block)
        if summary:
            taps["text.pooled"] = OutputTap(module=text.ln_final)
        else:
            taps["text.final"] = OutputTap(module=text.ln_final)
            if text.pool_type != "none":
                taps["text.pooled"] = PickTap(
                    embedding=text.token_embedding,
                    norm=text.ln_final,
                    pool=text.pool_type,
                    eos=int(text.eos_id),
                )
        taps["text.projection"] = OutputTap(module=text)
        block = text.transformer.resblocks[0]
        return Anatomy(
            taps=taps,
            grid=grid,
            d_model=int(text.width),
            n_layers=len(text.transformer.resblocks),
            n_heads=int(block.attn.num_heads),
            d_head=int(block.attn.head_dim),
            d_mlp=int(block.mlp.c_fc.out_features),
            input_shape=(length,),
            vocabulary=int(text.vocab_size),
            transform=backend.tokenizer(text),
            revision=backend.revision(text),
            call=call_text,
        )

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return one small tower for each way of masking and pooling."""

        def small(**options: Any) -> Callable[[], nn.Module]:
            def make() -> nn.Module:
                from open_clip.transformer import TextTransformer

                sizes = {"context_length": 8, "vocab_size": 30, "width": 24, "layers": 3}
                tower: nn.Module = TextTransformer(**sizes, heads=4, output_dim=20, **options)
                return tower

            return make

        return {
            "clip": small(),
            "coca": small(embed_cls=True, output_tokens=True),
            "siglip": small(no_causal_mask=True, pool_type="last", proj_bias=True),
            "custom": small(qk_norm=True, scale_attn_inner=True),
        }


FAMILY = OpenClipText()
