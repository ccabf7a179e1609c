"""What the lab shows in a notebook. `from widgets import PatchExplorer`."""

from widgets.compare_view import CompareView
from widgets.connector_bench import ConnectorBench, seen
from widgets.explore import Explore
from widgets.flow_view import FlowView
from widgets.head_grid import HeadGrid
from widgets.loss_plot import LossPlot
from widgets.patch_explorer import PatchExplorer
from widgets.token_lens import TokenLens

__all__ = ["CompareView", "ConnectorBench", "Explore", "FlowView", "HeadGrid", "LossPlot", "PatchExplorer", "TokenLens", "seen"]
