"""``run.json``: runs of earlier versions go on, differences are named, bad files are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from actstore.store import Store
from dictlearn.config import TopK
from dictlearn.dictionary import Dictionary
from dictlearn.runfile import described_in
from dictlearn.schedule import TrainConfig
from dictlearn.trainer import TrainEvent, train

SITE = {"blocks.0.resid_post": 16}
CONFIG = TrainConfig(steps=6, batch_size=64, checkpoint_every=3, log_every=3)


def run(store: Store, out: Path, *, rates: tuple[float | None, ...] = (None, 1e-3)) -> list[str]:
    events: list[TrainEvent] = []
    ds = [Dictionary(SITE, latents=32, sparsify=TopK(2), seed=i) for i in range(len(rates))]
    configs = [TrainConfig(**{**CONFIG.to_json(), "lr": rate}) for rate in rates]
    names = [f"{'zyx'[i]}" for i in range(len(rates))]  # not in alphabetical order
    train(store, ds, configs, out=out, names=names, on_event=events.append)
    return [e.kind for e in events]


def edit(out: Path, change: Any) -> None:
    there = json.loads((out / "run.json").read_text())
    change(there)
    (out / "run.json").write_text(json.dumps(there))


def test_a_field_an_earlier_version_did_not_have_is_its_default(
    store: Store, tmp_path: Path
) -> None:
    run(store, tmp_path)

    def forget(there: dict[str, Any]) -> None:
        for one in there["train"]:
            del one["picker"], one["compile"]
        for one in there["dictionaries"].values():
            del one["latent_norm"], one["input"]["eps"], one["sparsify"]["group_max"]

    edit(tmp_path, forget)
    assert run(store, tmp_path)[0] == "resume"
    edit(tmp_path, lambda there: there["train"][0].update(picker="candidates"))
    with pytest.raises(ValueError, match=r"differ .*\n  train.picker: candidates -> exact \(z\)\n"):
        run(store, tmp_path)


def test_what_differs_is_named_once(store: Store, tmp_path: Path) -> None:
    run(store, tmp_path)
    with pytest.raises(ValueError, match=r"lr: 0.001 -> 0.002 \(y\)") as caught:
        run(store, tmp_path, rates=(None, 2e-3))
    assert str(caught.value).count("->") == 2  # "(there -> asked)" and the rate
    edit(tmp_path, lambda there: [c.update(clip=0.5) for c in there["train"]])
    with pytest.raises(ValueError, match=r"train.clip: 0.5 -> 1.0 \(all 2 dictionaries\)"):
        run(store, tmp_path)
    edit(tmp_path, lambda there: there["train"][0].update(gone=3))
    with pytest.raises(ValueError, match=r"train.gone: 3 -> nothing \(z\)"):
        run(store, tmp_path)


def test_every_dictionary_keeps_its_own_configuration(store: Store, tmp_path: Path) -> None:
    run(store, tmp_path)
    described, configs = described_in(tmp_path / "run.json")
    assert list(described) == ["z", "y"]
    assert [c.lr for c in configs] == [None, 1e-3]
    edit(tmp_path, lambda there: there.pop("names"))
    with pytest.raises(ValueError, match=r"earlier version, which did not keep the order"):
        described_in(tmp_path / "run.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{nope", "Expecting property name"),
        ("[1]", "list indices"),
        ('{"a": 1}', "no entry 'train'"),
        ('{"train": [{"stpes": 3}], "dictionaries": {}}', "no field 'stpes'; nearest: steps"),
        ('{"train": [{}], "dictionaries": {}}', "0 dictionaries, 1 configurations"),
    ],
)
def test_files_that_describe_no_run(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.json"
    file.write_text(text)
    with pytest.raises(
        ValueError, match=rf"does not describe a run \(.*{message}.*dictlearn train"
    ):
        described_in(file)


def test_a_file_in_place_of_the_folder(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file; a run needs a folder"):
        run(store, tmp_path / "file")
