"""What lmms-eval's registry is told by the entry point: the model's name and where its class is.

Imported by every start of the harness, so that nothing heavy is imported here.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """`llava_lab`, also as `llava-lab`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="llava_lab",
        simple_class_path="llava_lab.evaluation.harness.lmms_model.LlavaLab",
        aliases=("llava-lab",),
    )
