"""Which patches an answer came from: one registry of methods, one signature, one result."""

from llava_lab.attribution.again import ask_without
from llava_lab.attribution.base import Maps, Method
from llava_lab.attribution.fills import FILLS, fill_pixels
from llava_lab.attribution.registry import METHODS, attribute
from llava_lab.attribution.scoring import target_score
from llava_lab.attribution.targets import resolve_targets

__all__ = ["FILLS", "METHODS", "Maps", "Method", "ask_without", "attribute", "fill_pixels", "resolve_targets", "target_score"]
