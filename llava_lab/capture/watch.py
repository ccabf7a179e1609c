"""Watch attention while a forward runs, without changing the forward; and the few ways to touch a model that leave no trace.

The layer's output still comes from sdpa's own kernel, so logits stay what they were, bit for bit. Beside it the attention
weights are computed again in float32, a few query rows at a time, with the kernel's log-sum-exp in place of a second softmax
where it gives one (`fused`), and handed to a *reducer*, which keeps only its reduction: a sum, some rows, a running product.
The full ``layers x heads x S x S`` never exists (1.6 GB at LLaVA-1.5-7B). Only a reducer that `mixes` has float32 outputs on
the processor from the same rows: the same but for rounding, and the rows cost next to nothing. Any layer with a ``self_attn``
that goes through transformers' attention interface can be watched: Llama and CLIP alike.

    reducer = PickedRows([-1 % length])
    with undisturbed(model), watch_attention(layers, reducer):
        model(**inputs)
    reducer.layers[0]  # 1 x 1 x K

Two registrations are needed. With only the attention function registered, transformers builds no mask for the unknown name,
and a causal decoder silently looks into the future.

Sources: transformers 5.x ``AttentionInterface``, ``AttentionMaskInterface``, ``integrations/sdpa_attention.py``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llava_lab.capture.fused import Fused, attend_with_lse
from llava_lab.checks import not_finite, undoing
from llava_lab.errors import LabError

NAME = "llava_lab"  # in transformers' registries; plain sdpa for every module without a handler
CHUNK = 64  # query rows at a time: small enough to stay in cache, large enough for the matmul
AFTER_SUM = ("post_attention_layernorm", "layer_norm2")  # of Llama and its relatives, of CLIP and SigLIP
ADDED = {torch.float32: 1e-4, torch.float64: 1e-8}  # of the largest value, that rounding may change in a sum
ADDED_16 = 3e-2  # the same for 16-bit types
NOT_ADDED = "the residual weight cannot be measured in this model: give it as a number, residual=0.5"
MEND = (
    "the model's weights, or what was put in their place, hold such numbers or overflow: take another checkpoint, or load this "
    "one with dtype='float32'"
)
CHANGES_SCORES = ("softcap", "position_bias", "s_aux")  # options that change the weights in ways not repeated here


@dataclass(frozen=True)
class Attention:
    """One call of a module's attention, before it is computed."""

    module: nn.Module
    query: Float[Tensor, "B H Q D"]
    key: Float[Tensor, "B G K D"]
    value: Float[Tensor, "B G K D"]
    mask: Tensor | None
    scaling: float
    causal: bool
    dropout: float = 0.0


Handler = Callable[[Attention, Callable[[], Tensor]], Tensor]  # given the call and what computes it, the output to go on with


@dataclass(frozen=True)
class Norms:
    """Sizes of the two things a layer adds at its attention step, per position."""

    branch: Float[Tensor, "B Q"]  # the attention output, after its out projection
    stream: Float[Tensor, "B Q"]  # the residual stream it is added to


class Reducer:
    """What is kept of the attention. Override what you need; the default keeps nothing.

    `rows` names the query positions wanted (None: all). `norms` asks for `Norms` in `close`. `mixes` lets a layer's output be
    mixed from the very rows that are reported, where that is quicker: the same but for rounding, and the rows are nearly free.
    """

    rows: tuple[int, ...] | None = None
    norms: bool = False
    mixes: bool = False

    def take(self, layer: int, call: Attention) -> bool:
        """What a layer is about to attend with. True: it was taken, and no rows are worked out for it here."""
        return False

    def open(self, layer: int, keys: int) -> None:
        """A layer starts; its attention has `keys` columns."""

    def values(self, layer: int, value: Float[Tensor, "B G K D"]) -> None:
        """What the layer's attention mixes, in the model's dtype, before any of its rows; heads may share a group's."""

    def add(self, layer: int, rows: slice | Tensor, attention: Float[Tensor, "B H Q K"]) -> None:
        """Some rows of a layer, float32, after softmax. Columns the causal mask makes zero may be left off the end."""

    def close(self, layer: int, norms: Norms | None) -> None:
        """All rows of the layer have been given."""


