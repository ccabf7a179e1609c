"""What the logits say of image tokens: what each wrote into the target's logit, and what each would say by itself.

``direct_logit``: the state that predicts a word is a sum: its own embedding, what every attention head added in every
layer, and what every feed-forward layer added. With the final norm's scale held at the value it had, the logit is linear
in that sum, and a head's addition is in turn a sum over the positions it looked at: weight times value. The map adds up
what heads at the predicting position carried from each image position into the target's logit. Everything else is the
remainder and stands in the extras: text positions by segment, feed-forward layers, the embedding, biases, heads left out
by the options, and rounding. All parts together are the model's logit, summed over the target's tokens; for a contrast,
the difference of the two logits. Direct means the last step only: an image position's value at layer l already holds what
it read from others, and what travels through text positions or feed-forward layers is in the remainder. A logit has no
natural zero; ``centre=True`` measures it from the mean logit of the vocabulary (a contrast needs no such choice).

One forward. Beside it, for one layer at a time, stand its values in float32 (11 MB at LLaVA-1.5-7B) and a few tables
(readings x heads x positions) of 3 MB for 32 readings; kept are (readings x image positions) and (readings x layers x
heads), 0.2 MB. The peak of the process does not rise above a plain forward's.

``logit_lens_map``: how probable the target word is when a patch's state is read as if it were the last one. State 0 is
what the connector gives, state l the stream after l layers. Every state goes through the final norm exactly once and then
through the output head. (transformers' ``hidden_states[-1]`` is already normed; norming it again is the usual mistake.
Here all states are taken before the norm, the last one too.) Read several states and the strongest (or the mean) is
shown. vl-interp's internal confidence is the maximum over states and patches of such a reading, but it takes no final norm
and the most probable of a word's tokens, where this takes their mean. A word the lens cannot read may still be there in
another basis. One forward and the output head at each state read, about 40 MB beside it at 7B.

``tam``, the token activation map: where in the picture the image tokens themselves already say the word. The output head is
read at every image position for the word that was said (clipped at 0). Earlier words leave traces there too, so the part of
the map that their maps explain is taken away: their maps are averaged, each weighted by how much its own position wants the
word, and the least-squares multiple of that average is subtracted. The authors call it estimated causal inference; it is a
regression, nobody intervenes. A rank filter then mends single wild patches. It reads as the authors' program does, but for one
token: a question token is weighed at its own position, an answer token at the position that predicted it; tokens equal to the
explained one are left out; a factor for the *averaged* map. The one is the question's first: there the program takes the map of
whatever the model would have guessed at that position, here it is the token's own map like every other's. Values stay logits
(the authors rescale to 0..1 for display, which changes no order). The zero at which logits are clipped means nothing to
softmax: a word may lie below it everywhere, and the note then says so. One forward; beside it, at LLaVA-1.5-7B, about 30 MB
after the last layer (its states in float32, 2.3 kB per token of the text); at that width the peak of the process does not rise
above a plain forward's.

Sources: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; direct logit attribution as in Wang et
al. 2022 (arXiv 2211.00593); nostalgebraist 2020 (logit lens); Jiang et al. 2025 (arXiv 2410.02762) for its use on image
tokens; Li et al. 2025, "Token Activation Map to Visually Explain Multimodal LLMs" (arXiv 2506.23270, ICCV 2025).

    attribute(lab, run, method="direct_logit", target=("red", "blue"), heads=((14, 24),))
    attribute(lab, run, method="tam", target="red", filter=None)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from llava_lab.attribution.heads import Chosen, choose_heads
from llava_lab.attribution.method import Heads, Maps, Window, method
from llava_lab.capture import undisturbed, watch_attention
from llava_lab.capture.residual import HeadSources, joined_by, seen_by_heads, watch_outputs, watch_stream
from llava_lab.errors import LabError, OptionError
from llava_lab.models import Lab
from llava_lab.models.generation import precise
from llava_lab.models.layout import language_layers
from llava_lab.replay import words
from llava_lab.replay.targets import Targets
from llava_lab.results import Run

LEFT_OVER = {torch.float32: 1e-3, torch.float64: 1e-6}  # share of the parts' sizes that rounding may explain
LEFT_OVER_16 = 5e-2  # the same for 16-bit types
VOCABULARY = 4096  # rows of the output head at a time
TOP_HEADS = 8  # named in the extras


@method(
    truth="How much each image token wrote, through attention heads, directly into the target's logit.",
    source="direct logit attribution (Elhage et al. 2021; Wang et al. 2022, arXiv 2211.00593), split by source position",
    equation=r"\sum_{l,h}A^{lh}_{pj}\,\big(v^{lh}_j W^{lh}_O\big)\cdot\frac{\gamma\odot u_t}{\lVert h_p\rVert_{\mathrm{rms}}}",
    paper="https://arxiv.org/abs/2211.00593",
    cost="1 forward",
    blind_to="what image tokens said by way of text positions, other image tokens or feed-forward layers",
    needs="plain weights",
)
def direct_logit(
    lab: Lab, run: Run, targets: Targets, *, layers: Window = None, heads: Heads = None, centre: bool = False
) -> Maps:
    chosen = choose_heads(lab, layers, heads)
    readings, owners = [], []
    for number, target in enumerate(targets):
        against: Sequence[int | None] = target.against_ids or (None,) * len(target.token_ids)
        readings += [Reading(*reading) for reading in zip(target.positions, target.token_ids, against, strict=True)]
        owners += [number] * len(target.positions)
    split = split_logits(lab, run, readings, chosen, centre=centre)

    def summed(values: Tensor) -> Tensor:  # over each target's tokens
        return torch.zeros(len(targets), *values.shape[1:]).index_add_(0, torch.tensor(owners), values)

    values = summed(split.image)
    parts = {"image": values.sum(1), **{name: summed(part) for name, part in split.parts.items()}}
    parts["rounding"] = summed(split.rounding)
    listed = {name: part.tolist() for name, part in parts.items()}
    by_head = summed(split.by_head)
    extras = {
        "logit": summed(split.logit).tolist(),
        "parts": [{name: part[i] for name, part in listed.items()} for i in range(len(targets))],
        "image_by_layer": by_head.sum(-1).tolist(),
        "top_heads": [_strongest(table) for table in by_head],
    }
    notes = _direct_notes(centre, chosen, layers is None and heads is None, extras["parts"])
    return Maps(values.numpy().reshape(len(targets), run.map.rows, run.map.cols), {"forward": 1}, notes, extras)


def _strongest(table: Float[Tensor, "L H"]) -> list[dict[str, float]]:
    heads = table.shape[1]
    order = table.abs().flatten().argsort(descending=True, stable=True)[:TOP_HEADS].tolist()
    return [{"layer": i // heads, "head": i % heads, "value": float(table[i // heads, i % heads])} for i in order]


def _direct_notes(centre: bool, chosen: Chosen, whole: bool, parts: list[dict[str, float]]) -> tuple[str, ...]:
    what = "logit above the vocabulary's mean logit" if centre else "logit"
    image = sum(abs(value) for part in parts for name, value in part.items() if name.startswith("image"))
    everything = sum(abs(value) for part in parts for value in part.values())
    notes = [
        f"What each image token wrote directly into the target's {what} (for a contrast: the difference of two logits), "
        "the final norm's scale held fixed; negative spoke against the word.",
        f"Image tokens make up {image / everything if everything else 0:.0%} of the parts' absolute sizes; "
        "the remainder (text, feed-forward layers, embedding, biases) is in the extras.",
    ]
    if not whole:
        notes.append(f"The map holds {chosen}; the other heads are 'image_left_out' in the extras.")
    return tuple(notes)


@method(
    truth="How probable the target word is when each image token's intermediate state is read as if it were the last one.",
    source="logit lens (nostalgebraist 2020) on image tokens (Jiang et al. 2025, arXiv 2410.02762)",
    equation=r"\max_l\ \mathrm{softmax}\big(U\,\mathrm{norm}(h^{l}_j)\big)_t",
    paper="https://arxiv.org/abs/2410.02762",
    cost="1 forward, and the output head at each image token and state read",
    blind_to="the question, whether the answer ever read these positions, and anything not written in the output head's basis",
    needs="plain weights",
)
def logit_lens_map(
    lab: Lab,
    run: Run,
    targets: Targets,
    *,
    layers: int | Window = None,
    value: Literal["probability", "logit"] = "probability",
    reduce: Literal["max", "mean"] = "max",
) -> Maps:
    decoder = language_layers(lab.model)
    start, stop = words.state_window(layers, len(decoder))
    ids = sorted({i for target in targets for i in (*target.token_ids, *target.against_ids)})
    image = slice(*run.segments["image"])
    read: list[Tensor] = []  # one (P, N) table per state

    def fold(number: int, state: Tensor) -> None:
        if start <= number < stop:
            normed = words.final_norm(lab)(state[0, image])
            logits = words.token_logits(lab, normed, ids)
            if value == "probability":
                logits = (precise(logits) - words.log_total(lab, normed)[:, None]).exp().float()
            read.append(logits.cpu())

    with undisturbed(lab.model), watch_stream(decoder, fold):
        lab.model(**lab.inputs(run), use_cache=False, logits_to_keep=1)
    table = torch.stack(read).numpy()  # states, P, N
    column = {token: i for i, token in enumerate(ids)}
    over_states = np.max if reduce == "max" else np.mean
    values, by_state = [], []
    for target in targets:
        strongest = table[:, :, [column[i] for i in target.token_ids]].mean(-1)  # states, P
        shown = over_states(strongest, 0)
        if target.against_ids:
            other = table[:, :, [column[i] for i in target.against_ids]].mean(-1)
            shown, strongest = shown - over_states(other, 0), strongest - other
        values.append(shown.reshape(run.map.rows, run.map.cols))
        by_state.append(strongest.max(1).tolist())
    best = [start + int(np.argmax(row)) for row in by_state]
    places = f"states {start} to {stop - 1}" if stop - start > 1 else f"state {start}"
    note = (
        f"{'Probability' if value == 'probability' else 'Logit'} of the target word at each image position, read at {places} of "
        f"0 to {len(decoder)}{f', {reduce} over them' if stop - start > 1 else ''}; each state normed once; "
        "mean over the target's tokens (for a contrast: the difference of the two words)."
    )
    extras = {"states": list(range(start, stop)), "strongest_patch_by_state": by_state, "strongest_state": best}
    return Maps(np.stack(values).astype(np.float32), {"forward": 1}, (note,), extras)


# -- one logit taken apart --------------------------------------------------------------------


class Reading(NamedTuple):
    """One number to take apart: the logit of a token at a position, or its difference from another's."""

    position: int
    said: int
    against: int | None = None


