"""A model as a small folder: matrices as bytes with one scale per output row, and the vision tower left to ``tiny``.

Several models that differ in what was trained after a frozen tower need not carry it each. A compact folder has
config.json, tokenizer and image processor as any other, and ``compact.safetensors``: matrices as int8 with a float32
scale per row (``max|row| / 127``, rounded to nearest), everything else in float32. Its metadata names the tower's model
and the tower's fingerprint. Reading makes float32 matrices again and takes the tower from there; what does not fit is
one line. Rounding changes the numbers a little: what that does to answers is measured where such a folder is made
(`llava_lab.comparison.ship`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llava_lab.errors import CheckpointError, OptionError
from llava_lab.models import folders
from llava_lab.models.card import fingerprint

FILE = "compact.safetensors"
FORMAT = "int8 rows, 1"  # raised when the file's meaning changes
SCALE = ".row_scale"  # after the name of the matrix it belongs to
TOWER = "tiny"
SMALL_FILES = (
    *("config.json", "generation_config.json", "chat_template.jinja", "chat_template.json", "processor_config.json"),
    *("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "README.md"),
)

_LEVELS = 127  # of int8 on either side of 0; -128 is not used
_TOWERS = ("vision_tower.", "model.vision_tower.")  # how its weights' names begin in a file


def write(source: str | os.PathLike, out: str | os.PathLike, *, tower: str = TOWER) -> Path:
    """Write the checkpoint in folder `source` as a compact folder `out`, and return its path.

    `tower` is the shipped model whose vision tower it shares: `source`'s, rounded to that one's dtype, must be it bit for
    bit. Written under another name first, so `out` is there whole or not at all. Raises CheckpointError for another tower
    or weights that are not finite, OptionError when `out` is there already.
    """
    out = Path(out)
    found = folders.find(source).path
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OptionError(f"{out} is there already; remove it or give another folder")
    weights: dict[str, Tensor] = {}
    for file in folders.weight_files(found):
        weights |= _tensors(file)[0]
    own, kept = _split(weights)
    shared = _tower(tower)
    _same_tower(own, shared, found, tower)
    metadata = {"format": "pt", "compact": FORMAT, "tower": tower, "tower_fingerprint": _print(shared)}
    with whole(out) as part:
        for name in SMALL_FILES:
            if (found / name).is_file():
                shutil.copyfile(found / name, part / name)
        save_file(pack(kept), part / FILE, metadata=metadata)
        (part / FILE).chmod(0o644)
    return out


def read(folder: str | os.PathLike) -> dict[str, Tensor]:
    """Every weight of the model in a compact folder, under the names a whole checkpoint has; float32, the tower as it lies.

    Raises CheckpointError (one line) for a file that is not whole, of another format, or of another tower.
    """
    path = Path(folder) / FILE
    packed, metadata = _tensors(path)
    if metadata.get("compact") != FORMAT:
        said = metadata.get("compact")
        raise CheckpointError(f"{path} has compact format {said!r}; expected {FORMAT!r}: write it again with this version")
    name = metadata.get("tower", "")
    shared = _tower(name)
    if (mine := _print(shared)) != metadata.get("tower_fingerprint"):
        raise CheckpointError(
            f"{path} was written beside a tower {metadata.get('tower_fingerprint')}, and {name!r} now has {mine}; "
            "the two do not belong together: write it again"
        )
    return unpack(packed, path) | shared


def is_compact(folder: Path) -> bool:
    """Whether a folder is of this format."""
    return (folder / FILE).is_file()


def count(folder: Path) -> int:
    """Parameters of the model in a compact folder, its tower with it."""
    packed, metadata = _tensors(folder / FILE)
    own = sum(value.numel() for name, value in packed.items() if not name.endswith(SCALE))
    return own + sum(value.numel() for value in _tower(metadata.get("tower", "")).values())


def pack(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices as int8 with their row scales, the rest in float32. Raises CheckpointError for what is not finite."""
    packed: dict[str, Tensor] = {}
    for name, value in weights.items():
        exact = value.detach().float()
        if not bool(torch.isfinite(exact).all()):
            raise CheckpointError(f"{name} holds numbers that are not finite; a diverged model cannot be kept as bytes")
        if exact.ndim != 2:
            packed[name] = exact.contiguous()
            continue
        scale = exact.abs().amax(1) / _LEVELS
        steps = exact / torch.where(scale > 0, scale, torch.ones_like(scale))[:, None]  # a row of zeros stays one
        packed[name] = steps.round().clamp(-_LEVELS, _LEVELS).to(torch.int8)
        packed[name + SCALE] = scale
    return packed


def unpack(packed: Mapping[str, Tensor], path: Path | str = FILE) -> dict[str, Tensor]:
    """What `pack` took apart, within half a scale of what it was. Raises CheckpointError where a scale does not fit."""
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


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A folder to fill that takes the name `out` when the block ends well, and is removed when it does not.

    An `out` that is there gives way only then.
    """
    part, old = (out.with_name(f".{out.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if out.exists():
            os.replace(out, old)
        os.replace(part, out)
    except BaseException:
        if old.exists() and not out.exists():
            os.replace(old, out)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _split(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the tower's, the rest)."""
    tower = {name: value for name, value in weights.items() if name.startswith(_TOWERS)}
    return tower, {name: value for name, value in weights.items() if name not in tower}


def _tower(name: str) -> dict[str, Tensor]:
    """The vision tower's weights of a shipped model, as they lie there."""
    if name not in folders.NAMES:
        raise CheckpointError(f"a compact model names a shipped model for its tower ({TOWER!r}), got {name!r}")
    found: dict[str, Tensor] = {}
    for file in folders.weight_files(folders.find(name).path):
        found |= _tensors(file, only=_TOWERS)[0]
    return found


def _same_tower(own: Mapping[str, Tensor], shared: Mapping[str, Tensor], source: Path, name: str) -> None:
    """Refuse a tower that is not the shared one: names, shapes, fingerprint and every bit, after rounding to its dtype."""
    odd = sorted(set(own) ^ set(shared)) or [key for key in own if own[key].shape != shared[key].shape]
    rounded = {} if odd else {key: own[key].to(shared[key].dtype) for key in own}
    odd = odd or [key for key in rounded if not torch.equal(rounded[key], shared[key])]
    if not shared or odd or _print(rounded) != _print(shared):
        raise CheckpointError(
            f"the vision tower in {source} is not that of {name!r} ({len(odd)} of {len(shared)} weights differ, e.g. "
            f"{odd[0] if odd else 'none'}); only a model trained behind that frozen tower can leave it out"
        )


class _Held(nn.Module):
    """Weights by name, to take their fingerprint without building a model."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.weights = dict(sorted(weights.items()))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        return iter(self.weights.items())


def _print(weights: Mapping[str, Tensor]) -> str:
    return fingerprint(_Held(weights))


def _tensors(file: Path, only: tuple[str, ...] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of one safetensors file."""
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file} is not safetensors; save the model with save_pretrained first")
    try:
        with safe_open(file, framework="pt") as opened:
            names = [name for name in opened.keys() if only is None or name.startswith(only)]  # noqa: SIM118  not a dict
            return {name: opened.get_tensor(name) for name in names}, dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({' '.join(str(error).split())[:200]}); make it again"
        ) from None
