"""What goes into a connector and what comes out of it, picture by picture; the language model does not run.

Pictures are prepared when their turn comes and nothing is kept, so memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llava_lab.capture import undisturbed
from llava_lab.errors import DataError, OptionError
from llava_lab.models.layout import projector
from llava_lab.models.pictures import PictureLike, read_picture

if TYPE_CHECKING:
    from llava_lab.models import Lab

Drawn = PictureLike | Callable[[], Any]  # a picture, or what draws one when it is needed


def tokens_of(lab: Lab, pictures: Sequence[Drawn], chosen: Iterable[int], *, batch: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
    """(features, outputs) of the connector for the chosen pictures, (B, P, F) and (B, Q, D), in the model's own type."""
    for group in _grouped(chosen, batch):
        pixels = torch.cat([lab.pixels(_drawn(pictures[i])) for i in group])
        yield run_connector(lab, pixels)


def run_connector(lab: Lab, pixels: Float[Tensor, "B 3 S S"]) -> tuple[Float[Tensor, "B P F"], Float[Tensor, "B Q D"]]:
    """One run of vision tower and connector, the model left as it was."""
    config = lab.model.config
    with undisturbed(lab.model), _watched(projector(lab.model)) as found:
        lab.model.get_image_features(
            pixel_values=pixels,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )
    return found[0]


def halves(pictures: Any, held_out: float) -> tuple[list[int], list[int]]:
    """Numbers of the training and the held-out pictures, spread evenly. Raises DataError where there are too few."""
    if not 0 < held_out < 1:
        raise OptionError(f"held_out must lie between 0 and 1, got {held_out}")
    if not hasattr(pictures, "__len__") or not hasattr(pictures, "__getitem__"):
        raise DataError(
            f"pictures must be a sequence that can be read twice, got {type(pictures).__name__}; make a list of paths"
        )
    count = len(pictures)
    test = [i for i in range(count) if int((i + 1) * held_out) > int(i * held_out)]
    train = sorted(set(range(count)) - set(test))
    if not test or not train:
        raise DataError(
            f"{count} pictures with held_out={held_out} leave {len(train)} to fit and {len(test)} to score; give more"
        )
    return train, test


def _drawn(picture: Drawn) -> Any:
    return read_picture(picture() if callable(picture) else picture)


def _grouped(numbers: Iterable[int], size: int) -> Iterator[list[int]]:
    group: list[int] = []
    for number in numbers:
        group.append(number)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


@contextmanager
def _watched(connector: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    found: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
        found.append((args[0].detach(), output.detach()))

    handle = connector.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()
