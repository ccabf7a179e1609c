"""Run a model without disturbing it: evaluation mode, no gradients, the random state put back.

It does not watch anything; `llava_lab.capture.watch` does that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode without gradients; each module's training flag and the random state come back on leaving.

    `requires_grad` is never touched: `torch.no_grad` makes that unnecessary.
    """
    training = [module for module in model.modules() if module.training]
    state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        model.eval()
        with torch.no_grad():
            yield model
    finally:
        for module in training:
            module.training = True
        torch.set_rng_state(state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
