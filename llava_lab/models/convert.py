"""Write any LLaVA that can be read here as a transformers folder: `convert`, behind ``llava-lab convert``.

convert("llava-v1.5-7b", "llava-v1.5-7b-hf", vision="openai/clip-vit-large-patch14-336")
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from llava_lab.errors import OptionError
from llava_lab.models import folders
from llava_lab.models.card import connector_name
from llava_lab.models.formats import original
from llava_lab.models.formats.original import Place
from llava_lab.models.load import build, quiet
from llava_lab.models.placement import Placement


@dataclass(frozen=True)
class Converted:
    """What was written, and from what."""

    folder: Path
    source: str
    parameters: int
    connector: str
    vocabulary: int
    image_token_id: int
    pad_token_id: int
    dtype: str


def convert(name: str | os.PathLike, out: str | os.PathLike, *, vision: Place = None, base: Place = None) -> Converted:
    """Write the original LLaVA folder `name` to `out` in transformers' format, in the precision it is stored in.

    The folder appears under its name only when it is whole. `vision` and `base` as for `llava_lab.load`. Raises
    OptionError (`out` is not empty, or nothing is to be converted), CheckpointError (it cannot be read exactly).
    """
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OptionError(f"{out} exists and is not an empty folder; choose another name")
    folder = folders.find(name).path
    if not original.is_original(folders.read_json(folder / "config.json")):
        raise OptionError(f"{folder} is not in the original LLaVA format; there is nothing to convert")
    with folders.one_line_of(folder):
        parts = original.assemble(folder, vision=vision, base=base)
    text: Any = parts.config.text_config
    with quiet(), folders.whole_folder(out) as part, folders.one_line_of(folder):
        stored = Placement(torch.device("cpu"), parts.dtype, "as stored")
        model = build(folder, parts.config, stored, "sdpa", weights=parts.weights, held=parts.parameters)
        model.generation_config = GenerationConfig(
            bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
        )
        model.save_pretrained(part)
        parts.processor.save_pretrained(part)
    return Converted(
        folder=out,
        source=parts.source,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        connector=connector_name(model),
        vocabulary=text.vocab_size,
        image_token_id=parts.config.image_token_index,
        pad_token_id=parts.config.pad_token_id,
        dtype=str(parts.dtype).removeprefix("torch."),
    )
