"""Everything that work on a model could leave changed, and the model as someone who trains it would have it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from llava_lab.capture.watch import _HANDLERS


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
    """Attention implementation, hooks, modes, gradients, weights and random state."""
    modules = list(lab.model.modules())
    configs = (lab.model.config, lab.model.config.text_config, lab.model.config.vision_config)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "attention": [config._attn_implementation for config in configs],
        "handlers": len(_HANDLERS),
        "hooks": [len(getattr(module, kind)) for module, kind in itertools.product(modules, hooks)],
        "training": [module.training for module in modules],
        "gradients": [(parameter.requires_grad, parameter.grad is None) for parameter in lab.model.parameters()],
        "weights": lab.fingerprint,
        "random": (torch.get_rng_state().tolist(), str(np.random.get_state(legacy=False))),  # noqa: NPY002, the global one
        "mode": torch.is_grad_enabled(),
    }
