"""What an original LLaVA folder's config.json says, in transformers' words.

The original keeps one flat file: the language model's keys, and ``mm_...`` keys for everything about the picture. What
stands there in a form that LLaVA-1.5 does not have (tiles, other families, several scales) is refused, not approximated.

Sources: haotian-liu/LLaVA @ c121f04 ``llava/model/llava_arch.py``, ``multimodal_projector/builder.py`` and
``multimodal_encoder/clip_encoder.py`` (defaults); the configs of openai's CLIP towers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from llava_lab.errors import CheckpointError, OptionError
from llava_lab.models import folders, projectors, prompts

FAMILIES = ("llava_llama", "llava")  # the second is what LLaVA v1 wrote, with mm_ keys beside it
STOCK_KIND = "mlp2x_gelu"  # what transformers' own LLaVA has
MARKS = ("<im_start>", "<im_end>")  # with mm_use_im_start_end, as v1 had it
STRATEGIES = MappingProxyType({"patch": "default", "cls_patch": "full"})
ASPECTS = MappingProxyType({None: False, "square": False, "pad": True})  # image_aspect_ratio -> padded to a square first

_TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "head_dim", "attention_bias", "mlp_bias"),
    *("rope_theta", "rope_scaling", "rope_parameters", "bos_token_id", "eos_token_id", "tie_word_embeddings"),
)
_SAME_IN_BASE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_LARGE: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_LARGE |= {"patch_size": 14, "projection_dim": 768, "hidden_act": "quick_gelu"}
KNOWN_TOWERS = MappingProxyType(
    {
        "openai/clip-vit-large-patch14-336": {**_LARGE, "image_size": 336},
        "openai/clip-vit-large-patch14": {**_LARGE, "image_size": 224},
    }
)


@dataclass(frozen=True)
class Original:
    """The folder's settings, checked."""

    folder: Path
    given: dict[str, Any]  # config.json as it is
    tower: str  # name or folder of the vision tower
    kind: str  # of the connector: linear, mlp2x_gelu, ...
    layer: int
    strategy: str  # "default" drops the class token, "full" keeps it
    pad: bool
    patch_token: bool  # whether <im_patch> stands in the vocabulary before <image>
    marks: tuple[str, ...] = ()  # words that stand before and after every picture


def is_original(config: dict[str, Any]) -> bool:
    """Whether a config.json is of the original format: its own family name, or the keys of a picture in a flat file."""
    return config.get("model_type") == FAMILIES[0] or ("mm_vision_tower" in config and "vision_config" not in config)


def read(folder: Path) -> Original:
    """The settings of an original folder. Raises CheckpointError (one line) for what LLaVA-1.5 and v1 do not have."""
    given = folders.read_json(folder / "config.json")
    path = folder / "config.json"
    family = given.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(f"{path} is an original LLaVA of family {family!r}; readable are {' and '.join(FAMILIES)} (Llama)")
    for key in ("mm_vision_tower", "mm_vision_select_layer"):
        if given.get(key) is None:
            raise CheckpointError(f"{path} has no {key}; an original LLaVA's config.json names its tower and its layer")
    kind = given.get("mm_projector_type") or "linear"
    try:
        projectors.architecture(kind)
    except OptionError as error:
        raise CheckpointError(f"{path} has an unknown mm_projector_type: {error}") from None
    if kind != "linear" and kind != "identity" and not kind.startswith("mlp"):
        raise CheckpointError(f"{path} says mm_projector_type {kind!r}; LLaVA has linear, identity and mlp{{N}}x_gelu")
    aspect, merge = given.get("image_aspect_ratio"), given.get("mm_patch_merge_type", "flat")
    if aspect not in ASPECTS or merge != "flat":
        raise CheckpointError(
            f"{path} cuts pictures into tiles (image_aspect_ratio {aspect!r}, mm_patch_merge_type {merge!r}), as LLaVA-1.6 "
            "does; expected pad or square with flat: use its conversion for transformers"
        )
    if given.get("s2") or "s2_scales" in given:
        raise CheckpointError(f"{path} reads pictures at several scales (S2); a LLaVA with one scale can be read")
    feature = given.get("mm_vision_select_feature", "patch")
    if feature not in STRATEGIES:
        raise CheckpointError(f"{path} says mm_vision_select_feature {feature!r}; expected {' or '.join(STRATEGIES)}")
    return Original(
        folder,
        given,
        str(given["mm_vision_tower"]),
        kind,
        int(given["mm_vision_select_layer"]),
        STRATEGIES[feature],
        ASPECTS[aspect],
        bool(given.get("mm_use_im_patch_token")),
        MARKS if given.get("mm_use_im_start_end") else (),
    )


