"""Training: the recipe as data, the stages that make a small LLaVA from nothing, and LLaVA's two stages on any data."""

from llava_lab.training.ablation_plan import ABLATION
from llava_lab.training.llava_data import Source
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
from llava_lab.training.shared_steps import SharedTrained, train_connectors
from llava_lab.training.tiny import STAGES, train
from llava_lab.training.two_stages import Running, Trained, train_stage

__all__ = ["STAGES", "TINY", "Architecture", "Recipe", "Stage", "train"]
__all__ += ["ABLATION", "SharedTrained", "train_connectors", "train_stage", "Running", "Source", "Trained"]
__all__ += ["LLAVA_15_7B", "LLAVA_1_7B", "LLAVA_RECIPES", "LlavaRecipe", "LlavaStage", "Lora"]
