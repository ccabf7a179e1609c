"""Ask and explain in one go: maps taken from the forwards that make the answer, no pass of their own.

`attribute` explains any run, also a loaded one, with one more forward of the finished sequence. Where the map is
wanted anyway, `ask_and_attribute` takes it while the answer is made. The numbers are the same; what they cost is
measured by ``llava-lab bench capture``. A method can be made this way where its card has `Method.streams`.

`attention` needs the rows of the answer alone. `rollout` keeps the prompt's rows too, and when the answer is there it goes
through them from the last layer to the first with one row for each token (`rolled_back`): ``S x S`` for a row and layer, where
`rollout.Flow`, which goes upwards with the layers, multiplies whole matrices, ``S x S x S``. For long prompts the rows are
kept in half precision (`AnswerRows`).

    run, relevance = ask_and_attribute(lab, "photo.jpg", "What color is the car?", target="words")
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lab.attribution.attention import attention_notes
from llava_lab.attribution.heads import choose_heads
from llava_lab.attribution.method import Maps
from llava_lab.attribution.registry import METHODS, result_of
from llava_lab.attribution.rollout import FLOOR, TowerRollout, Weight, as_column, rollout_notes
from llava_lab.capture import AnswerRows, watch_attention
from llava_lab.checks import entry, known, layer_window
from llava_lab.errors import LabError, OptionError
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers
from llava_lab.models.pictures import Shown
from llava_lab.replay.targets import Targets, Wanted, image_values, resolve_targets, segment_mass, target_rows
from llava_lab.results import Relevance, Run

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
    seconds = time.perf_counter() - start
    return run, result_of(maps, card, chosen, run, targets, model=lab.name, weights=run.fingerprint, seconds=seconds)


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
        for rows, attention in kept.prompt(layer):
            seen[:, : attention.shape[1]].addmm_(mixed[:, rows], attention)
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