def vision_config(original: Original, tower: Path | None) -> CLIPVisionConfig:
    """The tower's configuration from its folder, or None for one of openai's by its name. Raises CheckpointError."""
    if tower is None:
        known = KNOWN_TOWERS.get(original.tower)
        if known is None:
            raise CheckpointError(
                f"{original.folder} names the vision tower {original.tower!r}, whose sizes are not known here; "
                "give the tower's folder: vision=FOLDER (--vision)"
            )
        settings = dict(known)
    else:
        settings = _clip_settings(tower)
    config = CLIPVisionConfig(**settings)
    stated = original.given.get("mm_hidden_size")
    if stated is not None and stated != config.hidden_size:
        raise CheckpointError(
            f"{original.folder} expects vision features {stated} wide (mm_hidden_size), "
            f"the tower {tower or original.tower} makes {config.hidden_size}; give the tower it was trained with"
        )
    return config


def _clip_settings(tower: Path) -> dict[str, Any]:
    given = folders.read_json(tower / "config.json")
    family = given.get("model_type")
    if family == "clip":
        vision = given.get("vision_config") or given.get("vision_config_dict") or {}
    elif family == "clip_vision_model":
        vision = given
    else:
        raise CheckpointError(f"{tower} holds a model of type {family!r}; expected a CLIP vision tower")
    names = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"),
        *("hidden_act", "layer_norm_eps", "projection_dim", "num_channels"),
    )
    return {name: vision[name] for name in names if name in vision}


def llava_config(original: Original, vision: CLIPVisionConfig, *, vocabulary: int, image_id: int, pad_id: int) -> LlavaConfig:
    """The same model as transformers describes it, with a vocabulary of so many rows."""
    text = {key: original.given[key] for key in _TEXT_KEYS if original.given.get(key) is not None}
    text |= {"vocab_size": vocabulary, "pad_token_id": pad_id}
    named: dict[str, Any] = {} if original.kind == STOCK_KIND else {projectors.TYPE: original.kind}
    named |= {prompts.MARKED: list(original.marks)} if original.marks else {}
    side = vision.image_size // vision.patch_size
    try:
        return LlavaConfig(
            vision_config=vision,
            text_config=LlamaConfig(**text),
            image_token_index=image_id,
            image_seq_length=side * side + (original.strategy == "full"),
            vision_feature_layer=original.layer,
            vision_feature_select_strategy=original.strategy,
            projector_hidden_act="gelu",
            pad_token_id=pad_id,
            tie_word_embeddings=bool(original.given.get("tie_word_embeddings", False)),
            **named,
        )
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{original.folder / 'config.json'} does not describe a LLaVA ({said})") from None


def check_base(original: Original, base: Path) -> None:
    """Refuse a base language model of other sizes than the folder's config says."""
    given = folders.read_json(base / "config.json")
    for key in _SAME_IN_BASE:
        mine, theirs = original.given.get(key), given.get(key)
        if mine is not None and theirs is not None and mine != theirs:
            raise CheckpointError(
                f"{original.folder} was made on a language model with {key} {mine}, the base {base} has {theirs}"
            )
