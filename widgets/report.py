"""A run and what was found about it as one HTML file: linked views, scores, options, versions. No server, no network.

`write` is what ``llava-lab report`` calls. llava_lab may not import this package (it computes, this shows), so it
finds the function by the entry-point group ``llava_lab.report`` that pyproject.toml declares; another package may
offer a writer of its own the same way. Every string that was not written here goes through `html.escape`.
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_lab.checks import entry
from llava_lab.errors import OptionError
from widgets.base import PictureWidget, page, place, styles, write_page
from widgets.compare_view import CompareView, from_comparison, is_comparison, score_names
from widgets.head_grid import MEGABYTES, HeadGrid
from widgets.pack import answer_words, encode_picture, plain_value
from widgets.patch_explorer import PatchExplorer

if TYPE_CHECKING:
    from llava_lab.results import HeadMaps, Relevance, Run

LIMIT = 5_000_000  # bytes of the whole file
LEAST = 0.05  # megabytes of head maps; a tiny model's word takes less
SHRINK = 0.72  # of the bytes there is room for, as base64 takes four for three and the rest is spare
LIBRARIES = ("torch", "transformers", "numpy", "pillow", "anywidget")
WIDTH = 1080
NUMBER = "lab-report-number"  # the class of a cell that holds one

Cell = str | tuple[str, str]  # text, or (text, class)

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


@entry
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
    `versions` is listed beside those of the libraries here. Raises OptionError when something belongs to another
    run, or when the file would be larger than 5 MB.
    """
    if comparison is not None and not is_comparison(comparison):
        raise OptionError(f"comparison must be what llava_lab.compare gives, got {type(comparison).__name__}")
    shown = views(run, maps, comparison)
    text = _fitting(run, shown, heads, comparison, title or run.question, {**(versions or {}), **library_versions()})
    return write_page(path, text)


def views(run: Run, maps: Mapping[str, Relevance] | None, comparison: Any) -> dict[str, PictureWidget]:
    """The widgets that can be made of what was given, by their names in `TITLES`."""
    shown: dict[str, PictureWidget] = {}
    side_by_side = CompareView(run, comparison) if comparison is not None else None
    if side_by_side is None and maps and len(maps) > 1:
        side_by_side = CompareView(run, maps)
    pointed_at = maps or (comparison.maps if comparison is not None else None)
    if pointed_at:
        known = {} if side_by_side is None else side_by_side.data.beats
        # a map given beside a comparison has its verdict only if it explains the same targets
        other = {} if side_by_side is None else side_by_side.data.maps
        beats = {name: known[name] for name, rel in pointed_at.items() if name in known and other[name].targets == rel.targets}
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
        raise OptionError(f"the report would be {size / 1e6:.1f} MB, over {LIMIT / 1e6:.0f} MB; give it fewer maps or targets")
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
    scripts = [widget.script for widget in widgets]
    sheets = dict.fromkeys([*(name for widget in widgets for name in widget.sheets), "base.css", "report.css"])
    return page(title, scripts, styles(*sheets), [widget.view() for widget in widgets], body=body, width=WIDTH)


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


# -- tables -----------------------------------------------------------------------------------


def answer_line(run: Run) -> str:
    """The answer, each word with its probability as a title."""
    words, rest = [], run.answer
    for word in answer_words(run):
        chance = "" if word["p"] is None else f' title="probability {word["p"]:.1%}"'
        before, found, after = rest.partition(word["text"])  # the answer's own spaces: none before a full stop
        if found:
            rest = after
        words.append(f"{html.escape(before) if found else ' '}<span{chance}>{html.escape(word['text'])}</span>")
    cut = "" if not run.cut else '<span class="lab-report-cut"> … [cut]</span>'
    return f'<p class="lab-report-answer">{"".join(words) or html.escape(run.answer)}{cut}</p>{_items(run.notes)}'


