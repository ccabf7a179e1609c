"""What goes on inside, with controls: `Sinks` draw attention for what they are, `NodeScores` are of heads, `Circuit` of edges,
`Interchange` of subspaces.

Frozen dataclasses over numpy arrays; each saves to one ``.npz`` file and loads again without torch or the model.

    found = sinks(lab, runs)
    Sinks.load(found.save("sinks.npz")).table()
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float32, Float64, Int64

from llava_lab.errors import DataError, OptionError
from llava_lab.geometry import PictureMap
from llava_lab.results.run import Target
from llava_lab.results.save import Saved
from llava_lab.results.schema import filled, place_of
from llava_lab.results.table import Table, figure, pairs, plain
from llava_lab.stats import resampled_means, spearman, wilson

LIMITS = ("attended", "long", "peak")


@dataclass(frozen=True)
class Sinks(Saved):
    """How much attention each image token draws in each layer, how its state stands out, and which are sinks by both."""

    KIND: ClassVar[str] = "sinks"

    layers: tuple[str, ...]  # "tower 0", ..., "language 0", ...
    drawn: Float32[np.ndarray, "runs layers rows cols"]  # attention received over an even share
    length: Float32[np.ndarray, "runs layers rows cols"]  # of the state the layer is given, over the median patch's
    peak: Float32[np.ndarray, "runs layers rows cols"]  # share of the state's energy in its largest dimension
    limits: dict[str, float]  # "attended", "long", "peak": the rule
    chance: Float32[np.ndarray, " layers"]  # share of patches attended when each row's weights are mixed
    mixed: Float32[np.ndarray, "layers 2"]  # share attended, share of outliers, in the model with mixed weights; first run
    controlled: bool  # whether `mixed` was measured
    first: Float32[np.ndarray, "layers 3"]  # drawn, length, peak of the first position (tower: the class token), mean over runs
    others: Int64[np.ndarray, "layers 2"]  # sinks among the positions that are no patch, and how many there are; all runs
    words: dict[str, float]  # text tokens that are sinks, share of runs and language layers
    map: PictureMap  # of the first run
    model: str
    fingerprint: str
    seconds: float
    interrupted: bool = False
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        filled(layers=self.layers, drawn=self.drawn)
        if self.drawn.shape != self.length.shape or self.drawn.shape != self.peak.shape:
            raise DataError("what is drawn, the lengths and the peaks must be of the same runs and layers")
        if set(self.limits) != set(LIMITS):
            raise DataError(f"its limits must be {', '.join(LIMITS)}, got {', '.join(self.limits)}")

    @property
    def attended(self) -> np.ndarray:
        """Which patches draw several times an even share, bool (runs, layers, rows, cols)."""
        return self.drawn >= self.limits["attended"]

    @property
    def outlier(self) -> np.ndarray:
        """Which patches' states are much longer than the median's, or lie in one dimension as its does not; the same shape."""
        common = np.median(self.peak, (2, 3), keepdims=True)
        long = self.limits["long"]
        return (self.length >= long) | ((self.peak >= self.limits["peak"]) & (self.peak >= long * common))

    @property
    def found(self) -> np.ndarray:
        """Sinks: attended and an outlier, bool (runs, layers, rows, cols)."""
        return self.attended & self.outlier

    def patches(self, part: str = "language", *, run: int = 0, mark: str = "found") -> list[tuple[int, int]]:
        """Patches (row, col) marked in some layer of a part ("tower" or "language"): as "found", "attended" or "outlier"."""
        inside = [number for number, name in enumerate(self.layers) if name.split()[0] == part]
        if not inside or mark not in ("found", "attended", "outlier"):
            parts = ", ".join(dict.fromkeys(name.split()[0] for name in self.layers))
            raise OptionError(f"part is one of {parts}, mark found, attended or outlier; got {part!r} and {mark!r}")
        if not 0 <= run < len(self.drawn):
            raise OptionError(f"runs go from 0 to {len(self.drawn) - 1}, got {run}")
        any_layer = getattr(self, mark)[run, inside].any(0)
        return [(int(row), int(col)) for row, col in np.argwhere(any_layer)]

    def table(self) -> Table:
        """A row a layer: the most attended patch, shares of patches by each mark beside their controls, and the rest."""
        attended, outlier, found = (part.mean((0, 2, 3)) for part in (self.attended, self.outlier, self.found))
        rows = []
        for number, name in enumerate(self.layers):
            mixed = [f"{share:.1%}" if self.controlled else "-" for share in self.mixed[number]]
            there, seen = self.others[number].tolist()
            rows.append(
                (name, f"{self.drawn[:, number].max():.1f}", f"{attended[number]:.1%}", f"{self.chance[number]:.1%}", mixed[0],
                 f"{self.length[:, number].max():.1f}", f"{outlier[number]:.1%}", mixed[1], f"{found[number]:.1%}",
                 f"{there} of {seen}", f"{self.first[number, 0]:.1f}", f"{self.first[number, 1]:.1f}",
                 f"{self.first[number, 2]:.0%}")
            )  # fmt: skip
        names = (
            *("layer", "most drawn", "attended", "by chance", "mixed", "longest", "outliers", "mixed", "sinks"),
            *("other positions", "first: drawn", "length", "in one dimension"),
        )
        runs, total = len(self.drawn), int(self.found.sum())
        title = f"{self.model}, {runs} run{'s' * (runs > 1)}: {total} sinks among image tokens, over all layers"
        rule = f"rule: {pairs(self.limits)}; drawn is times an even share, length times the median patch's"
        notes = [rule, *self.notes]
        if self.words:
            shares = ", ".join(f"{text} {share:.0%}" for text, share in self.words.items())
            notes.insert(1, f"text tokens that are sinks, share of language layers: {shares}")
        return Table(names, tuple(rows), title=title, notes=tuple(notes))

    def to_dict(self) -> dict[str, Any]:
        """What ``llava-lab sinks --json`` prints."""
        about = {name: getattr(self, name) for name in ("layers", "limits", "chance", "others", "words", "first", "model")}
        about |= {name: getattr(self, name).mean((0, 2, 3)) for name in ("attended", "outlier", "found")}
        about |= {"most_drawn": self.drawn.max((0, 2, 3)), "longest": self.length.max((0, 2, 3)), "runs": len(self.drawn)}
        about |= {"mixed": self.mixed if self.controlled else None, "sinks": int(self.found.sum())}
        return plain(about | {"interrupted": self.interrupted, "notes": self.notes, "seconds": self.seconds})


@dataclass(frozen=True)
class NodeScores(Saved):
    """How much each head and each feed-forward part, changed at each site, changes the score: measured, or estimated."""

    KIND: ClassVar[str] = "node scores"
    GAPS: ClassVar[tuple[str, ...]] = ("heads", "mlps")  # nodes that were not measured

    sites: tuple[str, ...]
    heads: Float32[np.ndarray, "sites layers heads"]
    mlps: Float32[np.ndarray, "sites layers"]
    measured: bool  # else an estimate of first order
    put: str  # "clean" into the corrupted reading; "corrupt", "zero" or "mean" into the clean one
    steps: int  # of the path whose mean slope is taken; 0 is the slope at the corrupted reading
    target: Target
    corruption: str
    clean: float  # the score of both readings
    corrupt: float
    model: str
    fingerprint: str
    passes: dict[str, int]
    seconds: float
    interrupted: bool = False
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        filled(sites=self.sites)

    @property
    def share(self) -> np.ndarray:
        """Of the heads' changes in the whole difference between the readings, (sites, layers, heads); NaN where that is 0."""
        whole = self.clean - self.corrupt
        return self.heads / (whole if abs(whole) > 1e-6 else np.nan)

    def agreement(self, other: NodeScores) -> dict[str, float]:
        """Pearson and rank correlation with another's values of the same nodes and sites, over the nodes that both have.

        Raises OptionError where the two are not of the same nodes, run and direction.
        """
        same = (self.sites, self.heads.shape, self.put, self.target) == (other.sites, other.heads.shape, other.put, other.target)
        if not same or self.fingerprint != other.fingerprint:
            raise OptionError("expected scores of the same nodes, sites, target and direction; make both from the same run")
        result: dict[str, float] = {}
        pairs_of = {"heads": (self.heads, other.heads), "mlps": (self.mlps, other.mlps)}
        for name, (one, two) in pairs_of.items():
            known = np.isfinite(one) & np.isfinite(two)
            first, second = one[known].astype(float), two[known].astype(float)
            spread = len(first) > 1 and np.ptp(first) > 0 and np.ptp(second) > 0
            result[f"{name}: pearson"] = float(np.corrcoef(first, second)[0, 1]) if spread else float("nan")
            result[f"{name}: spearman"] = spearman(first, second) if spread else float("nan")
        return result

    def top(self, count: int = 10) -> list[tuple[str, str, float]]:
        """The nodes that change the score most, either way: (site, node, change)."""
        both = np.concatenate([self.heads, self.mlps[..., None]], -1)
        order = np.argsort(-np.abs(np.nan_to_num(both)).ravel(), kind="stable")[:count]
        names = []
        for place in order.tolist():
            site, layer, node = (int(at) for at in np.unravel_index(place, both.shape))
            name = f"layer {layer} MLP" if node == self.heads.shape[2] else f"layer {layer} head {node}"
            names.append((self.sites[site], name, float(both[site, layer, node])))
        return names

    def table(self) -> Table:
        """The ten nodes that change the score most."""
        whole = self.clean - self.corrupt
        rows = tuple(
            (site, node, f"{change:+z.3f}", figure(change / whole if abs(whole) > 1e-6 else np.nan, ".1%"))
            for site, node, change in self.top()
        )
        way = {"clean": "clean values into the corrupted reading", "corrupt": "corrupted values into the clean reading"}
        title = f"{self.target.text}: {'measured' if self.measured else 'estimated'}, "
        title += way.get(self.put, f"{self.put} in the clean reading")
        title += f"; clean {self.clean:.2f}, {self.corruption} {self.corrupt:.2f}"
        return Table(("site", "node", "change of the score", "of the difference"), rows, title=title, notes=self.notes)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        names = ("sites", "heads", "mlps", "measured", "put", "steps", "corruption", "clean", "corrupt", "model", "seconds")
        about = {name: getattr(self, name) for name in names} | {"target": self.target.text, "passes": self.passes}
        return plain(about | {"interrupted": self.interrupted, "notes": self.notes})


