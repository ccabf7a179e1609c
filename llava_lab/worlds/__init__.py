"""Worlds: pictures we draw ourselves, with exact ground truth."""

from llava_lab.worlds import picturebook as picturebook

__all__ = ["picturebook"]
