"""Train one of the toy vision transformers that ship with vitmodels, and write its weights file.

    python examples/train_toy.py digits-2l --out digits-2l.safetensors

The data are the 5,000 handwritten digits of `actstore.sources`; every fifth item (index % 5 == 4)
is the test set, 100 of each class. Initialisation, order and augmentation come from one generator,
so a run on the same machine and thread count gives the same weights.
"""

import argparse
import math

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import vitmodels
from actstore.sources.digits import Digits

NAMES = [f"digits-{depth}l{suffix}" for depth in (1, 2, 3, 4) for suffix in ("", "-attn")]
BATCH = 128


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw matrices with variance 1 / fan-in; position and CLS embeddings with deviation 0.2.

    The usual deviation of 0.02 is for wide models: at width 64 it costs three times the epochs.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in {"pos_embed", "cls_token"}:
                parameter.normal_(0, 0.2, generator=generator)
            elif parameter.ndim >= 2:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)


def augment(x_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by up to 12 degrees, scale by 12 %, shear by 20 %, shift by up to 1.5 pixels."""
    batch = len(x_BCHW)
    u = torch.rand(5, batch, generator=generator) * 2 - 1
    angle, scale = u[0] * math.radians(12), 1 + 0.12 * u[1]
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [torch.stack([cos, 0.2 * u[2] - sin, 0.15 * u[3]], 1)]
    rows.append(torch.stack([sin, cos, 0.15 * u[4]], 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(x_BCHW.shape), align_corners=False)
    background = x_BCHW.amin()
    return F.grid_sample(x_BCHW - background, grid, align_corners=False) + background


def accuracy(module: nn.Module, x_BCHW: Tensor, label_B: Tensor) -> float:
    """Return the share of right answers in evaluation mode."""
    module.eval()
    with torch.no_grad():
        return (module(x_BCHW).argmax(1) == label_B).float().mean().item()


def main() -> None:
    """Train, round the weights to float16, write them with the accuracy of the rounded model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", default="digits-1l", choices=NAMES)
    parser.add_argument("--out", help="where to write the .safetensors file")
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--toy", action="store_true", help="one epoch, to see that it runs")
    args = parser.parse_args()
    epochs = 1 if args.toy else args.epochs

    torch.set_num_threads(1)  # the sums of several threads may round differently
    model = vitmodels.load(f"toy/{args.name}", pretrained=False, seed=args.seed)
    module = model.module
    digits = Digits()
    x = torch.stack([model.transform(digits.image(index)) for index in range(len(digits))])
    label = torch.tensor([digits.row(index)["label"] for index in range(len(digits))])
    is_test = torch.from_numpy(np.arange(len(x)) % 5 == 4)
    train_x, train_label = x[~is_test], label[~is_test]

    generator = torch.Generator().manual_seed(args.seed)
    module.requires_grad_(True)
    initialise(module, generator)
    optimiser = torch.optim.AdamW(
        module.parameters(), lr=2e-3, weight_decay=0.05, betas=(0.9, 0.98)
    )
    a_epoch = len(train_x) // BATCH
    steps = epochs * a_epoch
    warm_up = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    for epoch in range(epochs):
        module.train()
        order = torch.randperm(len(train_x), generator=generator)
        for rows in order[: a_epoch * BATCH].split(BATCH):
            loss = F.cross_entropy(module(augment(train_x[rows], generator)), train_label[rows])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        if (epoch + 1) % 10 == 0 or epoch + 1 == epochs:
            test = accuracy(module, x[is_test], label[is_test])
            print(f"{args.name} epoch {epoch + 1}/{epochs} loss {loss:.3f} test {test:.3f}")

    weights = {name: value.half().contiguous() for name, value in module.state_dict().items()}
    module.load_state_dict({name: value.float() for name, value in weights.items()})
    test = accuracy(module, x[is_test], label[is_test])
    print(f"{args.name}: test accuracy {test:.3f} with float16 weights")
    if args.out:
        metadata = {
            "test_accuracy": f"{test:.4f}",
            "test_split": "index % 5 == 4",
            "data": "digits.png",
            "epochs": str(epochs),
            "seed": str(args.seed),
        }
        save_file(weights, args.out, metadata=metadata)


if __name__ == "__main__":
    main()
