"""Write a checkpoint as a compact folder, see `llava_lab.models.formats.compact`; what ships of the comparison is kept so.

write("runs/ablation/models/linear-1", "assets/ablation/linear")
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from llava_lab.errors import CheckpointError, OptionError
from llava_lab.models import folders
from llava_lab.models.card import weights_fingerprint
from llava_lab.models.formats import compact

LEVELS = 127  # of int8 on either side of 0; -128 is not used
SMALL_FILES = (
    *("config.json", "generation_config.json", "chat_template.jinja", "chat_template.json", "processor_config.json"),
    *("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "README.md"),
)


def write(source: str | os.PathLike, out: str | os.PathLike, *, tower: str = compact.TOWER) -> Path:
    """Write the checkpoint in folder `source` as a compact folder `out`, and return its path.

    `tower` is the shipped model whose vision tower it shares: `source`'s, rounded to that one's dtype, must be it bit for
    bit. Written under another name first, so `out` is there whole or not at all. Raises CheckpointError for another tower
    or weights that are not finite, OptionError when `out` is there already.
    """
    out = Path(out)
    folder = folders.find(source).path
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OptionError(f"{out} is there already; remove it or give another folder")
    weights: dict[str, Tensor] = {}
    for file in folders.weight_files(folder):
        weights |= compact.read_tensors(file)[0]
    own = {name: value for name, value in weights.items() if name.startswith(compact.TOWERS)}
    shared = compact.tower_weights(tower)
    _same_tower(own, shared, folder, tower)
    metadata = {"format": "pt", "compact": compact.FORMAT, "tower": tower, "tower_fingerprint": weights_fingerprint(shared)}
    with folders.whole_folder(out) as part:
        for name in SMALL_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, part / name)
        save_file(pack({name: weights[name] for name in weights.keys() - own.keys()}), part / compact.FILE, metadata=metadata)
        (part / compact.FILE).chmod(0o644)
    return out


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
        scale = exact.abs().amax(1) / LEVELS
        steps = exact / torch.where(scale > 0, scale, torch.ones_like(scale))[:, None]  # a row of zeros stays one
        packed[name] = steps.round().clamp(-LEVELS, LEVELS).to(torch.int8)
        packed[name + compact.SCALE] = scale
    return packed


def _same_tower(own: Mapping[str, Tensor], shared: Mapping[str, Tensor], source: Path, name: str) -> None:
    """Refuse a tower that is not the shared one: names, shapes, fingerprint and every bit, after rounding to its dtype."""
    odd = sorted(set(own) ^ set(shared)) or [key for key in own if own[key].shape != shared[key].shape]
    rounded = {} if odd else {key: own[key].to(shared[key].dtype) for key in own}
    odd = odd or [key for key in rounded if not torch.equal(rounded[key], shared[key])]
    if not shared or odd or weights_fingerprint(rounded) != weights_fingerprint(shared):
        raise CheckpointError(
            f"the vision tower in {source} is not that of {name!r} ({len(odd)} of {len(shared)} weights differ, e.g. "
            f"{odd[0] if odd else 'none'}); only a model trained behind that frozen tower can leave it out"
        )
