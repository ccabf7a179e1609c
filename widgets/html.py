"""One HTML file that holds a widget whole: its module, its data, a stand-in for the kernel's model.

Works from disk, asks nobody for anything. The content security policy names the module and the styles
by their hashes, so that no other script or address could be used even if one slipped in.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from typing import Any

BOOT = """
const stored = JSON.parse(document.getElementById("lab-state").textContent);
const fromBase64 = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const values = { ...stored.state };
for (const [name, text] of Object.entries(stored.data)) values[name] = fromBase64(text);
const nothing = () => {};
const model = {
  get: (name) => values[name],
  set: (name, value) => (values[name] = value),
  save_changes: nothing,
  send: nothing,
  on: nothing,
  off: nothing,
};
render({ model, el: document.getElementById("lab-root") });
"""

PAGE_CSS = """
html { background: #f4f5f7; }
body { margin: 24px auto; padding: 0 16px; max-width: 900px; }
@media (prefers-color-scheme: dark) { html { background: #0d0f13; } }
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
<main id="lab-root"></main>
<script type="application/json" id="lab-state">{state}</script>
<script type="module">{module}</script>
</body>
</html>
"""


def page(title: str, module: str, css: str, state: Mapping[str, Any], data: Mapping[str, bytes]) -> str:
    """The file's text. `module` must define ``render({model, el})``."""
    script, styles = module + BOOT, css + PAGE_CSS
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(styles)}'; "
        "img-src blob: data:; base-uri 'none'; form-action 'none'"
    )
    stored = {"state": state, "data": {name: base64.b64encode(raw).decode("ascii") for name, raw in data.items()}}
    return PAGE.format(title=html.escape(title), policy=policy, css=styles, state=embed(stored), module=script)


def embed(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
