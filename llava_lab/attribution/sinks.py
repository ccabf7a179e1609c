"""Sink columns: positions that draw attention from everywhere whatever they hold, usually the first token.

They are found by their own statistics in the run at hand, never by constants from a paper. A position
that many later positions look at because it matters is found too: what is removed is always listed.

Source of the phenomenon: Xiao et al. 2023 (arXiv 2309.17453); on image tokens Kang et al. 2025 (arXiv 2503.03321).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

OBSERVERS = 8  # later positions needed before a column's statistic is believed
FAIR_SHARES = 5.0  # a sink draws at least this many times what uniform attention would give it
DEVIATIONS = 10.0  # and lies this many robust standard deviations above the median column


def column_pull(attention: Float[Tensor, "S S"]) -> Float[Tensor, " S"]:
    """Attention each column gets from later rows, as a multiple of what uniform causal attention gives it.

    Uniform causal attention gives 1 everywhere; the last column, which no row follows, is given 1.
    """
    size = len(attention)
    strict = attention.tril(-1).sum(0)
    shares = 1 / torch.arange(1, size + 1, device=attention.device, dtype=torch.float32)
    fair = shares.flip(0).cumsum(0).flip(0) - shares  # of the rows after each column
    return torch.where(fair > 0, strict / fair.clamp_min(torch.finfo(fair.dtype).tiny), torch.ones_like(fair))


def find_sinks(pull: Float[Tensor, " S"]) -> tuple[int, ...]:
    """Columns whose pull (mean over layers) is an outlier among all columns, in order."""
    judged = pull[: max(len(pull) - OBSERVERS, 0)]
    if len(judged) == 0:
        return ()
    middle = judged.median()
    spread = 1.4826 * (judged - middle).abs().median()  # equals the standard deviation for a normal distribution
    limit = torch.clamp(middle + DEVIATIONS * spread, min=FAIR_SHARES)
    return tuple(int(i) for i in torch.nonzero(judged > limit)[:, 0])
