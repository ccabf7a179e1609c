"""Patching at the grain of heads: measured one by one, or estimated for all of them at once from one backward pass.

A node is what one attention head or one feed-forward part adds to the residual stream at some places of the sequence. Patching
puts its value in one reading of the sequence into another reading, with another picture. `patch_nodes` does it, a forward for
each; `attribution_patch` estimates it for every node at every position from two forwards and one backward: the change of the
node's value times the score's slope there. The estimate is first order and wrong where the score is not straight along the way
(`steps` averages the slope along the line between the two pictures' tokens); `NodeScores.agreement` says how far it is right.

    pair = another_picture
    guess = attribution_patch(lab, run, pair, metric=("red", "blue"))
    truth = patch_nodes(lab, run, pair, metric=("red", "blue"))
    guess.agreement(truth)

Measured on `tiny`, on two pairs of drawn pictures that differ in a colour (`drawn_pairs` of `circuit`), over 192 heads and sites:
Pearson correlation of estimate and measurement 0.997 and 0.994, rank correlation 0.97 and 1.00; with ``steps=5`` 0.987 and 0.986,
0.80 and 0.82: the corrupted reading's own slope is what `patch_nodes` starts from, and the line's mean slope is not. The estimate
takes 2 forwards and a backward where the measurement takes 216 forwards.

Sources: Nanda 2023 (attribution patching); Syed et al. 2023 (arXiv 2310.10348); Hanna et al. 2024 (arXiv 2403.17806, integrated
gradients between the two inputs); Zhang and Nanda 2023 (arXiv 2309.16042, which reading is put into which).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from llava_lab.capture import hooked, undisturbed
from llava_lab.capture.residual import joined_by
from llava_lab.capture.watch import attention_module
from llava_lab.checks import Sweep, entry, one_of, whole_number
from llava_lab.errors import LabError
from llava_lab.interventions.patching import CORRUPTIONS, corrupted_pixels, places_of
from llava_lab.interventions.plan import Positions, parts
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers
from llava_lab.replay.prefix import Prefix, embedded, image_tokens
from llava_lab.replay.score import read_scores
from llava_lab.replay.targets import Targets, Wanted, predicting_rows, resolve_targets
from llava_lab.results import NodeScores, Run

SITES = ("image", "question", "cue", "last")
EVERY = "positions"  # each position from the picture on is a site of its own
PUT = ("clean", "corrupt", "zero", "mean")


@dataclass
class Nodes:
    """What the heads (before they are joined) and the feed-forward parts give in one forward, a layer an entry."""

    heads: list[Float[Tensor, "T HE"]]
    mlps: list[Float[Tensor, "T D"]]


@contextmanager
def reading_nodes(lab: Lab) -> Iterator[Nodes]:
    """The nodes of the one forward inside; with gradients where that has them."""
    nodes = Nodes([], [])
    with ExitStack() as stack:
        for layer, mlp in zip(language_layers(lab.model), parts(lab, "mlp"), strict=True):
            keep_heads, keep_mlp = nodes.heads.append, nodes.mlps.append
            stack.enter_context(hooked(joined_by(layer), before=lambda _, args, keep=keep_heads: keep(args[0])))
            stack.enter_context(hooked(mlp, after=lambda _, args, output, keep=keep_mlp: keep(output)))
        yield nodes


@entry
def attribution_patch(
    lab: Lab,
    clean: Run,
    corrupt: Any = CORRUPTIONS[0],
    *,
    sites: Any = SITES,
    metric: Wanted = None,
    steps: int = 0,
    seed: int = 0,
) -> NodeScores:
    """What `patch_nodes` with ``put="clean"`` would find, estimated for every head and feed-forward part at once.

    `steps` 0 takes the slope at the corrupted reading; above 0 its mean at the middles of so many pieces of the line from the
    corrupted picture's tokens to the clean one's. Other options as in `patch`; `sites` "positions" is every position from the
    picture on. Sites add up: the estimate of two places is the sum of both.
    Raises what `patch` raises.

    >>> guess = ll.attribution_patch(lab, run, "grey", metric=("red", "blue"))
    >>> guess.heads.shape, guess.measured
    ((4, 6, 8), False)
    """
    began = time.perf_counter()
    steps = whole_number("steps", steps)
    targets, places = resolve_targets(lab, clean, metric)[:1], _places(clean, sites)
    at = predicting_rows(targets)
    heads = int(attention_module(language_layers(lab.model)[0]).config.num_attention_heads)  # type: ignore[union-attr, arg-type]
    with undisturbed(lab.model):
        pixels, corruption = corrupted_pixels(lab, clean, corrupt, seed)
        stop = at[-1] + 1
        first = embedded(lab, clean, image_tokens(lab, clean))[:, :stop]
        second = embedded(lab, clean, image_tokens(lab, clean, pixels))[:, :stop]
        with reading_nodes(lab) as of_clean:
            before = float(_score(lab, first, at, targets))
        along = [(step + 0.5) / steps for step in range(steps)] or [0.0]
        slopes: list[Tensor] = []
        of_corrupt: Nodes | None = None
        after = float("nan")
        if steps:
            with reading_nodes(lab) as of_corrupt:
                after = float(_score(lab, second, at, targets))
        with Sweep("attribution patching", total=len(along), unit="backward", least=len(along)) as sweep:
            for share in along:
                with torch.enable_grad(), reading_nodes(lab) as nodes:
                    tokens = (second + share * (first - second)).detach().requires_grad_()
                    score = _score(lab, tokens, at, targets)
                    gradients = torch.autograd.grad(score, [*nodes.heads, *nodes.mlps])
                slopes = [slope + new for slope, new in zip(slopes, gradients, strict=True)] if slopes else list(gradients)
                if of_corrupt is None:
                    of_corrupt, after = nodes, float(score.detach())
                sweep.step()
        assert of_corrupt is not None
        count = len(of_clean.heads)
        changes = [
            ((one - two.detach()) * slope / len(along))[0].float()
            for one, two, slope in zip(
                [*of_clean.heads, *of_clean.mlps], [*of_corrupt.heads, *of_corrupt.mlps], slopes, strict=True
            )
        ]
        of_heads = torch.stack([change.unflatten(-1, (heads, -1)).sum(-1) for change in changes[:count]])  # L T H
        of_mlps = torch.stack([change.sum(-1) for change in changes[count:]])  # L T
    inside = [[position for position in place.positions if position < stop] for place in places]
    return NodeScores(
        sites=tuple(place.name for place in places),
        heads=np.stack([of_heads[:, where].sum(1).cpu().numpy() for where in inside]),
        mlps=np.stack([of_mlps[:, where].sum(1).cpu().numpy() for where in inside]),
        measured=False,
        put="clean",
        steps=steps,
        target=targets[0],
        corruption=corruption,
        clean=before,
        corrupt=after,
        model=clean.model,
        fingerprint=clean.fingerprint,
        passes={"forward": 1 + len(along) + bool(steps), "backward": len(along)},
        seconds=time.perf_counter() - began,
        notes=("An estimate of first order; `patch_nodes` measures, and `agreement` compares the two.",),
    )


@entry
def patch_nodes(
    lab: Lab,
    clean: Run,
    corrupt: Any = CORRUPTIONS[0],
    *,
    put: str = PUT[0],
    sites: Any = SITES,
    layers: Sequence[int] | None = None,
    metric: Wanted = None,
    seed: int = 0,
    progress: bool = True,
) -> NodeScores:
    """Change of the score when one head, or one feed-forward part, is changed at a site; a forward for each.

    `put`: ``clean``, its clean values go into the corrupted reading (what brings the answer back); ``corrupt``, the other way
    round (resample ablation: what the answer needs); ``zero`` or ``mean``, of its values over the clean sequence, into the clean
    reading. `layers` None is every layer; other layers are NaN. Other options as in `patch`. Ctrl-C leaves the rest NaN.
    Raises what `patch` raises, and LabError when a value did not arrive.

    >>> one = ll.patch_nodes(lab, run, "grey", sites=["last"], layers=[3], metric=("red", "blue"), progress=False)
    >>> one.heads.shape, bool(np.isfinite(one.heads[0, 3]).all()), bool(np.isnan(one.heads[0, 2]).all())
    ((1, 6, 8), True, True)
    """
    began = time.perf_counter()
    one_of("put", put, PUT)
    targets, places = resolve_targets(lab, clean, metric)[:1], _places(clean, sites)
    every = language_layers(lab.model)
    chosen = range(len(every)) if layers is None else sorted({whole_number("layers", layer) for layer in layers})
    if not chosen or max(chosen) >= len(every):
        raise LabError(f"layers must be numbers from 0 to {len(every) - 1}, got {list(chosen)}")
    heads = int(attention_module(every[0]).config.num_attention_heads)  # type: ignore[union-attr, arg-type]
    scores = np.full((len(places), len(every), heads + 1), np.nan, np.float32)
    with undisturbed(lab.model):
        pixels, corruption = corrupted_pixels(lab, clean, corrupt, seed)
        start = clean.segments["image"][0]
        readings = {
            name: Prefix(lab, clean, targets, start, tokens=image_tokens(lab, clean, shown))
            for name, shown in (("clean", None), ("corrupt", pixels))
        }
        nodes: dict[str, Nodes] = {}
        ends: dict[str, float] = {}
        for name, reading in readings.items():
            with reading_nodes(lab) as nodes[name]:
                ends[name] = float(reading.score()[0])
        into = "corrupt" if put == "clean" else "clean"
        reading, base = readings[into], ends[into]
        source = nodes["clean" if put == "clean" else "corrupt"]
        cells = [(place, layer, node) for place in range(len(places)) for layer in chosen for node in range(heads + 1)]
        with Sweep("patching nodes", total=len(cells), unit="node", show=progress) as sweep:
            for place, layer, node in cells:
                is_mlp = node == heads
                there = (nodes[into].mlps if is_mlp else nodes[into].heads)[layer]
                values = (source.mlps if is_mlp else source.heads)[layer]
                if put in ("zero", "mean"):
                    values = torch.zeros_like(there) if put == "zero" else there.mean(1, keepdim=True).expand_as(there)
                module = parts(lab, "mlp")[layer] if is_mlp else joined_by(every[layer])
                where = [at - reading.start for at in places[place].positions if at < reading.stop]
                with replacing(module, values, where, None if is_mlp else (node, heads)):
                    scores[place, layer, node] = float(reading.score()[0]) - base
                sweep.step()
    notes = (f"Interrupted after {sweep.count} of {len(cells)} nodes; the rest is NaN.",) if sweep.interrupted else ()
    return NodeScores(
        sites=tuple(place.name for place in places),
        heads=scores[..., :heads],
        mlps=scores[..., heads],
        measured=True,
        put=put,
        steps=0,
        target=targets[0],
        corruption=corruption,
        clean=ends["clean"],
        corrupt=ends["corrupt"],
        model=clean.model,
        fingerprint=clean.fingerprint,
        passes={"forward": sum(one.passes for one in readings.values()), "backward": 0},
        seconds=time.perf_counter() - began,
        interrupted=sweep.interrupted,
        notes=notes,
    )


@contextmanager
def replacing(
    module: nn.Module, values: Float[Tensor, "1 T D"], where: Sequence[int], head: tuple[int, int] | None = None
) -> Iterator[None]:
    """`values` at the rows `where` of what `module` gives, or, with (head, heads), of that head's part of what it is given."""
    rows = torch.tensor(list(where), device=values.device)
    calls: list[int] = []

    def changed(states: Tensor) -> Tensor:
        if states.shape != values.shape:
            raise LabError(f"expected a reading of {tuple(values.shape)}, got {tuple(states.shape)}; run one forward of the run")
        new = states.clone()
        if head is None:
            new[:, rows] = values[:, rows]
        else:
            width = states.shape[-1] // head[1]
            part = slice(head[0] * width, (head[0] + 1) * width)
            new[:, rows, part] = values[:, rows, part]
        calls.append(1)
        return new

    if head is None:
        hook = hooked(module, after=lambda _, args, output: changed(output))
    else:
        hook = hooked(module, before=lambda _, args: (changed(args[0]), *args[1:]))
    with hook:
        yield
    if not calls:
        raise LabError("expected a node to be replaced, got no forward; run one forward inside the block")


def _score(lab: Lab, tokens: Float[Tensor, "1 T D"], at: Sequence[int], targets: Targets) -> Float[Tensor, ""]:
    model: Any = lab.model
    keep = torch.tensor(at, device=tokens.device)
    return read_scores(model(inputs_embeds=tokens, use_cache=False, logits_to_keep=keep).logits, at, targets)[0, 0]


def _places(run: Run, sites: Any) -> list[Positions]:
    if isinstance(sites, str) and sites == EVERY:
        start, stop = run.segments["image"][0], run.segments["answer"][1] - 1
        return [Positions(str(at), (at,), len(run.token_ids)) for at in range(start, max(stop, run.segments["answer"][0]))]
    return places_of(run, sites)
