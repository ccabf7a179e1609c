"""What a model was made for: the words it reads, the pictures it was trained on, and what to say of a question outside them.

    scope = scope_of("tiny")
    scope.about_words("Is there a dog?")  # ('tiny was shown no picture with: dog. ...',)

A model that is not shipped has none: nothing is folded, and nothing is said.

**Words** of a small model: common variants of a question are folded into the wording it was trained on. Spelling, contractions,
capitals, signs at the end, words of politeness, and single words that mean the same here are folded; the order of a sentence is
not touched. Only models with few words have their questions folded, and a run says how it was read (`Run.notes`); `Run.question`
is what the model was given. A question in the training's own words stays as it is.

    fold("whats the colour of the big car")  # "What is the color of the large car?"

**Pictures** are compared with those a model was trained on by a distance in the features of its vision tower:

    Familiar.load(folder / "scope.npz").distance(read_features(lab.model, lab.pixels(picture)))

A picture is the mean of what the tower passes on of its patches. Training pictures give a mean and a covariance, which is pulled
towards a multiple of the identity by `SHRINKAGE`, as the features lie near a plane; the distance is Mahalanobis', its square
divided by the width. The threshold is a quantile over held-out pictures. How often unseen pictures of the same world lie beyond
it, and how many of others do, stands beside it. `llava_lab.evaluation.scope` measures all this.

What it does not know: a drawn picture of other shapes on pale paper may lie well within (most of easy-VQA's pictures do). It
tells photographs from drawings, not what is drawn.

Source: Lee et al. 2018 (arXiv 1807.03888, section 2.1), without classes; the shrinkage is ours.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from llava_lab.capture import evaluating
from llava_lab.errors import DataError
from llava_lab.models import layout
from llava_lab.models.card import fingerprint
from llava_lab.results import Saved, Table
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


# -- words ----------------------------------------------------------------------------------

# what stands before an apostrophe and s, or is written without it
_IS = r"\b(what|where|which|who|how|there|that|it|here|color|thing|one)'s\b|\b(what|where|how|there|that)s\b"
_NOT = r"\b(is|are|do|does|did|was|were|has|have|could|would|should)n'?t\b"
# other spellings, and what means the same in the picture book
_MEANS = {
    "gray": "grey",
    "i am": "i'm",
    "i would": "i'd",
    "can not": "can't cannot",
    "middle": "centre center central",
    "picture": "image photo photograph drawing pic scene illustration painting sketch",
    "thing": "object item shape figure",
    "things": "objects items shapes figures",
    "small": "little tiny",
    "large": "huge giant",
    "above": "over atop",
    "below": "under underneath beneath",
    "see": "spot notice",
    "car": "automobile auto",
    "boat": "sailboat ship",
    "cup": "mug teacup",
    "purple": "violet lilac",
    "mushroom": "toadstool",
    "umbrella": "parasol",
}
_SAME = {word: meant for meant, words in _MEANS.items() for word in words.split()}
_SIDE = "(?:left of|right of|above|below)"
_WHETHER = "(?:(?:can|could) you )?(?:would you say|do you think|is it true|(?:tell me|say) (?:whether|if))"
_PHRASES = (
    (r"\bto the (left|right) of\b", r"\1 of"),
    (r"\bon the (left|right)(?: hand)? side\b(?! of)", r"on the \1"),
    (r"(?<!how )\bbig\b(?! or\b)", "large"),
    (r"\bbig or (?:small|large)\b", "small or large"),
    (r"\blarge or small\b", "small or large"),
    (r"\bi\b", "I"),
    (r"\ban (picture|thing|car)\b", r"a \1"),
    # sentences of another build, put as the picture book asks them
    (rf"^{_WHETHER}(?: that)? (the .+?|there) is (.+)$", r"is \1 \2"),
    (rf"^(the .+?) is ({_SIDE} .+)$", r"is \1 \2"),
    (rf"^(?:do you see|can you find) (the .+? {_SIDE} .+)$", r"can you see \1"),
    (r"^there is (an? .+)$", r"is there \1"),
    (r"^(.+?) is what$", r"what is \1"),
    (r"^(.+?) is where$", r"where is \1"),
    (r"^(.+?) is what (color|size)$", r"what \2 is \1"),
    (rf"^(?:tell me what (?:is|you see|you find|stands)|what can you see|what stands) ({_SIDE}|at|in|on) ", r"what is \1 "),
    (rf"^(?:name|which is) the thing ({_SIDE}|at|in|on) ", r"what is \1 "),
    (r"^what color would you (?:call|say) (the .+?)(?: is)?$", r"what color is \1"),
    (r"^how large\b", "how big"),
    (r"^in what part\b", "in which part"),
    (r"^can you find (the .+?)(?: in the picture)?$", r"where can I find \1"),
    (r"^can you see (an? .+)$", r"do you see \1"),
    (r"^can you count the (.+)$", r"how many \1 are there"),
    (r"^do you see (.+?),? and how many$", r"how many \1 do you see"),
    (r"^how many (.+?) (?:are in the picture|does the picture have|can you count)$", r"how many \1 are there"),
    (r"^(?:does the picture have )?more (.+?) than (.+)$", r"are there more \1 than \2"),
    (r"^(?:is|between) (the .+?) (?:or|and) (the .+?)(?:,? which(?: one)? is)? (?:bigger|larger)$", r"which is bigger, \1 or \2"),
    (r"^(the .+?) or (the .+?),? which(?: one)? is (?:bigger|larger)$", r"which is bigger, \1 or \2"),
    (r"^is (the .+?) the same color as (the .+)$", r"are \1 and \2 the same color"),
    (r"^do (the .+?) and (the .+?) (?:have one|match in) color$", r"do \1 and \2 have the same color"),
)
_BEFORE = re.compile(r"^(?:hey|hi|hello|please|pls|ok|okay|so|well|um|excuse me)\b[,!.]?\s+")
_AFTER = re.compile(r"[,\s]+(?:please|pls|thanks|thank you)$")
_SIGNS = str.maketrans({"’": "'", "‘": "'", "´": "'", "`": "'", "“": '"', "”": '"', "\u00a0": " "})
_ASKING = re.compile(r"(what|which|where|who|when|why|how|is|are|was|were|do|does|did|has|have|can|could|would|should|will)\b")
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")


def fold(question: str) -> str:
    """The question in the spelling and with the words that the picture book has; what stands on further lines is kept.

    >>> from llava_lab.models.scope import fold
    >>> fold("hey, what colour's that big car"), fold("Is the star red?")
    ('What color is that large car?', 'Is the star red?')
    """
    line, *rest = question.strip().split("\n", 1)
    text = " ".join(line.translate(_SIGNS).lower().split())
    while (bare := _BEFORE.sub("", text)) != text:
        text = bare
    body = text.rstrip(" .?!…,;")
    mark = text[len(body) :]
    while (bare := _AFTER.sub("", body)) != body:
        body = bare
    body = re.sub(_IS, lambda match: f"{match[1] or match[2]} is", re.sub(r"\bcolour", "color", body))
    body = re.sub(_NOT, r"\1 not", body)
    body = _WORD.sub(lambda match: _SAME.get(match[0], match[0]), body)
    for pattern, instead in _PHRASES:
        body = re.sub(pattern, instead, body)
    if not body:
        return question.strip()
    asks = _ASKING.match(body) is not None
    end = "?" if "?" in mark else "." if mark and not asks else "?" if asks else "."
    return "\n".join([body[0].upper() + body[1:] + end, *rest])


def rules() -> dict[str, Any]:
    """What `fold` does as patterns and tables, for a page that folds without Python.

    >>> from llava_lab.models.scope import rules
    >>> rules()["same"]["tiny"]
    'small'
    """
    return {
        "is": _IS,
        "not": _NOT,
        "same": _SAME,
        "phrases": _PHRASES,
        "before": _BEFORE.pattern,
        "after": _AFTER.pattern,
        "signs": {chr(sign): instead for sign, instead in _SIGNS.items()},
        "asking": _ASKING.pattern,
    }


def words_of(text: str) -> list[str]:
    """The different words of a text in small letters, in order; numbers too.

    >>> from llava_lab.models.scope import words_of
    >>> words_of("Is there a red star, or 2?")
    ['is', 'there', 'a', 'red', 'star', 'or', '2']
    """
    return list(dict.fromkeys(_WORD.findall(text.lower())))


def unknown(question: str, known: Collection[str]) -> list[str]:
    """The words of a question that are not among the `known`."""
    return [word for word in words_of(question) if word not in known]


def reworded(asked: str, read: str) -> bool:
    """Whether folding changed a word, not only capitals and signs."""
    return words_of(asked) != words_of(read)


# -- pictures -------------------------------------------------------------------------------

SHRINKAGE = 0.1


@dataclass(frozen=True)
class Familiar(Saved):
    """Where the training pictures of a tower lie, how far is too far, and what was measured with that."""

    KIND: ClassVar[str] = "scope"

    mean: Float32[np.ndarray, " width"]
    whitening: Float32[np.ndarray, "width width"]  # upper triangle of the inverse covariance's factor
    threshold: float
    tower: str  # fingerprint of the vision tower's weights
    words: tuple[str, ...]  # of the questions the model was trained on
    command: str  # that makes this file
    # name -> {"pictures": n, "beyond": share, "interval": [low, high], "median": distance}
    measured: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, features: Float[np.ndarray, "N F"], held_out: Float[np.ndarray, "M F"], quantile: float, **about: Any
    ) -> Familiar:
        """Fit to pictures' features, with the threshold at a quantile of others'. `about` are the remaining fields."""
        mean, spread = features.mean(0), np.cov(features.T.astype(np.float64))
        spread += SHRINKAGE * np.trace(spread) / len(spread) * np.eye(len(spread))
        whitening = np.linalg.cholesky(np.linalg.inv(spread)).astype(np.float32)
        bare = cls(mean.astype(np.float32), whitening, np.inf, **about)
        distances = [bare.distance(row) for row in held_out]
        return cls(bare.mean, bare.whitening, float(np.quantile(distances, quantile)), **about)

    def distance(self, features: Float[np.ndarray, " F"]) -> float:
        """How far a picture's features lie from the training pictures'; 1 is where those lie on average, or near it."""
        return float(np.square((features - self.mean) @ self.whitening).mean())

    def table(self) -> Table:
        """What was measured, one kind of pictures a row."""
        rows = []
        for name, row in self.measured.items():
            low, high = row["interval"]
            beyond = f"{row['beyond']:.1%} ({low:.1%} to {high:.1%})"
            rows.append((name, str(row["pictures"]), beyond, f"{row['median'] / self.threshold:.2f}"))
        title = f"threshold {self.threshold:.3g}; {self.command}"
        return Table(("pictures", "n", "beyond the threshold", "median distance over it"), tuple(rows), title=title)


def read_features(model: nn.Module, pixel_values: Float[Tensor, "B 3 S S"]) -> Float[np.ndarray, "B F"]:
    """What the tower passes on of each picture, averaged over its patches, float32. Connector and language model do not run."""
    tower: Any = layout.vision_tower(model)
    config: Any = model.config
    with evaluating(model), torch.no_grad():
        states = tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
    features = torch.cat([states[layer] for layer in layout.feature_layers(config)], -1)
    return features[:, int(layout.has_class_token(model)) :].float().mean(1).cpu().numpy()
