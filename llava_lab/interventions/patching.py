"""Activation patching (causal tracing): what of the clean run, put into a corrupted one, brings its answer back.

The same sequence is read twice, with the clean picture and with a corrupted one. Then, for each place and layer, the
states of the clean reading replace those of the corrupted. The part before the picture is the same in both and is
computed once. Clean into clean changes nothing; every place of one layer brings everything back, exactly.

    grid = patch(lab, run, "grey", sites=["image", "last"], metric=("red", "blue"))

Sources: Meng et al. 2022 (arXiv 2202.05262); Basu et al. 2024 (arXiv 2406.04236) for pictures.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_lab.capture import undisturbed
from llava_lab.capture.residual import watch_outputs
from llava_lab.checks import Sweep, entry, one_of, whole_number
from llava_lab.errors import LabError, OptionError
from llava_lab.interventions.knockout import windows_around
from llava_lab.interventions.plan import COMPONENTS, Positions, changing, parts, positions_of
from llava_lab.models import Lab, read_picture
from llava_lab.models.layout import language_layers
from llava_lab.replay.fills import fill_pixels
from llava_lab.replay.prefix import Prefix, image_tokens
from llava_lab.replay.score import LOGODDS, SCORES, Reader, noise_floor
from llava_lab.replay.targets import Wanted, resolve_targets
from llava_lab.results import PatchGrid, Run

CORRUPTIONS = ("grey", "blur", "noise")
SITES = ("image", "question", "cue", "last")


@entry
def patch(
    lab: Lab,
    clean: Run,
    corrupt: Any = CORRUPTIONS[0],
    *,
    sites: Sequence[Any] = SITES,
    components: Sequence[str] = ("residual",),
    layers: Sequence[int] | None = None,
    width: int = 1,
    metric: Wanted = None,
    score: str = LOGODDS,
    seed: int = 0,
) -> PatchGrid:
    """Put the clean states of each site, in a window of `width` layers around each of `layers`, into the corrupted reading.

    `corrupt`: ``grey``, ``blur``, ``noise`` (of the clean picture's own size), another picture, or a Run whose picture is
    taken. `sites`: as `knockout`'s places. `components`: ``residual`` (what a layer gives on), ``attention``, ``mlp`` (what
    each adds). `layers` are the windows' centres, None for every layer. `metric`: best a contrast ("red", "blue"); None is
    the whole answer; `score` as in `knockout`. Ctrl-C gives the cells that are done, the others NaN.

    Raises OptionError, TargetError, CheckpointError, PictureError, and LabError when a state did not arrive.

    >>> grid = ll.patch(lab, run, "grey", sites=["image", "last"], layers=[0, 5], metric=("red", "blue"))
    >>> grid.scores.shape, grid.clean_answer
    ((1, 2, 2, 1), 'red')
    """
    began = time.perf_counter()
    targets = resolve_targets(lab, clean, metric)
    read = Reader(targets, one_of("score", score, SCORES))
    places = places_of(clean, sites)
    is_list = isinstance(components, Sequence) and not isinstance(components, str) and components
    for component in components if is_list else (components,):
        one_of("components", component, COMPONENTS)
    count = len(language_layers(lab.model))
    windows = windows_around(count, whole_number("width", width, least=1), _centres(layers, count))
    scores = np.full((len(components), len(places), len(windows), len(targets)), np.nan, np.float32)
    answers = np.full(scores.shape[:3], "", dtype="<U64")
    states = 0
    with undisturbed(lab.model):
        pixels, corruption = corrupted_pixels(lab, clean, corrupt, seed)
        start = clean.segments["image"][0]
        reading = Prefix(lab, clean, targets, start)
        with keeping(lab, components) as states_of:
            clean_logits = reading.logits()
        # from here on the sequence is read with the corrupted picture
        reading = Prefix(lab, clean, targets, start, tokens=image_tokens(lab, clean, pixels))
        corrupt_logits = reading.logits()

        def scored(logits: Tensor) -> np.ndarray:
            return read(logits[None])[0].cpu().numpy()

        def floor_of(logits: Tensor) -> Tensor:
            return noise_floor(logits[None], reading.at, targets, score=score)[0].float().cpu()

        def word(logits: Tensor) -> str:
            row = reading.at.index(targets[0].positions[0])
            return str(lab.tokenizer.decode([int(logits[row].argmax())])).strip()[:64]

        with Sweep("patching", total=answers.size, unit="cell") as sweep:
            for cell in np.ndindex(*answers.shape):
                component, place, window = components[cell[0]], places[cell[1]], windows[cell[2]]
                with patched(lab, states_of, component, place, window, reading.start) as changed_layers:
                    logits = reading.logits()
                states += changed_layers * len(place.positions)
                scores[cell], answers[cell] = scored(logits), word(logits)
                sweep.step()
    before, after = scored(clean_logits), scored(corrupt_logits)
    # a cell is compared with the corrupted reading: its noise, or the clean one's where that is larger
    floor = torch.maximum(floor_of(corrupt_logits), floor_of(clean_logits)).numpy()
    notes: tuple[str, ...] = ("An answer is the likeliest token where the first target is predicted, given all tokens before.",)
    if sweep.interrupted:
        notes += (f"Interrupted after {sweep.count} of {answers.size} cells; the rest is NaN.",)
    if np.any(np.abs(before - after) <= floor):
        notes += ("The corruption changes nothing for some target, so there is nothing to bring back: its values are NaN.",)
    return PatchGrid(
        components=tuple(components),
        sites=tuple(place.name for place in places),
        windows=np.array(windows, np.int64),
        targets=targets,
        corruption=corruption,
        clean=before,
        corrupt=after,
        scores=scores,
        answers=answers,
        clean_answer=word(clean_logits),
        corrupt_answer=word(corrupt_logits),
        proof={"states": float(states)},
        model=clean.model,
        fingerprint=clean.fingerprint,
        passes={"forward": reading.passes + 3},
        seconds=time.perf_counter() - began,
        interrupted=sweep.interrupted,
        notes=notes,
        score=score,
        noise_floor=tuple(floor.tolist()),
    )


@contextmanager
def patched(
    lab: Lab, states_of: dict[str, list[Tensor]], component: str, place: Positions, window: tuple[int, int], first: int
) -> Iterator[int]:
    """The states of `keeping`, (layers) of (T, D) from position `first` on, in their places for every forward inside.

    Gives the number of layers that are changed.
    """
    modules, attentions = parts(lab, component), parts(lab, "attention")
    changes = []

    def put_back(states: Tensor, now: Tensor, at: Tensor) -> Tensor:
        inside = at - first < len(states)  # what is generated later has no clean state
        return torch.where(inside[:, None], states[(at - first).clamp_max(len(states) - 1)], now)

    with ExitStack() as stack:
        for layer in range(*window):
            change = partial(put_back, states_of[component][layer])
            changes.append(stack.enter_context(changing([modules[layer]], [attentions[layer]], place, change)))
        yield len(changes)
    if not all(layer.states for layer in changes):
        raise LabError(f"expected {component} states to be replaced in {len(changes)} layers, got none in some; run one forward")


@contextmanager
def keeping(lab: Lab, components: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """What each layer's components give in the forward inside, lists over layers of (T, D)."""
    states_of: dict[str, list[Tensor]] = {name: [] for name in components}
    with ExitStack() as stack:
        for name, kept in states_of.items():
            stack.enter_context(watch_outputs(parts(lab, name), lambda _, output, kept=kept: kept.append(output[0])))
        yield states_of


