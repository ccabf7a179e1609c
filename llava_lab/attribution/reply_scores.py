"""How likely a closed model finds the run's words, read from what it answers to another picture.

Two rules, chosen by what the run itself came with; `llava_lab.attribution.black_box` says what they mean and
where they fail. Nothing here asks a server.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from llava_lab.models.replies import Reply, token_id
from llava_lab.models.words import Spelt, cut
from llava_lab.results import Run, Target

MARKS = ".,!?;:\"'"


class Scored(NamedTuple):
    """A target's score (natural log), and what to know of it."""

    value: float
    parted: bool = False  # the new answer took another way before the target's end
    unlisted: bool = False  # a token was not in the server's list


def score_replies(replies: Sequence[Reply], run: Run, target: Target, *, floor: float) -> Scored:
    """The score of `target` by what was answered to one picture; several `replies` only where agreement is counted."""
    if run.options["scoring"] == "agreement":
        return Scored(_agreement(replies, run, target))
    own = [int(i) for i in run.token_ids[slice(*run.segments["answer"])]]
    start = run.segments["answer"][0]
    places = [position + 1 - start for position in target.positions]
    found: list[tuple[Reply, list[int], int]]
    if run.options["scoring"] == "prefill":  # each place has a reply of its own that goes on from the run's words
        needed = dict(zip(places_of(run, (target,)), replies, strict=True))
        found = [(needed[place], [], 0) for place in places]
    else:
        found = [(replies[0], own, place) for place in places]
    said = [_listed(*one, token, floor) for one, token in zip(found, target.token_ids, strict=True)]
    against = [_listed(*one, token, floor) for one, token in zip(found, target.against_ids, strict=False)]
    both = [*said, *against]
    value = sum(one.value for one in said) - sum(one.value for one in against)
    return Scored(value, any(one.parted for one in both), any(one.unlisted for one in both))


def places_of(run: Run, targets: Sequence[Target]) -> list[int]:
    """The places in the answer, from 0, of every token of some target, in order."""
    first = run.segments["answer"][0] - 1
    return sorted({position - first for target in targets for position in target.positions})


def _listed(reply: Reply, own: list[int], at: int, token: int, floor: float) -> Scored:
    """The log-probability of `token` at place `at` of the answer, if the answer before it is the run's."""
    tokens = reply.tokens or ()
    if at >= len(tokens) or [token_id(one.piece) for one in tokens[:at]] != own[:at]:
        return Scored(floor, parted=True)
    listed = dict(reversed(tokens[at].top)) | {tokens[at].piece: tokens[at].logprob}
    for piece, value in listed.items():
        if token_id(piece) == token:
            return Scored(max(value, floor))
    rest = 1 - sum(math.exp(min(value, 0.0)) for value in listed.values())
    most = min(*listed.values(), math.log(rest) if rest > 0 else -math.inf, 0.0)
    return Scored(max(most, floor), unlisted=True)


def _agreement(replies: Sequence[Reply], run: Run, target: Target) -> float:
    """Summed over the target's words; a contrast is the word said against the other."""
    if target.against_ids:
        said, _, instead = target.text.rpartition(", not ")
        return _log_share(replies, said, 1) - _log_share(replies, instead, 1)
    first, last = target.positions[0] + 1, target.positions[-1] + 2
    inside = [i for i, word in enumerate(run.words) if word.start < last and word.stop > first]
    spoken = [i for i in inside if any(letter.isalnum() for letter in run.words[i].text)] or inside
    bare = [_bare(word.text) for word in run.words]
    return sum(_log_share(replies, bare[i], bare[: i + 1].count(bare[i])) for i in spoken)


def _log_share(replies: Sequence[Reply], word: str, times: int) -> float:
    """The log of the share of answers that hold `word` at least `times` times, half a count added to either side."""
    holding = sum(words_of(reply.text).count(_bare(word)) >= times for reply in replies)
    return math.log((holding + 0.5) / (len(replies) + 1))


def words_of(text: str) -> list[str]:
    """A text's words without case and marks."""
    pieces = cut(text)
    return [_bare(word.text) for word in Spelt(dict(enumerate(pieces))).words(range(len(pieces)), 0)]


def _bare(text: str) -> str:
    return text.strip().strip(MARKS).casefold() or text.strip()