@dataclass(frozen=True)
class Split:
    """The parts of each reading, float32 on the CPU. ``image.sum(1)`` and all of `parts` and `rounding` make `logit`."""

    image: Float[Tensor, "N P"]  # through the chosen heads
    by_head: Float[Tensor, "N L H"]  # image positions through every head of every layer
    parts: dict[str, Tensor]  # name -> (N,): image_left_out, each text segment, mlp, embedding, bias
    logit: Float[Tensor, " N"]  # as the model itself gave it
    rounding: Float[Tensor, " N"]


def split_logits(lab: Lab, run: Run, readings: Sequence[Reading], chosen: Chosen, *, centre: bool = False) -> Split:
    """Take the readings apart in one forward. `centre` measures logits from the vocabulary's mean logit.

    Raises LabError when the model is not made of parts that add up (another norm, parallel or scaled branches,
    quantised output projections).
    """
    layers = language_layers(lab.model)
    at = sorted({reading.position for reading in readings})
    row = torch.tensor([at.index(reading.position) for reading in readings])
    with undisturbed(lab.model):
        rows, offsets = _directions(lab, readings, centre)
        norm = words.final_norm(lab)
        books = _Books(rows * words.norm_gain(norm, rows.shape[1]).to(rows.device), row, run.segments, chosen, len(layers))
    keep = torch.tensor(at, device=lab.device)
    with (
        undisturbed(lab.model),
        watch_stream(layers, lambda number, state: books.stream(number, state[0, at])),
        watch_outputs(_feed_forward(layers), lambda _, output: books.wrote("mlp", output[0, at])),
        watch_attention(layers, HeadSources(at, lambda number, *found: books.heads_wrote(number, layers[number], *found))),
    ):
        logits = lab.model(**lab.inputs(run), use_cache=False, logits_to_keep=keep).logits[0].float().cpu()
    assert books.last is not None
    with undisturbed(lab.model):
        scale = words.norm_scale(norm, books.last).cpu()[row]
    return books.closed(scale, _said(logits[row], readings, centre), offsets.cpu(), books.last.dtype)


