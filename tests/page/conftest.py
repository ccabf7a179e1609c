"""The tests of the page share one Chromium."""

from __future__ import annotations

from tests.support.lab_server import chromium

__all__ = ["chromium"]
