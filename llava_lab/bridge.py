"""What the package that shows offers to this one, which never imports it: functions found by entry points.

    write = offered("llava_lab.report", "widgets.report:write", "write a report")

The distribution declares them in pyproject.toml. Another package may offer its own; ours comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from llava_lab.errors import LabError

INSTALL = "`pip install 'llava-lab[lab]'` brings it, in a checkout `python3 run.py install`"


def offered(group: str, own: str, what: str) -> Callable[..., Any]:
    """The function that a group of entry points offers. Raises LabError where there is none or it cannot be loaded."""
    points = sorted(entry_points(group=group), key=lambda point: point.value != own)
    if not points:
        raise LabError(f"nothing here can {what} (no entry point {group!r}); {INSTALL}")
    try:
        function: Callable[..., Any] = points[0].load()
    except (ImportError, AttributeError) as error:
        raise LabError(f"what can {what} cannot be loaded ({error}); {INSTALL}") from None
    return function
