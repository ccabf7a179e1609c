"""Attention of the last layer alone: an attribution method in one file."""

from llava_lab.attribution.attention import read_rows
from llava_lab.attribution.heads import choose_heads
from llava_lab.attribution.method import Fusion, Maps, method
from llava_lab.models.layout import language_layers
from llava_lab.replay.targets import image_values, predicting_rows, target_rows


@method(
    truth="How much the positions that predict the target attend to each image token in the last layer.",
    source="the last layer alone",
    cost="1 forward",
    blind_to="every other layer",
    contrast=False,
)
def last_layer(lab, run, targets, *, fusion: Fusion = "mean") -> Maps:
    last = len(language_layers(lab.model))
    chosen = choose_heads(lab, (last - 1, last), None)
    at = predicting_rows(targets)
    rows = read_rows(lab, lab.inputs(run), at, chosen, fusion).fused
    return Maps(image_values(target_rows(rows, at, targets), run), {"forward": 1}, ("Attention of the last layer.",))
