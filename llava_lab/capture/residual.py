"""What flows through the decoder besides attention weights: the values that heads mix, and the residual stream.

Everything is handed to a function while the forward runs and then dropped; nothing of the size ``layers x heads x S x S`` or
``layers x S x width`` is ever kept. Layers need a ``self_attn`` whose ``o_proj`` joins the heads (Llama and its relatives).

    norms = {}
    with watch_stream(layers, lambda number, state: norms.update({number: float(state.norm())})):
        model(**inputs)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llava_lab.capture.reducers import Collected
from llava_lab.capture.watch import Norms, attention_module, hooked
from llava_lab.errors import LabError

HeadFold = Callable[[int, Float[Tensor, "H Q K"], Float[Tensor, "H K D"]], None]  # layer, weights, values
StateFold = Callable[[int, Tensor], None]  # number, what the module gave


class HeadSources(Collected):
    """Attention of a few query rows beside the values it mixes: ``fold(layer, weights, values)`` once per layer.

    weights (heads, rows, K) are float32, the rows sorted and each once; values (heads, K, D) are in the model's
    dtype, those of a shared key head repeated without a copy. Neither outlives the layer: at LLaVA-1.5-7B about
    5 MB of values, already there, and 2.5 MB for 32 rows. Batch size 1, whole sequences (no cache).
    """

    def __init__(self, rows: Sequence[int], fold: HeadFold) -> None:
        super().__init__()
        self.rows = tuple(sorted(set(rows)))
        self._fold = fold
        self._value: Tensor | None = None

    def values(self, layer: int, value: Tensor) -> None:
        if len(value) != 1:
            raise LabError(f"expected one sequence at a time, got a batch of {len(value)}")
        self._value = value[0].detach()

    def add(self, layer: int, rows: slice | Tensor, attention: Tensor) -> None:
        self._parts.append(self._whole(attention[0]))

    def close(self, layer: int, norms: Norms | None) -> None:
        assert self._value is not None
        weights = torch.cat(self._parts, 1)
        groups, keys, width = self._value.shape
        shared = weights.shape[0] // groups  # heads that mix the same values stand side by side
        values = self._value[:, None].expand(groups, shared, keys, width).reshape(-1, keys, width)
        self._parts, self._value = [], None
        self._fold(layer, weights, values)


def joined_by(layer: nn.Module) -> nn.Linear:
    """The projection that joins a layer's heads back into the stream. Raises LabError when it is not an open matrix."""
    projection = getattr(attention_module(layer), "o_proj", None)
    if not isinstance(projection, nn.Linear) or not projection.weight.is_floating_point():
        kind = type(projection).__name__
        raise LabError(f"expected attention with an o_proj of floating-point weights, got {kind}; load the model unquantised")
    return projection


def seen_by_heads(layer: nn.Module, directions: Float[Tensor, "N W"]) -> Float[Tensor, "N H D"]:
    """Directions of the residual stream as each head's values meet them: ``direction @ o_proj`` of that head, float32.

    ``(weights @ values) . seen`` summed over heads is ``attention output . direction``, without the bias.
    Head by head, so that no float32 copy of the whole matrix is made (2 MB at a time at LLaVA-1.5-7B).
    """
    weight = joined_by(layer).weight
    heads = int(attention_module(layer).config.num_attention_heads)  # type: ignore[union-attr, arg-type]
    width = weight.shape[1] // heads
    aimed = directions.to(weight.device, torch.float32)
    parts = [aimed @ weight[:, head * width : (head + 1) * width].detach().float() for head in range(heads)]
    return torch.stack(parts, 1)


@contextmanager
def watch_outputs(modules: Sequence[nn.Module], fold: StateFold) -> Iterator[None]:
    """``fold(i, output)`` after module i ran; of a tuple, its first part. On leaving, also by an exception, no hook remains.

    Leaving normally checks that every module ran once. Raises LabError otherwise.
    """
    if not modules:
        raise LabError("expected at least one module to watch, got none")
    calls = [0] * len(modules)

    def after(number: int, output: Any) -> None:
        calls[number] += 1
        fold(number, (output[0] if isinstance(output, tuple) else output).detach())

    with ExitStack() as stack:
        for number, module in enumerate(modules):
            # torch's arguments come behind the number; a hook must give nothing back, or it would replace the output
            stack.enter_context(hooked(module, after=lambda _, args, output, number=number: after(number, output)))
        yield
    if any(count != 1 for count in calls):
        raise LabError(f"expected each of {len(modules)} modules to run once, they ran {calls} times; run one whole forward")


@contextmanager
def watch_stream(layers: Sequence[nn.Module], fold: StateFold) -> Iterator[None]:
    """``fold(l, state)`` for l = 0 .. L: the residual stream after l layers, state 0 what the first layer is given.

    No state has been through the final norm, not even the last; `hidden_states[-1]` of transformers has.
    """
    if not layers:
        raise LabError("expected at least one layer to watch, got none")

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        fold(0, (args[0] if args else kwargs["hidden_states"]).detach())

    after = watch_outputs(layers, lambda number, state: fold(number + 1, state))
    with hooked(layers[0], before=before, with_kwargs=True), after:
        yield