@dataclass(frozen=True)
class Circuit(Saved):
    """How much of a score the best edges carry alone, by their share of all edges, beside random circuits of equal size."""

    KIND: ClassVar[str] = "circuit"

    shares: Float64[np.ndarray, " shares"]  # of all edges, rising
    counts: Int64[np.ndarray, " shares"]
    faithfulness: Float32[np.ndarray, "shares pairs"]  # 0 is every edge cut, 1 the whole model
    chance: Float32[np.ndarray, "draws shares pairs"]  # of random circuits
    image_share: Float32[np.ndarray, " shares"]  # of the kept edges, those at the image's positions
    edges: int
    image_edges: int  # of them, at the image's positions
    names: tuple[str, ...]  # the best edges, best first
    scores: Float32[np.ndarray, " names"]  # what the score would lose without each, estimated
    agreement: float  # rank correlation of that estimate with what cutting an edge loses; 0 where none was cut
    checked: int  # edges cut for it
    variable: str
    steps: int
    model: str
    fingerprint: str
    seconds: float
    interrupted: bool = False
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        filled(shares=self.shares, faithfulness=self.faithfulness.T)

    @property
    def cpr(self) -> float:
        """Area under faithfulness over the share of edges, from nothing at 0; 1 is the whole model's from the start."""
        return float(_area(self.shares, self.faithfulness.mean(1), 0.0))

    @property
    def cmd(self) -> float:
        """Area between faithfulness and 1; 0 is best."""
        return float(_area(self.shares, np.abs(1 - self.faithfulness.mean(1)), 1.0))

    @property
    def random_cpr(self) -> float:
        """`cpr` of random circuits, mean over draws; NaN without."""
        return float(np.mean([_area(self.shares, drawn.mean(1), 0.0) for drawn in self.chance])) if len(self.chance) else np.nan

    @property
    def random_cmd(self) -> float:
        """`cmd` of random circuits, mean over draws; NaN without."""
        areas = [_area(self.shares, np.abs(1 - drawn.mean(1)), 1.0) for drawn in self.chance]
        return float(np.mean(areas)) if areas else np.nan

    def interval(self, *, against_chance: bool = False) -> np.ndarray:
        """95% interval over pairs of the mean faithfulness, or of its lead over random circuits, (shares, 2)."""
        values = self.faithfulness - (self.chance.mean(0) if against_chance and len(self.chance) else 0)
        return resampled_means(values, np.arange(values.shape[1]))[0]

    def table(self) -> Table:
        """Faithfulness by size, beside chance; then the ten best edges."""
        chance = self.chance.mean((0, 2)) if len(self.chance) else np.full(len(self.shares), np.nan)
        columns = (self.shares, self.counts.tolist(), self.faithfulness.mean(1), self.interval(), chance, self.image_share)
        rows = tuple(
            (f"{share:.1%}", str(count), f"{own:.2f} ({low:.2f} to {high:.2f})", figure(float(drawn), ".2f"), f"{image:.0%}")
            for share, count, own, (low, high), drawn, image in zip(*columns, strict=True)
        )
        best = tuple((name, f"{score:+z.3f}") for name, score in zip(self.names[:10], self.scores[:10], strict=True))
        title = f"{self.model}, {self.variable}: CPR {self.cpr:z.3f} (random {figure(self.random_cpr)}), "
        title += (
            f"CMD {self.cmd:.3f} (random {figure(self.random_cmd)}); {self.edges} edges, {self.image_edges} of them at the image"
        )
        notes = list(self.notes)
        if self.checked:
            notes.append(
                f"Estimate against cutting {self.checked} random edges one at a time: rank correlation {self.agreement:.2f}."
            )
        names = ("edges kept", "number", "faithfulness (95%)", "random", "at the image")
        return Table(names, rows, title=title, below=(Table(("best edges", "score"), best, title=""),), notes=tuple(notes))

    def to_dict(self) -> dict[str, Any]:
        """What ``llava-lab circuit --json`` prints."""
        names = ("shares", "counts", "image_share", "edges", "image_edges", "names", "scores", "agreement", "checked", "variable")
        about = {name: getattr(self, name) for name in (*names, "cpr", "cmd", "random_cpr", "random_cmd", "steps", "model")}
        about |= {"faithfulness": self.faithfulness.mean(1), "interval": self.interval(), "pairs": self.faithfulness.shape[1]}
        about |= {"random": self.chance.mean((0, 2)) if len(self.chance) else None}
        return plain(about | {"interrupted": self.interrupted, "notes": self.notes, "seconds": self.seconds})


