"""Let the other libraries read what `dictlearn.formats.save` writes, and compare the functions.

Not a test of the suite: it needs the libraries themselves, which pin old versions of much else.
Install them in an environment of their own that also sees this repository::

    pip install sae-lens eai-sparsify overcomplete saev dictionary-learning opencv-python-headless
    python tests/dictlearn/formats/peer_roundtrip.py

Each dictionary of `formats_exports.exports` is written, loaded by the library's own loader and run
on the same input; printed are the largest absolute differences of activations and output. The exit
code is 1 if one is above 1e-5, an active latent differs or a loader fails; a library that is not
installed, or whose published release cannot read the format, is reported as not run.
"""

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from formats_exports import exports, inputs
from torch import Tensor

from dictlearn.formats import save

Answer = tuple[Tensor, Tensor]


def sae_lens(folder: Path, x: Tensor) -> Answer:
    """`SAE.load_from_disk`."""
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    acts = sae.encode(x)
    if hasattr(sae, "W_skip"):
        return acts, sae(x)
    return acts, sae.decode(acts) if "transcoder" in sae.cfg.architecture() else sae(x)


def sparsify(folder: Path, x: Tensor) -> Answer:
    """`SparseCoder.load_from_disk`; its top-k is made dense here."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernel wants a GPU
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(folder)
    values, index, _ = coder.encode(x)
    acts = torch.zeros(x.shape[0], coder.num_latents).scatter(1, index, values)
    return acts, coder(x).sae_out


def dictionary_learning(folder: Path, x: Tensor) -> Answer:
    """`utils.load_dictionary`."""
    from dictionary_learning.utils import load_dictionary

    loaded, _ = load_dictionary(str(folder), "cpu")
    return loaded.encode(x), loaded(x)


def overcomplete(folder: Path, x: Tensor) -> Answer:
    """The class that sae.json names, then `load_state_dict`."""
    import matplotlib.cm

    if not hasattr(matplotlib.cm, "get_cmap"):  # it was removed; the library imports it
        matplotlib.cm.get_cmap = matplotlib.colormaps.get_cmap
    import overcomplete.sae as library

    noted = json.loads((folder / "sae.json").read_text())
    running = noted.pop("running_threshold", None)
    sae = getattr(library, noted.pop("class"))(**noted)
    sae.load_state_dict(torch.load(folder / "sae.pt", weights_only=True))
    if running is not None:
        sae.running_threshold = torch.tensor(running)
    sae.eval()
    _, acts, y = sae(x)
    return acts, y


READERS: dict[str, Callable[[Path, Tensor], Answer]] = {
    "sae_lens": sae_lens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "overcomplete": overcomplete,
}
NOT_RUN = {
    "prisma": "vit-prisma 0.1.4, its only release in the package index, has no dictionaries",
    "saev": "saev 0.1.0, its only release in the package index, reads no header of schema 5",
}


def main() -> int:
    """Print a line a case; return the exit code."""
    warnings.simplefilter("ignore")
    failed, missing, x = 0, set(), inputs()
    for format, name, made in exports():
        if format in missing or format in NOT_RUN:
            missing.add(format)
            continue
        with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
            folder = save(made, Path(scratch) / "out", format)
            try:
                acts, y = READERS[format](folder, x)
            except ModuleNotFoundError as error:
                NOT_RUN[format] = f"not installed: {error}"
                missing.add(format)
                continue
            except Exception as error:  # whatever the other library raises is the result
                verdict = f"FAILED {type(error).__name__}: {error}"
                failed += 1
            else:
                same = torch.equal(acts != 0, made.encode(x) != 0)
                off = (float((acts - made.encode(x)).abs().max()), float((y - made(x)).abs().max()))
                good = same and max(off) <= 1e-5
                failed += not good
                verdict = f"{'ok' if good else 'DIFFERS'}  acts {off[0]:.1e}  output {off[1]:.1e}"
        sys.stdout.write(f"{format:20} {name:32} {verdict}\n")
    for format in sorted(missing):
        sys.stdout.write(f"{format:20} not run: {NOT_RUN[format]}\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