@dataclass
class _Session:
    """One `watch_attention` in progress."""

    reducer: Reducer
    layers: dict[nn.Module, int]  # attention module -> layer number
    chunk: int
    calls: list[int] = field(default_factory=list)
    streams: dict[int, Tensor] = field(default_factory=dict)  # layer -> the residual stream it was given, until it is used
    sums: dict[int, Tensor] = field(default_factory=dict)  # layer -> stream and branch, until the layer's own sum is seen
    right: set[int] = field(default_factory=set)  # layers whose own sum was what was measured; how they add does not change

    def handle(self, call: Attention, attend: Callable[[], Tensor]) -> Tensor:
        """Report the weights of one layer to the reducer; the layer's own output is what it would have been."""
        layer = self.layers[call.module]
        output = None if self.reducer.take(layer, call) else self._report(layer, call)
        self.calls[layer] += 1
        if not self.reducer.norms:
            self.reducer.close(layer, None)
        return attend() if output is None else output

    @torch.no_grad()
    def _report(self, layer: int, call: Attention) -> Tensor | None:
        """Give the reducer its rows; the layer's output, where it was worked out on the way."""
        fused = mixed = None
        if self.reducer.mixes and _mixable(call):
            mixed = call.query.new_empty(call.query.transpose(1, 2).shape)
        elif self.reducer.rows is None:  # a few rows are cheap either way
            fused = with_lse(call)
        self.reducer.open(layer, call.key.shape[2])
        self.reducer.values(layer, call.value)
        for rows, attention in attention_rows(
            call.query,
            call.key,
            call.mask,
            call.scaling,
            causal=call.causal,
            rows=self.reducer.rows,
            chunk=self.chunk,
            lse=None if fused is None else fused.lse,
        ):
            if mixed is not None:  # before the reducer, who may keep what it is given
                mixed[:, rows] = _mix(attention, call.value).transpose(1, 2)
            self.reducer.add(layer, rows, attention)
        return mixed if fused is None else fused.output.transpose(1, 2).contiguous()

    def before_layer(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        stream = args[0] if args else kwargs["hidden_states"]
        self.streams[self.layers[attention_module(module)]] = stream.detach()

    def after_attention(self, scale: float, module: nn.Module, args: tuple, output: Any) -> None:
        layer, stream = self.layers[module], self.streams.pop(self.layers[module])
        branch = (output[0] if isinstance(output, tuple) else output).detach()
        if layer not in self.right:
            self.sums[layer] = stream + branch * scale
        # quicker to call than Tensor.norm, which counts at one new token a step
        norm = torch.linalg.vector_norm
        self.reducer.close(layer, Norms(norm(branch.float(), dim=-1) * scale, norm(stream.float(), dim=-1)))

    def after_sum(self, layer: int, module: nn.Module, args: tuple) -> None:
        """What the layer goes on with must be what was measured: some norm the branch before they add it, or add it later."""
        if layer in self.right:
            return
        expected, own = self.sums.pop(layer), args[0].detach()
        far = float((own - expected).abs().max()) if own.shape == expected.shape else torch.inf
        if math.isnan(far):
            return  # numbers that are not finite are the forward's own to refuse
        if not far <= ADDED.get(own.dtype, ADDED_16) * float(expected.abs().max()):
            raise LabError(f"expected layers that add their attention's output to the stream as it is, got others; {NOT_ADDED}")
        self.right.add(layer)


AnyReducer = TypeVar("AnyReducer", bound=Reducer)


@contextmanager
def watch_attention(
    layers: Sequence[nn.Module], reducer: AnyReducer, *, chunk: int = CHUNK, calls: int | None = 1
) -> Iterator[AnyReducer]:
    """Give `reducer` the attention of `layers` (numbered in this order) for every forward inside the block.

    On leaving, also by an exception or Ctrl-C, the attention implementation is what it was and no hook
    remains. Leaving normally checks that each layer reported `calls` times; None leaves that to the caller,
    who may not know how many tokens an answer will have.

    Raises LabError when a layer has no attention to watch, is already watched, or did not report.

    >>> from llava_lab.capture import PickedRows, undisturbed, watch_attention
    >>> from llava_lab.models.layout import language_layers
    >>> with undisturbed(lab.model), watch_attention(language_layers(lab.model), PickedRows([-1 + len(run.token_ids)])) as rows:
    ...     _ = lab.model(**lab.inputs(run))
    >>> rows.layers[0].shape[:2]
    torch.Size([1, 1])
    """
    if not layers:
        raise LabError("expected at least one layer to watch, got none")
    attentions = [attention_module(layer) for layer in layers]
    if any(module in HANDLERS for module in attentions) or len(set(attentions)) < len(attentions):
        raise LabError("expected layers that nobody watches, got one that is watched already; leave the other block first")
    session = _Session(reducer, {module: i for i, module in enumerate(attentions)}, chunk, [0] * len(attentions))
    with ExitStack() as stack:
        stack.enter_context(routed(attentions))
        stack.enter_context(handled(dict.fromkeys(attentions, session.handle)))
        if reducer.norms:
            for layer, module in zip(layers, attentions, strict=True):
                scale = float(getattr(layer, "residual_multiplier", 1.0))  # Granite's layers scale what they add
                stack.enter_context(hooked(layer, before=session.before_layer, with_kwargs=True))
                stack.enter_context(hooked(module, after=partial(session.after_attention, scale)))
                stack.enter_context(hooked(_sees_sum(layer), before=partial(session.after_sum, session.layers[module])))
        yield reducer
    if calls is not None and any(count != calls for count in session.calls):
        raise LabError(
            f"expected each of {len(layers)} layers to report its attention {calls} time(s), got {session.calls}; "
            "the model's attention does not go through transformers' attention interface, or no forward ran"
        )


def attention_module(layer: nn.Module) -> nn.Module:
    """The attention of a transformer layer."""
    module = getattr(layer, "self_attn", None)
    if not isinstance(module, nn.Module) or not hasattr(module, "config"):
        raise LabError(f"expected a transformer layer with a self_attn that has a config, got {type(layer).__name__}")
    return module


def _sees_sum(layer: nn.Module) -> nn.Module:
    """The norm that a layer gives the stream to, once its attention is added."""
    for name in AFTER_SUM:
        if isinstance(found := getattr(layer, name, None), nn.Module):
            return found
    raise LabError(f"expected a layer with a norm named {' or '.join(AFTER_SUM)}, got {type(layer).__name__}; {NOT_ADDED}")


def _mixable(call: Attention) -> bool:
    """Whether float32 rows on the processor give the output sooner than sdpa and the rows after one another."""
    query, value = call.query, call.value
    plain = query.dtype == torch.float32 and query.device.type == "cpu" and query.shape[-1] == value.shape[-1]
    return plain and query.shape[2] > 1 and not call.dropout and not any(p.requires_grad for p in (query, call.key, value))


def _mix(attention: Float[Tensor, "B H q k"], value: Float[Tensor, "B G K E"]) -> Float[Tensor, "B H q E"]:
    """The values weighed by some rows; heads may share a group's."""
    batch, heads, rows, keys = attention.shape
    groups = value.shape[1]
    grouped = attention.reshape(batch, groups, (heads // groups) * rows, keys)
    return (grouped @ value[:, :, :keys]).reshape(batch, heads, rows, value.shape[3])


def with_lse(call: Attention) -> Fused | None:
    """What sdpa gives for this call and the log-sum-exp of its rows; None where there is no such thing, or one row alone."""
    if call.query.shape[2] == 1 or call.dropout or any(part.requires_grad for part in (call.query, call.key, call.value)):
        return None
    return attend_with_lse(call.query, call.key, call.value, call.mask, call.scaling, causal=call.causal)


def attention_rows(
    query: Float[Tensor, "B H Q D"],
    key: Float[Tensor, "B G K D"],
    mask: Tensor | None,
    scaling: float,
    *,
    causal: bool,
    rows: Sequence[int] | None = None,
    chunk: int = CHUNK,
    lse: Float[Tensor, "B H Q"] | None = None,
    newest: bool = False,
) -> Iterator[tuple[slice | Tensor, Float[Tensor, "B H q k"]]]:
    """Attention weights in float32, `chunk` query rows at a time, with the sequence positions of those rows.

    Keys of fewer heads than queries are shared by groups. With ``causal`` and no mask, columns after
    the last row of a chunk are zero and left off. While decoding, rows count from the cached length.
    With the rows' log-sum-exp, as a fused kernel gives it, there is no softmax here. `newest` says that fewer queries than
    keys, without a mask, are those of the last positions; a model that asks for this means something else.
    """
    queries, keys = query.shape[2], key.shape[2]
    first = keys - queries  # position of the first query row; 0 unless a cache holds earlier keys
    triangular = causal and mask is None and queries > 1
    if triangular and first and not newest:
        raise LabError(f"expected a mask for {queries} new rows over {keys} keys, got none; pass an attention_mask")
    query32, key32 = query.float() * scaling, key.float()
    if lse is not None:  # one more column takes it off every score inside the product
        query32 = torch.cat([query32, -lse.float()[..., None]], -1)
        key32 = torch.nn.functional.pad(key32, (0, 1), value=1.0)
    for where in _blocks(first, keys, rows, chunk, key.device):
        local = where if not first else _shifted(where, first)
        stop = int(where.stop if isinstance(where, slice) else where[-1] + 1) if triangular else keys
        scores = _scores(query32[:, :, local], key32[:, :, :stop])
        if triangular:
            at = torch.arange(where.start, where.stop, device=key.device) if isinstance(where, slice) else where
            start = int(at[0])  # every row of the chunk may look at the columns before its first
            hidden = torch.arange(start, stop, device=key.device) > at[:, None]
            scores[..., start:].masked_fill_(hidden, -torch.inf)
        elif mask is not None:
            part = mask[:, :, local, :keys]
            scores = scores.masked_fill_(~part, -torch.inf) if part.dtype == torch.bool else scores.add_(part)
        weights = scores.softmax(dim=-1) if lse is None else scores.exp_()
        # a row that may look nowhere (left padding) has no weights, where softmax would say NaN
        yield where, weights if mask is None else weights.nan_to_num_(0.0)


def _blocks(first: int, stop: int, rows: Sequence[int] | None, chunk: int, device: torch.device) -> Iterator[slice | Tensor]:
    if rows is None:
        for start in range(first, stop, chunk):
            yield slice(start, min(start + chunk, stop))
    else:
        wanted = sorted(row for row in set(rows) if first <= row < stop)
        for start in range(0, len(wanted), chunk):
            yield torch.tensor(wanted[start : start + chunk], device=device)


def _shifted(where: slice | Tensor, by: int) -> slice | Tensor:
    return slice(where.start - by, where.stop - by) if isinstance(where, slice) else where - by


def _scores(query: Float[Tensor, "B H q D"], key: Float[Tensor, "B G k D"]) -> Float[Tensor, "B H q k"]:
    batch, heads, rows, width = query.shape
    groups = key.shape[1]
    if groups == heads:
        return query @ key.transpose(2, 3)
    grouped = query.reshape(batch, groups, (heads // groups) * rows, width)  # heads that share a key lie side by side
    return (grouped @ key.transpose(2, 3)).reshape(batch, heads, rows, key.shape[2])


HANDLERS: dict[nn.Module, Handler] = {}  # attention module -> who takes part in its attention; empty outside `handled`


@contextmanager
def routed(attentions: Sequence[nn.Module]) -> Iterator[None]:
    """Let the attention of these modules pass by their handlers inside the block; without a handler it is plain sdpa.

    Afterwards their configs name the implementation they named before, whatever happened.
    """
    configs = list({id(module.config): module.config for module in attentions}.values())
    before = [config._attn_implementation for config in configs]
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)

    def name_them(names: Sequence[str]) -> None:
        for config, name in zip(configs, names, strict=True):
            # the public setter would also reach into sub-configs
            config._attn_implementation_internal = name

    with undoing(lambda: name_them(before)):
        name_them([NAME] * len(configs))
        yield


@contextmanager
def handled(handlers: Mapping[nn.Module, Handler]) -> Iterator[None]:
    """Inside the block these routed attention modules ask their handler for their output."""
    with undoing(lambda: [HANDLERS.pop(module, None) for module in handlers]):
        HANDLERS.update(handlers)
        yield


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """sdpa, past the module's handler if it has one."""
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    handler = HANDLERS.get(module)
    if handler is None:
        return plain(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    unknown = [name for name in CHANGES_SCORES if kwargs.get(name) is not None]
    if unknown:
        raise LabError(f"expected plain scaled dot-product attention, got {', '.join(unknown)}; it cannot be watched or opened")
    causal = kwargs.get("is_causal")
    call = Attention(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling or query.shape[-1] ** -0.5,
        bool(getattr(module, "is_causal", True) if causal is None else causal),
        float(kwargs.get("dropout") or 0.0),
    )
    return handler(call, lambda: plain(module, query, key, value, attention_mask, scaling=scaling, **kwargs)[0]), None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode again afterwards; a forward of `model` gives finite logits or LabError.

    >>> from llava_lab.capture import evaluating
    >>> with evaluating(lab.model):
    ...     lab.model.training
    False
    """
    training = [module for module in model.modules() if module.training]

    def undo() -> None:
        for module in training:
            module.training = True

    with undoing(undo):
        if training:
            model.eval()
        with hooked(model, after=_refuse_not_finite):
            yield


def _refuse_not_finite(module: nn.Module, args: tuple, output: Any) -> None:
    """The one guard over everything that is read from a model: NaN or infinite logits end the forward that gave them."""
    logits = getattr(output, "logits", None)
    if logits is not None and (count := not_finite(logits)):
        dtype = str(logits.dtype).removeprefix("torch.")
        raise LabError(f"expected finite logits, got NaN or infinity in {count:,} of {logits.numel():,} (in {dtype}); {MEND}")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode without gradients; each module's training flag and the random state come back on leaving.

    `requires_grad` is never touched: `torch.no_grad` makes that unnecessary.

    >>> from llava_lab.capture import undisturbed
    >>> with undisturbed(lab.model) as model:
    ...     model(**lab.inputs(run)).logits.requires_grad
    False
    """
    with random_states_kept(), evaluating(model), torch.no_grad():
        yield model


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Python's, numpy's and torch's own random states come back on leaving, whatever was drawn or seeded inside."""
    plain, numbers, state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  the global one
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def undo() -> None:
        random.setstate(plain)
        np.random.set_state(numbers)  # noqa: NPY002
        torch.set_rng_state(state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)

    with undoing(undo):
        yield


@contextmanager
def hooked(
    *modules: nn.Module,
    before: Callable[..., Any] | None = None,
    after: Callable[..., Any] | None = None,
    with_kwargs: bool = False,
) -> Iterator[None]:
    """Call `before` and `after` around every forward of `modules` inside the block; they are off on leaving, whatever happens.

    The signatures are torch's own: ``before(module, args)`` may give new arguments back, ``after(module, args, output)``
    a new output; with `with_kwargs` the keyword arguments come after `args`. This is the only place that registers hooks.

    >>> from llava_lab.capture import hooked
    >>> shapes = []
    >>> with hooked(lab.connector, after=lambda module, args, output: shapes.append(output.shape[:2])):
    ...     _ = lab.model(**lab.inputs(run))
    >>> shapes
    [torch.Size([1, 144])]
    """
    handles: list[Any] = []
    with undoing(lambda: [handle.remove() for handle in handles]):
        for module in modules:
            if before is not None:
                handles.append(module.register_forward_pre_hook(before, with_kwargs=with_kwargs))
            if after is not None:
                handles.append(module.register_forward_hook(after, with_kwargs=with_kwargs))
        yield
