"""Gradient-weighted relevancy (Chefer et al.): attention counts where more of it would raise the target's logit.

Rule 5, ``A-bar = mean over heads of (A * dA)^+``; rule 6, ``R <- R + A-bar R`` from the identity; the map is R's
row at the predicting position, image columns. dA is the gradient of the *logit*, or of a logit difference.
Several tokens in one target are explained by the sum of their logits and the mean of their rows.

Nothing keeps a graph of the model: the layers' inputs are kept, and each layer is run again on the way back,
alone, all targets together. ``vision=True`` goes on through the vision tower by its *patch* rows, because LLaVA drops
the class token: a map read from the class row shows what an unused output collected.

``variant="lvlm-interpret"`` makes the maps of that tool to the last digits: the gradient of a token reaches only
its own row (its steps of generation stand on a cache), rows of the prompt keep the gradient of the answer's
first token whatever is explained, and rows are divided by their sum.

Sources: Chefer, Gur & Wolf 2021 (arXiv 2103.15679), rules 5, 6 and equations 8, 9; IntelLabs/lvlm-interpret @ e87dcf8
``utils_relevancy.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llava_lab.attribution.backward import Descent
from llava_lab.attribution.base import Maps, Method, Targets, choose, image_values, predicting_rows, segment_mass
from llava_lab.attribution.differentiable import inputs_until, refuse_quantised, target_logits
from llava_lab.capture import undisturbed
from llava_lab.capture.halves import Call, keep_calls, open_layer
from llava_lab.errors import LabError, OptionError, TargetError
from llava_lab.models.layout import (
    feature_layers,
    language_layers,
    language_model,
    last_feature_state,
    projector,
    require_patch_tokens,
    used_vision_layers,
    vision_layers,
)
from llava_lab.results import Run, Target

if TYPE_CHECKING:
    from llava_lab.models import Lab

VARIANTS = ("chefer", "lvlm-interpret")
FLOOR = 1e-12  # keeps a share of nothing at 0
TOLERANCE = 1e-2  # of the logits' size, for the check that the head is norm and lm_head; bfloat16 needs it


@dataclass(frozen=True)
class _Plan:
    """What is sent down: one gradient per stream, and the positions whose logits are needed for it."""

    streams: Targets  # one gradient each: the targets themselves, or one for all
    at: tuple[int, ...]
    own_from: int | None  # rows from here on reach only themselves; None: every stream reaches back everywhere


def _compute(lab: Lab, run: Run, targets: Targets, options: dict[str, Any]) -> Maps:
    refuse_quantised(lab, "relevancy")
    vision = choose("vision", options["vision"], (False, True))
    if vision:
        require_patch_tokens(lab.model, "vision=True")
    variant = choose("variant", options["variant"], VARIANTS)
    plan = _plan(run, targets, variant, vision)
    inputs = inputs_until(lab, run, plan.at)
    layers = language_layers(lab.model)
    tower = used_vision_layers(lab.model) if vision else []
    lost: list[float] | None = None
    with undisturbed(lab.model), keep_calls([*layers, *tower], projector(lab.model)) as calls:
        keep = torch.tensor(plan.at, device=inputs["input_ids"].device)
        logits = lab.model(**inputs, use_cache=False, logits_to_keep=keep).logits
        down = _through_language(lab, [calls[layer] for layer in layers], logits, plan, further=vision)
        if vision:
            image, lost = _through_vision(lab, run, calls, tower, down)
        scores = target_logits(logits, plan.at, targets)[0]
    seen = down.relevance[:, 0] if variant == VARIANTS[0] else _normalised(down.relevance[0], plan, targets)
    extras: dict[str, Any] = {"mass": segment_mass(seen, run), "image_share": _image_share(seen, run), "score": scores.tolist()}
    if lost is not None:
        start, stop = run.segments["image"]
        seen = seen.clone()
        seen[:, start:stop] = image
        extras["lost_to_cls"] = lost
    return Maps(image_values(seen, run), {"forward": 2, "backward": 1}, _notes(variant, extras), extras)


def _plan(run: Run, targets: Targets, variant: str, vision: bool) -> _Plan:
    if variant == VARIANTS[0]:
        return _Plan(targets, predicting_rows(targets), None)
    if vision:
        raise OptionError(
            "vision=True belongs to variant='chefer': lvlm-interpret reads the tower's class row, which LLaVA does not use"
        )
    for target in targets:
        if target.against_ids:
            raise TargetError(
                f"variant='lvlm-interpret' explains tokens that were said, not the contrast {target.text!r}; use variant='chefer'"
            )
    start = run.segments["answer"][0]
    at = tuple(range(start - 1, max(predicting_rows(targets)) + 1))
    said = Target("answer", run.answer, at, tuple(int(run.token_ids[position + 1]) for position in at))
    return _Plan((said,), at, own_from=start)


def _first_rows(plan: _Plan, gradient: Float[Tensor, "N S D"]) -> Float[Tensor, "N M S"]:
    """The identity's rows to carry down: one per stream, the mean over its positions, or one per position."""
    if plan.own_from is not None:
        rows = gradient.new_zeros(1, len(plan.at), gradient.shape[1])
        rows[0, range(len(plan.at)), list(plan.at)] = 1.0
        return rows
    rows = gradient.new_zeros(len(plan.streams), 1, gradient.shape[1])
    for row, target in zip(rows, plan.streams, strict=True):
        row[0, list(target.positions)] = 1 / len(target.positions)
    return rows


