"""Every attribution method under one name and one signature.

A method registers itself (`attribution.method`). To add one, write its function in the file of its family; a new file
needs its import here, and a place in `FAMILIES`.

    relevance = attribute(lab, run, method="occlusion", target="red")

`attribute` explains any run, also a loaded one, with one more forward of the finished sequence. Where the map is wanted anyway,
`ask_and_attribute` takes it while the answer is made, from the forwards that make it, with no pass of its own. The numbers are
the same; what they cost is measured by ``llava-lab bench capture``. A method can be made this way where its card has
`Method.streams`. `attention` needs the rows of the answer alone. `rollout` keeps the prompt's rows too, and when the answer is
there it goes through them from the last layer to the first with one row for each token (`rolled_back`): ``S x S`` for a row and
layer, where `rollout.Flow`, which goes upwards with the layers, multiplies whole matrices, ``S x S x S``. For long prompts the
rows are kept in half precision (`AnswerRows`).

    run, relevance = ask_and_attribute(lab, "photo.jpg", "What color is the car?", target="words")
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import singledispatch
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llava_lab.attribution import attention, controls, gradients, heads, logits, max_flow, occlusion, relevancy, rollout, shapley
from llava_lab.attribution.attention import attention_notes
from llava_lab.attribution.heads import choose_heads
from llava_lab.attribution.method import REGISTERED, Maps, Method
from llava_lab.attribution.rollout import FLOOR, TowerRollout, Weight, as_column, rollout_notes
from llava_lab.capture import AnswerRows, watch_attention
from llava_lab.capture.watch import MEND
from llava_lab.checks import as_python, entry, is_list, known, layer_window, made_by, same_model
from llava_lab.errors import LabError, OptionError
from llava_lab.models import Lab, connectors
from llava_lab.models.layout import language_layers
from llava_lab.models.pictures import Shown
from llava_lab.options import by_our_names
from llava_lab.replay.targets import Targets, Wanted, image_values, resolve_targets, segment_mass, target_rows
from llava_lab.results import Relevance, Run

FAMILIES = (rollout, attention, heads, max_flow, occlusion, shapley, gradients, relevancy, logits, controls)
UNPLACED = (
    "The connector's tokens have no place in the picture: where something was hidden in the pixels the map is a place, "
    "otherwise its cells are numbers of tokens."
)

# The order in which they are listed: the default first, controls last.
PLACE = {family.__name__: place for place, family in enumerate(FAMILIES)}
for card in sorted(REGISTERED.values(), key=lambda card: (card.control, PLACE.get(card.function.__module__, len(PLACE)))):
    REGISTERED[card.name] = REGISTERED.pop(card.name)
METHODS: Mapping[str, Method] = MappingProxyType(REGISTERED)


@entry
def attribute(lab: Any, run: Run, *, method: str = "rollout", target: Wanted = None, **options: Any) -> Relevance:
    """Which patches of the picture the answer came from, as `method` understands it.

    `target`: None or ``"answer"`` the whole answer, ``"words"`` a map per word, an int an answer token,
    a str a word, ``("red", "blue")`` the contrast of two words, a list several of these. Several targets
    share the passes. The options of each method, with defaults, are in ``METHODS[method].options``. On a closed
    model (`BlackBox`) the methods that need only answers work, within its budget of requests.

    Of a question about several pictures it is the map of the first (see `Run.about`); `view_values` holds one for each.

    Raises OptionError (unknown method or option, a question without a picture), TargetError (not in the answer),
    CheckpointError (the run was made by another checkpoint).

    >>> relevance = ll.attribute(lab, run, method="attention", target="words")
    >>> relevance.values.shape == (len(run.words), 12, 12)
    True
    """
    card = METHODS[known("method", method, METHODS)]
    refuse_unable(lab, card)
    chosen = card.with_defaults(options, beside=("method", "target"))
    same_model(lab, run)
    targets = resolve_targets(lab, run, target)
    start = time.perf_counter()
    maps = compute_maps(lab, run, targets, card, chosen)
    notes = (*maps.notes, in_views(run, bool(maps.views))) if run.views else maps.notes
    return result_of(replace(maps, notes=notes), card, chosen, run, targets, **made_by(lab, start))


@singledispatch
def refuse_unable(lab: Any, method: Method) -> None:
    """Raise OptionError where `method` cannot work on `lab`. Another kind of lab registers its own reasons."""
    method.refuse(lab, ())


@singledispatch
def compute_maps(lab: Any, run: Run, targets: Targets, method: Method, options: Mapping[str, Any]) -> Maps:
    """The maps that `method` makes of `run`. Another kind of lab registers its own way."""
    if run.others and method.reach == "inside":
        able = ", ".join(works_at("tokens"))
        raise OptionError(f"method {method.name!r} explains a question about one picture; with several work {able}")
    maps = method.compute(lab, run, targets, options)
    if run.others and not maps.views:
        maps = _each_picture(maps, lab, run, targets, method, options)
    return maps if connectors.placed(lab.model.config) else replace(maps, notes=(*maps.notes, UNPLACED))


def _each_picture(maps: Maps, lab: Any, run: Run, targets: Targets, method: Method, options: Mapping[str, Any]) -> Maps:
    """A method that alters one picture, made of each: `maps` is the first's. Where Ctrl-C ended it, what is left out is 0."""
    every = [maps]
    for number in range(1, len(run.views)):
        if every[-1].interrupted:
            where = run.views[number].map
            every.append(replace(maps, values=np.zeros((len(targets), where.rows, where.cols)), passes={}, interrupted=True))
        else:
            picture = sum(view.start < run.views[number].start for view in run.views)
            every.append(method.compute(lab, run.about(picture), targets, options))
    passes = {kind: sum(one.passes.get(kind, 0) for one in every) for kind in maps.passes}
    views = tuple(one.values for one in every)
    return replace(maps, passes=passes, views=views, interrupted=any(one.interrupted for one in every))


