"""Connectors compared in a controlled way: plan, runs, statistics, what ships."""

from llava_lab.comparison.compare import compare_connectors
from llava_lab.comparison.plan import ABLATION

__all__ = [
    "ABLATION",
    "compare_connectors",
]
