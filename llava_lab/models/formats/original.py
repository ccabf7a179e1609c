"""Original LLaVA folders as transformers' LLaVA: ``llava_llama`` checkpoints, LoRA runs, and projectors alone.

`assemble` reads a folder once and gives the configuration, every tensor under its name in memory, and the processor:
`llava_lab.load` makes a Lab of them and ``llava-lab convert`` writes them. What a folder lacks, the vision tower or the language
model, is taken from the folders its config names, or from those given; nothing is left to chance.

    parts = assemble(Path("llava-v1.5-7b"), vision="openai/clip-vit-large-patch14-336")
    parts.config, parts.weights, parts.processor

The original keeps one flat config.json: the language model's keys, and ``mm_...`` keys for everything about the picture. What
stands there in a form that LLaVA-1.5 does not have (tiles, other families, several scales) is refused, not approximated.

An original vocabulary has no ``<image>``: it stands outside the vocabulary there. As the official conversion does, ``<image>``
and then ``<pad>`` are added as special tokens after the last word. Nothing that comes with the folder is run.

Sources: haotian-liu/LLaVA @ c121f04 ``llava/model/builder.py`` (load_pretrained_model), ``llava_arch.py``,
``multimodal_projector/builder.py``, ``multimodal_encoder/clip_encoder.py`` (defaults), ``conversation.py`` (vicuna_v1),
``mm_utils.py`` (expand2square); transformers ``convert_llava_weights_to_hf.py``; the configs of openai's CLIP towers. The code is
ours.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AddedToken, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from llava_lab.errors import CheckpointError, OptionError, one_line
from llava_lab.models import connectors, folders, text
from llava_lab.models.formats import foreign
from llava_lab.models.formats import original_weights as files
from llava_lab.models.text import CUE, END_OF_TURN, IMAGE, SYSTEM

Place = str | os.PathLike | None
WHOLE, LORA, PROJECTOR = "whole checkpoint", "LoRA", "projector only"

FAMILIES = ("llava_llama", "llava")  # the second is what LLaVA v1 wrote, with mm_ keys beside it
STOCK_KIND = "mlp2x_gelu"  # what transformers' own LLaVA has
MARKS = ("<im_start>", "<im_end>")  # with mm_use_im_start_end, as v1 had it
STRATEGIES = MappingProxyType({"patch": "default", "cls_patch": "full"})
ASPECTS = MappingProxyType({None: False, "square": False, "pad": True})  # image_aspect_ratio -> padded to a square first

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
PAD, PATCH = "<pad>", "<im_patch>"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

TEMPLATE = (
    SYSTEM + " {% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}" + IMAGE + "\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %} {% else %}ASSISTANT: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}" + END_OF_TURN + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + CUE + "{% endif %}"
)

_TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "head_dim", "attention_bias", "mlp_bias"),
    *("rope_theta", "rope_scaling", "rope_parameters", "bos_token_id", "eos_token_id", "tie_word_embeddings"),
)
_VISION_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"),
    *("hidden_act", "layer_norm_eps", "projection_dim", "num_channels"),
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


@dataclass(frozen=True)
class Assembled:
    """An original LLaVA in transformers' terms."""

    config: LlavaConfig
    weights: dict[str, torch.Tensor]  # under their names in memory
    processor: LlavaProcessor
    layout: str  # WHOLE, LORA or PROJECTOR
    source: str  # where every part came from, for the card
    dtype: torch.dtype  # of the language model as stored

    @property
    def parameters(self) -> int:
        return sum(value.numel() for value in self.weights.values())


def is_original(config: dict[str, Any]) -> bool:
    """Whether a config.json is of the original format: its own family name, or the keys of a picture in a flat file."""
    return config.get("model_type") == FAMILIES[0] or ("mm_vision_tower" in config and "vision_config" not in config)


def check_adapter(folder: Path) -> None:
    """Refuse the folder of a LoRA run's step (``checkpoint-500``), which holds adapters only, and say where the rest lies."""
    adapter = next((name for name in files.ADAPTERS if (folder / name).is_file()), None)
    lacks = [name for name in ("config.json", files.NON_LORA) if not (folder / name).is_file()]
    if adapter is None or not lacks:
        return
    parts = {"config.json": "the model's sizes", files.NON_LORA: "the trained projector"}
    run = folder.resolve().parent
    there = all((run / name).is_file() for name in ("config.json", files.NON_LORA))
    where = f"it is in {run}: load that folder" if there else "LLaVA writes it beside them when a run ends"
    raise CheckpointError(
        f"{folder} has no {' and no '.join(lacks)}: it holds the LoRA adapter of a step ({adapter}) without "
        f"{' and '.join(parts[name] for name in lacks)}; {where}"
    )


def layout_of(folder: Path) -> str:
    """Which of the original's layouts a folder has. Raises CheckpointError when it holds no weights at all."""
    if (folder / files.ADAPTER_CONFIG).is_file() or any((folder / name).is_file() for name in files.ADAPTERS):
        return LORA
    if any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        return WHOLE
    if (folder / files.PROJECTOR).is_file():
        return PROJECTOR
    raise CheckpointError(
        f"{folder} has no weights; expected a whole checkpoint (pytorch_model*.bin or *.safetensors), "
        f"{files.ADAPTERS[1]} with {files.NON_LORA}, or {files.PROJECTOR}"
    )


