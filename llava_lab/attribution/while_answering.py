"""A picture, a question, and back come the answer and its maps, made while the answer was: no pass of their own.

`attribute` explains any run, also a loaded one, with one more forward of the finished sequence. Where the map is
wanted anyway, `ask_and_attribute` takes it from the forwards that make the answer. The numbers are the same; what
they cost is measured by ``llava-lab bench capture``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llava_lab.attribution.attention import ATTENTION
from llava_lab.attribution.base import (
    Maps,
    Targets,
    choose,
    image_values,
    layer_window,
    refuse_contrast,
    segment_mass,
    target_rows,
)
from llava_lab.attribution.flow import Weight
from llava_lab.attribution.heads import choose_heads
from llava_lab.attribution.registry import METHODS, _plain
from llava_lab.attribution.rollout import FLOOR, ROLLOUT, _notes, _residual, _Rollout, measured_residual
from llava_lab.attribution.streamed import StreamedRollout
from llava_lab.attribution.targets import Wanted, resolve_targets
from llava_lab.capture import FUSIONS, AnswerRows, Norms, watch_attention
from llava_lab.errors import LabError, OptionError
from llava_lab.models.layout import language_layers
from llava_lab.results import Relevance, Run

if TYPE_CHECKING:
    from llava_lab.models import Lab
    from llava_lab.models.pictures import PictureLike

LATER = "made by ll.attribute(lab, run, ...) after the answer"
NEVER: Mapping[str, Mapping[str, Any]] = MappingProxyType(  # options that need the finished sequence, at the value they keep
    {ATTENTION.name: {"heads": None}, ROLLOUT.name: {"sinks": "keep", "through_vision": False}}
)


def ask_and_attribute(
    lab: Lab,
    picture: PictureLike,
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
    """
    if method not in NEVER:
        known = METHODS if method not in METHODS else ()
        raise OptionError(
            f"no method {method!r}; the methods are {', '.join(known)}" if known else
            f"while answering, method must be one of {', '.join(NEVER)}, got {method!r}; its map is {LATER}"
        )  # fmt: skip
    chosen = METHODS[method].with_defaults(options or {})
    for name, value in NEVER[method].items():
        if chosen[name] != value:
            raise OptionError(f"while answering, {name} must be {value!r}, got {chosen[name]!r}; that map is {LATER}")
    forms = {name: asking[name] for name in ("prompt", "history") if name in asking}
    sequence = lab.sequence(question, **forms)
    watching: _Attention | _Streamed
    watching = (_Attention if method == ATTENTION.name else _Streamed)(lab, chosen, len(sequence.token_ids), sequence.segments)
    with watch_attention(watching.layers, watching.reducer, calls=None):
        run = lab.ask(picture, question, **asking)
    start = time.perf_counter()
    said = len(run.answer_positions)
    if not said and run.options["stopped"] == "interrupted":
        raise KeyboardInterrupt
    if watching.reducer.count(len(watching.layers)) < said:
        raise LabError(f"expected every layer to attend {said} times, got fewer; its map is {LATER}")
    targets = resolve_targets(lab, run, target)
    maps = watching.maps(run, targets, said)
    assert np.isfinite(maps.values).all(), f"{method} gave values that are not finite"
    return run, Relevance(
        values=maps.values.astype(np.float32),
        targets=targets,
        method=method,
        options={name: _plain(value) for name, value in chosen.items()},
        map=run.map,
        model=lab.name,
        fingerprint=run.fingerprint,
        seconds=time.perf_counter() - start,
        passes={"forward": 0, "backward": 0},
        notes=(*maps.notes, "Taken while the answer was made; the seconds are those after it."),
        extras=maps.extras,
    )


class _Attention:
    """`attention`, from the rows of the answer alone."""

    def __init__(self, lab: Lab, options: dict[str, Any], prompt: int, segments: Mapping[str, Any]) -> None:
        self._chosen = choose_heads(lab, options["layers"], None)
        self._fusion = choose("fusion", options["fusion"], FUSIONS)
        decoder = language_layers(lab.model)
        self.layers = [decoder[layer] for layer in self._chosen.layers]
        self.reducer = AnswerRows(prompt, fusion=self._fusion)

    def maps(self, run: Run, targets: Targets, said: int) -> Maps:
        refuse_contrast(ATTENTION.name, targets)
        at = range(self.reducer.first, self.reducer.first + said)
        parts = torch.stack([target_rows(self.reducer.picked(i, said), at, targets) for i in range(len(self.layers))])
        rows = torch.nn.functional.pad(parts.mean(0), (0, 1))  # the last token attends after all was said
        shares = parts[..., slice(*run.segments["image"])].sum(-1)
        extras = {
            "mass": segment_mass(rows, run),
            "image_share": shares.mean(0).tolist(),
            "image_share_by_layer": shares.tolist(),
        }
        which = f"{self._fusion} over {self._chosen.which}, mean over {self._chosen.window}"
        return Maps(image_values(rows, run), {}, (f"Attention of the predicting positions, {which}.",), extras)


class _Streamed:
    """`rollout`, its prompt's part folded while the prompt is read."""

    def __init__(self, lab: Lab, options: dict[str, Any], prompt: int, segments: Mapping[str, Any]) -> None:
        decoder = language_layers(lab.model)
        self._window = layer_window(options["layers"], len(decoder))
        self.layers = decoder[slice(*self._window)]
        self._options = options
        null = choose("null", options["null"], ("none", "causal")) == "causal"
        fusion = choose("fusion", options["fusion"], FUSIONS)
        self._about = _Rollout(True, _residual(options["residual"]), null, fusion)
        if fusion == "min":
            raise OptionError(f"while answering, fusion must be mean or max, got 'min'; that map is {LATER}")
        self._stream = StreamedRollout(prompt, segments, null=null, device=lab.device)
        self.reducer = AnswerRows(prompt, fusion=fusion, fold=self._fold, norms=self._about.residual is None)

    def maps(self, run: Run, targets: Targets, said: int) -> Maps:
        refuse_contrast(ROLLOUT.name, targets)
        rows, even = self._stream.rows(
            said, lambda layer: self.reducer.picked(layer, said), lambda layer: self._weight(layer, said)
        )
        at = range(self.reducer.first, self.reducer.first + said)
        seen = target_rows(rows, at, targets)
        values: Tensor = self._stream.image(seen)
        extras: dict[str, Any] = {"mass": self._stream.mass(seen), "residual_by_layer": self._about.kept}
        if even is not None:
            null = target_rows(even, at, targets)
            extras["null_mass"] = self._stream.mass(null)
            values = torch.log((values + FLOOR) / (self._stream.image(null) + FLOOR))
        grid = values.cpu().numpy().reshape(len(targets), run.map.rows, run.map.cols)
        return Maps(grid, {}, _notes(self._options, self._window, self._about, [], None), extras)

    def _fold(self, layer: int, attention: Tensor, norms: Norms | None) -> None:
        weight = self._about.residual if norms is None else measured_residual(norms)[0]
        assert weight is not None
        self._about.kept.append(float(weight.mean()) if isinstance(weight, Tensor) else weight)
        self._stream.step(attention, weight)

    def _weight(self, layer: int, said: int) -> Weight:
        if self._about.residual is not None:
            return self._about.residual
        return measured_residual(self.reducer.row_norms(layer, said))[0]
