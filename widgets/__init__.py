"""What the lab shows in a notebook. `from widgets import PatchExplorer`; it computes nothing about models."""

from widgets.compare_view import CompareView
from widgets.head_grid import HeadGrid
from widgets.patch_explorer import PatchExplorer

__all__ = ["CompareView", "HeadGrid", "PatchExplorer"]