class _Books:
    """Contributions of one forward to each reading, before the norm's scale."""

    def __init__(
        self, directions: Float[Tensor, "N W"], row: Tensor, segments: dict[str, tuple[int, int]], chosen: Chosen, layers: int
    ) -> None:
        self.directions, self.row, self.segments, self.chosen, self.count = directions, row, segments, chosen, layers
        readings, (start, stop) = len(directions), segments["image"]
        self.image = torch.zeros(readings, stop - start)
        self.by_head: list[Tensor] = []
        names = ("image_left_out", *(name for name in segments if name != "image"), "mlp", "embedding", "bias")
        self.parts = {name: torch.zeros(readings) for name in names}
        self.last: Tensor | None = None  # the wanted rows of the stream before the final norm

    def stream(self, number: int, state: Float[Tensor, "Q W"]) -> None:
        if number == 0:
            self.wrote("embedding", state)
        elif number == self.count:
            self.last = state

    def wrote(self, part: str, output: Float[Tensor, "Q W"]) -> None:
        """Add what a part of the model put into the stream at each reading's position."""
        self.parts[part] += (output.float().cpu()[self.row] * self.directions.cpu()).sum(-1)

    def heads_wrote(self, number: int, layer: nn.Module, weights: Float[Tensor, "H Q K"], values: Float[Tensor, "H K D"]) -> None:
        """Add one layer's attention: weight times (value . direction, seen through the head's output)."""
        seen = seen_by_heads(layer, self.directions).to(values.device)  # N H D
        carried = torch.einsum("nhd,hkd->nhk", seen, values.float())
        carried = (carried * weights[:, self.row.to(weights.device)].transpose(0, 1)).cpu()
        image = carried[:, :, slice(*self.segments["image"])]
        self.by_head.append(image.sum(-1))
        shown = torch.zeros(image.shape[1])
        if number in self.chosen.layers:
            wanted = self.chosen.of(number)
            shown[slice(None) if wanted is None else list(wanted)] = 1.0
        self.image += torch.einsum("h,nhp->np", shown, image)
        self.parts["image_left_out"] += self.by_head[-1] @ (1 - shown)
        for name, (start, stop) in self.segments.items():
            if name != "image":
                self.parts[name] += carried[:, :, start:stop].sum((1, 2))
        bias = joined_by(layer).bias
        if bias is not None:
            self.parts["bias"] += self.directions.cpu() @ bias.detach().float().cpu()

    def closed(self, scale: Float[Tensor, " N"], logit: Float[Tensor, " N"], offsets: Tensor, dtype: torch.dtype) -> Split:
        """Everything times the norm's scale, checked against the model's own logits."""
        image, parts = self.image * scale[:, None], {name: part * scale for name, part in self.parts.items()}
        parts["bias"] = parts["bias"] + offsets
        everything = torch.stack([image.sum(1), *parts.values()])
        rounding = logit - everything.sum(0)
        if bool((rounding.abs() > LEFT_OVER.get(dtype, LEFT_OVER_16) * everything.abs().sum(0) + 1e-5).any()):
            raise LabError(
                f"expected parts that add up to the logit, {float(rounding.abs().max()):.3g} is missing; this model's layers "
                "do more than add attention and feed-forward outputs, so its logits cannot be split"
            )
        return Split(image, torch.stack(self.by_head, 1) * scale[:, None, None], parts, logit, rounding)


