"""What every widget of the lab shares: one module from plain files, refused misspellings, a picture for saved notebooks.

Knows nothing of models or results. Front-end sources are ES modules in ``widgets/js``; anywidget
loads one module from a string, where a relative import cannot work, so `bundle` joins the files.
"""

from __future__ import annotations

import base64
import difflib
import inspect
import re
from pathlib import Path
from typing import Any

import anywidget

HERE = Path(__file__).parent
IMPORT = re.compile(r'^import \{[^}]*\} from "\./\w+\.js";\n', re.MULTILINE)


def bundle(*names: str, entry: str = "") -> str:
    """One ES module from files of ``widgets/js``, in the order given; `entry` names the function a host calls.

    The one rule: ``import { ... } from "./x.js";`` statements are dropped, because in the joined text
    every name is already in scope. Exports stay. A test asserts that no name is defined twice.
    """
    joined = "\n".join(IMPORT.sub("", (HERE / "js" / name).read_text("utf-8")) for name in names)
    return f"{joined}\nexport default {{ render: {entry} }};\n" if entry else joined


def styles(*names: str) -> str:
    """Style sheets of this folder, one after the other."""
    return "\n".join((HERE / name).read_text("utf-8") for name in names)


class LabWidget(anywidget.AnyWidget):
    """A widget whose saved form is a PNG and whose misspelt options are errors."""

    def draw_png(self) -> bytes:
        """The widget as a still picture, for viewers that run no code."""
        raise TypeError(f"{type(self).__name__} must draw its own still picture")

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict, dict] | None:
        bundle_ = super()._repr_mimebundle_(**kwargs)
        if bundle_ is not None:
            bundle_[0]["image/png"] = base64.b64encode(self.draw_png()).decode("ascii")
        return bundle_

    @classmethod
    def refuse(cls, unknown: dict[str, Any]) -> None:
        """Raise TypeError for options that do not exist, naming those that do."""
        if not unknown:
            return
        parameters = inspect.signature(cls.__init__).parameters.values()
        options = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
        name = next(iter(unknown))
        near = difflib.get_close_matches(name, options, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise TypeError(f"{cls.__name__} has no option {name!r}{hint} Its options are {', '.join(options)}")
