"""The families of models that can be loaded, one entry each: what a checkpoint's ``model_type`` stands for.

A family is one of transformers' classes whose image tokens stand in the language model's sequence. Which tower and which
language model are inside is the checkpoint's own business: ``llava`` covers LLaVA-1.5 (Vicuna), BakLLaVA (Mistral) and any
other pair. A family that lays out its tokens in another way needs an entry here, and a `Lab` that says where they are.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llava_lab.errors import CheckpointError
from llava_lab.models import folders


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
        "llava_lab.models.tiled.TiledLab",
    ),
    Family(
        "llava_onevision",
        "LLaVA-OneVision, the same with at most so many tiles",
        "LlavaOnevisionConfig",
        "LlavaOnevisionForConditionalGeneration",
        "LlavaNextProcessor",  # joins tokenizer and image processor; OneVision's own wants torchvision, for its videos
        "llava_lab.models.tiled.TiledLab",
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
    return family(folders.read_json(folder / "config.json").get("model_type"), folder)


def _transformers(name: str) -> Any:
    return getattr(importlib.import_module("transformers"), name)
