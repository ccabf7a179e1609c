"""Edges and circuits: the graph is the model, an edge is cut as by hand, slopes, areas by hand, random circuits, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import llava_lab as ll
from llava_lab.capture import hooked, undisturbed
from llava_lab.cli import main as cli
from llava_lab.errors import LabError, OptionError
from llava_lab.interventions.circuit import Graph, Pair, Shape
from llava_lab.interventions.patching import corrupted_pixels, reading_nodes
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers
from llava_lab.replay.prefix import Prefix, image_tokens
from llava_lab.replay.targets import resolve_targets
from llava_lab.results import Circuit, Run
from tests.support.closeness import TERMS, close
from tests.support.leftovers import state_of
from tests.support.result_examples import examples


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    shown = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    return tiny_random.ask(shown, "What color is the car?", max_new_tokens=3)


@pytest.fixture(scope="module")
def pair(tiny_random: Lab, run: Run) -> Pair:
    pixels, _ = corrupted_pixels(tiny_random, run, "grey", 0)
    return Pair(run, pixels, resolve_targets(tiny_random, run, 0)[0])


def number_of(shape: Shape, name: str) -> int:
    """An edge's number by its name."""
    return next(edge for edge in range(len(shape.live)) if shape.name(edge) == name)


def test_all_edges_are_the_clean_reading_and_none_the_corrupted(tiny_random: Lab, run: Run, pair: Pair) -> None:
    with undisturbed(tiny_random.model):
        graph = Graph(tiny_random, pair)
        start = run.segments["image"][0]
        plain = [
            float(Prefix(tiny_random, run, (pair.target,), start, tokens=image_tokens(tiny_random, run, shown)).score()[0])
            for shown in (None, pair.pixels)
        ]
        live = graph.shape.live
        whole, nothing = graph.run(np.ones(len(live), bool)), graph.run(np.zeros(len(live), bool))
        only_live = graph.run(live)
    close(np.array([graph.clean, graph.corrupt]), np.array(plain), terms=TERMS)
    close(np.array([whole, nothing]), np.array(plain), terms=TERMS)
    close(np.array(only_live), np.array(whole), terms=TERMS)  # the others cannot matter
    assert abs(whole - nothing) > 1e-3


