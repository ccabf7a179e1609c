"""Integrated gradients and SmoothGrad: the gradient averaged along a path, or over noisy neighbours. captum does the averaging.

Both answer the complaint that a gradient at one point is local: integrated gradients follow the straight line from a
filled picture to the picture, and their values sum to the whole change of the logit (how nearly is reported);
SmoothGrad looks at the surroundings and averages the noise away.

All targets share each forward: captum is handed a gradient with one more axis, the targets.

Sources: Sundararajan et al. 2017 (arXiv 1703.01365); Smilkov et al. 2017 (arXiv 1706.03825); captum's
``IntegratedGradients``, ``InputXGradient``, ``Saliency`` and ``NoiseTunnel``.
"""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from llava_lab.attribution.base import Maps, Method, Targets, choose, whole_number
from llava_lab.attribution.differentiable import AT, WORDS, Point, gradients, open_point, refuse_quantised
from llava_lab.attribution.fills import FILLS
from llava_lab.capture import undisturbed
from llava_lab.errors import LabError, OptionError
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab

PATIENCE = 2.0  # seconds before a progress bar appears
RULES = ("gausslegendre", "riemann_middle", "riemann_trapezoid")


class _Steps:
    """captum's gradient function: all targets at once, counted; Ctrl-C ends the path where it got to."""

    def __init__(self, here: Point, total: int, targets: int, name: str) -> None:
        self.here, self.total, self.targets, self.done = here, total, targets, 0
        self.interrupted = False
        self.progress = tqdm(total=total, desc=name, unit="step", delay=PATIENCE, leave=False)

    def __call__(
        self, forward_fn: Any, inputs: tuple[Tensor, ...], target_ind: Any = None, additional_forward_args: Any = None
    ) -> tuple[Tensor, ...]:
        (points,) = inputs  # B, 1, then as the point's value: the 1 is where the targets go
        if not self.interrupted:
            try:
                return (self._gradients(points),)
            except KeyboardInterrupt:
                if not self.done:
                    raise
                self.interrupted = True
        return (points.new_zeros(len(points), self.targets, *points.shape[2:]),)

    def _gradients(self, points: Tensor) -> Tensor:
        with torch.enable_grad():
            value = points.detach().squeeze(1).requires_grad_()
            found = gradients(self.here.scores(value), value)
        self.done += len(points)
        self.progress.update(len(points))
        return found


def _integrated(lab: Lab, run: Run, targets: Targets, options: dict[str, Any]) -> Maps:
    refuse_quantised(lab, "integrated_gradients")
    at = choose("at", options["at"], AT)
    fill = choose("fill", options["fill"], FILLS)
    steps = whole_number("steps", options["steps"], least=1)
    batch = whole_number("batch", options["batch"], least=1)
    rule = choose("rule", options["rule"], RULES)
    captum = _captum("integrated_gradients")
    with undisturbed(lab.model):
        here = open_point(lab, run, targets, at=at, fill=fill)
        ends = torch.cat([here.scores(here.value), here.scores(here.fill)])  # picture, fill; targets
        path = captum.IntegratedGradients(here.scores)
        path.gradient_func = counted = _Steps(here, steps, len(targets), "integrated gradients")
        with counted.progress:
            found = path.attribute(here.value[:, None], here.fill[:, None], n_steps=steps, method=rule, internal_batch_size=batch)
    values = here.to_patches(found[0], (run.map.rows, run.map.cols))
    moved, summed = (ends[0] - ends[1]).tolist(), values.sum((1, 2)).tolist()
    gaps = [have - want for have, want in zip(summed, moved, strict=True)]
    extras = {"score": ends[0].tolist(), "score_at_fill": ends[1].tolist(), "attributed": summed, "completeness_gap": gaps}
    notes = [
        f"Gradient of the target's logit averaged over {steps} steps from the {fill} fill to the picture, at {WORDS[at]}, "
        f"times the distance; {_completeness(moved, summed, gaps)}"
    ]
    if counted.interrupted:
        notes.append(
            f"Interrupted after {counted.done} of {steps} steps: only the path's first part, from the fill, is in the map."
        )
    done = counted.done
    return Maps(values.cpu().numpy(), {"forward": done + 2 + here.passes, "backward": done}, tuple(notes), extras)


