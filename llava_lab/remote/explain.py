"""Closed models explained from outside: alter the picture, ask again, read the answer.

Occlusion, RISE, Shapley values and faithfulness run here as they do on a `Lab`; two things differ. What they alter is the
picture as it is sent (`Asked`, an `Altered`), and what they read is one of these scores, per token or word and summed
over the target:

- ``top``, where the server lists log-probabilities. A server cannot be given an answer to score, so it answers
  anew, and token k of the run's answer is scored by its log-probability in the list at place k, provided the new
  answer begins with the same k tokens. A token that is not listed counts as much as it could at most: the least
  listed, or what probability is left. Where answers parted earlier, nothing is known and it gets the floor; nothing
  counts less than the floor. So long answers are explained badly by their last words, and a note says how many
  looks parted. The first token, or a word that the answer always reaches in the same way, is scored exactly.
- ``prefill``, for servers that go on from a given beginning (vLLM's ``continue_final_message``, llama.cpp): each token of
  the target is asked for after the run's own words, one request each, so no answer can part. That the server does go
  on is checked on the whole picture. Templates that trim spaces or add words of thought may spoil it.
- ``agreement``, where it lists none: the log of (k + 1/2) / (n + 1), where k of n answers (`repeats`) hold the word as
  often as the run's answer did up to it. With n = 1 that is yes or no. Repeated answers are sampled at
  temperature 1 with seeds of their own, unless the run had a temperature.

Before anything is sent the whole call runs without a server, which counts its requests; one that the
budget cannot pay is refused. `estimate` gives the same numbers.

    print(estimate(box, run, method="occlusion", target="red"))
    relevance = ll.attribute(box, run, method="occlusion", target="red")

Sources: Petsiuk et al. 2018 (arXiv 1806.07421), which asks nothing of a model but its scores; the half counts are
those of Krichevsky & Trofimov 1981; the rules for what a list leaves out are ours.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llava_lab.attribution.method import Maps, Method
from llava_lab.attribution.registry import METHODS, compute_maps, refuse_unable
from llava_lab.checks import entry, known
from llava_lab.errors import BudgetError, EndpointError, OptionError, TargetError
from llava_lab.models.text import Spelt, cut
from llava_lab.remote.black_box import BlackBox, Estimate, Look, works
from llava_lab.remote.replies import Reply, token_id
from llava_lab.replay.alter import Done, InPicture, open_altered, within_budget
from llava_lab.replay.score import LOGPROB
from llava_lab.replay.targets import Targets, contrast, resolve_targets
from llava_lab.results import Run, Target, bare, spelling

logger = logging.getLogger(__name__)

SAME = 1.0  # of a token's log-probability, when the same picture is asked about in two ways
REPEATED = 1.0  # temperature of repeated answers; at 0 they would all be one


# -- what works on a closed model, and what it costs ------------------------------------------


@entry
def estimate(lab: BlackBox, run: Run, *, method: str = "occlusion", target: Any = None, **options: Any) -> Estimate:
    """What ``attribute(lab, run, method=..., target=..., **options)`` would ask of a closed model; nothing is sent.

    Requests are exact, retries apart; tokens and cost are what the run's own question used, so many times over.
    Raises OptionError as `attribute` does.

    >>> ll.estimate(lab, run)
    Traceback (most recent call last):
    llava_lab.errors.OptionError: an estimate is for closed models; a model of your own costs nothing but time
    """
    if not isinstance(lab, BlackBox):
        raise OptionError("an estimate is for closed models; a model of your own costs nothing but time")
    card = METHODS[known("method", method, METHODS)]
    refuse_unable(lab, card)
    chosen = card.with_defaults(options, beside=("method", "target"))
    targets = resolve_targets(lab, run, target)
    return _counted(lab, run, lambda session: card.compute(session, run, targets, chosen))


@refuse_unable.register(BlackBox)
def _(lab: BlackBox, method: Method) -> None:
    if method.reach != "pixels":
        raise OptionError(f"method {method.name!r} looks inside the model, which is closed; {works()}")


@compute_maps.register(BlackBox)
def _(lab: BlackBox, run: Run, targets: Targets, method: Method, options: Mapping[str, Any]) -> Maps:
    done = within_budget(lab, run, lambda session: method.compute(session, run, targets, options))
    return replace(done.result, notes=(*done.result.notes, *done.notes), extras={**done.result.extras, **done.extras})


@within_budget.register(BlackBox)
def _(lab: BlackBox, run: Run, work: Callable[[Any], Any]) -> Done[Any]:
    """`work`, first counted without a server, then done if the budget can pay for it."""
    lab.check(run)
    needed = _counted(lab, run, work)
    if needed.requests > needed.left:
        raise BudgetError(
            f"this needs {needed.requests} requests and {needed.left} of max_requests={lab.max_requests} are left; raise it, "
            "or take larger blocks, fewer masks, orders, samples, steps or seeds"
        )
    logger.info("%s: %s", lab.name, needed)
    session = Session(lab, run)
    result = work(session)
    extras = {"scoring": run.options["scoring"], "parted": session.parted, "unlisted": session.unlisted}
    return Done(result, session.notes(), {**extras, "requests_in_all": lab.endpoint.requests})


def _counted(lab: BlackBox, run: Run, work: Callable[[Any], Any]) -> Estimate:
    session = Session(lab, run, counting=True)
    work(session)
    answered = sum(session.needed.values())
    return lab.estimate(len(session.needed) - answered, answered, run)


@contrast.register(BlackBox)
def _(lab: BlackBox, run: Run, said: str, instead: str) -> Target:
    """`said` in the answer against `instead` at the same place; both must be one token there."""
    word = run.word(said)
    piece, spelt, instead = run.tokens[word.start], spelling(word.text), instead.strip()
    at = piece.find(spelt)
    if word.stop - word.start != 1 or at < 0 or not instead or bare(said) == bare(instead):
        raise TargetError(f"a closed model compares two words of one token each; {said!r} is not one here, explain it alone")
    instead = instead[:1].upper() + instead[1:] if spelt[:1].isupper() else instead
    other = token_id((piece[:at] + instead + piece[at + len(spelt) :]).encode())
    return Target("contrast", f"{spelt}, not {instead}", (word.start - 1,), (int(run.token_ids[word.start]),), (other,))


# -- altered pictures, asked about ------------------------------------------------------------


class Session:
    """Requests about one run's picture within one call. `counting` sends nothing and remembers what would be asked."""

    def __init__(self, lab: BlackBox, run: Run, *, counting: bool = False) -> None:
        self.lab, self.run, self.counting = lab, run, counting
        self.name, self.fingerprint = lab.name, lab.fingerprint
        self.needed: dict[str, bool] = {}  # key of a request -> answered before
        self.looked = self.parted = self.unlisted = 0

    def notes(self) -> tuple[str, ...]:
        """What the reader of these scores must see."""
        rows, cols = self.run.map.rows, self.run.map.cols
        notes = [f"{self.name} is a closed model: the {rows}x{cols} cells are ours and not its patches."]
        if self.run.options["scoring"] == "agreement":
            notes.append(
                "The server gives no log-probabilities: for each word, the log of (answers that hold it + 1/2) / (answers + 1), "
                f"with {self.lab.repeats} to each altered picture."
            )
            return tuple(notes)
        notes.append(
            "Log-probabilities are those the server lists when it answers anew; what it does not list counts as much as "
            f"it could at most, and nothing less than {self.lab.floor:g}."
        )
        if self.parted:
            notes.append(
                f"In {self.parted} of {self.looked} looks the new answer parted from the run's before a target's end; "
                f"its tokens from there have the floor, {self.lab.floor:g} each."
            )
        return tuple(notes)

    def scores(self, pictures: list[np.ndarray], shown: np.ndarray, targets: Targets) -> Float[Tensor, "B N"]:
        """Each target's score for each picture; `shown` (B, Y, X) says how much of it is the run's own."""
        looks = [look for picture in pictures for look in self._looks(picture, targets)]
        if self.counting:
            self.needed |= {key: key in self.lab.cache for key in map(self.lab.key, looks)}
            # pretended: the more is shown the likelier, so that every part of a method comes to its turn
            share = np.log(0.02 + 0.97 * shown.mean((1, 2), dtype=np.float64))
            return torch.from_numpy(share[:, None] * [len(target.token_ids) for target in targets]).float()
        replies = self.lab.replies(looks)
        each = len(replies) // len(pictures)
        rows = [
            score_replies(replies[i : i + each], self.run, targets, floor=self.lab.floor) for i in range(0, len(replies), each)
        ]
        self.looked += len(rows)
        self.parted += sum(any(score.parted for score in row) for row in rows)
        self.unlisted += sum(any(score.unlisted for score in row) for row in rows)
        if self.run.options["scoring"] == "prefill":
            for share, row in zip(shown, rows, strict=True):
                if share.min() == 1:
                    self._check_whole(row, targets)
        return torch.tensor([[score.value for score in row] for row in rows], dtype=torch.float32)

    def _looks(self, picture: np.ndarray, targets: Targets) -> list[Look]:
        """The run's question about another picture, in as many requests and as long answers as the targets need."""
        asked, start = self.run.options, self.run.segments["answer"][0]
        turns = tuple((question, answer) for question, answer in asked["turns"])
        look = Look(picture, turns, asked["max_new_tokens"], asked["temperature"], self.run.seed)
        places = places_of(self.run, targets)
        if asked["scoring"] == "top":
            return [replace(look, limit=places[-1] + 1)]
        if asked["scoring"] == "prefill":
            beginnings = ["".join(self.run.tokens[start : start + place]).lstrip() for place in places]
            return [replace(look, limit=1, begun=beginning) for beginning in beginnings]
        repeats = self.lab.repeats
        warm = asked["temperature"] or (REPEATED if repeats > 1 else 0.0)
        return [replace(look, temperature=warm, seed=self.run.seed + number) for number in range(repeats)]

    def _check_whole(self, row: list[Scored], targets: Targets) -> None:
        """A server that does not go on from a given beginning would give numbers about another answer."""
        for score, target in zip(row, targets, strict=True):
            own = float(self.run.logprobs[places_of(self.run, (target,))].clip(self.lab.floor).sum())
            differs = score.unlisted or abs(score.value - own) > SAME * len(target.token_ids)
            if differs and not target.against_ids:
                raise EndpointError(
                    f"{self.name!r} finds {target.text!r} at {score.value:.2f} when given the answer's beginning and at "
                    f"{own:.2f} when answering; it does not go on from a beginning, use scoring='top'"
                )


