"""Give the model its own answer back and read it: targets, scores, fills, altered pictures, cached prefixes, words."""

from llava_lab.replay.alter import Altered, open_altered
from llava_lab.replay.fills import FILLS, fill_pixels
from llava_lab.replay.score import target_score
from llava_lab.replay.targets import resolve_targets

__all__ = [
    "Altered",
    "FILLS",
    "fill_pixels",
    "open_altered",
    "resolve_targets",
    "target_score",
]
