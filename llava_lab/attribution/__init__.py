"""Which patches an answer came from: one registry of methods, one signature, one result."""

from llava_lab.attribution.again import ask_without
from llava_lab.attribution.base import Maps, Method
from llava_lab.attribution.black_box import estimate
from llava_lab.attribution.compare import compare
from llava_lab.attribution.faithfulness import faithfulness
from llava_lab.attribution.fills import FILLS, fill_pixels
from llava_lab.attribution.ground_truth import ground_truth
from llava_lab.attribution.head_maps import head_maps
from llava_lab.attribution.localization import find_localization_heads
from llava_lab.attribution.registry import METHODS, attribute
from llava_lab.attribution.sanity import sanity, with_question
from llava_lab.attribution.scoring import target_score
from llava_lab.attribution.share import ImageShare, image_share
from llava_lab.attribution.targets import resolve_targets
from llava_lab.attribution.while_answering import ask_and_attribute

__all__ = [
    "FILLS",
    "METHODS",
    "ImageShare",
    "Maps",
    "Method",
    "ask_and_attribute",
    "ask_without",
    "attribute",
    "compare",
    "estimate",
    "faithfulness",
    "fill_pixels",
    "find_localization_heads",
    "ground_truth",
    "head_maps",
    "image_share",
    "resolve_targets",
    "sanity",
    "target_score",
    "with_question",
]
