"""What image tokens say: read as words, compared with the vocabulary, probed with straight lines, measured as a cloud."""

from llava_lab.probes.geometry import token_geometry
from llava_lab.probes.jacobian import JacobianLens, fit_jacobian
from llava_lab.probes.lens import TunedLens, activation_map, hallucination_check, logit_lens, naming_share, train_lens
from llava_lab.probes.linear import PATCH_LABELS, linear_probe, patch_labels
from llava_lab.probes.nearest import nearest_words
from llava_lab.probes.sinks import sinks

__all__ = [
    "JacobianLens",
    "PATCH_LABELS",
    "TunedLens",
    "activation_map",
    "fit_jacobian",
    "hallucination_check",
    "linear_probe",
    "logit_lens",
    "naming_share",
    "nearest_words",
    "patch_labels",
    "sinks",
    "token_geometry",
    "train_lens",
]
