"""Integrated gradients and SmoothGrad: complete, captum's own answer, seeded, and Ctrl-C keeps what is finished."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from torch import Tensor

from llava_lab.attribution.gradients import open_point
from llava_lab.attribution.method import Method
from llava_lab.capture import undisturbed
from llava_lab.errors import LabError
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers
from llava_lab.replay import fill_pixels, resolve_targets
from llava_lab.results import Run
from tests.support.gradients import PLACES, compute, logit, noise_run


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    return noise_run(tiny_random)


# -- integrated gradients -------------------------------------------------------------------


@pytest.mark.parametrize(("at", "fill"), [("projector", "grey"), ("vision", "blur"), ("pixels", "grey"), ("pixels", "mean")])
def test_the_path_sums_to_the_change_of_the_logit(tiny_random: Lab, run: Run, at: str, fill: str) -> None:
    targets = resolve_targets(tiny_random, run, ["answer", "blue", ("blue", "green")])
    maps = compute(tiny_random, run, "integrated_gradients", list(targets), at=at, fill=fill, steps=64, batch=16)
    pixels = tiny_random.inputs(run)["pixel_values"]
    filled = fill_pixels(tiny_random, pixels, fill, run.map)
    with torch.no_grad():
        ends = [[float(logit(tiny_random, run, one, at="pixels", value=each)) for one in targets] for each in (pixels, filled)]
    moved = np.subtract(ends[0], ends[1])
    np.testing.assert_allclose(maps.values.sum((1, 2)), moved, atol=0.02 * np.abs(moved).max())
    np.testing.assert_allclose(maps.extras["completeness_gap"], maps.values.sum((1, 2)) - moved, atol=1e-4)
    np.testing.assert_allclose(maps.extras["score"], ends[0], atol=1e-4)
    np.testing.assert_allclose(maps.extras["score_at_fill"], ends[1], atol=1e-4)
    assert any("completeness: the map sums to" in note and "gap of" in note for note in maps.notes)
    assert maps.passes == {"forward": 66 if at == "pixels" else 67, "backward": 64}


def test_it_is_captum_s_own_answer_for_each_target(tiny_random: Lab, run: Run) -> None:
    targets = resolve_targets(tiny_random, run, ["blue", "answer"])
    found = compute(tiny_random, run, "integrated_gradients", list(targets), steps=6, batch=4, rule="riemann_trapezoid").values
    with undisturbed(tiny_random.model), torch.enable_grad():
        here = open_point(tiny_random, run, targets, at="projector", fill="grey")
        method = captum.attr.IntegratedGradients(here.scores)
        for number in range(2):
            expected = method.attribute(here.value, here.fill, target=number, n_steps=6, method="riemann_trapezoid")
            np.testing.assert_allclose(found[number], expected.sum(1)[0].detach(), atol=1e-5)


def test_ctrl_c_on_the_path_keeps_its_first_part(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with interrupted_after(tiny_random, monkeypatch, calls=3 + 3):  # fill and both ends, then three steps
        part = compute(tiny_random, run, "integrated_gradients", "blue", steps=8)
    assert part.passes["backward"] == 3
    assert any("Interrupted after 3 of 8 steps" in note for note in part.notes)
    whole = compute(tiny_random, run, "integrated_gradients", "blue", steps=8)
    assert np.abs(part.values - whole.values).max() > 0
    with interrupted_after(tiny_random, monkeypatch, calls=3), pytest.raises(KeyboardInterrupt):
        compute(tiny_random, run, "integrated_gradients", "blue", steps=8)


@contextmanager
def interrupted_after(lab: Lab, monkeypatch: pytest.MonkeyPatch, *, calls: int) -> Iterator[None]:
    """Ctrl-C at the end of the language model's forward, once it has run `calls` times without the picture's own tower pass."""
    last = language_layers(lab.model)[-1].mlp
    plain, seen = last.forward, []

    def stop(*args: Any) -> Tensor:
        seen.append(1)
        if len(seen) == calls:
            raise KeyboardInterrupt
        return plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(last, "forward", stop)
        yield


# -- SmoothGrad -----------------------------------------------------------------------------


@pytest.mark.parametrize("at", PLACES)
def test_without_noise_smoothgrad_is_gradient_input(tiny_random: Lab, run: Run, at: str) -> None:
    plain = compute(tiny_random, run, "gradient_input", ["blue", 0], at=at).values
    smooth = compute(tiny_random, run, "smoothgrad", ["blue", 0], at=at, noise=0.0, samples=3, batch=2)
    np.testing.assert_allclose(smooth.values, plain, atol=1e-5)
    assert smooth.passes == {"forward": 4, "backward": 3}
    assert "mean over 3 noisy copies" in smooth.notes[0]


def test_the_noise_is_the_seed_s_and_its_size_the_range_s(tiny_random: Lab, run: Run) -> None:
    one, same, other = (compute(tiny_random, run, "smoothgrad", "blue", samples=4, seed=seed).values for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-4
    (target,) = resolve_targets(tiny_random, run, "blue")
    with undisturbed(tiny_random.model):
        here = open_point(tiny_random, run, (target,), at="projector")
        torch.manual_seed(1)
        spread = 0.15 * float(here.value.max() - here.value.min())
        noisy = [here.value + torch.normal(0, torch.full_like(here.value[:, None], spread)[:, 0]) for _ in range(4)]
        with torch.enable_grad():
            gradients = [torch.autograd.grad(here.scores(copy.requires_grad_())[0, 0], copy)[0] for copy in noisy]
        expected = torch.stack([(grad * value).sum(1) for grad, value in zip(gradients, noisy, strict=True)]).mean(0)
        lengths = torch.stack(gradients).mean(0).norm(dim=1)
    np.testing.assert_allclose(one[0], expected[0].detach(), atol=1e-4)
    saliency = compute(tiny_random, run, "smoothgrad", "blue", samples=4, seed=1, times_input=False)
    np.testing.assert_allclose(saliency.values[0], lengths[0], atol=1e-4)
    assert "no sign" in saliency.notes[0]


def test_ctrl_c_keeps_the_copies_that_are_done(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with interrupted_after(tiny_random, monkeypatch, calls=3):
        part = compute(tiny_random, run, "smoothgrad", "blue", samples=8)
    two = compute(tiny_random, run, "smoothgrad", "blue", samples=2)
    np.testing.assert_allclose(part.values, two.values, atol=1e-6)
    assert any("Interrupted after 2 of 8 copies" in note for note in part.notes)


@pytest.mark.parametrize("method", ["integrated_gradients", "smoothgrad"])
def test_without_captum_it_says_how_to_get_it(
    tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch, method: Method
) -> None:
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(LabError, match=f"method '{method}' needs captum, which is not installed; `pip install captum`"):
        compute(tiny_random, run, method)
