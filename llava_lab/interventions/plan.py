"""What every intervention shares: measure before, touch, prove, measure after, do the same at random, answer again.

An intervention is a `Plan`: context managers that touch the model, and the first position they change.

Where to touch a sequence: segments, patches and positions, all resolved to positions of one run.

What reaches to the sequence's end (``last``, ``answer``, ``all``) is *open*: it goes on through tokens that are
generated later, so that decoding step by step is treated like the whole sequence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm.auto import tqdm

from llava_lab.capture import undisturbed
from llava_lab.errors import LabError, OptionError
from llava_lab.models.generation import Generated, generate
from llava_lab.models.text import decode
from llava_lab.replay.alter import PATIENCE
from llava_lab.replay.prefix import AGREE, Tail
from llava_lab.replay.targets import Targets
from llava_lab.results import Effect, Run

if TYPE_CHECKING:
    from llava_lab.models import Lab

Enter = Callable[[], AbstractContextManager[Any]]
DRAWS = 20


@dataclass(frozen=True)
class Plan:
    """One intervention, ready to be carried out."""

    name: str
    what: str
    options: dict[str, Any]
    start: int  # the first position it changes
    enter: Enter
    prove: Callable[[dict[str, float]], AbstractContextManager[Any]]  # the same, checked; fills the proof
    controls: Sequence[Enter] = ()
    control_name: str = "none"
    notes: tuple[str, ...] = ()
    side: Callable[[], dict[str, Any]] = field(default=dict)  # what it does to other questions


def carry_out(lab: Lab, run: Run, targets: Targets, plan: Plan, *, seed: int, answer: bool = True) -> Effect:
    """Measure a plan. Ctrl-C during the random controls or the answering keeps what is done; earlier it is raised."""
    began = time.perf_counter()
    proof: dict[str, float] = {}
    drawn: list[np.ndarray] = []
    side: dict[str, Any]
    said, side, stopped, answered = "", {}, False, False
    with undisturbed(lab.model):
        tail = Tail(lab, run, targets, plan.start)
        before = tail.score().cpu().numpy()
        with plan.prove(proof):
            after = tail.score().cpu().numpy()
        try:
            for control in tqdm(plan.controls, desc=f"{plan.name} at random", unit="draw", delay=PATIENCE, leave=False):
                with control():
                    drawn.append(tail.score().cpu().numpy() - before)
            if answer:
                said, stopped = answer_under(lab, run, plan.enter, proof)
                answered = not stopped
            side = {} if stopped else plan.side()
        except KeyboardInterrupt:
            stopped = True
    notes = plan.notes
    if stopped:
        notes = (*notes, f"Interrupted after {len(drawn)} of {len(plan.controls)} random controls.")
    return Effect(
        name=plan.name,
        what=plan.what,
        options=plan.options,
        targets=targets,
        before=before,
        after=after,
        control=np.array(drawn, np.float32).reshape(len(drawn), len(targets)),
        control_name=plan.control_name,
        answer_before=run.answer,
        answer_after=said,
        answered=answered,
        proof=proof,
        side=side,
        map=run.map,
        model=run.model,
        fingerprint=run.fingerprint,
        seed=seed,
        passes={"forward": tail.passes + 1},
        seconds=time.perf_counter() - began,
        interrupted=stopped,
        notes=notes,
    )


def answer_under(lab: Lab, run: Run, enter: Enter, proof: dict[str, float] | None = None) -> tuple[str, bool]:
    """The answer under an intervention, token by token on a cache, and whether Ctrl-C ended it.

    With `proof` the finished answer is also given back in one whole forward, and its log-probabilities must be those
    of the steps: an intervention that is lost while decoding is refused. Adds ``decode_error``.
    """
    inputs = lab.inputs(run)
    prompt = inputs["input_ids"][:, : run.segments["answer"][0]]
    limit = min(int(run.options.get("max_new_tokens", 64)), lab.context - prompt.shape[1])
    with enter():
        found = generate(
            lab.model,
            prompt,
            inputs["pixel_values"],
            limit=max(limit, 1),
            eos=lab.eos_ids,
            image_id=lab.image_id,
            temperature=float(run.options.get("temperature", 0.0)),
            seed=run.seed,
        )
        if proof is not None and len(found.token_ids):
            proof["decode_error"] = _decoding_error(lab, prompt, inputs["pixel_values"], found)
    return decode(lab.tokenizer, found.token_ids.tolist()).strip(), found.stopped == "interrupted"


def _decoding_error(lab: Lab, prompt: torch.Tensor, pixels: torch.Tensor, found: Generated) -> float:
    new = torch.from_numpy(found.token_ids)[None].to(prompt.device)
    ids = torch.cat([prompt, new[:, :-1]], 1)
    keep = torch.arange(prompt.shape[1] - 1, ids.shape[1], device=prompt.device)
    model: Any = lab.model
    logits = model(input_ids=ids, pixel_values=pixels, use_cache=False, logits_to_keep=keep).logits[0]
    whole = logits.float().log_softmax(-1).gather(1, new[0][:, None])[:, 0].cpu().numpy()
    error = float((np.abs(whole - found.logprobs) / np.maximum(np.abs(found.logprobs), 1)).max())
    if not error <= AGREE.get(lab.dtype, 1e-3):
        raise LabError(
            f"expected the same log-probabilities token by token and in one forward, got a difference of {error:.3g}; "
            "the intervention is lost while decoding with this model's cache"
        )
    return error


OPEN = ("last", "answer", "all")


@dataclass(frozen=True)
class Spots:
    """Some positions of a run's sequence."""

    name: str
    positions: tuple[int, ...]  # sorted, each once
    length: int  # of the run's sequence
    open: bool = False  # every later position belongs too

    def holds(self, at: Tensor) -> Bool[Tensor, " N"]:
        """Whether each position `at` belongs."""
        found = torch.isin(at, torch.tensor(self.positions, dtype=at.dtype, device=at.device))
        return found | (at >= self.length) if self.open else found


