"""Attention rollout as arithmetic: the running product of attention matrices, one layer at a time.

``R = A~_L ... A~_1`` with ``A~ = (1 - residual) A + residual I``: row i of R says how the state at
position i is mixed from the inputs, if values and feed-forward layers are ignored. Rows sum to 1.

It knows matrices only, no model. `UniformFlow` is the same product when every layer attends
uniformly to what it may see: what a rollout map looks like when attention says nothing. On a
causal decoder that is not flat at all (early positions win), which is why it is worth dividing by.

Sources: Abnar & Zuidema 2020 (arXiv 2005.00928) for the product with half residual.

Sink columns: positions that draw attention from everywhere whatever they hold, usually the first token.

They are found by their own statistics in the run at hand, never by constants from a paper. A position
that many later positions look at because it matters is found too: what is removed is always listed.

Source of the phenomenon: Xiao et al. 2023 (arXiv 2309.17453); on image tokens Kang et al. 2025 (arXiv 2503.03321).

Attention rollout through the language model, and on request through the vision tower, in one forward.

The product of all layers' attention is carried along while the forward runs, so no layer's attention
outlives it. Plain rollout (half residual, no null) is nearly blind on a deep causal decoder: most of it
lands on the first token and the top rows of the picture whatever is shown. Hence the defaults here:
the residual weight is *measured* at each layer and position, and the map is the log-ratio to the same
pipeline under uniform causal attention, so that 0 means "no more than the mask alone would give".
Abnar & Zuidema's own rollout is ``residual=0.5, null="none"`` with everything else as it stands.

It follows attention weights and residuals only: values and feed-forward layers are ignored.

Sources: Abnar & Zuidema 2020 (arXiv 2005.00928); the bias of causal rollout, arXiv 2602.16837.

What the vision tower looks at whatever is asked: a control that has seen the picture and not the question.

Rollout through the tower's attention, averaged over the patch rows that LLaVA passes on (never the class
token's, which it drops). A map of an answer that does no better than this one has shown what is striking
in the picture, not what the answer came from.

Source: Abnar & Zuidema 2020 (arXiv 2005.00928) on the tower alone; as a baseline, our own choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from llava_lab.attribution.method import Fusion, Maps, Window, method
from llava_lab.capture import LayerByLayer, Norms, undisturbed, watch_attention
from llava_lab.checks import layer_window
from llava_lab.errors import LabError, OptionError
from llava_lab.models.layout import language_layers, require_patch_tokens, used_vision_layers, vision_tower
from llava_lab.replay.targets import Targets, image_values, segment_mass, target_rows, view_values
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab

BLOCK = 64  # rows at a time; a causal block only needs the rows above it

Weight = float | Float[Tensor, " S"]  # of the identity, for all positions or for each


class Flow:
    """The running product, starting from the identity. One ``S x S`` float32 matrix.

    `causal` promises that attention is lower triangular, which halves the work and more.
    """

    def __init__(self, size: int, *, causal: bool, device: torch.device | str = "cpu") -> None:
        self.total: Float[Tensor, "S S"] = torch.eye(size, device=device)
        self.causal = causal

    def step(self, attention: Float[Tensor, "S S"], residual: Weight) -> None:
        """Put one more layer on top: ``total = ((1 - residual) attention + residual I) total``."""
        keep = _column(residual, attention)
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

    Each row attends equally to every column it may see, those in `removed` left out.
    """

    def __init__(self, size: int, *, causal: bool, removed: Sequence[int] = (), device: torch.device | str = "cpu") -> None:
        self.total: Float[Tensor, "S S"] = torch.eye(size, device=device)
        self.causal = causal
        kept = torch.ones(size, 1, device=device)
        kept[list(removed)] = 0.0
        self._kept = kept if removed else None
        self._count = kept.cumsum(0) if causal else kept.sum().expand(size, 1)  # columns each row may look at

    def step(self, residual: Weight) -> None:
        """Put one more uniform layer on top."""
        offered = self.total if self._kept is None else self._kept * self.total
        if self.causal:
            mixed = offered.cumsum(0).div_(self._count.clamp_min(1.0))
            if self._kept is not None:  # nothing left to look at: the position keeps itself
                mixed = torch.where(self._count > 0, mixed, self.total)
        else:
            mixed = (offered.sum(0) / self._count.clamp_min(1.0)).expand_as(offered)
        self.total = torch.lerp(mixed, self.total, _column(residual, self.total))


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


def _column(residual: Weight, like: Tensor) -> Float[Tensor, "S 1"]:
    if isinstance(residual, Tensor):
        return residual.to(like)[:, None]
    return torch.full((len(like), 1), float(residual), device=like.device)


