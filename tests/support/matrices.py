"""Rollout by its definition, for the tests that hold others to it."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_lab.attribution.rollout import whole_rows


def uniform_attention(size: int) -> Tensor:
    return whole_rows(torch.ones(size, size).tril())


def naive_rollout(matrices: list[Tensor], residuals: list[Tensor]) -> Tensor:
    """The definition, in float64: A~_L ... A~_1."""
    total = torch.eye(len(matrices[0]), dtype=torch.float64)
    for attention, residual in zip(matrices, residuals, strict=True):
        keep = torch.diag(residual.double().expand(len(attention)))
        total = ((torch.eye(len(attention), dtype=torch.float64) - keep) @ attention.double() + keep) @ total
    return total
