"""CompareView: every method's map of the same words over the same picture, with what is known of each.

Pointing at a patch lights it in every map; a click enlarges a map; maps are ordered by any score, and those that
were not shown to beat random ones are grey. All of it is answered in the browser. What comes back to Python is
`target`, `method` (the enlarged one), `sort` and `selected`.

Takes maps by name, or an object with the fields of ``llava_lab.results.Comparison`` (recognised by its shape, never
imported). Scores that say whether a map is faithful to the model, whether it is true to the picture, and what it
costs are kept in groups of their own.

    CompareView(run, ll.compare(lab, run, ["rollout", "occlusion"]))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets

from llava_lab.checks import array_of, as_python, entry, shown
from llava_lab.errors import OptionError
from widgets.base import PictureWidget, TraitRefused, checked_opacity, within
from widgets.pack import Packed, as_layers, known, named, pack, per_target

if TYPE_CHECKING:
    from llava_lab.results import Relevance, Run

GROUPS = {
    "Faithful to the model": ("gain", "deletion", "insertion", "object"),
    "True to the picture": ("pointing", "mass", "auc", "iou"),
    "Cost": ("seconds", "passes", "forwards", "backwards"),
}
LOWER_IS_BETTER = ("deletion", *GROUPS["Cost"])
ALIKE = "agreement"  # the order by likeness to the enlarged map

Scores = Mapping[str, Mapping[str, Any]]


class CompareView(PictureWidget):
    """Small maps of many methods, to point at, to order, to enlarge.

    `maps` gives one Relevance per method, ``{"rollout": rel}``, or is a `llava_lab.compare` result, which brings
    its scores along. `scores` are numbers by method and name, ``{"rollout": {"deletion": 0.3}}``, each one number
    or one per target; `beats_random` says of each method (or each of its targets) whether it is better than random
    maps; `agreement` is a matrix of how alike the methods' maps are, 1 for alike.

        >>> widget = CompareView(run, {name: ll.attribute(lab, run, method=name) for name in ("rollout", "edges")})
        >>> widget.target = 0
        >>> widget.method
        'rollout'

    `target` is what is explained first, by position or text; `method` the map enlarged first; `sort` the score
    that orders the maps ("" for the order given, "agreement" for likeness to the enlarged map).
    """

    render, script, sheets = "renderCompare", "compare.js", ("base.css", "compare.css")

    target = traitlets.Int(0).tag(sync=True)
    method = traitlets.Unicode().tag(sync=True)
    sort = traitlets.Unicode().tag(sync=True)

    @entry
    def __init__(
        self,
        run: Run,
        maps: Mapping[str, Relevance] | Any,
        *,
        scores: Scores | None = None,
        beats_random: Mapping[str, Any] | None = None,
        agreement: Any = None,
        target: int | str | None = None,
        method: str | None = None,
        sort: str | None = None,
        opacity: float = 0.85,
        smooth: bool = False,
    ) -> None:
        self.run, self.data = run, compared(maps, scores, beats_random, agreement)
        packed = pack(run, self.data.maps, beats_random=self.data.beats)
        names = score_names(self.data.scores)
        self.orders = ["", *names, *([ALIKE] if self.data.agreement is not None else [])]
        spec = {**self._spec(packed), "opacity": checked_opacity(opacity), "smooth": bool(smooth)}
        first = names[0] if names else ""
        super().__init__(
            spec=spec,
            picture=packed.picture,
            maps=packed.maps,
            scales=packed.scales,
            target=_first_target(run, target, spec),
            method=method or next(iter(self.data.maps)),
            sort=first if sort is None else sort,
        )

    def draw_png(self) -> bytes:
        """The maps of the target shown, in the order shown, as PNG bytes."""
        from llava_lab.plots import stills

        sort, methods = self.sort if self.sort != ALIKE else "", self.spec["methods"]
        maps, scores, floors, doubtful = {}, {}, {}, []
        for at in in_order(methods, sort, self.target):
            name, target = methods[at]["name"], methods[at]["chips"][self.target]
            rel = as_layers(name, self.data.maps[name])[-1][1]
            maps[name] = rel.drawn[target] if target >= 0 else None
            floors[name] = float(rel.noise_floor[target]) if target >= 0 else 0.0
            scores[name] = score_of(methods[at], sort, self.target)
            doubtful += [name] if target >= 0 and methods[at]["beats"][target] is False else []
        chip = self.spec["chips"][self.target]
        what = "the whole answer" if chip["kind"] == "answer" else f"“{chip['text']}”"
        about = f"Maps of {what}{f', sorted by {sort}, the best first' if sort else ''}."
        return stills.png(stills.method_maps(self.run, maps, about=about, scores=scores, doubtful=doubtful, floors=floors))

    def __repr__(self) -> str:
        return f"CompareView({self.run.question!r} → {self.run.answer_shown!r}; {', '.join(self.data.maps)})"

    def _spec(self, packed: Packed) -> dict[str, Any]:
        scores, chips = scores_of(self.data), packed.spec["chips"]
        return {
            **packed.spec,
            # a contrast is a question: why this word and not that one
            "chips": [{**chip, "text": "why " * (chip["kind"] == "contrast") + chip["text"]} for chip in chips],
            "methods": [{**method, "scores": scores[method["name"]]} for method in packed.spec["methods"]],
            "scores": described(self.data.scores),
            "agreement": table_of(self.data),
            "refused": [list(pair) for pair in self.data.refused],
            "notes": list(self.data.notes),
        }

    # -- checks on what Python or the page sets ------------------------------------------------

    @traitlets.validate("target")
    def _valid_target(self, proposal: dict) -> int:
        return within("target", proposal["value"], len(self.spec["chips"]))

    @traitlets.validate("method", "sort")
    def _valid_name(self, proposal: dict) -> str:
        what, value = proposal["trait"].name, proposal["value"]
        choices = list(self.data.maps) if what == "method" else self.orders
        if value not in choices:
            names = ", ".join(choice or "'' (as given)" for choice in choices)
            raise TraitRefused(f"{what} must be one of {names}, got {value!r}")
        return value


def _first_target(run: Run, target: int | str | None, spec: Mapping[str, Any]) -> int:
    """The chip asked for; else the last of those that the most methods explain, a word where there is one."""
    chips = spec["chips"]
    if isinstance(target, str):
        named = [i for i, chip in enumerate(chips) if chip["text"] in (target, f"why {target}")]
        return named[0] if named else run.words.index(run.word(target))
    if target is not None:
        return within("target", target, len(chips))
    explained = [sum(method["chips"][i] >= 0 for method in spec["methods"]) for i in range(len(chips))]
    return max(range(len(chips)), key=lambda i: (explained[i], chips[i]["kind"] == "word", i))


# -- scores and verdicts ----------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """Maps and what is known of them; `scores` and `beats` are per target of each method's map."""

    maps: Mapping[str, Relevance]
    scores: Scores = field(default_factory=dict)
    beats: Mapping[str, Any] = field(default_factory=dict)
    agreement: np.ndarray | None = None  # (methods, methods), 1 is alike
    refused: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


