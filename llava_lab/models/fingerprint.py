"""A short name for the exact weights of a model, so that a run is explained by the model that gave it.

Names, shapes and up to `SAMPLES` evenly spread values of every parameter are hashed, as float32.
The same checkpoint gives the same name in every process and on every device; a swapped connector
or one training step gives another. It is not a proof against forgery.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from llava_lab.errors import CheckpointError
from llava_lab.models.projectors import spec

SAMPLES = 32  # values per parameter; the first and the last are always among them


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits over the parameters' names, shapes and sampled values."""
    digest = hashlib.sha256()
    samples = []
    if (named := spec(getattr(model, "config", None))) and named != ("mlp2x_gelu", {}):
        digest.update(repr((named[0], sorted(named[1].items()))).encode())  # equal weights may be joined differently
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            samples.append(_sample(_waiting(model, name) if parameter.is_meta else parameter))
        values = torch.cat(samples) if samples else torch.zeros(0)
    digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def _waiting(model: nn.Module, name: str) -> torch.Tensor:
    """A weight that ``device_map`` keeps in main memory or on the disk until its layer runs (accelerate's hooks)."""
    owner, _, leaf = name.rpartition(".")
    hook = getattr(model.get_submodule(owner), "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if (kept := getattr(one, "weights_map", None)) is not None:
            return kept[leaf]
    raise CheckpointError(f"the weight {name} is nowhere: it has a shape and no values")


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    flat = parameter.detach().reshape(-1)
    step = max(1, (flat.numel() - 1) // (SAMPLES - 1))
    return torch.cat([flat[::step][:SAMPLES], flat[-1:]]).float().cpu()  # parts of one model may live on different devices
