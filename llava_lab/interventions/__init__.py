"""Touching the model to see what an answer rests on; each intervention proves that it took effect."""

from llava_lab.interventions.ablate import ablate_tokens as ablate_tokens
from llava_lab.interventions.ablate import ablated as ablated
from llava_lab.interventions.knockout import knocked_out as knocked_out
from llava_lab.interventions.knockout import knockout as knockout
from llava_lab.interventions.patching import patch as patch
from llava_lab.interventions.patching import patched as patched
from llava_lab.interventions.positive_control import positive_control as positive_control
from llava_lab.interventions.steering import erase as erase
from llava_lab.interventions.steering import erased as erased
from llava_lab.interventions.steering import mean_difference as mean_difference
from llava_lab.interventions.steering import steer as steer
from llava_lab.interventions.steering import steered as steered
from llava_lab.interventions.sweep import knockout_sweep as knockout_sweep
