"""Look inside of a model: patching, ablation, steering, lenses, attribution, attention, circuits.

Results are xarray objects with dimensions such as layer, head and position. Names are loaded on
first use, so that ``import dictlearn.circuits`` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = [
    "ablate",
    "activation_patching",
    "attribute_logits",
    "attribution_patching",
    "logit_lens",
    "patch_paths",
    "trace",
]

_WHERE = {
    "ablate": "dictlearn.circuits.ablation",
    "activation_patching": "dictlearn.circuits.patching",
    "agreement": "dictlearn.circuits.patching",
    "attention_patterns": "dictlearn.circuits.attention",
    "attribute_logits": "dictlearn.circuits.logit_attribution",
    "attribution_patching": "dictlearn.circuits.attribution",
    "clamp": "dictlearn.circuits.steering",
    "fit_probe": "dictlearn.circuits.heads",
    "fit_tuned_lens": "dictlearn.circuits.tuned_lens",
    "head_statistics": "dictlearn.circuits.attention",
    "integrated_gradients": "dictlearn.circuits.attribution",
    "load_for": "dictlearn.circuits.steering",
    "logit_lens": "dictlearn.circuits.lens",
    "patch_paths": "dictlearn.circuits.path_patching",
    "recovered": "dictlearn.circuits.patching",
    "rollout": "dictlearn.circuits.attention",
    "smallest_set": "dictlearn.circuits.search",
    "steer": "dictlearn.circuits.steering",
    "trace": "dictlearn.circuits.tracing",
    "TunedLens": "dictlearn.circuits.tuned_lens",
    "with_probe": "dictlearn.circuits.heads",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(
            f"module 'dictlearn.circuits' has no attribute {name!r}; it has {__dir__()}"
        )
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_WHERE)