OBSERVERS = 8  # later positions needed before a column's statistic is believed
FAIR_SHARES = 5.0  # a sink draws at least this many times what uniform attention would give it
DEVIATIONS = 10.0  # and lies this many robust standard deviations above the median column


def column_pull(attention: Float[Tensor, "S S"]) -> Float[Tensor, " S"]:
    """Attention each column gets from later rows, as a multiple of what uniform causal attention gives it.

    Uniform causal attention gives 1 everywhere; the last column, which no row follows, is given 1.
    """
    size = len(attention)
    strict = attention.tril(-1).sum(0)
    shares = 1 / torch.arange(1, size + 1, device=attention.device, dtype=torch.float32)
    fair = shares.flip(0).cumsum(0).flip(0) - shares  # of the rows after each column
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


def residual_weight(name: str, value: Any) -> float | str:
    """The option `residual`, checked."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if value != "measured" and not (number and 0 <= float(value) <= 1):
        raise OptionError(f"{name} is the weight of the identity, 0 to 1, or 'measured'; got {value!r}")
    return value


FLOOR = 1e-12  # added to both sides of the log-ratio; far below any share that can matter


@dataclass
class _Rollout:
    """The running products of one tower, fed by its layers during the forward."""

    causal: bool
    residual: float | None  # None: measured
    null: bool
    fusion: str
    removed: tuple[int, ...] = ()
    flow: Flow | None = None
    uniform: UniformFlow | None = None
    kept: list[float] = field(default_factory=list)  # mean weight of the identity, per layer

    def reducer(self) -> LayerByLayer:
        return LayerByLayer(self._fold, fusion=self.fusion, norms=self.residual is None)

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
        weight = self.residual if norms is None else measured_residual(norms)[0]
        assert weight is not None
        self.kept.append(float(weight.mean()) if isinstance(weight, Tensor) else weight)
        self.flow.step(attention, weight)
        if self.uniform is not None:
            self.uniform.step(weight)

    @property
    def totals(self) -> tuple[Tensor, Tensor | None]:
        assert self.flow is not None
        return self.flow.total, None if self.uniform is None else self.uniform.total


def measured_residual(norms: Norms) -> Float[Tensor, "B Q"]:
    """Weight of the identity: the stream's share of the two norms added at the attention step."""
    total = norms.stream + norms.branch
    return torch.where(total > 0, norms.stream / total, torch.ones_like(total))


@method(
    truth="How the predicting positions are mixed from the image tokens, if only attention and residuals carried anything.",
    source="Abnar & Zuidema 2020; measured residual and causal null added here",
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
    residual: Annotated[Any, residual_weight] = "measured",
    layers: Window = None,
    fusion: Fusion = "mean",
    sinks: Literal["keep", "remove"] = "keep",
    null: Literal["none", "causal"] = "causal",
    through_vision: bool = False,
) -> Maps:
    decoder = language_layers(lab.model)
    start, stop = layer_window(layers, len(decoder))
    window = decoder[start:stop]
    find = sinks == "remove"
    if through_vision:
        require_patch_tokens(lab.model, "through_vision=True")
        if run.views:
            raise OptionError("through_vision=True follows one square through the tower, and this picture was seen in several")
    inputs = lab.inputs(run, tiles=True)
    removed = _sinks(lab, inputs, window, fusion) if find else ()
    fixed = None if residual == "measured" else float(residual)
    language = _Rollout(True, fixed, null == "causal", fusion, removed)
    vision = _Rollout(False, fixed, null == "causal", fusion)
    with undisturbed(lab.model), watch_attention(window, language.reducer()):
        if through_vision:
            with watch_attention(used_vision_layers(lab.model), vision.reducer()):
                lab.model(**inputs, use_cache=False, logits_to_keep=1)
        else:
            lab.model(**inputs, use_cache=False, logits_to_keep=1)
    seen, uniform = (None if total is None else _rows(total, targets) for total in language.totals)
    assert seen is not None
    extras: dict[str, Any] = {"mass": segment_mass(seen, run), "residual_by_layer": language.kept}
    if uniform is not None:
        extras["null_mass"] = segment_mass(uniform, run)
    if find:
        extras["sinks"] = [{"position": i, "token": run.tokens[i]} for i in removed]
    if through_vision:
        seen, uniform, lost = _through_vision(seen, uniform, vision, run)
        extras |= {"lost_to_cls": lost, "vision_residual_by_layer": vision.kept}
    values = seen if uniform is None else torch.log((seen + FLOOR) / (uniform + FLOOR))
    notes = _notes((start, stop), language, [run.tokens[i] for i in removed] if find else None, extras.get("lost_to_cls"))
    return Maps(image_values(values, run), {"forward": 2 if find else 1}, notes, extras, view_values(values, run))


