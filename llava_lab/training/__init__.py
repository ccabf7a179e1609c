"""Training: the recipe as data, and the stages that make a small LLaVA from nothing."""

from llava_lab.training.recipe import TINY, Architecture, Recipe, Stage
from llava_lab.training.tiny import STAGES, train

__all__ = ["STAGES", "TINY", "Architecture", "Recipe", "Stage", "train"]
