"""How close two computations of the same numbers must be, from the number format and the length of their sums.

Two kernels that add the same products in another order (another processor, thread count, batch shape or memory
layout) differ by rounding: about ``eps * sqrt(terms)`` of the largest value. Bits are promised only where the same
kernel runs on the same layout, and weights, not outputs, are then what is compared.

Source: Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 4.2 (rounding of sums).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

TERMS = 64 * 3  # width times layers of the suite's small random models
SLACK = 8.0  # a chain of layers passes rounding on, softmax and norms stretch it a little


def tolerance(expected: Any, *, terms: int = 1, dtype: torch.dtype = torch.float32) -> float:
    """The largest difference that rounding explains, for numbers as large as `expected`.

    `terms` is how many numbers were added up, width times layers for a whole model (`TERMS`).
    """
    size = max(1.0, float(np.abs(_array(expected)).max(initial=0.0)))
    return SLACK * torch.finfo(dtype).eps * float(np.sqrt(terms)) * size


def close(actual: Any, expected: Any, *, of: Any = 0.0, terms: int = 1, dtype: torch.dtype = torch.float32) -> None:
    """Assert that two arrays or tensors are the same but for rounding; the message names the worst place.

    `of`: where the values are differences, the numbers that were subtracted; each was rounded at its own size.
    """
    one, two = _array(actual), _array(expected)
    assert one.shape == two.shape, f"shapes differ: {one.shape} and {two.shape}"
    allowed = max(tolerance(two, terms=terms, dtype=dtype), tolerance(2 * _array(of), terms=terms, dtype=dtype))
    np.testing.assert_allclose(one, two, rtol=0, atol=allowed, equal_nan=True)


def _array(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, np.float64)
