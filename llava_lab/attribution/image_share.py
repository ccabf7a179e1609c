"""How much of an answer comes from the picture and how much from the text: three different questions, asked side by side.

- *With and without the picture*: how far the next-token distributions move (KL divergence, in nats) when the image
  tokens are removed, and when the picture is replaced by a fill. The causal one; it has no scale.
- *Mass*: what share of attention, of rollout and of relevancy lies on image tokens. A share, not of causation.
- *MM-SHAP*: what share of the Shapley values belongs to the picture, with an interval. Causal, and a share, of this game:
  these pieces, this fill.

They can disagree, and none is the average of the others, so none is computed here.

The game of MM-SHAP: players are blocks of patches, about as many as the question has tokens, and those tokens. A block out
of the game is covered by a fill, a token by a stand-in; the rest of the sequence (system text, earlier turns, cue, the
answer itself) is always there. In each random order of the players every player is credited with what its arrival adds,
so each order's gains sum to the score of everything minus the score of nothing, exactly. The picture's share is the sum
of absolute values over its players by that over all. Absolute values of noisy estimates are too large, on both sides, so
more orders move the share a little, not only its interval.

Source: Parcalabescu & Frank 2023 (arXiv 2212.08158), with the players of Heidelberg-NLP/CC-SHAP-VLM; the others are plain
definitions.

    share = image_share(lab, run, target="red")
    share.shap, share.kl, share.mass["attention"]
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llava_lab.attribution.registry import METHODS, attribute
from llava_lab.attribution.shapley import Game
from llava_lab.capture import undisturbed
from llava_lab.checks import Sweep, entry, made_by, one_of, same_model, whole_number
from llava_lab.errors import LabError, OptionError, TargetError
from llava_lab.models import Lab
from llava_lab.replay.fills import FILLS, fill_pixels
from llava_lab.replay.score import divergence, read_scores
from llava_lab.replay.targets import Targets, Wanted, predicting_rows, resolve_targets
from llava_lab.results import Run, Target

REMOVED = "removed"  # the way that takes the image tokens out of the sequence
LEVEL = 0.95  # of the interval


@dataclass(frozen=True)
class ImageShare:
    """Image against text, three ways; see `image_share`. Numpy and strings only."""

    target: Target
    tokens: tuple[str, ...]  # the tokens predicted, one for each column of `kl`
    ways: tuple[str, ...]  # how the picture was taken away
    kl: np.ndarray  # float32 (ways, tokens), nats, of the distribution with the picture from the one without
    drop: np.ndarray  # float32 (ways,), score of the target with the picture minus without
    mass: dict[str, float]  # method -> share of its mass on image tokens, 0..1
    shap: float | None  # the picture's share by MM-SHAP, 0..1; None when no orders were asked for
    interval: tuple[float, float] | None
    block_values: np.ndarray  # float32 (blocks,), Shapley value of each block of patches
    token_values: np.ndarray  # float32 (question tokens,)
    players: dict[str, Any]  # blocks as (row, stop, col, stop), tokens as text
    orders: int  # finished
    options: dict[str, Any]
    model: str
    fingerprint: str
    seconds: float
    passes: dict[str, int]
    notes: tuple[str, ...]

    @property
    def text_shap(self) -> float | None:
        """The question's share by MM-SHAP."""
        return None if self.shap is None else 1 - self.shap

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON."""
        plain = asdict(self)
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in plain.items()}


@entry
def image_share(
    lab: Lab,
    run: Run,
    *,
    target: Wanted = None,
    fill: str = FILLS[0],
    orders: int = 20,
    side: int | None = None,
    seed: int = 0,
    batch: int = 8,
) -> ImageShare:
    """Image-versus-text share of one target: with/without-picture KL, mass on image tokens, and MM-SHAP.

    `target` as in `attribute`, one of it; `fill` covers the picture; `orders` random orders of the players
    (0 leaves MM-SHAP out); `side` blocks to a side, None for about as many blocks as question tokens.
    Raises OptionError, TargetError (not in the answer, or several), CheckpointError (another model's run).

    >>> share = ll.image_share(lab, run, target="answer", orders=1, side=2)
    >>> share.ways, 0 <= share.shap <= 1
    (('removed', 'grey'), True)
    """
    options: dict[str, Any] = {
        "fill": one_of("fill", fill, FILLS),
        "orders": whole_number("orders", orders),
        "side": None if side is None else whole_number("side", side, least=1),
        "seed": whole_number("seed", seed),
        "batch": whole_number("batch", batch, least=1),
    }
    same_model(lab, run)
    targets = resolve_targets(lab, run, target)
    if len(targets) != 1:
        raise TargetError(f"expected one target to share out, got {len(targets)}; ask for one at a time")
    start = time.perf_counter()
    with undisturbed(lab.model):
        kl, drop = _without_picture(lab, run, targets, fill)
        players = find_players(lab, run, options["side"])
        game = Pieces(lab, run, targets, players, fill=fill, batch=options["batch"])
        gains = shapley_orders(game, orders=options["orders"], seed=options["seed"])
    mass, spent, notes = _masses(lab, run, targets[0])
    done, first = len(gains), len(players.blocks)
    if orders:
        piece = lab.tokenizer.convert_ids_to_tokens(players.stand_in)
        notes.append(
            f"MM-SHAP over {first} blocks and {len(players.tokens)} question tokens, a missing token being {piece!r}; "
            f"{done} random orders, {LEVEL:.0%} jackknife interval."
        )
    if done < options["orders"]:
        notes.append(f"Interrupted after {done} of {orders} orders.")
    values = gains.mean(0).astype(np.float32) if done else np.zeros(len(players), np.float32)
    return ImageShare(
        target=targets[0],
        tokens=tuple(run.tokens[position + 1] for position in targets[0].positions),
        ways=(REMOVED, fill),
        kl=kl,
        drop=drop,
        mass=mass,
        shap=share_of(gains, first) if done else None,
        interval=share_interval(gains, first, LEVEL) if done else None,
        block_values=values[:first],
        token_values=values[first:],
        players=describe(run, players),
        orders=done,
        options=options,
        **made_by(lab, start),
        passes={"forward": 3 + game.forwards + spent["forward"], "backward": spent["backward"]},
        notes=tuple(notes),
    )


# -- with and without the picture -----------------------------------------------------------


def _without_picture(lab: Lab, run: Run, targets: Targets, fill: str) -> tuple[np.ndarray, np.ndarray]:
    """KL at each predicting position (ways, tokens), and the drop of the target's score (ways,)."""
    inputs = lab.inputs(run)
    at = predicting_rows(targets)
    start, stop = run.segments["image"]
    texts = {name: torch.cat([value[:, :start], value[:, stop:]], 1) for name, value in inputs.items() if value.ndim == 2}
    blank = {**inputs, "pixel_values": fill_pixels(lab, inputs["pixel_values"], fill, run.map)}

    def logits(given: dict[str, Tensor], positions: Sequence[int]) -> Float[Tensor, "R V"]:
        keep = torch.tensor(positions, device=given["input_ids"].device)
        return lab.model(**given, logits_to_keep=keep, use_cache=False).logits[0].float()

    whole = logits(inputs, at)
    others = [logits(texts, [position - (stop - start) for position in at]), logits(blank, at)]
    rows = [at.index(position) for position in targets[0].positions]
    kl = torch.stack([divergence(whole, other)[rows] for other in others])
    scores = [float(read_scores(each[None], at, targets)[0, 0]) for each in (whole, *others)]
    return kl.cpu().numpy(), np.array([scores[0] - score for score in scores[1:]], np.float32)


# -- mass -----------------------------------------------------------------------------------


def _masses(lab: Lab, run: Run, target: Target) -> tuple[dict[str, float], dict[str, int], list[str]]:
    """Share of each method's mass on the image tokens, the passes it took, and what could not be had."""
    mass: dict[str, float] = {}
    spent, notes = {"forward": 0, "backward": 0}, []
    for name, card in METHODS.items():
        if card.mass is None:
            continue
        try:
            relevance = attribute(lab, run, method=name, target=target, **card.mass)
        except LabError as error:  # a contrast has no attention, a quantised model no gradients
            notes.append(f"No {name} mass: {error}")
            continue
        by_segment = relevance.extras["mass"][0]
        total = sum(by_segment.values())
        mass[name] = by_segment["image"] / total if total else 0.0
        spent = {kind: spent[kind] + relevance.passes[kind] for kind in spent}
    return mass, spent, [*notes, "Mass is a share of attention or relevancy, not of causation; KL has no upper end."]


# -- MM-SHAP --------------------------------------------------------------------------------


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


class Pieces(Game):
    """Players are blocks of the picture and words of the question; only the first target counts. Play it inside `undisturbed`."""

    def __init__(self, lab: Lab, run: Run, targets: Targets, blocks_and_words: Players, *, fill: str, batch: int) -> None:
        self.players, self.forwards = len(blocks_and_words), 0
        self._lab, self._targets, self._of, self._batch = lab, targets, blocks_and_words, batch
        self._inputs = lab.inputs(run)
        self._blank = fill_pixels(lab, self._inputs["pixel_values"], fill, run.map)
        self._patch = run.map.patch

    def worth(self, shown: Bool[Tensor, "B n"]) -> Float[Tensor, "B 1"]:
        self.forwards += len(shown)
        return torch.cat([self._score(part) for part in shown.split(self._batch)])

    def _score(self, shown: Bool[Tensor, "B n"]) -> Float[Tensor, "B 1"]:
        ids, pixels = self._inputs["input_ids"], self._inputs["pixel_values"]
        words, squares = ids.repeat(len(shown), 1), pixels.repeat(len(shown), 1, 1, 1)
        for i, there in enumerate(shown):
            for player in torch.nonzero(~there)[:, 0].tolist():
                if player < len(self._of.blocks):
                    y, x = (slice(part.start * self._patch, part.stop * self._patch) for part in self._of.blocks[player])
                    squares[i, :, y, x] = self._blank[0, :, y, x]
                else:
                    words[i, self._of.tokens[player - len(self._of.blocks)]] = self._of.stand_in
        at = predicting_rows(self._targets)
        logits = self._lab.model(
            input_ids=words,
            attention_mask=self._inputs["attention_mask"].expand(len(shown), -1),
            pixel_values=squares,
            logits_to_keep=torch.tensor(at, device=ids.device),
            use_cache=False,
        ).logits
        return read_scores(logits, at, self._targets)[:, :1].cpu()


def shapley_orders(game: Game, *, orders: int, seed: int) -> np.ndarray:
    """Credits of each player in each random order, float64 (orders, players).

    Every order asks for ``players - 1`` coalitions beyond the two ends. Ctrl-C ends early with the orders finished;
    before the first is finished it is raised.
    """
    rng = np.random.default_rng(seed)
    gains: list[np.ndarray] = []
    if not orders:
        return np.zeros((0, game.players))
    ends = game.worth(torch.tensor([[False], [True]]).expand(2, game.players)).double().numpy()[:, 0]
    with Sweep("MM-SHAP", total=orders, unit="order") as done:
        for _ in range(orders):
            order = rng.permutation(game.players)
            shown = np.tri(game.players - 1, game.players, dtype=bool)[:, np.argsort(order)]  # row k has the first k + 1
            between = game.worth(torch.from_numpy(shown)).double().numpy()[:, 0] if len(shown) else np.zeros(0)
            gains.append(np.diff(np.concatenate([ends[:1], between, ends[1:]]))[np.argsort(order)])
            done.step()
    return np.stack(gains)


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
