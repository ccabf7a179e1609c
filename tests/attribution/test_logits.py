"""What the three logit methods share (planted causes, sizes, nothing left behind, messages), and the logit lens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from llava_lab.attribution import attribute
from llava_lab.errors import OptionError
from llava_lab.models import Lab, load
from llava_lab.models.layout import language_layers, language_model
from llava_lab.results import Run, Target
from tests.support.logit_cases import speaking_lab, states_and_logits
from tests.support.planted import RED, planted_lab, red_picture, scripted_run

METHODS = ("tam", "direct_logit", "logit_lens_map")
MAPS: dict[str, dict[str, Any]] = {"tam": {"filter": None}, "direct_logit": {}, "logit_lens_map": {}}
BOXES = [(120, 80, (60, 10, 80, 30)), (80, 120, (10, 60, 30, 80)), (96, 96, (12, 60, 36, 84))]


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "Yes, the car is blue.")


@pytest.fixture(scope="module")
def planted() -> Lab:
    return planted_lab()


@pytest.fixture(scope="module")
def speaking() -> Lab:
    return speaking_lab()


# -- logit lens -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["probability", "logit"])
def test_lens_norms_every_state_once(tiny_random: Lab, run: Run, value: str) -> None:
    states, logits = states_and_logits(tiny_random, run)
    norm: Any = language_model(tiny_random.model).norm
    image, token = slice(*run.segments["image"]), run.target("blue").token_ids[0]
    assert len(run.target("blue").token_ids) == 1
    tables = [tiny_random.model.lm_head(norm(state)) for state in states[:-1]] + [tiny_random.model.lm_head(states[-1])]
    torch.testing.assert_close(tables[-1].float(), logits)
    twice = tiny_random.model.lm_head(norm(states[-1]))
    for number, table in enumerate(tables):
        want = (table.softmax(-1) if value == "probability" else table)[image, token].detach().numpy()
        found = attribute(tiny_random, run, method="logit_lens_map", target="blue", layers=number, value=value).values[0].ravel()
        np.testing.assert_allclose(found, want, atol=1e-5)
    wrong = (twice.softmax(-1) if value == "probability" else twice)[image, token].detach().numpy()
    assert np.abs(found - wrong).max() > 0.05 * np.abs(found).max(), "this fixture cannot tell a norm applied twice"


def test_lens_reduces_each_word_over_its_states_and_tokens(tiny_random: Lab, run: Run) -> None:
    ask: dict[str, Any] = {"method": "logit_lens_map", "target": ["Yes,", ("blue", "red")]}
    one_by_one = np.stack([attribute(tiny_random, run, layers=i, **ask).values for i in range(4)])
    mean = attribute(tiny_random, run, reduce="mean", **ask)
    np.testing.assert_allclose(mean.values, one_by_one.mean(0), atol=1e-6)
    window = attribute(tiny_random, run, layers=(1, 3), reduce="mean", **ask)
    np.testing.assert_allclose(window.values, one_by_one[1:3].mean(0), atol=1e-6)
    assert window.extras["states"] == [1, 2]
    strongest = attribute(tiny_random, run, **ask)
    np.testing.assert_allclose(strongest.values[0], one_by_one[:, 0].max(0), atol=1e-6)
    curve = strongest.extras["strongest_patch_by_state"][0]
    np.testing.assert_allclose(curve, one_by_one[:, 0].max((1, 2)), atol=1e-6)
    assert strongest.extras["strongest_state"][0] == int(np.argmax(curve))
    said, other = (
        Target("token", "x", (0,), (ids[0],)) for ids in (strongest.targets[1].token_ids, strongest.targets[1].against_ids)
    )
    at = run.segments["answer"][0]
    pair = [replace(one, positions=(at,)) for one in (said, other)]
    blue, red = attribute(tiny_random, run, method="logit_lens_map", target=pair).values
    np.testing.assert_allclose(strongest.values[1], blue - red, atol=1e-6)


# -- a cause that was planted ---------------------------------------------------------------


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize(("width", "height", "box"), BOXES)
@pytest.mark.parametrize(
    ("which", "how"),
    [
        ("planted", {"method": "direct_logit"}),
        ("planted", {"method": "direct_logit", "target": ("red", "blue")}),
        ("speaking", {"method": "tam", "filter": None}),
        ("speaking", {"method": "logit_lens_map"}),
        ("speaking", {"method": "logit_lens_map", "layers": 0, "value": "logit", "target": ("red", "blue")}),
    ],
    ids=str,
)
def test_the_red_square_lights_up_where_it_is(
    which: str,
    how: dict[str, Any],
    fit: str,
    width: int,
    height: int,
    box: tuple[int, int, int, int],
    request: pytest.FixtureRequest,
) -> None:
    lab: Lab = request.getfixturevalue(which)
    picture = red_picture(width, height, box)
    run = scripted_run(lab, picture, "The car is red.", fit=fit)
    rel = attribute(lab, run, **{"target": "red", **how})
    red = (picture == np.array(RED)).all(-1)
    painted = rel.on_picture()
    y, x = np.unravel_index(np.nanargmax(painted), painted.shape)
    assert red[y, x], f"brightest at ({x}, {y}), the red square is {box}"
    covered = run.map.mask_to_patches(red)
    assert rel.values[0][covered == 1].min() > rel.values[0][covered == 0].max()


# -- any size, any dtype, nothing left behind -----------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_576_image_tokens_and_several_targets_in_one_forward(llava15_folder: Any, method: str) -> None:
    lab = load(str(llava15_folder))
    wide = np.random.default_rng(1).integers(0, 255, (40, 64, 3), dtype=np.uint8)
    run = scripted_run(lab, wide, "The car is red.", fit="pad")
    together = attribute(lab, run, method=method, target=["answer", "red", ("red", "blue")])
    assert together.values.shape == (3, 24, 24)
    assert together.passes == {"forward": 1, "backward": 0}
    alone = attribute(lab, run, method=method, target="red")
    np.testing.assert_allclose(alone.values[0], together.values[1], atol=1e-5)
    assert np.ptp(together.values, (1, 2)).min() > 0


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_gives_nearly_the_same_map(llava15_folder: Any, method: str) -> None:
    exact, rough = load(str(llava15_folder)), load(str(llava15_folder), dtype="bfloat16")
    picture = np.random.default_rng(1).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    maps = []
    for lab in (exact, rough):
        run = scripted_run(lab, picture, "The car is red.")
        maps.append(attribute(lab, run, method=method, target="red", **MAPS[method]).values[0].ravel())
    assert np.corrcoef(*maps)[0, 1] > 0.98


@pytest.fixture
def untouched(tiny_random: Lab) -> Iterator[Lab]:
    """In training mode before and after; hooks, weights and random state as they were."""
    model = tiny_random.model
    model.train()

    def state() -> Any:
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        grads = [(p.requires_grad, p.grad is None) for p in model.parameters()]
        implementations = [part._attn_implementation for part in (model.config, model.config.text_config)]
        training = [m.training for m in model.modules()]
        return hooks, grads, implementations, training, tiny_random.fingerprint, torch.get_rng_state().tolist()

    before = state()
    yield tiny_random
    after = state()
    model.eval()
    assert after == before


@pytest.mark.parametrize("how", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_behind(
    untouched: Lab, run: Run, monkeypatch: pytest.MonkeyPatch, method: str, how: type[BaseException] | None
) -> None:
    if how is None:
        attribute(untouched, run, method=method)
        return
    with monkeypatch.context() as patch:
        last = language_layers(untouched.model)[-1]
        patch.setattr(last.mlp, "forward", lambda *args: (_ for _ in ()).throw(how("stop")))
        with pytest.raises(how, match="stop"):
            attribute(untouched, run, method=method)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("tam", {"correction": "all"}, "correction must be one of 'context', 'answer', 'none', got 'all'"),
        ("tam", {"filter": 2}, "filter must be None or an odd window from 1 to 4 patches, got 2"),
        ("tam", {"filter": 7}, "filter must be None or an odd window from 1 to 4"),
        ("tam", {"clip": "no"}, "clip must be one of True, False"),
        ("direct_logit", {"layers": (2, 9)}, "layers must be .start, stop. with 0 <= start < stop <= 3"),
        ("direct_logit", {"heads": 4}, "heads must be numbers from 0 to 3"),
        ("direct_logit", {"centre": "mean"}, "centre must be one of False, True"),
        ("logit_lens_map", {"layers": 4}, "layers must be a state from 0 .projector output. to 3 .last layer., got 4"),
        ("logit_lens_map", {"layers": (0, 5)}, "layers must be .start, stop. with 0 <= start < stop <= 4"),
        ("logit_lens_map", {"value": "odds"}, "value must be one of 'probability', 'logit'"),
        ("logit_lens_map", {"reduce": "sum"}, "reduce must be one of 'max', 'mean'"),
    ],
)
def test_wrong_options_are_refused_in_one_line(tiny_random: Lab, run: Run, method: str, options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message) as error:
        attribute(tiny_random, run, method=method, **options)
    assert "\n" not in str(error.value)
