"""Gradient methods: what would change the target's logit, at the pixels, at the tower's output, or at the image tokens.

They explain the *logit* of what was said, summed over the target's tokens (for a contrast, the difference of the two
words' logits), not its log-probability: the softmax would mix in every other word. At the connector's output a patch is
its image token, into which the vision tower has already mixed its neighbours; at the pixels it is what was in the picture
there, and the mixing is part of what is explained. Places and fills are occlusion's own, so that a gradient times a step
is comparable with the real step.

- ``gradient_input``: what each patch would add to the logit if the model were the straight line it is just here. With a
  fill, ``gradient x (value - fill)`` is the first-order answer to "what would be lost if this patch were filled": every
  patch's occlusion at once, right as far as the model is linear over that step. Without one the step goes all the way to
  zero, which no picture is.
- ``integrated_gradients`` follows the straight line from a filled picture to the picture; its values sum to the whole
  change of the logit (how nearly is reported); captum does it, and is handed a gradient with one more axis, the targets, so
  that all of them share each forward. ``smoothgrad`` looks at noisy copies and averages the noise away.
- ``gradcam``: which channels the logit wants more of, and where the tower has them. The layer is the one LLaVA uses,
  patches only. A channel counts for what it does everywhere: a map shows where the wanted channels are, not which patch
  the answer used.

Sources: Shrikumar et al. 2016 (arXiv 1605.01713); Simonyan et al. 2013 (arXiv 1312.6034); Sundararajan et al. 2017 (arXiv
1703.01365); Smilkov et al. 2017 (arXiv 1706.03825); captum's ``IntegratedGradients``, ``InputXGradient``, ``Saliency``
and ``NoiseTunnel``; Selvaraju et al. 2017 (arXiv 1610.02391), equations 1 and 2, with patches for pixels.

    attribute(lab, run, method="gradient_input", target="red", at="pixels", fill="grey")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lab.attribution.method import At, Count, FillOf, Maps, PlainFill, Seed, captum_for, method
from llava_lab.capture import undisturbed
from llava_lab.checks import Sweep
from llava_lab.errors import OptionError
from llava_lab.models import Lab
from llava_lab.replay.alter import PLACES, InModel, Tokens, open_altered
from llava_lab.replay.fills import FILLS
from llava_lab.replay.prefix import embedded
from llava_lab.replay.score import read_scores
from llava_lab.replay.targets import Targets, predicting_rows
from llava_lab.results import Run


@method(
    truth="How much the target's logit would lose if a patch were taken away and the model were linear.",
    source="Shrikumar et al. 2016; with a fill, the first-order form of occlusion",
    equation=r"\sum_d x_{jd}\,\frac{\partial y}{\partial x_{jd}}",
    paper="https://arxiv.org/abs/1605.01713",
    cost="1 forward, 1 backward (each further target adds its own reverse pass over the same graph)",
    blind_to="everything beyond first order: saturation, and patches that stand in for one another",
    needs="gradients",
)
def gradient_input(
    lab: Lab, run: Run, targets: Targets, *, at: At = "projector", fill: Annotated[str | None, FillOf((None, *FILLS))] = None
) -> Maps:
    with undisturbed(lab.model):
        here = open_point(lab, run, targets, at=at, fill=fill)
        with torch.enable_grad():
            value = here.value.clone().requires_grad_()
            scores = here.scores(value)
            slopes = gradients(scores, value)[0]  # N, as `value`
    values = here.to_patches(slopes * (here.value - here.fill), (run.map.rows, run.map.cols))
    step = "the whole value, as if zero were near" if fill is None else f"its distance to the {fill} fill"
    notes = (
        f"Gradient of the target's logit (summed over its tokens; for a contrast, of the difference) at {PLACES[at]}, "
        f"times {step}, summed over each patch. First order only.",
    )
    extras = {"score": scores[0].tolist(), "attributed": values.sum((1, 2)).tolist()}
    return Maps(values.cpu().numpy(), {"forward": 1 + here.passes, "backward": 1}, notes, extras)


@method(
    truth="What each patch adds to the target's logit, summed along the straight line from a filled picture to the picture.",
    source="Sundararajan et al. 2017, by captum's IntegratedGradients",
    equation=r"\sum_d (x-x')_{jd}\int_0^1\frac{\partial y(x'+\alpha(x-x'))}{\partial x_{jd}}\,d\alpha",
    paper="https://arxiv.org/abs/1703.01365",
    cost="one forward and one backward per step, plus 3 forwards at most",
    blind_to="every way there but the straight one, and what the fill itself says",
    needs="gradients",
    economy={"steps": 12},
)
def integrated_gradients(
    lab: Lab,
    run: Run,
    targets: Targets,
    *,
    at: At = "projector",
    fill: PlainFill = "grey",
    steps: Count = 16,
    batch: Count = 1,
    rule: Literal["gausslegendre", "riemann_middle", "riemann_trapezoid"] = "gausslegendre",
) -> Maps:
    captum = captum_for("integrated_gradients")
    with undisturbed(lab.model):
        here = open_point(lab, run, targets, at=at, fill=fill)
        ends = torch.cat([here.scores(here.value), here.scores(here.fill)])  # picture, fill; targets
        path = captum.IntegratedGradients(here.scores)
        with Sweep("integrated gradients", total=steps) as done:
            path.gradient_func = counted = CountedGradients(here, len(targets), done)
            found = path.attribute(here.value[:, None], here.fill[:, None], n_steps=steps, method=rule, internal_batch_size=batch)
    values = here.to_patches(found[0], (run.map.rows, run.map.cols))
    moved, summed = (ends[0] - ends[1]).tolist(), values.sum((1, 2)).tolist()
    gaps = [have - want for have, want in zip(summed, moved, strict=True)]
    extras = {"score": ends[0].tolist(), "score_at_fill": ends[1].tolist(), "attributed": summed, "completeness_gap": gaps}
    worst = max(range(len(gaps)), key=lambda i: abs(gaps[i]))
    notes = [
        f"Gradient of the target's logit averaged over {steps} steps from the {fill} fill to the picture, at {PLACES[at]}, "
        f"times the distance; completeness: the map sums to {summed[worst]:.3g} and the logit changed by {moved[worst]:.3g}, "
        f"a gap of {gaps[worst]:.2g}{' for the worst target' if len(gaps) > 1 else ''}."
    ]
    if counted.interrupted:
        notes.append(
            f"Interrupted after {done.count} of {steps} steps: only the path's first part, from the fill, is in the map."
        )
    passes = {"forward": done.count + 2 + here.passes, "backward": done.count}
    return Maps(values.cpu().numpy(), passes, tuple(notes), extras, interrupted=counted.interrupted)


def noise_share(name: str, value: Any) -> float:
    """The option `noise`, checked."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise OptionError(f"{name} is a share of the values' range, 0 to 1, got {value!r}")
    return float(value)


