"""Take a layer apart for going backwards: two halves that work position by position, the attention between them left open.

A transformer layer is x -> (query, key, value), then attention, then (attended, x) -> out. Only the attention mixes
positions. `open_layer` runs one layer again from its own input, so that autograd has a graph of either half and none of the
middle; the gradient of the middle is computed by the caller, who can take it a few rows at a time and look at it on the way.
One layer's graph exists at a time, never the model's: what is kept of the forward is each layer's input (175 MB at
LLaVA-1.5-7B in bfloat16, where a graph takes gigabytes).

    with undisturbed(model), keep_calls(layers) as calls:
        model(**inputs)
        top = open_layer(calls[layers[-1]])
        at_attention, at_input = top.from_out(gradient)

The idea is gradient checkpointing (Chen et al. 2016, arXiv 1604.06174), cut at the attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llava_lab.capture.watch import Attention, attention_module, handled, hooked, routed
from llava_lab.errors import LabError


@dataclass(frozen=True)
class Call:
    """How a module was called in the forward: its first tensor, and everything else it was given."""

    module: nn.Module
    x: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class OpenLayer:
    """One layer, run again. Its two halves have a graph each; `attended` is a leaf between them."""

    x: Float[Tensor, "1 S D"]
    attention: Attention
    attended: Float[Tensor, "1 S H E"]
    out: Float[Tensor, "1 S D"]

    def from_out(self, gradient: Float[Tensor, "N S D"]) -> tuple[Float[Tensor, "N S H E"], Float[Tensor, "N S D"]]:
        """N gradients at `out` -> at `attended`, and at `x` by the ways around the attention; float32."""
        attended, x = position_wise(self.out, (self.attended, self.x), gradient)
        return attended, x

    def from_attention(
        self, query: Float[Tensor, "N H S E"], key: Float[Tensor, "N G S E"], value: Float[Tensor, "N G S E"]
    ) -> Float[Tensor, "N S D"]:
        """N gradients at query, key and value -> at `x`, float32."""
        parts = (self.attention.query, self.attention.key, self.attention.value)
        at_x = []
        for gradients in zip(query, key, value, strict=True):
            at_parts = [gradient[None].to(part.dtype) for gradient, part in zip(gradients, parts, strict=True)]
            at_x.append(torch.autograd.grad(parts, self.x, at_parts, retain_graph=True)[0])
        return torch.cat(at_x).float()


@contextmanager
def keep_calls(layers: Sequence[nn.Module], *others: nn.Module) -> Iterator[dict[nn.Module, Call]]:
    """How each of `layers` and `others` is called by the first forward inside the block, where `open_layer` may be used.

    On leaving, also by an exception or Ctrl-C, the attention implementation is what it was and no hook remains.
    """
    calls: dict[nn.Module, Call] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module in calls:
            return
        if not args:
            raise LabError(f"expected {type(module).__name__} to be called with its input first, got names {sorted(kwargs)} only")
        calls[module] = Call(module, args[0].detach(), args[1:], kwargs)

    try:
        with routed([attention_module(layer) for layer in layers]), hooked(*layers, *others, before=keep, with_kwargs=True):
            yield calls
    finally:
        calls.clear()


def open_layer(call: Call) -> OpenLayer:
    """Run the layer again from its own input, opened at its attention. Inside `keep_calls` only.

    Raises LabError when its attention does not go through transformers' attention interface exactly once.
    """
    x = call.x.detach().requires_grad_()
    cuts: list[tuple[Attention, Tensor]] = []

    def cut(attention: Attention, attend: Callable[[], Tensor]) -> Tensor:
        """Go on with the attention's output as a fresh leaf."""
        with torch.no_grad():
            attended = attend()
        cuts.append((attention, attended.detach().requires_grad_()))
        return cuts[-1][1]

    with torch.enable_grad(), handled({attention_module(call.module): cut}):
        out = call.module(x, *call.args, **call.kwargs)
    if len(cuts) != 1:
        raise LabError(
            f"expected {type(call.module).__name__} to attend once through transformers' attention interface, "
            f"got {len(cuts)} times"
        )
    return OpenLayer(x, *cuts[0], out[0] if isinstance(out, tuple) else out)


def position_wise(out: Tensor, inputs: Sequence[Tensor], gradient: Float[Tensor, "N S D"]) -> list[Float[Tensor, "N S ..."]]:
    """N gradients at `out` (1, S, D) -> at each of `inputs` (1, S, ...), float32, where position s depends on position s alone.

    Gradients that never meet at a position go back together, in one pass, and are told apart again by position.
    """
    busy = (gradient != 0).any(-1)  # N S
    apart = len(gradient) > 1 and int(busy.sum(0).max()) <= 1
    together = gradient.sum(0, keepdim=True) if apart else gradient
    passes = [torch.autograd.grad(out, inputs, row[None].to(out.dtype), retain_graph=True) for row in together]
    gradients = [torch.cat(parts).float() for parts in zip(*passes, strict=True)]
    if not apart:
        return gradients
    return [torch.where(busy.view(*busy.shape, *[1] * (part.dim() - 2)), part, 0.0) for part in gradients]
