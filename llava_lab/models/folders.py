"""From a model's name to a folder with its files: the shipped one, a local folder, or the hub's cache.

Everything after this module sees a folder. It looks at file names and the heads of JSON and
safetensors files; it loads no weights and runs nothing that comes with a checkpoint.

The families of models that can be loaded, one entry each: what a checkpoint's ``model_type`` stands for.

A family is one of transformers' classes whose image tokens stand in the language model's sequence. Which tower and which
language model are inside is the checkpoint's own business: ``llava`` covers LLaVA-1.5 (Vicuna), BakLLaVA (Mistral) and any
other pair. A family that lays out its tokens in another way needs an entry here, and a `Lab` that says where they are.

A checkpoint's processor from its parts, without the Auto classes: tokenizer, image processor, chat template.

Nothing that comes with a checkpoint is executed. Image processors are taken in their Pillow form, which is what LLaVA used.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from llava_lab.errors import CheckpointError, one_line
from llava_lab.models import layout

ASSETS = Path(__file__).resolve().parent.parent / "assets"
ABLATION = ASSETS / "ablation"  # the shipped comparison of connectors and its models
NAMES = MappingProxyType(  # what can be loaded by a bare name
    {"tiny": ASSETS / "tiny", "tiny-linear": ABLATION / "linear", "tiny-mlp": ABLATION / "mlp2x_gelu"}
)
ABLATE = "llava-lab ablate --start runs/tiny --out runs/ablation --save runs/ablation/ablation.npz"
SHIP = "llava_lab.comparison.ship.ship_ablation('runs/ablation')"  # makes ABLATION of what ABLATE leaves
EXAMPLE = "llava-hf/llava-1.5-7b-hf"

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_SMALL_FILES = [
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "README.md",
    "mm_projector.bin",
    "adapter_model.bin",
    "non_lora_trainables.bin",
]


@dataclass(frozen=True)
class Folder:
    """Where a checkpoint lies, and how to name its source."""

    path: Path
    name: str  # what the user said
    source: str  # for the card


def find(name: str | os.PathLike) -> Folder:
    """The folder behind a name. Raises CheckpointError with one line when there is none."""
    text = os.fspath(name)
    if text in NAMES:
        return _shipped(text)
    path = Path(text).expanduser()
    if path.is_dir():
        return Folder(path, text, f"folder {path}")
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give the folder that holds config.json and the weights")
    if _HUB_ID.fullmatch(text):
        return _from_hub(text)
    known = ", ".join(repr(known) for known in NAMES)
    raise CheckpointError(f"no model {text!r}: it is neither {known}, nor a folder here, nor a hub id such as {EXAMPLE!r}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or CheckpointError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; expected a transformers LLaVA folder") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}; expected a JSON object")
    return data


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's weight files: safetensors when there are any, else PyTorch ``.bin``."""
    for whole, pattern in (("model.safetensors", "model-*.safetensors"), ("pytorch_model.bin", "pytorch_model-*.bin")):
        files = [folder / whole] if (folder / whole).is_file() else sorted(folder.glob(pattern))
        if files:
            _check_shards(folder, whole, files)
            return files
    raise CheckpointError(f"{folder} has no weights; expected model.safetensors, its shards, or pytorch_model.bin")


def count_parameters(files: list[Path]) -> int:
    """Parameters in the files: exact from safetensors heads, from the size at 16 bits for ``.bin``."""
    return sum(
        sum(map(math.prod, _safetensors_head(file).values())) if file.suffix == ".safetensors" else file.stat().st_size // 2
        for file in files
    )


def weight_names(files: list[Path]) -> set[str]:
    """Names of the tensors: from safetensors heads, from the index of ``.bin`` shards; a single ``.bin`` tells none."""
    if files[0].suffix == ".safetensors":
        return {name for file in files for name in _safetensors_head(file)}
    index = files[0].parent / "pytorch_model.bin.index.json"
    return set(read_json(index).get("weight_map", {})) if index.is_file() else set()


def _shipped(name: str) -> Folder:
    path = NAMES[name]
    if not (path / "config.json").is_file():
        remedy = "install the package again or train it anew" if name == "tiny" else f"make it with: {ABLATE}; then {SHIP}"
        raise CheckpointError(f"the shipped model {name!r} is missing at {path}; {remedy}")
    return Folder(path, name, f"shipped with llava-lab ({name})")


def _from_hub(repo: str) -> Folder:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        path = Path(snapshot_download(repo, allow_patterns=[*_SMALL_FILES, "*.safetensors"]))
        if not any(path.glob("*.safetensors")):
            path = Path(snapshot_download(repo, allow_patterns=[*_SMALL_FILES, "pytorch_model*.bin"]))
    except GatedRepoError:
        raise CheckpointError(f"{repo} asks for its terms to be accepted first, on its page at the hub, and a login") from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"the hub has no model {repo!r} (or it is private); for example {EXAMPLE!r} is there") from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{repo} is not in the hub cache of this machine and the hub cannot be reached; "
            "connect once, or give the folder of a copy"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{repo} cannot be fetched from the hub ({' '.join(str(error).split())[:200]})") from None
    return Folder(path, repo, f"hub {repo} at {path.name[:12]}")


