"""Closed models behind a server: asked and explained within a budget. Imported when a server is named."""

import llava_lab.attribution  # noqa: F401
from llava_lab.remote.black_box import BlackBox, open_black_box
from llava_lab.remote.explain import estimate, refuse_inside

__all__ = [
    "BlackBox",
    "estimate",
    "open_black_box",
    "refuse_inside",
]
