"""Take patches away: their tokens, at the connector's output or between layers, or what they show in the picture itself.

What `ablate_tokens` puts in a token's place is a choice with consequences: zero lies far from anything the model has seen, the
mean does not; ``drop`` puts nothing there. Each fill keeps the other tokens as they were at that layer, and what earlier
layers had already passed on stays in them. Beside the effect stand equally many random patches.

    effect = ablate_tokens(lab, run, [(2, 3), (2, 4)], fill="mean")

`ask_without` covers the patches in the picture and lets the model answer anew. Where `occlusion` gives the model its own words
back and reads one number, this lets it say something else. The picture of the new run is the covered one, so what you see is
what was asked about. Patches are covered in the picture's pixels; the resize that follows blurs their edges by less than a pixel
of the model's square.

    without = ask_without(lab, run, [(4, 2), (4, 3)])

`positive_control`: where the right place is known, taking it away must change the answer far more often than chance. Questions
of the picture book (their deciding things are known) or pictures of `llava_lab.worlds.redcell`; only those that the model
answers rightly count: a wrong answer has no place that made it right.

Sources: Neo et al. 2024 (arXiv 2410.07149) for mean ablation of object tokens, with a buffer, against equally many random ones;
Chen et al. 2024 (arXiv 2403.06764) for dropping tokens after a layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageFilter
from torch import Tensor

from llava_lab.capture import undisturbed
from llava_lab.checks import Sweep, entry, made_by, one_of, same_model, whole_number
from llava_lab.errors import LabError, OptionError
from llava_lab.interventions import plan
from llava_lab.interventions.knockout import Cut, cutting, proving
from llava_lab.models import Lab, read_picture
from llava_lab.models.layout import language_layers
from llava_lab.replay.fills import BLUR
from llava_lab.replay.fills import FILLS as COVERS
from llava_lab.replay.prefix import image_tokens
from llava_lab.replay.score import LOGODDS
from llava_lab.replay.targets import Wanted, resolve_targets
from llava_lab.results import ControlRates, Effect, Run
from llava_lab.stats import exact_match, wilson
from llava_lab.worlds import picturebook, redcell

FILLS = ("mean", "zero", "noise", "shuffle", "other", "drop")
MEAN_PICTURES = 16  # of the picture book, when none are given

Tokens = Float[Tensor, "P D"]


@contextmanager
@entry
def ablated(
    lab: Lab,
    run: Run,
    patches: Any,
    *,
    fill: str = FILLS[0],
    at: str | int = "projector",
    pictures: Sequence[Any] | None = None,
    other: Any = None,
    seed: int = 0,
) -> Iterator[Lab]:
    """The model with those tokens taken away, for every forward inside the block whose prompt has the run's places.

    >>> with ll.ablated(lab, run, [(3, 3), (3, 4)], fill="zero"):
    ...     lab.ask(picture, run.question).answer
    'The car is red.'
    """
    lab.inputs(run)
    place, layer = plan.positions_of_patches(run, patches), token_layer(lab, at)
    with remover(lab, run, fill, layer, pictures=pictures, other=other, seed=seed)(place, None):
        yield lab


@entry
def ablate_tokens(
    lab: Lab,
    run: Run,
    patches: Any,
    *,
    fill: str = FILLS[0],
    at: str | int = "projector",
    metric: Wanted = None,
    score: str = LOGODDS,
    pictures: Sequence[Any] | None = None,
    other: Any = None,
    draws: int = plan.DRAWS,
    seed: int = 0,
    answer: bool = True,
) -> Effect:
    """What changes when the tokens of `patches`, [(row, col), ...] or a bool grid, are taken away.

    `fill`: ``mean`` of the tokens of `pictures` (None: sixteen of the picture book), ``zero``, ``noise`` of each token's own
    length, ``shuffle`` (the tokens change places; a single one with a random other), ``other`` (the tokens of the picture
    `other` at the same places), ``drop`` (no other position can read them; the rest keep their places). `at`: "projector", or
    a layer l for the residual stream after l layers. Control: as many random patches, `draws` times; `Effect.percentile`
    says how many of them did less. `metric` and `score` as in `knockout`.

    Raises OptionError, TargetError, CheckpointError, PictureError, and LabError when the change did not reach the model.

    >>> effect = ll.ablate_tokens(lab, run, [(3, 3), (3, 4)], fill="zero", draws=2, answer=False)
    >>> effect.control.shape, effect.proof["states"]
    ((2, 1), 2.0)
    """
    targets = resolve_targets(lab, run, metric)
    draws, seed = whole_number("draws", draws), whole_number("seed", seed)
    lab.inputs(run)
    place, layer = plan.positions_of_patches(run, patches), token_layer(lab, at)
    remove = remover(lab, run, fill, layer, pictures=pictures, other=other, seed=seed)
    count, every = len(place.positions), np.arange(*run.segments["image"])
    others, name = [], "none"
    if draws and count == len(every):
        name = "none: there are no other patches to take instead"
    elif draws:
        rng, name = np.random.default_rng((seed, 37)), f"{count} random patches"
        others = [tuple(sorted(rng.choice(every, count, replace=False).tolist())) for _ in range(draws)]

    @contextmanager
    def prove(proof: dict[str, float]) -> Iterator[None]:
        with remove(place, proof):
            yield
        if fill != "drop" and proof["states"] != count:
            raise LabError(
                f"expected {count} tokens to be changed, got {proof['states']:g}; run one forward of the run's sequence"
            )

    where = "the connector's output" if layer == 0 else f"the stream after {layer} layers"
    change = plan.Plan(
        name="ablate_tokens",
        what=f"{place.name} at {where}: {fill}.",
        options={"fill": fill, "at": at, "patches": count, "positions": list(place.positions)},
        start=min([place.positions[0], *(positions[0] for positions in others)]),
        enter=partial(remove, place, None),
        prove=prove,
        controls=[partial(remove, plan.Positions(name, positions, place.length), None) for positions in others],
        control_name=name,
    )
    return plan.carry_out(lab, run, targets, change, seed=seed, answer=answer, score=score)


# Takes the tokens of a place away inside its block; with a proof to fill, one forward inside is checked.
Remove = Callable[[plan.Positions, dict[str, float] | None], AbstractContextManager[Any]]


def remover(lab: Lab, run: Run, fill: str, layer: int, *, pictures: Any = None, other: Any = None, seed: int = 0) -> Remove:
    """What takes away the tokens of any place of the run, before layer number `layer`; its fill is made once."""
    one_of("fill", fill, FILLS)
    if (other is not None) != (fill == "other"):
        raise OptionError(f"expected other= (a picture) with fill='other' and only there, got fill={fill!r} and other={other!r}")
    if fill == "drop":
        return partial(_dropped, lab, run, layer)
    table, begin = _table(lab, run, fill, layer, pictures, other, seed), run.segments["image"][0]

    @contextmanager
    def remove(place: plan.Positions, proof: dict[str, float] | None) -> Iterator[None]:
        values = shuffled(table, [position - begin for position in place.positions], seed) if fill == "shuffle" else table
        with plan.entering(lab, layer, place, lambda states, at: values[at - begin]) as changes:
            yield
        if proof is not None:
            proof["states"], proof["largest_change"] = float(changes.states), changes.largest

    return remove


@contextmanager
def _dropped(lab: Lab, run: Run, layer: int, place: plan.Positions, proof: dict[str, float] | None) -> Iterator[None]:
    """Nobody else reads the tokens from `layer` on; what they make of themselves is read by nobody."""
    everyone = plan.Positions("all", tuple(range(len(run.token_ids))), len(run.token_ids), True)
    cut, window = Cut(place, everyone), (layer, len(language_layers(lab.model)))
    with cutting(lab, cut, window), nullcontext() if proof is None else proving(lab, cut, window, proof):
        yield


def _table(lab: Lab, run: Run, fill: str, layer: int, pictures: Any, other: Any, seed: int) -> Tokens:
    """What is put at each image position, (patches, width)."""
    with undisturbed(lab.model):
        if fill == "mean":
            if pictures is None:
                pictures = [np.asarray(picturebook.scene("train", i).picture()) for i in range(MEAN_PICTURES)]
            elif not isinstance(pictures, Sequence) or isinstance(pictures, str) or not len(pictures):
                raise OptionError(
                    f"pictures must be a list of at least one picture, or None for the picture book; got {pictures!r}"
                )
            means = torch.stack([_tokens(lab, run, layer, picture).mean(0) for picture in pictures])
            return means.mean(0).expand(run.map.rows * run.map.cols, -1)
        if fill == "other":
            return _tokens(lab, run, layer, other)
        own = _tokens(lab, run, layer, None)
        if fill == "zero":
            return torch.zeros_like(own)
        if fill == "noise":
            drawn = torch.randn(own.shape, generator=torch.Generator().manual_seed(seed)).to(own.device)
            return (drawn / drawn.norm(dim=-1, keepdim=True) * own.float().norm(dim=-1, keepdim=True)).to(own.dtype)
        return own


def _tokens(lab: Lab, run: Run, layer: int, picture: Any) -> Tokens:
    """The image positions' states before `layer`, for the run's picture (None) or another one, prepared the same way."""
    inputs = lab.inputs(run)
    if picture is not None:
        inputs["pixel_values"] = lab.pixels(read_picture(picture), run.map.mode)
    if layer == 0:
        return image_tokens(lab, run, inputs["pixel_values"])[0]
    return plan.states_before(lab, layer, inputs)[slice(*run.segments["image"])]


def shuffled(table: Tokens, chosen: list[int], seed: int) -> Tokens:
    """The chosen tokens in each other's places, none in its own; a single one takes a random other's."""
    rng = np.random.default_rng((seed, 41))
    values = table.clone()
    if len(chosen) == 1:
        free = [number for number in range(len(table)) if number != chosen[0]]
        if free:
            values[chosen[0]] = table[int(rng.choice(free))]
        return values
    ring = rng.permutation(chosen)
    values[torch.from_numpy(np.array(ring)).to(table.device)] = table[torch.from_numpy(np.roll(ring, 1)).to(table.device)]
    return values


def token_layer(lab: Lab, at: Any) -> int:
    """`at` as a layer number: 0 for "projector", the connector's output. Raises OptionError."""
    count = len(language_layers(lab.model))
    if at == "projector":
        return 0
    if isinstance(at, bool) or not isinstance(at, Integral) or not 0 <= int(at) < count:
        raise OptionError(f"at must be 'projector' or a layer from 0 to {count - 1}, got {at!r}")
    return int(at)


