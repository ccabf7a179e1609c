"""What every intervention shares: where it acts in the sequence, how states are changed there, and how its effect is measured.

An intervention is a `Plan`: a context manager that changes the model, the same with a proof that the change took effect,
others at random as a control, and the first position they change. `carry_out` measures before, inside, inside each
control, and lets the model answer again.

Where to act is said by segments, patches or positions, all resolved to `Positions` of one run. What reaches to the
sequence's end (``last``, ``answer``, ``all``) is *open*: it goes on through tokens that are generated later, so that
decoding step by step is treated like the whole sequence.

    place = positions_of(run, "question", option="source")

Between layers, states at some positions are replaced or mapped, with a check that it happened. A layer number l stands for the
residual stream after l layers, 0 being what the first layer is given. Positions are counted from what the cache holds, so the
same change serves a whole forward and every later step.

    with entering(lab, 0, place, lambda states, at: 0 * states) as changes:
        lab.model(**lab.inputs(run))
    assert changes.states == len(place.positions)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from llava_lab.capture import hooked, undisturbed
from llava_lab.capture.watch import attention_module
from llava_lab.checks import Sweep, is_list, is_whole, made_by, one_of, patches_of, shown
from llava_lab.errors import LabError, OptionError
from llava_lab.models import Lab
from llava_lab.models.generation import generate, log_probs
from llava_lab.models.layout import language_layers
from llava_lab.models.text import decode
from llava_lab.replay.prefix import AGREE, Prefix
from llava_lab.replay.score import LOGODDS, SCORES, noise_floor
from llava_lab.replay.targets import Targets
from llava_lab.results import Effect, Run, Target

DRAWS = 20  # random controls
OPEN = ("last", "answer", "all")

# -- where ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Positions:
    """Some positions of a run's sequence."""

    name: str
    positions: tuple[int, ...]  # sorted, each once
    length: int  # of the run's sequence
    open: bool = False  # every later position belongs too

    def holds(self, at: Tensor) -> Bool[Tensor, " N"]:
        """Whether each position `at` belongs."""
        inside = torch.isin(at, torch.tensor(self.positions, dtype=at.dtype, device=at.device))
        return inside | (at >= self.length) if self.open else inside


def positions_of(run: Run, what: Any, *, option: str) -> Positions:
    """`what` as positions: a segment's name, ``last``, ``all``, patches [(row, col), ...], a bool grid, or positions.

    ``last`` is every position that predicts the answer: the prompt's last and the answer's own. Raises OptionError on
    an unknown name, an empty set, a patch outside the grid or a position outside the sequence.
    """
    length, choices = len(run.token_ids), ", ".join([*run.segments, "last", "all"])
    if isinstance(what, Positions):
        return what
    if isinstance(what, str):
        start, stop = run.segments["answer"]
        special = {"last": range(start - 1, max(stop - 1, start)), "all": range(length)}
        if what not in special and what not in run.segments:
            raise OptionError(f"{option}: no segment {what!r}; there is {choices}")
        inside = special[what] if what in special else range(*run.segments[what])
        if not inside:
            raise OptionError(f"{option}: the segment {what!r} of this run is empty; choose another of {choices}")
        return Positions(what, tuple(inside), length, what in OPEN)
    if is_list(what) and str(getattr(what, "dtype", "")).endswith("bool"):
        return positions_of_patches(run, what, option=option)
    listed = what.tolist() if is_list(what) and hasattr(what, "tolist") else what
    items = list(listed) if is_list(listed) or isinstance(listed, Set) else []
    if not items:
        raise OptionError(f"{option} must be {choices}, patches [(row, col), ...] or positions, none empty; got {shown(what)}")
    if not all(map(is_whole, items)):
        return positions_of_patches(run, items, option=option)
    wrong = [item for item in items if not 0 <= item < length]
    if wrong:
        raise OptionError(f"{option}: positions run from 0 to {length - 1}, got {wrong[0]}")
    unique = tuple(sorted(set(map(int, items))))
    return Positions(f"{len(unique)} position{'s' * (len(unique) > 1)}", unique, length)


def positions_of_patches(run: Run, patches: Any, *, option: str = "patches") -> Positions:
    """Patches [(row, col), ...] or a bool grid, as the positions of their image tokens."""
    start, cols = run.segments["image"][0], run.map.cols
    inside = {start + row * cols + col for row, col in read_patches(run, patches, option=option)}
    return Positions(f"{len(inside)} patch{'es' * (len(inside) > 1)}", tuple(sorted(inside)), len(run.token_ids))