class Asked(InPicture):
    """The picture is altered as it is sent, and what is answered to it is scored."""

    KIND = "is a closed model"

    def __init__(self, session: Session, run: Run, targets: Targets, **options: Any) -> None:
        # what a server lists is rounded, often to certainty, where log-odds have no end
        super().__init__(session.name, run, session.lab.shrunk(run.picture), targets, **{**options, "score": LOGPROB})
        self.session = session

    def _score(self, shown: Float[Tensor, "B Y X"], fill: str) -> Float[Tensor, "B N"]:
        shares = shown.cpu().numpy()
        return self.session.scores([self.altered(share, fill) for share in shares], shares, self.targets)


@open_altered.register(Session)
def _(lab: Session, run: Run, targets: Targets, **options: Any) -> Asked:
    return Asked(lab, run, targets, **options)


@open_altered.register(BlackBox)
def _(lab: BlackBox, run: Run, targets: Targets, **options: Any) -> Asked:
    lab.check(run)
    return Asked(Session(lab, run), run, targets, **options)


# -- answers as scores ------------------------------------------------------------------------


class Scored(NamedTuple):
    """A target's score (natural log), and what to know of it."""

    value: float
    parted: bool = False  # the new answer took another way before the target's end
    unlisted: bool = False  # a token was not in the server's list