# -- in the picture -------------------------------------------------------------------------

GREY = 128
ASKED = ("max_new_tokens", "temperature", "prompt", "fit")  # a run's options that are arguments of `Lab.ask`

Patches = Iterable[tuple[int, int]]


@entry
def ask_without(lab: Any, run: Run, patches: Patches, *, fill: str = COVERS[0], history: Any = ()) -> Run:
    """The same question, asked the same way, about the run's picture with `patches` (row, col) covered.

    `fill`: ``grey``, ``mean`` (the picture's own mean colour) or ``blur``. A run that came with earlier turns
    needs them again as `history`. Raises OptionError (no patch, one outside the grid, missing turns),
    CheckpointError (the run was made by another checkpoint).

    >>> everything = [(row, col) for row in range(12) for col in range(12)]
    >>> ll.ask_without(lab, run, everything).answer == run.answer
    False
    """
    same_model(lab, run)
    if "history" in run.segments and not history:
        raise OptionError("this run had earlier turns, which it keeps only as prompt text; give them again as history=")
    options = {name: run.options[name] for name in ASKED if name in run.options}
    covered = cover(run, patches, fill=fill)
    if not run.others:
        return lab.ask(covered, run.question, seed=run.seed, history=history, **options)
    shown = [covered if own is run.picture else own for own in run.pictures]
    return lab.ask(shown, run.question, seed=run.seed, history=history, **options).about(run.number)


