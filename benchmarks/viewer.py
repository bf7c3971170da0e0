"""The viewer: what a site costs beside one read of its store, and how fast its first page opens.

    python benchmarks/viewer.py --photos PHOTOS --weights vit_small.safetensors --work DIR
    python benchmarks/viewer.py --latents 50000 --work DIR

The first harvests a folder of photos named ``<WordNet id>_<name>`` at block 7 of a ViT-S/14, trains
a TopK dictionary of 3,072 latents, and builds its site; photos are labelled by the groups of
`GROUPS`, because a class with one photo has no purity to speak of. The second builds the site of a
random dictionary over random activations and opens it in headless Chromium, from disk and cold.
Both take up work that is in DIR. Times are of the wall and of the processor.
"""

import argparse
import csv
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import actstore
import dictlearn
from dictlearn.dictionary import Dictionary
from dictlearn.formats import load, save
from dictlearn.viz.site.build import SiteOptions, build

SITE = "blocks.7.resid_post"
GROUPS = (
    (1440764, 1498041, "fish"),
    (1514668, 1622779, "bird"),
    (1629819, 1756291, "reptile or amphibian"),
    (1768244, 1791625, "invertebrate"),
    (1795545, 1860187, "bird"),
    (1871265, 1883070, "mammal"),
    (1910747, 1990800, "invertebrate"),
    (2002556, 2058221, "bird"),
    (2066245, 2077923, "mammal"),
    (2085620, 2113978, "dog"),
    (2114367, 2138441, "wild carnivore"),
    (2165105, 2281787, "insect"),
    (2317335, 2321529, "invertebrate"),
    (2325366, 2504458, "mammal"),
    (2509815, 2510455, "wild carnivore"),
    (2514041, 2655020, "fish"),
    (6785654, 7930864, "food"),
    (9193705, 9472597, "landscape"),
    (10148035, 10565667, "person"),
    (11879895, 13133613, "plant or fungus"),
)
"""Ranges of WordNet noun ids of ImageNet's classes, by group; all others are artefacts."""

ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)


def group(wordnet: str) -> str:
    """Return the group of a class."""
    number = int(wordnet.removeprefix("n"))
    return next((name for low, high, name in GROUPS if low <= number <= high), "artefact")


def timed(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return what a call returns, and its seconds of the wall and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    value = call()
    spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return value, {name: round(seconds, 3) for name, seconds in spent.items()}


def read_once(store: actstore.Store, site: str) -> int:
    """Read every array of a site through dask, a part at a time; return the bytes."""
    total = 0
    for kind in store.kinds(site):
        for block in store.dask(site, kind).to_delayed().ravel():
            total += block.compute().nbytes
    return total


def labelled(folder: Path, table: Path) -> Path:
    """Write the table of the photos with their groups."""
    table.parent.mkdir(parents=True, exist_ok=True)
    files = sorted(folder.glob("*/*.jpg"))
    groups = [group(file.parent.name.split("_")[0]) for file in files]
    names = sorted(set(groups))
    with table.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["path", "label", "label_name"])
        for file, name in zip(files, groups, strict=True):
            writer.writerow([str(file.resolve()), names.index(name), name])
    return table


def photos(folder: Path, weights: Path, work: Path) -> dict[str, Any]:
    """Measure the site of 3,072 latents over the photos."""
    import vitmodels

    model = vitmodels.load("timm/vit_small_patch14_dinov2", weights=weights, img_size=224)
    if (work / "acts.zarr").exists():
        store = actstore.open(work / "acts.zarr")
    else:
        data = str(labelled(folder, work / "photos.csv"))
        store = actstore.harvest(model=model, data=data, sites=SITE, out=work / "acts.zarr")
    place = work / "run" / SITE
    if not (place / "config.json").is_file():
        untrained = Dictionary({SITE: 384}, latents=3072, sparsify=dictlearn.TopK(32))
        config = dictlearn.TrainConfig(steps=1500, tokens="patch", holdout=0.1, batch_size=2048)
        dictlearn.train(store, [untrained], config, out=work / "run")
    dictionary = load(place)
    read_once(store, SITE)
    size, read = timed(lambda: read_once(store, SITE))
    named = {SITE: (dictionary, place)}
    bare, without = timed(
        lambda: build(store, named, work / "bare", SiteOptions(items=0, thumbs=0))
    )
    print(f"read {read}, built without pictures and model {without}", flush=True)
    built, whole = timed(lambda: build(store, named, work / "site", model=model))
    return {
        "items": store.n_items,
        "store_bytes": size // 2,
        "read": read,
        "build_without_pictures_and_model": without,
        "build": whole,
        "stages": built.seconds,
        "stages_without": bare.seconds,
        "ratio_cpu": round(whole["cpu"] / read["cpu"], 1),
        "ratio_cpu_without": round(without["cpu"] / read["cpu"], 1),
        "site_bytes": built.bytes,
        "files": built.files,
        "summary": built.summaries[SITE],
    }


def many(latents: int, work: Path) -> dict[str, Any]:
    """Build a site of many latents, and open its first page cold, five times."""
    work.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    place = work / f"{latents}.zarr"
    if not place.exists():
        values = rng.normal(size=(2000, 17, 64)).astype(np.float32)
        actstore.write_arrays(
            place,
            {"embed": {"cls": values[:, :1], "patch": values[:, 1:]}},
            table={"label_name": [f"label {i % 100}" for i in range(2000)]},
        )
    store = actstore.open(place)
    d = Dictionary({"embed": 64}, latents=latents, sparsify=dictlearn.TopK(32))
    path = save(d, work / f"{latents}-dictionary")
    out = work / f"{latents}-site"
    built, spent = timed(lambda: build(store, {"random": (d, path)}, out, SiteOptions(items=4)))
    return {
        "latents": latents,
        "build": spent,
        "stages": built.seconds,
        "site_bytes": built.bytes,
        "files": built.files,
        "first_page": first_page(out),
    }


def first_page(site: Path, runs: int = 5) -> dict[str, Any]:
    """Open the first page in fresh browsers, from disk: milliseconds to the first rows, bytes."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        raise FileNotFoundError("no Chromium: apt-get install chromium")
    first, filled, loaded = [], [], set()
    script = (
        "() => new Promise(done => { const now = () => document.querySelector('#row-0') ? "
        "done(performance.now()) : requestAnimationFrame(now); now(); })"
    )
    with sync_playwright() as running:
        for _ in range(runs):
            browser = running.chromium.launch(executable_path=chromium, args=ARGUMENTS.split())
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.on("request", lambda r: loaded.add(r.url))
            page.goto((site / "index.html").as_uri(), wait_until="commit")
            first.append(page.evaluate(script))
            page.wait_for_function("() => View.table(0).has('cosine')")
            filled.append(page.evaluate("performance.now()"))
            browser.close()
    files = [site / url.split(f"/{site.name}/")[1] for url in loaded if f"/{site.name}/" in url]
    return {
        "ms_to_first_rows": [round(t) for t in first],
        "ms_to_all_columns": [round(t) for t in filled],
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files if file.is_file()),
    }


def main() -> None:
    """Run one of the two and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, help="folder of photos by class")
    parser.add_argument("--weights", type=Path, help="weights of the ViT-S/14")
    parser.add_argument("--latents", type=int, help="build a random site of so many instead")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder")
    args = parser.parse_args()
    if args.latents:
        result = many(args.latents, args.work)
    else:
        result = photos(args.photos, args.weights, args.work)
    result["load"] = [round(x, 1) for x in os.getloadavg()]
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
