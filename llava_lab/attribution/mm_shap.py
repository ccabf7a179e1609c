"""MM-SHAP: how much of a score the pieces of the picture and the words of the question carry, as Shapley values.

Players are blocks of patches, about as many as the question has tokens, and those tokens. A block out of
the game is covered by a fill, a token by a stand-in; the rest of the sequence (system text, earlier turns,
cue, the answer itself) is always there. Shapley values come from random orders of the players: in each
order every player is credited with what its arrival adds, so each order's gains sum to the score of
everything minus the score of nothing, exactly.

The picture's share is the sum of absolute values over its players by that over all. Absolute values of
noisy estimates are too large, on both sides, so more orders move the share a little, not only its interval.

Source: Parcalabescu & Frank 2023 (arXiv 2212.08158), with the players of Heidelberg-NLP/CC-SHAP-VLM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from llava_lab.attribution.base import Targets, predicting_rows
from llava_lab.attribution.fills import fill_pixels
from llava_lab.attribution.scoring import read_scores
from llava_lab.errors import OptionError
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab

PATIENCE = 2.0  # seconds before a progress bar appears

Value = Callable[[np.ndarray], np.ndarray]  # who is in the game, bool (games, players) -> score of each


@dataclass(frozen=True)
class Players:
    """What can be taken away: first the blocks of the picture, then the question's tokens."""

    blocks: tuple[tuple[slice, slice], ...]  # rows and columns of the patch grid
    tokens: tuple[int, ...]  # positions in the sequence
    stand_in: int  # the token id put in a token's place

    def __len__(self) -> int:
        return len(self.blocks) + len(self.tokens)


def find_players(lab: Lab, run: Run, side: int | None = None) -> Players:
    """``side x side`` blocks (None: about as many as tokens) that show some of the picture, and the question's tokens."""
    tokens = tuple(i for i in range(*run.segments["question"]) if run.tokens[i].strip())
    rows, cols = run.map.rows, run.map.cols
    side = min(rows, cols, int(np.ceil(np.sqrt(len(tokens))))) if side is None else side
    if not 1 <= side <= min(rows, cols):
        raise OptionError(f"side must be 1 to {min(rows, cols)} blocks for a {rows}x{cols} grid, or None; got {side}")
    cuts = [np.linspace(0, length, side + 1).round().astype(int) for length in (rows, cols)]
    parts = [[slice(int(a), int(b)) for a, b in pairwise(cut)] for cut in cuts]
    shown = run.map.coverage() > 0
    blocks = tuple((y, x) for y in parts[0] for x in parts[1] if shown[y, x].any())
    return Players(blocks, tokens, stand_in_token(lab))


def stand_in_token(lab: Lab) -> int:
    """The id that stands for a missing word: unknown, else padding, else the beginning of the text."""
    tokenizer = lab.tokenizer
    ids = (tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id)
    found = next((int(one) for one in ids if one is not None and one != lab.image_id), None)
    if found is None:
        raise OptionError(f"{lab.name!r} has no unknown, padding or beginning token to put in a word's place")
    return found


def game(lab: Lab, run: Run, targets: Targets, players: Players, *, fill: str, batch: int) -> Value:
    """The first target's score (`scoring.target_score`) with only some players there. Call it inside `undisturbed`."""
    inputs = lab.inputs(run)
    ids, mask, pixels = inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"]
    blank = fill_pixels(lab, pixels, fill, run.map)
    at = predicting_rows(targets)
    keep = torch.tensor(at, device=ids.device)
    patch = run.map.size / run.map.rows

    def few(present: np.ndarray) -> Tensor:
        words, squares = ids.repeat(len(present), 1), pixels.repeat(len(present), 1, 1, 1)
        for i, there in enumerate(present):
            for player in np.flatnonzero(~there):
                if player < len(players.blocks):
                    y, x = (slice(round(part.start * patch), round(part.stop * patch)) for part in players.blocks[player])
                    squares[i, :, y, x] = blank[0, :, y, x]
                else:
                    words[i, players.tokens[player - len(players.blocks)]] = players.stand_in
        attend = mask.expand(len(present), -1)
        logits = lab.model(
            input_ids=words, attention_mask=attend, pixel_values=squares, logits_to_keep=keep, use_cache=False
        ).logits
        return read_scores(logits, at, targets)[:, 0]

    def value(present: np.ndarray) -> np.ndarray:
        parts = [few(present[start : start + batch]) for start in range(0, len(present), batch)]
        return torch.cat(parts).double().cpu().numpy()

    return value


def shapley_orders(value: Value, players: int, *, orders: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Credits of each player in each random order, float64 (orders, players), and the scores of nothing and everything.

    Every order takes ``players - 1`` games beyond those two. Ctrl-C ends early with the orders finished;
    before the first is finished it is raised.
    """
    rng = np.random.default_rng(seed)
    ends = value(np.stack([np.zeros(players, bool), np.ones(players, bool)]))
    gains: list[np.ndarray] = []
    with tqdm(total=orders, desc="MM-SHAP", unit="order", delay=PATIENCE, leave=False) as progress:
        try:
            for _ in range(orders):
                order = rng.permutation(players)
                present = np.tri(players - 1, players, dtype=bool)[:, np.argsort(order)]  # game k has the first k + 1
                between = value(present) if players > 1 else np.zeros(0)
                added = np.diff(np.concatenate([ends[:1], between, ends[1:]]))
                gains.append(added[np.argsort(order)])
                progress.update()
        except KeyboardInterrupt:
            if not gains:
                raise
    return np.stack(gains), ends


def share_of(gains: np.ndarray, first: int) -> float:
    """Absolute mean credit of the first `first` players by that of all; 0 when nobody has any."""
    size = np.abs(gains.mean(0))
    return float(size[:first].sum() / size.sum()) if size.sum() > 0 else 0.0


def share_interval(gains: np.ndarray, first: int, level: float) -> tuple[float, float]:
    """Jackknife interval of `share_of` over the orders, cut to 0..1; one order says nothing, so it gives (0, 1)."""
    orders = len(gains)
    if orders < 2:
        return 0.0, 1.0
    from scipy import stats  # only where it is used

    whole = share_of(gains, first)
    left = np.array([share_of(np.delete(gains, i, 0), first) for i in range(orders)])
    error = np.sqrt((orders - 1) / orders * ((left - left.mean()) ** 2).sum())
    reach = float(stats.t.ppf((1 + level) / 2, orders - 1) * error)
    return max(whole - reach, 0.0), min(whole + reach, 1.0)


def describe(run: Run, players: Players) -> dict[str, Any]:
    """The players in words and numbers, for a result."""
    boxes = [(y.start, y.stop, x.start, x.stop) for y, x in players.blocks]
    return {"blocks": tuple(boxes), "tokens": tuple(run.tokens[i] for i in players.tokens)}
