"""Image tokens of many pictures at chosen places of the model: before the connector, after it, after each layer.

A stage is ``"before"`` (what the connector reads, the vision tower's width), ``"after"`` (what it gives) or a
whole number l (the stream after l language layers; 0 is what the first layer is given). One picture is one forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llava_lab.capture import undisturbed
from llava_lab.capture.values import watch_stream
from llava_lab.errors import CheckpointError, OptionError
from llava_lab.models.layout import language_layers, projector, require_patch_tokens
from llava_lab.models.pictures import read_picture

if TYPE_CHECKING:
    from llava_lab.models import Lab

QUESTION = "What is in the picture?"
BEFORE, AFTER = "before", "after"

Stage = str | int


def stages(lab: Lab, at: Any) -> tuple[Stage, ...]:
    """The stages `at` names, checked; None is before, after and after every layer."""
    count = len(language_layers(lab.model))
    if at is None:
        at = BEFORE, AFTER, *range(1, count + 1)
    wanted = (at,) if isinstance(at, (str, Integral)) else tuple(at)
    for stage in wanted:
        layer = isinstance(stage, Integral) and not isinstance(stage, bool) and 0 <= int(stage) <= count
        if not layer and stage not in (BEFORE, AFTER):
            raise OptionError(f"a stage is 'before', 'after' or a layer from 0 to {count}, got {stage!r}")
    if not wanted or len(set(wanted)) != len(wanted):
        raise OptionError(f"expected stages, each once, got {at!r}")
    if BEFORE in wanted:
        require_patch_tokens(lab.model, "stage 'before'")
    return wanted


def stage_name(stage: Stage) -> str:
    return stage if isinstance(stage, str) else f"layer {stage}"


def read_stages(
    lab: Lab, picture: Any, wanted: Sequence[Stage], *, question: str = QUESTION, text: dict[Stage, np.ndarray] | None = None
) -> dict[Stage, np.ndarray]:
    """The picture's image tokens at each stage, float32 (patches, width), row-major; the model is left as it was.

    `text` is filled with the prompt's other tokens at the same stages, (tokens, width), where they exist.
    """
    sequence = lab.sequence(question)
    image = slice(*sequence.segments["image"])
    ids = torch.from_numpy(sequence.token_ids)[None].to(lab.device)
    found: dict[Stage, np.ndarray] = {}

    def keep(stage: Stage, tokens: Tensor) -> None:
        if stage in wanted:
            found[stage] = tokens.detach().float().cpu().numpy()

    def fold(number: int, state: Tensor) -> None:
        keep(number, state[0, image])
        stage: Stage = AFTER if number == 0 and AFTER in wanted else number
        if text is not None and stage in wanted:
            other = torch.cat([state[0, : image.start], state[0, image.stop :]])
            text[stage] = other.detach().float().cpu().numpy()

    with undisturbed(lab.model), _watch_connector(lab, keep), watch_stream(language_layers(lab.model), fold):
        pixels = lab.pixels(read_picture(picture))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        lab.model(**given, use_cache=False, logits_to_keep=1)
    return found


def subset(rng: np.random.Generator, count: int, most: int | None) -> np.ndarray:
    """At most `most` of 0 .. count-1 at random, sorted; None is all."""
    return np.arange(count) if most is None or most >= count else np.sort(rng.choice(count, most, replace=False))


@contextmanager
def _watch_connector(lab: Lab, keep: Any) -> Iterator[None]:
    connector, patches = projector(lab.model), lab.grid[0] * lab.grid[1]

    def after(module: Any, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        for stage, tokens in ((BEFORE, given), (AFTER, output)):
            rows = tokens.reshape(-1, tokens.shape[-1])
            if len(rows) != patches:
                raise CheckpointError(f"expected {patches} tokens {stage} the connector, one per patch, got {len(rows)}")
            keep(stage, rows)

    handle = connector.register_forward_hook(after, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
