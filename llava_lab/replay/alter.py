"""Take parts of a run's picture away and score the run's own answer again: the way in for all that alters pictures.

`open_altered` gives an `Altered`: the picture of one run, any part of which can be hidden, and the score of each target
when it is. Occlusion, RISE, Shapley values, the greedy search and `faithfulness` use nothing else, so they run wherever a
picture can be altered and never ask what kind of model they have:

- `Pixels` and `Tokens`, an ordinary model: patches are filled in its own pixels, in what the vision tower gives out, or in
  the image tokens that the connector makes (``at="pixels"``, ``"vision"``, ``"projector"``).
- `InPicture`, a model whose own way with pictures cannot be reached: the picture itself is altered before the model sees
  it. `Tiles` is the one of models that look at a picture whole and in tiles, where hiding a cell of one view would leave
  the same thing to be seen in another.

`open_altered` is a `functools.singledispatch` on the lab's class: what has no registration of its own is taken for an
ordinary `Lab`, and `llava_lab.remote` registers closed models when it is imported. `within_budget` is dispatched likewise:
work on a closed model is first counted with an `Altered` that sends nothing.

At the pixels nothing of a hidden patch reaches the model. Further in, the tower has already mixed the patch into its
neighbours' features (and theirs into its own), so hiding a token hides what the language model reads at that place, which
is less than what the picture showed there. In return the tower runs once, and `Tokens.sweep` computes only what comes
after each variant's first changed token.

    altered = open_altered(lab, run, (run.target(),), at="pixels", fill="grey")
    left_half = torch.zeros(1, *altered.grid, dtype=torch.bool)
    left_half[:, :, : altered.grid[1] // 2] = True
    drop = altered.whole - altered.hidden(left_half)[0]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from llava_lab.capture import undisturbed
from llava_lab.checks import has_picture, one_of
from llava_lab.errors import LabError, OptionError
from llava_lab.models import Lab
from llava_lab.models.layout import connector_of, read_connector, require_patch_tokens
from llava_lab.replay.fills import EVERY_FILL, fill_picture, fill_pixels, inpaint, mean_fill, noise_fill
from llava_lab.replay.prefix import ROWS, Prefix, agree, embedded
from llava_lab.replay.score import LOGPROB, NAMES, SCORES, Reader, target_score
from llava_lab.replay.targets import Targets
from llava_lab.results import Run

LEVELS = ("pixels", "vision", "projector")
PLACES = {"pixels": "the pixels", "vision": "the vision tower's output", "projector": "the connector's output"}

Result = TypeVar("Result")


class Altered(ABC):
    """The picture of one run with parts hidden, and the score of each target, one of `replay.score.SCORES`."""

    frame: tuple[int, int]  # height and width of what `scores` takes
    patch: int  # side of a patch in the frame
    noise: Float[Tensor, " N"] | None = None  # the whole picture's noise floors, once it was scored; None where nobody knows
    reader: Reader | None = None  # what reads logits, where there are any

    def __init__(
        self,
        grid: tuple[int, int],
        *,
        at: str = LEVELS[0],
        fill: str = EVERY_FILL[0],
        fills: Sequence[str] = EVERY_FILL,
        batch: int = 8,
        score: str = LOGPROB,
    ) -> None:
        self.at, self.score = one_of("at", at, LEVELS), one_of("score", score, SCORES)
        if fill not in fills:
            raise OptionError(f"fill must be one of {', '.join(fills)}, got {fill!r}")
        self.grid, self.fill, self.batch = grid, fill, batch
        self.positions: int | None = None  # of the sequence that `sweep` computed, where it does not compute all of it
        self.passes = 0  # pictures the model has been given; one for each, however they were batched
        self._known: dict[tuple[str, bytes], Tensor] = {}

    @abstractmethod
    def _score(self, shown: Float[Tensor, "B Y X"], fill: str) -> Float[Tensor, "B N"]:
        """The targets' scores for one batch."""

    @property
    def whole(self) -> Float[Tensor, " N"]:
        """The score of the picture as it is."""
        return self.hidden(torch.zeros(1, *self.grid, dtype=torch.bool))[0]

    @property
    def scored(self) -> str:
        """What the score is, in words for a note."""
        return f"{NAMES[self.score]} (of a contrast: logit difference)"

    @property
    def filled(self) -> str:
        """What is done to hidden patches, in words for a note."""
        return f"filled with {self.fill} at {PLACES[self.at]}"

    def hidden(self, masks: Bool[Tensor, "B rows cols"], fill: str | None = None) -> Float[Tensor, "B N"]:
        """Scores, float32, with the patches in each mask filled. What was scored before is remembered and costs nothing."""
        fill = fill or self.fill
        # nothing hidden is the same picture whatever the fill
        keys = [(fill if row.any() else "", np.packbits(row).tobytes()) for row in masks.cpu().numpy()]
        first: dict[tuple[str, bytes], int] = {}
        for i, key in enumerate(keys):
            if key not in self._known:
                first.setdefault(key, i)
        new = list(first.values())
        for start in range(0, len(new), self.batch):
            now = new[start : start + self.batch]
            scores = self.scores(self._enlarged(~masks[now]), fill)
            self._known.update((keys[i], score) for i, score in zip(now, scores, strict=True))
        return torch.stack([self._known[key] for key in keys])

    def scores(self, shown: Float[Tensor, "B Y X"], fill: str | None = None) -> Float[Tensor, "B N"]:
        """Scores, float32, where `shown` says how much of each place of the frame is seen: 1 the picture, 0 its fill."""
        parts = []
        for part in shown.split(self.batch):
            parts.append(self._score(part, fill or self.fill).float().cpu())
            self.passes += len(part)
            unaltered = (part.flatten(1) == 1).all(1).nonzero().flatten()
            if self.reader is not None and len(unaltered):
                self.noise = self.reader.floors[int(unaltered[0])]
        return torch.cat(parts)

    def sweep(self, masks: Bool[Tensor, "M rows cols"]) -> Iterator[tuple[list[int], Float[Tensor, "B N"]]]:
        """Each mask's scores, a batch at a time, with the numbers of the masks they belong to."""
        for start in range(0, len(masks), self.batch):
            now = list(range(start, min(start + self.batch, len(masks))))
            yield now, self.hidden(masks[now])

    def _enlarged(self, shown: Bool[Tensor, "B rows cols"]) -> Float[Tensor, "B Y X"]:
        """Patches as squares of the frame; what a patch size that does not divide the frame leaves over stays shown."""
        squares = shown.float().repeat_interleave(self.patch, 1).repeat_interleave(self.patch, 2)
        height, width = self.frame
        return functional.pad(squares, (0, width - squares.shape[2], 0, height - squares.shape[1]), value=1.0)


