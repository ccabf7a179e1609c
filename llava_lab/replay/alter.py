"""Where a patch can be taken away: in the pixels, at the vision tower's output, or at the projector's output.

At ``pixels`` nothing of the patch reaches the model. Further in, the tower has already mixed the patch
into its neighbours' features (and theirs into its own), so hiding a token hides what the language model
reads at that place, which is less than what the picture showed there. In return the tower runs once.

A `Level` holds the picture as it is at that place, as a grid of values, hides patches in it and scores
the outcome. It decides nothing about which patches to hide.

A picture under veils: what is altered is the picture itself, before any model sees it.

Methods that hide patches work on a *veil* instead of pixels: how much of each place is shown, and which fill stands where
it is not. `Veiled.altered` turns a veil into the picture to show. Where a model's own way with pictures is not known (a
server), or where it looks at them several times (tiles), this is what occlusion and faithfulness can touch.

It decides nothing about what to hide and scores nothing; `scores` is its children's.

Altered pictures for a model that looks several times: the picture itself is altered, so every view sees the change.

Hiding one cell of one view would leave the same thing to be seen in another. So occlusion, RISE, Shapley values and
faithfulness cover cells of the overview's grid in the picture, and the model's own preprocessing makes the views anew.

One picture scored with any of its patches filled, in batches, each covering run only once.

The same coverings come back: nothing and everything filled, random rankings shared by all methods, a map
and its reverse, methods that agree. What was scored is remembered, so asking again costs nothing. It
knows nothing of maps or methods; `llava_lab.judging.faithfulness` decides what to cover.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from llava_lab.capture import undisturbed
from llava_lab.checks import one_of
from llava_lab.errors import LabError, OptionError
from llava_lab.geometry import PictureMap
from llava_lab.models.layout import connector_of, read_connector, require_patch_tokens
from llava_lab.replay.fills import BLUR, EVERY_FILL, blur_fill, fill_pixels, inpaint, mean_fill, noise_fill
from llava_lab.replay.score import Outside, Score, outside, read_scores, target_score
from llava_lab.replay.targets import Targets, predicting_rows
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
    one_of("at", at, LEVELS)
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
    connector = connector_of(lab.model)

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
    """What goes into the connector, or what comes out of it, as a grid; the language model does not run."""
    if at == "vision":
        require_patch_tokens(lab.model, "what changes the tower's features patch by patch")
    features, tokens = read_connector(lab.model, pixels)
    states = features if at == "vision" else tokens
    rows, cols = run.map.rows, run.map.cols
    if states.dim() != 3 or states.shape[:2] != (1, rows * cols):
        raise LabError(f"expected the projector to see 1 x {rows * cols} patches once, got {[tuple(states.shape)]}")
    return states.transpose(1, 2).reshape(1, -1, rows, cols)


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


GREY = 128.0


class Veiled(Outside):
    """One run's picture, altered from outside. `KIND` says why there is no other place to alter."""

    KIND: ClassVar[str]

    def __init__(self, run: Run, picture: np.ndarray, *, name: str, fingerprint: str) -> None:
        self.run, self.picture, self.name, self.fingerprint, self.model = run, picture, name, fingerprint, nn.Module()
        self._fills: list[tuple[str, int]] = []  # name, seed; a veil holds the number in this list
        self._filled: dict[int, np.ndarray] = {}

    @abstractmethod
    def scores(self, veils: Float[Tensor, "B 3 Y X"], targets: Targets) -> Float[Tensor, "B N"]:
        """Each target's score when the picture is shown through each veil."""

    def open_level(self, targets: Targets, *, at: str, fill: str, seed: int, fills: tuple[str, ...]) -> Level:
        """The veil as a `Level`: whole cells of equal side, shown or filled."""
        if at != LEVELS[0]:
            raise OptionError(f"at must be {LEVELS[0]!r}: {self.name!r} {self.KIND}, which leaves no other place, got {at!r}")
        (height, width), (rows, cols) = self.picture.shape[:2], (self.run.map.rows, self.run.map.cols)
        side = -(-max(height * cols, width * rows) // (rows * cols))
        whole = self._veil(rows * side, cols * side, 1.0, self._number(fill, seed))
        hidden = self._veil(rows * side, cols * side, 0.0, self._number(fill, seed))
        return Level(at, (rows, cols), side, whole, hidden, self.target_score(targets)[1], _no_tokens)

    def target_score(self, targets: Targets) -> tuple[Float[Tensor, "1 3 S S"], Callable[[Tensor], Tensor]]:
        """The picture unveiled, on the map's square, and a function from veils to each target's score."""
        return self._veil(self.run.map.size, self.run.map.size, 1.0, 0), lambda veils: self.scores(veils, targets)

    def fill_pixels(self, pixels: Tensor, fill: str, *, seed: int) -> Tensor:
        return self._veil(pixels.shape[-2], pixels.shape[-1], 0.0, self._number(fill, seed))

    def altered(self, shown: np.ndarray, number: int) -> np.ndarray:
        """The picture as sent, uint8 (height, width, 3), through a veil (Y, X) from 0 (filled) to 1 (shown)."""
        if shown.all() and shown.min() == 1:
            return self.picture
        (height, width), (tall, wide) = self.picture.shape[:2], shown.shape
        y = ((np.arange(height) + 0.5) * tall / height).astype(int)
        x = ((np.arange(width) + 0.5) * wide / width).astype(int)
        share = shown[y][:, x][..., None]
        filled = self._fill(number, share[..., 0] < 0.5)
        return (filled + (self.picture - filled) * share).round().clip(0, 255).astype(np.uint8)

    def _number(self, fill: str, seed: int) -> int:
        if (fill, seed) not in self._fills:
            self._fills.append((fill, seed))
        return self._fills.index((fill, seed))

    def _veil(self, height: int, width: int, shown: float, number: int) -> Float[Tensor, "1 3 Y X"]:
        """Channels: how much is shown, which fill takes its place, nothing."""
        veil = torch.zeros(1, 3, height, width)
        veil[:, 0], veil[:, 1] = shown, number
        return veil

    def _fill(self, number: int, hidden: np.ndarray) -> np.ndarray:
        """What takes the place of the picture, float (height, width, 3), 0 to 255."""
        name, seed = self._fills[number]
        if number not in self._filled:
            pixels = torch.from_numpy(self.picture.astype(np.float32)).permute(2, 0, 1)[None]
            if name == "neighbours":  # anew for each hole
                return _picture(inpaint(pixels, torch.from_numpy(hidden)[None]))
            everywhere = torch.ones(pixels.shape[-2:], dtype=torch.bool)
            made = {
                "grey": lambda: torch.full_like(pixels, GREY),
                "mean": lambda: mean_fill(pixels, everywhere),
                "blur": lambda: blur_fill(pixels, BLUR * max(pixels.shape[-2:])),
                "noise": lambda: noise_fill(pixels, everywhere, seed=seed),
            }
            self._filled[number] = _picture(made[name]())
        return self._filled[number]


def _picture(pixels: Float[Tensor, "1 3 Y X"]) -> np.ndarray:
    return pixels[0].permute(1, 2, 0).numpy()


class TiledLooks(Veiled):
    """One run's picture, altered before it is cut into views; scored by teacher forcing, exactly."""

    KIND = "looks at the picture whole and in tiles"

    def __init__(self, lab: Lab, run: Run) -> None:
        super().__init__(run, run.picture, name=lab.name, fingerprint=lab.fingerprint)
        self.lab = lab
        given = lab.inputs(run, tiles=True)  # once: it also checks that the run is this model's
        self._text = {name: given[name] for name in ("input_ids", "attention_mask")}

    def scores(self, veils: Float[Tensor, "B 3 Y X"], targets: Targets) -> Float[Tensor, "B N"]:
        at = predicting_rows(targets)
        shown, numbers = veils[:, 0].cpu().numpy(), veils[:, 1].flatten(1).amax(1).int().tolist()
        given = [self.lab.shown(self.altered(one, number)) for one, number in zip(shown, numbers, strict=True)]
        together = {name: torch.cat([one[name] for one in given]) for name in given[0]}
        together |= {name: value.expand(len(given), -1) for name, value in self._text.items()}
        keep = torch.tensor(at, device=together["input_ids"].device)
        with undisturbed(self.lab.model):
            logits = self.lab.model(**together, logits_to_keep=keep, use_cache=False).logits
        return read_scores(logits, at, targets).cpu()


class Perturbed:
    """The scores (targets,) of a picture under coverings; call inside `capture.undisturbed`."""

    def __init__(
        self,
        pixels: Float[Tensor, "1 3 Y X"],
        fills: Mapping[str, Float[Tensor, "1 3 Y X"]],
        score: Score,
        where: PictureMap,
        *,
        batch: int = 16,
    ) -> None:
        self.pixels, self.fills, self.score, self.map, self.batch = pixels, fills, score, where, batch
        self.patches = np.flatnonzero(where.coverage().ravel() > 0)  # padding is never ranked nor filled
        self.forwards = 0
        self._known: dict[tuple[str, bytes], np.ndarray] = {}

    @property
    def whole(self) -> np.ndarray:
        """Score of the picture as it is, float64 (targets,)."""
        return self.covered("", np.zeros((1, len(self.patches)), bool))[0]

    def filled(self, fill: str) -> np.ndarray:
        """Score with every patch filled, float64 (targets,)."""
        return self.covered(fill, np.ones((1, len(self.patches)), bool))[0]

    def covered(self, fill: str, gone: np.ndarray) -> np.ndarray:
        """Scores float64 (B, targets) where `gone`, bool (B, patches), says which of `patches` are filled."""
        keys = [(fill if row.any() else "", np.packbits(row).tobytes()) for row in gone]
        new = {key: row for key, row in zip(keys, gone, strict=True) if key not in self._known}
        rows, names = list(new.values()), list(new)
        for start in range(0, len(rows), self.batch):
            masks = np.stack([self._on_pixels(row) for row in rows[start : start + self.batch]])
            for key, scores in zip(names[start:], self.pixels_covered(fill, masks), strict=False):
                self._known[key] = scores
        return np.stack([self._known[key] for key in keys])

    def pixels_covered(self, fill: str, masks: np.ndarray) -> np.ndarray:
        """Scores float64 (B, targets) with the pixels in `masks`, bool (B, Y, X), filled; not remembered."""
        source = self.fills[fill] if masks.any() else self.pixels
        found = []
        for start in range(0, len(masks), self.batch):
            now = torch.from_numpy(masks[start : start + self.batch, None]).to(self.pixels.device)
            found.append(self.score(torch.where(now, source, self.pixels)).double().cpu().numpy())
            self.forwards += len(now)
        return np.concatenate(found)

    def _on_pixels(self, gone: np.ndarray) -> np.ndarray:
        """Patches (patches,) -> the model's pixels (Y, X)."""
        grid = np.zeros(self.map.rows * self.map.cols, bool)
        grid[self.patches] = gone
        height, width = self.pixels.shape[-2:]
        y = np.arange(height) * self.map.rows // height
        x = np.arange(width) * self.map.cols // width
        return grid.reshape(self.map.rows, self.map.cols)[y][:, x]
