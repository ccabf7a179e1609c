"""A model randomised from the top down, and put back bitwise.

The values inside each parameter are permuted, which keeps their distribution: nothing explodes, and nothing the
model learned is left. Embeddings, the final norm and the output head stay as they are. Each parameter is copied
to the CPU before it is touched, so what is shuffled is held once more in main memory (13 GB for all of a 7B model
in 16 bits), and on its way one parameter's order of 8 bytes per value.

Source: Adebayo et al. 2018 (arXiv 1810.03292), cascading randomisation, which draws new weights instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from llava_lab.models.layout import language_layers, projector, vision_tower

LAST = "vision tower"  # the name of the last step

Shuffle = Callable[[Iterable[nn.Parameter]], None]


def parts_from_top(model: nn.Module, groups: int) -> list[tuple[str, list[nn.Parameter]]]:
    """What to randomise, in order, each with its name: at most `groups` of language layers, connector, vision tower."""
    layers = language_layers(model)
    edges = [int(edge) for edge in np.linspace(len(layers), 0, min(groups, len(layers)) + 1).round()]
    steps = []
    for stop, start in pairwise(edges):
        name = f"layer {start}" if stop - start == 1 else f"layers {start} to {stop - 1}"
        steps.append((name, [parameter for layer in layers[start:stop] for parameter in layer.parameters()]))
    return [*steps, ("connector", list(projector(model).parameters())), (LAST, list(vision_tower(model).parameters()))]


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
        _put_back(kept)


def _put_back(kept: list[tuple[nn.Parameter, torch.Tensor]]) -> None:
    """From the last to the first, so that a parameter shuffled twice ends as it began."""
    interrupt: KeyboardInterrupt | None = None
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
