"""Results as the plain data a page can hold: one small dict, the picture once, the maps once as bytes.

A map travels as uint8 levels with its own offset and step (``value = offset + level * step``), so a
64-word, 32-layer, 24x24 answer is 1.2 MB and needs no decoding in the browser. Levels are exact to
1/255 of that map's range; the real numbers stay in Python. Colours are shared: every method has one
low and one high over all its maps.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from llava_lab.checks import is_list, is_result, is_whole, shown
from llava_lab.errors import OptionError

if TYPE_CHECKING:
    from llava_lab.results import Relevance, Run, Target

Layers = list[tuple[str, "Relevance"]]

PICTURE_SIDE = 1000  # the longest side sent to the page, pixels
PNG_LIMIT = 400_000  # bytes; beyond it a photograph travels as JPEG
LEVELS = 255
SIGNED_STEPS = 127  # steps either side of zero, so that zero is exact
OLD_CONTROLS = ("random", "center", "edges", "inverse", "vision")  # of results saved before they said so themselves


@dataclass(frozen=True)
class Packed:
    """What the page is given: `spec` (JSON-able), the picture file, all levels, and (offset, step) per map."""

    spec: dict[str, Any]
    picture: bytes
    maps: bytes  # uint8 (methods, layers, targets, rows, cols), methods one after the other
    scales: bytes  # little-endian float32 (maps, 2)


def pack(
    run: Run,
    relevance: Mapping[str, Relevance | Sequence[tuple[str, Relevance]]],
    *,
    beats_random: Mapping[str, Any] | None = None,
) -> Packed:
    """Check that the maps belong to the run, and pack both.

    `beats_random`: by method, one bool or one per target; None where it was not measured.
    """
    methods = {name: as_layers(name, given) for name, given in named(relevance).items()}
    beats = known({} if beats_random is None else beats_random, methods, "beats_random")
    for name, layers in methods.items():
        for _, rel in layers:
            check_fits(run, name, rel)
    chips = chips_of(run, methods)
    parts, scales, described, first = [], [], [], 0
    for name, layers in methods.items():
        values = np.stack([rel.drawn for _, rel in layers]).astype(np.float64)  # layers, targets, rows, cols
        levels, scale, lo, hi = quantize(values)
        verdicts = [_verdict(name, one) for one in per_target(name, layers, beats.get(name), "beats_random")]
        described.append({**_method(name, layers, chips, first, lo, hi), "beats": verdicts})
        parts.append(levels.tobytes())
        scales.append(scale.astype("<f4").tobytes())
        first += values.shape[0] * values.shape[1]
    picture, kind = encode_picture(run.picture)
    spec = {
        **head_of(run),
        "chips": [chip_of(run, chip) for chip in chips],
        "methods": described,
        "picture": kind,
        "palettes": palettes(),
    }
    return Packed(spec, picture, b"".join(parts), b"".join(scales))


def check_fits(run: Run, name: str, result: Any) -> None:
    """Refuse a result of another checkpoint, picture or answer, one with holes, and an empty one."""
    if result.fingerprint != run.fingerprint:
        raise OptionError(
            f"{name!r} explains another checkpoint ({result.model}) than the run's ({run.model}); attribute this run"
        )
    if result.map != run.map:
        raise OptionError(f"{name!r} was made on another picture geometry than the run's; attribute this run")
    if not np.isfinite(result.values).all():
        raise OptionError(f"{name!r} holds values that are not finite; a map cannot be drawn from them")
    if not result.targets:
        raise OptionError(f"{name!r} explains no target; a map cannot be drawn from it")
    for target in result.targets:
        if target.kind != "contrast" and not _said(run, target):
            raise OptionError(f"{name!r} explains {target.text!r}, which this run does not say there; attribute this run")


def as_layers(name: str, given: Relevance | Sequence[tuple[str, Relevance]]) -> Layers:
    """One relevance, or (layer label, relevance) pairs, always as pairs."""
    if is_result(given, "relevance"):
        return [("", given)]  # type: ignore[list-item]
    if not is_list(given) or not all(is_list(pair) and len(pair) == 2 and is_result(pair[1], "relevance") for pair in given):
        raise OptionError(f"{name!r} must be a map (ll.attribute gives one) or a list of (layer label, map), got {shown(given)}")
    pairs = [(str(label), rel) for label, rel in given]
    if not pairs:
        raise OptionError(f"{name!r} has no layers; give a Relevance or a list of (layer label, Relevance)")
    if len({rel.targets for _, rel in pairs}) > 1:
        raise OptionError(f"the layers of {name!r} explain different targets; explain the same ones in every layer")
    return pairs


def chips_of(run: Run, methods: Mapping[str, Layers]) -> list[Target]:
    """What can be pointed at: the answer's words, then whatever else some method explains."""
    chips = list(run.word_targets())
    for layers in methods.values():
        for target in layers[0][1].targets:
            if _find(chips, target) < 0:
                chips.append(target)
    return chips


