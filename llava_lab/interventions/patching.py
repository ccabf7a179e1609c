"""Activation patching (causal tracing): what of the clean run, put into a corrupted one, brings its answer back.

The same sequence is read twice, with the clean picture and with a corrupted one. Then, for each place and layer, the
states of the clean reading replace those of the corrupted. The part before the picture is the same in both and is
computed once. Clean into clean changes nothing; every place of one layer brings everything back, exactly.

Sources: Meng et al. 2022 (arXiv 2202.05262); Basu et al. 2024 (arXiv 2406.04236) for pictures.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from llava_lab.capture import undisturbed
from llava_lab.checks import one_of, whole_number
from llava_lab.errors import LabError, OptionError
from llava_lab.interventions.knockout import windows_around
from llava_lab.interventions.plan import Spots, spots
from llava_lab.interventions.states import COMPONENTS, changing, parts
from llava_lab.models import read_picture
from llava_lab.models.layout import language_layers
from llava_lab.replay.alter import PATIENCE
from llava_lab.replay.fills import fill_pixels
from llava_lab.replay.prefix import Tail, image_tokens
from llava_lab.replay.score import read_scores
from llava_lab.replay.targets import Targets, Wanted, resolve_targets
from llava_lab.results import PatchGrid, Run

if TYPE_CHECKING:
    from llava_lab.models import Lab

CORRUPTIONS = ("grey", "blur", "noise")
SITES = ("image", "question", "cue", "last")


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
    seed: int = 0,
) -> PatchGrid:
    """Put the clean states of each site, in a window of `width` layers around each of `layers`, into the corrupted reading.

    `corrupt`: ``grey``, ``blur``, ``noise`` (of the clean picture's own size), another picture, or a Run whose picture is
    taken. `sites`: as `knockout`'s places. `components`: ``residual`` (what a layer gives on), ``attention``, ``mlp`` (what
    each adds). `layers` are the windows' centres, None for every layer. `metric`: best a contrast ("red", "blue"); None is
    the whole answer. Ctrl-C gives the cells that are done, the others NaN.

    Raises OptionError, TargetError, CheckpointError, PictureError, and LabError when a state did not arrive.
    """
    began = time.perf_counter()
    targets = resolve_targets(lab, clean, metric)
    places = _sites(clean, sites)
    for one in (
        components if isinstance(components, Sequence) and not isinstance(components, str) and components else (components,)
    ):
        one_of("components", one, COMPONENTS)
    centres = _centres(layers, len(language_layers(lab.model)))
    windows = windows_around(len(language_layers(lab.model)), whole_number("width", width, least=1), centres)
    with undisturbed(lab.model):
        two = _read_both(lab, clean, corrupt, targets, tuple(components), seed)
        scores, answers, proof, stopped = _grid(lab, two, tuple(components), places, windows)
    return PatchGrid(
        components=tuple(components),
        sites=tuple(one.name for one in places),
        windows=np.array(windows, np.int64),
        targets=targets,
        corruption=two.name,
        clean=two.clean,
        corrupt=two.corrupt,
        scores=scores,
        answers=answers,
        clean_answer=two.clean_word,
        corrupt_answer=two.corrupt_word,
        proof=proof,
        model=clean.model,
        fingerprint=clean.fingerprint,
        passes={"forward": two.tail.passes + 3},
        seconds=time.perf_counter() - began,
        interrupted=stopped,
        notes=_notes(two, scores, stopped),
    )


@contextmanager
def patched(
    lab: Lab, kept: dict[str, list[Tensor]], component: str, place: Spots, window: tuple[int, int], first: int
) -> Iterator[int]:
    """States `kept` by `keeping`, (layers) of (T, D) from position `first` on, in their places for every forward inside."""
    modules = parts(lab, component)
    attentions = parts(lab, "attention")
    seen = []
    with ExitStack() as stack:
        for layer in range(*window):
            states = kept[component][layer]
            fold = _from(states, first)
            seen.append(stack.enter_context(changing([modules[layer]], [attentions[layer]], place, fold)))
        yield len(seen)
    if any(not one.states for one in seen):
        raise LabError(f"expected {component} states to be replaced in {len(seen)} layers, got none in some; run one forward")


@contextmanager
def keeping(lab: Lab, components: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """What each layer's components give in the forward inside, lists over layers of (T, D)."""
    kept: dict[str, list[Tensor]] = {name: [] for name in components}
    handles: list[Any] = []

    def keep(name: str) -> Any:
        return lambda module, args, output: kept[name].append((output[0] if isinstance(output, tuple) else output)[0].detach())

    try:
        for name in components:
            handles += [module.register_forward_hook(keep(name)) for module in parts(lab, name)]
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _notes(two: _Two, scores: np.ndarray, stopped: bool) -> tuple[str, ...]:
    done = int((~np.isnan(scores[..., 0])).sum())
    notes: tuple[str, ...] = ("An answer is the likeliest token where the first target is predicted, given all tokens before.",)
    notes += (f"Interrupted after {done} of {scores[..., 0].size} cells; the rest is NaN.",) if stopped else ()
    if np.any(np.abs(two.clean - two.corrupt) <= 1e-6):
        notes += ("The corruption changes nothing for some target, so there is nothing to bring back: its values are NaN.",)
    return notes