def compared(maps: Any, scores: Scores | None, beats_random: Mapping[str, Any] | None, agreement: Any) -> Compared:
    """Maps by name with what was given of them, or a Comparison with what it holds."""
    if is_comparison(maps):
        if scores is not None or beats_random is not None or agreement is not None:
            raise OptionError("a Comparison brings its own scores; give scores, beats_random and agreement with maps by name")
        return from_comparison(maps)
    count, table = len(named(maps)), None if agreement is None else array_of("agreement", agreement)
    if table is not None and (table.shape != (count, count) or table.dtype.kind not in "biuf"):
        raise OptionError(f"agreement must be {count} x {count} numbers, one row and column per map, got {table.shape}")
    given = {} if scores is None else known(scores, maps, "scores")
    return Compared(maps, given, beats_random or {}, None if table is None else table.astype(np.float64))


def is_comparison(result: Any) -> bool:
    return all(hasattr(result, name) for name in ("maps", "faithfulness", "rows", "spearman"))


def from_comparison(result: Any) -> Compared:
    """A Comparison's maps, every number of its rows per target, its verdicts and its rank correlations."""
    rows = [{row["method"]: row for row in result.rows(index)} for index in range(len(result.targets))]
    scores: dict[str, dict[str, list[Any]]] = {}
    for name, rel in result.maps.items():
        passes = sum(rel.passes.values())
        numbers = [{**_numbers(by_method[name]), "passes": passes} for by_method in rows]
        names = dict.fromkeys(key for row in numbers for key in row)
        scores[name] = {key: [row.get(key) for row in numbers] for key in names}
    beats = {name: [by_method[name]["beats_random"] for by_method in rows] for name in result.maps}
    refused = tuple((str(name), str(why)) for name, why in result.refused.items())
    return Compared(dict(result.maps), scores, beats, np.asarray(result.spearman, np.float64), refused, tuple(result.notes))