def _completeness(moved: list[float], summed: list[float], gaps: list[float]) -> str:
    """How far the worst target's map is from summing to the change of its logit."""
    worst = max(range(len(gaps)), key=lambda i: abs(gaps[i]))
    return (
        f"completeness: the map sums to {summed[worst]:.3g} and the logit changed by {moved[worst]:.3g}, a gap of "
        f"{gaps[worst]:.2g}{' for the worst target' if len(gaps) > 1 else ''}."
    )


def _smooth(lab: Lab, run: Run, targets: Targets, options: dict[str, Any]) -> Maps:
    refuse_quantised(lab, "smoothgrad")
    at = choose("at", options["at"], AT)
    samples = whole_number("samples", options["samples"], least=1)
    batch = whole_number("batch", options["batch"], least=1)
    seed = whole_number("seed", options["seed"])
    noise = _share(options["noise"])
    times_input = choose("times_input", options["times_input"], (True, False))
    captum = _captum("smoothgrad")
    with undisturbed(lab.model):
        torch.manual_seed(seed)  # captum draws from the global generator; `undisturbed` puts its state back
        here = open_point(lab, run, targets, at=at)
        one = captum.InputXGradient(here.scores) if times_input else captum.Saliency(here.scores)
        one.gradient_func = counted = _Steps(here, samples, len(targets), "smoothgrad")
        spread = noise * float(here.value.max() - here.value.min())
        with counted.progress:
            total = _noisy_sum(captum.NoiseTunnel(one), here, counted, spread, batch, {} if times_input else {"abs": False})
        score = here.scores(here.value)[0]
    mean = total / counted.done  # N, as the point's value
    grid = (run.map.rows, run.map.cols)
    values = here.to_patches(mean, grid) if times_input else here.to_patches(mean.square(), grid).sqrt()
    what = "times the noisy input, summed over each patch" if times_input else "its length over each patch (no sign)"
    notes = [
        f"Gradient of the target's logit at {WORDS[at]}, mean over {counted.done} noisy copies (standard deviation {noise:g} "
        f"of the values' range), {what}."
    ]
    if counted.interrupted:
        notes.append(f"Interrupted after {counted.done} of {samples} copies; the mean is over those.")
    return Maps(
        values.cpu().numpy(), {"forward": counted.done + 1, "backward": counted.done}, tuple(notes), {"score": score.tolist()}
    )


def _noisy_sum(
    tunnel: Any, here: Point, counted: _Steps, spread: float, batch: int, options: dict[str, Any]
) -> Float[Tensor, "N ..."]:
    """Sum over noisy copies, `batch` at a time, until all are done or Ctrl-C."""
    total: Tensor | None = None
    while counted.done < counted.total and not counted.interrupted:
        now = min(batch, counted.total - counted.done)
        mean = tunnel.attribute(here.value[:, None], nt_samples=now, nt_samples_batch_size=now, stdevs=spread, **options)[0]
        if not counted.interrupted:
            total = now * mean if total is None else total + now * mean
    assert total is not None
    return total


def _share(noise: Any) -> float:
    if isinstance(noise, bool) or not isinstance(noise, Real) or not 0 <= float(noise) <= 1:
        raise OptionError(f"noise is a share of the values' range, 0 to 1, got {noise!r}")
    return float(noise)


def _captum(method: str) -> Any:
    """captum's attribution methods; imported here because it takes two seconds."""
    try:
        import captum.attr
    except ImportError:
        raise LabError(f"method {method!r} needs captum, which is not installed; `pip install captum` brings it") from None
    return captum.attr


INTEGRATED_GRADIENTS = Method(
    name="integrated_gradients",
    truth="What each patch adds to the target's logit, summed along the straight line from a filled picture to the picture.",
    source="Sundararajan et al. 2017, by captum's IntegratedGradients",
    cost="one forward and one backward per step, plus 3 forwards at most",
    blind_to="every way there but the straight one, and what the fill itself says",
    options={"at": AT[0], "fill": "grey", "steps": 16, "batch": 1, "rule": RULES[0]},
    compute=_integrated,
)

SMOOTHGRAD = Method(
    name="smoothgrad",
    truth="Gradient times input, averaged over noisy copies of the picture so that what only one of them shows is lost.",
    source="Smilkov et al. 2017, by captum's NoiseTunnel",
    cost="one forward and one backward per copy, plus 1 forward",
    blind_to="what lies further away than the noise reaches",
    options={"at": AT[0], "samples": 8, "noise": 0.15, "times_input": True, "batch": 1, "seed": 0},
    compute=_smooth,
)
