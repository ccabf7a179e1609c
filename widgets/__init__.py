"""What the lab shows in a notebook. `from widgets import PatchExplorer`; it computes nothing about models."""

from widgets.patch_explorer import PatchExplorer

__all__ = ["PatchExplorer"]
