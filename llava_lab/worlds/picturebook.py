"""The picture book: small drawn worlds with exact ground truth, and their data sets on disk.

`scene` gives a picture, its things with boxes and masks; `ask_about` gives questions with the
things that decide each answer; `caption` and `description` put the scene in words;
`conversation` joins several turns in LLaVA's format, and `write_dataset` writes them as LLaVA
does: a JSON list of ``id``, ``image``, ``conversations`` beside a folder of pictures, with a
second file holding the ground truth that LLaVA's format has no place for.

    write_dataset("runs/book", n=1000)  # then: llava-lab train --data runs/book/train.json --stage align

Format source: haotian-liu/LLaVA @ c121f04 ``docs/Finetune_Custom_Data.md``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.std import tqdm

from llava_lab.errors import DataError
from llava_lab.results.save import only_writer, whole_file
from llava_lab.worlds.questions import SHORT, TYPES, Question, article, ask_about, at, place_of
from llava_lab.worlds.scenes import HELD_OUT, SIZE, SPLITS, Scene, Thing, scene

__all__ = ["HELD_OUT", "SHORT", "SIZE", "SPLITS", "TYPES", "Question", "Scene", "Thing"]
__all__ += ["ask_about", "caption", "conversation", "description", "scene", "write_dataset"]

REQUESTS = ("Describe the picture.", "What do you see?", "Give a short caption.", "What is in the picture?")
SHORT_SHARE = 0.3  # of conversations ask for single words, in LLaVA-1.5's own wording


def caption(scene: Scene) -> str:
    """One sentence naming every thing from left to right by size, colour and kind."""
    nouns = [article(f"{t.size} {t.color} {t.kind}") for t in (scene.things[i] for i in scene.left_to_right)]
    text = nouns[0] if len(nouns) == 1 else ", ".join(nouns[:-1]) + " and " + nouns[-1]
    return text[0].upper() + text[1:] + "."


def description(scene: Scene, rng: np.random.Generator) -> str:
    """One sentence per thing in random order, with its place where a clear one exists."""
    sentences = []
    for i in rng.permutation(len(scene.things)):
        thing = scene.things[int(i)]
        noun, place = article(f"{thing.size} {thing.color} {thing.kind}"), place_of(thing)
        where = f" {at(place)}" if place else ""
        form = ("There is {}{}.", "I see {}{}.", "The picture shows {}{}.")[int(rng.integers(3))]
        sentences.append(form.format(noun, where))
    return " ".join(sentences)


def conversation(scene: Scene, rng: np.random.Generator, turns: int, *, describe: float = 0.25) -> list[tuple[str, str]]:
    """Several (question, answer) turns about one picture; sometimes single words, sometimes a caption first."""
    questions = ask_about(scene, rng, turns)
    if rng.random() < SHORT_SHARE and questions:
        pairs = [(q.text, q.short) for q in questions]
        return [(f"{pairs[0][0]}\n{SHORT}", pairs[0][1]), *pairs[1:]]
    pairs = [(q.text, q.answer) for q in questions]
    if rng.random() < describe:
        request = REQUESTS[int(rng.integers(len(REQUESTS)))]
        pairs.insert(int(rng.integers(len(pairs) + 1)), (request, caption(scene)))
    return pairs


def write_dataset(
    out: str | os.PathLike, *, n: int, seed: int = 0, split: str = "train", turns: int = 6, progress: bool = True
) -> Path:
    """Write `n` pictures of a split with conversations in LLaVA's format; returns the JSON file.

    `out` receives ``{split}.json`` (LLaVA's own format), ``{split}.truth.jsonl`` (things with
    boxes, questions with types and deciding things) and ``images/``. Same arguments, same bytes.
    Raises DataError when n is below 1 or the folder already holds another data set, OptionError while another process writes it.
    """
    if n < 1:
        raise DataError(f"n must be 1 or more, got {n}")
    folder = Path(out)
    target = folder / f"{split}.json"
    with only_writer(folder):
        if target.exists():
            raise DataError(f"{target} exists; give an empty folder or remove it first")
        rows, truth = [], []
        for index in tqdm(range(n), desc=f"picturebook {split}", unit="picture", disable=not progress):
            drawn = scene(split, index, seed=seed)
            image = f"images/{drawn.name}.png"
            with whole_file(folder / image) as temporary:
                drawn.picture().save(temporary, "PNG")
            questions = ask_about(drawn, np.random.default_rng((SPLITS[split], seed, index, 5)), turns)
            rows.append(_row(drawn, image, [(q.text, q.answer) for q in questions]))
            truth.append(_truth(drawn, image, questions))
        with whole_file(folder / f"{split}.truth.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in truth), encoding="utf-8")
        with whole_file(target) as temporary:
            temporary.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        return target


def _row(drawn: Scene, image: str, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    turns = []
    for i, (asked, answered) in enumerate(pairs):
        turns.append({"from": "human", "value": f"<image>\n{asked}" if i == 0 else asked})
        turns.append({"from": "gpt", "value": answered})
    return {"id": drawn.name, "image": image, "conversations": turns}


def _truth(drawn: Scene, image: str, questions: list[Question]) -> dict[str, Any]:
    things = [
        {"kind": t.kind, "color": t.color, "size": t.size, "box": [round(v, 2) for v in t.box()], "held_out": t.held_out}
        for t in drawn.things
    ]
    asked = [
        {"type": q.type, "question": q.text, "answer": q.answer, "short": q.short, "deciding": q.deciding} for q in questions
    ]
    return {"id": drawn.name, "image": image, "caption": caption(drawn), "things": things, "questions": asked}
