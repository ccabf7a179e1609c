"""The free-form questions of `smol`'s card: chosen before any result was seen, answered by the model as it is shipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_lab.models import Lab
from llava_lab.models.folders import ASSETS
from llava_lab.worlds.picturebook import caption, scene

QUESTIONS = ASSETS / "smol" / "free_form.json"


def answer_free_form(lab: Lab, file: Path = QUESTIONS) -> list[dict[str, Any]]:
    """Each question with what is really in its picture and the greedy answer, in the file's order."""
    rows = []
    for asked in json.loads(file.read_text(encoding="utf-8"))["questions"]:
        drawn = scene(asked["split"], asked["index"])
        rows.append({**asked, "shown": caption(drawn), "answer": lab.ask(drawn.picture(), asked["question"]).answer})
    return rows


def as_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table for the card."""
    lines = ["| picture | what it shows | question | answer |", "|---|---|---|---|"]
    lines += [f"| {row['split']} {row['index']} | {row['shown']} | {row['question']} | {row['answer']} |" for row in rows]
    return "\n".join(line.replace("\n", " ") for line in lines)
