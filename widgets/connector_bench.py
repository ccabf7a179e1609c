"""ConnectorBench: two connectors side by side on one picture and question, and the linear fit at every rank.

Answers with probabilities, maps on one scale, nearest words, what one map has more of. Pointing at a patch lights it
in all maps. The rank slider is answered in the browser from maps and answers that were made before. Python hears of
`rank` and `selected`.

Every connector and every rank of the linear fit is a `Seen`, made by `seen`: its run, its map, its nearest words. All
travel at once in one buffer of quantised maps.

    ConnectorBench(seen("trained", run, relevance), seen("linear", other, its_relevance))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets

from llava_lab.checks import as_python, entry, is_list, is_result, is_whole, shown
from llava_lab.errors import OptionError
from widgets.base import PictureWidget, TraitRefused
from widgets.pack import answer_words, encode_picture, head_of, palettes, quantize, whole_probability

if TYPE_CHECKING:
    from llava_lab.results import Relevance, Run


@dataclass(frozen=True)
class Seen:
    """One connector's view: `values` (rows, cols) is its map, `words` what lies nearest to each patch, best first.

    `floor` is the map's noise floor, 0 where its method has none: what does not reach it is 0 in `values`, and negligible.
    """

    name: str
    run: Run
    values: np.ndarray
    words: tuple[tuple[tuple[str, float], ...], ...] = ()  # per patch: word and cosine
    r2: float | None = None  # of a linear fit, on held-out pictures
    floor: float = 0.0


@entry
def seen(
    name: str, run: Run, relevance: Relevance, *, target: int = -1, words: Sequence[Any] = (), r2: float | None = None
) -> Seen:
    """A connector's view from what the lab measured; `target` is which of the relevance's maps is shown.

        >>> side = seen("trained", run, ll.attribute(lab, run, method="rollout"))
        >>> side.values.shape
        (12, 12)

    `words` is what `llava_lab.nearest_words` gives, or for each patch, row by row, pairs of a word and its cosine.
    """
    if relevance.map != run.map:
        raise OptionError(f"the map of {name!r} was made on another picture geometry than its run's; attribute this run")
    if not -len(relevance.values) <= target < len(relevance.values):
        raise OptionError(f"target must be one of the {len(relevance.values)} maps of {name!r}, got {target}")
    near = tuple(tuple((str(word), float(cosine)) for word, cosine in patch) for patch in pairs_of(words))
    values, floor = np.asarray(relevance.drawn[target], np.float32), float(relevance.noise_floor[target])
    return Seen(name, run, values, near, None if r2 is None else float(r2), floor)


def pairs_of(words: Any) -> Sequence[Any]:
    """Nearest words of a result as pairs by patch; pairs as they are. Raises OptionError for anything else."""
    if not is_result(words, "nearest words"):
        if not is_list(words) or not all(is_list(patch) and all(map(_is_pair, patch)) for patch in words):
            raise OptionError(
                "words must be what ll.nearest_words gives, or for each patch a list of (word, cosine) pairs; got " + shown(words)
            )
        return words
    pieces = dict(zip(words.piece_ids.tolist(), words.pieces, strict=True))
    return [
        [(pieces[piece], cosine) for piece, cosine in zip(ids, cosines, strict=True)]
        for ids, cosines in zip(words.top_ids.tolist(), words.cosines.tolist(), strict=True)
    ]


def _is_pair(value: Any) -> bool:
    """Whether it is a word and its cosine."""
    return is_list(value) and len(value) == 2 and isinstance(value[0], str) and isinstance(as_python(value[1]), (int, float))


class ConnectorBench(PictureWidget):
    """`one` and `two` are `widgets.seen(...)`; `ranks` likewise by rank: the linear fit cut to each.

    `rank` is the rank shown on the right, 0 for `two` itself.

        >>> sides = [seen(name, run, ll.attribute(lab, run, method=name)) for name in ("rollout", "edges")]
        >>> ConnectorBench(*sides).shown.name
        'edges'
    """

    render, script, sheets = "renderBench", "bench.js", ("base.css", "connector.css")

    rank = traitlets.Int(0).tag(sync=True)

    @entry
    def __init__(
        self,
        one: Seen,
        two: Seen | None = None,
        *,
        ranks: Mapping[int, Seen] | None = None,
        rank: int | None = None,
    ) -> None:
        for side in (one, *([] if two is None else [two]), *(ranks or {}).values()):
            if not isinstance(side, Seen):
                raise OptionError(f"a connector's side must be what widgets.seen gives, got {shown(side)}")
        if wrong := [number for number in ranks or {} if not is_whole(number) or number < 1]:
            raise OptionError(f"ranks must be 1 or more, got {shown(wrong[0])}")
        self.one, self.two, self.ranks, self.run = one, two, dict(sorted((ranks or {}).items())), one.run
        spec, data = pack_bench(one, two, self.ranks)
        first = 0 if two is not None else max(self.ranks)
        super().__init__(spec=spec, rank=first if rank is None else rank, **data)

    def draw_png(self) -> bytes:
        """Both maps and their difference as shown, as PNG bytes."""
        from llava_lab.plots import stills

        sides = [(side.name, side.run.answer_shown, side.values) for side in (self.one, self.shown)]
        return stills.png(stills.connector_maps(self.run, *sides, floors=(self.one.floor, self.shown.floor)))

    @property
    def shown(self) -> Seen:
        """What is on the right."""
        return self.ranks[self.rank] if self.rank else self.two  # type: ignore[return-value]

    def __repr__(self) -> str:
        one, two = self.one, self.shown
        return (
            f"ConnectorBench({one.run.question!r}: {one.name} → {one.run.answer_shown!r}; {two.name} → {two.run.answer_shown!r})"
        )

    @traitlets.validate("rank")
    def _valid_rank(self, proposal: dict) -> int:
        choices = [*([0] if self.two is not None else []), *self.ranks]
        if proposal["value"] not in choices:
            raise TraitRefused(f"rank must be one of {', '.join(map(str, choices))}, got {proposal['value']}")
        return proposal["value"]


# -- packing ----------------------------------------------------------------------------------


def pack_bench(one: Seen, two: Seen | None, ranks: Mapping[int, Seen]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The page's spec, and its picture, maps and scales."""
    sides = [one, *([two] if two else []), *ranks.values()]
    if len(sides) < 2:
        raise OptionError("there is nothing to compare: give a second connector, ranks of a linear fit, or both")
    for other in sides:
        check_same(one, other)
    levels, scales, lo, hi = quantize(np.stack([side.values for side in sides]))
    picture, kind = encode_picture(one.run.picture)
    spec = {
        **head_of(one.run),
        "sides": [side_of(side) for side in sides],
        "second": two is not None,
        "ranks": list(ranks),
        "lo": lo,
        "hi": hi,
        "picture": kind,
        "palettes": palettes(),
    }
    return spec, {"picture": picture, "maps": levels.tobytes(), "scales": scales.astype("<f4").tobytes()}