def score_names(scores: Scores) -> list[str]:
    """Every score some method has, group by group, then the rest as given."""
    for own in scores.values():
        if not isinstance(own, Mapping):
            raise OptionError(f'scores must be numbers by name for each method, as {{"rollout": {{"gain": 0.3}}}}, got {own!r}')
    names = list(dict.fromkeys(name for own in scores.values() for name in own))
    grouped = [name for group in GROUPS.values() for name in group if name in names]
    return grouped + [name for name in names if name not in grouped]


def described(scores: Scores) -> list[dict[str, Any]]:
    """The scores as the page names them: their group, and whether lower is better."""
    group = {name: title for title, names in GROUPS.items() for name in names}
    return [{"name": name, "group": group.get(name, ""), "lower": name in LOWER_IS_BETTER} for name in score_names(scores)]


def scores_of(data: Compared) -> dict[str, dict[str, list[float | None]]]:
    """Scores by method and name, one per target; what was not measured or is not finite is None."""
    out: dict[str, dict[str, list[float | None]]] = {}
    for method, rel in data.maps.items():
        layers = as_layers(method, rel)
        own = data.scores.get(method, {}).items()
        out[method] = {name: [_finite(score) for score in per_target(method, layers, value, name)] for name, value in own}
    return out


def table_of(data: Compared) -> list[list[float | None]] | None:
    if data.agreement is None:
        return None
    return [[_finite(value) for value in row] for row in data.agreement.tolist()]


def in_order(methods: Sequence[Mapping[str, Any]], sort: str, chip: int) -> list[int]:
    """Places of the page's methods from best to worst by a score of one chip, those without it last; "" is the order given."""
    sign = 1.0 if sort in LOWER_IS_BETTER else -1.0

    def key(place: int) -> float:
        value = score_of(methods[place], sort, chip)
        return np.inf if value is None else sign * value

    return sorted(range(len(methods)), key=key) if sort else list(range(len(methods)))


def score_of(method: Mapping[str, Any], sort: str, chip: int) -> float | None:
    target = method["chips"][chip]
    return method["scores"][sort][target] if target >= 0 and sort in method["scores"] else None


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a comparison's row, those of the ground truth beside the rest."""
    flat = {**row, **row.get("truth", {})}
    wanted = [name for names in GROUPS.values() for name in names]
    return {name: flat[name] for name in wanted if isinstance(flat.get(name), (int, float))}


def _finite(value: Any) -> float | None:
    number = as_python(value)
    if number is None or isinstance(number, (bool, int, float)):
        return float(number) if number is not None and np.isfinite(number) else None
    raise OptionError(f"a score must be a number, or None where it was not measured, got {shown(value)}")