@method(
    truth="Gradient times input, averaged over noisy copies of the picture so that what only one of them shows is lost.",
    source="Smilkov et al. 2017, with the noise of captum's NoiseTunnel",
    equation=r"\frac{1}{n}\sum_{i=1}^{n}(x_j+\varepsilon_{ij})\cdot\nabla_{\!j}\,y(x+\varepsilon_i)",
    paper="https://arxiv.org/abs/1706.03825",
    cost="one forward and one backward per copy, plus 1 forward",
    blind_to="what lies further away than the noise reaches",
    needs="gradients",
    economy={"samples": 6},
)
def smoothgrad(
    lab: Lab,
    run: Run,
    targets: Targets,
    *,
    at: At = "projector",
    samples: Count = 8,
    noise: Annotated[float, noise_share] = 0.15,
    times_input: bool = True,
    batch: Count = 1,
    seed: Seed = 0,
) -> Maps:
    total: float | Tensor = 0.0  # of the gradients so far
    with undisturbed(lab.model):
        torch.manual_seed(seed)  # the draws are those of captum's NoiseTunnel; `undisturbed` puts the generator's state back
        here = open_point(lab, run, targets, at=at)
        spread = torch.full_like(here.value, noise * float(here.value.max() - here.value.min()))
        with Sweep("smoothgrad", total=samples, unit="copy") as done:
            slopes_at = CountedGradients(here, len(targets), done)
            while done.count < samples and not slopes_at.interrupted:
                # each copy by itself: a batch's noise drawn at once would be other noise
                copies = [here.value + torch.normal(0, spread) for _ in range(min(batch, samples - done.count))]
                noisy = torch.cat(copies)[:, None]
                (slopes,) = slopes_at(None, (noisy,))
                if not slopes_at.interrupted:
                    total = total + (slopes * noisy if times_input else slopes).sum(0)
        score = here.scores(here.value)[0]
    mean = torch.as_tensor(total) / done.count  # N, as the point's value
    grid = (run.map.rows, run.map.cols)
    values = here.to_patches(mean, grid) if times_input else here.to_patches(mean.square(), grid).sqrt()
    what = "times the noisy input, summed over each patch" if times_input else "its length over each patch (no sign)"
    notes = [
        f"Gradient of the target's logit at {PLACES[at]}, mean over {done.count} noisy copies (standard deviation {noise:g} "
        f"of the values' range), {what}."
    ]
    if slopes_at.interrupted:
        notes.append(f"Interrupted after {done.count} of {samples} copies; the mean is over those.")
    passes = {"forward": done.count + 1, "backward": done.count}
    return Maps(values.cpu().numpy(), passes, tuple(notes), {"score": score.tolist()}, interrupted=slopes_at.interrupted)


