"""Attention rollout: how the predicting positions are mixed from the image tokens, in one forward.

``R = A~_L ... A~_1`` with ``A~ = (1 - residual) A + residual I``: row i of R says how the state at position i is mixed
from the inputs, if values and feed-forward layers are ignored. Rows sum to 1. The product is carried along while the
forward runs, so no layer's attention outlives it.

Plain rollout (half residual, no null) is nearly blind on a deep causal decoder: most of it lands on the first token and
the top rows of the picture whatever is shown. Hence the defaults here: the residual weight is *measured* at each layer
and position, and the map is the log-ratio to the same pipeline under uniform causal attention (`UniformFlow`), so that 0
means "no more than the mask alone would give". Abnar & Zuidema's own is ``residual=0.5, null="none"``.

``sinks="remove"`` takes out the columns that draw attention from everywhere whatever they hold, usually the first token.
They are recognised by their own statistics in the run at hand, never by constants from a paper. A position that many
later positions look at because it matters is taken too: what is removed is always listed.

``vision`` is rollout through the vision tower alone, averaged over the patch rows that LLaVA passes on (never the class
token's, which it drops): a control that has seen the picture and not the question. A map of an answer that does no
better has shown what is striking in the picture, not what the answer came from.

Sources: Abnar & Zuidema 2020 (arXiv 2005.00928); the bias of causal rollout, arXiv 2602.16837; sinks, Xiao et al. 2023
(arXiv 2309.17453), on image tokens Kang et al. 2025 (arXiv 2503.03321).

    attribute(lab, run, method="rollout", target="red", through_vision=True)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from llava_lab.attribution.method import Fusion, Maps, Window, method
from llava_lab.capture import LayerByLayer, Norms, undisturbed, watch_attention
from llava_lab.checks import layer_window, shown
from llava_lab.errors import LabError, OptionError
from llava_lab.models import Lab, layout
from llava_lab.replay.targets import Targets, image_values, segment_mass, target_rows, view_values
from llava_lab.results import Run

BLOCK = 64  # rows at a time; a causal block only needs the rows above it
FLOOR = 1e-12  # added to both sides of the log-ratio; far below any share that can matter
HALF = 0.5  # residual weight of Abnar & Zuidema

OBSERVERS = 8  # later positions needed before a column's statistic is believed
FAIR_SHARES = 5.0  # a sink draws at least this many times what uniform attention would give it
DEVIATIONS = 10.0  # and lies this many robust standard deviations above the median column

Weight = float | Float[Tensor, " S"]  # of the identity, for all positions or for each


def residual_weight(name: str, value: Any) -> float | str:
    """The option `residual`, checked."""
    if isinstance(value, str) and value == "measured":
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise OptionError(f"{name} is the weight of the identity, 0 to 1, or 'measured'; got {shown(value)}")
    return value


@method(
    truth="How the predicting positions are mixed from the image tokens, if only attention and residuals carried anything.",
    source="Abnar & Zuidema 2020; measured residual and causal null added here",
    equation=r"\Big[\prod_{l=L}^{1}\big(r_l I+(1-r_l)\bar A^{l}\big)\Big]_{pj}",
    paper="https://arxiv.org/abs/2005.00928",
    cost="1 forward (2 when sinks are removed)",
    blind_to="values, feed-forward layers, the sign of an effect, and which word is predicted at a position",
    reach="tokens",
    contrast=False,
    mass={"null": "none"},
    streams={"sinks": "keep", "through_vision": False},
)
def rollout(
    lab: Lab,
    run: Run,
    targets: Targets,
    *,
    residual: Annotated[float | str, residual_weight] = "measured",
    layers: Window = None,
    fusion: Fusion = "mean",
    sinks: Literal["keep", "remove"] = "keep",
    null: Literal["none", "causal"] = "causal",
    through_vision: bool = False,
) -> Maps:
    decoder = layout.language_layers(lab.model)
    window = slice(*layer_window(layers, len(decoder)))
    if through_vision:
        layout.require_tower_attention(lab.model, "through_vision=True")
        layout.require_patch_tokens(lab.model, "through_vision=True")
        if run.views:
            raise OptionError("through_vision=True follows one square through the tower, and this picture was seen in several")
    inputs = lab.inputs(run, tiles=True)
    removed = _sinks_of(lab, inputs, decoder[window], fusion) if sinks == "remove" else ()
    language = TowerRollout(causal=True, residual=residual, null=null == "causal", fusion=fusion, removed=removed)
    tower = TowerRollout(causal=False, residual=residual, null=null == "causal", fusion=fusion)
    with undisturbed(lab.model), ExitStack() as watching:
        watching.enter_context(watch_attention(decoder[window], language.reducer()))
        if through_vision:
            watching.enter_context(watch_attention(layout.used_vision_layers(lab.model), tower.reducer()))
        lab.model(**inputs, use_cache=False, logits_to_keep=1)
    total, total_uniform = language.totals
    seen = target_rows(total, range(len(total)), targets)
    uniform = None if total_uniform is None else target_rows(total_uniform, range(len(total)), targets)
    extras: dict[str, Any] = {"mass": segment_mass(seen, run), "residual_by_layer": language.kept}
    if uniform is not None:
        extras["null_mass"] = segment_mass(uniform, run)
    if sinks == "remove":
        extras["sinks"] = [{"position": position, "token": run.tokens[position]} for position in removed]
    if through_vision:
        seen, uniform, lost = chain_through_vision(seen, uniform, tower, run)
        extras |= {"lost_to_cls": lost, "vision_residual_by_layer": tower.kept}
    values = seen if uniform is None else torch.log((seen + FLOOR) / (uniform + FLOOR))
    notes = rollout_notes(window, language, extras)
    forwards = 2 if sinks == "remove" else 1
    return Maps(image_values(values, run), {"forward": forwards}, notes, extras, view_values(values, run))


@method(
    truth="What the vision tower's patches are mixed from, the same for every question and every word.",
    source="control (rollout after Abnar & Zuidema 2020)",
    cost="1 forward of the vision tower alone",
    blind_to="the question and the answer",
    needs="tower attention",
    control=True,
)
def vision(lab: Lab, run: Run, targets: Targets, *, fusion: Fusion = "mean") -> Maps:
    layout.require_patch_tokens(lab.model, "method 'vision'")
    tower = TowerRollout(causal=False, residual=HALF, null=False, fusion=fusion)
    with undisturbed(lab.model), watch_attention(layout.used_vision_layers(lab.model), tower.reducer()):
        layout.vision_tower(lab.model)(lab.inputs(run)["pixel_values"])
    total, _ = tower.totals
    first = _class_tokens(len(total), run.map.rows * run.map.cols)
    seen = total[first:].mean(0)
    values = seen[first:].cpu().numpy().reshape(run.map.rows, run.map.cols)
    notes = ("The vision tower alone, before any question: a control, not an explanation.",)
    extras = {"lost_to_cls": float(seen[:first].sum())}
    return Maps(np.repeat(values[None], len(targets), 0), {"forward": 1}, notes, extras)


@dataclass
class TowerRollout:
    """The running products of one tower, fed by its layers during the forward."""

    causal: bool
    residual: float | str  # "measured" at each layer and position, or the weight itself
    null: bool
    fusion: str
    removed: tuple[int, ...] = ()
    flow: Flow | None = None
    uniform: UniformFlow | None = None
    kept: list[float] = field(default_factory=list)  # mean weight of the identity, per layer
    allowed: Bool[Tensor, "S S"] | None = None  # where the layer under way may look, if that is not all before a row

    def reducer(self) -> LayerByLayer:
        def fold(layer: int, attention: Tensor, norms: Norms | None) -> None:
            self.allowed = watching.allowed
            self._fold(layer, attention, norms)

        watching = LayerByLayer(fold, fusion=self.fusion, norms=self.residual == "measured")
        return watching

    def weight(self, norms: Norms | None) -> Weight:
        """Weight of the identity at one layer, and its mean kept for the notes."""
        weight = float(self.residual) if norms is None else measured_residual(norms)[0]
        self.kept.append(float(weight.mean()) if isinstance(weight, Tensor) else weight)
        return weight

    def _fold(self, layer: int, attention: Float[Tensor, "S S"], norms: Norms | None) -> None:
        if self.flow is None:
            size, device = len(attention), attention.device
            self.flow = Flow(size, causal=self.causal, device=device)
            if self.null:
                self.uniform = UniformFlow(size, causal=self.causal, removed=self.removed, device=device)
        if self.removed:
            attention = remove_columns(attention, self.removed)
        elif self.fusion == "min":  # no key may be wanted by every head
            attention = whole_rows(attention)
        weight, allowed = self.weight(norms), self.allowed
        if allowed is not None and bool(allowed.triu(1).any()):
            self.flow.causal = False  # from here on: the product has entries above its diagonal
        self.flow.step(attention, weight)
        if self.uniform is not None:
            self.uniform.step(weight, allowed)

    @property
    def totals(self) -> tuple[Tensor, Tensor | None]:
        assert self.flow is not None
        return self.flow.total, None if self.uniform is None else self.uniform.total


def measured_residual(norms: Norms) -> Float[Tensor, "B Q"]:
    """Weight of the identity: the stream's share of the two norms added at the attention step."""
    total = norms.stream + norms.branch
    return torch.where(total > 0, norms.stream / total, torch.ones_like(total))


