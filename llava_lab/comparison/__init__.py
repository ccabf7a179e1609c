"""MLP against linear, and the rest: connectors trained and compared in a controlled way, and what a stand-in changes."""

from llava_lab.comparison.compare import compare_connectors
from llava_lab.comparison.effect import linear_effect
from llava_lab.comparison.plan import ABLATION

__all__ = ["ABLATION", "compare_connectors", "linear_effect"]
