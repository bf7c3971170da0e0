"""The peer's side of ``taps.py``: runs under another interpreter, one line in, one time out.

``taps_peer.py prisma|transformerlens BATCH THREADS``. A line is ``bare`` (the forward pass without
a cache), ``one`` (one residual site kept), ``residual`` (all of them), ``pattern`` or ``all``
(everything); the answer is CPU seconds. The models are of equal shape: ViT-S/14 at 224 pixels.
"""

import sys
import tempfile
import time
from collections.abc import Callable

import torch

KEEP = {
    "one": lambda name: name == "blocks.11.hook_resid_post",
    "residual": lambda name: "hook_resid" in name,
    "pattern": lambda name: name.endswith("hook_pattern"),
    "all": lambda name: True,
}


def prisma(x: torch.Tensor) -> Callable[[str], object]:
    """ViT-Prisma's own model; bare is its forward pass, it wraps no other."""
    from vit_prisma.configs.HookedViTConfig import HookedViTConfig
    from vit_prisma.models.base_vit import HookedViT

    config = HookedViTConfig(
        n_layers=12,
        d_model=384,
        d_head=64,
        n_heads=6,
        d_mlp=1536,
        patch_size=14,
        image_size=224,
        n_classes=1000,
        activation_name="gelu",
        eps=1e-6,
        return_type="class_logits",
    )
    model = HookedViT(config).eval()
    return lambda kind: (
        model(x) if kind == "bare" else model.run_with_cache(x, names_filter=KEEP[kind])
    )


def transformerlens(x: torch.Tensor) -> Callable[[str], object]:
    """TransformerLens's bridge over transformers' ViT; bare is that module by itself."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=224,
        patch_size=14,
        num_labels=1000,
    )
    bare = ViTForImageClassification(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        bare.save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder)
    return lambda kind: (
        bare(pixel_values=x)
        if kind == "bare"
        else bridge.run_with_cache(x, names_filter=KEEP[kind])
    )


PEERS = {"prisma": prisma, "transformerlens": transformerlens}


def main() -> None:
    """Answer until the input ends."""
    peer, batch, threads = PEERS[sys.argv[1]], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    run = peer(torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0)))
    print("ready", flush=True)
    for line in sys.stdin:
        kind = line.strip()
        begin = time.process_time()
        with torch.inference_mode():
            run(kind)
        print(f"seconds {time.process_time() - begin}", flush=True)


if __name__ == "__main__":
    main()
