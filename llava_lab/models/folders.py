"""From a model's name to a folder with its files, the family it belongs to, and its processor.

A name is a shipped model, a local folder or an id at the hub; everything after `find` sees a folder. File names and the heads
of JSON and safetensors files are read here, no weights, and nothing that comes with a checkpoint is executed.

A family is one of transformers' classes whose image tokens stand in the language model's sequence. Which tower and which
language model are inside is the checkpoint's own affair: ``llava`` covers LLaVA-1.5 (Vicuna), BakLLaVA (Mistral) and any other
pair. A family that lays out its tokens in another way needs an entry in `FAMILIES`, and a `Lab` that says where they are.

    folder = find("tiny")
    family_of(folder.path).model_type  # "llava"

The processor is put together from its parts, without the Auto classes: tokenizer, image processor in its Pillow form (which is
what LLaVA used), chat template.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from llava_lab.checks import regular_file
from llava_lab.errors import CheckpointError, LabError, OptionError, WriteError, one_line
from llava_lab.models import layout
from llava_lab.models.formats import foreign
from llava_lab.options import nearest
from llava_lab.shipped import ASSETS, MODELS

NAMES = MappingProxyType({name: shipped.folder for name, shipped in MODELS.items() if not shipped.parts})  # whole folders
ABLATE = "llava-lab ablate --start runs/tiny --out runs/ablation --save runs/ablation/ablation.npz"
SHIP = "llava_lab.comparison.ship.ship_ablation('runs/ablation')"  # makes ABLATION of what ABLATE leaves
EXAMPLE = "llava-hf/llava-1.5-7b-hf"

CHANNELS = 3  # of a picture
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_HUB_PAGE = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w][\w.-]*/[\w][\w.-]*)")
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


def find(name: str | os.PathLike, revision: str | None = None) -> Folder:
    """The folder behind a name. A hub id may be pinned to a commit, tag or branch, as `revision` or behind an ``@``.

    Raises CheckpointError with one line when there is none, OptionError for a revision of anything else.
    """
    text = os.fspath(name)
    repo, _, pinned = text.partition("@")
    local = bool(text) and (text in NAMES or Path(text).expanduser().exists())
    if revision is not None and (local or not _HUB_ID.fullmatch(repo) or pinned not in ("", revision)):
        raise OptionError(no_revision(text))
    if text in NAMES:
        return _shipped(text)
    path = Path(text).expanduser()
    if text and path.is_dir():
        foreign.check_files(path)
        return Folder(path, text, f"folder {path}")
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give the folder that holds config.json and the weights")
    if _HUB_ID.fullmatch(repo):
        return _from_hub(repo, revision or pinned or None)
    known = ", ".join(repr(known) for known in MODELS)
    meant = hub[1] if (hub := _HUB_PAGE.match(text)) else nearest(repo, MODELS)
    hint = f"; did you mean {meant!r}?" if meant else ""
    raise CheckpointError(f"no model {text!r}: it is neither {known}, nor a folder here, nor a hub id such as {EXAMPLE!r}{hint}")


def is_shipped(path: Path) -> bool:
    """Whether a folder came with this package; any other is a stranger's (`llava_lab.models.formats.foreign`)."""
    return path.resolve().is_relative_to(ASSETS)


def no_revision(name: str) -> str:
    """What is said to a revision of what is not at the hub."""
    return f"{name!r} has no revision beside it: only a hub id such as {EXAMPLE!r} takes one; leave revision= out"


@contextmanager
def one_line_of(path: Path) -> Iterator[None]:
    """A stranger's files may make any library stumble anywhere: CheckpointError. Where the files are ours, it is our bug."""
    try:
        yield
    except Exception as error:
        if isinstance(error, LabError) or is_shipped(path):
            raise
        raise CheckpointError(f"{path} cannot be loaded ({one_line(error)})") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or CheckpointError."""
    try:
        data = json.loads(regular_file(path, CheckpointError).read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; expected a transformers LLaVA folder") from None
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({one_line(error)})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}; expected a JSON object")
    return data


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's weight files: safetensors when there are any, else PyTorch ``.bin``."""
    for whole, pattern in (("model.safetensors", "model-*.safetensors"), ("pytorch_model.bin", "pytorch_model-*.bin")):
        shards = (file for file in folder.glob(pattern) if file.is_file())
        files = [folder / whole] if (folder / whole).is_file() else sorted(shards)
        if files:
            _check_shards(folder, whole, files)
            return files
    raise CheckpointError(f"{folder} has no weights; expected model.safetensors, its shards, or pytorch_model.bin")


def count_parameters(files: list[Path]) -> int:
    """Parameters in the files: exact from safetensors heads, from the size at 16 bits for ``.bin``."""
    return sum(
        sum(map(math.prod, tensor_shapes(file).values())) if file.suffix == ".safetensors" else file.stat().st_size // 2
        for file in files
    )


