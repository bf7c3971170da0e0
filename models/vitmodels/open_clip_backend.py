"""open_clip: construction, weights and preprocessing, shared by its families.

Each tower is built alone, by open_clip's own classes, inside a CLIP whose other tower is as
small as it can be; a checkpoint gives each tower its part.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitmodels.family import Request
from vitmodels.open_clip_names import Checkpoint, checkpoint, tags, text_cfg
from vitmodels.transforms import Transform
from vitmodels.weights import first_mismatch, read_weights

_SMALL_VISION = {"layers": 1, "width": 8, "head_width": 8, "patch_size": 8, "image_size": 8}
_SMALL_TEXT = {"context_length": 2, "vocab_size": 2, "width": 8, "heads": 1, "layers": 1}


def is_a(module: Any, name: str) -> bool:
    """Whether a module is of a class of open_clip, and of no subclass; without importing it."""
    kind = type(module)
    return kind.__name__ == name and kind.__module__.partition(".")[0] == "open_clip"


def build_visual(request: Request) -> nn.Module:
    """Build the image tower of a name, with its part of the checkpoint.

    Raises
    ------
    ValueError
        Weights that do not fit (with the first key), unknown name.
    FileNotFoundError
        The published weights cannot be fetched.
    """
    import open_clip
    from open_clip.model import resize_pos_embed

    known = checkpoint(request.name)
    path = _weights_path(request, known)
    told = {**known.model_cfg["vision_cfg"], "timm_model_pretrained": False}
    if request.img_size is not None:
        told["image_size"] = request.img_size
    clip = open_clip.CustomTextCLIP(
        embed_dim=known.model_cfg["embed_dim"],
        vision_cfg=told,
        text_cfg=_SMALL_TEXT,
        quick_gelu=known.model_cfg.get("quick_gelu", False),
    )
    visual: Any = clip.visual
    if path is not None:
        state = _own_part(_read(path, clip), "visual.")
        old = {f"visual.{key}": value for key, value in state.items()}
        resize_pos_embed(old, clip)
        _fit(
            {key.removeprefix("visual."): value for key, value in old.items()}, visual, path, known
        )
    if request.img_size is not None and hasattr(visual, "trunk"):
        visual.set_input_size(request.img_size)
    _remember(visual, known)
    tower: nn.Module = visual
    return tower


def build_text(request: Request) -> nn.Module:
    """Build a ``CustomTextCLIP`` with the text tower of a name, and without an image tower.

    Raises
    ------
    ValueError
        Weights that do not fit (with the first key), unknown name, or a text tower that is a
        model of transformers.
    FileNotFoundError
        The published weights cannot be fetched.
    """
    import open_clip
    from open_clip.model import convert_to_custom_text_state_dict

    known = checkpoint(request.name)
    config = dict(known.model_cfg)
    told = {**config.pop("text_cfg"), "output_tokens": False}
    if told.get("hf_model_name"):
        raise ValueError(
            f"the text tower of {request.name} is {told['hf_model_name']} of transformers; only "
            "open_clip's own text towers have sites here"
        )
    path = _weights_path(request, known)
    for key in ("custom_text", "multimodal_cfg", "vision_cfg"):
        config.pop(key, None)
    # CustomTextCLIP keeps the tower as one module; CLIP holds the same parts by themselves.
    clip: Any = open_clip.CustomTextCLIP(**config, vision_cfg=_SMALL_VISION, text_cfg=told)
    clip.visual = nn.Identity()
    if path is not None:
        state = convert_to_custom_text_state_dict(_read(path, clip))
        own = _own_part(state, "text.")
        for key in ("logit_scale", "logit_bias"):
            if key in state and getattr(clip, key) is not None:
                getattr(clip, key).data.copy_(state[key].reshape(getattr(clip, key).shape))
        _fit(own, clip.text, path, known)
    _remember(clip.text, known)
    whole: nn.Module = clip
    return whole


def _weights_path(request: Request, known: Checkpoint) -> Path | None:
    """Return the file to load, fetching the published one if asked to."""
    import open_clip

    if request.weights is not None:
        return request.weights
    if not request.pretrained:
        return None
    if not known.tag:
        raise ValueError(
            f"open_clip/{known.config} names no checkpoint; tags: "
            f"{', '.join(tags(known.config)) or 'none'}. Say open_clip/{known.config}@<tag>, "
            "weights= a local file, or pretrained=False for random weights"
        )
    try:
        return Path(open_clip.download_pretrained(dict(known.pretrained_cfg)))
    except Exception as error:
        where = known.pretrained_cfg.get("hf_hub") or known.pretrained_cfg.get("url")
        cause = (str(error).splitlines() or [""])[0]
        raise FileNotFoundError(
            f"the weights of open_clip/{known.config}@{known.tag} could not be fetched from "
            f"{where} ({type(error).__name__}: {cause}). Give weights= a local file, "
            "pretrained=False for random ones, or set HF_HUB_CACHE to a folder that holds them"
        ) from error


def _read(path: Path, clip: Any) -> dict[str, Tensor]:
    """Read a checkpoint of open_clip, or of those whose layout it converts."""
    from open_clip.convert import convert_state_dict

    state: dict[str, Tensor] = convert_state_dict(clip, read_weights(path))
    return state


def _own_part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return a tower's part of a checkpoint, or all of a file that holds the tower alone."""
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return own or dict(state)