def _rows(total: Float[Tensor, "S S"], targets: Targets) -> Float[Tensor, "N S"]:
    return target_rows(total, range(len(total)), targets)


def _sinks(lab: Lab, inputs: dict[str, Tensor], layers: list[nn.Module], fusion: str) -> tuple[int, ...]:
    """A forward of its own: which columns are sinks must be known before the first layer is folded in."""
    pulls: list[Tensor] = []
    reducer = LayerByLayer(lambda layer, attention, norms: pulls.append(column_pull(attention)), fusion=fusion)
    with undisturbed(lab.model), watch_attention(layers, reducer):
        lab.model(**inputs, use_cache=False, logits_to_keep=1)
    return find_sinks(torch.stack(pulls).mean(0))


def _through_vision(
    seen: Float[Tensor, "N S"], uniform: Float[Tensor, "N S"] | None, vision: _Rollout, run: Run
) -> tuple[Tensor, Tensor | None, list[float]]:
    """Chain image columns with the tower's rollout; rows and columns are put back at the image's place.

    The CLS row is dropped, as LLaVA drops CLS. What patch rows owe to the CLS *input* has no place in the
    picture; its share of each target's image relevance is returned.
    """
    image, patches = slice(*run.segments["image"]), run.map.rows * run.map.cols
    tower, blank = vision.totals
    first = len(tower) - patches  # 1 with a CLS token, 0 without
    if first not in (0, 1) or image.stop - image.start != patches:
        raise LabError(f"expected {patches} patches and at most one CLS token in the vision tower, got {len(tower)} positions")
    reached = seen[:, image] @ tower[first:]  # N, CLS + patches
    lost = (reached[:, :first].sum(1) / reached.sum(1).clamp_min(FLOOR)).tolist()
    chained, even = seen.clone(), None if uniform is None else uniform.clone()
    chained[:, image] = reached[:, first:]
    if uniform is not None and even is not None and blank is not None:
        even[:, image] = uniform[:, image] @ blank[first:, first:]
    return chained, even, lost


def _notes(window: tuple[int, int], language: _Rollout, removed: list[str] | None, lost: list[float] | None) -> tuple[str, ...]:
    """What the map was made with, one sentence each."""
    notes = []
    if language.residual is None:
        mean = sum(language.kept) / len(language.kept)
        notes.append(f"Residual weight measured at each layer and position, {mean:.2f} on average.")
    else:
        notes.append(f"Residual weight {language.residual:g} at every layer, {1 - language.residual:g} on attention.")
    notes.append(f"Heads fused by {language.fusion}, layers {window[0]} to {window[1] - 1}.")
    if language.null:
        notes.append("Natural log of the ratio to uniform causal attention: 0 is what the mask alone would give.")
    else:
        notes.append("Not divided by the causal null: early image rows look important on any causal model.")
    if removed is not None:
        named = ", ".join(map(repr, removed)) or "none found"
        notes.append(f"Sink columns removed from the language model's attention: {named}.")
    if lost is not None:
        share = sum(lost) / len(lost)
        notes.append(
            f"Chained through the vision tower; {share:.0%} of the image relevance went to its CLS token and is not shown."
        )
    return tuple(notes)


RESIDUAL = 0.5  # Abnar & Zuidema's


@method(
    truth="What the vision tower's patches are mixed from, the same for every question and every word.",
    source="control (rollout after Abnar & Zuidema 2020)",
    cost="1 forward of the vision tower alone",
    blind_to="the question and the answer",
    control=True,
)
def vision(lab: Lab, run: Run, targets: Targets, *, fusion: Fusion = "mean") -> Maps:
    require_patch_tokens(lab.model, "method 'vision'")
    flows: list[Flow] = []

    def fold(layer: int, attention: Tensor, norms: Norms | None) -> None:
        if not flows:
            flows.append(Flow(len(attention), causal=False, device=attention.device))
        flows[0].step(whole_rows(attention) if fusion == "min" else attention, RESIDUAL)

    layers = used_vision_layers(lab.model)
    with undisturbed(lab.model), watch_attention(layers, LayerByLayer(fold, fusion=fusion)):
        vision_tower(lab.model)(lab.inputs(run)["pixel_values"])
    total, patches = flows[0].total, run.map.rows * run.map.cols
    first = len(total) - patches  # 1 with a class token, 0 without
    if first not in (0, 1):
        raise LabError(f"expected {patches} patches and at most one CLS token in the vision tower, got {len(total)} positions")
    seen = total[first:].mean(0)
    values = seen[first:].cpu().numpy().reshape(run.map.rows, run.map.cols)
    notes = ("The vision tower alone, before any question: a control, not an explanation.",)
    extras = {"lost_to_cls": float(seen[:first].sum())}
    return Maps(np.repeat(values[None], len(targets), 0), {"forward": 1}, notes, extras)
