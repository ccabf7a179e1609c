"""A model as a small folder: matrices as bytes with one scale per output row, and the vision tower left to ``tiny``.

Several models that differ in what was trained after a frozen tower need not carry it each. A compact folder has
config.json, tokenizer and image processor as any other, and ``compact.safetensors``: matrices as int8 with a float32
scale per row (``max|row| / 127``, rounded to nearest), everything else in float32. Its metadata names the tower's model
and the tower's fingerprint. Reading makes float32 matrices again and takes the tower from there; what does not fit is
one line. `write_compact` writes such folders; what rounding does to answers is measured where one is made
(`llava_lab.comparison.ship`).

    weights = read(NAMES["tiny-linear"])
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava_lab.errors import CheckpointError, one_line
from llava_lab.models import folders
from llava_lab.models.card import weights_fingerprint

FILE = "compact.safetensors"
FORMAT = "int8 rows, 1"  # raised when the file's meaning changes
SCALE = ".row_scale"  # after the name of the matrix it belongs to
TOWER = "tiny"
TOWERS = ("vision_tower.", "model.vision_tower.")  # how the names of a tower's weights begin in a file


def read(folder: str | os.PathLike) -> dict[str, Tensor]:
    """Every weight of the model in a compact folder, under the names a whole checkpoint has; float32, the tower as it lies.

    Raises CheckpointError (one line) for a file that is not whole, of another format, or of another tower.
    """
    path = Path(folder) / FILE
    packed, metadata = read_tensors(path)
    if metadata.get("compact") != FORMAT:
        other = metadata.get("compact")
        raise CheckpointError(f"{path} has compact format {other!r}; expected {FORMAT!r}: write it again with this version")
    name = metadata.get("tower", "")
    shared = tower_weights(name)
    if (mine := weights_fingerprint(shared)) != metadata.get("tower_fingerprint"):
        raise CheckpointError(
            f"{path} was written beside a tower {metadata.get('tower_fingerprint')}, and {name!r} now has {mine}; "
            "the two do not belong together: write it again"
        )
    return unpack(packed, path) | shared


def is_compact(folder: Path) -> bool:
    """Whether a folder is of this format."""
    return (folder / FILE).is_file()


def unpack(packed: Mapping[str, Tensor], path: Path | str = FILE) -> dict[str, Tensor]:
    """Matrices again, each value within half a scale of what it was. Raises CheckpointError where a scale does not fit."""
    weights: dict[str, Tensor] = {}
    for name, value in packed.items():
        if name.endswith(SCALE):
            if packed.get(name.removesuffix(SCALE), value).dtype != torch.int8:
                raise CheckpointError(f"{path} has scales {name} and no matrix of bytes for them; write it again")
            continue
        if value.dtype != torch.int8:
            weights[name] = value
            continue
        scale = packed.get(name + SCALE)
        if scale is None or value.ndim != 2 or scale.shape != value.shape[:1]:
            has = "no scales" if scale is None else f"scales {tuple(scale.shape)}"
            raise CheckpointError(
                f"{path} has {name} {tuple(value.shape)} with {has}; expected one scale per row: write it again"
            )
        weights[name] = value.float() * scale[:, None]
    return weights


def tower_weights(name: str) -> dict[str, Tensor]:
    """The vision tower's weights of a shipped model, as they lie there."""
    if name not in folders.NAMES:
        raise CheckpointError(f"a compact model names a shipped model for its tower ({TOWER!r}), got {name!r}")
    weights: dict[str, Tensor] = {}
    for file in folders.weight_files(folders.find(name).path):
        weights |= read_tensors(file, only=TOWERS)[0]
    return weights


def read_tensors(file: Path, only: tuple[str, ...] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of one safetensors file."""
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file} is not safetensors; save the model with save_pretrained first")
    try:
        with safe_open(file, framework="pt") as opened:
            names = [name for name in opened.keys() if only is None or name.startswith(only)]  # noqa: SIM118  not a dict
            return {name: opened.get_tensor(name) for name in names}, dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file ({one_line(error)}); make it again") from None
