"""A shared model in another number format for a while; weights and buffers come back to the last bit.

`state_dict` leaves out buffers that are not saved, the frequencies of rotary positions among them, and what
bfloat16 has rounded stays rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def in_dtype(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    kept = {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    model.to(dtype)
    try:
        yield
    finally:
        model.to(torch.float32)
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                tensor.copy_(kept[name])
