r"""From a folder of images to a dictionary, with the cost of each step.

    python examples/images_to_dictionary.py --data photos/ \
        --model timm/vit_small_patch14_dinov2 --weights weights.safetensors --img-size 224 \
        --sites 'blocks.{5,7,9}.resid_post' --train-on blocks.7.resid_post --tokens patch

Harvests once, trains one TopK dictionary off the shards, and reports on items it never saw. Run
again, it goes on where it was.
"""

import argparse
import time

import actstore
import dictlearn
import vitmodels
from actstore.selection import Split


def main() -> None:
    """Harvest, train, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="folder, parquet file or URL; digits")
    parser.add_argument("--model", default="toy/digits-2l")
    parser.add_argument("--weights", help="local weights file")
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--sites", default="blocks.*.resid_post")
    parser.add_argument("--train-on", default="blocks.1.resid_post")
    parser.add_argument("--tokens", default="patch")
    parser.add_argument("--expansion", type=int, default=8)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--limit", type=int, help="items")
    parser.add_argument("--out", default="images-to-dictionary")
    parser.add_argument("--toy", action="store_true", help="a minute's worth, to see that it runs")
    args = parser.parse_args()
    if args.toy:
        args.limit, args.steps, args.k = 500, 30, 8

    model = vitmodels.load(args.model, weights=args.weights, img_size=args.img_size)
    start = time.perf_counter()
    store = actstore.harvest(
        model=model,
        data=args.data,
        sites=args.sites,
        tokens="cls,patch",
        limit=args.limit,
        out=f"{args.out}/acts.zarr",
    )
    print(f"harvest: {store.n_items} items, {time.perf_counter() - start:.1f} s")

    width = store.spec(args.train_on, store.kinds(args.train_on)[0]).channels
    dictionary = dictlearn.Dictionary(
        {args.train_on: width}, latents=args.expansion * width, sparsify=dictlearn.TopK(args.k)
    )
    config = dictlearn.TrainConfig(steps=args.steps, tokens=args.tokens, holdout=0.1)
    start = time.perf_counter()
    dictlearn.train(store, [dictionary], config, out=f"{args.out}/dictionary")
    print(f"train: {args.steps} steps, {time.perf_counter() - start:.1f} s")

    held_out = Split(half="validation", holdout=config.holdout, seed=config.split_seed)
    report = dictlearn.evaluate(dictionary, store, tokens=args.tokens, items=held_out)
    print(report.table())


if __name__ == "__main__":
    main()