def _area(shares: np.ndarray, values: np.ndarray, at_zero: float) -> float:
    """Trapezoids from (0, `at_zero`) on."""
    return float(np.trapezoid(np.concatenate([[at_zero], values]), np.concatenate([[0.0], shares])))


@dataclass(frozen=True)
class Interchange(Saved):
    """How often an answer becomes the source's when a subspace of a state is exchanged, by layer, beside placebos.

    `iia` is how often the answer about the variable becomes what the source's value demands, `alone` how often the answer about
    the second variable, in which the source differs too, stays the base's, `both` how often both are so for one pair: each
    (layers, arms), 0 to 1. The untrained model has no answer of its own to keep, and the whole state carries everything over.
    """

    KIND: ClassVar[str] = "interchange"
    GAPS: ClassVar[tuple[str, ...]] = ("kept",)
    ARMS: ClassVar[tuple[str, ...]] = ("found", "random", "shuffled", "untrained", "whole")
    MEASURES: ClassVar[tuple[str, ...]] = ("iia", "alone", "both")

    layers: Int64[np.ndarray, " layers"]
    changed: Float32[np.ndarray, "layers 5 seeds pairs"]  # 1 where the answer became the source's; arms as in `ARMS`
    kept: Float32[np.ndarray, "layers 5 seeds pairs"]  # 1 where the other answer stayed the base's; NaN for the untrained model
    variable: str
    beside: str  # the second variable
    position: str
    dim: int
    width: int  # of the state
    learnt_on: int  # scenes
    model: str
    fingerprint: str
    seconds: float
    interrupted: bool = False
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        filled(layers=self.layers, pairs=self.changed.T)

    @property
    def iia(self) -> np.ndarray:
        return self._by_pair("iia").mean(-1)

    @property
    def alone(self) -> np.ndarray:
        return self._by_pair("alone").mean(-1)

    @property
    def both(self) -> np.ndarray:
        return self._by_pair("both").mean(-1)

    def interval(self, measure: str = "iia") -> np.ndarray:
        """95% interval of a measure over pairs, each of its own scene, (layers, arms, 2); Wilson's where all are 0 or all 1."""
        rates = self._by_pair(measure)
        count = rates.shape[-1]
        edges = resampled_means(rates, np.arange(count))[0]
        edges[(rates == 0).all(-1)], edges[(rates == 1).all(-1)] = wilson(0, count), wilson(count, count)
        return edges

    def _by_pair(self, measure: str) -> np.ndarray:
        """Mean over searches, float64 (layers, arms, pairs)."""
        place_of("measure", measure, self.MEASURES)
        values = {"iia": self.changed, "alone": self.kept, "both": self.changed * self.kept}[measure]
        return values.astype(np.float64).mean(2)

    def table(self) -> Table:
        """IIA by layer and arm, with the interval of the subspace that was found; below, the same for the other measures."""
        parts = []
        for measure in self.MEASURES:
            rows = []
            for layer, means, edges in zip(self.layers, getattr(self, measure), self.interval(measure), strict=True):
                cells = [f"{figure(mean, '.2f')} ({low:.2f} to {high:.2f})" if mean == mean else "-"
                         for mean, (low, high) in zip(means, edges, strict=True)]  # fmt: skip
                rows.append((str(layer), *cells))
            parts.append(Table(("layer", *self.ARMS), tuple(rows), title=""))
        size = f"{self.dim} of {self.width} dimensions"
        title = f"{self.model}: the {self.variable} exchanged at {self.position}, {size}: the answer becomes the source's (95%)"
        names = (f"the answer about the {self.beside} stays the base's", "both, of the same pair")
        below = tuple(part.titled(name) for part, name in zip(parts[1:], names, strict=True))
        return Table(parts[0].headings, parts[0].rows, title=title, below=below, notes=self.notes)

    def to_dict(self) -> dict[str, Any]:
        """What ``llava-lab interchange --json`` prints."""
        names = ("variable", "beside", "position", "dim", "width", "layers", "learnt_on", "model")
        about = {name: getattr(self, name) for name in names} | {"arms": self.ARMS, "pairs": self.changed.shape[-1]}
        about |= {name: getattr(self, name) for name in self.MEASURES} | {"searches": self.changed.shape[2]}
        about |= {f"{name}_interval": self.interval(name) for name in self.MEASURES}
        return plain(about | {"interrupted": self.interrupted, "notes": self.notes, "seconds": self.seconds})