def score_replies(replies: Sequence[Reply], run: Run, targets: Targets, *, floor: float) -> list[Scored]:
    """Each target's score by what was answered to one picture.

    One reply for ``top``, one for each of `places_of` for ``prefill``, as many as there are for ``agreement``.
    """
    scoring = run.options["scoring"]
    if scoring == "agreement":
        return [Scored(_agreement(replies, run, target)) for target in targets]
    start, stop = run.segments["answer"]
    own = [int(token) for token in run.token_ids[start:stop]]
    # a reply that goes on from the run's own words has the token first
    after = dict(zip(places_of(run, targets), replies, strict=True)) if scoring == "prefill" else {}

    def listed(position: int, token: int) -> Scored:
        place = position + 1 - start
        return _listed(after[place], [], 0, token, floor) if after else _listed(replies[0], own, place, token, floor)

    scores = []
    for target in targets:
        said = [listed(*pair) for pair in zip(target.positions, target.token_ids, strict=True)]
        against = [listed(*pair) for pair in zip(target.positions, target.against_ids, strict=False)]
        value = sum(score.value for score in said) - sum(score.value for score in against)
        both = [*said, *against]
        scores.append(Scored(value, any(score.parted for score in both), any(score.unlisted for score in both)))
    return scores


def places_of(run: Run, targets: Targets) -> list[int]:
    """The places in the answer, from 0, of every token of some target, in order."""
    first = run.segments["answer"][0] - 1
    return sorted({position - first for target in targets for position in target.positions})


def _listed(reply: Reply, own: list[int], at: int, token: int, floor: float) -> Scored:
    """The log-probability of `token` at place `at` of the answer, if the answer before it is the run's."""
    tokens = reply.tokens or ()
    if at >= len(tokens) or [token_id(before.piece) for before in tokens[:at]] != own[:at]:
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
    answers = [_words(reply.text) for reply in replies]

    def log_share(word: str, times: int) -> float:
        """The log of the share of answers that hold `word` at least `times` times, half a count added to either side."""
        holding = sum(answer.count(bare(word)) >= times for answer in answers)
        return math.log((holding + 0.5) / (len(answers) + 1))

    if target.against_ids:
        said, _, instead = target.text.rpartition(", not ")
        return log_share(said, 1) - log_share(instead, 1)
    first, last = target.positions[0] + 1, target.positions[-1] + 2
    inside = [i for i, word in enumerate(run.words) if word.start < last and word.stop > first]
    spoken = [i for i in inside if any(letter.isalnum() for letter in run.words[i].text)] or inside
    every = [bare(word.text) for word in run.words]
    return sum(log_share(every[i], every[: i + 1].count(every[i])) for i in spoken)


def _words(text: str) -> list[str]:
    """A text's words without case and marks."""
    pieces = cut(text)
    return [bare(word.text) for word in Spelt(dict(enumerate(pieces))).words(range(len(pieces)), 0)]