def _fit(state: dict[str, Tensor], tower: nn.Module, path: Path, known: Checkpoint) -> None:
    if mismatch := first_mismatch(state, tower):
        name = f"{known.config}@{known.tag}" if known.tag else known.config
        raise ValueError(f"{path} does not fit open_clip/{name}: {mismatch}")
    tower.load_state_dict(state)


def _remember(tower: Any, known: Checkpoint) -> None:
    """Leave name and preprocessing on the tower; the latter as open_clip's own factory does."""
    import open_clip
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    told = merge_preprocess_dict(PreprocessCfg(), dict(known.pretrained_cfg))
    if hasattr(tower, "image_size"):
        told["size"] = tower.image_size
    open_clip.set_model_preprocess_cfg(tower, told)
    tower.open_clip_name = known.config
    tower.open_clip_revision = (
        f"{known.pretrained_cfg.get('hf_hub', '').rstrip('/')}:{known.tag}" if known.tag else ""
    )


def transform(tower: Any, size: tuple[int, int]) -> Transform:
    """Return open_clip's evaluation preprocessing of a tower, at a size (height, width)."""
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    told = open_clip.get_model_preprocess_cfg(tower) if hasattr(tower, "preprocess_cfg") else {}
    config = PreprocessCfg(**{**merge_preprocess_dict(PreprocessCfg(), told), "size": size})
    description = {"kind": "open_clip", **dataclasses.asdict(config)}
    description["size"] = list(size)
    return Transform(image_transform_v2(config, is_train=False), description)


def revision(tower: Any) -> str:
    """Return ``<hub repository>:<tag>`` of a tower built here."""
    return str(getattr(tower, "open_clip_revision", ""))


class _Tokenize:
    """One text to token ids; the tokenizer is loaded when it is first used."""

    def __init__(self, config: str, length: int, simple: bool) -> None:
        self.config, self.length, self.simple = config, length, simple
        self._tokenizer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokenizer": None}

    def __call__(self, text: str) -> Tensor:
        import open_clip

        if self._tokenizer is None and self.simple:
            self._tokenizer = open_clip.SimpleTokenizer(context_length=self.length)
        elif self._tokenizer is None:
            try:
                self._tokenizer = open_clip.get_tokenizer(self.config, context_length=self.length)
            except Exception as error:
                raise FileNotFoundError(
                    f"the tokenizer of open_clip/{self.config} is on the hub and could not be "
                    f"fetched ({type(error).__name__}); set HF_HUB_CACHE to a folder that holds it"
                ) from error
        ids: Tensor = self._tokenizer([text])[0]
        return ids


def tokenizer(tower: Any) -> Transform:
    """Return the tokenizer of a text tower: text ``-> [context]`` ids.

    open_clip ships CLIP's byte-pair encoding; other tokenizers come from the hub.
    """
    config = str(getattr(tower, "open_clip_name", ""))
    told = text_cfg(config) if config else {}
    simple = not told.get("hf_tokenizer_name")
    description = {
        "kind": "open_clip_tokenizer",
        "tokenizer": "clip_bpe" if simple else told["hf_tokenizer_name"],
        "context_length": int(tower.context_length),
    }
    return Transform(_Tokenize(config, int(tower.context_length), simple), description)