def corrupted_pixels(lab: Lab, run: Run, corrupt: Any, seed: int) -> tuple[Tensor, str]:
    pixels = lab.inputs(run)["pixel_values"]
    if isinstance(corrupt, Run):
        return lab.pixels(corrupt.picture, run.map.mode), "another picture"
    if isinstance(corrupt, str) and corrupt in ("grey", "blur"):
        return fill_pixels(lab, pixels, corrupt, run.map), corrupt
    if isinstance(corrupt, str) and corrupt == "noise":
        drawn = np.random.default_rng((seed, 43)).integers(0, 256, run.picture.shape, dtype=np.uint8)
        return lab.pixels(drawn, run.map.mode), corrupt
    if isinstance(corrupt, str) and "." not in corrupt:
        raise OptionError(f"corrupt must be one of {', '.join(CORRUPTIONS)}, a picture, or a Run; got {corrupt!r}")
    return lab.pixels(read_picture(corrupt), run.map.mode), "another picture"


def places_of(run: Run, sites: Any) -> list[Positions]:
    if not isinstance(sites, Sequence) or isinstance(sites, str) or not sites:
        raise OptionError(f"sites must be a list of places such as {', '.join(SITES)}, got {sites!r}")
    places = [positions_of(run, site, option="sites") for site in sites]
    for place in places:
        if place.positions[-1] < run.segments["image"][0]:
            raise OptionError(
                f"sites: {place.name} lies before the picture, where both readings are the same; choose a later place"
            )
    return places


def _centres(layers: Any, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    is_list = isinstance(layers, Sequence | range | np.ndarray) and not isinstance(layers, str)
    centres = [int(layer) for layer in layers] if is_list else []
    if not centres or not all(0 <= centre < count for centre in centres):
        raise OptionError(f"layers must be layer numbers from 0 to {count - 1}, or None for all; got {layers!r}")
    return centres
