"""The pages in a real browser: from disk and over loopback http."""

import json
import re
import shutil
import zlib
from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actstore
import dictlearn
from dictlearn.dictionary import Dictionary
from dictlearn.viz.site.build import SiteOptions, build
from dictlearn.viz.site.shards import Shelf, column, numbers

pytestmark = pytest.mark.xdist_group("viewer")


def text(page: Any, selector: str) -> str:
    found: str = page.locator(selector).first.inner_text()
    return found


def wait_text(page: Any, selector: str, pattern: str) -> None:
    page.wait_for_function(
        "([s, p]) => new RegExp(p).test(document.querySelector(s)?.innerText || '')",
        arg=[selector, pattern],
    )


def data(site: Path, name: str) -> Any:
    """Return the value of a data file."""
    script = (site / "data" / f"{name}.js").read_text()
    head = f'View.put("{name}",'
    assert script.startswith(head)
    return json.loads(script.removeprefix(head).removesuffix(");\n"))


def test_sort_search_open_and_go_back(reader: Any, address: str) -> None:
    page = reader.page
    reader.open(address)
    page.wait_for_selector("#row-0")
    assert text(page, ".count") == "128 latents"
    shares = [float(t.split()[0]) for t in page.locator(".c-density .num").all_inner_texts()]
    assert shares == sorted(shares, reverse=True)
    assert len(shares) > 5

    page.get_by_role("button", name="Latent", exact=True).click()
    wait_text(page, "#row-0", r"^0\n")
    assert "sort=latent" in page.url
    page.get_by_role("button", name="Latent", exact=True).click()
    wait_text(page, "#row-0", r"^127\n")

    page.keyboard.press("/")
    page.keyboard.type("12")
    wait_text(page, ".count", "of 128")
    assert text(page, "#row-0").startswith("127")
    assert "q=12" in page.url
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector(".latent-page .tiles")
    assert text(page, "h1") == "Latent 126"
    assert page.url.endswith("#/d0/126")

    page.go_back()
    page.wait_for_selector("#row-0")
    assert page.locator("#search").input_value() == "12"
    page.keyboard.press("/")
    page.keyboard.type("nothing has this name")
    page.wait_for_selector("text=No latent fits")
    page.get_by_role("button", name="Clear search and filters").click()
    wait_text(page, ".count", "^128 latents")


def test_latent_page_shows_what_was_gathered(reader: Any, address: str, toy_site: Path) -> None:
    page = reader.page
    page.goto(f"{address}#/d0/7")
    page.wait_for_selector(".column-main .card")
    record = data(toy_site, "d0/latents/0")[7]
    strong = page.locator(".panel").filter(has_text="Strongest items").locator(".card")
    assert strong.count() == len(record["best"])
    value = float(strong.first.locator(".num").inner_text())
    assert value == pytest.approx(record["best"][0][2], rel=0.01)
    # the map has its colour where the record says the latent is active
    entry = record["best"][0]
    patches = [t - 1 for t in entry[4] if t > 0]
    alpha = strong.first.locator("canvas").evaluate(
        "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
        ".filter((_, i) => i % 4 === 3)"
    )
    assert np.flatnonzero(alpha).tolist() == sorted(patches)
    picture = strong.first.locator("img")
    assert picture.evaluate("i => i.decode().then(() => [i.naturalWidth, i.naturalHeight])") == [
        20,
        20,
    ]
    near = page.locator(".panel").filter(has_text="Nearest decoders").locator("a").first
    assert near.get_attribute("href") == f"#/d0/{record['near'][0][0]}"
    near.click()
    wait_text(page, "h1", f"^Latent {record['near'][0][0]}$")
    page.keyboard.press("ArrowRight")
    wait_text(page, "h1", f"^Latent {record['near'][0][0] + 1}$")
    page.keyboard.press("Escape")
    page.wait_for_selector("#row-0")
    assert page.url.endswith("#/d0")


def attention_row(site: Path, item: int, layer: int, head: int, query: int) -> np.ndarray:
    packed = data(site, f"attention/{item}-{layer}")
    codes = np.frombuffer(zlib.decompress(b64decode(packed["data"]), -15), np.uint8)
    low, high = np.frombuffer(zlib.decompress(b64decode(packed["top"]), -15), np.uint8).reshape(
        2, -1
    )
    top = low + 256.0 * high
    heads, queries, keys = packed["shape"]
    share = codes.reshape(heads, queries, keys)[head, query] / packed["levels"]
    row: np.ndarray = top.reshape(heads, queries)[head, query] / 65534 * share**2
    return row