def spots(run: Run, what: Any, *, option: str) -> Spots:
    """`what` as positions: a segment's name, ``last``, ``all``, patches [(row, col), ...], a bool grid, or positions.

    ``last`` is every position that predicts the answer: the prompt's last and the answer's own. Raises OptionError on
    an unknown name, an empty set, a patch outside the grid or a position outside the sequence.
    """
    length = len(run.token_ids)
    if isinstance(what, Spots):
        return what
    if isinstance(what, str):
        return Spots(what, _named(run, what, option), length, what in OPEN)
    if isinstance(what, np.ndarray) and what.dtype == bool:
        if what.shape != (run.map.rows, run.map.cols):
            raise OptionError(f"{option} as a grid must be {run.map.rows}x{run.map.cols} bool, got shape {what.shape}")
        what = [tuple(cell) for cell in np.argwhere(what).tolist()]
    items = [int(one) if isinstance(one, Integral) else one for one in what] if _listed(what) else None
    if not items:
        raise OptionError(f"{option} must be {_choices(run)}, patches [(row, col), ...] or positions, none empty; got {what!r}")
    if all(isinstance(one, int) for one in items):
        wrong = [one for one in items if not 0 <= one < length]
        if wrong:
            raise OptionError(f"{option}: positions run from 0 to {length - 1}, got {wrong[0]}")
        return Spots(_count(len(set(items)), "position"), tuple(sorted(set(items))), length)
    return patch_spots(run, items, option=option)


def patch_spots(run: Run, patches: Any, *, option: str = "patches") -> Spots:
    """Patches (row, col) as the positions of their image tokens."""
    if isinstance(patches, np.ndarray) and patches.dtype == bool:
        return spots(run, patches, option=option)
    found = []
    for one in patches if _listed(patches) else ():
        fine = isinstance(one, Sequence | np.ndarray) and len(one) == 2 and all(isinstance(v, Integral) for v in one)
        if not fine or not (0 <= one[0] < run.map.rows and 0 <= one[1] < run.map.cols):
            last = f"rows 0 to {run.map.rows - 1} and columns 0 to {run.map.cols - 1}"
            raise OptionError(f"{option}: a patch is (row, col) with {last}, got {one!r}")
        found.append(run.segments["image"][0] + int(one[0]) * run.map.cols + int(one[1]))
    if not found:
        raise OptionError(f"{option}: expected at least one patch (row, col), got {patches!r}")
    return Spots(_count(len(set(found)), "patch"), tuple(sorted(set(found))), len(run.token_ids))


def is_patches(run: Run, place: Spots) -> bool:
    """Whether the positions are some, but not all, of the picture's."""
    start, stop = run.segments["image"]
    return all(start <= one < stop for one in place.positions) and len(place.positions) < stop - start


def _named(run: Run, name: str, option: str) -> tuple[int, ...]:
    start, stop = run.segments["answer"]
    if name == "last":
        return tuple(range(start - 1, max(stop - 1, start)))
    if name == "all":
        return tuple(range(len(run.token_ids)))
    if name not in run.segments:
        raise OptionError(f"{option}: no segment {name!r}; there is {_choices(run)}")
    found = tuple(range(*run.segments[name]))
    if not found:
        raise OptionError(f"{option}: the segment {name!r} of this run is empty; choose another of {_choices(run)}")
    return found


def _choices(run: Run) -> str:
    return ", ".join([*run.segments, "last", "all"])


def _listed(what: Any) -> bool:
    return isinstance(what, Sequence | range | set | frozenset | np.ndarray) and len(what) > 0


def _count(number: int, noun: str) -> str:
    plural = "patches" if noun == "patch" else noun + "s"
    return f"{number} {noun if number == 1 else plural}"