def weight_names(files: list[Path]) -> set[str]:
    """Names of the tensors: from safetensors heads, from the index of ``.bin`` shards; a single ``.bin`` tells none."""
    if files[0].suffix == ".safetensors":
        return {name for file in files for name in tensor_shapes(file)}
    index = files[0].parent / "pytorch_model.bin.index.json"
    return set(_weight_map(index)) if index.is_file() else set()


def _shipped(name: str) -> Folder:
    path = NAMES[name]
    if not (path / "config.json").is_file():
        remedy = "install the package again or train it anew" if name == "tiny" else f"make it with: {ABLATE}; then {SHIP}"
        raise CheckpointError(f"the shipped model {name!r} is missing at {path}; {remedy}")
    return Folder(path, name, f"shipped with llava-lab ({name})")


def _from_hub(repo: str, revision: str | None) -> Folder:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    pinned = f"{repo}@{revision}" if revision else repo
    try:
        path = Path(snapshot_download(repo, revision=revision, allow_patterns=[*_SMALL_FILES, "*.safetensors"]))
        if not any(path.glob("*.safetensors")):
            path = Path(snapshot_download(repo, revision=revision, allow_patterns=[*_SMALL_FILES, "pytorch_model*.bin"]))
    except GatedRepoError:
        raise CheckpointError(f"{repo} asks for its terms to be accepted first, on its page at the hub, and a login") from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"the hub has no model {repo!r} (or it is private); for example {EXAMPLE!r} is there") from None
    except RevisionNotFoundError:
        raise CheckpointError(f"the hub has no {pinned}; a revision is a commit, tag or branch of its page") from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{pinned} is not in the hub cache of this machine and the hub cannot be reached; "
            "connect once, or give the folder of a copy"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{pinned} cannot be fetched from the hub ({one_line(error)})") from None
    return Folder(path, pinned, f"hub {repo} at {path.name[:12]}")


def _check_shards(folder: Path, whole: str, files: list[Path]) -> None:
    index = folder / f"{whole}.index.json"
    if files == [folder / whole] or not index.is_file():
        return
    wanted = set(_weight_map(index).values())
    missing = sorted(wanted - {file.name for file in files})
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(wanted)} weight files: {', '.join(missing[:5])}")


def _weight_map(index: Path) -> dict[str, str]:
    entries = read_json(index).get("weight_map", {})
    if not isinstance(entries, dict) or not all(isinstance(file, str) for file in entries.values()):
        raise CheckpointError(f"{index} has no weight_map from names to files")
    return entries


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file. Raises CheckpointError for one that is cut short or no such file."""
    return {name: shape for name, (_, shape) in tensor_heads(file).items()}


def tensor_heads(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, dtypes and shapes in a weight file, ``.safetensors`` or ``.bin``; no weights are read. Raises CheckpointError."""
    if file.suffix != ".safetensors":
        stored = foreign.read_bin(file, heads_only=True)
        return {name: (foreign.kind_of(value), tuple(value.shape)) for name, value in stored.items()}
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  not a dict
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file ({one_line(error)}); fetch it again") from None


@contextmanager
def whole_folder(out: Path, *, replace: bool = True, keep: bool = False) -> Iterator[Path]:
    """A new folder to fill that takes the name `out` when the block ends well, and is removed when it does not.

    An `out` that is there gives way only then; with ``replace=False`` it stays, because another process was first. With
    ``keep=True`` it keeps what it holds, and the new files take their places one by one. Raises WriteError where the
    disk does not allow it, and where `out` is a file, a device or a pipe, which is left as it is.
    """
    try:
        if out.exists() and not out.is_dir():
            raise OSError("it is there and is no folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except (OSError, ValueError) as error:
        raise WriteError.of(out, error) from error
    old = part.with_name(f"{part.name}.old")
    try:
        yield part
        if keep and out.is_dir():
            for file in sorted(part.iterdir()):
                os.replace(file, out / file.name)
            return
        part.chmod(0o755)
        if replace and out.exists():
            os.replace(out, old)
        try:
            os.replace(part, out)
        except OSError:
            if replace or not out.is_dir():
                raise
    except BaseException as error:
        if old.exists() and not out.exists():
            os.replace(old, out)
        # safetensors has its own name for a full disk
        if isinstance(error, (OSError, SafetensorError)) and not isinstance(error, WriteError):
            raise WriteError.of(out, error) from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True)
class Family:
    """How checkpoints of one ``model_type`` are loaded. Classes are named, so that nothing is imported before its use."""

    model_type: str
    known: str  # checkpoints that belong to it
    config: str  # this and the next two are in transformers
    model: str
    processor: str
    tiles: bool = False  # looks at a picture whole and in tiles

    def classes(self) -> tuple[Any, Any, Any]:
        """Its configuration, model and processor classes."""
        package = importlib.import_module("transformers")
        return getattr(package, self.config), getattr(package, self.model), getattr(package, self.processor)


