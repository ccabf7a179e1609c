"""From states to words: the final norm and the output head, for chosen tokens and without a table of all of them.

Source: transformers ``LlamaModel.norm`` and ``LlavaForConditionalGeneration.lm_head``; the logit lens of nostalgebraist (2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llava_lab.errors import LabError
from llava_lab.models.layout import language_model

if TYPE_CHECKING:
    from llava_lab.models import Lab

ROWS = 64  # states at a time through the whole vocabulary: 8 MB of float32 at 32,000 words
EXACT = {torch.float32: 1e-4, torch.float64: 1e-6}  # agreement asked of a norm re-stated by hand; 16-bit types get ROUGH
ROUGH = 3e-2


def final_norm(lab: Lab) -> nn.Module:
    """The norm between the last layer and the output head."""
    norm = getattr(language_model(lab.model), "norm", None)
    if not isinstance(norm, nn.Module):
        raise LabError(f"expected a language model with a final norm, got {type(language_model(lab.model)).__name__} without")
    return norm


def output_head(lab: Lab) -> nn.Linear:
    """The matrix from the last normed state to logits. Raises LabError when its rows cannot be read."""
    head = lab.model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        raise LabError(f"expected an output head of floating-point weights, got {type(head).__name__}; load it unquantised")
    return head


def word_rows(lab: Lab, ids: Sequence[int]) -> tuple[Float[Tensor, "N W"], Float[Tensor, " N"]]:
    """Each token's row of the output head and its bias (0 where there is none), float32."""
    head = output_head(lab)
    at = torch.tensor(list(ids), dtype=torch.long, device=head.weight.device)
    rows = head.weight.detach()[at].float()
    return rows, rows.new_zeros(len(at)) if head.bias is None else head.bias.detach()[at].float()


def token_logits(lab: Lab, states: Float[Tensor, "S W"], ids: Sequence[int]) -> Float[Tensor, "S N"]:
    """Logits of a few tokens at states that are already normed, float32."""
    rows, bias = word_rows(lab, ids)
    return states.to(rows.device).float() @ rows.T + bias


def log_total(lab: Lab, states: Float[Tensor, "S W"]) -> Float[Tensor, " S"]:
    """Log of the sum of exp(logit) over the whole vocabulary at normed states: ``logit - log_total`` is a log-probability."""
    head = output_head(lab)
    device, dtype = head.weight.device, head.weight.dtype
    return torch.cat([head(part.to(device, dtype)).float().logsumexp(-1) for part in states.split(ROWS)])


def norm_gain(norm: nn.Module, width: int) -> Float[Tensor, " W"]:
    """What a root-mean-square norm multiplies each direction by, float32: its answer to a vector of ones."""
    like = next(norm.parameters(), torch.ones(1))
    return norm(like.new_ones(1, width))[0].float() * (1 + _eps(norm)) ** 0.5


def norm_scale(norm: nn.Module, states: Float[Tensor, "S W"]) -> Float[Tensor, " S"]:
    """The one number per state that a root-mean-square norm divides by: ``norm(state) = gain * state * scale``, float32.

    With the scale held fixed the norm is linear, which is what splits a logit into a sum. Raises LabError
    when `norm` is another kind (a LayerNorm also subtracts the mean).
    """
    state = states.float()
    scale = (state.square().mean(-1) + _eps(norm)).rsqrt()
    known, mine = norm(states).float(), norm_gain(norm, states.shape[-1]) * state * scale[:, None]
    near = EXACT.get(states.dtype, ROUGH)
    if not torch.allclose(known, mine, rtol=near, atol=near * float(known.abs().max())):
        raise LabError(f"expected a root-mean-square final norm, got {type(norm).__name__}; its logits cannot be split exactly")
    return scale


def _eps(norm: nn.Module) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", None)) or 0.0)
