"""Where a patch can be taken away: in the pixels, at the vision tower's output, or at the projector's output.

At ``pixels`` nothing of the patch reaches the model. Further in, the tower has already mixed the patch
into its neighbours' features (and theirs into its own), so hiding a token hides what the language model
reads at that place, which is less than what the picture showed there. In return the tower runs once.

A `Level` holds the picture as it is at that place, as a grid of values, hides patches in it and scores
the outcome. It decides nothing about which patches to hide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from llava_lab.attribution.base import Targets, choose, outside, predicting_rows
from llava_lab.attribution.fills import EVERY_FILL, fill_pixels, inpaint, mean_fill, noise_fill
from llava_lab.attribution.scoring import read_scores, target_score
from llava_lab.errors import LabError, OptionError
from llava_lab.models.layout import projector, require_patch_tokens
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab

LEVELS = ("pixels", "vision", "projector")
PLACES = {"pixels": "the pixels", "vision": "the vision tower's output", "projector": "the projector's output"}
PATIENCE = 2.0  # seconds before a progress bar appears


@dataclass(frozen=True)
class Level:
    """The picture at one place in the model, and what is put where patches are hidden."""

    name: str
    grid: tuple[int, int]
    patch: int  # side of a patch in `whole`, pixels or one token
    whole: Float[Tensor, "1 C Y X"]
    fill: Float[Tensor, "1 C Y X"] | None  # None: from the neighbours of what is hidden
    score: Callable[[Tensor], Tensor]  # (B C Y X) -> (B N), each target's score
    tokens: Callable[[Tensor], Tensor]  # (B C Y X) -> (B P D), what the language model is given; not at the pixels
    passes: int = 0  # pictures through the tower that made the fill

    def hide(self, hidden: Bool[Tensor, "B rows cols"]) -> Float[Tensor, "B C Y X"]:
        """The picture with each mask's patches filled."""
        mask = _enlarged(hidden, self.patch, self.whole)
        filled = inpaint(self.whole, mask) if self.fill is None else self.fill
        return torch.where(mask[:, None], filled, self.whole)

    def blend(self, shown: Float[Tensor, "B Y X"]) -> Float[Tensor, "B C Y X"]:
        """The picture where `shown` is 1, its fill where it is 0, a mixture between."""
        assert self.fill is not None, "a mixture needs a fill that does not depend on the hole"
        return torch.lerp(self.fill, self.whole, shown[:, None].to(self.whole))


def open_level(
    lab: Lab, run: Run, targets: Targets, *, at: str, fill: str, seed: int = 0, fills: tuple[str, ...] = EVERY_FILL
) -> Level:
    """The picture of `run` at ``at``, ready to hide patches in. Call it inside `capture.undisturbed`.

    Further in than the pixels, ``grey`` and ``blur`` are what the model makes of a grey or blurred picture, and
    ``mean`` and ``noise`` take their statistics over the picture's own tokens.
    """
    choose("at", at, LEVELS)
    if fill not in fills:
        raise OptionError(f"fill must be one of {', '.join(fills)}, got {fill!r}")
    if other := outside(lab, run):
        return other.open_level(targets, at=at, fill=fill, seed=seed, fills=fills)
    pixels, score = target_score(lab, run, targets)
    if at == "pixels":
        square = None if fill == "neighbours" else fill_pixels(lab, pixels, fill, run.map, seed=seed)
        side = run.map.size // run.map.rows
        return Level(at, (run.map.rows, run.map.cols), side, pixels, square, score, _no_tokens)
    states = _states(lab, run, pixels, at)
    if fill in ("grey", "blur"):
        square = _states(lab, run, fill_pixels(lab, pixels, fill, run.map), at)
    elif fill == "neighbours":
        square = None
    else:
        seen = torch.from_numpy(run.map.coverage() > 0).to(states.device)
        square = mean_fill(states, seen) if fill == "mean" else noise_fill(states, seen, seed=seed)
    connector = projector(lab.model)

    def tokens(grid: Tensor) -> Tensor:
        flat = grid.flatten(2).transpose(1, 2)
        return connector(flat) if at == "vision" else flat

    read = _token_score(lab, run, targets)
    forwards = int(fill in ("grey", "blur"))
    return Level(at, (run.map.rows, run.map.cols), 1, states, square, lambda grid: read(tokens(grid)), tokens, forwards)


def embedded(lab: Lab, run: Run, tokens: Float[Tensor, "B P D"]) -> Float[Tensor, "B S D"]:
    """The finished sequence as the language model reads it, with `tokens` for the picture."""
    ids = torch.from_numpy(run.token_ids)[None].to(tokens.device)
    text = lab.model.get_input_embeddings()(ids)
    start, stop = run.segments["image"]
    sequence = text.expand(len(tokens), -1, -1).clone()
    sequence[:, start:stop] = tokens.to(sequence.dtype)
    return sequence


def _states(lab: Lab, run: Run, pixels: Float[Tensor, "1 3 Y X"], at: str) -> Float[Tensor, "1 C rows cols"]:
    """What goes into the projector, or what comes out of it, as a grid; the language model does not run."""
    if at == "vision":
        require_patch_tokens(lab.model, "what changes the tower's features patch by patch")
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
        found.append(args[0] if at == "vision" else output)

    config = lab.model.config
    handle = projector(lab.model).register_forward_hook(keep)
    try:
        lab.model.get_image_features(
            pixel_values=pixels,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )
    finally:
        handle.remove()
    rows, cols = run.map.rows, run.map.cols
    shape = tuple(found[0].shape) if len(found) == 1 else None
    if shape is None or len(shape) != 3 or shape[:2] != (1, rows * cols):
        raise LabError(f"expected the projector to see 1 x {rows * cols} patches once, got {[tuple(one.shape) for one in found]}")
    return found[0].transpose(1, 2).reshape(1, shape[2], rows, cols)


def _token_score(lab: Lab, run: Run, targets: Targets) -> Callable[[Tensor], Tensor]:
    """Scores from the picture's tokens; what follows the last predicting position is left out, nothing looks back at it."""
    at = predicting_rows(targets)

    def score(tokens: Tensor) -> Tensor:
        sequence = embedded(lab, run, tokens)[:, : at[-1] + 1]
        seen = torch.ones(sequence.shape[:2], dtype=torch.long, device=sequence.device)
        keep = torch.tensor(at, device=sequence.device)
        logits = lab.model(inputs_embeds=sequence, attention_mask=seen, logits_to_keep=keep, use_cache=False).logits
        return read_scores(logits, at, targets)

    return score


def _enlarged(hidden: Bool[Tensor, "B rows cols"], side: int, like: Tensor) -> Bool[Tensor, "B Y X"]:
    """Each patch as `side x side` places; what a patch size that does not divide the square leaves over stays as it is."""
    mask = hidden.repeat_interleave(side, 1).repeat_interleave(side, 2)
    height, width = like.shape[-2:]
    return functional.pad(mask, (0, width - mask.shape[2], 0, height - mask.shape[1]))


def _no_tokens(grid: Tensor) -> Tensor:
    raise AssertionError("the pixels are not tokens; open another level")
