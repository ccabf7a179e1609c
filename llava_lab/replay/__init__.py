"""Give the model its own answer back and read it: targets, scores, fills, altered pictures, cached prefixes, words."""

from llava_lab.replay.fills import FILLS, fill_pixels
from llava_lab.replay.score import target_score
from llava_lab.replay.targets import resolve_targets

__all__ = [
    "FILLS",
    "fill_pixels",
    "resolve_targets",
    "target_score",
]
