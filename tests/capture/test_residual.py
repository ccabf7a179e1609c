"""Values beside attention, and the residual stream: equal to the model's own, and gone when the block is left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llava_lab.capture import Full, undisturbed, watch_attention
from llava_lab.capture.residual import HeadSources, joined_by, seen_by_heads, watch_outputs, watch_stream
from llava_lab.errors import LabError
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers, language_model
from llava_lab.results import Run
from tests.support.closeness import TERMS, close
from tests.support.planted import scripted_run


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    return scripted_run(tiny_random, np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8), "It is red.")


def test_weights_times_values_through_the_output_projection_are_the_layers_attention(tiny_random: Lab, run: Run) -> None:
    layers = language_layers(tiny_random.model)
    found: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    directions = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))

    def fold(number: int, weights: Tensor, values: Tensor) -> None:
        seen = seen_by_heads(layers[number], directions)
        found[number] = torch.einsum("hqk,hkd,nhd->qn", weights, values, seen)

    attentions = [layer.self_attn for layer in layers]
    rows = [80, 3, 70, 3]
    with (
        undisturbed(tiny_random.model),
        watch_outputs(attentions, outputs.__setitem__),
        watch_attention(layers, HeadSources(rows, fold)),
    ):
        tiny_random.model(**tiny_random.inputs(run))
    for number in range(3):
        close(found[number], outputs[number][0, [3, 70, 80]] @ directions.T, terms=64 * 3)


def test_head_sources_give_eager_weights(tiny_random: Lab, run: Run) -> None:
    layers = language_layers(tiny_random.model)
    found: dict[int, Tensor] = {}
    with undisturbed(tiny_random.model):
        with watch_attention(layers, Full()) as full:
            tiny_random.model(**tiny_random.inputs(run))
        with watch_attention(layers, HeadSources([75], lambda number, weights, values: found.update({number: weights}))):
            tiny_random.model(**tiny_random.inputs(run))
    for number in range(3):
        close(found[number][:, 0], full.attention[number][0, :, 75], terms=TERMS)


def test_the_stream_is_what_transformers_calls_hidden_states_but_for_the_final_norm(tiny_random: Lab, run: Run) -> None:
    states: dict[int, Tensor] = {}
    layers = language_layers(tiny_random.model)
    with undisturbed(tiny_random.model), watch_stream(layers, states.__setitem__):
        out = tiny_random.model(**tiny_random.inputs(run), output_hidden_states=True)
    assert sorted(states) == [0, 1, 2, 3]
    for number in range(3):
        close(states[number], out.hidden_states[number], terms=TERMS)
    norm: Any = language_model(tiny_random.model).norm
    close(norm(states[3]), out.hidden_states[3], terms=TERMS)
    assert not torch.allclose(states[3], out.hidden_states[3], atol=0.1)


@pytest.mark.parametrize("how", [RuntimeError, KeyboardInterrupt])
def test_hooks_go_also_when_the_fold_fails(tiny_random: Lab, run: Run, how: type[BaseException]) -> None:
    layers = language_layers(tiny_random.model)

    def hooks() -> list[tuple[int, int]]:  # transformers leaves some of its own
        return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in tiny_random.model.modules()]

    before = hooks()

    def fold(number: int, state: Tensor) -> None:
        if number == 2:
            raise how("stop")

    with pytest.raises(how, match="stop"), undisturbed(tiny_random.model), watch_stream(layers, fold):
        tiny_random.model(**tiny_random.inputs(run))
    assert hooks() == before


def test_modules_that_do_not_run_once_are_reported() -> None:
    part = nn.Linear(2, 2)
    twice = r"expected each of 1 modules to run once, they ran \[2\] times"
    with pytest.raises(LabError, match=twice), watch_outputs([part], lambda number, output: None):
        part(part(torch.zeros(1, 2)))
    with pytest.raises(LabError, match=r"they ran \[0\] times"), watch_outputs([part], lambda number, output: None):
        pass
    for watch in (watch_outputs, watch_stream):
        with pytest.raises(LabError, match="at least one"), watch([], lambda number, output: None):
            pass
    assert not part._forward_hooks


def test_batches_and_closed_projections_are_refused(tiny_random: Lab, run: Run) -> None:
    layers = language_layers(tiny_random.model)
    inputs = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in tiny_random.inputs(run).items()}
    refused = pytest.raises(LabError, match="expected one sequence at a time, got a batch of 2")
    with refused, undisturbed(tiny_random.model), watch_attention(layers, HeadSources([5], lambda *found: None)):
        tiny_random.model(**inputs)
    layer: Any = nn.Module()
    layer.self_attn = nn.Module()
    layer.self_attn.config, layer.self_attn.o_proj = None, nn.Identity()
    with pytest.raises(LabError, match="o_proj of floating-point weights, got Identity; load the model unquantised"):
        joined_by(layer)
