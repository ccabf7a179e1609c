"""From what a user types to predicting positions: words, tokens, the whole answer, contrasts.

A contrast ("red" and not "blue") needs the tokenizer: the word in the answer is replaced, and the
first token that differs is where the model chose. `Run.target` resolves everything else without a model.
The small readers below cut each target's rows, and the image's columns, out of what was recorded.

    (target,) = resolve_targets(lab, run, ("red", "blue"))
    predicting_rows((target,))
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llava_lab.errors import TargetError
from llava_lab.models.text import decode, refuse_special_text
from llava_lab.results import Run, Target, Word, bare, spelling

Targets = tuple[Target, ...]
Wanted = str | int | Word | Target | tuple[str, str] | Sequence[Any] | None


def resolve_targets(lab: Any, run: Run, target: Wanted = None) -> Targets:
    """Everything `target` names, as predicting positions.

    None or ``"answer"`` is the whole answer, ``"words"`` each word, an int an answer token, a str a
    word, a tuple of two str their contrast (the first must be in the answer); a list is several.

    Raises TargetError when something is not in the answer.
    """
    if isinstance(target, str) and target == "words":
        found = run.word_targets()
    elif _is_pair(target):
        found = (contrast(lab, run, *target),)  # type: ignore[misc]
    elif isinstance(target, (list, tuple)):
        found = tuple(one for item in target for one in resolve_targets(lab, run, item))
    else:
        found = (run.target(target),)  # type: ignore[arg-type]
    if not found or any(not one.positions for one in found):
        raise TargetError("expected something to explain, got an empty answer or an empty list of targets")
    start, stop = run.segments["answer"]
    for one in found:
        if not all(start - 1 <= position < stop - 1 for position in one.positions):
            raise TargetError(f"target {one.text!r} points outside the answer; was it made from another run?")
    return found


def predicting_rows(targets: Targets) -> tuple[int, ...]:
    """Every position that predicts a token of some target, sorted."""
    return tuple(sorted({position for target in targets for position in target.positions}))


def target_rows(rows: Float[Tensor, "Q K"], at: Sequence[int], targets: Targets) -> Float[Tensor, "N K"]:
    """Mean row of each target; `at` names the position of each row given."""
    where = {position: i for i, position in enumerate(at)}
    return torch.stack([rows[[where[position] for position in target.positions]].mean(0) for target in targets])


def image_values(rows: Float[Tensor, "N K"], run: Run) -> np.ndarray:
    """The image columns of each target's row, float32 (targets, rows, cols); of the first view where there are several."""
    if run.views:
        return view_values(rows, run)[0]
    start, stop = run.segments["image"]
    return rows[:, start:stop].float().cpu().numpy().reshape(len(rows), run.map.rows, run.map.cols)


def view_values(rows: Float[Tensor, "N K"], run: Run) -> tuple[np.ndarray, ...]:
    """The same for each view, newline tokens left out; nothing where the run has one."""
    return tuple(rows.float().cpu().numpy()[:, view.positions] for view in run.views)


def segment_mass(rows: Float[Tensor, "N K"], run: Run) -> list[dict[str, float]]:
    """How much of each target's row lies on each segment of the sequence."""
    return [{name: float(row[start:stop].sum()) for name, (start, stop) in run.segments.items()} for row in rows]


def _is_pair(target: Any) -> bool:
    return isinstance(target, tuple) and len(target) == 2 and all(isinstance(word, str) for word in target)


@singledispatch
def contrast(lab: Any, run: Run, said: str, instead: str) -> Target:
    """The first token where the answer with `said` and the answer with `instead` part ways; dispatched on the lab's class."""
    word = run.word(said)
    instead = instead.strip()
    if not instead:
        raise TargetError(f"a contrast needs another word beside {said!r}, got {instead!r}")
    if bare(said) == bare(instead):
        raise TargetError(f"a contrast needs two different words, got {said!r} twice")
    tokenizer = lab.tokenizer
    refuse_special_text(tokenizer, instead)
    start, stop = run.segments["answer"]
    ids = [int(i) for i in run.token_ids[start:stop]]
    text, before = decode(tokenizer, ids), decode(tokenizer, ids[: word.start - start])
    spelt = spelling(word.text)
    at = text.find(spelt, len(before.rstrip()))
    if spelt[:1].isupper() and instead[:1].islower():
        instead = instead[:1].upper() + instead[1:]
    changed = text[:at] + instead + text[at + len(spelt) :]
    kept, other = (tokenizer.encode(one, add_special_tokens=False) for one in (text, changed))
    first = next((i for i, (one, two) in enumerate(zip(kept, other, strict=False)) if one != two), None)
    if at < 0 or first is None or kept[: first + 1] != ids[: first + 1]:
        raise TargetError(f"cannot put {instead!r} in the place of {said!r}: the tokenizer splits this answer differently")
    return Target("contrast", f"{spelt}, not {instead}", (start + first - 1,), (ids[first],), (other[first],))
