"""Change what flows between layers: replace states at some positions, or map them, and check that it happened.

A place is a layer number l: the residual stream after l layers, 0 being what the first layer is given. Positions are
counted from what the cache holds, so the same change serves a whole forward and every later step.

    with entering(lab, 0, place, lambda states, at: 0 * states) as changes:
        lab.model(**lab.inputs(run))
    assert changes.states == len(place.positions)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llava_lab.capture import hooked
from llava_lab.capture.watch import attention_module
from llava_lab.errors import LabError
from llava_lab.interventions.knockout import first_position
from llava_lab.interventions.plan import Positions
from llava_lab.models.layout import language_layers

if TYPE_CHECKING:
    from llava_lab.models import Lab

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

    with ExitStack() as stack:
        for module, attention in zip(modules, attentions, strict=True):
            stack.enter_context(hooked(attention, before=note_position, with_kwargs=True))
            stack.enter_context(hooked(module, after=replace))
            stack.enter_context(hooked(module, after=check))
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
