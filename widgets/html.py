"""One HTML file that holds widgets whole: their module, their data, stand-ins for the kernel's models.

Works from disk, asks nobody for anything. The content security policy names the module and the styles
by their hashes, so that no other script or address could be used even if one slipped in. Bytes that
several views share, such as the picture, are stored once. What is selected or pointed at in one view
is so in all (``js/page.js``).
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from widgets.base import bundle

BOOT = """
openPage(JSON.parse(document.getElementById("lab-state").textContent), {{ {entries} }});
"""

PAGE_CSS = """
html {{ background: #f4f5f7; }}
body {{ margin: 24px auto; padding: 0 16px; max-width: {width}px; }}
@media (prefers-color-scheme: dark) {{ html {{ background: #0d0f13; }} }}
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>{body}</main>
<script type="application/json" id="lab-state">{state}</script>
<script type="module">{module}</script>
</body>
</html>
"""


@dataclass(frozen=True)
class View:
    """One widget as a page holds it: the function that shows it, and the values of its model."""

    entry: str
    state: Mapping[str, Any]
    data: Mapping[str, bytes]


def place(index: int) -> str:
    """The id of the element that a page's view is shown in."""
    return f"lab-view-{index}"


def page(title: str, module: str, css: str, views: Sequence[View], *, body: str = "", width: int = 900) -> str:
    """The file's text. `module` defines the views' entries; `body` is finished HTML with an element of each `place`."""
    entries = ", ".join(sorted({view.entry for view in views}))
    script = "\n".join([module, bundle("page.js"), BOOT.format(entries=entries)])
    styles = css + PAGE_CSS.format(width=width)
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(styles)}'; "
        "img-src blob: data:; base-uri 'none'; form-action 'none'"
    )
    body = body or "".join(f'<div id="{place(index)}"></div>' for index in range(len(views)))
    stored = embed(_stored(views))
    return PAGE.format(title=html.escape(title), policy=policy, css=styles, body=body, state=stored, module=script)


def embed(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _stored(views: Sequence[View]) -> dict[str, Any]:
    """Views with their bytes by name, each distinct run of bytes once."""
    names: dict[bytes, str] = {}
    stored = []
    for index, view in enumerate(views):
        data = {name: names.setdefault(bytes(raw), f"b{len(names)}") for name, raw in view.data.items()}
        stored.append({"entry": view.entry, "place": place(index), "state": dict(view.state), "data": data})
    blobs = {name: base64.b64encode(raw).decode("ascii") for raw, name in names.items()}
    return {"views": stored, "blobs": blobs}


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