def test_item_page_hover_layer_head(reader: Any, address: str, toy_site: Path) -> None:
    page = reader.page
    item = data(toy_site, "site")["items"]["pages"][0]
    page.goto(f"{address}#/item/{item}")
    page.wait_for_selector(".active-row")
    before = text(page, ".stage-caption")
    box = page.locator(".stage").bounding_box()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.1 * box["height"])
    wait_text(page, ".stage-caption", "row 0, column 4")
    assert text(page, ".stage-caption") != before
    assert "token=5" in page.url

    codes = data(toy_site, f"d0/codes/{item}")
    shown = page.locator(".active-row").evaluate_all("rows => rows.map(r => +r.dataset.latent)")
    assert shown == codes["5"][0]

    page.mouse.move(5, 5)
    page.select_option("#layer", "0")
    page.select_option("#head", "2")
    wait_text(page, ".stage-caption", "Layer 0, head 2, from row 0, column 4")
    assert "layer=0" in page.url
    row = attention_row(toy_site, item, 0, 2, 5)
    said = float(re.search(r"up to ([\d.]+) %", text(page, ".stage-caption"))[1])  # type: ignore[index]
    assert said == pytest.approx(100 * row[1:].max(), rel=0.01)
    drawn = page.locator(".stage canvas").evaluate(
        "c => { const a = [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
        ".filter((_, i) => i % 4 === 3); return a.indexOf(Math.max(...a)); }"
    )
    assert row[1 + drawn] == pytest.approx(row[1:].max())

    page.locator(".stage").focus()
    page.keyboard.press("ArrowDown")
    wait_text(page, ".stage-caption", "row 1, column 4")
    page.keyboard.press("Enter")
    page.mouse.move(box["x"] + 4, box["y"] + 4)
    assert "row 1, column 4" in text(page, ".stage-caption")
    page.locator(".map-button").first.click()
    wait_text(page, ".stage-caption", "^Latent")
    assert "map=latent" in page.url

    lens = page.locator(".lens tbody tr")
    inside = data(toy_site, f"model/{item}")
    assert lens.count() == len(inside["lens"]) == 2
    assert inside["lens"][-1]["classes"] == inside["clean"]["classes"]
    assert page.locator(".panel").filter(has_text="With the reconstruction").count() == 1
    url = page.url
    page.locator(".active-row a").first.click()
    page.wait_for_selector(".latent-page .tiles")
    page.go_back()
    page.wait_for_selector(".active-row")
    assert page.url == url


def test_graph_opens_its_latent(reader: Any, address: str) -> None:
    page = reader.page
    page.goto(f"{address}#/graphs")
    page.locator(".graph-card").click()
    page.wait_for_selector(".node")
    assert page.locator(".node[data-id]").count() == 4
    assert page.locator(".edge").count() == 3
    before = page.locator("svg.graph").get_attribute("viewBox")
    page.locator("svg.graph").focus()
    page.keyboard.press("+")
    assert page.locator("svg.graph").get_attribute("viewBox") != before
    page.keyboard.press("0")
    assert page.locator("svg.graph").get_attribute("viewBox") == before
    page.locator('[data-id="latent/1/3/7"]').click()
    assert page.locator(".edge.near").count() == 2
    page.locator("#open-latent").click()
    wait_text(page, "h1", "^Latent 7$")
    page.go_back()
    page.wait_for_selector("#open-latent")


def test_theme_help_and_second_dictionary(reader: Any, address: str) -> None:
    page = reader.page
    reader.open(address)
    page.wait_for_selector("#row-0")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.keyboard.press("t")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.keyboard.press("t")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == light
    page.keyboard.press("?")
    page.wait_for_selector("dialog[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog:not([open])", state="attached")
    page.select_option("select.dictionary", "1")
    wait_text(page, ".count", "^32 latents")
    assert page.url.endswith("#/d1")
    page.goto(f"{address}#/d0/9999")
    page.wait_for_selector("text=No latent 9999")
    page.goto(f"{address}#/nowhere")
    page.wait_for_selector("text=No such page")


def test_everything_is_reached_by_keyboard_and_named(reader: Any, toy_site: Path) -> None:
    page = reader.page
    reader.open((toy_site / "index.html").as_uri())
    page.wait_for_selector("#row-0")
    page.wait_for_function("() => document.querySelectorAll('.mini').length === 3")
    nameless = page.evaluate(
        "[...document.querySelectorAll('button, a[href], input, select')].filter(e => !e.closest"
        "('.tbody') && !(e.ariaLabel || e.innerText.trim() || e.title)).map(e => e.outerHTML)"
    )
    assert nameless == []
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    for _ in range(90):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('tbody')"):
            break
    else:
        raise AssertionError("the table is not reached by Tab")
    page.keyboard.press("End")
    assert page.locator(".tr.active").get_attribute("aria-rowindex") == "129"
    assert page.locator(".table").get_attribute("aria-rowcount") == "129"


def test_phone_width_has_no_sideways_scroll(browser: Any, toy_site: Path) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740})
    page = context.new_page()
    item = data(toy_site, "site")["items"]["pages"][0]
    for route, ready in (
        ("#/d0", "#row-0"),
        ("#/d0/7", ".tiles"),
        (f"#/item/{item}", ".active-row"),
        ("#/graph/0", ".node"),
    ):
        page.goto(f"{(toy_site / 'index.html').as_uri()}{route}")
        page.wait_for_selector(ready)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, route
    context.close()


