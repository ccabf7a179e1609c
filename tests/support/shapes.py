"""The type checker that jaxtyping's import hook uses while tests run: beartype, on tensor shapes only.

Everything else is mypy's work before anything runs. Given all hints, beartype stops on what it
cannot know at run time: names imported for typing only, and `Self` outside a decorated class.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype

DTYPES = "Shaped|Num|Inexact|Float|BFloat|Complex|Integer|Int|UInt|Bool|Real"
SHAPE = re.compile(rf"\b(?:{DTYPES})\d*\[")


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` checked against those of its hints that say a shape."""
    if function.__name__ == "__init__" and (function.__module__ or "").startswith("llava_lab.results"):
        return function  # a result says itself what does not fit, in one line (`llava_lab.results.schema`)
    hints = {name: hint for name, hint in function.__annotations__.items() if _says_a_shape(hint)}
    if not hints:
        return function
    function.__annotations__ = hints
    return beartype(function)


def _says_a_shape(hint: Any) -> bool:
    if isinstance(hint, str):
        return bool(SHAPE.search(hint))
    return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)
