"""Turn the prediction of one digit into another's by activation patching.

    python examples/patch_a_digit.py --clean 3 --corrupted 8

Takes pairs of two digits that the model tells apart, patches values of the one run into the other,
and asks: which places carry the digit, what is the smallest set that turns the prediction, and does
the gradient (attribution patching) rank places as exact patching does?
"""

import argparse

import torch
import xarray as xr
from torch import Tensor

import vitmodels
from actstore.sources.digits import Digits
from dictlearn.circuits import (
    activation_patching,
    agreement,
    attribution_patching,
    integrated_gradients,
    recovered,
)
from dictlearn.circuits.metrics import accuracy, logit_difference
from dictlearn.circuits.places import Place, Positions
from dictlearn.circuits.search import smallest_set


def digits_of(model: vitmodels.VisionModel, label: int, count: int) -> Tensor:
    """Return digits of the test set that the model gets right."""
    source = Digits()
    mine = [i for i in range(4, len(source), 5) if source.row(i)["label"] == label]
    x = torch.stack([model.transform(source.image(i)) for i in mine])
    with torch.no_grad():
        right = model(x).argmax(1) == label
    return x[right][:count]


def named(place: Place) -> str:
    """Return a place in words."""
    head = "" if place.head is None else f" head {place.head}"
    where = "" if place.label is None else f" at {place.label}"
    return f"{place.site}{head}{where}"


def best_cells(share: xr.DataArray, count: int) -> str:
    """Return the cells of largest value."""
    flat = share.stack(cell=share.dims)
    order = flat.argsort()[::-1][:count]
    cells = [
        ", ".join(f"{d} {v}" for d, v in zip(share.dims, flat["cell"].values[i], strict=True))
        + f": {float(flat[i]):.2f}"
        for i in order.values
    ]
    return "; ".join(cells)


def main() -> None:
    """Patch, search, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="toy/digits-4l")
    parser.add_argument("--clean", type=int, default=3, help="digit whose values are patched in")
    parser.add_argument("--corrupted", type=int, default=8, help="digit that is turned")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--goal", type=float, default=0.9, help="share of pairs to turn")
    parser.add_argument("--largest", type=int, default=3, help="largest set of places tried")
    parser.add_argument("--toy", action="store_true", help="few pairs, small sets: to see it run")
    args = parser.parse_args()
    if args.toy:
        args.pairs, args.largest, args.model = 4, 1, "toy/digits-2l"

    model = vitmodels.load(args.model)
    clean = digits_of(model, args.clean, args.pairs)
    corrupted = digits_of(model, args.corrupted, args.pairs)
    pairs = min(len(clean), len(corrupted))
    clean, corrupted = clean[:pairs], corrupted[:pairs]
    print(
        f"{args.model}: {pairs} pairs; values of a {args.clean} go into the run of a "
        f"{args.corrupted}"
    )
    difference = logit_difference(args.clean, args.corrupted)
    turned = accuracy(args.clean)

    stream = "blocks.*.resid_post"
    exact = activation_patching(model, clean, corrupted, stream, difference, rows=256)
    print(
        f"logit difference: clean {exact.attrs['clean']:.2f}, corrupted "
        f"{exact.attrs['corrupted']:.2f}"
    )
    print("stream, share recovered:", best_cells(recovered(exact)["resid_post"], 6))
    flips = activation_patching(model, clean, corrupted, stream, turned, rows=256)
    for layer in flips["layer"].values:
        row = flips["resid_post"].sel(layer=layer)
        token = int(row.values.argmax())
        print(
            f"  one token of the stream behind block {layer}: token {token} turns "
            f"{float(row[token]):.0%} of the pairs"
        )

    searches: list[tuple[str, str, Positions | None]] = [
        ("heads and MLPs, all tokens", "blocks.*.{z,mlp_out}", None),
        ("heads and MLPs, CLS alone", "blocks.*.{z,mlp_out}", {"CLS": "cls"}),
        ("heads, all tokens", "blocks.*.z", None),
    ]
    for name, sites, positions in searches:
        found = smallest_set(
            model,
            clean,
            corrupted,
            sites,
            turned,
            args.goal,
            over=("head",),
            positions=positions,
            largest=args.largest,
        )
        sizes = ", ".join(f"{size}: {value:.0%}" for size, value in found.best.items())
        which = "all there are" if found.exhaustive else "not all"
        print(f"{name}: best share turned by size: {sizes} ({found.tried} sets run, {which})")
        verdict = "smallest set" if found.reached else "best set, goal not reached"
        print(
            f"  {verdict}: {', '.join(map(named, found.places))}; {found.value:.0%} turned; "
            f"{found.equals} of its size reach {args.goal:.0%}"
        )

    grid = "embed, blocks.*.{resid_post,z,mlp_out}"
    exact = activation_patching(model, clean, corrupted, grid, difference, rows=512)
    for name, estimate in {
        "attribution patching": attribution_patching(model, clean, corrupted, grid, difference),
        "integrated gradients, 8 steps": integrated_gradients(
            model, clean, corrupted, grid, difference, steps=8, rows=256
        ),
    }.items():
        found_ = agreement(exact, estimate)
        row = ", ".join(
            f"{part} {float(found_['spearman'].sel(part=part)):.3f}"
            for part in found_["part"].values
        )
        cells = int(found_["cells"].sel(part="all"))
        print(
            f"{name} against exact patching, rank correlation over {cells} cells: {row}; "
            f"Pearson {float(found_['pearson'].sel(part='all')):.3f}"
        )


if __name__ == "__main__":
    main()
