"""Look inside a forward while it runs, keep only what was asked for, leave nothing behind."""

from llava_lab.capture.answering import AnswerRows
from llava_lab.capture.quiet import undisturbed
from llava_lab.capture.reducers import FUSIONS, Full, HeadRows, LayerByLayer, PickedRows, fuse_heads
from llava_lab.capture.watch import CHUNK, Norms, Reducer, watch_attention

__all__ = [
    "CHUNK",
    "FUSIONS",
    "AnswerRows",
    "Full",
    "HeadRows",
    "LayerByLayer",
    "Norms",
    "PickedRows",
    "Reducer",
    "fuse_heads",
    "undisturbed",
    "watch_attention",
]
