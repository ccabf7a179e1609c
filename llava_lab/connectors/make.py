"""A fresh connector for a model, with LLaVA's first weights or transformers'.

They differ: LLaVA leaves its projector as torch's ``nn.Linear`` makes it, transformers draws every layer anew from
N(0, initializer_range) with biases 0. For 1024 -> 4096 -> 4096 the second layer starts 2.2 times larger in
transformers, which is a second change in what is meant as a comparison of connectors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llava_lab.errors import OptionError
from llava_lab.models import projectors
from llava_lab.models.projector_parts import Connector

if TYPE_CHECKING:
    from llava_lab.models import Lab

INITS = ("llava", "transformers")
STD = 0.02  # transformers' initializer_range for LLaVA


def new_connector(lab: Lab, kind: str, *, init: str = "llava", seed: int = 0, **options: Any) -> Connector:
    """An untrained connector between `lab`'s vision tower and language model; the lab is left as it is.

    `kind` is a name from ``llava_lab.CONNECTORS`` or ``mlp{N}x_gelu``, `options` are that entry's. The same seed gives
    the same weights; the global random state is not touched. It is frozen and in evaluation mode, as a loaded model is.
    Raises OptionError for an unknown name or option, or one that does not fit the model's widths and grid.
    """
    _check(init)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = projectors.build(kind, projectors.sizes_of(lab.model.config), options)
        if init == "transformers":
            _draw(made.modules(), STD)
    made.trained_with = {}
    return made.to(lab.device, lab.dtype).eval().requires_grad_(False)


def initialize(module: nn.Module, *, init: str = "llava", seed: int = 0, std: float = STD) -> None:
    """Draw a connector's weights anew, in place. Queries and position embeddings keep theirs.

    "llava" is torch's default of every layer; "transformers" is N(0, `std`) with biases 0 and plain norms.
    """
    _check(init)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        if init == "transformers":
            _draw(module.modules(), std)
            return
        for part in module.modules():
            if isinstance(part, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
                part.reset_parameters()


def _draw(modules: Iterable[nn.Module], std: float) -> None:
    with torch.no_grad():
        for part in modules:
            if isinstance(part, (nn.Linear, nn.Conv2d)):
                part.weight.normal_(0, std)
                if part.bias is not None:
                    part.bias.zero_()
            elif isinstance(part, nn.LayerNorm):
                part.reset_parameters()


def _check(init: str) -> None:
    if init not in INITS:
        raise OptionError(f"init must be one of {', '.join(INITS)}, got {init!r}")
