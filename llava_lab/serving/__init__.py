"""A lab behind an OpenAI-compatible address on this machine (`llava-lab serve`). Needs the extra ``serve``."""

from llava_lab.serving.server import Server

__all__ = [
    "Server",
]
