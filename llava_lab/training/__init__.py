"""Training: the recipe as data, the stages that make a small LLaVA from nothing, and LLaVA's two stages on any data."""

from llava_lab.training.recipe import (
    LLAVA_1_7B,
    LLAVA_15_7B,
    LLAVA_RECIPES,
    TINY,
    Architecture,
    LlavaRecipe,
    LlavaStage,
    Lora,
    Recipe,
    Stage,
)
from llava_lab.training.rows import Source
from llava_lab.training.stages import Running, Trained, train_stage
from llava_lab.training.tiny.make import STAGES, train
from llava_lab.training.together import SharedTrained, train_connectors

__all__ = [
    "Architecture",
    "LLAVA_15_7B",
    "LLAVA_1_7B",
    "LLAVA_RECIPES",
    "LlavaRecipe",
    "LlavaStage",
    "Lora",
    "Recipe",
    "Running",
    "STAGES",
    "SharedTrained",
    "Source",
    "Stage",
    "TINY",
    "Trained",
    "train",
    "train_connectors",
    "train_stage",
]
