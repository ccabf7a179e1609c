"""What `smol`'s card says of its language, as commands.

``python -m llava_lab.evaluation.plain_text smol`` prints the perplexity of the language model as it came and as it is after
training. With ``free-form`` behind it, it answers the card's free-form questions, which were chosen before any result was seen.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from llava_lab.evaluation.perplexity import plain_text_perplexity
from llava_lab.models import Lab, load
from llava_lab.shipped import ASSETS
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


if __name__ == "__main__":
    wanted = as_table(answer_free_form(load("smol"))) if "free-form" in sys.argv else json.dumps(plain_text_perplexity())
    sys.stdout.write(wanted + "\n")
