"""One file per lesson, and one run of the lesson for all its tests; tests that ask for the run are long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import execute
from tests.support.lessons import Lesson, run

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE) and "lesson" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="module")
def lesson(request: pytest.FixtureRequest) -> Lesson:
    """The lesson whose number stands in the file's name, run once for that file, which one process keeps to itself."""
    (path,) = execute.LESSONS.glob(request.path.stem.removeprefix("test_lesson_") + "_*.ipynb")
    return run(path)


@pytest.fixture(scope="module")
def found(lesson: Lesson) -> dict[str, Any]:
    """What the lesson's probe printed of its variables."""
    return lesson.found