def chain_through_vision(
    seen: Float[Tensor, "N S"], uniform: Float[Tensor, "N S"] | None, vision: TowerRollout, run: Run
) -> tuple[Tensor, Tensor | None, list[float]]:
    """Chain image columns with the tower's rollout; rows and columns are put back at the image's place.

    The CLS row is dropped, as LLaVA drops CLS. What patch rows owe to the CLS *input* has no place in the
    picture; its share of each target's image relevance is returned.
    """
    image = slice(*run.segments["image"])
    tower, blank = vision.totals
    first = _class_tokens(len(tower), image.stop - image.start)
    reached = seen[:, image] @ tower[first:]  # N, CLS + patches
    lost = (reached[:, :first].sum(1) / reached.sum(1).clamp_min(FLOOR)).tolist()
    chained, even = seen.clone(), None if uniform is None else uniform.clone()
    chained[:, image] = reached[:, first:]
    if uniform is not None and even is not None and blank is not None:
        even[:, image] = uniform[:, image] @ blank[first:, first:]
    return chained, even, lost


def _class_tokens(positions: int, patches: int) -> int:
    """1 where the tower has a class token before its patches, 0 where it has none."""
    if positions - patches not in (0, 1):
        raise LabError(f"expected {patches} patches and at most one CLS token in the vision tower, got {positions} positions")
    return positions - patches


