"""Connectors: make one, plug it in, read and write LLaVA's projector files, and fit a linear one without training."""

from llava_lab.connectors.files import export, read_projector, save, write_projector
from llava_lab.connectors.linearize import linearize, local_linearity
from llava_lab.connectors.plug import INITS, as_connector, connector, initialize, new_connector, shuffled_tokens

__all__ = [
    "INITS",
    "as_connector",
    "connector",
    "export",
    "initialize",
    "linearize",
    "local_linearity",
    "new_connector",
    "read_projector",
    "save",
    "shuffled_tokens",
    "write_projector",
]
