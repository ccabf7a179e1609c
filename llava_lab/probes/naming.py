"""How often image tokens name what they show: the share of object patches whose top words are its kind or its colour.

A patch counts when one thing covers most of it (`patch_labels`); at every state its top words are looked up among the ways
to spell the thing's kind and colour. Two controls stand beside it: patches that no thing touches, tried with the words of a
random thing of the same picture, and the same object patches tried with the words of a thing in the next picture.

Source: Neo et al. 2025 (arXiv 2410.07149) read visual tokens with the logit lens and count those that name their object;
the controls and intervals are ours.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
from tqdm.std import tqdm

from llava_lab.attribution.base import whole_number
from llava_lab.probes.labels import patch_labels
from llava_lab.probes.lens import logit_lens
from llava_lab.probes.vocabulary import word_tokens
from llava_lab.results_probes import LEVEL, RESAMPLES, NamingShare
from llava_lab.worlds.picturebook import scene
from llava_lab.worlds.scenes import COLOR_NAMES, KIND_NAMES, Scene

if TYPE_CHECKING:
    from llava_lab.models import Lab

QUESTION = "What do you see?"


def naming_share(
    lab: Lab, *, n: int = 60, split: str = "test", top: int = 5, question: str = QUESTION, seed: int = 0, progress: bool = True
) -> NamingShare:
    """Shares by state over the first `n` scenes of a split, with intervals that resample pictures.

    One answer and one forward a picture. A word of several tokens counts by its first (the notes list them).
    Raises OptionError for `n` below 2 (the shuffled control needs another picture) or `top` below 1, DataError for a split.
    """
    begin = time.perf_counter()
    whole_number("n", n, least=2)
    whole_number("top", top, least=1)
    names, notes = _spellings(lab)
    scenes = [scene(split, i, seed=seed) for i in range(n)]
    kinds, colors = patch_labels(lab, scenes, "kind"), patch_labels(lab, scenes, "color")
    empty = patch_labels(lab, scenes, "object") == 0
    rng = np.random.default_rng((seed, n))
    hits, counts = [], []
    states: tuple[int, ...] = ()
    for i, shown in enumerate(tqdm(scenes, desc="naming", unit="picture", disable=not progress)):
        run = lab.ask(shown.picture(), question, max_new_tokens=1)
        lens = logit_lens(lab, run, top=top)
        states, said = lens.states, lens.top_ids
        kind, color = kinds[i].ravel(), colors[i].ravel()
        there = np.flatnonzero(kind >= 0)
        blank = np.flatnonzero(empty[i].ravel())
        groups = (
            (there, kind[there], color[there]),
            (blank, *_drawn(shown, len(blank), rng)),
            (there, *_drawn(scenes[(i + 1) % n], len(there), rng)),
        )
        hits.append(np.stack([_named(said[:, where], names, k, c) for where, k, c in groups]))
        counts.append([len(where) for where, _, _ in groups])
    share, interval = _shares(np.stack(hits).astype(float), np.array(counts, float), seed)
    return NamingShare(
        states=states,
        share=share,
        interval=interval,
        patches=tuple(int(x) for x in np.sum(counts, 0)),
        top=top,
        split=split,
        pictures=n,
        model=lab.name,
        fingerprint=lab.fingerprint,
        seconds=time.perf_counter() - begin,
        notes=notes,
    )


def _drawn(shown: Scene, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Kind and colour of a random thing of a scene, for each of so many patches."""
    things = [shown.things[int(i)] for i in rng.integers(len(shown.things), size=count)]
    kinds = np.array([KIND_NAMES.index(thing.kind) for thing in things], np.int64)
    return kinds, np.array([COLOR_NAMES.index(thing.color) for thing in things], np.int64)


def _spellings(lab: Lab) -> tuple[dict[str, list[np.ndarray]], tuple[str, ...]]:
    """For every kind and colour the first tokens of its spellings: in a sentence, at its start, with a capital."""
    found: dict[str, list[np.ndarray]] = {}
    said: dict[str, None] = {}
    for what, words in (("kind", KIND_NAMES), ("color", COLOR_NAMES)):
        found[what] = []
        for word in words:
            _, (inside,), notes = word_tokens(lab, word)
            said |= dict.fromkeys(notes)
            ids = {inside}
            for spelt in (word, word.capitalize(), f" {word.capitalize()}"):
                alone = lab.tokenizer.encode(spelt, add_special_tokens=False)
                if len(alone) == 1 and alone[0] != lab.tokenizer.unk_token_id:
                    ids.add(alone[0])
            found[what].append(np.array(sorted(ids)))
    return found, tuple(said)


def _named(said: np.ndarray, names: dict[str, list[np.ndarray]], kind: np.ndarray, color: np.ndarray) -> np.ndarray:
    """(S, P, top) tokens -> patches that name their kind, their colour, either: int (3, S)."""
    hit = np.zeros((2, *said.shape[:2]), bool)
    for row, (what, wanted) in enumerate((("kind", kind), ("color", color))):
        for patch, number in enumerate(wanted):
            hit[row, :, patch] = np.isin(said[:, patch], names[what][int(number)]).any(-1)
    return np.stack([*hit, hit.any(0)]).sum(-1)


def _shares(hits: np.ndarray, counts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(pictures, groups, 3, S) hits and (pictures, groups) patches -> pooled shares (groups, 3, S) and their intervals."""
    rng, n = np.random.default_rng(seed), len(hits)
    weights = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(RESAMPLES // 4)])
    drawn = np.einsum("rn,ngws->rgws", weights, hits) / np.maximum(weights @ counts, 1)[:, :, None, None]
    share = hits.sum(0) / np.maximum(counts.sum(0), 1)[:, None, None]
    interval = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return share.astype(np.float32), np.moveaxis(interval, 0, -1).astype(np.float32)