def score_tables(comparison: Any) -> str:
    """One table per target, the first one open: every score of every method, the best gain first."""
    data = from_comparison(comparison)
    names = score_names(data.scores)
    tables = []
    header: list[Cell] = ["method", "beats random", *((name, NUMBER) for name in names), ("lead over random, 95%", NUMBER)]
    told = [any(_known(row["gain"]) for row in comparison.rows(index)) for index in range(len(comparison.targets))]
    first = told.index(True) if any(told) else 0
    for index, target in enumerate(comparison.targets):
        table = table_of(header, [_score_row(row, data.scores[row["method"]], names, index) for row in comparison.rows(index)])
        what = "the whole answer" if target.kind == "answer" else f"“{target.text}”"
        opened = " open" if index == first else ""
        tables.append(f"<details{opened}><summary>Scores of the maps of {html.escape(what)}</summary>{table}</details>")
    refused = _items(f"{name}: {why}" for name, why in data.refused)
    about = (
        "Gain, deletion, insertion and object are about the model, pointing, mass, auc and iou about the picture: "
        "they are never averaged. Lower is better for deletion and for cost. Grey methods were not shown to beat random maps."
    )
    inside = f'<p class="lab-report-about">{about}</p>{"".join(tables)}{refused}{_items(data.notes)}'
    return f'<section id="scores"><h2>Scores</h2>{inside}</section>'


def method_table(maps: Mapping[str, Any]) -> str:
    """What each map was made with."""
    if not maps:
        return ""
    rows: list[list[Cell]] = []
    for name, rel in maps.items():
        options = ", ".join(f"{key} {plain_value(value)}" for key, value in rel.options.items()) or "none"
        passes = ", ".join(f"{count} {kind}" for kind, count in rel.passes.items() if count) or "none"
        time = "under 10 ms" if rel.seconds < 0.01 else f"{rel.seconds:.2g} s"
        rows.append([name, rel.method, options, passes, time, " ".join(rel.notes)])
    table = table_of(["map", "method", "options", "passes", "time", "to know before reading it"], rows)
    return f'<section id="methods"><h2>The maps</h2>{table}</section>'


def how_made(run: Run, versions: Mapping[str, str]) -> str:
    """The run, exactly, and what wrote this file."""
    m = run.map
    facts = {
        "model": run.model,
        **({"what it knows": run.knows} if run.knows else {}),
        "fingerprint of its weights": run.fingerprint,
        "seed": str(run.seed),
        **{key.replace("_", " "): plain_value(value) for key, value in run.options.items()},
        "picture": f"{m.width} × {m.height} px, {m.mode} to {m.size} × {m.size}, {m.rows} × {m.cols} patches",
        "prompt": run.prompt,
    }
    return f'<section id="made"><h2>How it was made</h2>{_facts(facts)}<h3>Written with</h3>{_facts(versions)}</section>'


def table_of(header: Sequence[Cell], rows: Iterable[Sequence[Cell]]) -> str:
    """An HTML table that scrolls by itself where it is too wide."""
    head = "".join(_cell(cell, 'th scope="col"') for cell in header)
    body = "".join(f"<tr>{''.join(_cell(cell, 'td') for cell in row)}</tr>" for row in rows)
    return f'<div class="lab-report-wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _score_row(row: Mapping[str, Any], scores: Mapping[str, Sequence[Any]], names: Sequence[str], index: int) -> list[Cell]:
    """One method's scores of one target; where nothing could be told, that is said instead of a verdict."""
    verdict = ("yes" if row["beats_random"] else "not shown") if _known(row["gain"]) else "cannot be told"
    low, high = row["interval"]
    lead = f"{_number(low)[0]} to {_number(high)[0]}" if _known(low) else "–"
    numbers = [_number(scores[name][index] if name in scores else None) for name in names]
    return [(row["method"], "" if row["beats_random"] else "lab-report-grey"), verdict, *numbers, (lead, NUMBER)]


def _cell(cell: Cell, tag: str) -> str:
    text, kind = (cell, "") if isinstance(cell, str) else cell
    mark = f' class="{kind}"' if kind else ""
    return f"<{tag}{mark}>{html.escape(text)}</{tag.split()[0]}>"


def _facts(facts: Mapping[str, str]) -> str:
    pairs = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    return f'<dl class="lab-report-facts">{pairs}</dl>'


def _items(texts: Iterable[str]) -> str:
    items = "".join(f"<li>{html.escape(text)}</li>" for text in texts)
    return f'<ul class="lab-notes">{items}</ul>' if items else ""


def _number(value: float | None) -> tuple[str, str]:
    if not _known(value):
        return "–", NUMBER
    return (str(value) if isinstance(value, int) else f"{value:.3f}").replace("-", "−"), NUMBER


def _known(value: float | None) -> bool:
    return value is not None and value == value