def read_patches(run: Run, patches: Any, *, option: str = "patches") -> list[tuple[int, int]]:
    """Patches within the run's grid, as `patches_of` takes them, at least one. Raises OptionError."""
    cells = patches_of(option, patches, run.map.rows, run.map.cols)
    if not cells:
        raise OptionError(f"{option}: expected at least one patch (row, col), got {shown(patches)}")
    return cells


# -- what and how -----------------------------------------------------------------------------

Enter = Callable[[], AbstractContextManager[Any]]


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


def carry_out(
    lab: Lab, run: Run, targets: Targets, plan: Plan, *, seed: int, answer: bool = True, score: str = LOGODDS
) -> Effect:
    """Measure a plan. Ctrl-C during the random controls or the answering keeps what is done; earlier it is raised."""
    one_of("score", score, SCORES)
    began = time.perf_counter()
    proof: dict[str, float] = {}
    random_changes: list[np.ndarray] = []
    side: dict[str, Any] = {}
    new_answer, interrupted, answered = "", False, False
    with undisturbed(lab.model):
        tail = Prefix(lab, run, targets, plan.start, score=score)
        before = tail.score().cpu().numpy()
        floor = tail.read.floors[0].tolist()
        with plan.prove(proof):
            after = tail.score().cpu().numpy()
        with Sweep(f"{plan.name} at random", total=len(plan.controls), unit="draw", least=0) as sweep:
            for control in plan.controls:
                with control():
                    random_changes.append(tail.score().cpu().numpy() - before)
                sweep.step()
            if answer:
                new_answer, interrupted = answer_under(lab, run, plan.enter, proof)
                answered = not interrupted
            side = {} if interrupted else plan.side()
    interrupted = interrupted or sweep.interrupted
    notes = plan.notes
    if interrupted:
        notes = (*notes, f"Interrupted after {len(random_changes)} of {len(plan.controls)} random controls.")
    return Effect(
        name=plan.name,
        what=plan.what,
        options=plan.options,
        targets=targets,
        before=before,
        after=after,
        control=np.array(random_changes, np.float32).reshape(len(random_changes), len(targets)),
        control_name=plan.control_name,
        answer_before=run.answer,
        answer_after=new_answer,
        answered=answered,
        proof=proof,
        side=side,
        map=run.map,
        **made_by(run, began),
        seed=seed,
        passes={"forward": tail.passes + 1},
        interrupted=interrupted,
        notes=notes,
        score=score,
        noise_floor=tuple(floor),
    )


def answer_under(lab: Lab, run: Run, enter: Enter, proof: dict[str, float] | None = None) -> tuple[str, bool]:
    """The answer under an intervention, token by token on a cache, and whether Ctrl-C ended it.

    With `proof` the finished answer is also given back in one whole forward, and its log-probabilities must be those
    of the steps: an intervention that is lost while decoding is refused. Adds ``decode_error``.
    """
    inputs = lab.inputs(run)
    prompt, pixels = inputs["input_ids"][:, : run.segments["answer"][0]], inputs["pixel_values"]
    limit = min(int(run.options.get("max_new_tokens", 64)), lab.context - prompt.shape[1])
    with enter():
        answer = generate(
            lab.model,
            prompt,
            pixels,
            limit=max(limit, 1),
            eos=lab.eos_ids,
            image_id=lab.image_id,
            temperature=float(run.options.get("temperature", 0.0)),
            seed=run.seed,
        )
        if proof is not None and len(answer.token_ids):
            new = torch.from_numpy(answer.token_ids)[None].to(prompt.device)
            ids = torch.cat([prompt, new[:, :-1]], 1)
            keep = torch.arange(prompt.shape[1] - 1, ids.shape[1], device=prompt.device)
            model: Any = lab.model
            logits = model(input_ids=ids, pixel_values=pixels, use_cache=False, logits_to_keep=keep).logits[0]
            whole = log_probs(logits).gather(1, new[0][:, None].to(logits.device))[:, 0].cpu().numpy()
            each = tuple(Target("token", "", (i,), (token,)) for i, token in enumerate(answer.token_ids.tolist()))
            floor = noise_floor(logits[None], range(len(each)), each)[0].cpu().numpy()
            errors = np.abs(whole - answer.logprobs)
            error = float(errors.max())
            if not (errors <= AGREE * floor + np.finfo(np.float32).eps * np.abs(whole)).all():
                raise LabError(
                    f"expected the same log-probabilities token by token and in one forward, got a difference of {error:.3g}, "
                    f"where rounding explains {float(AGREE * floor[errors.argmax()]):.3g}; the intervention is lost while "
                    "decoding with this model's cache"
                )
            proof["decode_error"] = error
    return decode(lab.tokenizer, answer.token_ids.tolist()).strip(), answer.stopped == "interrupted"


