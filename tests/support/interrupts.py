"""A Ctrl-C at a chosen moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def interrupting(function: Callable[..., Any], *, at: int, times: int | None = None) -> Callable[..., Any]:
    """The same function, and Ctrl-C in its call number `at`, counted from 1, and in `times` in all, None: every later one."""
    calls = 0

    def call(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= at and (times is None or calls < at + times):
            raise KeyboardInterrupt
        return function(*args, **options)

    return call
