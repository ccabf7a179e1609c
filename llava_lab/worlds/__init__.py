"""Worlds: pictures we draw ourselves, with exact ground truth."""

from llava_lab.worlds import picturebook as picturebook
from llava_lab.worlds import redcell as redcell

__all__ = ["picturebook", "redcell"]