def cover(run: Run, patches: Patches, *, fill: str = COVERS[0]) -> np.ndarray:
    """The run's picture, uint8 (height, width, 3), with `patches` filled; a new array."""
    one_of("fill", fill, COVERS)
    rows, cols = run.map.rows, run.map.cols
    grid = np.zeros((rows, cols), np.float32)
    for cell in plan.read_patches(run, patches):
        grid[cell] = 1
    covered = run.map.project(grid) == 1  # not a number, so never equal, where the model does not look
    if fill == "blur":
        radius = BLUR * max(run.picture.shape[:2])
        filling = np.asarray(Image.fromarray(run.picture).filter(ImageFilter.GaussianBlur(radius)))
    else:
        filling = (np.full(3, GREY) if fill == "grey" else run.picture.mean((0, 1)).round()).astype(np.uint8)
    return np.where(covered[:, :, None], filling, run.picture)


# -- where the right place is known -------------------------------------------------------

TASKS = ("picturebook", "redcell")
COVERED = 0.01  # of a patch: from there it belongs to the thing
MOST = 20  # questions tried for each one wanted


@dataclass(frozen=True)
class Asked:
    """A question and the pixels that decide it."""

    picture: np.ndarray
    question: str
    right: str
    deciding: np.ndarray  # bool (height, width)