@singledispatch
def open_altered(
    lab: Any,
    run: Run,
    targets: Targets,
    *,
    at: str = LEVELS[0],
    fill: str = EVERY_FILL[0],
    seed: int = 0,
    fills: Sequence[str] = EVERY_FILL,
    batch: int = 8,
    score: str = LOGPROB,
) -> Altered:
    """The picture of `run` (its first), ready to be altered ``at`` one of `LEVELS`; `fills` are those a method can use.

    Further in than the pixels, ``grey`` and ``blur`` are what the model makes of a grey or blurred picture, and
    ``mean`` and ``noise`` take their statistics over the picture's own tokens. A closed model has log-probabilities alone,
    whatever `score` says.

    Raises OptionError (an unknown place or fill, or a place this model does not have), CheckpointError (the run was
    made by another checkpoint).
    """
    options: dict[str, Any] = {"at": at, "fill": fill, "seed": seed, "fills": fills, "batch": batch, "score": score}
    has_picture(run)
    if run.others and at != LEVELS[0]:
        raise OptionError(f"at must be {LEVELS[0]!r}: the question is about {len(run.pictures)} pictures, got {at!r}")
    if run.views and not run.others:
        return Tiles(lab, run, targets, **options)
    return (Pixels if at == LEVELS[0] else Tokens)(lab, run, targets, **options)


@dataclass(frozen=True)
class Done(Generic[Result]):
    """What work on a lab gave, and what to know of it."""

    result: Result
    notes: tuple[str, ...] = ()
    extras: dict[str, Any] = field(default_factory=dict)


@singledispatch
def within_budget(lab: Any, run: Run, work: Callable[[Any], Result]) -> Done[Result]:
    """``work(lab)``, which alters pictures of `run`. A closed model counts its requests first, and adds notes."""
    return Done(work(lab))


