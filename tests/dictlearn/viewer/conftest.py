"""A toy site built once, and a browser to open it with."""

import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actstore
import dictlearn
from actstore.store import Store
from dictlearn.circuits.graph import Graph, Node
from dictlearn.dictionary import Dictionary
from dictlearn.formats import load, save
from dictlearn.runfile import digest

SITE = "blocks.1.resid_post"
CHROMIUM = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Store, dictionary and graph of digits."""

    store: Store
    dictionary: Dictionary
    path: Path
    graph: Path


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    folder = tmp_path_factory.mktemp("toy")
    store = actstore.harvest(
        model="toy/digits-2l",
        data="digits",
        sites="blocks.*.resid_post",
        limit=200,
        out=folder / "acts.zarr",
        device="cpu",
    )
    untrained = Dictionary({SITE: 64}, latents=128, sparsify=dictlearn.TopK(6))
    config = dictlearn.TrainConfig(steps=60, batch_size=256, tokens="cls,patch", lr=3e-3)
    (trained,) = dictlearn.train(store, [untrained], config, out=folder / "run")
    assert trained.path is not None
    dictionary = load(trained.path)
    return Toy(
        store=store,
        dictionary=dictionary,
        path=trained.path,
        graph=make_graph(store, dictionary).save(folder / "three.json"),
    )


def make_graph(store: Store, dictionary: Dictionary) -> Graph:
    patch = {"token": 3, "token_kind": "patch", "place": (0, 2)}
    nodes = (
        Node(id="embed/3", kind="embed", layer=-1, influence=0.2, value=1, **patch),
        Node(id="latent/1/3/7", kind="latent", layer=1, latent=7, value=2, influence=0.6, **patch),
        Node(id="error/1/3", kind="error", layer=1, value=1, influence=0.1, **patch),
        Node(id="logit/3", kind="logit", layer=2, name="3", value=4, influence=1, probability=0.9),
    )
    weights = np.zeros((4, 4), np.float32)
    weights[1, 0], weights[3, 1], weights[3, 2] = 1.5, 2.5, -0.5
    described = {"digest": digest(dictionary), "reads": [SITE], "writes": [SITE], "latents": 128}
    return Graph(
        nodes=nodes,
        weights=weights,
        model=dict(store.manifest.model or {}),
        dictionaries=({"name": "none", "digest": "0"}, {"name": SITE, **described}),
        item={"key": "digit-1503", "label_name": "3"},
        scores={"replacement": 0.7, "completeness": 0.9},
    )


@pytest.fixture(scope="session")
def toy_site(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import vitmodels
    from dictlearn.viz.site.build import SiteOptions, build

    out = tmp_path_factory.mktemp("built") / "site"
    second = tmp_path_factory.mktemp("second") / "untrained"
    save(Dictionary({"blocks.0.resid_post": 64}, latents=32, sparsify=dictlearn.TopK(4)), second)
    build(
        toy.store,
        {"trained": (toy.dictionary, toy.path), "untrained": (load(second), second)},
        out,
        SiteOptions(items=6),
        model=vitmodels.load("toy/digits-2l"),
        graphs=[toy.graph],
    )
    return out


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return Chromium; skip where there is none, unless ACTSTORE_NEED_BROWSER says it must be."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        reason = "no Chromium: apt-get install chromium && pip install playwright"
        if os.environ.get("ACTSTORE_NEED_BROWSER") == "1":
            pytest.fail(f"ACTSTORE_NEED_BROWSER=1, and there is {reason}")
        pytest.skip(reason)
    with sync_playwright() as running:
        opened = running.chromium.launch(executable_path=chromium, args=CHROMIUM)
        yield opened
        opened.close()


@dataclass(kw_only=True)
class Reader:
    """A tab, and everything that went wrong in it."""

    page: Any
    problems: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    def open(self, address: str) -> None:
        self.page.goto("about:blank")
        self.page.goto(address)


@pytest.fixture
def reader(browser: Any) -> Iterator[Reader]:
    """Return a tab that must stay free of console errors and of requests to the network."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light")
    context.set_default_timeout(5000)
    tab = Reader(page=context.new_page())
    tab.page.on(
        "console",
        lambda m: tab.problems.append(m.text) if m.type in ("error", "warning") else None,
    )
    tab.page.on("pageerror", lambda e: tab.problems.append(str(e)))
    inside = ("file:", "data:", "http://127.0.0.1:", "about:")
    tab.page.on(
        "request", lambda r: None if r.url.startswith(inside) else tab.outside.append(r.url)
    )
    yield tab
    context.close()
    assert tab.problems == []
    assert tab.outside == []


@pytest.fixture(scope="session")
def served(toy_site: Path) -> Iterator[str]:
    from dictlearn.viz.site.serve import server

    with server(toy_site) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}/index.html"
        running.shutdown()
        thread.join()


@pytest.fixture(params=["file", "http"])
def address(request: pytest.FixtureRequest, toy_site: Path) -> str:
    """Return the address of the toy site, from disk and from a server."""
    if request.param == "file":
        return (toy_site / "index.html").as_uri()
    url: str = request.getfixturevalue("served")
    return url
