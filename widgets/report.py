"""A run and what was found about it as one HTML file: linked views, scores, options, versions. No server, no network.

`write` is what ``llava-lab report`` calls. llava_lab may not import this package (it computes, this shows), so it
finds the function by the entry-point group ``llava_lab.report`` that pyproject.toml declares; another package may
offer a writer of its own the same way. The finished file's tables are in ``report_tables.py``.
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from widgets.base import bundle, styles
from widgets.compare_data import is_comparison
from widgets.compare_view import CompareView
from widgets.head_grid import MEGABYTES, HeadGrid
from widgets.html import page, place
from widgets.pack import encode_picture
from widgets.patch_explorer import PatchExplorer
from widgets.picture import PictureWidget
from widgets.report_tables import answer_line, how_made, method_table, score_tables

if TYPE_CHECKING:
    from llava_lab.results import HeadMaps, Relevance, Run

LIMIT = 5_000_000  # bytes of the whole file
LEAST = 0.05  # megabytes of head maps; a tiny model's word takes less
SHRINK = 0.72  # of the bytes there is room for, as base64 takes four for three and the rest is spare
LIBRARIES = ("torch", "transformers", "numpy", "pillow", "anywidget")
WIDTH = 1080

TITLES = {
    "explorer": (
        "Point at a word",
        "Point at a word of the answer to see its map; click or drag on the picture to select patches.",
    ),
    "compare": (
        "Compare methods",
        "Every method's map of the same words. Point at a patch to see it in all; click a map to enlarge it.",
    ),
    "heads": (
        "Look through the heads",
        "How much each head looks at the picture. Point at one for its map, at a patch for who looks at it.",
    ),
}
SAFE = "This page needs nothing else: it asks no server, and works from disk."


def write(
    path: str | os.PathLike,
    run: Run,
    *,
    maps: Mapping[str, Relevance] | None = None,
    comparison: Any = None,
    heads: HeadMaps | None = None,
    title: str | None = None,
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Write the report of `run` to `path`.

    `maps` are shown in the explorer, side by side where there are several; a `llava_lab.compare` result brings
    its maps, scores and verdicts; `heads` are `llava_lab.head_maps`, as many words of them as there is room for.
    `versions` is listed beside those of the libraries here. Raises ValueError when something belongs to another
    run, or when the file would be larger than 5 MB.
    """
    if comparison is not None and not is_comparison(comparison):
        raise TypeError(f"comparison must be what llava_lab.compare gives, got {type(comparison).__name__}")
    shown = views(run, maps, comparison)
    text = _fitting(run, shown, heads, comparison, title or run.question, {**(versions or {}), **library_versions()})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def views(run: Run, maps: Mapping[str, Relevance] | None, comparison: Any) -> dict[str, PictureWidget]:
    """The widgets that can be made of what was given, by their names in `TITLES`."""
    shown: dict[str, PictureWidget] = {}
    side_by_side = CompareView(run, comparison) if comparison is not None else None
    if side_by_side is None and maps and len(maps) > 1:
        side_by_side = CompareView(run, maps)
    pointed_at = maps or (comparison.maps if comparison is not None else None)
    if pointed_at:
        known = {} if side_by_side is None else side_by_side.data.beats
        beats = {name: known[name] for name in pointed_at if name in known and _same(pointed_at[name], side_by_side, name)}
        shown["explorer"] = PatchExplorer(run, pointed_at, beats_random=beats)
    if side_by_side is not None:
        shown["compare"] = side_by_side
    return shown


def library_versions() -> dict[str, str]:
    """What is installed here, of the libraries that matter to the numbers and the page."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


# -- private ----------------------------------------------------------------------------------


def _same(rel: Any, view: CompareView | None, name: str) -> bool:
    """A map given beside a comparison has its verdict only if it explains the same targets."""
    return view is not None and view.data.maps[name].targets == rel.targets


def _fitting(
    run: Run, shown: dict[str, PictureWidget], heads: HeadMaps | None, comparison: Any, title: str, versions: Mapping[str, str]
) -> str:
    """The file's text, with as many words of the heads as there is room for, and still pictures where there is room too."""
    text = _render(run, shown, comparison, title, versions, stills=False)
    if heads is not None:
        room = (LIMIT - len(text.encode())) * SHRINK / 1e6
        shown = {**shown, "heads": HeadGrid(run, heads, megabytes=min(MEGABYTES, max(LEAST, room)))}
        text = _render(run, shown, comparison, title, versions, stills=False)
    size = len(text.encode())
    if size > LIMIT:
        raise ValueError(f"the report would be {size / 1e6:.1f} MB, over {LIMIT / 1e6:.0f} MB; give it fewer maps or targets")
    whole = _render(run, shown, comparison, title, versions, stills=True)
    return whole if len(whole.encode()) <= LIMIT else text


def _render(
    run: Run, shown: Mapping[str, PictureWidget], comparison: Any, title: str, versions: Mapping[str, str], *, stills: bool
) -> str:
    widgets = list(shown.values())
    parts = [_head(run, shown)]
    parts += [_section(name, place(i), widget if stills else None) for i, (name, widget) in enumerate(shown.items())]
    if not shown:
        parts.append(_picture(run))
    if comparison is not None:
        parts.append(score_tables(comparison))
    parts += [method_table(_all_maps(shown)), how_made(run, versions), f'<p class="lab-report-end">{SAFE}</p>']
    body = f'<div class="lab-widget lab-report">{"".join(parts)}</div>'
    modules = dict.fromkeys(name for widget in widgets for name in widget.modules)
    sheets = dict.fromkeys([*(name for widget in widgets for name in widget.sheets), "base.css", "report.css"])
    return page(title, bundle(*modules), styles(*sheets), [widget.view() for widget in widgets], body=body, width=WIDTH)


def _all_maps(shown: Mapping[str, PictureWidget]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for widget in shown.values():
        if isinstance(widget, CompareView):
            found |= dict(widget.data.maps)
        elif isinstance(widget, PatchExplorer):
            found |= {name: layers[-1][1] for name, layers in widget.relevance.items()}
    return found


def _head(run: Run, shown: Mapping[str, PictureWidget]) -> str:
    links = "".join(f'<a href="#{name}">{html.escape(TITLES[name][0])}</a>' for name in shown)
    return (
        f'<header class="lab-report-head"><h1>{html.escape(run.question)}</h1>{answer_line(run)}'
        f'<nav aria-label="Parts of this report">{links}<a href="#made">How it was made</a></nav></header>'
    )


def _section(name: str, where: str, still: PictureWidget | None) -> str:
    title, about = (html.escape(text) for text in TITLES[name])
    instead = "" if still is None else f"<noscript>{_image(still.draw_png(), 'image/png', title)}</noscript>"
    return (
        f'<section id="{name}"><h2>{title}</h2><p class="lab-report-about">{about}</p><div id="{where}"></div>{instead}</section>'
    )


def _picture(run: Run) -> str:
    raw, kind = encode_picture(run.picture)
    return f"<section><h2>The picture</h2>{_image(raw, kind, 'The picture that was asked about')}</section>"


def _image(raw: bytes, kind: str, name: str) -> str:
    return f'<img alt="{html.escape(name)}" src="data:{kind};base64,{base64.b64encode(raw).decode("ascii")}">'
