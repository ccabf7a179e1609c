"""What a method needs of the weights, said before it starts: gradients, or weights that are plain numbers.

Weights packed into 8 or 4 bits (bitsandbytes) answer questions, but their gradients are not those of the model that was
trained, and they cannot be read. Weights that wait elsewhere (`device_map` with offloading) are not there to be read either.
Every other method only runs the model, and works with both.
"""

from __future__ import annotations

from torch import nn

from llava_lab.errors import OptionError
from llava_lab.models import layout

GRADIENTS = frozenset(
    {"relevancy", "gradient_input", "integrated_gradients", "smoothgrad", "gradcam"},
)
PLAIN_WEIGHTS = frozenset({"value_attention", "direct_logit", "logit_lens_map", "tam"})


def refuse_unable(model: nn.Module, method: str, name: str) -> None:
    """Raises OptionError (one line) where `method` needs what `model` does not have."""
    packed, away = layout.is_quantized(model), layout.is_offloaded(model)
    if not packed and not away:
        return
    what = "gradients" if method in GRADIENTS else "plain weights" if method in PLAIN_WEIGHTS else None
    if what is None:
        return
    has = "weights packed into 8 or 4 bits" if packed else "weights that wait off the device (device_map)"
    mend = "without quantization" if packed else "on a device that holds it whole"
    raise OptionError(f"method {method!r} needs {what}, and {name!r} has {has}; load it {mend}, or use method='occlusion'")