# -- the products ---------------------------------------------------------------------------


class Flow:
    """The running product, starting from the identity. One ``S x S`` float32 matrix.

    `causal` promises that attention is lower triangular, which halves the work and more.
    """

    def __init__(self, size: int, *, causal: bool, device: torch.device | str = "cpu") -> None:
        self.total: Float[Tensor, "S S"] = torch.eye(size, device=device)
        self.causal = causal

    def step(self, attention: Float[Tensor, "S S"], residual: Weight) -> None:
        """Put one more layer on top: ``total = ((1 - residual) attention + residual I) total``."""
        keep = as_column(residual, attention)
        if not self.causal:
            self.total = torch.lerp(attention @ self.total, self.total, keep)
            return
        # A causal row only needs rows at or above it, so going from the last block up works in place.
        for start in reversed(range(0, len(attention), BLOCK)):
            stop = min(start + BLOCK, len(attention))
            rows = slice(start, stop)
            mixed = attention[rows, :stop] @ self.total[:stop, :stop]
            self.total[rows, :stop] = torch.lerp(mixed, self.total[rows, :stop], keep[rows])


class UniformFlow:
    """The same product under uniform attention, in ``S x S`` time per layer instead of ``S x S x S``.

    Each row attends equally to every column it may see, those in `removed` left out: all before it, or in a layer whose
    mask is another one (a sliding window) those that the mask allows, which takes ``S x S x S``.
    """

    def __init__(self, size: int, *, causal: bool, removed: Sequence[int] = (), device: torch.device | str = "cpu") -> None:
        self.total: Float[Tensor, "S S"] = torch.eye(size, device=device)
        self.causal = causal
        kept = torch.ones(size, 1, device=device)
        kept[list(removed)] = 0.0
        self._kept = kept if removed else None
        self._count = kept.cumsum(0) if causal else kept.sum().expand(size, 1)  # columns each row may look at

    def step(self, residual: Weight, allowed: Bool[Tensor, "S S"] | None = None) -> None:
        """Put one more uniform layer on top."""
        if allowed is not None:
            even = allowed.to(self.total) if self._kept is None else allowed * self._kept.T
            self.total = torch.lerp(whole_rows(even) @ self.total, self.total, as_column(residual, self.total))
            return
        offered = self.total if self._kept is None else self._kept * self.total
        if self.causal:
            mixed = offered.cumsum(0).div_(self._count.clamp_min(1.0))
            if self._kept is not None:  # nothing left to look at: the position keeps itself
                mixed = torch.where(self._count > 0, mixed, self.total)
        else:
            mixed = (offered.sum(0) / self._count.clamp_min(1.0)).expand_as(offered)
        self.total = torch.lerp(mixed, self.total, as_column(residual, self.total))


