"""Put a connector in for the length of a block: a module, a linear fit, a projector file, or another lab's; and make new ones.

    with ll.connector(lab, ll.new_connector(lab, "avgpool", side=4)):
        lab.ask(picture, "What color is the car?")  # 16 image tokens

How a connector is checked and what follows it is written in `llava_lab.models.swap`; the architectures are in
`llava_lab.models.connectors`.

A new connector has LLaVA's first weights or transformers'. They differ: LLaVA leaves its connector as torch's ``nn.Linear`` makes
it, transformers draws every layer anew from N(0, initializer_range) with biases 0. For 1024 -> 4096 -> 4096 the second layer
starts 2.2 times larger in transformers, which is a second change in what is meant as a comparison of connectors.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llava_lab.capture import hooked
from llava_lab.checks import entry
from llava_lab.connectors.files import read_projector
from llava_lab.errors import OptionError
from llava_lab.models import connectors
from llava_lab.models.connectors import Connector
from llava_lab.models.lab import Lab
from llava_lab.models.layout import connector_of
from llava_lab.models.swap import swapped
from llava_lab.results import Linearized

INITS = ("llava", "transformers")
STD = 0.02  # transformers' initializer_range for LLaVA


@contextmanager
@entry
def connector(lab: Lab, what: nn.Module | Linearized | Lab | str | os.PathLike) -> Iterator[Lab]:
    """Inside the block, `lab` works with another connector; afterwards everything is as it was, also after an exception.

    `what` is a connector, a `Linearized` fit, the path of an ``mm_projector.bin``, or another Lab, whose connector is
    borrowed. Grid, prompts and maps follow a connector that makes fewer tokens; a run answered with one connector is
    refused with another. Raises OptionError where the widths differ; warns `ForeignConnector` where the connector learnt
    beside another language model, which makes the comparison invalid.

    >>> with ll.connector(lab, ll.new_connector(lab, "avgpool", side=4)):
    ...     lab.grid
    (4, 4)
    """
    with swapped(lab, as_connector(lab, what)):
        yield lab


def as_connector(lab: Lab, what: Any) -> nn.Module:
    """The module behind what a user may put into `lab`; a file is read and a fit becomes a ``linear`` connector.

    >>> from llava_lab.connectors import as_connector
    >>> as_connector(lab, lab) is lab.connector
    True
    """
    if isinstance(what, Lab):
        return what.connector
    if isinstance(what, Linearized):
        return linear_connector(lab, what.weight, what.bias, trained_with=what.beside)
    if isinstance(what, nn.Module):
        return what
    if isinstance(what, (str, os.PathLike)):
        if os.fspath(what) in connectors.CONNECTORS:
            raise OptionError(
                f"{what!r} is a name, not a connector with weights; make one: llava_lab.new_connector(lab, {what!r})"
            )
        return read_projector(lab, what)
    raise OptionError(f"a connector is a module, a linear fit, a projector file or another lab, got {type(what).__name__}")


def linear_connector(lab: Lab, weight: Any, bias: Any, *, trained_with: dict[str, str] | None) -> Connector:
    """A ``linear`` connector with this weight (D, F) and bias (D,), where `lab`'s model is and in its type."""
    sizes = connectors.sizes_of(lab.model.config)
    if tuple(weight.shape) != (sizes.language, sizes.vision):
        raise OptionError(f"expected a linear map of {sizes.language}x{sizes.vision} for {lab.name!r}, got {tuple(weight.shape)}")
    with torch.random.fork_rng(devices=[]):
        made: Any = connectors.build("linear", connectors.Sizes(sizes.vision, sizes.language, sizes.grid, bias=True))
    with torch.no_grad():
        made.linear_1.weight.copy_(torch.as_tensor(weight))
        made.linear_1.bias.copy_(torch.as_tensor(bias))
    made.trained_with = trained_with
    return made.to(lab.device, lab.dtype).eval().requires_grad_(False)


@contextmanager
def shuffled_tokens(lab: Lab, *, seed: int = 0) -> Iterator[Lab]:
    """Inside the block the connector's tokens come in another order, the same for every picture: a control.

    What the tokens say is kept, where they say it is lost.

    >>> from llava_lab.connectors import shuffled_tokens
    >>> with shuffled_tokens(lab, seed=1):
    ...     len(lab.ask(picture, "What is it?", max_new_tokens=1).logprobs)
    1
    """
    count = lab.grid[0] * lab.grid[1]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))

    def shuffle(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output[:, order.to(output.device)]

    with hooked(connector_of(lab.model), after=shuffle):
        yield lab


@entry
def new_connector(lab: Lab, kind: str, *, init: str = "llava", seed: int = 0, **options: Any) -> Connector:
    """An untrained connector between `lab`'s vision tower and language model; the lab is left as it is.

    `kind` is a name from ``llava_lab.CONNECTORS`` or ``mlp{N}x_gelu``, `options` are that entry's. The same seed gives
    the same weights; the global random state is not touched. It is frozen and in evaluation mode, as a loaded model is.
    Raises OptionError for an unknown name or option, or one that does not fit the model's widths and grid.

    >>> ll.new_connector(lab, "bottleneck", parameters=20_000).kind
    'bottleneck'
    """
    _check(init)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = connectors.build(kind, connectors.sizes_of(lab.model.config), options, beside=("kind", "init", "seed"))
        if init == "transformers":
            _draw(made.modules(), STD)
    made.trained_with = {}
    return made.to(lab.device, lab.dtype).eval().requires_grad_(False)


def initialize(module: nn.Module, *, init: str = "llava", seed: int = 0, std: float = STD) -> None:
    """Draw a connector's weights anew, in place. Queries and position embeddings keep theirs.

    "llava" is torch's default of every layer; "transformers" is N(0, `std`) with biases 0 and plain norms.

    >>> from llava_lab.connectors import initialize
    >>> linear = ll.new_connector(lab, "linear")
    >>> initialize(linear, init="transformers")
    >>> bool(linear.linear_1.bias.any())
    False
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
