"""What image tokens say: read as words, compared with the vocabulary, probed with straight lines, measured as a cloud."""

from llava_lab.probes.geometry import token_geometry
from llava_lab.probes.labels import PATCH_LABELS, patch_labels
from llava_lab.probes.lens import activation_map, hallucination_check, logit_lens
from llava_lab.probes.linear import linear_probe
from llava_lab.probes.naming import naming_share
from llava_lab.probes.nearest import nearest_words
from llava_lab.probes.tuned import TunedLens, train_lens

__all__ = [
    "PATCH_LABELS",
    "TunedLens",
    "activation_map",
    "hallucination_check",
    "linear_probe",
    "logit_lens",
    "naming_share",
    "nearest_words",
    "patch_labels",
    "token_geometry",
    "train_lens",
]
