"""Put a model's weights in random order for a while: the control that says what training did.

A network of shuffled weights has the same sizes and the same values, and has learnt nothing. A measure that stays the same
on it tells of the architecture, not of the model.

    with weights_put_back(seed=0) as shuffle:
        shuffle(lab.model.parameters())
        ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

Shuffle = Callable[[Iterable[nn.Parameter]], None]


@contextmanager
def weights_put_back(seed: int = 0) -> Iterator[Shuffle]:
    """A function that shuffles the values inside parameters; on leaving, all of them are bitwise what they were.

    A Ctrl-C while they are put back is raised again only when that is done.
    """
    generator = torch.Generator().manual_seed(seed)
    kept: list[tuple[nn.Parameter, torch.Tensor]] = []

    def shuffle(parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            kept.append((parameter, parameter.detach().to("cpu", copy=True)))  # first, so that nothing can be lost
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            with torch.no_grad():
                parameter.copy_(parameter.flatten()[order].view_as(parameter))

    try:
        yield shuffle
    finally:
        interrupt: KeyboardInterrupt | None = None
        # from the last to the first, so that a parameter shuffled twice ends as it began
        while kept:
            try:
                parameter, original = kept[-1]
                with torch.no_grad():
                    parameter.copy_(original)
                kept.pop()
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt
