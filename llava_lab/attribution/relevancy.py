"""Gradient-weighted relevancy (Chefer et al.): attention counts where more of it would raise the target's logit.

Rule 5, ``A-bar = mean over heads of (A * dA)^+``; rule 6, ``R <- R + A-bar R`` from the identity; the map is R's row at
the predicting position, image columns. dA is the gradient of the *logit*, or of a logit difference. Several tokens in
one target are explained by the sum of their logits and the mean of their rows.

Nothing keeps a graph of the model: the layers' inputs are kept, and each layer is run again on the way back, alone, all
targets together. With ``P = A * dA``, rule 5 is the mean of P's positive part, and P is also what the softmax' own
gradient needs: so the relevance costs nothing that the gradient has not already paid for. Rule 6 is only ever read in a
few rows, and one row of it can be carried from the last layer down, ``r <- r + r A-bar``, in step with the gradient. No
``S x S`` matrix is kept.

``vision=True`` goes on through the vision tower by its *patch* rows, because LLaVA drops the class token: a map read from
the class row shows what an unused output collected. ``variant="lvlm-interpret"`` makes the maps of that tool to the last
digits: the gradient of a token reaches only its own row (its steps of generation stand on a cache), rows of the prompt
keep the gradient of the answer's first token whatever is explained, and rows are divided by their sum.

Sources: Chefer, Gur & Wolf 2021 (arXiv 2103.15679), rules 5, 6 and equations 8, 9; IntelLabs/lvlm-interpret @ e87dcf8
``utils_relevancy.py``; the rows at a time are flash attention's idea (Dao et al. 2022, arXiv 2205.14135) in plain torch.

    attribute(lab, run, method="relevancy", target=("red", "blue"))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llava_lab.attribution.gradients import inputs_until
from llava_lab.attribution.method import Maps, method
from llava_lab.capture import undisturbed
from llava_lab.capture.open_layer import Call, OpenLayer, keep_calls, open_layer
from llava_lab.capture.watch import attention_rows
from llava_lab.errors import LabError, OptionError, TargetError
from llava_lab.models import Lab, layout
from llava_lab.replay.score import read_scores
from llava_lab.replay.targets import Targets, image_values, predicting_rows, segment_mass, target_rows
from llava_lab.results import Run, Target

STREAMS = 8  # gradients taken through a layer together; more need more memory and win nothing
IN_CACHE = 2**18  # numbers worked on at once (1 MB), so that the passes over them stay in the processor's cache
FLOOR = 1e-12  # keeps a share of nothing at 0
TOLERANCE = 1e-2  # of the logits' size, for the check that the head is norm and lm_head; bfloat16 needs it

Rows = slice | Tensor
Seen = Callable[[slice, Rows, Float[Tensor, "N H q k"]], None]  # streams, query rows, attention times its gradient


@method(
    truth="How much each image token reaches the target through attention that would raise its logit if there were more of it.",
    source="Chefer, Gur & Wolf 2021, rules 5 and 6",
    equation=r"R\leftarrow R+\overline{(\nabla A^{l}\odot A^{l})^{+}}\,R",
    paper="https://arxiv.org/abs/2103.15679",
    cost="2 forwards, 1 backward (each further target adds its own way back through the same layers)",
    blind_to="what attention does not carry, everything that lowers the logit, and the residual's own share",
    needs="gradients",
    mass={},
)
def relevancy(
    lab: Lab,
    run: Run,
    targets: Targets,
    *,
    vision: bool = False,
    variant: Literal["chefer", "lvlm-interpret"] = "chefer",
) -> Maps:
    if vision:
        layout.require_tower_attention(lab.model, "vision=True")
        layout.require_patch_tokens(lab.model, "vision=True")
    plan = _plan(run, targets, variant, vision)
    inputs = inputs_until(lab, run, plan.at)
    layers = layout.language_layers(lab.model)
    tower = layout.used_vision_layers(lab.model) if vision else []
    with undisturbed(lab.model), keep_calls([*layers, *tower], layout.connector_of(lab.model)) as calls:
        keep = torch.tensor(plan.at, device=inputs["input_ids"].device)
        logits = lab.model(**inputs, use_cache=False, logits_to_keep=keep).logits
        down = _through_language(lab, [calls[layer] for layer in layers], logits, plan, further=vision)
        if vision:
            image, lost = _through_vision(lab, run, calls, tower, down)
        scores = read_scores(logits, plan.at, targets, score="logit")[0]
    if variant == "chefer":
        seen = down.relevance[:, 0]
    else:  # each token's row divided by its sum (equations 8 and 9), and their mean for each target
        shares = down.relevance[0] / down.relevance[0].sum(1, keepdim=True).clamp_min(FLOOR)
        seen = target_rows(shares, plan.at, targets)
    on_image = seen[:, slice(*run.segments["image"])].sum(1)
    extras: dict[str, Any] = {
        "mass": segment_mass(seen, run),
        "image_share": (on_image / seen.sum(1).clamp_min(FLOOR)).tolist(),  # the position's own word left out
        "score": scores.tolist(),
    }
    if vision:
        seen = seen.clone()
        seen[:, slice(*run.segments["image"])] = image
        extras["lost_to_cls"] = lost
    return Maps(image_values(seen, run), {"forward": 2, "backward": 1}, _notes(variant, extras), extras)


@dataclass(frozen=True)
class _Plan:
    """What is sent down: one gradient per stream, and the positions whose logits are needed for it."""

    streams: Targets  # one gradient each: the targets themselves, or one for all
    at: tuple[int, ...]
    own_from: int | None  # rows from here on reach only themselves; None: every stream reaches back everywhere


def _plan(run: Run, targets: Targets, variant: str, vision: bool) -> _Plan:
    if variant == "chefer":
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
        again = model.get_output_embeddings()(layout.language_model(model).norm(rows))
        scores = read_scores(again, at, plan.streams, score="logit")[0]
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
    connector = calls[layout.connector_of(lab.model)]
    wanted = _at_features(connector, down.gradient[:, start:stop])
    seen = down.relevance[:, :, start:stop]
    if not tower:
        return seen[:, 0], [0.0] * len(seen)
    tokens, width = calls[tower[0]].x.shape[1:]
    first = tokens - (stop - start)  # 1 with a class token, 0 without
    if first not in (0, 1):
        raise LabError(f"expected {stop - start} patches and at most one class token in the vision tower, got {tokens} positions")
    count = len(layout.vision_layers(lab.model)) + 1  # states: the embedding, then one after each layer
    states = [number % count for number in layout.feature_layers(lab.model.config)]
    assert max(states) == len(tower) == layout.last_feature_state(lab.model.config, count - 1)
    inside = Descent(seen.new_zeros(len(seen), tokens, width), torch.nn.functional.pad(seen, (first, 0)))
    for number in reversed(range(len(tower))):
        for state, part in zip(states, wanted.chunk(len(states), -1), strict=True):
            if state == number + 1:
                inside.gradient[:, first:] += part
        inside.through(open_layer(calls[tower[number]]), further=number > 0)
    ended = inside.relevance[:, 0]
    return ended[:, first:], (ended[:, :first].sum(1) / ended.sum(1).clamp_min(FLOOR)).tolist()


def _at_features(connector: Call, gradient: Float[Tensor, "N P D"]) -> Float[Tensor, "N P F"]:
    """N gradients at the connector's output -> at the features it reads."""
    with torch.enable_grad():
        features = connector.x.detach().requires_grad_()
        out = connector.module(features, *connector.args, **connector.kwargs)
        found = [
            torch.autograd.grad(out, features, one.to(out.dtype).reshape(out.shape), retain_graph=True)[0] for one in gradient
        ]
    return torch.cat(found).float()


