"""The command line: train, resume, rerun from a file, eval, sparsity, and its errors."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from actstore.store import Store
from dictlearn.cli import main
from dictlearn.formats import load
from dictlearn.report import Report

SHORT = ["--steps", "30", "--batch-size", "64", "--checkpoint-every", "10", "--device", "cpu"]


def test_train_eval_sparsity(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    command = ["train", store.url, "--out", out, "--k", "4", "--expansion", "2", *SHORT]
    assert main([*command, "--holdout", "0.25"]) == 0
    text = capsys.readouterr().out
    assert "blocks.0.resid_post" in text
    assert "next: dictlearn eval" in text
    assert main([*command, "--holdout", "0.25"]) == 0
    assert "resumed at step 30" in capsys.readouterr().out
    assert load(tmp_path / "run" / "blocks.1.resid_post").latents == 48

    reports = tmp_path / "reports.json"
    arguments = ["eval", out, "--store", store.url, "--out", str(reports), "--device", "cpu"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "| blocks.0.resid_post |" in text
    found = [Report.from_json(r) for r in json.loads(reports.read_text())]
    assert [r.tokens for r in found] == [15 * 9] * 2
    assert main([*arguments, "--no-held-out", "--tokens", "patch"]) == 0
    assert Report.from_json(json.loads(reports.read_text())[0]).tokens == 480

    one = str(tmp_path / "run" / "blocks.0.resid_post")
    tables = tmp_path / "tables"
    assert main(["sparsity", one, "--store", store.url, "--out", str(tables)]) == 0
    assert {p.name for p in tables.iterdir()} == {
        "latents.parquet",
        "positions.parquet",
        "top.parquet",
    }


def test_rerun_from_a_run_file(store: Store, tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    options = ["--kind", "ReLU", "--l1", "0.01", "--together", "--expansion", "2", *SHORT]
    assert main(["train", store.url, "--out", str(first), *options, "--seed", "3"]) == 0
    again = ["train", store.url, "--out", str(second), "--config", str(first / "run.json")]
    assert main([*again, "--device", "cpu"]) == 0
    names = [p.name for p in first.iterdir() if (p / "config.json").is_file()]
    assert names == ["blocks.0.resid_post+blocks.1.resid_post"]
    file = Path(names[0]) / "dictionary.safetensors"
    assert (first / file).read_bytes() == (second / file).read_bytes()


def test_transcoder_and_prefixes(store: Store, tmp_path: Path) -> None:
    options = ["--sites", "blocks.0.*", "--writes", "blocks.1.*", "--skip", "--prefixes", "4", "9"]
    assert main(["train", store.url, "--out", str(tmp_path), *options, "--k", "3", *SHORT]) == 0
    d = load(tmp_path / "blocks.0.resid_post-to-blocks.1.resid_post")
    assert d.config.skip
    assert d.config.writes == {"blocks.1.resid_post": 24}
    assert d.config.matryoshka is not None
    assert d.config.matryoshka.prefixes == (4, 9)


def test_commands_that_read_a_store_open_it_with_a_cache(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is taken for a remote one: its shards end in the cache."""
    from actstore.storage import LocalStorage

    class Far:
        """A storage that is no folder."""

        def __init__(self, url: str) -> None:
            self._near = LocalStorage(url)
            self.url = f"far://{url}"

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return getattr(self._near, name)

    asked: list[Any] = []

    def far(url: str, options: Any = None) -> Any:
        asked.append(options)
        return Far(url)

    monkeypatch.setattr("actstore.store.open_storage", far)
    cache, out = tmp_path / "cache", str(tmp_path / "run")
    place = ["--cache-dir", str(cache), "--cache-bytes", "1000000"]
    place += ["--endpoint-url", "http://here", "--device", "cpu"]
    short = ["--steps", "4", "--batch-size", "64", "--sites", "blocks.0.*", "--k", "2", *place]
    assert main(["train", store.url, "--out", out, *short]) == 0
    assert main(["sweep", store.url, "--out", out + "-sweep", *short]) == 0
    assert main(["eval", out, "--store", store.url, *place]) == 0
    assert asked == [{"endpoint_url": "http://here"}] * 3
    deadline = time.monotonic() + 20
    while not list(cache.rglob("blocks.0.resid_post.patch.*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "{store}", "--out", "{out}", "--sites", "blocks.9.resid_post"], "blocks.1"),
        (["train", "{store}", "--out", "{out}", "--kind", "ReLU", "--k", "3"], "takes --l1"),
        (["train", "{out}/nothing", "--out", "{out}"], "no store at"),
        (["train", "{store}", "--out", "{out}", "--config", "{out}/x.json"], "no such file"),
        (["eval", "{out}/nothing", "--store", "{store}"], "no dictionary at"),
        (["train", "{store}", "--out", "{out}", "--steps", "0"], "TrainConfig.steps"),
        (["train", "{store}", "--out", "{out}", "--sites", "x"], "the first are blocks.0.resid_po"),
        (["train", "{store}", "--out", "{out}", "--kind", "TopKK"], "Expected one of ('TopK',"),
        (["train", "{store}", "--out", "{out}", "--config", "{file}"], "does not describe a run"),
        (["train", "{store}", "--out", "{file}"], "is a file; a run needs a folder"),
        (["train", "{store}", "--out", "{out}", "--device", "gpu"], "there are auto, cpu, cuda"),
        (["train", "{store}", "--out", "{out}", "--device", "cuda:99"], "is not on this machine"),
        (["train", "{store}", "--out", "{out}", "--cache-bytes", "9"], "cache_dir does not say"),
        (["eval", "{out}/nothing", "--store", "{store}"], "`dictlearn train STORE --out"),
        (["eval", "{file}", "--store", "{store}"], "is of no format known"),
        (["structure"], "give the folder of a dictionary"),
        (["convert", "{file}", "{out}"], "is of no format known"),
        (["sparsity", "{out}", "--store", "{store}", "--out", "{out}"], "is of no format known"),
    ],
)
def test_errors_are_one_message(
    store: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "file").write_text("[1]")
    words = [a.format(store=store.url, out=tmp_path, file=tmp_path / "file") for a in arguments]
    try:
        code = main(words)
    except SystemExit as stop:  # tyro checks the values of its fields itself
        code = int(stop.code or 0)
    assert code != 0
    captured = capsys.readouterr()
    assert message in captured.err + captured.out
