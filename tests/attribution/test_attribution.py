"""The registry: one signature, clear refusals, right targets, shared passes, nothing left behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from llava_lab.attribution import METHODS, attribute
from llava_lab.capture import Full, undisturbed, watch_attention
from llava_lab.errors import CheckpointError, OptionError
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers
from llava_lab.results import Run
from tests.support.planted import RED, planted_lab, red_picture, scripted_run

FITS = ("pad", "crop")


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "Yes, the car is blue.")


@pytest.fixture(scope="module")
def planted() -> Lab:
    return planted_lab()


# -- the registry ---------------------------------------------------------------------------


def test_every_method_says_what_it_is() -> None:
    assert next(iter(METHODS)) == "rollout"
    for name, method in METHODS.items():
        assert name == method.name
        assert all((method.truth, method.source, method.cost, method.blind_to))
        assert method.truth.endswith(".")


def test_unknown_method_or_option_lists_the_choices(tiny_random: Lab, run: Run) -> None:
    with pytest.raises(
        OptionError, match="no method 'rollot'; the methods are rollout, attention, value_attention, .*, center, edges, inverse"
    ):
        attribute(tiny_random, run, method="rollot")
    with pytest.raises(OptionError, match="'occlusion' has no option 'size'; its options are block=1, stride=None, fill='grey'"):
        attribute(tiny_random, run, method="occlusion", size=2)
    with pytest.raises(OptionError, match="'center' has no option 'seed'; its options are none"):
        attribute(tiny_random, run, method="center", seed=1)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_by_other_weights_is_refused(tiny_random: Lab, run: Run, method: str) -> None:
    with pytest.raises(CheckpointError, match="other weights; ask again"):
        attribute(tiny_random, replace(run, fingerprint="0" * 16), method=method)


@pytest.mark.parametrize("method", METHODS)
def test_several_targets_share_the_passes_and_equal_single_ones(tiny_random: Lab, run: Run, method: str) -> None:
    together = attribute(tiny_random, run, method=method, target=["answer", "blue", 0])
    assert [target.kind for target in together.targets] == ["answer", "word", "token"]
    wanted: tuple[Any, ...] = ("answer", "blue", 0)
    for i, one in enumerate(wanted):
        alone = attribute(tiny_random, run, method=method, target=one)
        if method == "greedy":  # its search goes another way for each target; what they have in common is shared
            assert alone.passes["forward"] < together.passes["forward"]
        else:
            assert alone.passes == together.passes
        if method != "random":  # a control draws a new map for each target
            np.testing.assert_allclose(alone.values[0], together.values[i], atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_same_call_gives_same_numbers(tiny_random: Lab, run: Run, method: str) -> None:
    first, second = (attribute(tiny_random, run, method=method).values for _ in range(2))
    np.testing.assert_array_equal(first, second)


# -- attention and the controls -------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"layers": (1, 2)}, {"heads": 2}, {"heads": (0, 3)}, {"fusion": "max"}], ids=str)
def test_attention_is_the_mean_row_of_eager_matrices(tiny_random: Lab, run: Run, options: dict[str, Any]) -> None:
    with undisturbed(tiny_random.model), watch_attention(language_layers(tiny_random.model), Full()) as full:
        tiny_random.model(**tiny_random.inputs(run))
    start, stop = options.get("layers", (0, 3))
    chosen = options.get("heads", (0, 1, 2, 3))
    stack = torch.stack([full.attention[i][0] for i in range(start, stop)])  # L H Q K
    stack = stack[:, [chosen] if isinstance(chosen, int) else list(chosen)]
    fused = stack.amax(1) / stack.amax(1).sum(-1, keepdim=True) if "fusion" in options else stack.mean(1)
    target = run.target("blue")
    row = fused.mean(0)[list(target.positions)].mean(0)
    rel = attribute(tiny_random, run, method="attention", target="blue", **options)
    image = row[slice(*run.segments["image"])]
    np.testing.assert_allclose(rel.values[0].ravel(), image.numpy(), atol=1e-6)
    assert rel.extras["image_share"][0] == pytest.approx(float(image.sum()), abs=1e-5)
    assert np.mean([layer[0] for layer in rel.extras["image_share_by_layer"]]) == pytest.approx(float(image.sum()), abs=1e-5)
    assert sum(rel.extras["mass"][0].values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("heads", [4, (0, 9), (), "all", (0.5,)])
def test_heads_that_do_not_exist_are_refused(tiny_random: Lab, run: Run, heads: Any) -> None:
    with pytest.raises(OptionError, match="heads must be numbers from 0 to 3, or None for all"):
        attribute(tiny_random, run, method="attention", heads=heads)


def test_controls_know_nothing_and_say_so(tiny_random: Lab, run: Run) -> None:
    one, two = (attribute(tiny_random, run, method="random", target="words", seed=seed) for seed in (0, 1))
    assert not np.allclose(one.values, two.values)
    assert not np.allclose(one.values[0], one.values[1])
    middle = attribute(tiny_random, run, method="center").values[0]
    np.testing.assert_allclose(middle, middle[::-1, ::-1], atol=1e-6)
    assert middle[1:3, 1:3].min() > middle[0].max()
    assert all("a control" in note for note in one.notes)
    with pytest.raises(OptionError, match="seed must be a whole number"):
        attribute(tiny_random, run, method="random", seed=-1)


# -- a cause that was planted ---------------------------------------------------------------


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    ("width", "height", "box"),
    [(120, 80, (60, 10, 80, 30)), (80, 120, (10, 60, 30, 80)), (120, 80, (30, 40, 60, 60)), (96, 96, (12, 60, 36, 84))],
)
@pytest.mark.parametrize(
    "how",
    [
        {"method": "attention"},
        {"method": "rollout"},
        {"method": "rollout", "residual": 0.5, "null": "none"},
        {"method": "rollout", "through_vision": True},
        {"method": "occlusion"},
        {"method": "occlusion", "fill": "mean"},
        {"method": "occlusion", "target": ("red", "blue")},
    ],
    ids=str,
)
def test_the_red_square_lights_up_where_it_is(
    planted: Lab, fit: str, width: int, height: int, box: tuple[int, int, int, int], how: dict[str, Any]
) -> None:
    picture = red_picture(width, height, box)
    run = scripted_run(planted, picture, "The car is red.", fit=fit)
    rel = attribute(planted, run, **{"target": "red", **how})
    red = (picture == np.array(RED)).all(-1)
    painted = rel.on_picture()
    y, x = np.unravel_index(np.nanargmax(painted), painted.shape)
    assert red[y, x], f"brightest at ({x}, {y}), the red square is {box}"
    covered = run.map.mask_to_patches(red)
    values = rel.values[0]
    assert values[covered == 1].min() > values[covered == 0].max()
    if fit == "crop" and width != height:
        assert np.isnan(painted).any(), "what the crop left out must stay unpainted"


# -- nothing left behind --------------------------------------------------------------------


def _state(lab: Lab) -> dict[str, Any]:
    model = lab.model
    modules = list(model.modules())
    configs = (model.config, model.config.text_config, model.config.vision_config)
    return {
        "implementation": [part._attn_implementation for part in configs],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in modules],
        "training": [m.training for m in modules],
        "grad": [(p.requires_grad, p.grad is None) for p in model.parameters()],
        "weights": lab.fingerprint,
        "random": (torch.get_rng_state().tolist(), str(np.random.get_state(legacy=False))),  # noqa: NPY002, the global one must not move
    }


@pytest.mark.parametrize("how", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "call",
    [
        {"method": "rollout"},
        {"method": "rollout", "sinks": "remove", "through_vision": True},
        {"method": "attention"},
        {"method": "occlusion"},
        {"method": "occlusion", "at": "vision"},
        {"method": "occlusion", "at": "projector", "fill": "noise"},
        {"method": "occlusion_coarse", "at": "projector"},
        {"method": "token_knockout"},
        {"method": "rise", "masks": 8},
        {"method": "shapley", "orders": 2, "regions": 4},
        {"method": "kernel_shap", "samples": 8, "regions": 4},
        {"method": "greedy", "regions": 3},
        {"method": "inverse"},
        {"method": "random"},
        {"method": "center"},
        {"method": "edges"},
    ],
    ids=str,
)
def test_nothing_is_left_behind(
    tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch, call: dict[str, Any], how: type[BaseException] | None
) -> None:
    tiny_random.model.train()
    tiny_random.model.model.vision_tower.eval()
    before = _state(tiny_random)
    assert before["implementation"] == ["sdpa"] * 3
    stopped = False
    with monkeypatch.context() as patch:
        if how is not None:  # stop in the middle of the forward, after some layers were captured
            last = language_layers(tiny_random.model)[-1]
            patch.setattr(last.mlp, "forward", lambda *args: (_ for _ in ()).throw(how("stop")))
        try:
            attribute(tiny_random, run, **call)
        except (RuntimeError, KeyboardInterrupt):
            stopped = True
    after = _state(tiny_random)
    tiny_random.model.eval()
    assert after == before
    assert stopped == (how is not None and call["method"] not in ("random", "center", "edges"))


@pytest.mark.parametrize("method", ["rollout", "attention"])
def test_bfloat16_weights_give_nearly_the_same_map(planted: Lab, method: str) -> None:
    run = scripted_run(planted, red_picture(96, 96, (12, 60, 36, 84)), "The car is red.")
    exact = attribute(planted, run, method=method, target="red").values
    before = {name: value.clone() for name, value in planted.model.state_dict().items()}
    planted.model.to(torch.bfloat16)
    try:
        rough = attribute(planted, replace(run, fingerprint=planted.fingerprint), method=method, target="red").values
    finally:
        planted.model.to(torch.float32).load_state_dict(before)
    # the hand-written weights are exact in bfloat16 but for one; what is left is rounding in the forward
    np.testing.assert_allclose(rough, exact, atol=0.02 * np.abs(exact).max())