def _directions(lab: Lab, readings: Sequence[Reading], centre: bool) -> tuple[Float[Tensor, "N W"], Float[Tensor, " N"]]:
    """The direction of the normed state that each reading reads, and the output head's bias in it."""
    rows, offsets = words.word_rows(lab, [reading.said for reading in readings])
    pairs = [(i, reading.against) for i, reading in enumerate(readings) if reading.against is not None]
    if pairs:
        where, against = [i for i, _ in pairs], [token for _, token in pairs]
        less, less_offset = words.word_rows(lab, against)
        rows[where] -= less
        offsets[where] -= less_offset
    plain = [i for i, reading in enumerate(readings) if reading.against is None]
    if centre and plain:
        head = words.output_head(lab)
        total = torch.stack([part.float().sum(0) for part in head.weight.detach().split(VOCABULARY)]).sum(0)
        rows[plain] -= total / len(head.weight)
        offsets[plain] -= 0.0 if head.bias is None else head.bias.detach().float().mean()
    return rows, offsets


def _said(logits: Float[Tensor, "N V"], readings: Sequence[Reading], centre: bool) -> Float[Tensor, " N"]:
    """The model's own numbers that the parts must add up to."""
    return torch.stack(
        [
            row[reading.said] - (row[reading.against] if reading.against is not None else row.mean() if centre else 0.0)
            for row, reading in zip(logits, readings, strict=True)
        ]
    )


