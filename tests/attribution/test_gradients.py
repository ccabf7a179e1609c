"""Gradient times input and Grad-CAM are autograd's and captum's; and what every gradient method must keep to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llava_lab.attribution import METHODS, Maps
from llava_lab.errors import OptionError
from llava_lab.models import Lab, load
from llava_lab.models.layout import connector_of, language_layers
from llava_lab.replay import fill_pixels, resolve_targets
from llava_lab.replay.alter import open_altered
from llava_lab.results import Run, Target
from tests.support.gradients import PLACES, compute, leave_one_trained, leftovers, logit, noise_run, put_back, stands_at
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


# -- gradient times input -------------------------------------------------------------------


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("target", [0, "answer", ("blue", "green")], ids=str)
def test_gradient_input_is_autograd_s(tiny_random: Lab, run: Run, at: str, target: Any) -> None:
    (one,) = resolve_targets(tiny_random, run, target)
    value = stands_at(tiny_random, at, tiny_random.inputs(run)["pixel_values"]).requires_grad_()
    score = logit(tiny_random, run, one, at=at, value=value)
    product = torch.autograd.grad(score, value)[0] * value.detach()
    maps = compute(tiny_random, run, "gradient_input", target, at=at)
    expected = patch_sums(product) if at == "pixels" else product.sum(-1).reshape(4, 4)
    np.testing.assert_allclose(maps.values[0], expected, atol=1e-5)
    assert maps.extras["score"][0] == pytest.approx(float(score.detach()), abs=1e-4)


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
    np.testing.assert_allclose(both, said - other, atol=1e-4)


# -- Grad-CAM -------------------------------------------------------------------------------


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
        np.testing.assert_allclose(signed.values[number], expected, atol=1e-5)
        np.testing.assert_allclose(positive.values[number], expected.clamp_min(0), atol=1e-5)
        assert positive.extras["negative_share"][number] == pytest.approx(float((expected < 0).float().mean()))
    assert any("cut to 0" in note for note in positive.notes)
    assert not any("cut to 0" in note for note in signed.notes)


# -- all of them ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL)
def test_several_targets_share_the_passes_and_equal_single_ones(tiny_random: Lab, run: Run, method: str) -> None:
    wanted: list[Any] = ["answer", "blue", 0, ("blue", "green")]
    together = quick(tiny_random, run, method, wanted)
    for number, target in enumerate(wanted):
        alone = quick(tiny_random, run, method, target)
        assert alone.passes == together.passes
        np.testing.assert_allclose(alone.values[0], together.values[number], atol=1e-5)


@pytest.mark.parametrize("method", ALL)
def test_576_image_tokens_and_both_fits_take_the_same_path(big: tuple[Lab, np.ndarray], method: str) -> None:
    lab, picture = big
    for fit in ("pad", "crop"):
        run = scripted_run(lab, picture, "The car is blue.", fit=fit)
        options = {"integrated_gradients": {"steps": 2}, "smoothgrad": {"samples": 1}}.get(method, {})
        values = compute(lab, run, method, ["blue", ("blue", "red")], **options).values
        assert values.shape == (2, 24, 24)
        assert np.isfinite(values).all()
        assert np.ptp(values, (1, 2)).min() > 0


@pytest.fixture(scope="module")
def big(llava15_folder: Path) -> tuple[Lab, np.ndarray]:
    return load(str(llava15_folder)), np.random.default_rng(3).integers(0, 255, (120, 90, 3), dtype=np.uint8)


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


@pytest.mark.parametrize("method", ALL)
def test_bfloat16_weights_give_nearly_the_same_map(tiny_folder: Path, tiny_random: Lab, run: Run, method: str) -> None:
    rough = load(str(tiny_folder), dtype="bfloat16")
    exact = quick(tiny_random, run, method, "answer").values[0]
    found = quick(rough, replace(run, fingerprint=rough.fingerprint), method, "answer").values[0]
    assert found.dtype == np.float32
    assert np.corrcoef(exact.ravel(), found.ravel())[0, 1] > 0.98  # seven layers of rounding at 1 in 256


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("gradient_input", {"at": "tower"}, "at must be one of 'projector', 'vision', 'pixels', got 'tower'"),
        ("gradient_input", {"fill": "black"}, "fill must be one of None, 'grey', 'mean', 'blur', got 'black'"),
        ("integrated_gradients", {"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ("integrated_gradients", {"fill": None}, "fill must be one of 'grey', .*, got None"),
        ("integrated_gradients", {"rule": "simpson"}, "rule must be one of 'gausslegendre', .*, got 'simpson'"),
        ("smoothgrad", {"samples": 2.5}, "samples must be a whole number of at least 1, got 2.5"),
        ("smoothgrad", {"noise": -0.1}, "noise is a share of the values' range, 0 to 1, got -0.1"),
        ("smoothgrad", {"batch": 0}, "batch must be a whole number of at least 1, got 0"),
        ("gradcam", {"positive": 2}, "positive must be one of True, False, got 2"),
    ],
)
def test_options_out_of_range_are_refused(tiny_random: Lab, run: Run, method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        compute(tiny_random, run, method, **options)


class _Settings:
    quant_method = SimpleNamespace(value="bitsandbytes")


@pytest.mark.parametrize("method", [*ALL, "relevancy"])
@pytest.mark.parametrize("sign", ["settings", "weights", "modules"])
def test_a_quantised_model_is_refused_before_anything_runs(
    tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch, method: str, sign: str
) -> None:
    model = tiny_random.model
    target = resolve_targets(tiny_random, run)
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: pytest.fail("it ran"))
    if sign == "settings":
        monkeypatch.setattr(model.config, "quantization_config", _Settings(), raising=False)
    elif sign == "weights":
        packed = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
        monkeypatch.setitem(model.lm_head._parameters, "packed", packed)
    else:
        kind = type("Linear8bitLt", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
        monkeypatch.setitem(model.lm_head._modules, "packed", kind(1, 1))
    with pytest.raises(
        OptionError, match=f"^method '{method}' needs gradients, and .* packed into 8 or 4 bits; load it .*'occlusion'"
    ) as error:
        METHODS[method].compute(tiny_random, run, target, {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("how", [None, RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_behind(
    tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch, method: str, how: type[BaseException] | None
) -> None:
    leave_one_trained(tiny_random)
    before = leftovers(tiny_random)
    stopped = False
    with monkeypatch.context() as patch:
        if how is not None:  # the first forward stops half-way through the language model
            patch.setattr(language_layers(tiny_random.model)[1].mlp, "forward", lambda *args: (_ for _ in ()).throw(how("stop")))
        try:
            quick(tiny_random, run, method)
        except (RuntimeError, KeyboardInterrupt):
            stopped = True
    after = leftovers(tiny_random)
    put_back(tiny_random)
    assert after == before
    assert stopped == (how is not None)