# -- the way back through one layer -----------------------------------------------------------


@dataclass
class Descent:
    """What is carried down a tower: N gradients, and beside each the M rows of relevance that go with it.

    `own_from`: rows from this position on were made one token at a time, each by its own gradient, with all
    earlier positions fixed (a step of generation on a cache); None: every gradient reaches back everywhere.
    """

    gradient: Float[Tensor, "N S D"]
    relevance: Float[Tensor, "N M S"]
    own_from: int | None = None

    def through(self, layer: OpenLayer, *, further: bool = True) -> None:
        """Go below `layer`. Without ``further`` the gradient at its input is not wanted, and is not made."""
        before = self.relevance
        after = before.clone()
        for first in range(0, len(before), STREAMS):
            streams = slice(first, first + STREAMS)
            attended, x = layer.from_out(self.gradient[streams])
            add = partial(_add_rule_6, before[streams], after[streams])
            inner = attention_backward(layer, attended, add, further=further, own_from=self.own_from)
            if inner is not None:
                self.gradient[streams] = x + layer.from_attention(*inner)
        self.relevance = after


def _add_rule_6(
    old: Float[Tensor, "N M S"], new: Float[Tensor, "N M S"], some: slice, rows: Rows, product: Float[Tensor, "n H q k"]
) -> None:
    """One block of a layer, into its relevance rows: ``new = old + old A-bar``."""
    new[some, :, : product.shape[-1]] += old[some][:, :, rows] @ product.clamp_min(0).mean(1)


