"""What the cards of `smol` and `photo` say of their language, as commands.

``python -m llava_lab.evaluation.plain_text smol`` prints the perplexity of the language model as it came and as it is after
training. With ``--free-form`` it answers the card's free-form questions, which were chosen before any result was seen; those of
`photo` are about photographs in the folder ``--pictures``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from llava_lab.errors import DataError
from llava_lab.evaluation.perplexity import plain_text_perplexity
from llava_lab.models import Lab, load
from llava_lab.shipped import ASSETS
from llava_lab.worlds.picturebook import caption, scene

QUESTIONS = "free_form.json"


def answer_free_form(lab: Lab, file: Path | None = None, *, pictures: Path | None = None) -> list[dict[str, Any]]:
    """Each question with what is really in its picture and the greedy answer, in the file's order.

    A row names a scene of the picture book, or a file in the folder `pictures`, whose name says what it shows. `file` None: the
    questions that ship with the lab's model. Raises DataError when they are about photographs and `pictures` is None.
    """
    rows = []
    for asked in json.loads((file or ASSETS / lab.name / QUESTIONS).read_text(encoding="utf-8"))["questions"]:
        if "picture" not in asked:
            drawn = scene(asked["split"], asked["index"])
            picture, place, shown = drawn.picture(), f"{asked['split']} {asked['index']}", caption(drawn)
        elif pictures is None:
            raise DataError(
                f"the free questions of {lab.name} are about photographs; give the folder that has {asked['picture']}"
            )
        else:
            picture, place = pictures / asked["picture"], asked["picture"]
            shown = Path(place).stem.split("_", 2)[-1].replace("_", " ")
        rows.append(
            {"place": place, "shown": shown, "question": asked["question"], "answer": lab.ask(picture, asked["question"]).answer}
        )
    return rows


def as_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table for the card."""
    lines = ["| picture | what it shows | question | answer |", "|---|---|---|---|"]
    lines += [f"| {row['place']} | {row['shown']} | {row['question']} | {row['answer']} |" for row in rows]
    return "\n".join(line.replace("\n", " ") for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Perplexity of plain text, or answers to the free-form questions.")
    parser.add_argument("model", choices=("smol", "photo"))
    parser.add_argument("--free-form", action="store_true")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if args.free_form:
        told = as_table(answer_free_form(load(args.model), pictures=args.pictures))
    else:
        told = json.dumps(plain_text_perplexity(args.model))
    sys.stdout.write(told + "\n")
