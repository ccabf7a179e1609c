"""Browser tests share one Chromium, one bare page, one JupyterLab server and one Lab page; see `tests/support/lab_server.py`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.support.lab_server import lab, lab_server
from tests.support.widget_page import WidgetPage

__all__ = ["lab", "lab_server"]


@pytest.fixture(scope="module")
def bare_page(chromium: Browser) -> Iterator[WidgetPage]:
    page = WidgetPage(chromium)
    yield page
    page.close()


@pytest.fixture
def widget_page(bare_page: WidgetPage) -> Iterator[WidgetPage]:
    """The bare page, empty again, for one widget; what it logs as an error fails the test."""
    bare_page.empty()
    yield bare_page
    assert bare_page.errors == []
    assert bare_page.outside == []