def test_a_missing_file_is_said_and_can_be_tried_again(browser: Any, toy_site: Path) -> None:
    context = browser.new_context()
    page = context.new_page()
    file = toy_site / "data" / "d0" / "latents" / "3.js"
    away = file.with_suffix(".away")
    file.rename(away)
    try:
        page.goto(f"{(toy_site / 'index.html').as_uri()}#/d0/100")
        page.wait_for_selector("text=data/d0/latents/3.js is missing from this site")
    finally:
        away.rename(file)
    page.get_by_role("button", name="Try again").click()
    page.wait_for_selector(".tiles")
    context.close()


EVIL = '<img src=x onerror="window.hacked=1"></script><script>window.hacked=2</script>'


def test_nothing_from_a_store_is_parsed_as_html(reader: Any, tmp_path: Path) -> None:
    """Labels, keys and names of dictionaries are text, and the data set being away is said."""
    rng = np.random.default_rng(0)
    store = actstore.write_arrays(
        tmp_path / "acts.zarr",
        {"embed": {"patch": rng.normal(size=(12, 4, 8)).astype(np.float32)}},
        table={"label_name": [EVIL] * 12, "key": [f"{EVIL}{i}" for i in range(12)]},
    )
    d = Dictionary({"embed": 8}, latents=16, sparsify=dictlearn.TopK(3))
    out = tmp_path / "site"
    built = build(store, {EVIL: (d, tmp_path)}, out, SiteOptions(items=2))
    assert any(note.startswith("no pictures: ") for note in built.notes)
    assert "</script>" not in "".join(f.read_text() for f in (out / "data").rglob("*.js"))
    page = reader.page
    item = data(out, "site")["items"]["pages"][0]
    for route, ready in (
        ("", "#row-0"),
        ("#/d0/1", ".column-main .card"),
        ("#/items", ".card"),
        (f"#/item/{item}", ".active-row"),
        ("#/%3Cimg%20src=x%20onerror=window.hacked=3%3E", "text=No such page"),
    ):
        page.goto(f"{(out / 'index.html').as_uri()}{route}")
        page.wait_for_selector(ready)
        assert page.evaluate("window.hacked") is None
        assert page.locator("#main img[src=x]").count() == 0
    page.goto(f"{(out / 'index.html').as_uri()}#/d0/1")
    page.wait_for_selector(".card-label")
    assert EVIL.split("<script>")[0] in text(page, ".card-label")
    page.wait_for_selector("text=The data set is away, so only positions are shown")


@pytest.fixture(scope="module")
def wide(toy_site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the toy site with columns of 50,000 latents in place of its own."""
    out = tmp_path_factory.mktemp("wide") / "site"
    shutil.copytree(toy_site, out)
    f, rng = 50_000, np.random.default_rng(0)
    shelf = Shelf(out)
    site = data(out, "site")
    site["dictionaries"][0]["latents"] = f
    shelf.put("site", site)
    for name in ("density", "mean"):
        shelf.put(f"d0/{name}", column(np.exp(rng.normal(-6, 2, f)).clip(1e-7, 0.9), log=True))
    for name, values in (
        ("entropy", rng.beta(8, 2, f)),
        ("purity", rng.integers(1, 17, f) / 16),
        ("cosine", rng.beta(2, 5, f)),
        ("effect", rng.exponential(0.1, f)),
    ):
        shelf.put(f"d0/{name}", column(values, steps=255))
    for name, high in (("kind", 3), ("label", 10), ("near", f), ("class", 10), ("best", 200)):
        shelf.put(f"d0/{name}", numbers(rng.integers(0, high, f)))
    return out


def test_fifty_thousand_latents(reader: Any, wide: Path) -> None:
    """The first page takes under 1 MB with every column loaded, and draws a screenful of rows."""
    page = reader.page
    loaded: list[str] = []
    page.on("request", lambda r: loaded.append(r.url))
    page.goto((wide / "index.html").as_uri())
    page.wait_for_selector("#row-0")
    page.wait_for_function("() => View.table(0).has('best') && View.table(0).has('effect')")
    page.wait_for_timeout(100)
    own = [u.split("/site/")[-1].split("#")[0] for u in loaded if u.startswith("file:")]
    size = sum((wide / name).stat().st_size for name in set(own))
    assert any(name == "data/d0/near.js" for name in own)
    assert size < 1_000_000, size
    assert page.locator(".tbody .tr").count() < 60
    page.locator(".tbody").focus()
    page.keyboard.press("End")
    page.wait_for_selector("#row-49999")
    assert page.locator(".tbody .tr").count() < 60
    page.keyboard.press("/")
    page.keyboard.type("49999")
    wait_text(page, ".count", "^1 of 50,000")