def read(folder: Path) -> Original:
    """The settings of an original folder. Raises CheckpointError (one line) for what LLaVA-1.5 and v1 do not have."""
    given = folders.read_json(folder / "config.json")
    path = folder / "config.json"
    foreign.check_config(given, 0, path)
    family = given.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(f"{path} is an original LLaVA of family {family!r}; readable are {' and '.join(FAMILIES)} (Llama)")
    for key in ("mm_vision_tower", "mm_vision_select_layer"):
        if given.get(key) is None:
            raise CheckpointError(f"{path} has no {key}; an original LLaVA's config.json names its tower and its layer")
    kind = given.get("mm_projector_type") or "linear"
    try:
        connectors.architecture(kind)
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


def assemble(folder: Path, *, vision: Place = None, base: Place = None) -> Assembled:
    """Read an original folder whole.

    `vision`: name or folder of the CLIP tower, None: the one its config names. `base`: name or folder of the language
    model under a LoRA or a projector, None: the one its config names. Raises CheckpointError or OptionError (one line).
    """
    original = read(folder)
    layout = layout_of(folder)
    if base is not None and layout == WHOLE:
        raise OptionError(f"{folder} is a whole checkpoint with its own language model; leave base out")
    language, under = (folder, None) if layout == WHOLE else _base(original, layout, base)
    weights = files.renamed(_language_weights(folder, language, layout), folder)
    inside = any(name.startswith("model.vision_tower.") for name in weights)
    tower = _tower(original, vision, inside)
    picture = vision_config(original, tower)
    if not inside:
        assert tower is not None
        weights |= files.read_tower(tower)
    embedding = weights.get(files.EMBEDDING)
    if embedding is None or embedding.ndim != 2:
        raise CheckpointError(f"{language} holds no model.embed_tokens.weight; expected a Llama language model")
    files.check_projector(weights, original.kind, (picture.hidden_size, original.given.get("hidden_size", 0)), folder)
    # LLaVA takes the base's tokenizer; a folder that has its own may have added words to it
    own_words = any((folder / name).is_file() for name in TOKENIZERS)
    tokenizer = read_tokenizer(folder if own_words else language, patch_token=original.patch_token, marks=original.marks)
    new_words = 2 + original.patch_token
    if len(tokenizer) - new_words > len(embedding):
        also = f", {' and '.join(original.marks)} among them," if original.marks else ""
        raise CheckpointError(f"the tokenizer of {folder} has more words{also} than the {len(embedding)} rows of its embedding")
    foreign.check_config(original.given, len(weights), folder / "config.json")
    dtype = embedding.dtype
    rows = files.grow_vocabulary(weights, len(tokenizer), tied=bool(original.given.get("tie_word_embeddings", False)))
    config = llava_config(
        original,
        picture,
        vocabulary=rows,
        image_id=int(tokenizer.convert_tokens_to_ids(IMAGE)),
        pad_id=int(tokenizer.pad_token_id),
    )
    processor = LlavaProcessor(
        image_processor(tower, picture, pad=original.pad),
        tokenizer,
        patch_size=picture.patch_size,
        vision_feature_select_strategy=original.strategy,
        num_additional_image_tokens=1,
        chat_template=text.marked(TEMPLATE, original.marks),
    )
    over = f" over {under}" if under else ""
    eyes = f"vision tower {original.tower} {'inside' if inside else f'from {tower}'}"
    source = f"folder {folder} (original LLaVA format, {layout}{over}; {eyes})"
    return Assembled(config, weights, processor, layout, source, dtype)


def _language_weights(folder: Path, language: Path, layout: str) -> files.Weights:
    """Everything but a tower from elsewhere, still in the original's names."""
    weights = files.read_folder(language)
    if layout == WHOLE:
        return weights
    # a base may itself be a LLaVA; its projector is replaced whole
    weights = {name: value for name, value in weights.items() if not name.startswith("model.mm_projector.")}
    if layout == PROJECTOR:
        return {**weights, **files.read_trained(folder / files.PROJECTOR)}
    trained = files.read_trained(folder / files.NON_LORA)
    return {**files.merge_lora(weights, folder), **trained}


def _base(original: Original, layout: str, base: Place) -> tuple[Path, str]:
    """The language model's folder, given or named by the folder's own files, and what it was called."""
    named = base
    if named is None and layout == LORA and (original.folder / files.ADAPTER_CONFIG).is_file():
        named = folders.read_json(original.folder / files.ADAPTER_CONFIG).get("base_model_name_or_path")
    named = named or original.given.get("_name_or_path")
    wanted = f"{original.folder} holds a {layout} without its language model"
    if not named:
        raise CheckpointError(f"{wanted} and does not name it; give its folder: base=FOLDER (--base)")
    try:
        folder = folders.find(named).path
    except CheckpointError as error:
        raise CheckpointError(f"{wanted}, {str(named)!r} ({error}); give its folder: base=FOLDER (--base)") from None
    theirs = folders.read_json(folder / "config.json")
    for key in _SAME_IN_BASE:
        mine, its = original.given.get(key), theirs.get(key)
        if mine is not None and its is not None and mine != its:
            raise CheckpointError(
                f"{original.folder} was made on a language model with {key} {mine}, the base {folder} has {its}"
            )
    return folder, str(named)