def chip_of(run: Run, target: Target) -> dict[str, Any]:
    """A target as the page names it. Its `key` says what it means, so that linked views find their own chip for it."""
    against = "".join(f"-{token}" for token in target.against_ids)
    key = f"{target.kind} {','.join(map(str, target.positions))}{against}"
    return {"text": target.text, "kind": target.kind, "p": _chip_probability(run, target), "key": key}


def head_of(run: Run) -> dict[str, Any]:
    """What every view says about the run."""
    said = {"question": run.question, "answer": run.answer_shown, "model": run.model, "seed": run.seed, "map": run.map.to_dict()}
    return {**said, "cut": run.cut, "told": list(run.notes), "knows": run.knows}


def known(given: Mapping[str, Any], methods: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """`given` by method, refused where it is none, and where it names a method that has no map."""
    if not isinstance(given, Mapping):
        raise OptionError(f"{what} must be a dictionary by method, got {shown(given)}")
    for name in given:
        if name not in methods:
            raise OptionError(f"{what} names {name!r}, which has no map; the maps are {', '.join(methods)}")
    return given


def per_target(name: str, layers: Layers, given: Any, what: str) -> list[Any]:
    """One value per target of a method, from one for all or a sequence of them."""
    count = len(layers[0][1].targets)
    if isinstance(given, (Sequence, np.ndarray)) and not isinstance(given, str):
        if len(given) != count:
            raise OptionError(f"{what} has {len(given)} values for the {count} targets of {name!r}; give one for each, or one")
        return list(given)
    return [given] * count


def quantize(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Levels, (offset, step) per map, and the colour range over all maps.

    `values` is float (..., rows, cols). Where anything is negative the range is centred on zero.
    """
    flat = values.reshape(-1, *values.shape[-2:])
    if float(flat.min()) < 0:
        peak = np.abs(flat).max(axis=(1, 2))
        step, zero = peak / SIGNED_STEPS, SIGNED_STEPS + 1.0
        offset, reach = -zero * step, float(peak.max())
        lo, hi = -reach, reach
    else:
        offset, top = flat.min(axis=(1, 2)), flat.max(axis=(1, 2))
        step = (top - offset) / LEVELS
        lo, hi = float(offset.min()), float(top.max())
    safe = np.where(step > 0, step, 1.0)[:, None, None]
    levels = np.rint((flat - offset[:, None, None]) / safe).astype(np.uint8)
    return levels, np.stack([offset, step], axis=1), lo, hi


def encode_picture(picture: np.ndarray) -> tuple[bytes, str]:
    """The picture as a file no longer than `PICTURE_SIDE` on a side, and its media type. Raises OptionError for none."""
    if not picture.size:
        raise OptionError("this question was asked without a picture, so there is none to point at; ask it with one")
    image = Image.fromarray(picture)
    if max(image.size) > PICTURE_SIDE:
        image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    raw = image_bytes(image, optimize=True)
    return (raw, "image/png") if len(raw) <= PNG_LIMIT else (image_bytes(image, "JPEG", quality=90), "image/jpeg")


def image_bytes(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def palettes() -> dict[str, str]:
    """All colour scales as the page reads them; figures and stills use the same table."""
    from llava_lab.plots import palette

    return {name: colors.tobytes().hex() for name, colors in palette.palettes().items()}


def answer_words(run: Run) -> list[dict[str, Any]]:
    """The answer's words with the probability the model gave each."""
    return [{"text": word.text, "p": probability(run, word.start, word.stop)} for word in run.words]


def probability(run: Run, start: int, stop: int) -> float | None:
    """Product of the token probabilities at sequence positions [start, stop); None where none are known."""
    first = run.segments["answer"][0]
    some = np.asarray(run.logprobs, np.float64)[start - first : stop - first]
    return float(np.exp(some.sum())) if len(some) else None


def whole_probability(run: Run) -> float | None:
    """Probability of the whole answer as given: product over its tokens."""
    return probability(run, *run.segments["answer"])


def is_control(rel: Relevance) -> bool:
    """Was the map made without the model or without the question, to compare others with?"""
    return getattr(rel, "control", False) or rel.method in OLD_CONTROLS


def plain_value(value: Any) -> str:
    """An option's value as a person reads it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def named(relevance: Any) -> Mapping[str, Any]:
    """`relevance` if it is a dictionary of something by names. Raises OptionError."""
    if not isinstance(relevance, Mapping) or not relevance:
        got = "an empty mapping" if isinstance(relevance, Mapping) else type(relevance).__name__
        raise OptionError(f'expected the maps by name, as {{"rollout": rel}}, got {got}')
    if not all(isinstance(name, str) for name in relevance):
        raise OptionError(f"maps are named by text, got {shown(list(relevance))}")
    return relevance


# -- private ----------------------------------------------------------------------------------


def _verdict(name: str, given: Any) -> bool | None:
    if given is None or isinstance(given, (bool, np.bool_)):
        return None if given is None else bool(given)
    if is_whole(given) and given in (0, 1):
        return bool(given)
    raise OptionError(f"beats_random of {name!r} must be True, False, or None for unknown, got {shown(given)}")


def _said(run: Run, target: Target) -> bool:
    """Does the run have the target's tokens where the target points?"""
    spelt = [position + 1 for position in target.positions]
    return max(spelt, default=0) < len(run.token_ids) and tuple(int(run.token_ids[i]) for i in spelt) == target.token_ids


def _method(name: str, layers: Layers, chips: list[Target], first: int, lo: float, hi: float) -> dict[str, Any]:
    rel = layers[0][1]
    targets = list(rel.targets)
    kinds = [target.kind for target in targets]
    return {
        "name": name,
        "control": is_control(rel),
        "signed": lo < 0,
        "lo": lo,
        "hi": hi,
        "first": first,
        "targets": len(targets),
        "layers": [label for label, _ in layers],
        "chips": [_find(targets, chip) for chip in chips],
        "whole": kinds.index("answer") if "answer" in kinds else -1,
        "caption": _caption(rel),
        "notes": list(rel.notes),
        "floors": [max(float(own.noise_floor[at]) for _, own in layers) for at in range(len(targets))],
    }


def _find(targets: list[Target], wanted: Target) -> int:
    """A target's place by what it means, so that a word found twice is told apart by position."""
    for index, target in enumerate(targets):
        if (target.kind, target.positions, target.against_ids) == (wanted.kind, wanted.positions, wanted.against_ids):
            return index
    return -1


def _caption(rel: Relevance) -> str:
    options = [f"{key} {plain_value(value)}" for key, value in rel.options.items() if value is not None]
    cost = [f"{count} {name} pass{'' if count == 1 else 'es'}" for name, count in rel.passes.items() if count]
    return " · ".join([rel.method, *options, *cost, f"{rel.seconds:.2g} s"])


def _chip_probability(run: Run, chip: Target) -> float | None:
    if chip.kind == "contrast" or not chip.positions:
        return None
    return probability(run, chip.positions[0] + 1, chip.positions[-1] + 2)
