"""Token activation map: where in the picture the image tokens themselves already say the word.

The output head is read at every image position for the word that was said (clipped at 0). Earlier words
leave traces there too, so the part of the map that their maps explain is taken away: their maps are
averaged, each weighted by how much its own position wants the word, and the least-squares multiple of that
average is subtracted. The authors call it estimated causal inference; it is a regression, nobody
intervenes. A rank filter then mends single wild patches.

Read as the authors' program does, but for one token: a question token is weighed at its own position, an answer token at
the position that predicted it; tokens equal to the explained one are left out; a factor for the *averaged* map. The one is
the question's first: there the program takes the map of whatever the model would have guessed at that position, here it
is the token's own map like every other's. Values stay logits (the authors rescale to 0..1 for display, which changes no
order). The zero at which logits are clipped means nothing to softmax: a word may lie below it everywhere, and the note then
says so.

One forward; beside it, at LLaVA-1.5-7B, about 30 MB after the last layer (its states in float32, 2.3 kB per token of
the text); at that width the peak of the process does not rise above a plain forward's.

Source: Li et al. 2025, "Token Activation Map to Visually Explain Multimodal LLMs" (arXiv 2506.23270, ICCV 2025).

    attribute(lab, run, method="tam", target="red", filter=None)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor

from llava_lab.attribution.method import Maps, method
from llava_lab.capture import undisturbed
from llava_lab.capture.residual import watch_stream
from llava_lab.errors import OptionError
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers
from llava_lab.replay.targets import Targets
from llava_lab.replay.words import final_norm, token_logits
from llava_lab.results import Run

SHOWN = 5  # earlier tokens named in the extras


@method(
    truth="How strongly each image token's own last state asks for the target word, beyond what earlier words' maps explain.",
    source="Li et al. 2025 (arXiv 2506.23270), token activation map; the question's first token read like the others",
    equation=r"\big(u_t\cdot h_j-\sum_{w\lt t}\beta_w\,u_w\cdot h_j\big)^{+}",
    paper="https://arxiv.org/abs/2506.23270",
    cost="1 forward",
    blind_to="the question before correction, whether the answer ever read these positions, and a word below logit 0",
    needs="plain weights",
)
def tam(
    lab: Lab,
    run: Run,
    targets: Targets,
    *,
    correction: Literal["context", "answer", "none"] = "context",
    clip: bool = True,
    filter: int | None = 3,  # noqa: A002, its name is what users write
) -> Maps:
    size = _filter_size(filter, min(run.map.rows, run.map.cols))
    book = _read(lab, run, targets)
    values, extras = [], []
    for target in targets:
        said = _target_map(book, run, target.positions, target.token_ids, correction, clip, size)
        other = _target_map(book, run, target.positions, target.against_ids, correction, clip, size)
        values.append(said.map - other.map if target.against_ids else said.map)
        extras.append({"factor": said.factor, "removed_share": said.removed, "earlier": said.earlier})
    notes = [_note(correction, clip, size)]
    empty = [target.text for target, value in zip(targets, values, strict=True) if not np.any(value)]
    if empty:
        named = ", ".join(map(repr, empty))
        notes.append(f"The map of {named} is empty: after clipping and correction no image position is left above 0.")
    return Maps(np.stack(values).astype(np.float32), {"forward": 1}, tuple(notes), {"correction": extras})


@dataclass(frozen=True)
class _Book:
    """Every logit the method needs, read once, float32."""

    column: dict[int, int]  # token id -> column
    image: np.ndarray  # (P, N): logits at the image positions
    text: np.ndarray  # (T, N): logits at every position


def _read(lab: Lab, run: Run, targets: Targets) -> _Book:
    layers = language_layers(lab.model)
    kept: list[Tensor] = []

    def keep(number: int, state: Tensor) -> None:
        if number == len(layers):
            kept.append(state[0])

    image = slice(*run.segments["image"])
    text = {int(i) for name, (a, b) in run.segments.items() if name != "image" for i in run.token_ids[a:b]}
    ids = sorted(text | {i for target in targets for i in (*target.token_ids, *target.against_ids)})
    with undisturbed(lab.model), watch_stream(layers, keep):
        lab.model(**lab.inputs(run), use_cache=False, logits_to_keep=1)
    with undisturbed(lab.model):
        logits: Float[Tensor, "T N"] = token_logits(lab, final_norm(lab)(kept[0]), ids)
    table = logits.cpu().numpy().astype(np.float64)
    return _Book({token: i for i, token in enumerate(ids)}, table[image], table)


@dataclass(frozen=True)
class _One:
    """The map of one target's tokens, averaged over them."""

    map: np.ndarray
    factor: float
    removed: float  # share of the raw map's power that earlier tokens explained
    earlier: list[dict[str, Any]]


