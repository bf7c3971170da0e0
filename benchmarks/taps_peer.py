"""The peer's side of ``taps.py``: runs under another interpreter, one line in, one time out.

Needs ViT-Prisma. A line is ``bare`` (forward), ``one`` (one residual site kept), ``residual``
(all of them), ``pattern`` or ``all`` (everything); the answer is CPU seconds.
"""

import sys
import time

import torch
from vit_prisma.configs.HookedViTConfig import HookedViTConfig
from vit_prisma.models.base_vit import HookedViT

KEEP = {
    "one": lambda name: name == "blocks.11.hook_resid_post",
    "residual": lambda name: "hook_resid" in name,
    "pattern": lambda name: name.endswith("hook_pattern"),
    "all": lambda name: True,
}


def main() -> None:
    """Answer until the input ends."""
    batch, threads = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
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
    x = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    print("ready", flush=True)
    for line in sys.stdin:
        kind = line.strip()
        begin = time.process_time()
        with torch.inference_mode():
            if kind == "bare":
                model(x)
            else:
                model.run_with_cache(x, names_filter=KEEP[kind])
        print(f"seconds {time.process_time() - begin}", flush=True)


if __name__ == "__main__":
    main()
