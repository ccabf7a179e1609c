"""From a model's name to a folder with its files: the shipped one, a local folder, or the hub's cache.

Everything after this module sees a folder. It looks at file names and the heads of JSON and
safetensors files; it loads no weights and runs nothing that comes with a checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llava_lab.errors import CheckpointError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
ABLATION = ASSETS / "ablation"  # the shipped comparison of connectors and its models
NAMES = MappingProxyType(  # what can be loaded by a bare name
    {"tiny": ASSETS / "tiny", "tiny-linear": ABLATION / "linear", "tiny-mlp": ABLATION / "mlp2x_gelu"}
)
ABLATE = "llava-lab ablate --start runs/tiny --out runs/ablation --save runs/ablation/ablation.npz"
SHIP = "llava_lab.training.ablation_ship.ship_ablation('runs/ablation')"  # makes ABLATION of what ABLATE leaves
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
