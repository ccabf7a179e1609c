"""Worlds: pictures we draw ourselves, with exact ground truth, and adapters to small public data sets."""

from llava_lab.worlds import easy_vqa, picturebook, redcell

__all__ = [
    "easy_vqa",
    "picturebook",
    "redcell",
]