def test_a_cut_edge_to_the_output_is_a_change_of_the_last_state(tiny_random: Lab, run: Run, pair: Pair) -> None:
    """By hand: what an MLP gives at the predicting position, swapped for its corrupted value behind the last layer alone."""
    model: Any = tiny_random.model
    layer, at = 1, pair.target.positions[0]
    with undisturbed(model):
        graph = Graph(tiny_random, pair)
        kept = np.ones(len(graph.shape.live), bool)
        kept[number_of(graph.shape, f"MLP {layer} -> output, text")] = False
        cut = graph.run(kept)
        readings = []
        for pixels in (None, pair.pixels):
            inputs = tiny_random.inputs(run)
            if pixels is not None:
                inputs["pixel_values"] = pixels
            with reading_nodes(tiny_random) as nodes:
                model(**inputs)
            readings.append(nodes.mlps[layer][0, at])

        def swap(module: Any, args: Any, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            new = states.clone()
            new[0, at] += readings[1] - readings[0]
            return (new, *output[1:]) if isinstance(output, tuple) else new

        with hooked(language_layers(model)[-1], after=swap):
            logits = model(**tiny_random.inputs(run)).logits[0, at].double()
    by_hand = float(logits.log_softmax(-1)[pair.target.token_ids[0]])
    close(np.array(cut), np.array(by_hand), of=np.array(by_hand), terms=TERMS)
    assert abs(cut - graph.clean) > 1e-5


def test_the_estimate_of_an_edge_is_the_slope_of_cutting_it(tiny_random: Lab, run: Run, pair: Pair) -> None:
    """With another picture so near that the score is straight on the way, cutting an edge loses what was estimated."""
    own = tiny_random.inputs(run)["pixel_values"]
    near = replace(pair, pixels=own + 0.005 * (pair.pixels - own))
    with undisturbed(tiny_random.model):
        graph = Graph(tiny_random, near)
        scores = graph.scores()
        chosen = np.argsort(-np.abs(scores))[:12]
        lost = []
        for edge in chosen:
            kept = np.ones(len(scores), bool)
            kept[edge] = False
            lost.append(graph.clean - graph.run(kept))
    np.testing.assert_allclose(lost, scores[chosen], rtol=0.1, atol=1e-5)
    assert not scores[~graph.shape.live].any()


def test_edges_are_numbered_and_named_once() -> None:
    shape = Shape(layers=2, heads=4, groups=2)
    names = [shape.name(edge) for edge in range(len(shape.live))]
    assert len(set(names)) == len(names)
    assert names[0] == "tokens -> head 0.0 query, image"
    assert names[-1] == "MLP 1 -> output, text"
    # by hand: attention 8 readers x 1 and x 6 senders, MLP x 5 and x 10, output x 11, two groups of positions each
    assert len(names) == 2 * (8 * 1 + 5 + 8 * 6 + 10 + 11)
    assert "head 1, group 1 value" in names[number_of(shape, "head 0.3 -> head 1, group 1 value, text")]
    with pytest.raises(OptionError, match="no edge"):
        shape.name(len(names))


def test_areas_by_hand() -> None:
    """f is 0.5 at 0.1 and 1 at 1: trapezoids from (0, 0), and from (0, 1) for the distance."""
    found = examples()[Circuit]
    assert isinstance(found, Circuit)
    assert found.cpr == pytest.approx(0.1 * 0.25 + 0.9 * 0.75)
    assert found.cmd == pytest.approx(0.1 * 0.75 + 0.9 * 0.25)
    assert found.random_cpr == pytest.approx(0.1 * 0.025 + 0.9 * 0.525)
    assert found.random_cmd == pytest.approx(0.1 * 0.975 + 0.9 * 0.475)


def test_a_circuit_of_given_pairs_leaves_nothing_behind(tiny_random: Lab, run: Run) -> None:
    before = state_of(tiny_random)
    found = ll.circuit(
        tiny_random, [(run, "grey", 0), (run, "blur", 0)], n=1, held=1, shares=(0.5, 1.0), draws=2, checked=4, progress=False
    )
    assert state_of(tiny_random) == before
    assert found.chance.shape == (2, 2, 1)
    assert found.checked == 4
    close(found.faithfulness[-1], np.ones(1, np.float32), of=np.array(100.0), terms=TERMS)
    close(found.chance[:, -1], np.ones((2, 1), np.float32), of=np.array(100.0), terms=TERMS)
    assert found.counts.tolist() == [round(found.edges / 2), found.edges]


def test_on_tiny_a_few_edges_do_and_random_ones_do_not() -> None:
    """The finding of the docstring, small: 5% of the edges keep nine tenths of the difference, random ones nothing."""
    found = ll.circuit(ll.load("tiny"), n=1, held=1, shares=(0.05,), draws=1, progress=False)
    assert found.faithfulness[0, 0] > 0.8
    assert abs(found.chance[0, 0, 0]) < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": [0.0]}, "shares"),
        ({"pairs": [1]}, "pairs"),
        ({"n": 2, "pairs": []}, "more than"),
        ({"variable": "x", "pairs": None}, "variable"),
    ],
)
def test_what_cannot_be_is_refused(tiny_random: Lab, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ll.circuit(tiny_random, **{"pairs": [], "progress": False, **options})


def test_a_graph_that_is_not_the_model_is_refused(tiny_random: Lab, pair: Pair) -> None:
    module = language_layers(tiny_random.model)[1].self_attn.o_proj
    with (
        undisturbed(tiny_random.model),
        hooked(module, after=lambda module, args, output: output * 3),
        pytest.raises(LabError, match="whole graph"),
    ):
        Graph(tiny_random, pair)


def test_the_command_prints_one_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: dict[str, Any] = {}

    def small(lab: Any, **options: Any) -> Circuit:
        asked.update(options)
        found = examples()[Circuit]
        assert isinstance(found, Circuit)
        return found

    monkeypatch.setattr(ll, "circuit", small)
    assert cli.main(["circuit", "--variable", "kind", "--n", "2", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert asked["variable"] == "kind"
    assert asked["n"] == 2
    assert {"cpr", "cmd", "random_cpr", "random_cmd", "faithfulness"} <= set(data)
