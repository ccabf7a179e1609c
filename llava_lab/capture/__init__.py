"""Look inside a forward while it runs, keep only what was asked for, leave nothing behind."""

from llava_lab.capture.reducers import FUSIONS, AnswerRows, Full, HeadRows, LayerByLayer, PickedRows, fuse_heads
from llava_lab.capture.watch import CHUNK, Norms, Reducer, evaluating, hooked, random_states_kept, undisturbed, watch_attention

__all__ = [
    "AnswerRows",
    "CHUNK",
    "FUSIONS",
    "Full",
    "HeadRows",
    "LayerByLayer",
    "Norms",
    "PickedRows",
    "Reducer",
    "evaluating",
    "fuse_heads",
    "hooked",
    "random_states_kept",
    "undisturbed",
    "watch_attention",
]
