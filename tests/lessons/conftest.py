"""Tests that run a lesson are long, and those of one lesson share one process, so that each lesson runs once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE) and "run_once" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.long)
            item.add_marker(pytest.mark.xdist_group(f"lesson {_lesson(item)}"))


def _lesson(item: pytest.Item) -> str:
    """The number of the lesson an item runs; `test_notebooks` speaks of the first two without a parameter."""
    shown = re.search(r"(\d\d)", item.name if "[" in item.name else item.path.stem)
    number = shown.group(1) if shown else "00"
    return "00 and 01" if number in ("00", "01") else number
