"""A lab as a model of VLMEvalKit, which is not on the package index under its name and has no entry points.

    register("tiny")
    from vlmeval.inference import infer_data_job  # knows "llava-lab-tiny" now

Written for VLMEvalKit e8e78f0 (``vlmeval/vlm/base.py``); tested against that interface, not against the package.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llava_lab.evaluation.harness.asking import answer
from llava_lab.models import Lab, load


def register(path: str | Lab, name: str | None = None) -> str:
    """Add a model to VLMEvalKit's table as ``llava-lab-NAME``, and give that name back; it is loaded when it is first asked."""
    from vlmeval.config import supported_VLM
    from vlmeval.vlm.base import BaseModel

    class LlavaLab(BaseModel):
        INTERLEAVE = False

        def __init__(self, path: str | Lab, **settings: Any) -> None:
            super().__init__()
            self.lab, self.settings = load(path) if isinstance(path, str) else path, settings

        def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
            """`message`: parts of type "image", a path, and "text"."""
            pictures = [part["value"] for part in message if part["type"] == "image"]
            text = "\n".join(part["value"] for part in message if part["type"] == "text")
            return answer(self.lab, pictures, text, settings=self.settings)[0]

    given = name or (path if isinstance(path, str) else path.name)
    key = f"llava-lab-{given}"
    supported_VLM[key] = partial(LlavaLab, path=path)
    return key
