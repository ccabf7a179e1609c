"""Steer along a direction, or erase it, and see what that does to the answer and to other questions.

A direction that works on one question and wrecks the others has found nothing; so the side effects are part of the
result. A length is given in units of each state's own, so that `alpha` means the same in every layer, and the same in one
forward as token by token.

    effect = steer(lab, run, direction=("red", "blue"), layers=(1, 3), alpha=0.5)

Sources: Turner et al. 2023 (arXiv 2308.10248) for adding directions. Erasing a word from image tokens is the aim of Jiang et
al. 2024 (arXiv 2410.02762), by other means: they take the text state of the word at one layer as direction and subtract it
at one layer, from the tokens that lie on its side alone. Here the direction is the word's row of the output head less the
mean row, and it is projected out in every layer asked for, on either side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llava_lab.capture import undisturbed
from llava_lab.checks import array_of, entry, layer_window, number, shown, whole_number
from llava_lab.errors import LabError, OptionError
from llava_lab.interventions import plan
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers
from llava_lab.replay.score import LOGODDS, read_scores
from llava_lab.replay.targets import Wanted, resolve_targets
from llava_lab.replay.words import output_head
from llava_lab.results import Effect, Run

OTHERS = ("What is in the picture?", "How many things are there?", "Is there a car?")  # asked beside, when none are given


@entry
def steer(
    lab: Lab,
    run: Run,
    *,
    direction: Any,
    layers: Sequence[int] | None = None,
    alpha: float = 1.0,
    where: Any = "last",
    metric: Wanted = None,
    score: str = LOGODDS,
    others: Sequence[str] = OTHERS,
    draws: int = plan.DRAWS,
    seed: int = 0,
    answer: bool = True,
) -> Effect:
    """Add `direction`, `alpha` times as long as each state, to what each layer of [start, stop) gives on, at `where`.

    `direction`: a word (its first token's row of the output head, less the mean row), a pair of words (their
    difference), or numbers (width,), such as `mean_difference`. Negative `alpha` goes the other way. Control: random
    directions of the same length. `others`: questions about the same picture, answered before and after.

    Raises OptionError, TargetError, CheckpointError, and LabError when the states did not move as they should.

    >>> effect = ll.steer(lab, run, direction=("blue", "red"), alpha=2, metric=("red", "blue"), draws=1, others=[], answer=False)
    >>> bool(effect.change[0] < 0)
    True
    """
    is_number = not isinstance(alpha, bool) and isinstance(alpha, int | float | np.floating)
    if not is_number or not np.isfinite(float(alpha)) or not alpha:
        raise OptionError(f"alpha must be a finite number other than 0, got {alpha!r}")
    size = {"alpha": float(alpha)}
    return _measure(lab, run, "steer", direction, size, layers, where, metric, score, others, draws, seed, answer)


@entry
def erase(
    lab: Lab,
    run: Run,
    *,
    direction: Any,
    layers: Sequence[int] | None = None,
    where: Any = "image",
    strength: float = 1.0,
    metric: Wanted = None,
    score: str = LOGODDS,
    others: Sequence[str] = OTHERS,
    draws: int = plan.DRAWS,
    seed: int = 0,
    answer: bool = True,
) -> Effect:
    """Take `direction` out of what each layer of [start, stop) gives on, at `where`: h - strength (h.u) u. Otherwise as `steer`.

    With `strength` 1 nothing of the direction is left there, which is checked in the call.

    >>> effect = ll.erase(lab, run, direction="red", where="image", draws=1, others=[], answer=False)
    >>> effect.what
    "erased: 'red', at image, layers 0 to 5."
    """
    size = {"strength": number("strength", strength)}
    return _measure(lab, run, "erase", direction, size, layers, where, metric, score, others, draws, seed, answer)


@contextmanager
@entry
def steered(
    lab: Lab, run: Run, *, direction: Any, layers: Sequence[int] | None = None, alpha: float = 1.0, where: Any = "last"
) -> Iterator[Lab]:
    """The model with the direction added, for every forward inside the block.

    >>> with ll.steered(lab, run, direction=("blue", "red"), alpha=2.0):
    ...     lab.ask(picture, run.question, max_new_tokens=1).answer
    'blue'
    """
    lab.inputs(run)
    unit, _ = find_direction(lab, direction)
    with moving(lab, plan.positions_of(run, where, option="where"), _window(lab, layers), "steer", unit, alpha):
        yield lab


@contextmanager
@entry
def erased(
    lab: Lab, run: Run, *, direction: Any, layers: Sequence[int] | None = None, where: Any = "image", strength: float = 1.0
) -> Iterator[Lab]:
    """The model with the direction taken out, for every forward inside the block.

    >>> with ll.erased(lab, run, direction="red", where="image"):
    ...     lab.ask(picture, run.question).answer
    'The car is red.'
    """
    lab.inputs(run)
    unit, _ = find_direction(lab, direction)
    with moving(lab, plan.positions_of(run, where, option="where"), _window(lab, layers), "erase", unit, strength):
        yield lab


def find_direction(lab: Lab, direction: Any) -> tuple[Float[Tensor, " D"], str]:
    """A unit vector, float32, and what it is in words: which token stands for a word of several."""
    width = output_head(lab).weight.shape[1]
    if isinstance(direction, str):
        row, name = _word_row(lab, direction)
    elif isinstance(direction, tuple) and len(direction) == 2 and all(isinstance(word, str) for word in direction):
        (plus, first), (minus, second) = (_word_row(lab, word) for word in direction)
        row, name = plus - minus, f"{first} minus {second}"
    else:
        numbers = array_of("direction", direction)
        if numbers.dtype.kind not in "fiub":
            raise OptionError(f"direction must be a word, two words or {width} numbers, got {shown(direction)}")
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
            row = torch.from_numpy(numbers.astype(np.float32)).to(lab.device)
        name = "a given direction"
        if row.shape != (width,):
            raise OptionError(
                f"direction must have {width} numbers, one per dimension of the stream, got shape {tuple(row.shape)}"
            )
    length = float(row.norm())
    if not 0 < length < float("inf"):
        raise OptionError(f"direction must be finite and not zero, got length {length:g} for {name}")
    return row / length, name


@entry
def mean_difference(lab: Lab, runs: Sequence[Run], others: Sequence[Run], *, layer: int, where: Any = "last") -> np.ndarray:
    """Mean state of `runs` minus that of `others` after `layer` layers at `where`, float32 (width,).

    >>> other = lab.ask(picture, "What is in the picture?")
    >>> ll.mean_difference(lab, [run], [other], layer=3).shape
    (256,)
    """
    if not runs or not others:
        raise OptionError(f"expected at least one run on each side, got {len(runs)} and {len(others)}")
    count = len(language_layers(lab.model))
    if whole_number("layer", layer) >= count:
        raise OptionError(f"layer must be from 0 to {count - 1}, got {layer}")

    def mean(group: Sequence[Run]) -> Tensor:
        means = []
        for run in group:
            rows = list(plan.positions_of(run, where, option="where").positions)
            means.append(plan.states_before(lab, layer, lab.inputs(run))[rows].float().mean(0))
        return torch.stack(means).mean(0)

    with undisturbed(lab.model):
        return (mean(runs) - mean(others)).cpu().numpy()


def _measure(
    lab: Lab,
    run: Run,
    kind: str,
    direction: Any,
    size: dict[str, float],
    layers: Any,
    where: Any,
    metric: Wanted,
    score: str,
    others: Any,
    draws: int,
    seed: int,
    answer: bool,
) -> Effect:
    """The effect of steering or erasing; `size` is the option that says how much, by its name."""
    targets = resolve_targets(lab, run, metric)
    lab.inputs(run)
    if isinstance(others, str) or not all(isinstance(question, str) and question.strip() for question in others):
        raise OptionError(f"others must be a list of questions, got {others!r}")
    draws, seed = whole_number("draws", draws), whole_number("seed", seed)
    place, window = plan.positions_of(run, where, option="where"), _window(lab, layers)
    unit, name = find_direction(lab, direction)
    (amount,) = size.values()
    generator = torch.Generator().manual_seed(seed)
    random_directions = [torch.randn(unit.shape, generator=generator).to(unit.device) for _ in range(draws)]

    def enter(along: Tensor, at: plan.Positions = place) -> plan.Enter:
        return partial(moving, lab, at, window, kind, along / along.norm(), amount)

    @contextmanager
    def prove(proof: dict[str, float]) -> Iterator[None]:
        with moving(lab, place, window, kind, unit, amount, check=True) as changes:
            yield
        proof["states"], proof["largest_change"] = float(changes.states), changes.largest
        if not changes.states:
            raise LabError(f"expected states at {place.name} to change, got none; run one whole forward")

    moved = plan.Plan(
        name=kind,
        what=f"{'added' if kind == 'steer' else 'erased'}: {name}, at {place.name}, layers {window[0]} to {window[1] - 1}.",
        options={"layers": list(window), "where": place.name, **size, "direction": name},
        start=place.positions[0],
        enter=enter(unit),
        prove=prove,
        controls=[enter(along) for along in random_directions],
        control_name="random directions of the same length" if draws else "none",
        side=lambda: _side(lab, run, others, where, lambda at: enter(unit, at)),
    )
    return plan.carry_out(lab, run, targets, moved, seed=seed, answer=answer, score=score)


def _side(lab: Lab, run: Run, others: Sequence[str], where: Any, enter: Callable[[plan.Positions], plan.Enter]) -> dict[str, Any]:
    """Other questions about the picture: answers before and after, and what happened to the old answer's log-probability."""
    rows: dict[str, Any] = {"questions": [], "before": [], "after": [], "change": []}
    names = ("max_new_tokens", "prompt", "fit")
    chosen = {name: run.options[name] for name in names if name in run.options}
    for question in others:
        asked = lab.ask(run.picture, question, **chosen)
        if asked.segments["answer"][0] == asked.segments["answer"][1]:
            continue  # nothing said, nothing to compare
        changed = enter(plan.positions_of(asked, where, option="where"))
        targets = resolve_targets(lab, asked)
        at = targets[0].positions
        model: Any = lab.model
        keep = torch.tensor(at, device=lab.device)
        with changed():
            logits = model(**lab.inputs(asked), use_cache=False, logits_to_keep=keep).logits
        change = float(read_scores(logits, at, targets)[0, 0]) - float(asked.logprobs.sum())
        new_answer, _ = plan.answer_under(lab, asked, changed)
        for key, value in zip(rows, (question, asked.answer, new_answer, change), strict=True):
            rows[key].append(value)
    return rows


