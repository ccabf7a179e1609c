"""Attention by sdpa's own kernel, and the log-sum-exp that the kernel works out on the way and torch throws away.

A row of attention is ``exp(query @ key * scaling - lse)``: with `lse` at hand no second softmax is needed, for any rows and
any heads. Torch gives it back only from operators of its own that are not promised to stay, so each is used behind a check:
sdpa must be about to take that very kernel for this call, and on a small example the operator must give sdpa's output bit for
bit and a softmax that is the softmax. Where anything of this fails, and for masks that are not bool, there is None, and the
caller works the rows out with a softmax of its own.

    fused = attend_with_lse(query, key, value, None, scaling, causal=True)
    fused.output, fused.lse  # or fused is None

Sources: torch ``aten/src/ATen/native/transformers`` (`_fused_sdp_choice` and the kernels it names), torch 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

EXAMPLE = (2, 4, 70, 16)  # B H S D of the check; more than one tile of rows
NEAR = 1e-5  # of the check's attention, at most 1; for 16 bits, whose kernels are quick about exp, an eighth of their own step


@dataclass(frozen=True)
class Fused:
    """What one attention gave."""

    output: Float[Tensor, "B H Q E"]
    lse: Float[Tensor, "B H Q"]  # natural log of the sum of exp(scores) of each row, float32


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float], tuple[Tensor, Tensor]]


def attend_with_lse(
    query: Float[Tensor, "B H Q D"],
    key: Float[Tensor, "B G K D"],
    value: Float[Tensor, "B G K E"],
    mask: Tensor | None,
    scaling: float,
    *,
    causal: bool,
) -> Fused | None:
    """What sdpa gives for these inputs, with the log-sum-exp of its rows; None where it cannot be had or trusted.

    `causal` counts where there is no mask, and for as many queries as keys. In float64 there is None: attention is worked out
    in float32, and sums of another precision are not its own.
    """
    causal = causal and mask is None
    if (mask is not None and mask.dtype != torch.bool) or (causal and query.shape[2] != key.shape[2]):
        return None
    if query.dtype == torch.float64:
        return None
    device, grouped = query.device.type, query.shape[1] != key.shape[1]
    name = _kernel_of_sdpa(query, key, value, mask, scaling, causal, grouped)
    if name is None or not _trusted(device, name, query.dtype, causal, mask is not None, grouped):
        return None
    return Fused(*KERNELS[device, name](query, key, value, mask, causal, scaling))


def _kernel_of_sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, causal: bool, grouped: bool
) -> str | None:
    """The name of the kernel that sdpa would take for this very call, if it is one of ours."""
    try:
        choice = torch._fused_sdp_choice(query, key, value, mask, 0.0, causal, scale=scaling, enable_gqa=grouped)
        name = torch.nn.attention.SDPBackend(choice).name
    except (AttributeError, RuntimeError, TypeError, ValueError):  # not in this torch, or not in this form
        return None
    return name if (query.device.type, name) in KERNELS else None


@lru_cache
def _trusted(device: str, name: str, dtype: torch.dtype, causal: bool, masked: bool, grouped: bool) -> bool:
    """Whether the kernel gives sdpa's output and the softmax's denominator, on a small example of this form."""
    try:
        return _right(device, name, dtype, causal=causal, masked=masked, grouped=grouped)
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False


def _right(device: str, name: str, dtype: torch.dtype, *, causal: bool, masked: bool, grouped: bool) -> bool:
    draw = torch.Generator().manual_seed(0)
    batch, heads, length, width = EXAMPLE
    shapes = (EXAMPLE, *[(batch, heads // 2 if grouped else heads, length, width)] * 2)
    query, key, value = (torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes)
    seen = torch.ones(length, length, dtype=torch.bool, device=device)
    seen = seen.tril() if causal else seen
    mask = None
    if masked:
        seen = seen.tril().expand(batch, 1, -1, -1).clone()
        seen[1, ..., 3:9] = False
        mask = seen
    scaling = width**-0.5
    output, lse = KERNELS[device, name](query, key, value, mask, causal, scaling)
    attend = torch.nn.functional.scaled_dot_product_attention
    plain = attend(query, key, value, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=grouped)
    keys = key.repeat_interleave(heads // key.shape[1], 1).double()
    scores = (query.double() @ keys.transpose(2, 3) * scaling).masked_fill(~seen, -torch.inf)
    far = ((scores - lse.double()[..., None]).exp() - scores.softmax(-1)).abs().max()
    near = max(NEAR, torch.finfo(dtype).eps / 8)
    return lse.shape == query.shape[:3] and torch.equal(output, plain) and bool(far <= near)


# -- the kernels: (query, key, value, mask, causal, scaling) -> output, log-sum-exp -------------


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A bool mask as what is added to the scores, as sdpa itself makes it."""
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(~mask, -torch.inf)


def _flash_for_cpu(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scaling: float) -> Any:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, 0.0, causal, attn_mask=_additive(mask, query), scale=scaling)


def _flash(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scaling: float) -> Any:
    if mask is not None:
        raise ValueError("this kernel takes no mask")
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(query, key, value, 0.0, causal, False, scale=scaling)[:2]


def _efficient(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scaling: float) -> Any:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    bias = _additive(mask, query)
    bias = None if bias is None else bias.expand(-1, query.shape[1], -1, -1)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    output, lse = efficient(query, key, value, bias, True, 0.0, causal, scale=scaling)[:2]
    return output, lse[..., : query.shape[2]]  # its rows are filled up to a multiple of 32


def _cudnn(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scaling: float) -> Any:
    cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
    output, lse = cudnn(query, key, value, _additive(mask, query), True, 0.0, causal, scale=scaling)[:2]
    return output, lse.reshape(query.shape[:3])


KERNELS: Mapping[tuple[str, str], Kernel] = MappingProxyType(
    {
        ("cpu", "FLASH_ATTENTION"): _flash_for_cpu,
        ("cuda", "FLASH_ATTENTION"): _flash,
        ("cuda", "EFFICIENT_ATTENTION"): _efficient,
        ("cuda", "CUDNN_ATTENTION"): _cudnn,
    }
)