def result_of(maps: Maps, method: Method, options: Mapping[str, Any], run: Run, targets: Targets, **made: Any) -> Relevance:
    """What a method gave, as the result that is kept; `made` is `made_by`'s."""
    if count := int((~np.isfinite(maps.values)).sum()):
        raise LabError(
            f"expected finite values of method {method.name!r}, got NaN or infinity in {count} of {maps.values.size}; {MEND}"
        )
    if "score" in options and "unit" in maps.extras:
        options = {**options, "score": maps.extras["unit"]}  # a closed model has but one
    relevance = Relevance(
        values=maps.values.astype(np.float32),
        targets=targets,
        method=method.name,
        options={name: _plain(value) for name, value in options.items()},
        map=run.map,
        **made,
        passes={"forward": 0, "backward": 0, **maps.passes},
        notes=maps.notes,
        extras=maps.extras,
        views=run.views if maps.views else (),
        view_values=tuple(values.astype(np.float32) for values in maps.views),
        control=method.control,
        interrupted=maps.interrupted,
    )
    return relevance.with_notes(*relevance.noise_notes())


def works_at(reach: str) -> tuple[str, ...]:
    """Names of the methods that work on closed models (``"pixels"``), or on tiles and several pictures (``"tokens"``)."""
    enough = ("pixels",) if reach == "pixels" else ("pixels", "tokens")
    return tuple(name for name, card in METHODS.items() if card.reach in enough)


def in_views(run: Run, apart: bool) -> str:
    """What to know of a map where the model looked at the picture several times, or at several pictures."""
    names = " and ".join(view.name for view in run.views)
    if run.others:
        return f"The question is about {names}: this is the map of {run.views[0].name}, `views` and `view_values` hold each."
    if apart:
        return f"The picture was seen as {names}: this is the {run.views[0].name}'s map, `views` and `view_values` hold each."
    return f"The picture was seen as {names}: cells were altered in the picture itself, so in both at once."