def _target_map(
    book: _Book, run: Run, positions: tuple[int, ...], ids: tuple[int, ...], correction: str, clip: bool, size: int
) -> _One:
    grid = run.map.rows, run.map.cols
    total, factors, raw_power, power = np.zeros(grid), [], 0.0, 0.0
    weight_of: dict[int, float] = {}
    for position, token in zip(positions, ids, strict=False):
        raw = _clipped(book.image[:, book.column[token]], clip)
        earlier = _earlier(run, position, token, correction)
        weights = np.array([book.text[read_at, book.column[token]] for _, read_at in earlier])
        others = np.array([_clipped(book.image[:, book.column[int(run.token_ids[at])]], clip) for at, _ in earlier])
        left, factor = without_context(raw, others, weights) if earlier else (raw, 0.0)
        factors.append(factor)
        raw_power, power = raw_power + float(raw @ raw), power + float(left @ left)
        for (at, _), weight in zip(earlier, np.clip(weights, 0, None), strict=True):
            weight_of[at] = weight_of.get(at, 0.0) + float(weight)
        one = _clipped(left, clip).reshape(grid)
        total += (rank_filter(one, size) if size > 1 else one) / len(ids)
    top = sorted(weight_of, key=lambda at: -weight_of[at])[:SHOWN]
    shown = [{"position": at, "token": run.tokens[at], "weight": weight_of[at]} for at in top if weight_of[at] > 0]
    removed = 1 - power / raw_power if raw_power > 0 else 0.0
    return _One(total, float(np.mean(factors)) if factors else 0.0, removed, shown)


def _earlier(run: Run, position: int, token: int, correction: str) -> list[tuple[int, int]]:
    """(where it stands, where its weight is read) of every earlier text token of another id than `token`."""
    if correction == "none":
        return []
    names = ("answer",) if correction == "answer" else ("history", "question", "answer")
    found = []
    for name in names:
        start, stop = run.segments.get(name, (0, 0))
        for at in range(start, min(stop, position + 1)):  # the token being predicted stands at position + 1
            if int(run.token_ids[at]) != token:
                found.append((at, at - 1 if name == "answer" else at))
    return found


def _clipped(values: np.ndarray, clip: bool) -> np.ndarray:
    return np.clip(values, 0, None) if clip else values


def _filter_size(value: Any, side: int) -> int:
    """Window of the rank filter; 1 is none."""
    if value is None:
        return 1
    odd = isinstance(value, int) and not isinstance(value, bool) and value % 2 == 1
    if not odd or not 1 <= value <= side:
        raise OptionError(f"filter must be None or an odd window from 1 to {side} patches, got {value!r}")
    return int(value)


def rank_filter(values: np.ndarray, size: int) -> np.ndarray:
    """Each cell becomes a weighted mean of its `size x size` window's sorted values, weights a Gaussian over ranks.

    The Gaussian is centred on the median and its width is the window's coefficient of variation, so that calm
    windows keep their median. Borders are mirrored. Values (rows, cols).
    """
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(values.astype(np.float64), size // 2, mode="reflect"), (size, size))
    ranked = np.sort(windows.reshape(*values.shape, -1), axis=-1)
    mean, spread = np.abs(ranked.mean(-1)), ranked.std(-1)
    width = np.divide(spread, mean, out=np.zeros_like(mean), where=mean > 0)
    offset = np.arange(size * size) - size * size // 2
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = np.exp(-(offset**2) / (2 * width[..., None] ** 2))
    weights[..., size * size // 2] = 1.0  # its own distance is 0, also where the width is
    filtered = (ranked * weights).sum(-1) / weights.sum(-1)
    return np.where(mean > 0, filtered, 0.0)


def without_context(own: np.ndarray, others: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, float]:
    """`own` (P,) minus the least-squares multiple of the weighted mean of `others` (J, P), and that multiple.

    weights (J,) are clipped at 0; when none is left, nothing is subtracted.
    """
    kept = np.clip(weights, 0, None)
    if not kept.sum() > 0:
        return own, 0.0
    common = (kept / kept.sum()) @ others
    power = float(common @ common)
    factor = float(own @ common) / power if power > 0 else 0.0
    return own - factor * common, factor


def _note(correction: str, clip: bool, size: int) -> str:
    kept = {
        "context": "minus what the maps of earlier question and answer tokens explain",
        "answer": "minus what the maps of earlier answer tokens explain",
        "none": "without the correction for earlier tokens",
    }[correction]
    smooth = f"rank filter of {size}x{size} patches" if size > 1 else "no filter"
    cut = "clipped at 0" if clip else "not clipped"
    return f"Logit of the target at each image position's last state, {cut}, {kept}, {smooth}; mean over the target's tokens."