@entry
def positive_control(
    lab: Lab,
    *,
    task: str = TASKS[0],
    n: int = 200,
    fill: str = FILLS[0],
    at: str | int = "projector",
    buffer: int = 0,
    split: str = "test",
    seed: int = 0,
) -> ControlRates:
    """How often the answer changes without the deciding patches, and without equally many random others, over `n` questions.

    `buffer` patches around the deciding ones are taken too. `fill`, `at` as in `ablate_tokens` (not ``other``). Questions
    the model answers wrongly are passed over, as are those whose deciding things leave too few other patches. Ctrl-C gives
    the questions that are done.

    Raises OptionError when no question can be used.

    >>> rates = ll.positive_control(lab, n=2, fill="zero")
    >>> rates.n, rates.changed.shape
    (2, (2, 2))
    """
    began = time.perf_counter()
    one_of("task", task, TASKS)
    one_of("fill", fill, [name for name in FILLS if name != "other"])
    n, buffer, seed = whole_number("n", n), whole_number("buffer", buffer), whole_number("seed", seed)
    layer, rng = token_layer(lab, at), np.random.default_rng((seed, 47))
    changed: list[tuple[bool, bool]] = []  # without the deciding patches, without others
    counts: list[int] = []  # of patches taken away
    asked = 0
    remove: Remove | None = None
    with undisturbed(lab.model), Sweep("positive control", total=n, unit="question") as sweep:
        for item in _items(lab, task, split, seed):
            if len(changed) >= n or asked >= MOST * max(n, 1):
                break
            asked += 1
            run = lab.ask(item.picture, item.question, max_new_tokens=48)
            places = places_of(run, item, buffer, rng) if exact_match(run.answer, item.right) else None
            if places is None:
                continue
            # the mean and zero are the same for every picture
            if remove is None or layer or fill not in ("mean", "zero"):
                remove = remover(lab, run, fill, layer, seed=seed)
            first, second = (
                plan.answer_under(lab, run, partial(remove, plan.positions_of_patches(run, place), None))[0] != run.answer
                for place in places
            )
            changed.append((first, second))
            counts.append(int(places[0].sum()))
            sweep.step()
    if not changed:
        raise OptionError(f"expected questions that {lab.name!r} answers rightly, got none of {asked}; try another task or split")
    deciding, random = (sum(column) for column in zip(*changed, strict=True))
    return ControlRates(
        task=task,
        options={"fill": fill, "at": at, "buffer": buffer, "split": split},
        n=len(changed),
        asked=asked,
        deciding=deciding / len(changed),
        random=random / len(changed),
        changed=np.array(changed, bool),
        deciding_interval=wilson(deciding, len(changed)),
        random_interval=wilson(random, len(changed)),
        patches=np.array(counts, np.int64),
        **made_by(lab, began),
        seed=seed,
        interrupted=sweep.interrupted,
    )


def _items(lab: Lab, task: str, split: str, seed: int) -> Iterator[Asked]:
    side = lab.grid[0]
    # patches a cell: the smallest number that divides the grid and leaves at most 12 cells a side
    per_cell = next(number for number in range(1, side + 1) if side % number == 0 and side // number <= 12)
    for index in count():
        if task == "redcell":
            cells = redcell.scene(split, index, rows=side // per_cell, seed=seed)
            yield Asked(np.asarray(cells.picture()), cells.question, cells.answer, cells.mask()[0])
        else:
            drawn: Any = picturebook.scene(split, index, seed=seed)
            masks = drawn.masks()
            for question in picturebook.ask_about(drawn, np.random.default_rng((picturebook.SPLITS[split], seed, index, 5)), 4):
                if question.deciding:
                    mask = masks[list(question.deciding)].any(0)
                    yield Asked(np.asarray(drawn.picture()), question.text, question.answer, mask)


def places_of(run: Run, item: Asked, buffer: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray] | None:
    """The deciding patches and as many others, bool (rows, cols); None where there are not enough others."""
    inside = run.map.mask_to_patches(item.deciding) > COVERED
    grid = torch.from_numpy(inside)[None, None].float()
    if buffer:
        inside = torch.nn.functional.max_pool2d(grid, 2 * buffer + 1, 1, buffer)[0, 0].numpy() > 0
    free = np.flatnonzero(~inside & (run.map.coverage() > 0))
    if not inside.any() or len(free) < inside.sum():
        return None
    other = np.zeros(inside.size, bool)
    other[rng.choice(free, int(inside.sum()), replace=False)] = True
    return inside, other.reshape(inside.shape)