def _feed_forward(layers: Sequence[nn.Module]) -> list[nn.Module]:
    found = [part for layer in layers if isinstance(part := getattr(layer, "mlp", None), nn.Module)]
    if len(found) != len(layers):
        raise LabError(f"expected layers with attention and an mlp, got {type(layers[0]).__name__}; its logits cannot be split")
    return found


# -- token activation map -----------------------------------------------------------------

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
    logits = _read(lab, run, targets)
    values, extras = [], []
    for target in targets:
        said, about = _target_map(logits, run, target.positions, target.token_ids, correction, clip, size)
        other, _ = _target_map(logits, run, target.positions, target.against_ids, correction, clip, size)
        values.append(said - other if target.against_ids else said)
        extras.append(about)
    notes = [_note(correction, clip, size)]
    empty = [target.text for target, value in zip(targets, values, strict=True) if not np.any(value)]
    if empty:
        named = ", ".join(map(repr, empty))
        notes.append(f"The map of {named} is empty: after clipping and correction no image position is left above 0.")
    return Maps(np.stack(values).astype(np.float32), {"forward": 1}, tuple(notes), {"correction": extras})


def _read(lab: Lab, run: Run, targets: Targets) -> dict[int, np.ndarray]:
    """Every logit the method needs, read once: by token id, at every position (T,)."""
    layers = language_layers(lab.model)
    kept: list[Tensor] = []

    def keep(number: int, state: Tensor) -> None:
        if number == len(layers):
            kept.append(state[0])

    text = {int(i) for name, (a, b) in run.segments.items() if name != "image" for i in run.token_ids[a:b]}
    ids = sorted(text | {i for target in targets for i in (*target.token_ids, *target.against_ids)})
    with undisturbed(lab.model), watch_stream(layers, keep):
        lab.model(**lab.inputs(run), use_cache=False, logits_to_keep=1)
    with undisturbed(lab.model):
        logits: Float[Tensor, "T N"] = words.token_logits(lab, words.final_norm(lab)(kept[0]), ids)
    return dict(zip(ids, logits.cpu().numpy().astype(np.float64).T, strict=True))


def _target_map(
    logits: dict[int, np.ndarray], run: Run, at: tuple[int, ...], ids: tuple[int, ...], correction: str, clip: bool, size: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """The mean map of one target's tokens, and what earlier tokens explained of it, as a share of the raw map's power."""
    grid, image = (run.map.rows, run.map.cols), slice(*run.segments["image"])
    total, factors, raw_power, power = np.zeros(grid), [], 0.0, 0.0
    weight_of: dict[int, float] = {}
    for position, token in zip(at, ids, strict=False):
        raw = _clipped(logits[token][image], clip)
        earlier = _earlier(run, position, token, correction)
        weights = np.array([logits[token][read_at] for _, read_at in earlier])
        others = np.array([_clipped(logits[int(run.token_ids[stands])][image], clip) for stands, _ in earlier])
        left, factor = without_context(raw, others, weights) if earlier else (raw, 0.0)
        factors.append(factor)
        raw_power, power = raw_power + float(raw @ raw), power + float(left @ left)
        for (stands, _), weight in zip(earlier, np.clip(weights, 0, None), strict=True):
            weight_of[stands] = weight_of.get(stands, 0.0) + float(weight)
        one = _clipped(left, clip).reshape(grid)
        total += (rank_filter(one, size) if size > 1 else one) / len(ids)
    top = sorted(weight_of, key=lambda stands: -weight_of[stands])[:SHOWN]
    shown = [{"position": i, "token": run.tokens[i], "weight": weight_of[i]} for i in top if weight_of[i] > 0]
    removed = 1 - power / raw_power if raw_power > 0 else 0.0
    return total, {"factor": float(np.mean(factors)) if factors else 0.0, "removed_share": removed, "earlier": shown}


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
