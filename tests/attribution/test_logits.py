"""Direct logit attribution as an exact sum, and the logit lens of image tokens."""

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
from tests.support.closeness import TERMS, close
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
        close(parts.pop("image"), float(rel.values[i].sum()), terms=TERMS)
        close(float(rel.values[i].sum()) + sum(parts.values()), want, terms=TERMS)
        close(rel.extras["logit"][i], want, terms=TERMS)
        assert set(parts) == {"image_left_out", "mlp", "embedding", "bias", "system", "question", "cue", "answer"}
        assert (abs(parts["bias"]) > 1e-3) == (which == "grouped")
        image = float(np.sum(rel.extras["image_by_layer"][i]))
        close(image, float(rel.values[i].sum()) + parts["image_left_out"], terms=TERMS)


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
    close(rel.values[0].ravel(), want, terms=TERMS)
    assert np.abs(want).max() > 0.01


def test_direct_logit_of_a_contrast_is_the_difference_of_the_two_words(tiny_random: Lab, run: Run) -> None:
    contrast = attribute(tiny_random, run, method="direct_logit", target=("blue", "red"))
    position, said, other = (getattr(contrast.targets[0], name)[0] for name in ("positions", "token_ids", "against_ids"))
    singles = [Target("token", "x", (position,), (token,)) for token in (said, other)]
    one, two = attribute(tiny_random, run, method="direct_logit", target=singles).values
    close(contrast.values[0], one - two, terms=TERMS)
    centred = attribute(tiny_random, run, method="direct_logit", target=("blue", "red"), centre=True)
    close(centred.values, contrast.values, terms=TERMS)


def test_maps_of_separate_heads_add_up_to_the_whole_map(tiny_random: Lab, run: Run) -> None:
    whole = attribute(tiny_random, run, method="direct_logit", target="blue")
    heads = [attribute(tiny_random, run, method="direct_logit", target="blue", heads=head).values for head in range(4)]
    close(sum(heads), whole.values, terms=TERMS)
    layers = [attribute(tiny_random, run, method="direct_logit", target="blue", layers=(i, i + 1)) for i in range(3)]
    close(sum(one.values for one in layers), whole.values, terms=TERMS)
    by_layer = [float(one.values.sum()) for one in layers]
    close(whole.extras["image_by_layer"][0], by_layer, terms=TERMS)
    best = whole.extras["top_heads"][0][0]
    alone = attribute(tiny_random, run, method="direct_logit", target="blue", heads=((best["layer"], best["head"]),))
    close(float(alone.values.sum()), best["value"], terms=TERMS)
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


# -- the logit lens ------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["probability", "logit"])
def test_lens_norms_every_state_once(tiny_random: Lab, run: Run, value: str) -> None:
    states, logits = states_and_logits(tiny_random, run)
    norm: Any = language_model(tiny_random.model).norm
    image, token = slice(*run.segments["image"]), run.target("blue").token_ids[0]
    assert len(run.target("blue").token_ids) == 1
    tables = [tiny_random.model.lm_head(norm(state)) for state in states[:-1]] + [tiny_random.model.lm_head(states[-1])]
    close(tables[-1].float(), logits, terms=TERMS)
    twice = tiny_random.model.lm_head(norm(states[-1]))
    for number, table in enumerate(tables):
        want = (table.softmax(-1) if value == "probability" else table)[image, token].detach().numpy()
        found = attribute(tiny_random, run, method="logit_lens_map", target="blue", layers=number, value=value).values[0].ravel()
        close(found, want, terms=TERMS)
    wrong = (twice.softmax(-1) if value == "probability" else twice)[image, token].detach().numpy()
    assert np.abs(found - wrong).max() > 0.05 * np.abs(found).max(), "this fixture cannot tell a norm applied twice"


def test_lens_reduces_each_word_over_its_states_and_tokens(tiny_random: Lab, run: Run) -> None:
    ask: dict[str, Any] = {"method": "logit_lens_map", "target": ["Yes,", ("blue", "red")]}
    one_by_one = np.stack([attribute(tiny_random, run, layers=i, **ask).values for i in range(4)])
    mean = attribute(tiny_random, run, reduce="mean", **ask)
    close(mean.values, one_by_one.mean(0), terms=TERMS)
    window = attribute(tiny_random, run, layers=(1, 3), reduce="mean", **ask)
    close(window.values, one_by_one[1:3].mean(0), terms=TERMS)
    assert window.extras["states"] == [1, 2]
    strongest = attribute(tiny_random, run, **ask)
    close(strongest.values[0], one_by_one[:, 0].max(0), terms=TERMS)
    curve = strongest.extras["strongest_patch_by_state"][0]
    close(curve, one_by_one[:, 0].max((1, 2)), terms=TERMS)
    assert strongest.extras["strongest_state"][0] == int(np.argmax(curve))
    said, other = (
        Target("token", "x", (0,), (ids[0],)) for ids in (strongest.targets[1].token_ids, strongest.targets[1].against_ids)
    )
    at = run.segments["answer"][0]
    pair = [replace(one, positions=(at,)) for one in (said, other)]
    blue, red = attribute(tiny_random, run, method="logit_lens_map", target=pair).values
    close(strongest.values[1], blue - red, terms=TERMS)