@method(
    truth="Where the vision tower holds the features that, over the whole picture, raise the target's logit.",
    source="Selvaraju et al. 2017, on the tower layer that LLaVA reads",
    equation=r"\Big(\sum_d f_{jd}\,\frac{1}{N}\sum_i\frac{\partial y}{\partial f_{id}}\Big)^{+}",
    paper="https://arxiv.org/abs/1610.02391",
    cost="1 forward, 1 backward (each further target adds its own reverse pass over the same graph)",
    blind_to="which patches the language model looked at: a channel's weight is the same everywhere",
    needs="gradients",
)
def gradcam(lab: Lab, run: Run, targets: Targets, *, positive: bool = True) -> Maps:
    with undisturbed(lab.model):
        here = open_point(lab, run, targets, at="vision")
        with torch.enable_grad():
            features = here.value.clone().requires_grad_()  # 1 C rows cols
            scores = here.scores(features)
            slopes = gradients(scores, features)[0]  # N C rows cols
    channels = slopes.mean((2, 3), keepdim=True)
    config: Any = lab.model.config
    # channels that say where a patch lies are no features: they would draw the same slope over every map
    features_of = slice(0, here.value.shape[1] - getattr(config.vision_config, "place_channels", 0))
    values = here.to_patches((channels * here.value)[:, features_of], (run.map.rows, run.map.cols))
    hidden = (values < 0).float().mean((1, 2)).tolist()
    notes = ["Channels of the tower's used layer, weighed by the mean gradient of the logit (for a contrast, of the difference)."]
    if positive:
        values = values.clamp_min(0)
        notes.append(f"Negative values are cut to 0, as in the paper; they were {sum(hidden) / len(hidden):.0%} of the patches.")
    extras = {"score": scores[0].tolist(), "negative_share": hidden}
    return Maps(values.cpu().numpy(), {"forward": 1, "backward": 1}, tuple(notes), extras)


# -- the logits as a function of the picture -------------------------------------------------


Scores = Callable[[Float[Tensor, "B C Y X"]], Float[Tensor, "B N"]]


