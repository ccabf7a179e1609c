"""Connectors: make one, plug it in, read and write LLaVA's projector files, and fit a linear one without training."""

from llava_lab.connectors.export import export, save
from llava_lab.connectors.files import read_projector, write_projector
from llava_lab.connectors.linearize import linearize
from llava_lab.connectors.local import local_linearity
from llava_lab.connectors.make import INITS, initialize, new_connector
from llava_lab.connectors.plug import as_connector, connector, shuffled_tokens
from llava_lab.models.projector_parts import Connector
from llava_lab.models.projectors import CONNECTORS, Architecture
from llava_lab.models.swapping import ForeignConnector

__all__ = ["CONNECTORS", "INITS", "Architecture", "Connector", "ForeignConnector", "as_connector", "connector", "export"]
__all__ += ["initialize", "linearize", "local_linearity", "new_connector", "read_projector", "save", "shuffled_tokens"]
__all__ += ["write_projector"]
