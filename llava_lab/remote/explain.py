"""How likely a closed model finds the run's words, read from what it answers to another picture.

Two rules, chosen by what the run itself came with; `llava_lab.remote.explain` says what they mean and
where they fail. Nothing here asks a server.

Closed models explained from outside: alter the picture, ask again, read the answer.

Occlusion, RISE, Shapley values and faithfulness run here as they do on a `Lab`; only two things are another.
What they alter is the picture as it is sent (`Asked`, an `Altered`), and what they read is
one of these scores, per token or word and summed over the target:

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
from llava_lab.errors import BudgetError, EndpointError, OptionError
from llava_lab.models.text import Spelt, cut
from llava_lab.remote.black_box import WORKS, BlackBox, Estimate, Look, works
from llava_lab.remote.client import Reply, token_id
from llava_lab.replay.alter import Done, InPicture, open_altered, within_budget
from llava_lab.replay.targets import Targets, contrast, resolve_targets
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


logger = logging.getLogger(__name__)

SAME = 1.0  # of a token's log-probability, when the same picture is asked about in two ways
REPEATED = 1.0  # temperature of repeated answers; at 0 they would all be one


class Session:
    """Requests about one run's picture. `counting` sends nothing and remembers what would be asked."""

    def __init__(self, lab: BlackBox, run: Run, *, counting: bool = False) -> None:
        self.lab, self.run, self.counting = lab, run, counting
        self.name, self.fingerprint = lab.name, lab.fingerprint
        self.wanted: dict[str, bool] = {}  # key of a request -> known before
        self.looked = self.parted = self.unlisted = 0

    def notes(self) -> tuple[str, ...]:
        """What the reader of these scores must see."""
        rows, cols = self.run.map.rows, self.run.map.cols
        found = [f"{self.name} is a closed model: the {rows}x{cols} cells are ours and not its patches."]
        if self.run.options["scoring"] == "agreement":
            return (
                *found,
                f"The server gives no log-probabilities: for each word, the log of (answers that hold it + 1/2) / (answers + 1), "
                f"with {self.lab.repeats} to each altered picture.",
            )
        found.append(
            "Log-probabilities are those the server lists when it answers anew; what it does not list counts as much as "
            f"it could at most, and nothing less than {self.lab.floor:g}."
        )
        if self.parted:
            found.append(
                f"In {self.parted} of {self.looked} looks the new answer parted from the run's before a target's end; "
                f"its tokens from there have the floor, {self.lab.floor:g} each."
            )
        return tuple(found)

    def scores(self, pictures: list[np.ndarray], shown: np.ndarray, targets: Targets) -> Float[Tensor, "B N"]:
        """Each target's score for each picture; `shown` (B, Y, X) says how much of it is the run's own."""
        looks = [look for picture in pictures for look in self._asked(picture, targets)]
        if self.counting:
            self.wanted |= {key: key in self.lab.cache for key in (self.lab.key(look) for look in looks)}
            return _pretended(shown, targets)
        replies = self.lab.replies(looks)
        each = len(replies) // len(shown)
        found = [self._scored(replies[i : i + each], targets) for i in range(0, len(replies), each)]
        self.looked += len(found)
        self.parted += sum(any(one.parted for one in row) for row in found)
        self.unlisted += sum(any(one.unlisted for one in row) for row in found)
        self._check_whole(shown, found, targets)
        return torch.tensor([[one.value for one in row] for row in found], dtype=torch.float32)

    def _scored(self, replies: list[Reply], targets: Targets) -> list[Scored]:
        if self.run.options["scoring"] != "prefill":
            return [score_replies(replies, self.run, target, floor=self.lab.floor) for target in targets]
        known = dict(zip(places_of(self.run, targets), replies, strict=True))
        own = [[known[place] for place in places_of(self.run, (target,))] for target in targets]
        return [score_replies(part, self.run, one, floor=self.lab.floor) for part, one in zip(own, targets, strict=True)]

    def _asked(self, picture: np.ndarray, targets: Targets) -> list[Look]:
        """The run's question about another picture, in as many requests and as long answers as the targets need."""
        asked, start = self.run.options, self.run.segments["answer"][0]
        turns = tuple((turn[0], turn[1]) for turn in asked["turns"])
        one = Look(picture, turns, asked["max_new_tokens"], asked["temperature"], self.run.seed)
        places = places_of(self.run, targets)
        if asked["scoring"] == "top":
            return [replace(one, limit=places[-1] + 1)]
        if asked["scoring"] == "prefill":
            begun = ["".join(self.run.tokens[start : start + place]).lstrip() for place in places]
            return [replace(one, limit=1, begun=beginning) for beginning in begun]
        repeats = self.lab.repeats
        warm = asked["temperature"] or (REPEATED if repeats > 1 else 0.0)
        return [replace(one, temperature=warm, seed=self.run.seed + number) for number in range(repeats)]

    def _check_whole(self, shown: np.ndarray, found: list[list[Scored]], targets: Targets) -> None:
        """A server that does not go on from a given beginning would give numbers about another answer."""
        if self.run.options["scoring"] != "prefill":
            return
        for row in (row for veil, row in zip(shown, found, strict=True) if veil.min() == 1):
            for one, target in zip(row, targets, strict=True):
                said = float(self.run.logprobs[places_of(self.run, (target,))].clip(self.lab.floor).sum())
                other = one.unlisted or abs(one.value - said) > SAME * len(target.token_ids)
                if other and not target.against_ids:
                    raise EndpointError(
                        f"{self.name!r} finds {target.text!r} at {one.value:.2f} when given the answer's beginning and at "
                        f"{said:.2f} when answering; it does not go on from a beginning, use scoring='top'"
                    )