def _check_shards(folder: Path, whole: str, files: list[Path]) -> None:
    index = folder / f"{whole}.index.json"
    if files == [folder / whole] or not index.is_file():
        return
    wanted = set(read_json(index).get("weight_map", {}).values())
    missing = sorted(wanted - {file.name for file in files})
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(wanted)} weight files: {', '.join(missing[:5])}")


def _safetensors_head(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file. Raises CheckpointError where its head is broken."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError("its head is longer than the file")
            head = json.loads(stream.read(length))
        return {name: tuple(map(int, entry["shape"])) for name, entry in head.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file ({error}); fetch it again") from None


@dataclass(frozen=True)
class Family:
    """How checkpoints of one ``model_type`` are loaded. Names of classes, so that nothing is imported before its use."""

    model_type: str
    known: str  # checkpoints that belong to it
    config: str  # in transformers
    model: str
    processor: str
    lab: str  # in llava_lab: module and class

    def config_class(self) -> Any:
        return _transformers(self.config)

    def model_class(self) -> Any:
        return _transformers(self.model)

    def processor_class(self) -> Any:
        return _transformers(self.processor)

    def lab_class(self) -> Any:
        module, _, name = self.lab.rpartition(".")
        return getattr(importlib.import_module(module), name)


_ALL = (
    Family(
        "llava",
        "LLaVA-1.5, BakLLaVA and others with one square",
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        "LlavaProcessor",
        "llava_lab.models.lab.Lab",
    ),
    Family(
        "llava_next",
        "LLaVA-NeXT (1.6), the picture whole and in tiles",
        "LlavaNextConfig",
        "LlavaNextForConditionalGeneration",
        "LlavaNextProcessor",
        "llava_lab.models.tiles.TiledLab",
    ),
    Family(
        "llava_onevision",
        "LLaVA-OneVision, the same with at most so many tiles",
        "LlavaOnevisionConfig",
        "LlavaOnevisionForConditionalGeneration",
        "LlavaNextProcessor",  # joins tokenizer and image processor; OneVision's own wants torchvision, for its videos
        "llava_lab.models.tiles.TiledLab",
    ),
)
FAMILIES = MappingProxyType({family.model_type: family for family in _ALL})
ADAPTER = "its model, configuration and processor classes, and a Lab that finds each image token's place in sequence and picture"


def family(model_type: Any, where: Any) -> Family:
    """The family a ``model_type`` names. Raises CheckpointError (one line) that says what an adapter for another would need."""
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"{where} holds a model of type {model_type!r}; expected one of {', '.join(map(repr, FAMILIES))}. "
            f"An adapter for it (llava_lab/models/families.py) needs {ADAPTER}"
        )
    return FAMILIES[model_type]


def family_of(folder: Path) -> Family:
    """The family of a folder in the transformers format."""
    return family(read_json(folder / "config.json").get("model_type"), folder)


def _transformers(name: str) -> Any:
    return getattr(importlib.import_module("transformers"), name)


CLIP_PROCESSORS, LLAVA_PROCESSORS = ("CLIPImageProcessor", "CLIPFeatureExtractor"), ("LlavaImageProcessor",)


def build_processor(folder: Path, model: PreTrainedModel, family: Family) -> Any:
    """The family's processor from its parts: tokenizer.json, the PIL image processor, the chat template."""
    config: Any = model.config
    return family.processor_class()(
        image_processor(folder),
        _tokenizer(folder),
        patch_size=layout.processor_patch(model),
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(layout.has_class_token(model)),
        chat_template=_chat_template(folder),
    )


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    try:
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        from transformers import AutoTokenizer  # only a folder without tokenizer.json needs conversion

        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception on a malformed file
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded ({one_line(error)})") from None


def image_processor(folder: Path) -> Any:
    """The checkpoint's image processor in its Pillow form, which is what LLaVA itself used."""
    old = folder / "preprocessor_config.json"
    settings = read_json(old) if old.is_file() else {}
    new = folder / "processor_config.json"
    if not settings and new.is_file():
        settings = read_json(new).get("image_processor", {})
    kind = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "")
    kind = kind.removesuffix("Pil").removesuffix("Fast")
    if not settings:
        raise CheckpointError(f"{folder} has no image processor settings; expected preprocessor_config.json")
    if kind == "LlavaNextImageProcessor":
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil as Processor
    elif kind == "LlavaOnevisionImageProcessor":
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil as Processor,
        )
    elif kind in LLAVA_PROCESSORS:
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil as Processor
    elif kind in CLIP_PROCESSORS:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    else:
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return Processor.from_dict(settings)


def _chat_template(folder: Path) -> str | None:
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and (template := read_json(folder / name).get("chat_template")):
            return template
    jinja = folder / "chat_template.jinja"
    return jinja.read_text(encoding="utf-8") if jinja.is_file() else None
