"""`llava-lab doctor --model X`: how a checkpoint differs from LLaVA-1.5, line by line. Reads JSON and file heads, no weights.

A shipped model that is put together from packages (`llava_lab.shipped`) is put together first, and its parts are read.

Every fact is compared with what LLaVA-1.5 has; for a language model of another width or depth the two published sizes, 7B
and 13B, are both expected values. A difference is not a fault: it says what a map or a score will depend on.

    print(render_model(examine_model("tiny")))

Sources: llava-hf/llava-1.5-7b-hf's files; haotian-liu/LLaVA @ c121f04 (the original's config and defaults).
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava_lab.models import folders
from llava_lab.models.formats import original
from llava_lab.models.load import load
from llava_lab.shipped import MODELS

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
DIFFERENT_MEAN = 1e-4
WIDTHS = ("1024 to 4096", "1024 to 5120")  # of 7B and 13B
MISSING = "not stated"


@dataclass(frozen=True)
class Fact:
    """One thing compared. `same` is whether it is as in LLaVA-1.5."""

    name: str
    found: Any  # in the checkpoint
    expected: Any  # in LLaVA-1.5
    same: bool
    why: str = ""  # what it changes, where it differs


def examine_model(name: str | os.PathLike) -> dict[str, Any]:
    """The comparison as plain data: model, folder, format, and every fact. Raises CheckpointError where there is none."""
    if str(name) in MODELS and MODELS[str(name)].parts:
        return _examine_parts(str(name))
    folder = folders.find(name)
    config = folders.read_json(folder.path / "config.json")
    with folders.one_line_of(folder.path):
        if original.is_original(config):
            form, facts = f"original LLaVA, {original.layout_of(folder.path)}", _original_facts(folder.path, config)
        else:
            form, facts = "transformers", _facts(folder.path, config)
        facts += _weight_facts(folder.path, form)
    return _report(folder.name, folder.path, form, facts)


def _examine_parts(name: str) -> dict[str, Any]:
    """The same of a model in parts: what a whole folder of it would say."""
    lab = load(name)
    with tempfile.TemporaryDirectory() as temporary, folders.whole_folder(Path(temporary) / name) as whole:
        lab.processor.save_pretrained(whole)
        lab.model.config.save_pretrained(whole)
        lab.model.generation_config.save_pretrained(whole)
        facts = _facts(whole, folders.read_json(whole / "config.json"))
    facts.append(_size_fact(lab.card.parameters))
    return _report(name, MODELS[name].folder, "connector and LoRA beside packages", facts)


def _report(name: str, folder: Path, form: str, facts: list[Fact]) -> dict[str, Any]:
    same, rows = all(fact.same for fact in facts), [asdict(fact) for fact in facts]
    return {"model": name, "folder": str(folder), "format": form, "same": same, "facts": rows}


def render_model(report: dict[str, Any]) -> str:
    """The report as text: one line for each difference, then how many facts agree."""
    facts = report["facts"]
    lines = [f"{report['model']} ({report['format']} format) beside LLaVA-1.5:"]
    for fact in facts:
        if not fact["same"]:
            why = f"; {fact['why']}" if fact["why"] else ""
            lines.append(f"  {fact['name']}: {fact['found']}, LLaVA-1.5 has {fact['expected']}{why}")
    agree = [fact["name"] for fact in facts if fact["same"]]
    lines.append(f"  as in LLaVA-1.5: {', '.join(agree)}" if agree else "  nothing is as in LLaVA-1.5")
    return "\n".join(lines)


def _fact(name: str, value: Any, *expected: Any, why: str = "") -> Fact:
    """`value` beside what LLaVA-1.5 may have there."""
    either = expected[0] if len(expected) == 1 else " or ".join(map(str, expected))
    return Fact(name, MISSING if value is None else value, either, value in expected, why)


def _facts(folder: Path, config: dict[str, Any]) -> list[Fact]:
    """Of a folder in the transformers format."""
    vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
    kind = config.get("mm_projector_type") or f"mlp2x_{config.get('projector_hidden_act', 'gelu')}"
    widths = f"{vision.get('hidden_size', 1024)} to {text.get('hidden_size', 4096)}"
    image_id = config.get("image_token_index", config.get("image_token_id", 32000))
    tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    facts = [
        _fact("family", config.get("model_type"), "llava", why="another family puts pictures in another way"),
        _fact("connector", kind, "mlp2x_gelu"),
        _fact("connector widths", widths, *WIDTHS),
        *_tower_facts(vision, config.get("vision_feature_layer", -2), config.get("vision_feature_select_strategy", "default")),
        _language_fact(text),
        _fact("vocabulary", text.get("vocab_size", 32000), 32064),
        _fact("image token id", image_id, 32000),
        _fact("pad token id", config.get("pad_token_id"), 32001),
        _fact("tied embedding and head", tied, False, why="the head reads with the table of the words"),
        _dtype_fact(config),
    ]
    if (folder / "tokenizer.json").is_file():
        added = folders.read_json(folder / "tokenizer.json").get("added_tokens") or []
        ids = {entry.get("content"): entry.get("id") for entry in added if isinstance(entry, dict)}
        facts.append(_fact("tokenizer's <image>", ids.get("<image>"), image_id, why="it must be the config's image token id"))
    return [*facts, *_picture_facts(folder, vision.get("image_size", 336)), _prompt_fact(folder), *_generation_facts(folder)]


def _original_facts(folder: Path, config: dict[str, Any]) -> list[Fact]:
    """Of a folder of the original LLaVA; its tower lies elsewhere and is compared where its name is known."""
    read = original.read(folder)
    if tower := original.KNOWN_TOWERS.get(read.tower):
        tower_facts = _tower_facts(tower, read.layer, read.strategy)
    else:
        tower_facts = [_fact("feature layer", read.layer, -2), _fact("select strategy", read.strategy, "default")]
    return [
        _fact("family", config.get("model_type"), "llava_llama"),
        _fact("connector", read.kind, "mlp2x_gelu"),
        _fact("connector widths", f"{config.get('mm_hidden_size')} to {config.get('hidden_size')}", *WIDTHS),
        _fact("vision tower", read.tower, "openai/clip-vit-large-patch14-336"),
        *tower_facts,
        _language_fact(config),
        _fact("vocabulary", config.get("vocab_size"), 32000),
        _fact("preprocessing", "pad" if read.pad else "crop", "pad", why="what stands outside the square is cut off"),
        _dtype_fact(config),
        _fact("tied embedding and head", bool(config.get("tie_word_embeddings", False)), False),
        _fact("longest sequence", config.get("tokenizer_model_max_length"), 2048),
        *_generation_facts(folder),
    ]


def _tower_facts(vision: dict[str, Any], layer: Any, strategy: str) -> list[Fact]:
    size, patch = vision.get("image_size", 336), vision.get("patch_size", 14)
    family = vision.get("model_type", "clip_vision_model")
    shape = f"{family}, {vision.get('num_hidden_layers', 24)} layers x {vision.get('hidden_size', 1024)}"
    tokens = (size // patch) ** 2 + (strategy == "full" and family == "clip_vision_model")
    return [
        _fact("tower", shape, "clip_vision_model, 24 layers x 1024"),
        _fact("feature layer", layer, -2),
        _fact("select strategy", strategy, "default", why="'full' keeps the class token, and a map needs one token per patch"),
        _fact("image size", f"{size} px in patches of {patch}", "336 px in patches of 14"),
        _fact("image tokens", tokens, 576),
    ]


def _language_fact(text: dict[str, Any]) -> Fact:
    family = "llama" if text.get("model_type", "llama") in ("llama", *original.FAMILIES) else text["model_type"]
    heads = text.get("num_attention_heads", 32)
    shape = f"{family}, {text.get('num_hidden_layers', 32)} layers x {text.get('hidden_size', 4096)}, {heads} heads"
    return _fact("language model", shape, "llama, 32 layers x 4096, 32 heads", "llama, 40 layers x 5120, 40 heads")


def _dtype_fact(config: dict[str, Any]) -> Fact:
    return _fact("dtype", config.get("dtype") or config.get("torch_dtype"), "float16", "bfloat16")


def _picture_facts(folder: Path, size: int) -> list[Fact]:
    images = _read(folder, "preprocessor_config.json", None) or _read(folder, "processor_config.json", "image_processor")
    if not images:
        return [Fact("preprocessing", MISSING, "crop", False, "a picture cannot be given to it without preprocessor_config.json")]
    way = "pad" if images.get("do_pad") else "crop" if images.get("do_center_crop", True) else "squeeze"
    crop = images.get("crop_size", images.get("size", size))
    side = crop if isinstance(crop, int) else (crop or {}).get("height", size)
    facts = [
        _fact("preprocessing", way, "pad", why="LLaVA-1.5 was trained with pad; the hub's copy crops; ask(fit='pad') pads"),
        _fact("picture side", side, 336),
    ]
    for name, expected in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD)):
        values = images.get(name) or []
        same = len(values) == 3 and all(abs(a - b) < DIFFERENT_MEAN for a, b in zip(values, expected, strict=True))
        facts.append(Fact(name.replace("_", " "), values or MISSING, expected, same))
    return facts


def _prompt_fact(folder: Path) -> Fact:
    names = ("chat_template.json", "processor_config.json", "tokenizer_config.json")
    template = next((text for name in names if (text := _read(folder, name, "chat_template"))), None)
    if template is None and (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    form = "no chat template"
    if template is not None:
        turns = "Vicuna turns" if "ASSISTANT:" in template else "other turns"
        system = "A chat between a curious user" in template
        form = turns + (" after the system sentence" if system else ", no system sentence")
    why = "ask(prompt='llava-1.5') writes the turns LLaVA-1.5 was trained with, whatever the template says"
    return _fact("prompt", form, "Vicuna turns after the system sentence", why=why)


def _read(folder: Path, file: str, entry: str | None) -> Any:
    """An entry of a JSON file, or all of it; None where there is no such file or entry."""
    data = folders.read_json(folder / file) if (folder / file).is_file() else None
    return data if data is None or entry is None else data.get(entry)


def _generation_facts(folder: Path) -> list[Fact]:
    config = _read(folder, "generation_config.json", None) or {}
    return [
        _fact("end of answer", config.get("eos_token_id"), 2),
        _fact("sampling", bool(config.get("do_sample", False)), False, why="ask is greedy unless it is told a temperature"),
    ]


def _weight_facts(folder: Path, form: str) -> list[Fact]:
    if form not in ("transformers", f"original LLaVA, {original.WHOLE}"):
        return []
    return [_size_fact(folders.count_parameters(folders.weight_files(folder)))]


def _size_fact(parameters: int) -> Fact:
    count = parameters / 1e9
    near = "7B" if 6.5 < count < 7.5 else "13B" if 12.5 < count < 14 else f"{count:.3g}B"
    return _fact("parameters", near, "7B", "13B")
