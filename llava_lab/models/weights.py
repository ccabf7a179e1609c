"""Weights as numbers: whether they are finite, and what is left of a model when they are put in random order for a while.

`require_finite` is asked wherever weights are loaded or saved. `weights_put_back` is the control that says what training did:
a network of shuffled weights has the same sizes and the same values, and has learnt nothing. A measure that stays the same
on it tells of the architecture, not of the model.

    with weights_put_back(seed=0) as shuffle:
        shuffle(lab.model.parameters())
        ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llava_lab.checks import not_finite, undoing
from llava_lab.errors import CheckpointError

Shuffle = Callable[[Iterable[nn.Parameter]], None]

NUMBERS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # packed weights are looked at by what unpacks them
NAMED = 3  # tensors of a message


def require_finite(weights: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Raise CheckpointError naming the tensors of `where` that hold NaN or infinity; one sum over each tensor."""
    bad = [
        f"{name} ({count:,} of {values.numel():,})"
        for name, values in weights
        if values.dtype in NUMBERS and not values.is_meta and (count := not_finite(values))
    ]
    if bad:
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise CheckpointError(
            f"expected finite weights in {where}, got NaN or infinity in {', '.join(bad[:NAMED])}{more}; "
            "the training that made them blew up, or a file is damaged: take an earlier checkpoint"
        )


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

    def undo() -> None:
        while kept:  # from the last to the first, so that a parameter shuffled twice ends as it began
            parameter, original = kept[-1]
            with torch.no_grad():
                parameter.copy_(original)
            kept.pop()

    with undoing(undo):
        yield shuffle
