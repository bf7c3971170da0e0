"""Published dictionaries: the table, fetching from a hub, uploading with a card.

The hub is a server on the loopback interface that answers as the real one does; the client is
huggingface_hub itself.
"""

import csv
import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dictlearn.config import Matryoshka, TopK
from dictlearn.dictionary import Dictionary
from dictlearn.formats import list_pretrained, load, load_pretrained, push_to_hub
from dictlearn.formats.hub import choose_files
from dictlearn.formats.pretrained import FIGURES, find_pretrained
from dictlearn.report import Report, Substitution

DATA = Path(__file__).parent / "data"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The three requests that listing and downloading make, over folders ``owner/repository``."""

    root: Path

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        if path.startswith("api/models/"):
            repo = path.removeprefix("api/models/").partition("/revision/")[0]
            folder = self.root / repo
            if not folder.is_dir():
                self.missing("RepoNotFound")
                return
            files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
            info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
            self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
            return
        repo, _, tail = path.partition("/resolve/")
        file = self.root / repo / tail.partition("/")[2]
        if not file.is_file():
            self.missing("EntryNotFound")
            return
        body = file.read_bytes()
        tag = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        self.answer(200, body, {**tag, "Content-Type": "application/octet-stream"})

    do_HEAD = do_GET

    def missing(self, code: str) -> None:
        self.answer(404, b"{}", {"X-Error-Code": code, "X-Error-Message": code})


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """URL of a hub and the folder that it serves."""
    root = tmp_path / "hub"
    root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Hub,), {"root": root}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", root
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_table_has_the_82_published_rows() -> None:
    rows = list_pretrained()
    assert len(rows) == len({r.name for r in rows}) == 82
    groups: dict[str, int] = {}
    for row in rows:
        groups[row.layout] = groups.get(row.layout, 0) + 1
        assert row.repo.rpartition("/")[2] == row.name
        assert set(row.published) <= set(FIGURES)
        assert row.published["ce"] > 1
    assert groups == {"A": 24, "C": 23, "B": 12, "B or C": 12, "D": 11}
    assert {r.model for r in rows} == {
        "open_clip/ViT-B-32@datacomp_xl_s13b_b90k",
        "hf/facebook/dino-vitb16",
    }
    assert {r.tokens for r in rows} == {"cls,patch", "cls", "patch"}


def test_the_table_is_the_shared_one(shared: Path) -> None:
    table = shared / "facts" / "prisma_saes.tsv"
    if not table.is_file():
        pytest.skip("the shared folder has no table")
    with table.open() as file:
        theirs = {row["hf_repo"]: row for row in csv.DictReader(file, delimiter="\t")}
    assert theirs.keys() == {r.repo for r in list_pretrained()}
    for row in list_pretrained():
        assert row.published["ce"] == float(theirs[row.repo]["CE"])
        assert f"blocks.{theirs[row.repo]['Layer']}." in row.reads


def test_a_row_says_where_the_dictionary_belongs() -> None:
    row = find_pretrained("CLIP-transcoder-topk-256-x64-all_patches_1-mlp-94")
    assert row.repo == "Prisma-Multimodal/CLIP-transcoder-topk-256-x64-all_patches_1-mlp-94"
    assert (row.reads, row.writes) == ("blocks.1.mlp_in", "blocks.1.mlp_out")
    assert (row.k, row.layout, row.file, row.latents) == (256, "D", "weights.pt", 49152)
    vanilla = find_pretrained(list_pretrained("*layer-9-hook_mlp_out*")[0].repo.upper())
    assert (vanilla.reads, vanilla.writes) == ("blocks.9.mlp_out", "blocks.9.mlp_out")
    assert (vanilla.k, vanilla.l1, vanilla.file) == (None, 1e-5, "n_images_2600058.pt")
    assert vanilla.published == pytest.approx(
        {
            "l0": 856.68,
            "cls_l0": 1076.0,
            "explained_variance": 97.6,
            "cosine": 0.989,
            "recon_cosine": 0.998,
            "ce": 6.762,
            "recon_ce": 6.762,
            "zero_ce": 6.792,
            "ce_recovered": 100.28,
            "alive": 100.0,
        }
    )


def test_patterns_and_unknown_names() -> None:
    assert len(list_pretrained("dino")) == 12
    assert len(list_pretrained("blocks.7.*")) == 7
    assert list_pretrained("no such thing") == []
    with pytest.raises(KeyError, match=r"nearest: DINO-vanilla-x64-all_patches_3"):
        find_pretrained("DINO-vanilla-x64-all_patches_3-resid_post")
    with pytest.raises(KeyError, match=r"no published dictionary is called 'zzz'"):
        load_pretrained("zzz")


@pytest.mark.parametrize("id", sorted({r.model for r in list_pretrained()}))
def test_the_model_of_a_row_exists_and_has_its_sites(id: str) -> None:
    """It loads (on the meta device: no weights) and is as wide as the dictionaries."""
    pytest.importorskip({"open_clip": "open_clip", "hf": "transformers"}[id.partition("/")[0]])
    import vitmodels

    sites = vitmodels.load(id, pretrained=False, device="meta").sites()
    rows = [row for row in list_pretrained() if row.model == id]
    for row in rows:
        assert sites[row.reads].width == sites[row.writes].width == row.latents // 64


def test_listing_needs_no_torch() -> None:
    code = (
        "import sys, dictlearn.formats as f; f.list_pretrained(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


LAYOUTS = [
    (
        "sparse-autoencoder-clip-b-32-sae-vanilla-x64-layer-3-hook_resid_post-l1-1e-05",
        "A_relu_layer_norm",
    ),
    ("sae-top_k-64-cls_only-layer_3-hook_resid_post", "B_topk_layer_norm"),
    ("imagenet-sweep-vanilla-x64-CLS_3-hook_resid_post-686.334411621094-95", "C_gated_layer_norm"),
    ("DINO-vanilla-x64-all_patches_3-resid_post-989-95", "C_gated_layer_norm"),
    ("CLIP-transcoder-topk-1024-x64-all_patches_3-mlp-90", "D_skip_topk_layer_norm"),
]


@pytest.mark.parametrize(("name", "case"), LAYOUTS)
def test_a_published_name_is_fetched_and_loaded(
    hub: tuple[str, Path], tmp_path: Path, name: str, case: str
) -> None:
    url, root = hub
    row = find_pretrained(name)
    expected = np.load(DATA / "vit_prisma" / case / "io.npz")
    shutil.copytree(DATA / "vit_prisma" / case, root / row.repo)
    place: dict[str, Any] = {"endpoint": url, "cache_dir": tmp_path / "cache"}
    dictionary = load_pretrained(name, **place)
    assert list(dictionary.config.reads) == [row.reads]
    assert list(dictionary.config.writes) == [row.writes]
    with torch.no_grad():
        y = dictionary(torch.from_numpy(expected["x"]))
    np.testing.assert_allclose(y, expected["y"], rtol=0, atol=1e-5)
    fetched = {p.name for p in (tmp_path / "cache").rglob("*") if p.is_symlink() or p.suffix}
    assert not any("sparsity" in f for f in fetched)
    shutil.rmtree(root / row.repo)  # the hub is gone: the cache is enough
    again = load_pretrained(name, endpoint="http://127.0.0.1:9", cache_dir=tmp_path / "cache")
    assert torch.equal(again.W_dec, dictionary.W_dec)


def test_any_repository_of_a_known_format_is_loaded(hub: tuple[str, Path], tmp_path: Path) -> None:
    url, root = hub
    shutil.copytree(DATA / "sae_lens" / "topk_rescale", root / "me" / "saes" / "layer_3")
    place: dict[str, Any] = {"endpoint": url, "cache_dir": tmp_path / "cache"}
    got = load_pretrained("me/saes", folder="layer_3", **place)
    assert torch.equal(got.W_dec, load(DATA / "sae_lens" / "topk_rescale").W_dec)
    with pytest.raises(FileNotFoundError, match=r"holds no weights: it has layer_3/.*folder="):
        load_pretrained("me/saes", **place)
    place["endpoint"] = "http://127.0.0.1:9"  # out of reach: the cache is looked into
    assert torch.equal(load_pretrained("me/saes", folder="layer_3", **place).W_dec, got.W_dec)


def test_an_unreachable_hub_says_what_to_do(tmp_path: Path) -> None:
    place: dict[str, Any] = {"endpoint": "http://127.0.0.1:9", "cache_dir": tmp_path}
    with pytest.raises(FileNotFoundError) as caught:
        load_pretrained("DINO-vanilla-x64-all_patches_3-resid_post-989-95", **place)
    text = str(caught.value)
    assert "Prisma-Multimodal/DINO-vanilla-x64-all_patches_3-resid_post-989-95" in text
    assert "refused" in text
    assert "weights.pt and config.json" in text
    assert "dictlearn.formats.load('FOLDER', reads='blocks.3.resid_post')" in text


def test_a_missing_repository_is_named(hub: tuple[str, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot fetch me/nothing .*RepositoryNotFound"):
        load_pretrained("me/nothing", endpoint=hub[0], cache_dir=tmp_path)


def test_the_weights_are_chosen_by_name() -> None:
    row = find_pretrained(LAYOUTS[0][0])
    listed = ["README.md", "config.json", "n_images_2600058.pt", "media/weights.pt"]
    listed += ["n_images_2600058_log_feature_sparsity.pt", "n_images_100.pt"]
    assert choose_files(listed, "", row) == ["n_images_2600058.pt", "config.json"]
    assert choose_files(["weights.pt", "config.json"], "", row) == ["weights.pt", "config.json"]
    assert choose_files(listed, "media", None) == ["media/weights.pt"]


def report() -> Report:
    return Report(
        store="sha256:abc",
        reads=("blocks.1.resid_post",),
        writes=("blocks.1.resid_post",),
        latents=32,
        tokens=1234,
        items="held out",
        l0=3.25,
        l0_by_kind={"cls": 2.0, "patch": 3.5},
        l0_by_position={0: 2.0},
        fvu=0.1875,
        fvu_by_kind={"patch": 0.2},
        fvu_by_site={},
        cosine=0.9,
        mse=0.1,
        dead=0.25,
        dense=0.0,
        density=(0,) * 12,
        substitution=Substitution(
            images=50,
            target="labels",
            kinds=("patch",),
            ce={"clean": 0.1, "spliced": 0.2, "zero": 2.3, "mean": 2.2},
            top1={"clean": 0.98, "spliced": 0.95, "zero": 0.1, "mean": 0.1},
            kl={"clean": 0.0, "spliced": 0.1, "zero": 2.0, "mean": 2.0},
        ),
    )


class Api:
    """What `push_to_hub` asks of huggingface_hub's HfApi; keeps what is uploaded."""

    def __init__(self, target: Path, error: Exception | None = None) -> None:
        self.target, self.error = target, error
        self.created: list[tuple[str, bool]] = []

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        if self.error:
            raise self.error
        self.created.append((repo, private))

    def upload_folder(self, *, repo_id: str, folder_path: Path, **_: object) -> str:
        shutil.copytree(folder_path, self.target / repo_id)
        return f"https://hub/{repo_id}/commit/1"


