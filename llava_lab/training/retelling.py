"""The same scene in other words: things and colours that the pictures never show.

A language model has read of far more than its pictures will hold. Reading scenes retold with
these words, stage 0b cannot get by on which colour goes with which thing in the picture book; it
has to look each one up, and so it also reads pairs right that it never met.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llava_lab.worlds.scenes import COLOR_NAMES, HELD_OUT, KIND_NAMES, Scene

OTHER_KINDS = ("ball", "bell", "bird", "book", "chair", "clock", "crown", "drum", "hat", "key", "lamp", "spoon")
OTHER_COLORS = ("black", "white", "gray", "golden", "silver", "violet")
ALL_KINDS, ALL_COLORS = KIND_NAMES + OTHER_KINDS, COLOR_NAMES + OTHER_COLORS


def retold(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with every kind and every colour renamed, one to one; never a held-out pair."""
    while True:
        kinds = dict(zip(KIND_NAMES, (ALL_KINDS[i] for i in rng.permutation(len(ALL_KINDS))), strict=False))
        colors = dict(zip(COLOR_NAMES, (ALL_COLORS[i] for i in rng.permutation(len(ALL_COLORS))), strict=False))
        things = tuple(replace(t, kind=kinds[t.kind], color=colors[t.color]) for t in scene.things)
        if not any((t.color, t.kind) in HELD_OUT for t in things):
            return replace(scene, things=things, kinds=tuple(kinds.values()), colors=tuple(colors.values()))