def _through_language(lab: Lab, calls: list[Call], logits: Tensor, plan: _Plan, *, further: bool) -> Descent:
    """From the logits down to the first layer, its identity taken out; with ``further`` to the gradient at its input."""
    layer = open_layer(calls[-1])
    gradient = _head_gradient(lab, layer.out.detach(), logits, plan)
    first = _first_rows(plan, gradient)
    down = Descent(gradient, first, plan.own_from)
    for number in reversed(range(len(calls))):
        down.through(layer, further=number > 0 or further)
        if number > 0:
            layer = open_layer(calls[number - 1])
    down.relevance = down.relevance - first
    return down


def _head_gradient(
    lab: Lab, states: Float[Tensor, "1 S D"], logits: Float[Tensor, "1 Q V"], plan: _Plan
) -> Float[Tensor, "N S D"]:
    """The gradient of each stream's logits at the last layer's output, through the final norm and the output head."""
    model: Any = lab.model
    at = list(plan.at)
    used = [position for target in plan.streams for position in target.positions]
    alone = len(set(used)) == len(used)  # no position is shared, so one pass gives all of them
    with torch.enable_grad():
        rows = states[:, at].requires_grad_()
        again = model.get_output_embeddings()(language_model(model).norm(rows))
        scores = target_logits(again, at, plan.streams)[0]
        wanted = [scores.sum()] if alone else list(scores)
        found = [torch.autograd.grad(score, rows, retain_graph=True)[0][0].float() for score in wanted]
    if not torch.allclose(again.float(), logits.float(), rtol=TOLERANCE, atol=TOLERANCE * float(logits.abs().max())):
        raise LabError(
            "expected logits to be the output head over the final norm, got others; this model cannot be gone back through"
        )
    gradient = torch.zeros(len(scores), *states.shape[1:], device=states.device)
    for number, target in enumerate(plan.streams):
        mine = [at.index(position) for position in target.positions]
        gradient[number, list(target.positions)] = found[0 if alone else number][mine]
    return gradient


