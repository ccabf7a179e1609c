"""How a refusal is checked: the right error, in one line that fits a terminal."""

from __future__ import annotations

from typing import Any

import pytest

from llava_lab.errors import CheckpointError
from llava_lab.models import load


def refused(folder: Any, kind: type[ValueError] = CheckpointError, **options: Any) -> str:
    """The message with which `load` refuses a folder, checked to be one readable line."""
    with pytest.raises(kind) as error:
        load(folder, **options)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 700
    return text
