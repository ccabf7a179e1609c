"""CompareView: every method's map of the same words over the same picture, with what is known of each.

Pointing at a patch lights it in every map; a click enlarges a map; maps are ordered by any score, and those that
were not shown to beat random ones are grey. All of it is answered in the browser. What comes back to Python is
`target`, `method` (the enlarged one), `sort` and `selected`. Computes nothing about models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import traitlets

from widgets.base import bundle, styles
from widgets.compare_data import compared, described, score_names, scores_of, table_of
from widgets.compare_paint import draw_comparison
from widgets.pack import Packed, as_layers, pack
from widgets.picture import PictureWidget, within

if TYPE_CHECKING:
    from llava_lab.results import Relevance, Run

MODULES = (
    "maps.js",
    "grid.js",
    "canvas.js",
    "dom.js",
    "chips.js",
    "parts.js",
    "gestures.js",
    "view.js",
    "surface.js",
    "panel.js",
    "compare_view.js",
    "compare_stage.js",
    "compare_sheet.js",
    "compare_tiles.js",
    "compare.js",
)
ALIKE = "agreement"  # the order by likeness to the enlarged map


class CompareView(PictureWidget):
    """Small maps of many methods, to point at, to order, to enlarge.

    `maps` gives one Relevance per method, ``{"rollout": rel}``, or is a `llava_lab.compare` result, which brings
    its scores along. `scores` are numbers by method and name, ``{"rollout": {"deletion": 0.3}}``, each one number
    or one per target; `beats_random` says of each method (or each of its targets) whether it is better than random
    maps; `agreement` is a matrix of how alike the methods' maps are, 1 for alike.

    `target` is what is explained first, by position or text; `method` the map enlarged first; `sort` the score
    that orders the maps ("" for the order given, "agreement" for likeness to the enlarged map).
    """

    entry, modules, sheets, width = "renderCompare", MODULES, ("base.css", "compare.css"), 1080
    _esm = bundle(*MODULES, entry=entry)
    _css = styles(*sheets)

    target = traitlets.Int(0).tag(sync=True)
    method = traitlets.Unicode().tag(sync=True)
    sort = traitlets.Unicode().tag(sync=True)

    def __init__(
        self,
        run: Run,
        maps: Mapping[str, Relevance] | Any,
        *,
        scores: Mapping[str, Mapping[str, Any]] | None = None,
        beats_random: Mapping[str, Any] | None = None,
        agreement: Any = None,
        target: int | str | None = None,
        method: str | None = None,
        sort: str | None = None,
        opacity: float = 0.85,
        smooth: bool = False,
        **unknown: Any,
    ) -> None:
        self.refuse(unknown)
        if not 0 <= opacity <= 1:
            raise ValueError(f"opacity must lie in 0..1, got {opacity}")
        self.run, self.data = run, compared(maps, scores, beats_random, agreement)
        packed = pack(run, self.data.maps, beats_random=self.data.beats)
        names = score_names(self.data.scores)
        self.orders = ["", *names, *([ALIKE] if self.data.agreement is not None else [])]
        spec = {**self._spec(packed), "opacity": float(opacity), "smooth": bool(smooth)}
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
        maps = [as_layers(name, given)[-1][1].values for name, given in self.data.maps.items()]
        return draw_comparison(self.run, maps, self.spec, self.target, self.sort if self.sort != ALIKE else "")

    def __repr__(self) -> str:
        return f"CompareView({self.run.question!r} → {self.run.answer!r}; {', '.join(self.data.maps)})"

    def _spec(self, packed: Packed) -> dict[str, Any]:
        scores = scores_of(self.data)
        return {
            **packed.spec,
            "chips": [{**chip, "text": _asked(chip)} for chip in packed.spec["chips"]],
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

    @traitlets.validate("method")
    def _valid_method(self, proposal: dict) -> str:
        return _one_of("method", proposal["value"], list(self.data.maps))

    @traitlets.validate("sort")
    def _valid_sort(self, proposal: dict) -> str:
        return _one_of("sort", proposal["value"], self.orders)


def _one_of(what: str, value: str, choices: list[str]) -> str:
    if value not in choices:
        said = ", ".join(choice or "'' (as given)" for choice in choices)
        raise traitlets.TraitError(f"{what} must be one of {said}, got {value!r}")
    return value


def _asked(chip: Mapping[str, Any]) -> str:
    """A contrast is a question: why this word and not that one."""
    return f"why {chip['text']}" if chip["kind"] == "contrast" else chip["text"]


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
