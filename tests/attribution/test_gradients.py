"""Gradient methods: autograd's and captum's own answers, complete, seeded, and Ctrl-C keeps what is finished."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llava_lab.attribution import Maps
from llava_lab.attribution.gradients import open_point
from llava_lab.capture import undisturbed
from llava_lab.errors import LabError
from llava_lab.models import Lab
from llava_lab.models.layout import connector_of, language_layers
from llava_lab.replay import fill_pixels, resolve_targets
from llava_lab.replay.alter import open_altered
from llava_lab.results import Run, Target
from tests.support.closeness import TERMS, close
from tests.support.gradients import PLACES, compute, logit, noise_run, stands_at
from tests.support.planted import RED, planted_lab, red_picture, scripted_run

ALL = ("gradient_input", "integrated_gradients", "smoothgrad", "gradcam")


QUICK = {"integrated_gradients": {"steps": 4}, "smoothgrad": {"samples": 3}}  # enough where only sameness is asked


def quick(lab: Lab, run: Run, method: str, target: Any = None, **options: Any) -> Maps:
    return compute(lab, run, method, target, **{**QUICK.get(method, {}), **options})


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    return noise_run(tiny_random)


def patch_sums(values: Tensor, patch: int = 8) -> np.ndarray:
    """Sum over colours and pixels of each patch, one patch at a time."""
    rows, cols = values.shape[-2] // patch, values.shape[-1] // patch
    return np.array(
        [
            [float(values[..., y * patch : y * patch + patch, x * patch : x * patch + patch].sum()) for x in range(cols)]
            for y in range(rows)
        ]
    )


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("target", [0, "answer", ("blue", "green")], ids=str)
def test_gradient_input_is_autograd_s(tiny_random: Lab, run: Run, at: str, target: Any) -> None:
    (one,) = resolve_targets(tiny_random, run, target)
    value = stands_at(tiny_random, at, tiny_random.inputs(run)["pixel_values"]).requires_grad_()
    score = logit(tiny_random, run, one, at=at, value=value)
    product = torch.autograd.grad(score, value)[0] * value.detach()
    maps = compute(tiny_random, run, "gradient_input", target, at=at)
    expected = patch_sums(product) if at == "pixels" else product.sum(-1).reshape(4, 4)
    close(maps.values[0], expected, terms=TERMS)
    close(maps.extras["score"][0], float(score.detach()), terms=TERMS)


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("fill", ["grey", "mean", "blur"])
def test_with_a_fill_it_is_the_directional_derivative_towards_it(tiny_random: Lab, run: Run, at: str, fill: str) -> None:
    """Finite differences in float64: move one patch, or all, a little towards the fill and back."""
    (target,) = resolve_targets(tiny_random, run, "blue")
    with doubled(tiny_random) as lab:
        pixels = lab.inputs(run)["pixel_values"]
        here, there = (stands_at(lab, at, each) for each in (pixels, fill_pixels(lab, pixels, fill, run.map)))
        if fill == "mean" and at != "pixels":  # of the tokens that hold some of the picture
            there = here[:, (run.map.coverage() > 0).ravel()].mean(1, keepdim=True)
        step = there - here

        def slope(part: Tensor, size: float) -> float:
            back, on = (float(logit(lab, run, target, at=at, value=here + sign * size * part)) for sign in (-1, 1))
            return (back - on) / (2 * size)  # what is lost on the way to the fill

        def change(part: Tensor) -> float:  # Richardson: the norms round to float32, so the steps must be large
            return (4 * slope(part, 0.01) - slope(part, 0.02)) / 3

        only = torch.zeros_like(step)
        patch = (..., slice(8, 16), slice(16, 24)) if at == "pixels" else (slice(None), 6)
        only[patch] = step[patch]
        whole, one = change(step), change(only)
    maps = compute(tiny_random, run, "gradient_input", "blue", at=at, fill=fill)
    assert maps.values[0, 1, 2] == pytest.approx(one, rel=1e-3, abs=1e-4)
    assert maps.values.sum() == pytest.approx(whole, rel=2e-3, abs=5e-4)
    assert maps.extras["attributed"][0] == pytest.approx(whole, rel=2e-3, abs=5e-4)
    assert maps.passes == {"forward": 2 if fill != "mean" and at != "pixels" else 1, "backward": 1}


def test_with_a_fill_it_is_what_occlusion_there_begins_with(tiny_random: Lab, run: Run) -> None:
    """A hundredth of the way to the fill, patch by patch, loses a hundredth of the map."""
    targets = resolve_targets(tiny_random, run, ("blue", "green"))  # a logit difference in both
    level: Any = open_altered(tiny_random, run, targets, at="projector", fill="grey")
    with torch.no_grad():
        flat = level.values.flatten(2).repeat(16, 1, 1)
        for patch, one in enumerate(flat):
            one[:, patch] = torch.lerp(one[:, patch], level.filling("grey").flatten(2)[0, :, patch], 0.01)
        drops = level.read(level.values) - level.read(flat.unflatten(2, (4, 4)))
    found = compute(tiny_random, run, "gradient_input", ("blue", "green"), fill="grey").values[0].ravel()
    np.testing.assert_allclose(found, 100 * drops[:, 0], atol=0.03 * np.abs(found).max())


@contextmanager
def doubled(lab: Lab) -> Iterator[Any]:
    """The lab in float64, as far as these tests use it: its inputs, its model, its processor."""
    before = {name: value.clone() for name, value in lab.model.state_dict().items()}
    mine = lab.inputs

    def inputs(run: Run) -> dict[str, Tensor]:
        lab.model.to(torch.float32)
        given = mine(run)
        lab.model.to(torch.float64)
        return {**given, "pixel_values": given["pixel_values"].double()}

    try:
        with torch.no_grad():
            yield SimpleNamespace(model=lab.model.to(torch.float64), inputs=inputs, processor=lab.processor)
    finally:
        lab.model.to(torch.float32).load_state_dict(before)


@pytest.mark.parametrize("method", ["gradient_input", "integrated_gradients", "smoothgrad"])
def test_a_contrast_is_the_difference_of_its_two_words(tiny_random: Lab, run: Run, method: str) -> None:
    """They are linear in the score; the two words share everything else."""
    (contrast,) = resolve_targets(tiny_random, run, ("blue", "green"))
    words = [
        Target("token", word, contrast.positions, ids)
        for word, ids in (("blue", contrast.token_ids), ("green", contrast.against_ids))
    ]
    both, said, other = quick(tiny_random, run, method, [contrast, *words]).values
    assert np.abs(said - other).max() > 1e-3
    close(both, said - other, terms=TERMS)


def test_gradcam_is_captum_s_on_the_layer_llava_reads(tiny_random: Lab, run: Run) -> None:
    targets = resolve_targets(tiny_random, run, ["blue", ("blue", "green")])
    positive = compute(tiny_random, run, "gradcam", list(targets))
    signed = compute(tiny_random, run, "gradcam", list(targets), positive=False)
    inputs = tiny_random.inputs(run)
    with torch.no_grad():
        states = tiny_random.model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    tap = nn.Identity()  # channels first, where captum expects them
    planes = states[:, 1:].transpose(1, 2).reshape(1, -1, 4, 4)

    def forward(features: Tensor) -> Tensor:
        tokens = connector_of(tiny_random.model)(tap(features).flatten(2).transpose(1, 2))
        return torch.stack([logit(tiny_random, run, target, at="projector", value=tokens) for target in targets])[None]

    for number in range(2):
        expected = captum.attr.LayerGradCam(forward, tap).attribute(planes.requires_grad_(), target=number)[0, 0].detach()
        close(signed.values[number], expected, terms=TERMS)
        close(positive.values[number], expected.clamp_min(0), terms=TERMS)
        assert positive.extras["negative_share"][number] == pytest.approx(float((expected < 0).float().mean()))
    assert any("cut to 0" in note for note in positive.notes)
    assert not any("cut to 0" in note for note in signed.notes)


@pytest.mark.parametrize("at", PLACES)
def test_the_planted_red_square_lights_up_against_grey(at: str) -> None:
    lab = planted_lab()
    picture = red_picture(96, 96, (12, 60, 36, 84))
    run = scripted_run(lab, picture, "The car is red.")
    covered = run.map.mask_to_patches((picture == np.array(RED)).all(-1))
    for method, options in (
        ("gradient_input", {"fill": "grey"}),
        ("integrated_gradients", {"steps": 4}),
        ("smoothgrad", {"noise": 0.01}),
    ):
        values = compute(lab, run, method, "red", at=at, **options).values[0]
        assert values[covered == 1].min() > values[covered == 0].max(), method
    values = compute(lab, run, "gradcam", "red").values[0]
    assert values[covered == 1].min() > values[covered == 0].max()


# -- integrated gradients and SmoothGrad ---------------------------------------------------


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
    close(maps.extras["completeness_gap"], maps.values.sum((1, 2)) - moved, of=ends, terms=TERMS)
    close(maps.extras["score"], ends[0], terms=TERMS)
    close(maps.extras["score_at_fill"], ends[1], terms=TERMS)
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
            close(found[number], expected.sum(1)[0].detach(), terms=TERMS)


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


@pytest.mark.parametrize("at", PLACES)
def test_without_noise_smoothgrad_is_gradient_input(tiny_random: Lab, run: Run, at: str) -> None:
    plain = compute(tiny_random, run, "gradient_input", ["blue", 0], at=at).values
    smooth = compute(tiny_random, run, "smoothgrad", ["blue", 0], at=at, noise=0.0, samples=3, batch=2)
    close(smooth.values, plain, terms=TERMS)
    assert smooth.passes == {"forward": 4, "backward": 3}
    assert "mean over 3 noisy copies" in smooth.notes[0]


def test_the_noise_is_the_seed_s_and_its_size_the_range_s(tiny_random: Lab, run: Run) -> None:
    one, same, other = (compute(tiny_random, run, "smoothgrad", "blue", samples=4, seed=seed).values for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    for batch in (2, 3, 8):
        batched = compute(tiny_random, run, "smoothgrad", "blue", samples=4, seed=1, batch=batch).values
        np.testing.assert_allclose(batched, one, atol=1e-5)
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
    close(one[0], expected[0].detach(), terms=TERMS)
    saliency = compute(tiny_random, run, "smoothgrad", "blue", samples=4, seed=1, times_input=False)
    close(saliency.values[0], lengths[0], terms=TERMS)
    assert "no sign" in saliency.notes[0]


def test_ctrl_c_keeps_the_copies_that_are_done(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with interrupted_after(tiny_random, monkeypatch, calls=3):
        part = compute(tiny_random, run, "smoothgrad", "blue", samples=8)
    two = compute(tiny_random, run, "smoothgrad", "blue", samples=2)
    close(part.values, two.values, terms=TERMS)
    assert any("Interrupted after 2 of 8 copies" in note for note in part.notes)


@pytest.mark.parametrize("method", ["integrated_gradients"])
def test_without_captum_it_says_how_to_get_it(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(LabError, match=f"method '{method}' needs captum, which is not installed; `pip install captum`"):
        compute(tiny_random, run, method)
