"""Small models with every tensor that Prisma or TransformerLens holds for them.

A case is a folder: ``case.json``, ``model.safetensors``, ``input.npz``, ``output.npz``,
``cache.npz`` (hook name -> tensor), ``edits.npz`` (hook name -> output when that tensor is
replaced by ``0.5 t + 0.25 roll(t)``). ``python tests/vitmodels/hook_cases.py FOLDER`` prints
docs/hook-names.md.
"""

import functools
import importlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import vitmodels
from vitmodels.model import VisionModel
from vitmodels.names import concrete, translate

DATA = Path(__file__).parent / "data"
OUTPUT_AT_TOKEN_0 = {
    "hf_vit_dino": "final",
    "tl_hf_vit_dino": "final",
    "tl_hf_clip_vision": "blocks.-1.resid_post",
}
"""Cases whose edited output is token 0 of something that is not what the model returns."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One of the folders, its model loaded."""

    name: str
    folder: Path
    told: dict[str, Any]
    model: VisionModel
    x: Tensor

    @property
    def dialect(self) -> str:
        return "prisma" if self.told["hooks_from"]["library"] == "vit-prisma" else "tl"

    @functools.cache  # noqa: B019 - a dozen cases, alive as long as the tests
    def arrays(self, file: str) -> dict[str, Tensor]:
        path = self.folder / f"{file}.npz"
        if not path.exists():
            return {}
        with np.load(path) as found:
            return {name: torch.from_numpy(found[name]) for name in found.files}

    def cache(self) -> dict[str, Tensor]:
        """Return hook name -> tensor, also of the hooks that a switch of Prisma turns on."""
        return {
            hook: self.arrays(file)[key] for hook, (file, key) in hook_names(self.folder).items()
        }

    def is_after_output(self, site: str) -> bool:
        """Whether a site comes after what :meth:`output` returns, so that edits do not reach it."""
        output = OUTPUT_AT_TOKEN_0.get(self.name)
        order = list(self.model.sites())
        return output is not None and order.index(site) > order.index(concrete(output, order))

    def output(self) -> Tensor:
        site = OUTPUT_AT_TOKEN_0.get(self.name)
        if site is None:
            return self.model(self.x)
        (value,) = self.model.run(self.x, site).values()
        return value[:, 0]

    def site(self, hook: str) -> tuple[str | None, str]:
        """Return (site, "") for a hook name, or (None, why there is none)."""
        try:
            site = concrete(translate(f"{self.dialect}:{hook}"), self.model.sites())
        except ValueError as error:
            return None, str(error).partition("has no site here: ")[2]
        if site not in self.model.sites():
            return None, f"{self.model.spec.family} has no site {site}"
        return site, ""


def hook_names(folder: Path) -> dict[str, tuple[str, str]]:
    """Return hook name -> (file, key) of a case."""
    with np.load(folder / "cache.npz") as found:
        names = {name: ("cache", name) for name in found.files}
    path = folder / "cache_options.npz"
    if path.exists():
        with np.load(path) as found:
            for key in found.files:
                option, _, name = key.partition(":")
                if option.startswith("use_"):
                    names.setdefault(name, ("cache_options", key))
    return names


def _build(folder: Path, told: dict[str, Any]) -> nn.Module:
    reference = told["reference"]
    path, _, name = reference["class"].rpartition(".")
    build = getattr(importlib.import_module(path), name)
    if path == "transformers":
        options = {"add_pooling_layer": False} if name == "ViTModel" else {}
        return build.from_pretrained(folder, **options)
    arguments = dict(reference["arguments"])
    if "act_layer" in arguments:
        path, _, name = arguments["act_layer"].rpartition(".")
        arguments["act_layer"] = getattr(importlib.import_module(path), name)
    module = build(**arguments)
    module.load_state_dict(load_file(folder / "model.safetensors"))
    return module


@functools.cache
def load_case(folder: Path) -> Case:
    told = json.loads((folder / "case.json").read_text())
    model = vitmodels.wrap(_build(folder, told), id=folder.name)
    with np.load(folder / "input.npz") as found:
        x = torch.from_numpy(found["input"])
    return Case(name=folder.name, folder=folder, told=told, model=model, x=x)


def edit(value: Tensor) -> Tensor:
    """Return what the recorded edits put in the place of a tensor."""
    return 0.5 * value + 0.25 * value.roll(1, dims=-1)


def table(cases: list[Case]) -> str:
    """Return docs/hook-names.md: every hook name of the cases, its site or why it has none."""
    text = ["# Hook names of Prisma and TransformerLens", ""]
    text += [HEADER, ""]
    for dialect, title in (("prisma", "Prisma (`prisma:`)"), ("tl", "TransformerLens (`tl:`)")):
        rows: dict[str, dict[str, None]] = {}
        for case in cases:
            if case.dialect != dialect:
                continue
            same = case.told.get("names_that_hold_the_same_tensor", {})
            for hook in [*case.cache(), *same]:
                site, reason = case.site(hook)
                key = re.sub(r"(layers|blocks)\.\d+\.", r"\1.L.", hook)
                shown = reason
                if site:
                    name = translate(f"{dialect}:{hook}")
                    name = re.sub(r"blocks\.\d+\.", "blocks.L.", name) if key != hook else name
                    shown = f"`{name}`"
                rows.setdefault(key, {})[shown] = None
        text += [f"## {title}", "", "| hook name | site here, or why there is none |", "|---|---|"]
        text += [f"| `{name}` | {'; '.join(shown)} |" for name, shown in rows.items()]
        text += [""]
    return "\n".join(text)


HEADER = """Generated by `python tests/vitmodels/hook_cases.py FOLDER` from small models with the
tensors that the two libraries hold for them; the tests compare every tensor of a name with a site
to 1e-5, and every edit that has an effect in the other library with the same edit here. L is any
layer, -1 the last one; `output` is what the model returns: `projection`, `logits` or `pooled`, the
first that it has. `final` means all tokens: families that normalise CLS alone have none."""


if __name__ == "__main__":
    folders = [path.parent for path in sorted(Path(sys.argv[1]).glob("*/case.json"))]
    sys.stdout.write(table([load_case(folder) for folder in folders]))
