"""Change the model to see what an answer rests on; each intervention proves that it took effect."""

from llava_lab.interventions.ablate import ablate_tokens, ablated, ask_without, positive_control
from llava_lab.interventions.circuit import circuit
from llava_lab.interventions.interchange import interchange
from llava_lab.interventions.knockout import knocked_out, knockout, knockout_sweep
from llava_lab.interventions.patching import attribution_patch, patch, patch_nodes, patched
from llava_lab.interventions.steering import erase, erased, mean_difference, steer, steered

__all__ = [
    "ablate_tokens",
    "ablated",
    "ask_without",
    "attribution_patch",
    "circuit",
    "erase",
    "erased",
    "interchange",
    "knocked_out",
    "knockout",
    "knockout_sweep",
    "mean_difference",
    "patch",
    "patch_nodes",
    "patched",
    "positive_control",
    "steer",
    "steered",
]
