"""Figures drawn from results with matplotlib, one function each."""

from llava_lab.plots.ablation import accuracies, differences, sweep
from llava_lab.plots.diagrams import Box, circuit, journey, mark_sinks, matrices, patch_mosaic, sinks
from llava_lab.plots.maps import Scale, color_scale, compare_figure, overlay, segment_bars, words_figure
from llava_lab.plots.scores import (
    agreement,
    by_type,
    comparison,
    curve,
    curves,
    dots,
    flows,
    leaderboard,
    mean_sweep,
    pruning,
    sanities,
    sanity,
    sanity_maps,
    stays,
)

__all__ = [
    "Box",
    "Scale",
    "accuracies",
    "agreement",
    "by_type",
    "circuit",
    "color_scale",
    "compare_figure",
    "comparison",
    "curve",
    "curves",
    "differences",
    "dots",
    "flows",
    "journey",
    "leaderboard",
    "mark_sinks",
    "matrices",
    "mean_sweep",
    "overlay",
    "patch_mosaic",
    "pruning",
    "sanities",
    "sanity",
    "sanity_maps",
    "segment_bars",
    "sinks",
    "stays",
    "sweep",
    "words_figure",
]
