"""Whether the store, the dictionaries, the model and the data set of a site belong together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dictlearn.dictionary import Dictionary
from dictlearn.scaling import check_sites

if TYPE_CHECKING:
    from actstore.store import Store

_SAME = ("id", "weights", "transform")


def check_dictionary(
    dictionary: Dictionary, path: Path, store: Store, *, other_store: bool = False
) -> None:
    """Refuse a dictionary of another model, of absent sites, or (unless allowed) another store.

    Raises
    ------
    KeyError
        A site is not in the store; the nearest is named.
    ValueError
        The message says what differs, and what to do.
    """
    about = described(path)
    model, here = about.get("model") or {}, store.manifest.model or {}
    if model and here:
        lines = [
            f"  {name}: {_brief(model.get(name))} -> {_brief(here.get(name))}"
            for name in _SAME
            if model.get(name) != here.get(name)
        ]
        if lines:
            raise ValueError(
                f"{path} was trained on another model than {store.url} was harvested from "
                "(dictionary -> store):\n" + "\n".join(lines) + "\nits latents mean nothing "
                "there; harvest its model, or train a dictionary: "
                f"dictlearn train {store.url} --out FOLDER"
            )
    check_sites(dictionary, store)
    trained = about.get("store")
    if trained and trained != store.fingerprint and not other_store:
        raise ValueError(
            f"{path} was trained on another store than {store.url}: fingerprint {trained[:12]} "
            f"-> {store.fingerprint[:12]}, of the same model. If that is what you want to look "
            "at, say --other-store"
        )


def described(path: Path) -> dict[str, Any]:
    """Return what a native dictionary says of its training; nothing for other formats."""
    file = path / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text())
    except ValueError:
        return {}
    native = isinstance(config, dict) and config.get("format") == "dictlearn"
    return dict(config.get("about") or {}) if native else {}


def trained_on(path: Path, store: Store, dictionary: Dictionary) -> str | None:
    """Return the token kinds a dictionary was trained on, None where that is not known."""
    site = next(iter(dictionary.config.reads))
    kinds = [kind for kind in described(path).get("tokens") or () if kind in store.kinds(site)]
    return ",".join(kinds) or None


def open_data(store: Store, data: Any) -> tuple[Any | None, str]:
    """Return the data set of a store, or None and why it cannot be shown.

    Raises
    ------
    ValueError, FileNotFoundError
        `data` was given, and is not there or not the data set of the store.
    """
    from actstore.sources import open_source, reopen_source
    from actstore.sources.base import ForModel

    described = store.manifest.data
    if data is None:
        try:
            return reopen_source(described), ""
        except (ValueError, OSError) as error:
            return None, str(error)
    source = open_source(data)
    if isinstance(source, ForModel) and store.manifest.model is not None:
        from vitmodels.spec import ModelSpec

        source = source.for_model(ModelSpec.from_json(store.manifest.model))
    check_data(source, store)
    return source, ""


def check_data(source: Any, store: Store) -> None:
    """Refuse a data set that is not the one harvested; it may have moved.

    Raises
    ------
    ValueError
        The message says what differs.
    """
    from actstore.sources import check_source

    try:
        check_source(source, store.manifest.data)
    except ValueError as error:
        raise ValueError(
            f"{error}. The pictures would not be those of {store.url}: give the folder or file it "
            f"was harvested from ({store.manifest.data.get('url', 'see actstore info')}), where it "
            "lies now"
        ) from error


def _brief(value: Any) -> str:
    text = json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
