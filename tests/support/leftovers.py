"""Everything that work on a model could leave changed, the model as someone who trains it would have it, Ctrl-C at any line."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

import llava_lab
from llava_lab.capture.watch import HANDLERS

PACKAGE = str(Path(llava_lab.__file__).parent)


@contextmanager
def as_someone_who_trains_has_it(lab: Any) -> Iterator[None]:
    """Mixed modes, and one parameter that wants a gradient; put back afterwards."""
    lab.model.train()
    lab.model.model.vision_tower.eval()
    lab.model.lm_head.requires_grad_(True)
    try:
        yield
    finally:
        lab.model.eval()
        lab.model.requires_grad_(False)


def state_of(lab: Any) -> dict[str, Any]:
    """Modules and what hangs on them, configuration, hooks, modes, gradients, weights, random states, settings of torch."""
    modules = list(lab.model.modules())
    configs = (lab.model.config, lab.model.config.text_config, lab.model.config.vision_config)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "attention": [config._attn_implementation for config in configs],
        "handlers": len(HANDLERS),
        "hooks": [len(getattr(module, kind)) for module, kind in itertools.product(modules, hooks)],
        "training": [module.training for module in modules],
        "gradients": [(parameter.requires_grad, parameter.grad is None) for parameter in lab.model.parameters()],
        "weights": lab.fingerprint,
        "modules": [(name, id(module), sorted(vars(module))) for name, module in lab.model.named_modules()],
        "config": lab.model.config.to_json_string(),
        "lab": [(name, id(getattr(lab, name, None))) for name in ("grid", "preprocessing", "card", "processor")],
        "random": (torch.get_rng_state().tolist(), str(np.random.get_state(legacy=False)), random.getstate()),  # noqa: NPY002
        "torch": torch_settings(),
    }


def torch_settings() -> dict[str, Any]:
    """What a caller may have set in torch, and how many autocast blocks are open."""
    kinds = ("cpu", "cuda", "mps")
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "type": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "autocast": [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds],
        "cached": torch.is_autocast_cache_enabled(),
        "nested": min(torch.autocast_increment_nesting(), torch.autocast_decrement_nesting()),
    }


@contextmanager
def interrupted_at(line: int, *files: str) -> Iterator[list[int]]:
    """Ctrl-C at the line of the package, or of `files`, that is run as number `line`, 0: never; gives how many were run."""
    count = [0]

    def at_line(frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        if event == "line":
            count[0] += 1
            if count[0] == line:
                raise KeyboardInterrupt
        return at_line

    def at_call(frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        return at_line if frame.f_code.co_filename.startswith(files or PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(at_call)
    try:
        yield count
    finally:
        sys.settrace(before)
