"""The data card beside generated rows: what made them, how many, how true, and what their terms forbid."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from llava_lab.results import Generated

CLAIMS = (
    "A claim is a thing, colour, size, number, place or relation that a sentence states; it is looked up in the scene where "
    'the world is drawn, in boxes and captions otherwise. "Not told" is what neither of them can say. CHAIR (Rohrbach et al., '
    "EMNLP 2018) is the share of named things, and of sentences naming one, that are not in the picture. Claims are read by "
    "rules that know a few dozen words: what they do not read is counted nowhere."
)


def data_card(result: Generated, settings: Mapping[str, Any]) -> str:
    """The card as Markdown, from the result alone."""
    table = result.table()
    return "\n".join(
        [
            "# Instruction rows made by llava-lab",
            "",
            f"{result.rows:,} rows about pictures of {_source(result.source)}, written by **{result.teacher}** on "
            f"{time.strftime('%Y-%m-%d')} from captions and boxes alone: the teacher never saw a picture.",
            "",
            "## What may be done with them",
            "",
            f"Terms of the teacher: {result.terms}.",
            "",
            "Pictures, captions and boxes keep the terms of their own data set. The prompts are llava-lab's own (Apache-2.0).",
            "",
            "## How many, and why others are not here",
            "",
            "```",
            str(table),
            "```",
            "",
            CLAIMS,
            "",
            "## Train on them",
            "",
            "    llava-lab train --data rows.json --stage instruct --out runs/mine",
            "",
            "`provenance.jsonl` has a line per row, `rejected.jsonl` a line per row or turn that was thrown away.",
            "",
            "## What made them",
            "",
            "```json",
            json.dumps(settings, indent=1),
            "```",
            "",
        ]
    )


def _source(source: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in source.items() if not isinstance(value, Mapping))
