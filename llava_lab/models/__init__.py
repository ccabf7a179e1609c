"""Loading LLaVA models and asking them."""

from llava_lab.models.card import Card
from llava_lab.models.connectors import CONNECTORS, Architecture, Connector
from llava_lab.models.lab import Lab
from llava_lab.models.load import load
from llava_lab.models.pictures import read_picture
from llava_lab.models.placement import choose_device
from llava_lab.models.swap import ForeignConnector
from llava_lab.models.text import PROMPTS, build_prompt

__all__ = [
    "Architecture",
    "CONNECTORS",
    "Card",
    "Connector",
    "ForeignConnector",
    "Lab",
    "PROMPTS",
    "build_prompt",
    "choose_device",
    "load",
    "read_picture",
]
