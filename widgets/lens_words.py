"""Looking a word up in what a lens kept, as the page does it: texts are compared without the spaces around them.

A word the lens was asked for is read from its own table. Any other is the sum over the pieces that read so, wherever
they are among the top words; if none is spelt exactly so, upper and lower case count as alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llava_lab.results import LogitLens


def asked(lens: LogitLens, word: str) -> int:
    """Which of the lens's own words it is, or -1."""
    bare = [one.strip() for one in lens.words]
    return bare.index(word.strip()) if word.strip() in bare else -1


def matching(lens: LogitLens, word: str) -> np.ndarray:
    """Ids of the pieces that read `word`, int32."""
    texts, wanted = [piece.strip() for piece in lens.pieces], word.strip()
    same = np.array([text == wanted for text in texts], bool)
    if not same.any():
        same = np.array([text.lower() == wanted.lower() for text in texts], bool)
    return lens.piece_ids[same] if wanted else lens.piece_ids[:0]


def seen(lens: LogitLens, word: str) -> bool:
    """Whether anything is known of `word`."""
    return asked(lens, word) >= 0 or len(matching(lens, word)) > 0


def word_values(lens: LogitLens, word: str) -> np.ndarray:
    """Probability of `word` at every state and patch, float64 (states, patches); 0 where it is not known."""
    own = asked(lens, word)
    if own >= 0:
        return lens.probs[:, :, own].astype(np.float64)
    return np.where(np.isin(lens.top_ids, matching(lens, word)), lens.top_probs, 0).sum(-1, dtype=np.float64)
