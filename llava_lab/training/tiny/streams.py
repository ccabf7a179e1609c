"""Several questions about one picture in one pass, without seeing each other.

LLaVA joins the turns about a picture in one sequence, so that they share its image tokens. Here
they share them too, but each turn is a first question: it attends to the prefix (system text and
picture) and to itself only. Two streams run through the stock Llama layers, the prefix once and
the turns beside it, which costs half the attention of the joined sequence and trains what a
single question at test time needs. Equal to the stock forward of prefix + turn (tested).

Queries, keys, values and attention run in float32 also under autocast. In bfloat16 the gradients
of the first layers' queries and keys pointed elsewhere than float32's (cosine 0.06 to 0.9 on
written maps, 0.93 and more this way), measured on a model whose attention had grown sharp.

    hidden = shared_prefix(model.model.language_model, prefix, turns)  # (B, N, T, D)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch._dynamo
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half

FUSED = ("_project", "_attend", "_attend_turns", "_finish")
SHAPES = 64  # kinds of calls that may be compiled; torch gives up after 8, and stages differ in more


@contextmanager
def fused(on: bool = True) -> Iterator[None]:
    """Fuse the small operations between the products with torch.compile (needs a C++ compiler; about 1.3 times as fast)."""
    parts, plain = globals(), {name: globals()[name] for name in FUSED}
    if on:
        parts.update({name: torch.compile(part, dynamic=True) for name, part in plain.items()})
    try:
        with torch._dynamo.config.patch(recompile_limit=SHAPES):
            yield
    finally:
        parts.update(plain)


@contextmanager
def precise_attention(language_model: nn.Module) -> Iterator[None]:
    """The stock forward's attention in float32 too, for sequences that do not go through `shared_prefix`."""
    modules = [layer.self_attn for layer in language_model.layers]
    for module in modules:
        module.forward = torch.autocast("cpu", enabled=False)(module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def shared_prefix(language_model: nn.Module, prefix: Tensor, turns: Tensor) -> Tensor:
    """Hidden states of the turns after the final norm.

    prefix (B, P, D) embeddings, turns (B, N, T, D) embeddings padded at the end -> (B, N, T, D).
    """
    batch, length, _ = prefix.shape
    count, tokens = turns.shape[1:3]
    positions = torch.arange(length + tokens)[None]
    cos, sin = language_model.rotary_emb(prefix, position_ids=positions)
    before, after = (cos[:, :length], sin[:, :length]), (cos[:, length:], sin[:, length:])
    causal_prefix = torch.full((length, length), -torch.inf).triu(1)
    own = torch.full((tokens, tokens), -torch.inf).triu(1)
    causal_turn = torch.cat([torch.zeros(tokens, length), own], 1)
    turns = turns.reshape(batch, count * tokens, -1)
    layers = language_model.layers
    for number, layer in enumerate(layers):
        last = number == len(layers) - 1
        q_prefix, k_prefix, v_prefix = _project(layer, prefix, before)
        q, k, v = _project(layer, turns, after, repeat=count)
        if not last:  # nothing reads the prefix after the last layer
            mixed = _attend(q_prefix, k_prefix, v_prefix, causal_prefix)
            prefix = _finish(layer, prefix, mixed.transpose(1, 2).flatten(2))
        heads, width = q.shape[1], q.shape[-1]
        own_shape = (batch, heads, count, tokens, width)
        mixed = _attend_turns(q.view(own_shape), k.view(own_shape), v.view(own_shape), k_prefix, v_prefix, causal_turn)
        turns = _finish(layer, turns, mixed.flatten(2, 3).transpose(1, 2).flatten(2))
    return language_model.norm(turns).view(batch, count, tokens, -1)


@torch.autocast("cpu", enabled=False)
def _project(layer: nn.Module, hidden: Tensor, rotation: tuple[Tensor, Tensor], repeat: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    shape = (*normed.shape[:2], -1, attention.head_dim)
    q, k, v = (project(normed).view(shape) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
    cos, sin = (part.repeat(1, repeat, 1)[:, :, None].to(q.dtype) for part in rotation)
    q, k = (torch.addcmul(part * cos, rotate_half(part), sin) for part in (q, k))  # while memory is contiguous
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


@torch.autocast("cpu", enabled=False)
def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask.to(q.dtype)
    return scores.softmax(-1).to(v.dtype) @ v


@torch.autocast("cpu", enabled=False)
def _attend_turns(q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor, mask: Tensor) -> Tensor:
    """q, k, v (B, H, N, T, d), prefix keys and values (B, H, P, d) -> (B, H, N, T, d)."""
    batch, heads, count, tokens, width = q.shape
    scale, length = 1 / math.sqrt(width), k_prefix.shape[2]
    to_prefix = (q.flatten(2, 3) @ k_prefix.transpose(-1, -2)).view(batch, heads, count, tokens, length)
    to_own = q @ k.transpose(-1, -2)
    weights = (torch.cat([to_prefix, to_own], -1) * scale + mask.to(q.dtype)).softmax(-1).to(v.dtype)
    from_prefix = (weights[..., :length].flatten(2, 3) @ v_prefix).view(q.shape)
    return from_prefix + weights[..., length:] @ v


def _finish(layer: nn.Module, hidden: Tensor, mixed: Tensor) -> Tensor:
    hidden = hidden + layer.self_attn.o_proj(mixed)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
