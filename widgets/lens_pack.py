"""What a lens read, as the page holds it: one buffer with a named part per table, and the pieces' texts once.

Probabilities are uint16 square roots, ``p = (level / 65535) ** 2``: 1 is exact and a chance of one in a million keeps
two figures, where bytes would make it zero. Entropies are uint16 steps up to the vocabulary's. Ids count into the
pieces of both the lens and the nearest words. 7B's 33 states x 576 patches x 5 words are 0.6 MB with their texts.
Refuses what does not belong to the run. Knows nothing of Jupyter or of pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from widgets.pack import encode_picture, head_of
from widgets.palette import palettes

if TYPE_CHECKING:
    from llava_lab.results import LogitLens, NearestWords, Run

STEPS = 65535  # of a level
COSINE_STEPS = 32767  # either side of zero
ALIGNED = 4  # bytes; every part starts on a multiple


@dataclass(frozen=True)
class PackedLens:
    """What the page is given: `spec` says where each part of `data` lies, its number type and its length."""

    spec: dict[str, Any]
    picture: bytes
    data: bytes


def pack_lens(run: Run, lens: LogitLens, near: NearestWords | None) -> PackedLens:
    """Check that lens and nearest words are of this run, and pack them."""
    check_lens(run, lens, near)
    ids = lens.piece_ids if near is None else np.union1d(lens.piece_ids, near.piece_ids)
    parts = {
        "ids": whole(np.searchsorted(ids, lens.top_ids), lens.vocabulary),
        "probs": root_levels(lens.top_probs),
        "entropy": entropy_levels(lens.entropy, lens.vocabulary),
        "word_probs": root_levels(lens.probs),
        "word_ranks": whole(lens.ranks, lens.vocabulary),
    }
    if near is not None:
        parts["near_ids"] = whole(np.searchsorted(ids, near.top_ids), lens.vocabulary)
        parts["cosines"] = np.rint(near.cosines * COSINE_STEPS).astype("<i2")
        parts["norms"] = near.norms.astype("<f4")
    picture, kind = encode_picture(run.picture)
    places, data = joined(parts)
    spec = {
        **head_of(run),
        "states": list(lens.states),
        "top": lens.top_ids.shape[2],
        "vocabulary": lens.vocabulary,
        "tuned": lens.tuned,
        "words": list(lens.words),
        "pieces": _texts(ids, lens, near),
        "near": None if near is None else {"top": near.top_ids.shape[1], "space": near.space, "centered": near.centered},
        "notes": [*lens.notes, *(near.notes if near is not None else ())],
        "picture": kind,
        "palettes": {name: colors.tobytes().hex() for name, colors in palettes().items()},
        "parts": places,
    }
    return PackedLens(spec, picture, data)


def check_lens(run: Run, lens: Any, near: Any) -> None:
    """Refuse what is no lens, what was read by another checkpoint or through another geometry, and what has holes."""
    _kind("lens", lens, "logit lens", "logit_lens")
    if near is not None:
        _kind("near", near, "nearest words", "nearest_words")
    for name, result in (("lens", lens), ("near", near)):
        if result is None:
            continue
        if result.fingerprint != run.fingerprint:
            raise ValueError(
                f"{name} was read from another checkpoint ({result.model}) than the run ({run.model}); read this run"
            )
        if result.map != run.map:
            raise ValueError(f"{name} was read through another picture geometry than the run's; read this run")
    tables = [lens.top_probs, lens.entropy, lens.probs, *([] if near is None else [near.cosines, near.norms])]
    if not all(np.isfinite(table).all() for table in tables):
        raise ValueError("lens or near holds values that are not finite; they cannot be shown")


def root_levels(probs: np.ndarray) -> np.ndarray:
    """uint16 levels of probabilities 0 to 1."""
    return np.rint(STEPS * np.sqrt(np.clip(probs.astype(np.float64), 0, 1))).astype("<u2")


def entropy_levels(entropy: np.ndarray, vocabulary: int) -> np.ndarray:
    """uint16 levels of entropies, 0 to log(vocabulary) nats."""
    most = max(float(np.log(vocabulary)), 1e-9)
    return np.rint(STEPS * np.clip(entropy.astype(np.float64) / most, 0, 1)).astype("<u2")


def whole(values: np.ndarray, most: int) -> np.ndarray:
    """Whole numbers up to `most` in two bytes each where that is enough, else in four."""
    return values.astype("<u2" if most <= STEPS else "<u4")


def joined(parts: dict[str, np.ndarray]) -> tuple[dict[str, list], bytes]:
    """One buffer, and of each part [number type, first byte, count]."""
    places, out = {}, bytearray()
    for name, values in parts.items():
        places[name] = [values.dtype.str[1:], len(out), values.size]
        out += values.tobytes()
        out += bytes(-len(out) % ALIGNED)
    return places, bytes(out)


def _kind(name: str, given: Any, kind: str, made_by: str) -> None:
    if getattr(given, "KIND", None) != kind:
        raise TypeError(f"{name} must be what llava_lab.{made_by} gives, got {type(given).__name__}")


def _texts(ids: np.ndarray, lens: LogitLens, near: NearestWords | None) -> list[str]:
    known = dict(zip(lens.piece_ids.tolist(), lens.pieces, strict=True))
    if near is not None:
        known |= dict(zip(near.piece_ids.tolist(), near.pieces, strict=True))
    return [known[one] for one in ids.tolist()]
