"""Dictionaries from and to the Hugging Face hub. The client is imported on first use."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dictlearn.formats.card import model_card
from dictlearn.formats.pretrained import Pretrained, find_pretrained
from dictlearn.formats.registry import NATIVE, load, save

if TYPE_CHECKING:
    import torch

    from dictlearn.dictionary import Dictionary
    from dictlearn.report import Report

logger = logging.getLogger(__name__)

_SUFFIXES = (".json", ".safetensors", ".pt", ".pkl", ".pkl.gz")
_MAX_FILES = 8
_TIMEOUT = 20.0


def load_pretrained(
    name: str,
    *,
    folder: str = "",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    endpoint: str | None = None,
    device: str | torch.device = "cpu",
    format: str | None = None,
    **told: Any,
) -> Dictionary:
    """Fetch a dictionary from the hub (once; then from its cache) and load it.

    Parameters
    ----------
    name
        A name of `list_pretrained`, or ``owner/repository`` of any format.
    folder
        Folder inside the repository, where it holds several dictionaries.
    revision, cache_dir, endpoint
        As huggingface_hub takes them: branch, tag or commit; cache; URL of another hub.
    device, format, told
        As `dictlearn.formats.load` takes them. The sites of a published row are known.

    Raises
    ------
    KeyError
        Neither a known name nor ``owner/repository``.
    FileNotFoundError
        The hub cannot be reached, or has no such repository or files: names the repository, the
        cause, and how to go on from a local copy.
    FormatError
        The files are of no format known, or damaged.
    """
    row = _known(name)
    repo = row.repo if row else name
    try:
        path = _fetch(repo, folder, row, revision, cache_dir, endpoint)
    except FileNotFoundError:
        raise
    except Exception as error:  # network clients raise of any kind
        raise FileNotFoundError(_unreachable(repo, row, error)) from error
    if row:
        told = {"reads": row.reads, "writes": row.writes, **told}
    return load(path, format or (row.format if row else None), device=device, **told)


def _known(name: str) -> Pretrained | None:
    try:
        return find_pretrained(name)
    except KeyError:
        if name.count("/") == 1:
            return None
        raise


def _fetch(
    repo: str,
    folder: str,
    row: Pretrained | None,
    revision: str | None,
    cache_dir: str | Path | None,
    endpoint: str | None,
) -> Path:
    """Download the files that make up one dictionary; return their folder."""
    import huggingface_hub as hub

    place: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    if row:  # published rows do not change: what was fetched once needs no network
        names = (row.file, "config.json")
        cached = [
            hub.try_to_load_from_cache(repo, n, cache_dir=cache_dir, revision=revision)
            for n in names
        ]
        if all(isinstance(file, str) for file in cached):
            return Path(str(cached[0])).parent
    try:
        info = hub.HfApi(endpoint=endpoint).model_info(repo, revision=revision, timeout=_TIMEOUT)
    except Exception as error:  # offline: what the cache holds may be enough
        logger.info("%s cannot be listed (%s), looking into the cache", repo, error)
        try:
            snapshot = hub.snapshot_download(repo, local_files_only=True, **place)
        except Exception:
            raise error from None
        return Path(snapshot) / folder
    listed = sorted(file.rfilename for file in info.siblings or [])
    files = choose_files(listed, folder, row)
    if not any(not f.endswith(".json") for f in files):
        raise FileNotFoundError(
            f"{repo} on the hub holds no weights{f' in {folder!r}' if folder else ''}: it has "
            f"{', '.join(listed[:20])}. Say folder= where it holds several dictionaries"
        )
    if len(files) > _MAX_FILES:
        raise FileNotFoundError(
            f"{repo} holds {len(files)} such files in {folder or 'its root'!r}: say folder="
        )
    paths = [
        Path(hub.hf_hub_download(repo, name, endpoint=endpoint, **place)) for name in sorted(files)
    ]
    return paths[0].parent


def choose_files(listed: list[str], folder: str, row: Pretrained | None) -> list[str]:
    """Pick the weights and configuration out of a repository's list of files.

    Of a published row the file it names is taken, or, should the repository have changed, the other
    name such weights go by. Logs of feature sparsity beside them are left alone.
    """
    prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
    here = [
        f
        for f in listed
        if f.startswith(prefix)
        and "/" not in f.removeprefix(prefix)
        and f.endswith(_SUFFIXES)
        and "log_feature_sparsity" not in f
    ]
    if row is None:
        return here
    weights = [f for f in here if not f.endswith(".json")]
    wanted = [f for f in weights if f.rpartition("/")[2] == row.file] or weights[:1]
    return wanted + [f for f in here if f.rpartition("/")[2] == "config.json"]


def _unreachable(repo: str, row: Pretrained | None, error: BaseException) -> str:
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = (str(cause).strip().splitlines() or [""])[0]
    files = f"{row.file} and config.json" if row else "its files"
    site = f", reads={row.reads!r}" if row else ""
    if row and row.writes != row.reads:
        site += f", writes={row.writes!r}"
    return (
        f"cannot fetch {repo} from the Hugging Face hub ({type(cause).__name__}: {reason}). Fetch "
        f"{files} where the hub can be reached (huggingface.co/{repo}) and load the folder: "
        f"dictlearn.formats.load('FOLDER'{site}); or set HF_HOME to a cache that holds it"
    )


def push_to_hub(
    dictionary: Dictionary,
    repo: str,
    *,
    report: Report | None = None,
    about: Mapping[str, Any] | None = None,
    format: str = NATIVE,
    private: bool = False,
    revision: str | None = None,
    api: Any = None,
) -> str:
    """Upload a dictionary with a model card that states its report; return the commit's URL.

    Parameters
    ----------
    dictionary, repo
        What, and ``owner/repository``; it is created if it does not exist.
    report
        Evaluation to state; without one the card says that there is none.
    about
        Provenance: ``model``, ``tokens``, ``store``, ...; saved in the native format too.
    format
        Format of the files: ``native``, or one of `formats` that can hold it.
    private, revision
        Of the repository; branch to commit to.
    api
        A ``huggingface_hub.HfApi`` with token and endpoint; the default one otherwise.

    Raises
    ------
    ValueError
        The format cannot hold the dictionary. Nothing is uploaded then.
    FileNotFoundError
        The hub refuses or cannot be reached.
    """
    if api is None:
        import huggingface_hub

        api = huggingface_hub.HfApi()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "dictionary"
        write_folder(dictionary, folder, repo, report=report, about=about, format=format)
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                revision=revision,
                commit_message="Upload a dictionary",
            )
        except Exception as error:  # network clients raise of any kind
            raise FileNotFoundError(
                f"cannot upload to {repo} on the Hugging Face hub ({type(error).__name__}: "
                f"{(str(error).splitlines() or [''])[0]}). Log in: hf auth login"
            ) from error
    return str(getattr(done, "commit_url", done))


def write_folder(
    dictionary: Dictionary,
    folder: Path,
    repo: str,
    *,
    report: Report | None = None,
    about: Mapping[str, Any] | None = None,
    format: str = NATIVE,
) -> Path:
    """Write what `push_to_hub` uploads: the dictionary, ``README.md`` and ``report.json``."""
    save(dictionary, folder, format, about)
    card = model_card(dictionary.config, repo, report=report, about=about or {}, format=format)
    (folder / "README.md").write_text(card)
    if report is not None:
        report.save(folder / "report.json")
    return folder
