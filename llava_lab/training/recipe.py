"""Recipes as plain data. An experiment is a recipe with one field changed (`dataclasses.replace`).

`TINY` makes the shipped model in LLaVA's published order: a vision tower and a language model
first, each on its own, then stage 1 (connector only, captions) and stage 2 (connector and
language model, conversations). Sources: LLaVA-1.5, arXiv 2310.03744, section 3 and Table 9;
haotian-liu/LLaVA @ c121f04 ``scripts/v1_5``. Sizes and rates are our own, for two CPU cores.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Architecture:
    """Sizes of a small LLaVA; every part is a stock transformers class."""

    image: int = 96
    patch: int = 8
    vision_width: int = 192
    vision_layers: int = 5
    vision_heads: int = 3
    vision_mlp: int = 768
    hidden: int = 256
    layers: int = 6
    heads: int = 8
    mlp: int = 640
    vocabulary: int = 1024
    context: int = 2048
    feature_layer: int = -2

    @property
    def grid(self) -> int:
        return self.image // self.patch


@dataclass(frozen=True)
class Stage:
    """One stage: what trains, for how long, how fast."""

    name: str
    trains: tuple[str, ...]  # parts of the model that change; everything else keeps its bits
    steps: int
    batch: int
    rate: float  # AdamW: embeddings, norms, biases, heads
    matrix_rate: float = 0.0  # Muon for weight matrices; 0 gives them to AdamW too
    warmup: float = 0.03  # share of the steps, LLaVA's own
    final: float = 0.02  # the rate ends at this share of its peak
    decay: float = 0.0
    clip: float = 1.0
    turns: int = 0  # questions per picture
    early: int = 0  # stage language: steps of mostly single facts before mostly whole questions


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, with the seed."""

    name: str = "tiny"
    seed: int = 0
    pictures: int = 100_000  # drawn once, shared by every stage
    architecture: Architecture = field(default_factory=Architecture)
    tower: Stage = Stage("tower", ("vision_tower",), steps=1300, batch=64, rate=1e-3, matrix_rate=0.02)
    language: Stage = Stage(
        "language",
        ("language_model", "lm_head"),
        steps=4200,
        batch=12,
        rate=1e-3,
        matrix_rate=0.01,
        decay=0.05,
        turns=8,
        early=1200,
    )
    align: Stage = Stage("align", ("multi_modal_projector",), steps=300, batch=16, rate=1e-3, matrix_rate=0.02)
    instruct: Stage = Stage(
        "instruct",
        ("multi_modal_projector", "language_model", "lm_head"),
        steps=3200,
        batch=12,
        rate=1e-3,
        matrix_rate=0.01,
        decay=0.05,
        turns=8,
    )

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.tower, self.language, self.align, self.instruct


TINY = Recipe()