def test_an_upload_states_its_report(hub: tuple[str, Path], tmp_path: Path) -> None:
    url, root = hub
    made = Dictionary(
        {"blocks.1.resid_post": 8},
        latents=32,
        sparsify=TopK(3),
        matryoshka=Matryoshka(prefixes=(8,)),
    )
    api = Api(root)
    about = {"model": "toy/digits-2l", "tokens": "patch", "store": "sha256:abc"}
    where = push_to_hub(made, "me/digits", report=report(), about=about, private=True, api=api)
    assert where == "https://hub/me/digits/commit/1"
    assert api.created == [("me/digits", True)]
    card = (root / "me" / "digits" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: actstore\ntags:\n- sparse-autoencoder\n")
    for words in ("toy/digits-2l", "`blocks.1.resid_post` (8)", "TopK(k=3", "prefixes=(8,)"):
        assert words in card
    for words in ("0.1875", "3.2", "25.0%", "1234 tokens", "50 images", "sha256:abc", "95.0%"):
        assert words in card
    saved = json.loads((root / "me" / "digits" / "report.json").read_text())
    assert Report.from_json(saved) == report()
    again = load_pretrained("me/digits", endpoint=url, cache_dir=tmp_path / "cache")
    assert again.config == made.config
    assert torch.equal(again.W_enc, made.W_enc)


def test_an_upload_without_a_report_says_so_and_a_refusal_is_named(tmp_path: Path) -> None:
    made = Dictionary({"a": 8}, {"b": 6}, latents=32, sparsify=TopK(3), skip=True)
    push_to_hub(made, "me/a", api=Api(tmp_path))
    card = (tmp_path / "me" / "a" / "README.md").read_text()
    assert "A skip transcoder over activations of a vision model." in card
    assert "None was given" in card
    with pytest.raises(FileNotFoundError, match=r"cannot upload to me/b .*no token.*hf auth login"):
        push_to_hub(made, "me/b", api=Api(tmp_path, OSError("no token")))
    with pytest.raises(ValueError, match=r"cannot hold"):
        push_to_hub(made, "me/c", format="overcomplete", api=Api(tmp_path))
    assert not (tmp_path / "me" / "c").exists()
