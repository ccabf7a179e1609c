"""Original LLaVA folders as transformers' LLaVA: ``llava_llama`` checkpoints, LoRA runs, and projectors alone.

`assemble` gives the configuration, every tensor under its name in memory, and the processor; `llava_lab.load` makes a
Lab of it and ``llava-lab convert`` writes it. What a folder lacks, the vision tower or the language model, is taken from
the folders its config names, or from those given; it is never left to chance.

Source: haotian-liu/LLaVA @ c121f04 ``llava/model/builder.py`` (load_pretrained_model). The code is ours.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlavaConfig, LlavaProcessor

from llava_lab.errors import CheckpointError, OptionError
from llava_lab.models import folders, original_tokens, prompts
from llava_lab.models import original_config as configs
from llava_lab.models import original_weights as files
from llava_lab.models.original_config import Original

Place = str | os.PathLike | None
WHOLE, LORA, PROJECTOR = "whole checkpoint", "LoRA", "projector only"


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


def assemble(folder: Path, *, vision: Place = None, base: Place = None) -> Assembled:
    """Read an original folder whole.

    `vision`: name or folder of the CLIP tower, None: the one its config names. `base`: name or folder of the language
    model under a LoRA or a projector, None: the one its config names. Raises CheckpointError or OptionError (one line).
    """
    original = configs.read(folder)
    layout = layout_of(folder)
    if base is not None and layout == WHOLE:
        raise OptionError(f"{folder} is a whole checkpoint with its own language model; leave base out")
    language, under = (folder, None) if layout == WHOLE else _base(original, layout, base)
    weights = files.renamed(_language_weights(folder, language, layout), folder)
    inside = any(name.startswith("model.vision_tower.") for name in weights)
    tower = _tower(original, vision, inside)
    picture = configs.vision_config(original, tower)
    if not inside:
        assert tower is not None
        weights |= files.read_tower(tower)
    embedding = weights.get(files.EMBEDDING)
    if embedding is None or embedding.ndim != 2:
        raise CheckpointError(f"{language} holds no model.embed_tokens.weight; expected a Llama language model")
    files.check_projector(weights, original.kind, (picture.hidden_size, original.given.get("hidden_size", 0)), folder)
    words = _with_tokenizer(folder, language)
    tokenizer = original_tokens.read_tokenizer(words, patch_token=original.patch_token, marks=original.marks)
    image_id = tokenizer.convert_tokens_to_ids(original_tokens.IMAGE)
    if len(tokenizer) - 2 - original.patch_token > len(embedding):  # its new words aside
        also = f", {' and '.join(original.marks)} among them," if original.marks else ""
        raise CheckpointError(f"the tokenizer of {folder} has more words{also} than the {len(embedding)} rows of its embedding")
    tied = bool(original.given.get("tie_word_embeddings", False))
    dtype = embedding.dtype
    rows = files.grow_vocabulary(weights, len(tokenizer), tied=tied)
    config = configs.llava_config(original, picture, vocabulary=rows, image_id=int(image_id), pad_id=int(tokenizer.pad_token_id))
    processor = LlavaProcessor(
        original_tokens.image_processor(tower, picture, pad=original.pad),
        tokenizer,
        patch_size=picture.patch_size,
        vision_feature_select_strategy=original.strategy,
        num_additional_image_tokens=1,
        chat_template=prompts.marked(original_tokens.TEMPLATE, original.marks),
    )
    return Assembled(config, weights, processor, layout, _source(folder, layout, under, tower, original, inside), dtype)


def _language_weights(folder: Path, language: Path, layout: str) -> files.Weights:
    """Everything but a tower from elsewhere, still in the original's names."""
    weights = files.read_folder(language)
    if layout == LORA:
        trained = files.read_trained(folder / files.NON_LORA)
        return {**files.merge_lora(_without_projector(weights), folder), **trained}
    if layout == PROJECTOR:
        return {**_without_projector(weights), **files.read_trained(folder / files.PROJECTOR)}
    return weights


def _without_projector(weights: files.Weights) -> files.Weights:
    """A base may itself be a LLaVA; its projector is replaced whole."""
    return {name: value for name, value in weights.items() if not name.startswith("model.mm_projector.")}


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
        found = folders.find(named).path
    except CheckpointError as error:
        raise CheckpointError(f"{wanted}, {str(named)!r} ({error}); give its folder: base=FOLDER (--base)") from None
    configs.check_base(original, found)
    return found, str(named)


def _tower(original: Original, vision: Place, inside: bool) -> Path | None:
    """The tower's folder; None where its weights are inside and its sizes are known by its name."""
    if vision is None and inside and original.tower in configs.KNOWN_TOWERS:
        return None
    try:
        return folders.find(original.tower if vision is None else vision).path
    except CheckpointError as error:
        lacks = "the sizes of its vision tower" if inside else "the weights of its vision tower"
        raise CheckpointError(
            f"{original.folder} does not hold {lacks}, {str(vision or original.tower)!r} ({error}); "
            "give the tower's folder: vision=FOLDER (--vision)"
        ) from None


def _with_tokenizer(folder: Path, language: Path) -> Path:
    """LLaVA takes the base's tokenizer; a folder that has its own may have added words to it."""
    own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return folder if own else language


def _source(folder: Path, layout: str, under: str | None, tower: Path | None, original: Original, inside: bool) -> str:
    seen = "inside" if inside else f"from {tower}"
    over = f" over {under}" if under else ""
    return f"folder {folder} (original LLaVA format, {layout}{over}; vision tower {original.tower} {seen})"
