"""The report's text: the answer, scores beside their controls, every method's options, the run and the versions.

Finished HTML from plain data. Every string that was not written here goes through `html.escape`.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from widgets.compare_data import from_comparison, score_names
from widgets.pack import answer_words, plain_value

if TYPE_CHECKING:
    from llava_lab.results import Run

NUMBER = "lab-report-number"

Cell = str | tuple[str, str]  # text, or (text, class)


def answer_line(run: Run) -> str:
    """The answer, each word with its probability as a title."""
    words = []
    for word in answer_words(run):
        chance = "" if word["p"] is None else f' title="probability {word["p"]:.1%}"'
        words.append(f"<span{chance}>{html.escape(word['text'])}</span>")
    return f'<p class="lab-report-answer">{" ".join(words) or html.escape(run.answer)}</p>'


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
        rows.append([name, rel.method, options, passes, _seconds(rel.seconds), " ".join(rel.notes)])
    table = table_of(["map", "method", "options", "passes", "time", "to know before reading it"], rows)
    return f'<section id="methods"><h2>The maps</h2>{table}</section>'


def how_made(run: Run, versions: Mapping[str, str]) -> str:
    """The run, exactly, and what wrote this file."""
    m = run.map
    facts = {
        "model": run.model,
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


def _seconds(seconds: float) -> str:
    return "under 10 ms" if seconds < 0.01 else f"{seconds:.2g} s"


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
