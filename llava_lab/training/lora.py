"""LoRA through peft for stage 2: low-rank adapters on every linear layer of the language model, merged at the end.

As LLaVA trains it: the head has no adapter, the connector trains in full beside them. peft is imported
only here. Source: haotian-liu/LLaVA @ c121f04 ``scripts/v1_5/finetune_lora.sh`` and ``train.py``
(find_all_linear_names).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from llava_lab.errors import OptionError
from llava_lab.models import layout
from llava_lab.training.recipe import Lora


@contextmanager
def adapters(model: Any, lora: Lora | None) -> Iterator[Any]:
    """The model with adapters, or as it is without `lora`. They are merged on leaving, or removed after an exception."""
    if lora is None:
        yield model
        return
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise OptionError("LoRA needs peft; `pip install 'llava-lab[train]'` brings it") from None
    names = adapted(model)
    options: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "bias": "none"}
    with warnings.catch_warnings():  # peft asks transformers by a name that is on its way out
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        wrapped = get_peft_model(model, LoraConfig(target_modules=names, **options))
    layout.projector(model).requires_grad_(True)
    try:
        yield wrapped
    except BaseException:
        wrapped.unload()
        raise
    wrapped.merge_and_unload()


def adapted(model: Any) -> list[str]:
    """Full names of the language model's linear layers."""
    inside = layout.language_model(model)
    prefix = next(name for name, module in model.named_modules() if module is inside)
    return [f"{prefix}.{name}" for name, module in inside.named_modules() if isinstance(module, nn.Linear)]