# -- states between layers ------------------------------------------------------------------

COMPONENTS = ("residual", "attention", "mlp")
Change = Callable[[Tensor, Tensor], Tensor]  # states (n, D) at some positions (n,) -> their new states


@dataclass
class Changes:
    """What the check saw: how many states were changed, and by how much."""

    states: int = 0
    largest: float = 0.0

    def apply(self, states: Float[Tensor, "B T D"], first: int, place: Positions, change: Change) -> Tensor | None:
        """New states, where those from position `first` on hold some of `place`; else None."""
        at = torch.arange(first, first + states.shape[1], device=states.device)
        inside = place.holds(at)
        if not bool(inside.any()):
            return None
        new = states.clone()
        new[:, inside] = torch.stack([change(row[inside], at[inside]) for row in states]).to(states.dtype)
        self.states += int(inside.sum())
        self.largest = max(self.largest, float((new - states).abs().max()))
        return new


@contextmanager
def changing(
    modules: Sequence[nn.Module], attentions: Sequence[nn.Module], place: Positions, change: Change
) -> Iterator[Changes]:
    """Put ``change(states, positions)`` in the place of the modules' outputs at `place`; no hook remains on leaving.

    ``attentions[i]`` belongs to the same layer as ``modules[i]`` and tells the position of the first row. What goes on
    is read again behind the change: LabError unless it is what was put there.
    """
    changes = Changes()
    first: list[int] = []
    put: list[tuple[nn.Module, Tensor]] = []  # the last change, until it is seen to go on

    def note_position(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        first.append(first_position(module, kwargs))

    def replace(module: nn.Module, args: tuple, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        new = changes.apply(states, first[-1], place, change)
        if new is None:
            return None
        put.append((module, new))
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def check(module: nn.Module, args: tuple, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if put and put[-1][0] is module and states is not put.pop()[1]:
            raise LabError("expected the changed states to go on, got others; another hook on this layer undoes the change")

    noting = hooked(*attentions, before=note_position, with_kwargs=True)
    with noting, hooked(*modules, after=replace), hooked(*modules, after=check):
        yield changes


@contextmanager
def entering(lab: Lab, layer: int, place: Positions, change: Change) -> Iterator[Changes]:
    """The same for what layer number `layer` is given: the residual stream after `layer` layers."""
    changes = Changes()

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        states = args[0] if args else kwargs["hidden_states"]
        new = changes.apply(states, first_position(attention_module(module), kwargs), place, change)
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    with hooked(language_layers(lab.model)[layer], before=before, with_kwargs=True):
        yield changes


def parts(lab: Lab, component: str) -> list[nn.Module]:
    """The module of each layer whose output is `component`: the layer, its attention or its feed-forward part."""
    layers = language_layers(lab.model)
    if component == "residual":
        return layers
    if component == "attention":
        return [attention_module(layer) for layer in layers]
    modules = [getattr(layer, "mlp", None) for layer in layers]
    if not all(isinstance(module, nn.Module) for module in modules):
        raise LabError(f"expected layers with an mlp, got {type(layers[0]).__name__} without; patch 'residual' or 'attention'")
    return modules  # type: ignore[return-value]


def first_position(module: Any, kwargs: dict[str, Any]) -> int:
    """The position of a call's first row: how much the cache held for this layer before it."""
    cache = kwargs.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length(module.layer_idx))


class _Reached(Exception):
    """The layer whose input was wanted has been reached; the rest of the forward is not needed."""


def states_before(lab: Lab, layer: int, inputs: dict[str, Any]) -> Float[Tensor, "T D"]:
    """What layer number `layer` is given in a forward of `inputs`; the layers after it do not run."""
    states: list[Tensor] = []

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states.append((args[0] if args else kwargs["hidden_states"])[0].detach())
        raise _Reached

    model: Any = lab.model
    with suppress(_Reached), hooked(language_layers(lab.model)[layer], before=before, with_kwargs=True):
        model(**inputs, use_cache=False, logits_to_keep=1)
    return states[0]
