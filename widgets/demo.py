"""A whole model in one HTML file: what ``llava-lab page`` writes. No server, no network, no Python.

llava_lab makes the parts (graphs, words, drawings) and may not import this package, so it finds `write` by the entry-point group
``llava_lab.page``. The page's policy names its one script and its one style sheet by their hashes, allows WebAssembly, and
nothing else: no address can be asked for anything. The parts stand in the page as text, compressed, and are read from there.
"""

from __future__ import annotations

import base64
import gzip
import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from widgets.base import bundle, document, embed, styles, write_page
from widgets.pack import palettes

LIMIT = 20_000_000  # bytes of the whole file: what a phone opens without complaint
SHEETS = ("base.css", "explorer.css")

BOOT = "\nopenDemo(ort);\n"
HEAD = '<meta name="color-scheme" content="light dark">\n'
BODY = """<main id="lab-demo"></main>
<noscript>{noscript}</noscript>
<script type="text/plain" id="lab-licence">{licence}</script>
<script type="application/json" id="lab-spec">{spec}</script>
{parts}"""
NOSCRIPT = "This page runs a model in the browser and needs its script."


def write(
    path: str | os.PathLike,
    *,
    title: str,
    spec: Mapping[str, Any],
    parts: Mapping[str, bytes],
    runtime: str,
    scripts: Sequence[Path],
    sheets: Sequence[Path],
    licence: str,
    limit: int = LIMIT,
) -> Path:
    """Write the page. `runtime` is the text that defines `ort`, `scripts` our own, the last of which has `openDemo`.

    Raises ValueError where the file would be larger than `limit` bytes.
    """
    script = runtime + bundle(*map(str, scripts)) + BOOT
    if "</script" in script.lower():
        raise ValueError("a script holds its own end tag, which would end it early in the page")
    style = styles(*SHEETS, *map(str, sheets))
    body = BODY.format(
        noscript=NOSCRIPT,
        licence=licence.replace("</", "<\\/"),
        spec=embed({**spec, "palettes": palettes()}),
        parts="\n".join(_part(name, raw) for name, raw in parts.items()),
    )
    text = document(title, style, body, script, head=HEAD, allowed=" 'wasm-unsafe-eval'")
    size = len(text.encode())
    if size > limit:
        raise ValueError(f"the page would be {size / 1e6:.1f} MB, over {limit / 1e6:.0f} MB; give it a smaller model")
    return write_page(path, text)


def _part(name: str, raw: bytes) -> str:
    packed = base64.b64encode(gzip.compress(raw, 9, mtime=0)).decode("ascii")
    return f'<script type="application/octet-stream" id="lab-{html.escape(name)}">{packed}</script>'