def _tower(original: Original, vision: Place, inside: bool) -> Path | None:
    """The tower's folder; None where its weights are inside and its sizes are known by its name."""
    if vision is None and inside and original.tower in KNOWN_TOWERS:
        return None
    try:
        return folders.find(original.tower if vision is None else vision).path
    except CheckpointError as error:
        lacks = "the sizes of its vision tower" if inside else "the weights of its vision tower"
        raise CheckpointError(
            f"{original.folder} does not hold {lacks}, {str(vision or original.tower)!r} ({error}); "
            "give the tower's folder: vision=FOLDER (--vision)"
        ) from None


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
        stated = folders.read_json(tower / "config.json")
        family = stated.get("model_type")
        if family not in ("clip", "clip_vision_model"):
            raise CheckpointError(f"{tower} holds a model of type {family!r}; expected a CLIP vision tower")
        inner = stated.get("vision_config") or stated.get("vision_config_dict") or {}
        stated = inner if family == "clip" else stated
        settings = {name: stated[name] for name in _VISION_KEYS if name in stated}
        foreign.check_config(settings, 0, tower / "config.json")
    try:
        config = CLIPVisionConfig(**settings)
        _ = config.image_size // config.patch_size
    except (ValueError, TypeError, ArithmeticError, StrictDataclassError) as error:
        raise CheckpointError(f"{tower or original.folder} does not describe a CLIP tower ({one_line(error)})") from None
    width = original.given.get("mm_hidden_size")
    if width is not None and width != config.hidden_size:
        raise CheckpointError(
            f"{original.folder} expects vision features {width} wide (mm_hidden_size), "
            f"the tower {tower or original.tower} makes {config.hidden_size}; give the tower it was trained with"
        )
    return config


def llava_config(original: Original, vision: CLIPVisionConfig, *, vocabulary: int, image_id: int, pad_id: int) -> LlavaConfig:
    """The same model as transformers describes it, with a vocabulary of so many rows."""
    language = {key: original.given[key] for key in _TEXT_KEYS if original.given.get(key) is not None}
    language |= {"vocab_size": vocabulary, "pad_token_id": pad_id}
    named: dict[str, Any] = {} if original.kind == STOCK_KIND else {connectors.TYPE: original.kind}
    named |= {text.MARKED: list(original.marks)} if original.marks else {}
    side = vision.image_size // vision.patch_size
    try:
        return LlavaConfig(
            vision_config=vision,
            text_config=LlamaConfig(**language),
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
        raise CheckpointError(f"{original.folder / 'config.json'} does not describe a LLaVA ({one_line(error)})") from None


def read_tokenizer(folder: Path, *, patch_token: bool, marks: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """The folder's tokenizer with what its config asks for, ``<image>`` and ``<pad>`` added. Raises CheckpointError."""
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise CheckpointError(f"{folder} has no tokenizer; expected tokenizer.model or tokenizer.json")
    if not (folder / "tokenizer.json").is_file() and not (is_sentencepiece_available() and is_protobuf_available()):
        raise CheckpointError(
            f"{folder} has its words in tokenizer.model only, which needs two packages to be read; "
            "`pip install sentencepiece protobuf`, or put the tokenizer.json of the same Vicuna beside it"
        )
    foreign.check_tokenizer(folder)
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        else:
            from transformers import LlamaTokenizer

            tokenizer = LlamaTokenizer.from_pretrained(folder, local_files_only=True)
        if patch_token:
            tokenizer.add_tokens([PATCH], special_tokens=True)
        tokenizer.add_tokens(list(marks), special_tokens=True)
        tokenizer.add_tokens(AddedToken(IMAGE, special=True, normalized=False), special_tokens=True)
        tokenizer.add_special_tokens({"pad_token": PAD})
    except Exception as error:  # the tokenizers library raises bare Exception on a malformed file
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded ({one_line(error)})") from None
    return tokenizer


def image_processor(tower: Path | None, vision: CLIPVisionConfig, *, pad: bool) -> LlavaImageProcessorPil:
    """CLIP's own transform, from the tower's folder or openai's settings, behind LLaVA's square of the mean colour."""
    given: dict[str, Any] = {}
    if tower is not None and (tower / "preprocessor_config.json").is_file():
        given = folders.read_json(tower / "preprocessor_config.json")
    side = vision.image_size
    size, crop = given.get("size", side), given.get("crop_size", side)
    return LlavaImageProcessorPil(
        do_pad=pad,
        size={"shortest_edge": size} if isinstance(size, int) else size,
        crop_size={"height": crop, "width": crop} if isinstance(crop, int) else crop,
        image_mean=list(given.get("image_mean", CLIP_MEAN)),
        image_std=list(given.get("image_std", CLIP_STD)),
        resample=given.get("resample", 3),
    )