_ALL = (
    Family(
        "llava",
        "LLaVA-1.5, BakLLaVA and others with one square",
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        "LlavaProcessor",
    ),
    Family(
        "llava_next",
        "LLaVA-NeXT (1.6), the picture whole and in tiles",
        "LlavaNextConfig",
        "LlavaNextForConditionalGeneration",
        "LlavaNextProcessor",
        tiles=True,
    ),
    Family(
        "llava_onevision",
        "LLaVA-OneVision, the same with at most so many tiles",
        "LlavaOnevisionConfig",
        "LlavaOnevisionForConditionalGeneration",
        # joins tokenizer and image processor; OneVision's own wants torchvision, for its videos
        "LlavaNextProcessor",
        tiles=True,
    ),
)
FAMILIES = MappingProxyType({family.model_type: family for family in _ALL})
ADAPTER = "its model, configuration and processor classes, and a Lab that finds each image token's place in sequence and picture"


def family(model_type: Any, where: Any) -> Family:
    """The family a ``model_type`` names. Raises CheckpointError (one line) that says what an adapter for another would need."""
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"{where} holds a model of type {model_type!r}; expected one of {', '.join(map(repr, FAMILIES))}. "
            f"An adapter for it (llava_lab/models/folders.py) needs {ADAPTER}"
        )
    return FAMILIES[model_type]


def family_of(folder: Path) -> Family:
    """The family of a folder in the transformers format."""
    return family(read_json(folder / "config.json").get("model_type"), folder)


def build_processor(folder: Path, model: PreTrainedModel, family: Family) -> Any:
    """The family's processor from the files of a folder: tokenizer.json, the PIL image processor, the chat template."""
    return join_processor(family.classes()[2], image_processor(folder), _tokenizer(folder), model, chat_template(folder))


def join_processor(kind: Any, images: Any, tokenizer: Any, model: PreTrainedModel, template: str | None) -> Any:
    """A processor of class `kind` that counts as many image tokens as `model` makes."""
    config: Any = model.config
    return kind(
        images,
        tokenizer,
        patch_size=layout.processor_patch(model),
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(layout.has_class_token(model)),
        chat_template=template,
    )


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    try:
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        from transformers import AutoTokenizer  # only a folder without tokenizer.json needs conversion

        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception on a malformed file
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded ({one_line(error)})") from None


def image_settings(folder: Path) -> dict[str, Any]:
    """What a folder says about its image processor, in its own file or within the processor's; empty where it says nothing."""
    own, joint = folder / "preprocessor_config.json", folder / "processor_config.json"
    settings = read_json(own) if own.is_file() else {}
    return settings or (read_json(joint).get("image_processor") or {} if joint.is_file() else {})


def image_processor(folder: Path) -> Any:
    """The checkpoint's image processor in its Pillow form, which is what LLaVA itself used."""
    settings = image_settings(folder)
    foreign.check_config(settings, 0, folder / "preprocessor_config.json")
    for name in ("image_mean", "image_std", "rescale_factor"):
        said = settings.get(name)
        numbers = said if isinstance(said, list) else [] if said is None else [said]
        if not all(
            isinstance(value, (int, float)) and math.isfinite(value) and (value or name == "image_mean") for value in numbers
        ):
            raise CheckpointError(f"{folder} has an image processor with {name} {str(numbers)[:60]}; expected numbers")
        if isinstance(said, list) and len(said) != CHANNELS:
            raise CheckpointError(f"{folder} has an image processor with {name} {str(said)[:60]}; expected one for each colour")
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
    elif kind == "LlavaImageProcessor":
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil as Processor
    elif kind in ("CLIPImageProcessor", "CLIPFeatureExtractor"):
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    else:
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return Processor.from_dict(settings)


def _default_template(template: Any, where: Path) -> str:
    """The one to chat with, where a file holds several by name, as a list or as an object. Raises CheckpointError."""
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        template = {entry.get("name"): entry.get("template") for entry in template}
    if isinstance(template, dict):
        template = template.get("default", next(iter(template.values())) if len(template) == 1 else None)
    if not isinstance(template, str):
        raise CheckpointError(
            f"{where} holds a chat_template that is no text; expected one, or several with 'default' among them"
        )
    return template


def chat_template(folder: Path) -> str | None:
    """The text of a folder's chat template, from whichever of the files transformers has kept it in."""
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and (template := read_json(folder / name).get("chat_template")):
            return _default_template(template, folder / name)
    jinja = folder / "chat_template.jinja"
    return jinja.read_text(encoding="utf-8", errors="replace") if jinja.is_file() else None