class InModel(Altered):
    """An ordinary model: a grid of its own values is altered, pixels or tokens."""

    values: Float[Tensor, "1 C Y X"]  # the picture at this place

    def __init__(self, lab: Lab, run: Run, targets: Targets, *, seed: int = 0, **options: Any) -> None:
        super().__init__((run.map.rows, run.map.cols), **options)
        self.lab, self.run, self.targets, self.seed = lab, run, targets, seed
        self.reader: Reader = Reader(targets, self.score)
        self._fillings: dict[str, Tensor] = {}
        with undisturbed(lab.model):
            self._open()
        self.frame = self.values.shape[-2], self.values.shape[-1]
        if self.fill != "neighbours":
            self.filling(self.fill)

    @abstractmethod
    def _open(self) -> None:
        """Set `values` and `patch`."""

    @abstractmethod
    def _make(self, fill: str) -> Float[Tensor, "1 C Y X"]: ...

    @abstractmethod
    def read(self, values: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B N"]:
        """The targets' scores from values; call it inside `capture.undisturbed`."""

    def filling(self, fill: str) -> Float[Tensor, "1 C Y X"]:
        """What takes the place of hidden values, made once."""
        if fill not in self._fillings:
            with undisturbed(self.lab.model):
                self._fillings[fill] = self._make(fill)
        return self._fillings[fill]

    def altered(self, shown: Float[Tensor, "B Y X"], fill: str | None = None) -> Float[Tensor, "B C Y X"]:
        """The values where `shown` is 1, their fill where it is 0, a mixture between."""
        fill, shown = fill or self.fill, shown.to(self.values.device)
        filling = inpaint(self.values, shown < 0.5) if fill == "neighbours" else self.filling(fill)
        return torch.lerp(filling, self.values, shown[:, None].to(self.values.dtype))

    def _score(self, shown: Float[Tensor, "B Y X"], fill: str) -> Float[Tensor, "B N"]:
        with undisturbed(self.lab.model):
            return self.read(self.altered(shown, fill))


class Pixels(InModel):
    """Patches are filled in the model's square, at the very pixels of its patches."""

    def _open(self) -> None:
        self.values, self._read = target_score(self.lab, self.run, self.targets, self.reader)
        self.patch = self.run.map.patch

    def _make(self, fill: str) -> Float[Tensor, "1 C Y X"]:
        return fill_pixels(self.lab, self.values, fill, self.run.map, seed=self.seed)

    def read(self, values: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B N"]:
        return self._read(values)


class Tokens(InModel):
    """Patches are filled in what the vision tower gives out (``vision``), or in the image tokens (``projector``)."""

    patch = 1

    def _open(self) -> None:
        self._pixels = self.lab.inputs(self.run)["pixel_values"]
        if self.at == "vision":
            require_patch_tokens(self.lab.model, "what changes the tower's features patch by patch")
        self.values = self._states(self._pixels)

    def _make(self, fill: str) -> Float[Tensor, "1 C Y X"]:
        if fill in ("grey", "blur"):
            self.passes += 1
            return self._states(fill_pixels(self.lab, self._pixels, fill, self.run.map))
        seen = torch.from_numpy(self.run.map.coverage() > 0).to(self.values.device)
        return mean_fill(self.values, seen) if fill == "mean" else noise_fill(self.values, seen, seed=self.seed)

    def _states(self, pixels: Float[Tensor, "1 3 Y X"]) -> Float[Tensor, "1 C rows cols"]:
        features, tokens = read_connector(self.lab.model, pixels)
        states = features if self.at == "vision" else tokens
        patches = self.grid[0] * self.grid[1]
        if states.ndim != 3 or states.shape[:2] != (1, patches):
            raise LabError(f"expected the connector to see 1 x {patches} patches once, got {[tuple(states.shape)]}")
        return states.transpose(1, 2).reshape(1, -1, *self.grid)

    def tokens(self, values: Float[Tensor, "B C rows cols"]) -> Float[Tensor, "B P D"]:
        """What the language model is given."""
        flat = values.flatten(2).transpose(1, 2)
        return connector_of(self.lab.model)(flat) if self.at == "vision" else flat

    def read(self, values: Float[Tensor, "B C rows cols"]) -> Float[Tensor, "B N"]:
        """What follows the last predicting position is left out: nothing looks back at it."""
        at = self.reader.at
        sequence = embedded(self.lab, self.run, self.tokens(values))[:, : at[-1] + 1]
        seen = torch.ones(sequence.shape[:2], dtype=torch.long, device=sequence.device)
        keep = torch.tensor(at, device=sequence.device)
        return self.reader(
            self.lab.model(inputs_embeds=sequence, attention_mask=seen, logits_to_keep=keep, use_cache=False).logits
        )

    def sweep(self, masks: Bool[Tensor, "M rows cols"]) -> Iterator[tuple[list[int], Float[Tensor, "B N"]]]:
        """As `Altered.sweep`, with what comes before a mask's first hidden token computed once; the last to begin first.

        The numbers are those of full forwards. This is checked, not trusted: the whole picture is packed among the
        first variants and must score what a plain forward gives it.
        """
        image, end = self.run.segments["image"]
        stop = self.reader.at[-1] + 1
        starts = [image + int(mask.flatten().nonzero()[0, 0]) for mask in masks]
        groups = grouped(starts, stop, self.batch)
        # one more variant in the first pass: the whole picture, to be compared with the plain forward
        room = max(starts[group[-1]] + (len(group) + (i == 0)) * (stop - starts[group[-1]]) for i, group in enumerate(groups))
        plain = self.whole
        with undisturbed(self.lab.model):
            own = self.tokens(self.values)
            prefix = Prefix(self.lab, self.run, self.targets, tokens=own, room=room, score=self.score)
        for i, group in enumerate(groups):
            start = starts[group[-1]]
            with undisturbed(self.lab.model):
                tokens = self.tokens(self.altered(self._enlarged(~masks[group])))
                _same_beginning(tokens, own, start - image)
                rests = prefix.sequence[:, start:].repeat(len(group) + (i == 0), 1, 1)
                rests[: len(group), : max(end - start, 0)] = tokens[:, start - image :].to(rests.dtype)
                scores = prefix.branch(rests, start).cpu()
            if i == 0:
                assert self.noise is not None, "the whole picture was scored above"
                agree(scores[-1], plain, self.noise)
            self.passes += len(group)
            self.positions = prefix.positions
            yield group, scores[: len(group)]


class InPicture(Altered):
    """The picture itself is altered, before any model sees it. `KIND` says why there is no other place."""

    KIND: ClassVar[str]

    def __init__(self, name: str, run: Run, picture: np.ndarray, targets: Targets, *, seed: int = 0, **options: Any) -> None:
        super().__init__((run.map.rows, run.map.cols), **options)
        if self.at != LEVELS[0]:
            raise OptionError(f"at must be {LEVELS[0]!r}: {name!r} {self.KIND}, which leaves no other place, got {self.at!r}")
        self.run, self.picture, self.targets, self.seed = run, picture, targets, seed
        (height, width), (rows, cols) = picture.shape[:2], self.grid
        # squares of the frame are no larger than the picture's own pixels
        self.patch = -(-max(height * cols, width * rows) // (rows * cols))
        self.frame = rows * self.patch, cols * self.patch
        self._fillings: dict[str, np.ndarray] = {}

    def altered(self, shown: np.ndarray, fill: str) -> np.ndarray:
        """The picture, uint8 (height, width, 3), seen as `shown` (Y, X) of any size says."""
        if shown.min() == 1:
            return self.picture
        y, x = self.run.map.places(self.picture.shape[:2], shown.shape)
        seen = (y >= 0)[:, None] & (x >= 0)
        share = np.where(seen, shown[y][:, x], 1.0).astype(shown.dtype)[..., None]  # what no patch sees stays
        if fill == "neighbours":  # anew for each hole
            filling = fill_picture(self.picture, fill, hidden=share[..., 0] < 0.5)
        else:
            if fill not in self._fillings:
                self._fillings[fill] = fill_picture(self.picture, fill, seed=self.seed)
            filling = self._fillings[fill]
        return (filling + (self.picture - filling) * share).round().clip(0, 255).astype(np.uint8)


class Tiles(InPicture):
    """A model that looks at a picture whole and in tiles; its own preprocessing makes all views of the altered picture."""

    KIND = "looks at the picture whole and in tiles"

    def __init__(self, lab: Any, run: Run, targets: Targets, **options: Any) -> None:
        super().__init__(lab.name, run, run.picture, targets, **options)
        self.lab, self.reader = lab, Reader(targets, self.score)
        inputs = lab.inputs(run, tiles=True)  # once: it also checks that the run is this model's
        self._text = {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def _score(self, shown: Float[Tensor, "B Y X"], fill: str) -> Float[Tensor, "B N"]:
        assert self.reader is not None
        views = [self.lab.shown(self.altered(one, fill)) for one in shown.cpu().numpy()]
        inputs = {name: torch.cat([one[name] for one in views]) for name in views[0]}
        inputs |= {name: value.expand(len(views), -1) for name, value in self._text.items()}
        keep = torch.tensor(self.reader.at, device=inputs["input_ids"].device)
        with undisturbed(self.lab.model):
            return self.reader(self.lab.model(**inputs, logits_to_keep=keep, use_cache=False).logits)


def grouped(starts: Sequence[int], stop: int, batch: int) -> list[list[int]]:
    """Masks in order of falling beginnings, put together while a pass stays under `ROWS` positions and `batch` variants."""
    groups: list[list[int]] = []
    for mask in sorted(range(len(starts)), key=lambda i: -starts[i]):
        length = stop - starts[mask]
        if groups and len(groups[-1]) < batch and (len(groups[-1]) + 1) * length <= ROWS:
            groups[-1].append(mask)
        else:
            groups.append([mask])
    return groups


def _same_beginning(tokens: Float[Tensor, "B P D"], own: Float[Tensor, "1 P D"], first: int) -> None:
    """Hiding a patch may not change the tokens before it, or the kept keys and values are not theirs."""
    change = (tokens[:, :first] - own[:, :first]).abs().max() if first else tokens.new_zeros(())
    if float(change) > 1e-2 * float(own.abs().max()):
        raise LabError("expected a connector that treats each patch by itself, got one that mixes them; use at='projector'")