def _through_vision(
    lab: Lab, run: Run, calls: dict[nn.Module, Call], tower: list[nn.Module], down: Descent
) -> tuple[Float[Tensor, "N P"], list[float]]:
    """On from the image tokens to the patches the tower was given; and the share that ends on its class token."""
    start, stop = run.segments["image"]
    connector = calls[projector(lab.model)]
    wanted = _at_features(connector, down.gradient[:, start:stop])
    seen = down.relevance[:, :, start:stop]
    if not tower:
        return seen[:, 0], [0.0] * len(seen)
    tokens, width = calls[tower[0]].x.shape[1:]
    first = tokens - (stop - start)  # 1 with a class token, 0 without
    if first not in (0, 1):
        raise LabError(f"expected {stop - start} patches and at most one class token in the vision tower, got {tokens} positions")
    count = len(vision_layers(lab.model)) + 1  # states: the embedding, then one after each layer
    states = [number % count for number in feature_layers(lab.model.config)]
    assert max(states) == len(tower) == last_feature_state(lab.model.config, count - 1)
    inside = Descent(seen.new_zeros(len(seen), tokens, width), torch.nn.functional.pad(seen, (first, 0)))
    for number in reversed(range(len(tower))):
        for state, part in zip(states, wanted.chunk(len(states), -1), strict=True):
            if state == number + 1:
                inside.gradient[:, first:] += part
        inside.through(open_layer(calls[tower[number]]), further=number > 0)
    ended = inside.relevance[:, 0]
    return ended[:, first:], (ended[:, :first].sum(1) / ended.sum(1).clamp_min(FLOOR)).tolist()


def _at_features(connector: Call, gradient: Float[Tensor, "N P D"]) -> Float[Tensor, "N P F"]:
    """N gradients at the projector's output -> at the features it reads."""
    with torch.enable_grad():
        features = connector.x.detach().requires_grad_()
        out = connector.module(features, *connector.args, **connector.kwargs)
        found = [
            torch.autograd.grad(out, features, one.to(out.dtype).reshape(out.shape), retain_graph=True)[0] for one in gradient
        ]
    return torch.cat(found).float()


def _normalised(rows: Float[Tensor, "M S"], plan: _Plan, targets: Targets) -> Float[Tensor, "N S"]:
    """Each token's row divided by its sum (equations 8 and 9), and their mean for each target."""
    shares = rows / rows.sum(1, keepdim=True).clamp_min(FLOOR)
    where = {position: number for number, position in enumerate(plan.at)}
    return torch.stack([shares[[where[position] for position in target.positions]].mean(0) for target in targets])


def _image_share(seen: Float[Tensor, "N S"], run: Run) -> list[float]:
    """The share of the relevance that lies on image tokens, the position's own word left out."""
    image = seen[:, slice(*run.segments["image"])].sum(1)
    return (image / seen.sum(1).clamp_min(FLOOR)).tolist()


def _notes(variant: str, extras: dict[str, Any]) -> tuple[str, ...]:
    """What the map was made with, one sentence each."""
    share = sum(extras["image_share"]) / len(extras["image_share"])
    notes = [
        "Gradient of the logit (for a contrast, of the difference), not of its probability.",
        f"{share:.0%} of the relevance is on image tokens, the rest on text; that is not a share of causation.",
    ]
    if variant == VARIANTS[1]:
        notes.append(
            "As lvlm-interpret makes it: earlier rows keep the gradient of earlier tokens, and each row is divided by its sum."
        )
    if "lost_to_cls" in extras:
        lost = sum(extras["lost_to_cls"]) / len(extras["lost_to_cls"])
        notes.append(
            f"Chained through the vision tower; {lost:.0%} of the image's relevance went to its class token and is not shown."
        )
    return tuple(notes)


RELEVANCY = Method(
    name="relevancy",
    truth="How much each image token reaches the target through attention that would raise its logit if there were more of it.",
    source="Chefer, Gur & Wolf 2021, rules 5 and 6",
    cost="2 forwards, 1 backward (each further target adds its own way back through the same layers)",
    blind_to="what attention does not carry, everything that lowers the logit, and the residual's own share",
    options={"vision": False, "variant": VARIANTS[0]},
    compute=_compute,
)
