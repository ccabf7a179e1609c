"""Logit lens as a map: how probable the target word is when a patch's state is read as if it were the last one.

State 0 is what the projector gives, state l the stream after l layers. Every state goes through the final
norm exactly once and then through the output head. (transformers' ``hidden_states[-1]`` is already normed;
norming it again is the usual mistake. Here all states are taken before the norm, the last one too.) Norm
statistics are each state's own.

Read several states and the strongest (or the mean) is shown; the maximum over states and patches is what
vl-interp calls internal confidence. A word the lens cannot read may still be there in another basis.

One forward and the output head at each state read; beside it, at LLaVA-1.5-7B, about 40 MB: one state in float32, 64
rows of logits at a time, and 0.1 MB per token explained (33 states x 576 patches); at that width the peak of the
process does not rise above a plain forward's.

Sources: nostalgebraist 2020 (logit lens); Jiang et al. 2025 (arXiv 2410.02762) for its use on image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llava_lab.attribution.base import Maps, Method, Targets, choose, layer_window
from llava_lab.attribution.unembed import final_norm, log_total, token_logits
from llava_lab.capture import undisturbed
from llava_lab.capture.values import watch_stream
from llava_lab.errors import OptionError
from llava_lab.models.layout import language_layers
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab

VALUES = ("probability", "logit")
REDUCTIONS = ("max", "mean")


def _compute(lab: Lab, run: Run, targets: Targets, options: dict[str, Any]) -> Maps:
    layers = language_layers(lab.model)
    start, stop = _states(options["layers"], len(layers))
    value = choose("value", options["value"], VALUES)
    reduce = choose("reduce", options["reduce"], REDUCTIONS)
    ids = sorted({i for target in targets for i in (*target.token_ids, *target.against_ids)})
    image = slice(*run.segments["image"])
    read: list[Tensor] = []  # one (P, N) table per state

    def fold(number: int, state: Tensor) -> None:
        if start <= number < stop:
            read.append(_read(lab, state[0, image], ids, value).cpu())

    with undisturbed(lab.model), watch_stream(layers, fold):
        lab.model(**lab.inputs(run), use_cache=False, logits_to_keep=1)
    table = torch.stack(read).numpy()  # states, P, N
    column = {token: i for i, token in enumerate(ids)}
    values, by_state = [], []
    for target in targets:
        said = table[:, :, [column[i] for i in target.token_ids]].mean(-1)  # states, P
        other = table[:, :, [column[i] for i in target.against_ids]].mean(-1) if target.against_ids else None
        shown, strongest = _reduced(said, reduce), said
        if other is not None:
            shown, strongest = shown - _reduced(other, reduce), said - other
        values.append(shown.reshape(run.map.rows, run.map.cols))
        by_state.append(strongest.max(1).tolist())
    best = [start + int(np.argmax(row)) for row in by_state]
    extras = {"states": list(range(start, stop)), "strongest_patch_by_state": by_state, "strongest_state": best}
    return Maps(np.stack(values).astype(np.float32), {"forward": 1}, (_note(value, reduce, start, stop, len(layers)),), extras)


def _read(lab: Lab, state: Tensor, ids: Sequence[int], value: str) -> Tensor:
    """Logits or probabilities of `ids` at states that have not been normed yet, (P, N) float32."""
    normed = final_norm(lab)(state)
    logits = token_logits(lab, normed, ids)
    return logits if value == "logit" else (logits - log_total(lab, normed)[:, None]).exp()


def _reduced(table: np.ndarray, reduce: str) -> np.ndarray:
    return table.max(0) if reduce == "max" else table.mean(0)


def _states(layers: Any, count: int) -> tuple[int, int]:
    """``[start, stop)`` of the states 0 .. count; a whole number is that state alone."""
    if isinstance(layers, Integral) and not isinstance(layers, bool):
        state = int(layers)
        if not 0 <= state <= count:
            raise OptionError(f"layers must be a state from 0 (projector output) to {count} (last layer), got {state}")
        return state, state + 1
    return layer_window(layers, count + 1)


def _note(value: str, reduce: str, start: int, stop: int, last: int) -> str:
    places = f"states {start} to {stop - 1}" if stop - start > 1 else f"state {start}"
    over = f", {reduce} over them" if stop - start > 1 else ""
    word = "Probability" if value == "probability" else "Logit"
    return (
        f"{word} of the target word at each image position, read at {places} of 0 to {last}{over}; each state normed once; "
        "mean over the target's tokens (for a contrast: the difference of the two words)."
    )


LOGIT_LENS_MAP = Method(
    name="logit_lens_map",
    truth="How probable the target word is when each image token's intermediate state is read as if it were the last one.",
    source="logit lens (nostalgebraist 2020) on image tokens (Jiang et al. 2025, arXiv 2410.02762)",
    cost="1 forward, and the output head at each image token and state read",
    blind_to="the question, whether the answer ever read these positions, and anything not written in the output head's basis",
    options={"layers": None, "value": "probability", "reduce": "max"},
    compute=_compute,
)