def check_same(one: Seen, other: Seen) -> None:
    """Refuse what another picture or question gave, and tables that do not fit the grid."""
    run, name = other.run, other.name
    if run.question != one.run.question:
        raise OptionError(f"{name!r} was asked {run.question!r}, {one.name!r} {one.run.question!r}; ask both the same")
    if run.map != one.run.map or not np.array_equal(run.picture, one.run.picture):
        raise OptionError(f"{name!r} saw another picture or grid than {one.name!r}; show both the same, on one grid")
    if other.values.shape != (run.map.rows, run.map.cols):
        raise OptionError(f"the map of {name!r} must be {run.map.rows} x {run.map.cols}, got {other.values.shape}")
    if not np.isfinite(other.values).all():
        raise OptionError(f"the map of {name!r} holds values that are not finite; a map cannot be drawn from them")
    if other.words and len(other.words) != run.map.rows * run.map.cols:
        raise OptionError(
            f"{name!r} has words for {len(other.words)} of {run.map.rows * run.map.cols} patches; give one list each"
        )


def side_of(side: Seen) -> dict[str, Any]:
    return {
        "name": side.name,
        "answer": side.run.answer_shown,
        "words": answer_words(side.run),
        "p": whole_probability(side.run),
        "near": [[[word, round(cosine, 3)] for word, cosine in patch] for patch in side.words],
        "r2": side.r2,
        "floor": side.floor,
    }
