"""Write a lab as a folder: with its connector as it is, or as stock transformers loads it without this library.

`save` keeps the connector's type in config.json; `llava_lab.load` reads it back bit for bit, stock transformers does not
know the type. `export` rewrites what can be said exactly in the stock projector's two layers. A linear map becomes its
own first layer, the second being the identity and the activation "linear": the same numbers, bit for bit, with more
parameters. It is for sharing and serving, not for training on.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llava_lab.errors import OptionError
from llava_lab.models import projectors
from llava_lab.models.projector_parts import Connector
from llava_lab.models.swapping import Plug

if TYPE_CHECKING:
    from llava_lab.models import Lab

EXPORTED = ("linear", "mlp1x_gelu", "mlp2x_gelu", "linear2x", "identity")


def save(lab: Lab, folder: str | os.PathLike) -> Path:
    """Write model, tokenizer and image processor; ``llava_lab.load(folder)`` gives them back bit for bit."""
    folder = Path(folder)
    lab.model.save_pretrained(folder)
    lab.processor.save_pretrained(folder)
    return folder


def export(lab: Lab, folder: str | os.PathLike) -> Path:
    """Write a folder that stock ``LlavaForConditionalGeneration.from_pretrained`` loads, giving the same numbers.

    Possible for linear, mlp1x_gelu, mlp2x_gelu, linear2x and identity; raises OptionError for the others. The lab is
    left as it is.
    """
    module: Any = lab.connector
    if not isinstance(module, Connector):
        return save(lab, folder)
    if module.kind not in EXPORTED:
        raise OptionError(f"stock transformers has no {module.kind!r}; can be exported: {', '.join(EXPORTED)}")
    stock = _as_stock(module, lab)
    stock.trained_with = {}  # type: ignore[assignment]
    plug = Plug(lab, stock)
    try:
        plug.apply()
        return save(lab, folder)
    finally:
        plug.undo()


def _as_stock(module: Any, lab: Lab) -> nn.Module:
    """The stock projector with the same function."""
    config = copy.copy(lab.model.config)
    config.projector_hidden_act = "gelu" if module.kind == "mlp2x_gelu" else "linear"
    config.multimodal_projector_bias = module.sizes.bias
    with torch.random.fork_rng(devices=[]):
        stock: Any = projectors.STOCK(config)
    eye = torch.eye(module.sizes.language)
    with torch.no_grad():
        for number in (1, 2):
            mine, theirs = getattr(module, f"linear_{number}", None), getattr(stock, f"linear_{number}")
            theirs.weight.copy_(eye if mine is None else mine.weight)
            if theirs.bias is not None:
                theirs.bias.copy_(torch.zeros_like(theirs.bias) if mine is None else mine.bias)
    return stock.to(lab.device, lab.dtype).eval().requires_grad_(False)