def attention_backward(
    layer: OpenLayer, gradient: Float[Tensor, "N S H E"], seen: Seen, *, further: bool = True, own_from: int | None = None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """N gradients at the attention's output -> at query (N, H, S, E), key and value (N, G, S, E); float32.

    `seen` is shown each block of attention weights times their gradient. Without ``further`` nothing else is done.
    """
    opened = layer.attention
    query, key, value = (part.detach().float() for part in (opened.query, opened.key, opened.value))
    groups = key.shape[1]
    scaled_query, scaled_key = query * opened.scaling, key * opened.scaling
    at_query = gradient.new_zeros(len(gradient), *query.shape[1:]) if further else None
    at_key, at_value = (gradient.new_zeros(len(gradient), *key.shape[1:]) if further else None for _ in range(2))
    out = gradient.transpose(1, 2)  # N H S E
    blocks = attention_rows(query, key, opened.mask, opened.scaling, causal=opened.causal, rows=_busy_rows(gradient))
    for rows, weights in blocks:
        stop = weights.shape[-1]
        kept = None if own_from is None else _own_only(rows, stop, own_from, weights.device)
        for some in _slices(len(gradient), weights.numel()):
            part = out[some][:, :, rows]
            product = _shared(_grouped(part, groups) @ value[:, :, :stop].transpose(2, 3), part).mul_(weights)
            seen(some, rows, product)
            if at_query is None or at_key is None or at_value is None:
                continue
            scores = torch.addcmul(product, weights, product.sum(-1, keepdim=True), value=-1)  # before the scaling
            at_query[some, :, rows] = _shared(_grouped(scores, groups) @ scaled_key[:, :, :stop], part)
            mixed = weights
            if kept is not None:
                scores, mixed = scores * kept, weights * kept
            at_key[some, :, :stop] += _grouped(scores, groups).transpose(2, 3) @ _grouped(scaled_query[:, :, rows], groups)
            at_value[some, :, :stop] += _grouped(mixed, groups).transpose(2, 3) @ _grouped(part, groups)
    if at_query is None or at_key is None or at_value is None:
        return None
    return at_query, at_key, at_value


def _grouped(part: Float[Tensor, "N H q w"], groups: int) -> Float[Tensor, "N G r w"]:
    """Heads that share a key lie side by side."""
    return part.reshape(len(part), groups, -1, part.shape[-1])


def _shared(part: Float[Tensor, "N G r w"], like: Float[Tensor, "N H q e"]) -> Float[Tensor, "N H q w"]:
    """Back from groups to the heads of `like`."""
    return part.reshape(*like.shape[:3], part.shape[-1])


def _busy_rows(gradient: Float[Tensor, "N S H E"]) -> tuple[int, ...] | None:
    """The query rows that any gradient reaches, when they are few (the last layer's are)."""
    busy = (gradient != 0).flatten(2).any(-1).any(0)
    rows = torch.nonzero(busy)[:, 0]
    return tuple(rows.tolist()) if 2 * len(rows) < len(busy) else None


def _own_only(rows: Rows, stop: int, own_from: int, device: torch.device) -> Float[Tensor, "q k"]:
    """1 where a gradient may pass to a key: rows made in one go pass it to all, later ones only to themselves."""
    at = torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows
    columns = torch.arange(stop, device=device)
    return ((at[:, None] < own_from) | (at[:, None] == columns)).float()


def _slices(count: int, numbers: int) -> Iterator[slice]:
    step = max(1, IN_CACHE // max(numbers, 1))
    for start in range(0, count, step):
        yield slice(start, start + step)


def _notes(variant: str, extras: dict[str, Any]) -> tuple[str, ...]:
    """What the map was made with, one sentence each."""
    share = sum(extras["image_share"]) / len(extras["image_share"])
    notes = [
        "Gradient of the logit (for a contrast, of the difference), not of its probability.",
        f"{share:.0%} of the relevance is on image tokens, the rest on text; that is not a share of causation.",
    ]
    if variant == "lvlm-interpret":
        notes.append(
            "As lvlm-interpret makes it: earlier rows keep the gradient of earlier tokens, and each row is divided by its sum."
        )
    if "lost_to_cls" in extras:
        lost = sum(extras["lost_to_cls"]) / len(extras["lost_to_cls"])
        notes.append(
            f"Chained through the vision tower; {lost:.0%} of the image's relevance went to its class token and is not shown."
        )
    return tuple(notes)
