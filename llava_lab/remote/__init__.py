"""Closed models behind a server: asked and explained within a budget."""

from llava_lab.remote.black_box import BlackBox
from llava_lab.remote.explain import estimate

__all__ = [
    "BlackBox",
    "estimate",
]
