"""Direct logit attribution: an exact sum, equal to moving one head and one position at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llava_lab.attribution import attribute
from llava_lab.capture import Full, undisturbed, watch_attention
from llava_lab.errors import LabError
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers, language_model
from llava_lab.results import Run, Target
from tests.support.logit_cases import grouped_lab, states_and_logits
from tests.support.planted import planted_lab, red_picture, scripted_run


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "Yes, the car is blue.")


@pytest.fixture(scope="module")
def grouped() -> Lab:
    return grouped_lab()


@pytest.mark.parametrize(
    "options", [{}, {"centre": True}, {"layers": (1, 2)}, {"heads": (0, 3)}, {"heads": ((0, 1), (1, 2))}], ids=str
)
@pytest.mark.parametrize("which", ["tiny_random", "grouped"])
def test_map_and_remainder_add_up_to_the_models_logit(
    which: str, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    lab: Lab = request.getfixturevalue(which)
    picture = np.random.default_rng(5).integers(0, 255, (60, 40, 3), dtype=np.uint8)
    run = scripted_run(lab, picture, "No, the car is blue.", fit="crop")
    rel = attribute(lab, run, method="direct_logit", target=["answer", "blue", ("blue", "red"), 0], **options)
    _, logits = states_and_logits(lab, run)
    if options.get("centre"):
        logits = logits - logits.mean(-1, keepdim=True)
    for i, target in enumerate(rel.targets):
        want = sum(float(logits[at, token]) for at, token in zip(target.positions, target.token_ids, strict=True))
        want -= sum(float(logits[at, token]) for at, token in zip(target.positions, target.against_ids, strict=False))
        parts = dict(rel.extras["parts"][i])
        assert abs(parts.pop("rounding")) < 1e-4
        assert parts.pop("image") == pytest.approx(float(rel.values[i].sum()), abs=1e-4)
        assert float(rel.values[i].sum()) + sum(parts.values()) == pytest.approx(want, abs=1e-4)
        assert rel.extras["logit"][i] == pytest.approx(want, abs=1e-4)
        assert set(parts) == {"image_left_out", "mlp", "embedding", "bias", "system", "question", "cue", "answer"}
        assert (abs(parts["bias"]) > 1e-3) == (which == "grouped")
        image = float(np.sum(rel.extras["image_by_layer"][i]))
        assert image == pytest.approx(float(rel.values[i].sum()) + parts["image_left_out"], abs=1e-4)


@pytest.mark.parametrize("which", ["tiny_random", "grouped"])
def test_direct_logit_equals_moving_one_head_and_one_position_at_a_time(which: str, request: pytest.FixtureRequest) -> None:
    lab: Lab = request.getfixturevalue(which)
    picture = np.random.default_rng(6).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    run = scripted_run(lab, picture, "No, the car is blue.")
    layers, target = language_layers(lab.model), run.target("blue")
    values: dict[int, torch.Tensor] = {}
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda module, args, out, i=i: values.__setitem__(i, out[0]))
        for i, layer in enumerate(layers)
    ]
    with undisturbed(lab.model), watch_attention(layers, Full()) as full:
        lab.model(**lab.inputs(run))
    for hook in hooks:
        hook.remove()
    last: list[torch.Tensor] = []
    norm: Any = language_model(lab.model).norm
    hook = norm.register_forward_pre_hook(lambda module, args: last.append(args[0][0]))
    states_and_logits(lab, run)
    hook.remove()
    start, stop = run.segments["image"]
    want = np.zeros(stop - start)
    for at, token in zip(target.positions, target.token_ids, strict=True):
        scale = float((last[0][at].double().square().mean() + norm.variance_epsilon).rsqrt())
        direction = lab.model.lm_head.weight[token].double() * norm.weight.double() * scale
        for i, layer in enumerate(layers):
            out, shared = layer.self_attn.o_proj.weight.double(), values[i].double().view(len(values[i]), -1, 16)
            for head in range(4):
                group = head * shared.shape[1] // 4
                for position in range(start, stop):
                    carried = float(full.attention[i][0, head, at, position]) * shared[position, group]
                    want[position - start] += float(direction @ (out[:, head * 16 : (head + 1) * 16] @ carried))
    rel = attribute(lab, run, method="direct_logit", target="blue")
    np.testing.assert_allclose(rel.values[0].ravel(), want, atol=1e-5)
    assert np.abs(want).max() > 0.01


def test_direct_logit_of_a_contrast_is_the_difference_of_the_two_words(tiny_random: Lab, run: Run) -> None:
    contrast = attribute(tiny_random, run, method="direct_logit", target=("blue", "red"))
    position, said, other = (getattr(contrast.targets[0], name)[0] for name in ("positions", "token_ids", "against_ids"))
    singles = [Target("token", "x", (position,), (token,)) for token in (said, other)]
    one, two = attribute(tiny_random, run, method="direct_logit", target=singles).values
    np.testing.assert_allclose(contrast.values[0], one - two, atol=1e-5)
    centred = attribute(tiny_random, run, method="direct_logit", target=("blue", "red"), centre=True)
    np.testing.assert_allclose(centred.values, contrast.values, atol=1e-6)


def test_maps_of_separate_heads_add_up_to_the_whole_map(tiny_random: Lab, run: Run) -> None:
    whole = attribute(tiny_random, run, method="direct_logit", target="blue")
    heads = [attribute(tiny_random, run, method="direct_logit", target="blue", heads=head).values for head in range(4)]
    np.testing.assert_allclose(sum(heads), whole.values, atol=1e-5)
    layers = [attribute(tiny_random, run, method="direct_logit", target="blue", layers=(i, i + 1)) for i in range(3)]
    np.testing.assert_allclose(sum(one.values for one in layers), whole.values, atol=1e-5)
    by_layer = [float(one.values.sum()) for one in layers]
    np.testing.assert_allclose(whole.extras["image_by_layer"][0], by_layer, atol=1e-5)
    best = whole.extras["top_heads"][0][0]
    alone = attribute(tiny_random, run, method="direct_logit", target="blue", heads=((best["layer"], best["head"]),))
    assert float(alone.values.sum()) == pytest.approx(best["value"], abs=1e-5)
    assert "L" + str(best["layer"]) in alone.notes[-1]


def test_layers_that_do_more_than_add_are_refused(tiny_random: Lab, run: Run) -> None:
    hook = language_layers(tiny_random.model)[1].register_forward_hook(lambda module, args, out: 1.5 * out)
    try:
        with pytest.raises(LabError, match="expected parts that add up to the logit, .* is missing"):
            attribute(tiny_random, run, method="direct_logit")
    finally:
        hook.remove()


def test_a_norm_that_subtracts_the_mean_is_refused(tiny_random: Lab, run: Run) -> None:
    language: Any = language_model(tiny_random.model)
    own, language.norm = language.norm, nn.LayerNorm(64)
    try:
        with pytest.raises(LabError, match="expected a root-mean-square final norm, got LayerNorm"):
            attribute(tiny_random, replace(run, fingerprint=tiny_random.fingerprint), method="direct_logit")
    finally:
        language.norm = own


def test_all_of_the_planted_logit_comes_from_the_picture() -> None:
    planted = planted_lab()
    run = scripted_run(planted, red_picture(96, 96, (12, 60, 36, 84)), "The car is red.")
    rel = attribute(planted, run, method="direct_logit", target="red")
    assert rel.extras["logit"][0] > 0.1
    assert rel.values[0].sum() == pytest.approx(rel.extras["logit"][0], rel=1e-4)
    assert rel.extras["top_heads"][0][0]["layer"] == 0