@dataclass
class _Two:
    """The sequence read with both pictures; `tail` is the corrupted reading."""

    tail: Tail
    kept: dict[str, list[Tensor]]
    targets: Targets
    name: str
    clean: np.ndarray
    corrupt: np.ndarray
    clean_word: str
    corrupt_word: str


def _read_both(lab: Lab, clean: Run, corrupt: Any, targets: Targets, components: tuple[str, ...], seed: int) -> _Two:
    pixels, name = _corrupted(lab, clean, corrupt, seed)
    start = clean.segments["image"][0]
    first = Tail(lab, clean, targets, start)
    with keeping(lab, components) as kept:
        clean_logits = first.logits()
    tail = Tail(lab, clean, targets, start, image_tokens(lab, clean, pixels))
    corrupt_logits = tail.logits()
    found = [read_scores(one[None], tail.at, targets)[0].cpu().numpy() for one in (clean_logits, corrupt_logits)]
    words = [_word(lab, one, tail, targets) for one in (clean_logits, corrupt_logits)]
    return _Two(tail, kept, targets, name, found[0], found[1], words[0], words[1])


def _grid(
    lab: Lab, two: _Two, components: tuple[str, ...], places: list[Spots], windows: list[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray, dict[str, float], bool]:
    scores = np.full((len(components), len(places), len(windows), len(two.targets)), np.nan, np.float32)
    answers = np.full(scores.shape[:3], "", dtype="<U64")
    states, stopped = 0, False
    cells = list(np.ndindex(*scores.shape[:3]))
    try:
        for cell in tqdm(cells, desc="patching", unit="cell", delay=PATIENCE, leave=False):
            component, place, window = components[cell[0]], places[cell[1]], windows[cell[2]]
            with patched(lab, two.kept, component, place, window, two.tail.start) as layers:
                logits = two.tail.logits()
            states += layers * len(place.positions)
            scores[cell] = read_scores(logits[None], two.tail.at, two.targets)[0].cpu().numpy()
            answers[cell] = _word(lab, logits, two.tail, two.targets)
    except KeyboardInterrupt:
        stopped = True
        if np.isnan(scores).all():
            raise
    return scores, answers, {"states": float(states)}, stopped


def _word(lab: Lab, logits: Tensor, tail: Tail, targets: Targets) -> str:
    row = tail.at.index(targets[0].positions[0])
    return str(lab.tokenizer.decode([int(logits[row].argmax())])).strip()[:64]


def _from(states: Tensor, first: int) -> Any:
    def fold(now: Tensor, at: Tensor) -> Tensor:
        inside = at - first < len(states)  # what is generated later has no clean state
        return torch.where(inside[:, None], states[(at - first).clamp_max(len(states) - 1)], now)

    return fold


def _corrupted(lab: Lab, run: Run, corrupt: Any, seed: int) -> tuple[Tensor, str]:
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


def _sites(run: Run, sites: Any) -> list[Spots]:
    given = list(sites) if isinstance(sites, Sequence) and not isinstance(sites, str) else []
    if not given:
        raise OptionError(f"sites must be a list of places such as {', '.join(SITES)}, got {sites!r}")
    found = [spots(run, one, option="sites") for one in given]
    start = run.segments["image"][0]
    for one in found:
        if one.positions[-1] < start:
            raise OptionError(
                f"sites: {one.name} lies before the picture, where both readings are the same; choose a later place"
            )
    return found


def _centres(layers: Any, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    found = (
        [int(one) for one in layers] if isinstance(layers, Sequence | range | np.ndarray) and not isinstance(layers, str) else []
    )
    if not found or not all(0 <= one < count for one in found):
        raise OptionError(f"layers must be layer numbers from 0 to {count - 1}, or None for all; got {layers!r}")
    return found
