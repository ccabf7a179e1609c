"""What a comparison says, in the page's terms: maps by method, scores per target, verdicts, likeness.

Takes plain dicts, or an object with the fields of ``llava_lab.results.Comparison`` (known by its shape, never
imported). Scores that say whether a map is faithful to the model, whether it is true to the picture, and what it
costs are kept in groups of their own. Knows nothing of pages or pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from widgets.pack import as_layers, known, per_target

if TYPE_CHECKING:
    from llava_lab.results import Relevance

GROUPS = {
    "Faithful to the model": ("gain", "deletion", "insertion", "object"),
    "True to the picture": ("pointing", "mass", "auc", "iou"),
    "Cost": ("seconds", "passes", "forwards", "backwards"),
}
LOWER_IS_BETTER = ("deletion", *GROUPS["Cost"])

Scores = Mapping[str, Mapping[str, Any]]


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
            raise TypeError("a Comparison brings its own scores; give scores, beats_random and agreement with maps by name")
        return from_comparison(maps)
    table = None if agreement is None else np.asarray(agreement, np.float64)
    if table is not None and table.shape != (len(maps), len(maps)):
        raise ValueError(f"agreement must be {len(maps)} x {len(maps)}, one row and column per map, got {table.shape}")
    return Compared(maps, scores or {}, beats_random or {}, table)


def is_comparison(given: Any) -> bool:
    return all(hasattr(given, name) for name in ("maps", "faithfulness", "rows", "spearman"))


def from_comparison(result: Any) -> Compared:
    """A Comparison's maps, every number of its rows per target, its verdicts and its rank correlations."""
    rows = [{row["method"]: row for row in result.rows(index)} for index in range(len(result.targets))]
    scores: dict[str, dict[str, list[Any]]] = {}
    for name, rel in result.maps.items():
        found = [_numbers(by_method[name]) for by_method in rows]
        found = [{**one, "passes": sum(rel.passes.values())} for one in found]
        names = dict.fromkeys(key for one in found for key in one)
        scores[name] = {key: [one.get(key) for one in found] for key in names}
    beats = {name: [by_method[name]["beats_random"] for by_method in rows] for name in result.maps}
    refused = tuple((str(name), str(why)) for name, why in result.refused.items())
    return Compared(dict(result.maps), scores, beats, np.asarray(result.spearman, np.float64), refused, tuple(result.notes))


def score_names(scores: Scores) -> list[str]:
    """Every score some method has, group by group, then the rest as given."""
    for own in scores.values():
        if not isinstance(own, Mapping):
            raise TypeError(f'scores must be numbers by name for each method, as {{"rollout": {{"gain": 0.3}}}}, got {own!r}')
    given = list(dict.fromkeys(name for one in scores.values() for name in one))
    grouped = [name for names in GROUPS.values() for name in names if name in given]
    return grouped + [name for name in given if name not in grouped]


def described(scores: Scores) -> list[dict[str, Any]]:
    """The scores as the page names them: their group, and whether lower is better."""
    group = {name: title for title, names in GROUPS.items() for name in names}
    return [{"name": name, "group": group.get(name, ""), "lower": name in LOWER_IS_BETTER} for name in score_names(scores)]


def scores_of(data: Compared) -> dict[str, dict[str, list[float | None]]]:
    """Scores by method and name, one per target; what was not measured or is not finite is None."""
    known(data.scores, data.maps, "scores")
    out: dict[str, dict[str, list[float | None]]] = {}
    for method, rel in data.maps.items():
        layers = as_layers(method, rel)
        given = data.scores.get(method, {})
        out[method] = {name: [_finite(one) for one in per_target(method, layers, value, name)] for name, value in given.items()}
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
    return None if value is None or not np.isfinite(value) else float(value)
