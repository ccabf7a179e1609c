"""A Lab and `llava_lab.attribute` that answer at once and remember what they were given, for the command line's tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from llava_lab.errors import OptionError
from llava_lab.geometry import PictureMap
from llava_lab.results import Relevance, Run, Word

WORDS = (Word("The", 6, 7), Word("car", 7, 8), Word("is", 8, 9), Word("red.", 9, 10))


def finished_run(**changes: Any) -> Run:
    """A finished run over a 2x2 grid, put together by hand."""
    fields: dict[str, Any] = {
        "picture": np.full((40, 60, 3), 128, np.uint8),
        "question": "What color is the car?",
        "answer": "The car is red.",
        "prompt": "USER: <image>\nWhat color is the car? ASSISTANT:",
        "token_ids": np.arange(10),
        "tokens": ("<s>", *["<image>"] * 4, ":", "The", " car", " is", " red."),
        "segments": {"system": (0, 1), "image": (1, 5), "cue": (5, 6), "answer": (6, 10)},
        "words": WORDS,
        "logprobs": np.array([-0.5, -0.25, -np.inf, 0.0], np.float32),
        "map": PictureMap.make(60, 40, size=32, rows=2, cols=2, mode="pad"),
        "model": "stand-in",
        "fingerprint": "f",
        "options": {"stopped": "eos"},
    }
    return Run(**{**fields, **changes})


class StandIn:
    """A Lab and `llava_lab.attribute` that remember what they were given."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.loaded: dict[str, Any] = {}
        self.attributed: dict[str, Any] = {}
        self.run = finished_run()

    def load(self, name: str, **options: Any) -> StandIn:
        self.loaded = {"name": name, **options}
        print("a library prints on standard output")
        return self

    def ask(self, picture: np.ndarray, question: str, *, on_token: Any, **options: Any) -> Run:
        if question == "...":
            raise OptionError("a question\n  needs words")
        self.asked = {"picture": picture, "question": question, **options}
        for word in self.run.words if on_token else ():
            on_token(word.text + " ")
        return self.run

    def attribute(self, lab: Any, run: Run, *, method: str, target: Any, **options: Any) -> Relevance:
        self.attributed = {"method": method, "target": target, "options": options}
        targets = run.word_targets() if target == "words" else (run.target(),)
        values = np.arange(len(targets) * 4, dtype=np.float32).reshape(-1, 2, 2)
        known: dict[str, Any] = {"map": run.map, "model": run.model, "fingerprint": run.fingerprint, "passes": {"forward": 1}}
        return Relevance(values, targets, method, options, seconds=0.5, notes=("read me",), **known)
