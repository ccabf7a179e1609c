"""Scope: what a shipped model was made for, and one line for each way in which a question lies outside it.

    scope = scope_of("tiny")
    scope.about_words("Is there a dog?")  # ('tiny was shown no picture with: dog. ...',)

A model that is not shipped has none: nothing is folded, and nothing is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

from llava_lab.errors import DataError
from llava_lab.models import layout
from llava_lab.models.card import fingerprint
from llava_lab.models.scope.pictures import Familiar, read_features
from llava_lab.models.scope.words import fold, reworded, unknown
from llava_lab.shipped import MODELS

FILE = "scope.npz"
MOST = 5  # unknown words named


@dataclass(frozen=True)
class Scope:
    """What one model knows."""

    name: str
    knows: str
    pictures: Familiar | None = None
    words: frozenset[str] = frozenset()  # empty: it reads any

    def read_as(self, question: str) -> str:
        """The question as this model is given it: folded where it has few words."""
        return fold(question) if self.words else question

    def about_words(self, asked: str) -> tuple[str, ...]:
        """What a reader should know of a question's words; `asked` is what was typed."""
        if not self.words:
            return ()
        read = self.read_as(asked)
        line = read.split("\n", 1)[0]
        notes = [f"Read as {line!r}."] if reworded(asked.split("\n", 1)[0], line) else []
        if strange := unknown(read, self.words):
            named = ", ".join(strange[:MOST]) + (f" and {len(strange) - MOST} more" if len(strange) > MOST else "")
            notes.append(f"Outside the words that {self.name} learned with pictures: {named}. Its answer may mean nothing.")
        return tuple(notes)

    def about_picture(self, model: nn.Module, pixel_values: Float[Tensor, "1 3 S S"]) -> tuple[str, ...]:
        """What a reader should know of a picture, if the model's tower is the one the distance was measured with."""
        known = self.pictures
        if known is None or fingerprint(layout.vision_tower(model)) != known.tower:
            return ()
        distance = known.distance(read_features(model, pixel_values)[0])
        if distance <= known.threshold:
            return ()
        times = distance / known.threshold
        return (
            f"Unlike the pictures that {self.name} was trained on ({times:.1f} times the distance that its own stay within): "
            "its answer may mean nothing.",
        )


def scope_of(name: str) -> Scope | None:
    """The scope of a shipped model, None for any other."""
    if name not in MODELS:
        return None
    shipped = MODELS[name]
    pictures = _read(shipped.scope / FILE) if shipped.scope else None
    words = frozenset(pictures.words) if pictures is not None and shipped.few_words else frozenset()
    return Scope(name, shipped.knows, pictures, words)


@cache
def _read(path: Path) -> Familiar | None:
    """What was measured, None where a damaged or missing file says nothing: asking goes on without it."""
    try:
        return Familiar.load(path)
    except DataError:
        return None
