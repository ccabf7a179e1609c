"""Take a layer apart for going backwards: two halves that work position by position, the attention between them left open.

A transformer layer is x -> (query, key, value), then attention, then (attended, x) -> out. Only the
attention mixes positions. `open_layer` runs one layer again from its own input, so that autograd knows
either half and nothing of the middle; the middle's gradient is the caller's, who can take it a few rows
at a time and look at it on the way. One layer's graph exists at a time, never the model's: what is kept
of the forward is each layer's input (175 MB at LLaVA-1.5-7B in bfloat16, where a graph takes gigabytes).

Like `llava_lab.capture.watch` it goes through transformers' attention interface and knows nothing of
LLaVA, targets or pictures. The idea is gradient checkpointing (Chen et al. 2016, arXiv 1604.06174), cut at the attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llava_lab.capture.watch import CHANGES_SCORES, attention_module
from llava_lab.errors import LabError

NAME = "llava_lab_open"  # in transformers' registries; plain sdpa for every module that is not being opened


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
    query: Float[Tensor, "1 H S E"]
    key: Float[Tensor, "1 G S E"]
    value: Float[Tensor, "1 G S E"]
    mask: Tensor | None
    scaling: float
    causal: bool
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
        parts = (self.query, self.key, self.value)
        found = []
        for one in zip(query, key, value, strict=True):
            given = [gradient[None].to(part.dtype) for gradient, part in zip(one, parts, strict=True)]
            found.append(torch.autograd.grad(parts, self.x, given, retain_graph=True)[0])
        return torch.cat(found).float()


_OPENING: dict[nn.Module, list[dict[str, Any]]] = {}  # attention module -> what it was given; empty outside `open_layer`


@contextmanager
def keep_calls(layers: Sequence[nn.Module], *others: nn.Module) -> Iterator[dict[nn.Module, Call]]:
    """How each of `layers` and `others` is called by the first forward inside the block, and leave to `open_layer` them.

    On leaving, also by an exception or Ctrl-C, the attention implementation is what it was and no hook remains.
    """
    calls: dict[nn.Module, Call] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module in calls:
            return
        if not args:
            raise LabError(f"expected {type(module).__name__} to be called with its input first, got names {sorted(kwargs)} only")
        calls[module] = Call(module, args[0].detach(), args[1:], kwargs)

    attentions = [attention_module(layer) for layer in layers]
    configs = list({id(module.config): module.config for module in attentions}.values())
    before = [config._attn_implementation for config in configs]
    handles = []
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    try:
        for config in configs:
            config._attn_implementation_internal = NAME  # the public setter would also reach into sub-configs
        for module in (*layers, *others):
            handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
        yield calls
    finally:
        for handle in handles:
            handle.remove()
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
        calls.clear()


def open_layer(call: Call) -> OpenLayer:
    """Run the layer again from its own input, opened at its attention. Inside `keep_calls` only.

    Raises LabError when its attention does not go through transformers' attention interface exactly once.
    """
    attention = attention_module(call.module)
    x = call.x.detach().requires_grad_()
    taken = _OPENING[attention] = []
    try:
        with torch.enable_grad():
            out = call.module(x, *call.args, **call.kwargs)
    finally:
        _OPENING.pop(attention, None)
    if len(taken) != 1:
        raise LabError(
            f"expected {type(call.module).__name__} to attend once through transformers' attention interface, "
            f"got {len(taken)} times"
        )
    return OpenLayer(x=x, out=out[0] if isinstance(out, tuple) else out, **taken[0])


def position_wise(out: Tensor, inputs: Sequence[Tensor], gradient: Float[Tensor, "N S D"]) -> list[Float[Tensor, "N S ..."]]:
    """N gradients at `out` (1, S, D) -> at each of `inputs` (1, S, ...), float32, where position s depends on position s alone.

    Gradients that never meet at a position go back together, in one pass, and are told apart again by position.
    """
    busy = (gradient != 0).any(-1)  # N S
    apart = len(gradient) > 1 and int(busy.sum(0).max()) <= 1
    given = gradient.sum(0, keepdim=True) if apart else gradient
    passes = [torch.autograd.grad(out, inputs, one[None].to(out.dtype), retain_graph=True) for one in given]
    found = [torch.cat(parts).float() for parts in zip(*passes, strict=True)]
    if not apart:
        return found
    return [torch.where(busy.view(*busy.shape, *[1] * (part.dim() - 2)), part, 0.0) for part in found]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """sdpa; for a module being opened, its output is a fresh leaf and its input is handed over."""
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    taken = _OPENING.get(module)
    if taken is None:
        return plain(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    unknown = [name for name in CHANGES_SCORES if kwargs.get(name) is not None]
    if unknown:
        raise LabError(f"expected plain scaled dot-product attention, got {', '.join(unknown)}; it cannot be opened")
    with torch.no_grad():
        attended, _ = plain(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    leaf = attended.detach().requires_grad_()
    causal = kwargs.get("is_causal")
    taken.append(
        {
            "query": query,
            "key": key,
            "value": value,
            "mask": attention_mask,
            "scaling": scaling or query.shape[-1] ** -0.5,
            "causal": bool(getattr(module, "is_causal", True) if causal is None else causal),
            "attended": leaf,
        }
    )
    return leaf, None
