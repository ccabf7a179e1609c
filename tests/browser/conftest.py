"""Browser tests share one Chromium, one JupyterLab server and one Lab page; see `tests/support/lab_server.py`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.support.lab_server import lab, lab_server
from tests.support.widget_page import WidgetPage

__all__ = ["lab", "lab_server"]


@pytest.fixture
def widget_page(chromium: Browser) -> Iterator[WidgetPage]:
    """A bare page for one widget; what it logged as an error fails the test."""
    page = WidgetPage(chromium)
    yield page
    page.close()
    assert page.errors == []
    assert page.outside == []