@refuse_unable.register(BlackBox)
def _(lab: BlackBox, method: Method) -> None:
    refuse_inside(method.name)


@compute_maps.register(BlackBox)
def _(lab: BlackBox, run: Run, targets: Targets, method: Method, options: Mapping[str, Any]) -> Maps:
    done = within_budget(lab, run, lambda session: method.compute(session, run, targets, options))
    return replace(done.result, notes=(*done.result.notes, *done.notes), extras={**done.result.extras, **done.extras})


class Asked(InPicture):
    """The picture is altered as it is sent, and what is answered to it is scored."""

    KIND = "is a closed model"

    def __init__(self, session: Session, run: Run, targets: Targets, **options: Any) -> None:
        super().__init__(session.name, run, session.lab.shrunk(run.picture), targets, **options)
        self.session = session

    def _score(self, shown: Float[Tensor, "B Y X"], fill: str) -> Float[Tensor, "B N"]:
        shares = shown.cpu().numpy()
        return self.session.scores([self.altered(one, fill) for one in shares], shares, self.targets)


@open_altered.register(Session)
def _(lab: Session, run: Run, targets: Targets, **options: Any) -> Asked:
    return Asked(lab, run, targets, **options)


@open_altered.register(BlackBox)
def _(lab: BlackBox, run: Run, targets: Targets, **options: Any) -> Asked:
    lab.check(run)
    return Asked(Session(lab, run), run, targets, **options)


@contrast.register(BlackBox)
def _(lab: BlackBox, run: Run, said: str, instead: str) -> Target:
    return lab.contrast(run, said, instead)


@contrast.register(Session)
def _(lab: Session, run: Run, said: str, instead: str) -> Target:
    return lab.lab.contrast(run, said, instead)


@within_budget.register(BlackBox)
def _(lab: BlackBox, run: Run, work: Callable[[Any], Any]) -> Done[Any]:
    """`work`, first counted without a server, then done if the budget can pay for it."""
    lab.check(run)
    wanted = _counted(lab, run, work)
    if wanted.requests > wanted.left:
        raise BudgetError(
            f"this needs {wanted.requests} requests and {wanted.left} of max_requests={lab.max_requests} are left; raise it, "
            "or take larger blocks, fewer masks, orders, samples, steps or seeds"
        )
    logger.info("%s: %s", lab.name, wanted)
    session = Session(lab, run)
    result = work(session)
    extras = {"scoring": run.options["scoring"], "parted": session.parted, "unlisted": session.unlisted}
    return Done(result, session.notes(), {**extras, "requests_in_all": lab.endpoint.requests})


def estimate(lab: BlackBox, run: Run, *, method: str = "occlusion", target: Any = None, **options: Any) -> Estimate:
    """What ``attribute(lab, run, method=..., target=..., **options)`` would ask of a closed model; nothing is sent.

    Requests are exact, retries apart; tokens and cost are what the run's own question used, so many times over.
    Raises OptionError as `attribute` does.
    """
    if not isinstance(lab, BlackBox):
        raise OptionError("an estimate is for closed models; a model of your own costs nothing but time")
    refuse_inside(method)
    chosen = METHODS[method].with_defaults(options)
    targets = resolve_targets(lab, run, target)
    return _counted(lab, run, lambda model: METHODS[method].compute(model, run, targets, chosen))


def refuse_inside(method: str) -> None:
    if method not in WORKS:
        raise OptionError(f"method {method!r} looks inside the model, which is closed; {works()}")


def _counted(lab: BlackBox, run: Run, work: Callable[[Any], Any]) -> Estimate:
    session = Session(lab, run, counting=True)
    work(session)
    known = sum(session.wanted.values())
    return lab.estimate(len(session.wanted) - known, known, run)


def _pretended(shown: np.ndarray, targets: tuple[Target, ...]) -> Tensor:
    """Scores without a server: the more is shown the likelier, so that every part of a method comes to its turn."""
    share = np.log(0.02 + 0.97 * shown.mean((1, 2), dtype=np.float64))
    return torch.from_numpy(share[:, None] * [len(target.token_ids) for target in targets]).float()