def _plain(value: Any) -> Any:
    """Tuples, ranges and arrays as lists, numbers as Python's own, also inside: what a saved result gives back."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if is_list(value) else as_python(value)


# -- maps from the forwards that make the answer ------------------------------------------

ASKING = {name: name for name in inspect.signature(Lab.ask).parameters if name not in ("self", "picture", "question")}
LATER = "made by ll.attribute(lab, run, ...) after the answer"


@entry
def ask_and_attribute(
    lab: Lab,
    picture: Shown,
    question: str,
    *,
    method: str = "rollout",
    target: Wanted = "words",
    options: Mapping[str, Any] | None = None,
    **asking: Any,
) -> tuple[Run, Relevance]:
    """Ask as `Lab.ask` does (`asking` are its options), and explain the answer from the forwards that made it.

    `method`: ``rollout`` or ``attention``, with its own `options`. `target` as in `attribute`. Interrupted, it gives
    the answer so far with its maps.

    Raises OptionError (a method or option that needs the finished answer), TargetError, LabError.

    >>> run, relevance = ll.ask_and_attribute(lab, picture, "What is it?", target="answer", max_new_tokens=2)
    >>> relevance.values.shape
    (1, 12, 12)
    """
    card = METHODS[known("method", method, METHODS)]
    if card.streams is None:
        streaming = ", ".join(sorted(name for name, other in METHODS.items() if other.streams is not None))
        raise OptionError(f"while answering, method must be one of {streaming}, got {method!r}; its map is {LATER}")
    chosen = card.with_defaults(options or {})
    asking = by_our_names("Lab.ask", asking, ASKING, beside=("method", "target", "options"))
    for name, value in card.streams.items():
        if chosen[name] != value:
            raise OptionError(f"while answering, {name} must be {value!r}, got {chosen[name]!r}; that map is {LATER}")
    if picture is None or isinstance(picture, list | tuple):
        held = "several pictures" if picture else "no picture"
        raise OptionError(f"while answering, a question has one picture, got {held}; a map of several is {LATER}")
    forms = {name: asking[name] for name in ("prompt", "history") if name in asking}
    sequence = lab.sequence(question, **forms)
    watching = WATCHING[method](lab, chosen, len(sequence.token_ids))
    with watch_attention(watching.layers, watching.reducer, calls=None):
        run = lab.ask(picture, question, **asking)
    start = time.perf_counter()
    count = len(run.answer_positions)
    if not count and run.options["stopped"] == "interrupted":
        raise KeyboardInterrupt
    if watching.reducer.count(len(watching.layers)) < count:
        raise LabError(f"expected every layer to attend {count} times, got fewer; its map is {LATER}")
    targets = resolve_targets(lab, run, target)
    card.refuse(lab, targets)
    maps = watching.maps(run, targets, count)
    maps = replace(maps, notes=(*maps.notes, "Taken while the answer was made; the seconds are those after it."))
    return run, result_of(maps, card, chosen, run, targets, **made_by(lab, start))


class WatchedAttention:
    """`attention`, from the rows of the answer alone."""

    def __init__(self, lab: Lab, options: dict[str, Any], prompt: int) -> None:
        self._chosen = choose_heads(lab, options["layers"], None)
        self._fusion = options["fusion"]
        decoder = language_layers(lab.model)
        self.layers = [decoder[layer] for layer in self._chosen.layers]
        self.reducer = AnswerRows(prompt, fusion=self._fusion)

    def maps(self, run: Run, targets: Targets, count: int) -> Maps:
        at = range(self.reducer.first, self.reducer.first + count)
        kept = torch.cat([self.reducer.picked(i, count) for i in range(len(self.layers))], 1)
        parts = target_rows(kept, at, targets).unflatten(1, (len(self.layers), -1)).transpose(0, 1)
        rows = torch.nn.functional.pad(parts.mean(0), (0, 1))  # the last token attends after everything was said
        shares = parts[..., slice(*run.segments["image"])].sum(-1)
        extras = {
            "mass": segment_mass(rows, run),
            "image_share": shares.mean(0).tolist(),
            "image_share_by_layer": shares.tolist(),
        }
        return Maps(image_values(rows, run), {}, attention_notes(self._chosen, self._fusion), extras)


class WatchedRollout:
    """`rollout`, from the rows of the prompt and of the answer."""

    def __init__(self, lab: Lab, options: dict[str, Any], prompt: int) -> None:
        if options["fusion"] == "min":
            raise OptionError(f"while answering, fusion must be mean or max, got 'min'; that map is {LATER}")
        decoder = language_layers(lab.model)
        self._window = slice(*layer_window(options["layers"], len(decoder)))
        self.layers = decoder[self._window]
        self._null = options["null"] == "causal"
        self._tower = TowerRollout(causal=True, residual=options["residual"], null=self._null, fusion=options["fusion"])
        measured = options["residual"] == "measured"
        self.reducer = AnswerRows(prompt, fusion=options["fusion"], whole=True, norms=measured)

    def maps(self, run: Run, targets: Targets, count: int) -> Maps:
        first = self.reducer.first
        weights = [
            self._tower.weight(self.reducer.row_norms(layer, count) if self.reducer.norms else None)
            for layer in range(len(self.layers))
        ]
        rows = rolled_back(self.reducer, weights, count)
        at = range(first, first + count)
        seen = torch.nn.functional.pad(target_rows(rows, at, targets), (0, 1))  # nothing reads the last token
        values = seen
        extras: dict[str, Any] = {"mass": segment_mass(seen, run), "residual_by_layer": self._tower.kept}
        if self._null:
            even = uniform_back(torch.eye(first + count, device=rows.device)[first:], weights)
            null = torch.nn.functional.pad(target_rows(even, at, targets), (0, 1))
            extras["null_mass"] = segment_mass(null, run)
            values = torch.log((seen + FLOOR) / (null + FLOOR))
        return Maps(image_values(values, run), {}, rollout_notes(self._window, self._tower, extras), extras)


WATCHING: Mapping[str, Any] = {"attention": WatchedAttention, "rollout": WatchedRollout}


def rolled_back(kept: AnswerRows, weights: Sequence[Weight], count: int) -> Float[Tensor, "N K"]:
    """Rollout of the prompt's last position and of the `count` - 1 after it: their rows of ``A~_L ... A~_1``.

    ``A~ = (1 - weight) A + weight I`` with each layer's own weight; K is the prompt and the `count` - 1 tokens.
    """
    prompt = kept.first + 1
    seen: Tensor | None = None
    for layer, weight in reversed(list(enumerate(weights))):
        answer = kept.picked(layer, count)
        if seen is None:
            seen = torch.eye(answer.shape[1], device=answer.device)[kept.first :]
        keep = as_column(weight, seen[0]).T
        mixed = seen * (1 - keep)
        seen = seen * keep
        seen += mixed[:, prompt:] @ answer[1:]
        for rows, part in kept.prompt(layer):
            seen[:, : part.shape[1]].addmm_(mixed[:, rows], part)
    assert seen is not None
    return seen


def uniform_back(rows: Float[Tensor, "N K"], weights: Sequence[Weight]) -> Float[Tensor, "N K"]:
    """The same under uniform causal attention, from the identity's rows."""
    count = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    for weight in reversed(weights):
        keep = as_column(weight, rows[0]).T
        mixed = rows * (1 - keep) / count
        rows = rows * keep + mixed.flip(1).cumsum(1).flip(1)
    return rows
