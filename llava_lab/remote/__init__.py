"""Closed models behind a server: asked and explained within a budget. Imported when a server is named."""

from llava_lab.remote.black_box import BlackBox, open_black_box, open_judge
from llava_lab.remote.explain import estimate

__all__ = ["BlackBox", "estimate", "open_black_box", "open_judge"]
