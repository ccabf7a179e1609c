"""Change what flows between layers: replace states at some positions, or map them, and check that it happened.

A place is a layer number l: the residual stream after l layers, 0 being what the first layer is given. Positions are
counted from what the cache holds, so the same change serves a whole forward and every later step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llava_lab.capture.watch import attention_module
from llava_lab.errors import LabError
from llava_lab.interventions.knockout import first_position
from llava_lab.interventions.plan import Spots
from llava_lab.models.layout import language_layers

if TYPE_CHECKING:
    from llava_lab.models import Lab

COMPONENTS = ("residual", "attention", "mlp")
Fold = Callable[[Tensor, Tensor], Tensor]  # states (n, D) at some positions (n,) -> their new states


@dataclass
class Changes:
    """What the check saw: how many states were changed, and by how much."""

    states: int = 0
    largest: float = 0.0


@contextmanager
def changing(modules: Sequence[nn.Module], attentions: Sequence[nn.Module], place: Spots, fold: Fold) -> Iterator[Changes]:
    """Put ``fold(states, positions)`` in the place of the modules' outputs at `place`; no hook remains on leaving.

    ``attentions[i]`` belongs to the same layer as ``modules[i]`` and tells the position of the first row. What goes on
    is read again behind the change: LabError unless it is what was put there.
    """
    changes = Changes()
    handles: list[Any] = []

    def before_layer(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        first.append(first_position(module, kwargs))

    def after(module: nn.Module, args: tuple, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        begin = first[-1]
        at = torch.arange(begin, begin + states.shape[1], device=states.device)
        held = place.holds(at)
        if not bool(held.any()):
            return None
        new = states.clone()
        new[:, held] = torch.stack([fold(one[held], at[held]) for one in states]).to(states.dtype)
        changes.states += int(held.sum())
        changes.largest = max(changes.largest, float((new - states).abs().max()))
        kept.append((id(module), new))
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def check(module: nn.Module, args: tuple, output: Any) -> None:
        if kept and kept[-1][0] == id(module):
            given = output[0] if isinstance(output, tuple) else output
            if given is not kept.pop()[1]:
                raise LabError("expected the changed states to go on, got others; another hook on this layer undoes the change")

    first: list[int] = []
    kept: list[tuple[int, Tensor]] = []
    try:
        for module, attention in zip(modules, attentions, strict=True):
            handles.append(attention.register_forward_pre_hook(before_layer, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
            handles.append(module.register_forward_hook(check))
        yield changes
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def entering(lab: Lab, layer: int, place: Spots, fold: Fold) -> Iterator[Changes]:
    """The same for what layer number `layer` is given: the residual stream after `layer` layers."""
    module = language_layers(lab.model)[layer]
    changes = Changes()

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        states = args[0] if args else kwargs["hidden_states"]
        begin = first_position(attention_module(module), kwargs)
        at = torch.arange(begin, begin + states.shape[1], device=states.device)
        held = place.holds(at)
        if not bool(held.any()):
            return None
        new = states.clone()
        new[:, held] = torch.stack([fold(one[held], at[held]) for one in states]).to(states.dtype)
        changes.states += int(held.sum())
        changes.largest = max(changes.largest, float((new - states).abs().max()))
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield changes
    finally:
        handle.remove()


def parts(lab: Lab, component: str) -> list[nn.Module]:
    """The module of each layer whose output is `component`: the layer, its attention or its feed-forward part."""
    layers = language_layers(lab.model)
    if component == "residual":
        return layers
    if component == "attention":
        return [attention_module(layer) for layer in layers]
    found = [getattr(layer, "mlp", None) for layer in layers]
    if not all(isinstance(one, nn.Module) for one in found):
        raise LabError(f"expected layers with an mlp, got {type(layers[0]).__name__} without; patch 'residual' or 'attention'")
    return found  # type: ignore[return-value]


class _Reached(Exception):
    """The layer whose input was wanted has been reached; the rest of the forward is not needed."""


def states_before(lab: Lab, layer: int, inputs: dict[str, Any]) -> Float[Tensor, "T D"]:
    """What layer number `layer` is given in a forward of `inputs`; the layers after it do not run."""
    found: list[Tensor] = []

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append((args[0] if args else kwargs["hidden_states"])[0].detach())
        raise _Reached

    handle = language_layers(lab.model)[layer].register_forward_pre_hook(before, with_kwargs=True)
    model: Any = lab.model
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]