def remove_columns(attention: Float[Tensor, "S S"], columns: Sequence[int]) -> Float[Tensor, "S S"]:
    """Take `columns` out and let each row sum to 1 again; a row with nothing left attends to itself."""
    left = attention.clone()
    left[:, list(columns)] = 0.0
    return whole_rows(left)


def whole_rows(attention: Float[Tensor, "S S"]) -> Float[Tensor, "S S"]:
    """Each row scaled to sum to 1; an empty row attends to itself."""
    total = attention.sum(-1, keepdim=True)
    itself = torch.eye(len(attention), device=attention.device)
    return torch.where(total > 0, attention / total.clamp_min(torch.finfo(attention.dtype).tiny), itself)


def as_column(residual: Weight, like: Tensor) -> Float[Tensor, "S 1"]:
    """A weight for all positions, or one for each, as a column beside `like`."""
    if isinstance(residual, Tensor):
        return residual.to(like)[:, None]
    return torch.full((len(like), 1), float(residual), device=like.device)


# -- sink columns ---------------------------------------------------------------------------


def _sinks_of(lab: Lab, inputs: dict[str, Tensor], layers: list[nn.Module], fusion: str) -> tuple[int, ...]:
    """A forward of its own: which columns are sinks must be known before the first layer is folded in."""
    pulls: list[Tensor] = []

    def fold(layer: int, attention: Tensor, norms: Norms | None) -> None:
        pulls.append(column_pull(attention, reducer.allowed))

    reducer = LayerByLayer(fold, fusion=fusion)
    with undisturbed(lab.model), watch_attention(layers, reducer):
        lab.model(**inputs, use_cache=False, logits_to_keep=1)
    return find_sinks(torch.stack(pulls).mean(0))


def column_pull(attention: Float[Tensor, "S S"], allowed: Bool[Tensor, "S S"] | None = None) -> Float[Tensor, " S"]:
    """Attention each column gets from later rows, as a multiple of what uniform attention gives it: causal, or as `allowed`.

    Uniform attention gives 1 everywhere; the last column, which no row follows, is given 1.
    """
    size = len(attention)
    strict = attention.tril(-1).sum(0)
    shares = 1 / torch.arange(1, size + 1, device=attention.device, dtype=torch.float32)
    fair = shares.flip(0).cumsum(0).flip(0) - shares  # of the rows after each column
    if allowed is not None:
        fair = whole_rows(allowed.float()).tril(-1).sum(0)
    return torch.where(fair > 0, strict / fair.clamp_min(torch.finfo(fair.dtype).tiny), torch.ones_like(fair))


def find_sinks(pull: Float[Tensor, " S"]) -> tuple[int, ...]:
    """Columns whose pull (mean over layers) is an outlier among all columns, in order."""
    judged = pull[: max(len(pull) - OBSERVERS, 0)]
    if len(judged) == 0:
        return ()
    middle = judged.median()
    spread = 1.4826 * (judged - middle).abs().median()  # equals the standard deviation for a normal distribution
    limit = torch.clamp(middle + DEVIATIONS * spread, min=FAIR_SHARES)
    return tuple(int(i) for i in torch.nonzero(judged > limit)[:, 0])


def rollout_notes(window: slice, language: TowerRollout, extras: dict[str, Any]) -> tuple[str, ...]:
    """What the map was made with, one sentence each."""
    if language.residual == "measured":
        mean = sum(language.kept) / len(language.kept)
        notes = [f"Residual weight measured at each layer and position, {mean:.2f} on average."]
    else:
        weight = float(language.residual)
        notes = [f"Residual weight {weight:g} at every layer, {1 - weight:g} on attention."]
    notes.append(f"Heads fused by {language.fusion}, layers {window.start} to {window.stop - 1}.")
    if language.null:
        notes.append("Natural log of the ratio to uniform causal attention: 0 is what the mask alone would give.")
    else:
        notes.append("Not divided by the causal null: early image rows look important on any causal model.")
    if "sinks" in extras:
        removed = ", ".join(repr(sink["token"]) for sink in extras["sinks"]) or "none found"
        notes.append(f"Sink columns removed from the language model's attention: {removed}.")
    if "lost_to_cls" in extras:
        share = sum(extras["lost_to_cls"]) / len(extras["lost_to_cls"])
        notes.append(
            f"Chained through the vision tower; {share:.0%} of the image relevance went to its CLS token and is not shown."
        )
    return tuple(notes)
