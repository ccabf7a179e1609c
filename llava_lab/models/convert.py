"""Write any LLaVA that can be read here as a transformers folder: `convert`, behind ``llava-lab convert``."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlavaForConditionalGeneration

from llava_lab.errors import OptionError
from llava_lab.models import folders
from llava_lab.models.card import connector_name
from llava_lab.models.formats import original as original_config
from llava_lab.models.formats.original import Assembled, Place, assemble
from llava_lab.models.load import build_original, quiet
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
    if not original_config.is_original(folders.read_json(folder / "config.json")):
        raise OptionError(f"{folder} is not in the original LLaVA format; there is nothing to convert")
    made = assemble(folder, vision=vision, base=base)
    place = Placement(torch.device("cpu"), made.dtype, "as stored")
    with quiet():
        model = build_original(folder, made, place, "sdpa")
    _write(model, made, out)
    text = made.config.text_config
    return Converted(
        folder=out,
        source=made.source,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        connector=connector_name(model),
        vocabulary=text.vocab_size,
        image_token_id=made.config.image_token_index,
        pad_token_id=made.config.pad_token_id,
        dtype=str(made.dtype).removeprefix("torch."),
    )


def _write(model: LlavaForConditionalGeneration, made: Assembled, out: Path) -> None:
    text: Any = made.config.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        with quiet():
            model.save_pretrained(temporary)
            made.processor.save_pretrained(temporary)
        temporary.chmod(0o755)
        if out.exists():
            out.rmdir()
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
