"""Stage 0b of `tiny`: the language model learns to read and to reason, without any picture.

It reads *written maps*: the scene laid out on the patch grid in words, each cell holding the words
for what is there (" large", " red", " car"; the cell's vector is the sum of their embeddings) with
marks for where the cell lies; then come single facts, questions or a caption. Some scenes are
retold in words that the pictures do not use (`pictures.retold`). A written map is how the model learns,
before it sees, to look things up in a grid; the marks are thrown away after, and the connector has
to find words and marks by itself in stages 1 and 2. The card says so.

Single facts are short true statements, the densest text there is about what goes with what. A
conversation spends most tokens on form; "The color of the car is red." is a handful of tokens, one
of which can only be known by looking the car up. The stage reads many of these per scene before it
meets whole questions.

    statements(scene, np.random.default_rng(0), 3)  # [(" The color of the car is", " red."), ...]
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from llava_lab.training.text import IGNORE
from llava_lab.training.tiny.batches import ASKED, SHORT_SHARE, Apart, apart, apart_loss, facts, plain, question_turns
from llava_lab.training.tiny.pictures import ALL_COLORS, ALL_KINDS, Pool, patch_places, retold
from llava_lab.worlds.picturebook import REQUESTS, ask_about, caption, description
from llava_lab.worlds.questions import MARGIN, NUMBERS, article, names_for, place_of, plural
from llava_lab.worlds.scenes import Scene

# -- single facts --------------------------------------------------------------------------

Statement = tuple[str, str]  # what is given, what is to be known
FORMS = ("color", "size", "kind", "place") + ("number",) * 3 + ("direction",) * 5


def statements(scene: Scene, rng: np.random.Generator, count: int) -> list[Statement]:
    """`count` statements, each true and each with one attribute, kind, place, number or direction to be known."""
    made: list[Statement] = []
    while len(made) < count:
        form = FORMS[int(rng.integers(len(FORMS)))]
        i = int(rng.integers(len(scene.things)))
        if statement := _number(scene, i, rng) if form == "number" else _about(scene, i, form, rng):
            made.append(statement)
    return made


def _about(scene: Scene, i: int, form: str, rng: np.random.Generator) -> Statement | None:
    thing = scene.things[i]
    names = names_for(scene, i, without=form)
    if not names:
        return None
    name = names[int(rng.integers(len(names)))]
    if form == "direction":
        return _direction(scene, i, name, rng)
    if form == "place":
        place = place_of(thing)
        return (f" The place of the {name} is", f" {place}.") if place else None
    if form == "kind":
        return f" The {name} is", f" {article(thing.kind)}."
    return f" The {form} of the {name} is", f" {getattr(thing, form)}."


def _number(scene: Scene, i: int, rng: np.random.Generator) -> Statement:
    thing, roll = scene.things[i], rng.random()
    if roll < 0.2:
        return " The number of things is", f" {NUMBERS[len(scene.things)]}."
    if roll < 0.6:
        return f" The number of {plural(thing.kind)} is", f" {NUMBERS[sum(t.kind == thing.kind for t in scene.things)]}."
    return f" The number of {thing.color} things is", f" {NUMBERS[sum(t.color == thing.color for t in scene.things)]}."


def _direction(scene: Scene, i: int, name: str, rng: np.random.Generator) -> Statement | None:
    """Where thing i lies as seen from another: across or up and down, never left open which."""
    j = int(rng.integers(len(scene.things)))
    others = names_for(scene, j)
    if j == i or not others:
        return None
    across = bool(rng.random() < 0.5)
    a, b = scene.things[i], scene.things[j]
    gap = a.x - b.x if across else a.y - b.y
    if abs(gap) < MARGIN:
        return None
    other = others[int(rng.integers(len(others)))]
    if across:
        return f" Across from the {other} the {name} is", " right." if gap > 0 else " left."
    return f" Up or down from the {other} the {name} is", " below." if gap > 0 else " above."


# -- written maps --------------------------------------------------------------------------

FEW_CELLS = ((4, 16), (20, 60))  # most written maps have only some of their cells, few or more in turn, to be cheap
FULL_SHARE = 0.15
FORMS_LANGUAGE = ("map", "plain", "fact", "terse")
# twenty batches at a time: first mostly single facts, later mostly whole questions
EARLY = ("fact", "fact", "terse", "fact", "fact", "terse", "fact", "fact", "plain", "map") * 2
LATE = (
    *("terse", "map", "fact", "terse", "fact", "terse", "plain", "map", "terse", "fact"),
    *("terse", "map", "fact", "terse", "fact", "terse", "fact", "map", "terse", "terse"),
)
RETOLD_SHARE = 0.4  # of scenes
MARK_SCALE = 0.7  # standard deviation of a fresh mark, a little under a word's
MAP_NOISE = 0.05  # standard deviation added to every cell, in units of an embedding's own scale


class Marks(nn.Module):
    """Where a cell lies and where its thing's centre is, as one vector; and blank paper."""

    def __init__(self, grid: int, width: int) -> None:
        super().__init__()
        self.grid = grid
        self.row_embed = nn.Embedding(grid, width)
        self.col_embed = nn.Embedding(grid, width)
        self.paper = nn.Parameter(torch.randn(width))
        self.place_head = nn.Linear(5, width, bias=False)
        for weight in (self.row_embed.weight, self.col_embed.weight, self.place_head.weight):
            nn.init.normal_(weight, std=MARK_SCALE)

    def forward(self, embed: nn.Embedding, batch: dict[str, Tensor]) -> Tensor:
        """cells (B, K) and words (B, K, 3) with -1 for paper, places (B, K, 5) -> (B, K, D)."""
        words, cells = batch["words"], batch["cells"]
        thing = (words >= 0).all(-1, keepdim=True)
        vectors = torch.where(thing, embed(words.clamp(min=0)).sum(2), self.paper)
        vectors = (
            vectors + self.row_embed(cells // self.grid) + self.col_embed(cells % self.grid) + self.place_head(batch["places"])
        )
        return vectors + MAP_NOISE * vectors.detach().std() * torch.randn_like(vectors)


def word_ids(tokenizer: PreTrainedTokenizerFast, words: tuple[str, ...]) -> np.ndarray:
    """The single token of each word with its leading space; raises if a word takes several."""
    ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
    assert all(len(i) == 1 for i in ids), f"not single tokens: {[w for w, i in zip(words, ids, strict=True) if len(i) != 1]}"
    return np.array([i[0] for i in ids], np.int64)


class LanguageData(Dataset):
    """Batch number -> written maps with questions or captions, or descriptions with questions."""

    def __init__(
        self, pool: Pool, tokenizer: PreTrainedTokenizerFast, *, batch: int, turns: int, early: int, grid: int, seed: int
    ) -> None:
        self.pool, self.tokenizer, self.batch, self.turns, self.grid, self.seed = pool, tokenizer, batch, turns, grid, seed
        self.early = early  # steps before whole questions take over
        names = ALL_KINDS + ALL_COLORS + ("small", "large")
        self.words = dict(zip(names, word_ids(tokenizer, names).tolist(), strict=True))
        self.image_id = int(tokenizer.convert_tokens_to_ids("<image>"))

    def __getitem__(self, step: int) -> tuple[str, Any, Any]:
        rng = np.random.default_rng((self.seed, 21, step))
        chosen = np.sort(rng.choice(len(self.pool), self.batch, replace=False))
        scenes = [self.pool.scene(int(i)) for i in chosen]
        scenes = [retold(s, rng) if rng.random() < RETOLD_SHARE else s for s in scenes]
        form = (EARLY if step < self.early else LATE)[step % 20]
        system = bool(rng.random() < 0.5)
        cells = self.grid**2 if rng.random() < FULL_SHARE else int(rng.integers(*FEW_CELLS[step % 2]))
        layout = self.layout(scenes, self.pool.owners[chosen], self.pool.things[chosen], min(cells, self.grid**2), rng)
        return form, self._asked(form, scenes, rng, system), layout

    def _asked(self, form: str, scenes: list[Scene], rng: np.random.Generator, system: bool) -> Apart:
        if form == "plain":
            return plain(self.tokenizer, [[caption(s), description(s, rng)] for s in scenes], self.image_id)
        if form == "fact":
            return facts(self.tokenizer, [statements(s, rng, 3 * self.turns) for s in scenes], self.image_id)
        if form == "terse":
            asked = [ask_about(s, rng, 2 * self.turns, ASKED) for s in scenes]
            return facts(self.tokenizer, [[(f" {q.text}", f" {q.short}.") for q in row] for row in asked], self.image_id)
        short = bool(rng.random() < SHORT_SHARE)
        samples = [question_turns(s, rng, self.turns, short=short, types=ASKED)[0] for s in scenes]
        if rng.random() < 0.1:
            samples = [[(str(rng.choice(REQUESTS)), caption(s)), *pairs[:3]] for pairs, s in zip(samples, scenes, strict=True)]
        return apart(self.tokenizer, samples, system=system)

    def layout(
        self, scenes: list[Scene], owners: np.ndarray, things: np.ndarray, cells: int, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """`cells` cells of each scene in reading order: thing centres first, then other thing cells, then paper."""
        _, empty, places = patch_places(owners, things, self.grid)
        here = places[:, :, -1] > 0
        score = rng.random(owners.shape) + 2.0 * here + 0.4 * ~empty
        chosen = np.sort(np.argsort(-score, axis=1)[:, :cells], axis=1)
        names = np.full((*things.shape[:2], 3), -1)
        for row, scene in zip(names, scenes, strict=True):
            for i, thing in enumerate(scene.things):
                row[i] = self.words[thing.kind], self.words[thing.color], self.words[thing.size]
        words = np.take_along_axis(names, np.where(empty, 0, owners)[:, :, None].astype(np.int64), axis=1)
        words[empty] = -1
        take = {"words": words, "places": places}
        layout = {name: torch.from_numpy(np.take_along_axis(value, chosen[:, :, None], axis=1)) for name, value in take.items()}
        return layout | {"cells": torch.from_numpy(chosen)}


def language_loss(model: nn.Module, marks: Marks, item: tuple[str, Any, Any], image_id: int) -> tuple[Tensor, dict[str, float]]:
    """Loss of one batch, whatever its form; for questions also the share answered right in every token."""
    form, batch, layout = item
    maps = marks(model.model.language_model.embed_tokens, layout)
    loss, right = apart_loss(model, batch, maps, image_id)
    asked = (batch.labels != IGNORE).any(-1)
    return loss, {"form": float(FORMS_LANGUAGE.index(form)), "right": round(float(right.sum() / asked.sum()), 4)}
