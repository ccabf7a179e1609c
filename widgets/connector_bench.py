"""ConnectorBench: two connectors side by side on one picture and question, and the linear fit at every rank.

Answers with probabilities, maps on one scale, nearest words, what one map has more of. Pointing at a patch lights it
in all maps. The rank slider is answered in the browser from maps and answers that were made before. Python hears of
`rank` and `selected`. Computes nothing about models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import traitlets

from widgets.base import bundle, styles
from widgets.bench_pack import Seen, pack_bench
from widgets.bench_paint import draw_bench
from widgets.picture import PictureWidget

MODULES = ("maps.js", "grid.js", "canvas.js", "dom.js", "panel.js", "bench.js")


class ConnectorBench(PictureWidget):
    """`one` and `two` are `widgets.bench_pack.seen(...)`; `ranks` likewise by rank: the linear fit cut to each.

    `rank` is the rank shown on the right, 0 for `two` itself.
    """

    entry, modules, sheets, width = "renderBench", MODULES, ("base.css", "connector.css"), 1080
    _esm = bundle(*MODULES, entry=entry)
    _css = styles(*sheets)

    rank = traitlets.Int(0).tag(sync=True)

    def __init__(
        self,
        one: Seen,
        two: Seen | None = None,
        *,
        ranks: Mapping[int, Seen] | None = None,
        rank: int | None = None,
        **unknown: Any,
    ) -> None:
        self.refuse(unknown)
        self.one, self.two, self.ranks, self.run = one, two, dict(sorted((ranks or {}).items())), one.run
        if any(number < 1 for number in self.ranks):
            raise ValueError(f"ranks must be 1 or more, got {min(self.ranks)}")
        spec, data = pack_bench(one, two, self.ranks)
        first = 0 if two is not None else max(self.ranks)
        super().__init__(spec=spec, rank=first if rank is None else rank, **data)

    def draw_png(self) -> bytes:
        """Both maps and their difference as shown, as PNG bytes."""
        return draw_bench(self.one, self.shown)

    @property
    def shown(self) -> Seen:
        """What is on the right."""
        return self.ranks[self.rank] if self.rank else self.two  # type: ignore[return-value]

    def __repr__(self) -> str:
        one, two = self.one, self.shown
        return f"ConnectorBench({one.run.question!r}: {one.name} → {one.run.answer!r}; {two.name} → {two.run.answer!r})"

    @traitlets.validate("rank")
    def _valid_rank(self, proposal: dict) -> int:
        choices = [*([0] if self.two is not None else []), *self.ranks]
        if proposal["value"] not in choices:
            raise traitlets.TraitError(f"rank must be one of {', '.join(map(str, choices))}, got {proposal['value']}")
        return proposal["value"]