@contextmanager
def moving(
    lab: Lab, place: plan.Positions, window: tuple[int, int], kind: str, unit: Tensor, amount: float, *, check: bool = False
) -> Iterator[plan.Changes]:
    """Add ("steer") or erase `unit` in what each layer of the window gives on; with `check`, see that an erasure leaves none."""

    def change(states: Tensor, at: Tensor) -> Tensor:
        plain = states.float()
        along = plain @ unit
        step = -amount * along[:, None] if kind == "erase" else amount * plain.norm(dim=-1, keepdim=True)
        new = (plain + step * unit).to(states.dtype)
        if check and kind == "erase":
            left = (new.float() @ unit - (1 - amount) * along).abs()
            limit = 8 * torch.finfo(states.dtype).eps * plain.norm(dim=-1)
            if bool((left > limit).any()):
                raise LabError(f"expected nothing of the direction to be left, got {float(left.max()):.3g}; use float32")
        return new

    modules, attentions = plan.parts(lab, "residual")[slice(*window)], plan.parts(lab, "attention")[slice(*window)]
    with plan.changing(modules, attentions, place, change) as changes:
        yield changes


def _word_row(lab: Lab, word: str) -> tuple[Float[Tensor, " D"], str]:
    ids = lab.tokenizer.encode(" " + word.strip(), add_special_tokens=False) if word.strip() else []
    pieces = [str(lab.tokenizer.decode([number])) for number in ids]
    useful = [i for i, piece in enumerate(pieces) if piece.strip()]
    if not useful:
        raise OptionError(f"direction: expected a word, got {word!r}, of which the tokenizer makes nothing")
    weight = output_head(lab).weight.detach().float()
    row = weight[ids[useful[0]]] - weight.mean(0)
    used = pieces[useful[0]].strip()
    name = repr(word) if len(useful) == 1 else f"{word!r} (its first of {len(useful)} tokens, {used!r})"
    return row, name


def _window(lab: Lab, layers: Any) -> tuple[int, int]:
    return layer_window(layers, len(language_layers(lab.model)))