@dataclass(frozen=True)
class Point:
    """The picture at one place in the model, float32, and the targets' logits from there on."""

    value: Float[Tensor, "1 C Y X"]
    fill: Float[Tensor, "1 C Y X"]
    scores: Scores
    patch: int  # side of a patch in `value`: pixels, or one token
    passes: int  # pictures through the tower or the model that made the two

    def to_patches(self, values: Float[Tensor, "N C Y X"], grid: tuple[int, int]) -> Float[Tensor, "N rows cols"]:
        """The sum of `values` over everything that belongs to a patch."""
        (rows, cols), side = grid, self.patch
        planes = values.sum(1)[:, : rows * side, : cols * side]
        return planes.reshape(-1, rows, side, cols, side).sum((2, 4))


def open_point(lab: Lab, run: Run, targets: Targets, *, at: str, fill: str | None = None) -> Point:
    """The run at ``pixels``, ``vision`` (what the connector reads) or ``projector`` (the image tokens it gives).

    `fill` is one of `FILLS`; without it `Point.fill` is zero. Call it, and its `scores`, inside `capture.undisturbed`.
    """
    level = open_altered(lab, run, targets, at=at, fill=fill or "mean", fills=FILLS)  # the mean costs no pass
    where = predicting_rows(targets)
    inputs = inputs_until(lab, run, where)
    assert isinstance(level, InModel), "a run with several views was refused above"
    keep = torch.tensor(where, device=lab.device)
    model: Any = lab.model

    def scores(batch: Tensor) -> Tensor:
        given: dict[str, Tensor] = {"attention_mask": inputs["attention_mask"].expand(len(batch), -1)}
        batch = batch.to(level.values.dtype)
        if not isinstance(level, Tokens):
            given |= {"input_ids": inputs["input_ids"].expand(len(batch), -1), "pixel_values": batch}
        else:
            given["inputs_embeds"] = embedded(lab, run, level.tokens(batch))[:, : where[-1] + 1]
        return read_scores(model(**given, logits_to_keep=keep, use_cache=False).logits, where, targets, score="logit")

    filled = level.filling(fill).float() if fill else torch.zeros_like(level.values, dtype=torch.float32)
    return Point(level.values.float(), filled, scores, level.patch, level.passes)


def gradients(scores: Float[Tensor, "B N"], value: Tensor) -> Float[Tensor, "B N ..."]:
    """The gradient of every target's score at `value` (B, ...), one way back each through the same graph."""
    count = scores.shape[1]
    slopes = [
        torch.autograd.grad(scores[:, target].sum(), value, retain_graph=target + 1 < count)[0].float() for target in range(count)
    ]
    return torch.stack(slopes, 1)


def inputs_until(lab: Lab, run: Run, at: Sequence[int]) -> dict[str, Tensor]:
    """The run as model input, up to the last of the positions `at`: what comes after cannot matter to them."""
    inputs = lab.inputs(run)
    stop = max(at) + 1
    return {name: value if name == "pixel_values" else value[:, :stop] for name, value in inputs.items()}


class CountedGradients:
    """captum's gradient function: all targets at once, counted; Ctrl-C ends the path where it got to.

    captum takes no interrupt, so after one it is given zeros until it is through.
    """

    def __init__(self, here: Point, targets: int, done: Sweep) -> None:
        self.here, self.targets, self.done = here, targets, done
        self.interrupted = False

    def __call__(
        self, forward_fn: Any, inputs: tuple[Tensor, ...], target_ind: Any = None, additional_forward_args: Any = None
    ) -> tuple[Tensor, ...]:
        (points,) = inputs  # B, 1, then as the point's value: the 1 is where the targets go
        if not self.interrupted:
            try:
                with torch.enable_grad():
                    value = points.detach().squeeze(1).requires_grad_()
                    slopes = gradients(self.here.scores(value), value)
                self.done.step(len(points))
                return (slopes,)
            except KeyboardInterrupt:
                if not self.done.count:
                    raise
                self.interrupted = True
        return (points.new_zeros(len(points), self.targets, *points.shape[2:]),)
