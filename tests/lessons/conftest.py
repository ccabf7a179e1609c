"""Tests that run a lesson are long."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE) and "run_once" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.long)
