"""Which patches an answer came from: one registry of methods, one signature, one result."""

from llava_lab.attribution.heads import find_localization_heads, head_maps
from llava_lab.attribution.image_share import ImageShare, image_share
from llava_lab.attribution.method import Maps, Method
from llava_lab.attribution.registry import METHODS, ask_and_attribute, attribute

__all__ = [
    "ImageShare",
    "METHODS",
    "Maps",
    "Method",
    "ask_and_attribute",
    "attribute",
    "find_localization_heads",
    "head_maps",
    "image_share",
]
