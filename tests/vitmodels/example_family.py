"""A family of an architecture of its own: everything that adding a model takes.

docs/adding-a-model.md refers to this file; test_adding_a_family.py drops it into the scanned
folder. The architecture: post-norm blocks, attention by softmax and matmul, GELU MLP.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vitmodels.attention import AttentionTap
from vitmodels.family import Anatomy, Family, Request
from vitmodels.spec import TokenGrid
from vitmodels.taps import HeadOutTap, InputTap, OutputTap, Tap
from vitmodels.transforms import grey_transform

HEADS = 2


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        pattern = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)
        return self.out((pattern @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn, self.norm1 = Attention(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))


class PostNormNet(nn.Module):
    def __init__(self, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, width, kernel_size=4, stride=4)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(depth)])
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return self.head(self.blocks(x).mean(dim=1))


def block_sites(block: Block) -> dict[str, Tap]:
    return {
        "resid_pre": InputTap(module=block),
        "attn_in": InputTap(module=block.attn),
        "scores": AttentionTap(scope=block.attn, part="scores", softmax=True),
        "pattern": AttentionTap(scope=block.attn, part="pattern", softmax=True),
        "z": InputTap(
            module=block.attn.out,
            read=lambda flat: flat.unflatten(-1, (HEADS, -1)),
            write=lambda _, z: z.flatten(2),
        ),
        "head_out": HeadOutTap(module=block.attn.out, heads=HEADS),
        "attn_out": OutputTap(module=block.norm1),
        "mlp_in": InputTap(module=block.mlp),
        "mlp_post": InputTap(module=block.mlp[2]),
        "mlp_out": OutputTap(module=block.norm2),
        "resid_post": OutputTap(module=block),
    }


class ExampleFamily(Family):
    name = "example_family"
    prefix = "example"
    backend = "torch"

    def names(self) -> Sequence[str]:
        return ("post_norm",)

    def build(self, request: Request) -> nn.Module:
        return PostNormNet()

    def accepts(self, module: Any) -> bool:
        return type(module).__name__ == "PostNormNet"

    def anatomy(self, module: Any) -> Anatomy:
        taps: dict[str, Tap] = {"embed": InputTap(module=module.blocks)}
        for i, block in enumerate(module.blocks):
            taps |= {f"blocks.{i}.{part}": tap for part, tap in block_sites(block).items()}
        taps |= {"pooled": InputTap(module=module.head), "logits": OutputTap(module=module)}
        return Anatomy(
            taps=taps,
            grid=TokenGrid(cls=0, patch=(3, 3)),
            **{"d_model": 16, "n_layers": len(module.blocks), "n_heads": HEADS, "d_head": 8},
            **{"d_mlp": 32, "n_classes": 3, "input_shape": (1, 12, 12)},
            transform=grey_transform((12, 12), mean=0.5, std=0.5),
        )

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        return {"small": PostNormNet}


FAMILY = ExampleFamily()
