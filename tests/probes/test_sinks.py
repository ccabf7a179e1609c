"""Sinks: shares by hand from eager attention, a planted outlier, both marks needed, controls by hand, nothing left behind."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

import llava_lab as ll
from llava_lab.capture import hooked
from llava_lab.cli import main as cli
from llava_lab.errors import OptionError
from llava_lab.models import Lab
from llava_lab.models.layout import connector_of
from llava_lab.probes.sinks import READERS, Drawn, Watched
from llava_lab.results import Run
from tests.support.closeness import TERMS, close


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    shown = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    return tiny_random.ask(shown, "What color is the car?", max_new_tokens=4)


def watched(causal: bool) -> Watched:
    return Watched(causal, torch.Generator().manual_seed(0))


def fed(attention: torch.Tensor, *, causal: bool, parts: int = 1) -> Watched:
    """One layer's attention (S, S), given in so many blocks of rows."""
    part = watched(causal)
    reducer = Drawn(part)
    size = len(attention)
    reducer.open(0, size)
    for rows in torch.arange(size).tensor_split(parts):
        reducer.add(0, slice(int(rows[0]), int(rows[-1]) + 1), attention[None, None, rows])
    reducer.close(0, None)
    return part


@pytest.mark.parametrize("causal", [True, False])
def test_even_rows_draw_exactly_once_and_by_chance_too(causal: bool) -> None:
    size = 20
    even = torch.ones(size, size).tril() if causal else torch.ones(size, size)
    part = fed(even / even.sum(1, keepdim=True), causal=causal, parts=3)
    counted = slice(0, size - READERS) if causal else slice(None)
    for values in (part.drawn[0], part.by_chance[0]):
        close(values[counted], torch.ones(size)[counted], terms=size)
        assert not causal or not bool(values[size - READERS :].any())


def test_a_column_that_takes_everything_draws_the_inverse_of_an_even_share_and_not_by_chance() -> None:
    """All 15 other rows give all they have to position 3: sixteen times an even share; mixed up, the rows point anywhere."""
    size = 16
    attention = torch.zeros(size, size)
    attention[:, 3] = 1
    part = fed(attention, causal=False)
    assert float(part.drawn[0][3]) == pytest.approx(size)
    assert float(part.drawn[0].sum()) == pytest.approx(size)
    assert float(part.by_chance[0].max()) < size / 2
    # the row of 3 looks at itself, which is left out; each of the others keeps its whole weight somewhere
    assert float(part.by_chance[0].sum()) == pytest.approx(size)


def test_shares_are_those_of_eager_attention(tiny_random: Lab, run: Run) -> None:
    model: Any = tiny_random.model
    found = ll.sinks(tiny_random, run, control=False, progress=False)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            decoder = model(**tiny_random.inputs(run), output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    start, stop = run.segments["image"]
    length = len(run.token_ids)
    for layer, attention in enumerate(decoder):
        rows = attention[0].mean(0)
        expected = []
        for key in range(start, stop):
            drawn = sum(float(rows[query, key]) for query in range(key + 1, length))
            expected.append(drawn / sum(1 / (query + 1) for query in range(key + 1, length)))
        at = found.layers.index(f"language {layer}")
        close(found.drawn[0, at].ravel(), np.array(expected), terms=TERMS)


def test_a_long_token_is_an_outlier_where_it_was_planted_and_a_sink_only_if_attended(tiny_random: Lab, run: Run) -> None:
    patch = 5
    cols = run.map.cols

    def plant(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        changed[:, patch, 7] += 100 * output.norm(dim=-1).max()
        return changed

    with hooked(connector_of(tiny_random.model), after=plant):
        found = ll.sinks(tiny_random, run, control=False, progress=False)
        loose = ll.sinks(tiny_random, run, attended=1e-9, control=False, progress=False)
    first = found.layers.index("language 0")
    cell = divmod(patch, cols)
    assert np.argwhere(found.outlier[0, first]).tolist() == [list(cell)]
    assert found.peak[0, first][cell] > 0.99
    assert found.length[0, first][cell] > 50
    assert not found.found[0, first].any() or bool(found.attended[0, first][cell])
    assert np.argwhere(loose.found[0, first]).tolist() == [list(cell)], "attended too, it is a sink"
    assert cell in loose.patches("language")
    assert not found.outlier[0, : found.layers.index("language 0")].any(), "the tower is before the connector"


def test_the_control_mixes_weights_and_puts_them_back(tiny_random: Lab, run: Run) -> None:
    weights = {name: value.clone() for name, value in tiny_random.model.state_dict().items()}
    with_control = ll.sinks(tiny_random, run, progress=False)
    without = ll.sinks(tiny_random, run, control=False, progress=False)
    assert all(torch.equal(value, weights[name]) for name, value in tiny_random.model.state_dict().items())
    assert with_control.controlled
    assert not without.controlled
    assert np.array_equal(with_control.drawn, without.drawn)
    assert without.to_dict()["mixed"] is None


def test_several_runs_are_read_one_by_one(tiny_random: Lab, run: Run) -> None:
    one = ll.sinks(tiny_random, run, control=False, progress=False)
    two = ll.sinks(tiny_random, [run, run], control=False, progress=False)
    assert np.array_equal(two.drawn[0], two.drawn[1])
    assert np.array_equal(two.drawn[:1], one.drawn)
    assert np.array_equal(two.others, 2 * one.others)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"attended": 0}, "attended"), ({"long": -1.0}, "long"), ({"peak": float("nan")}, "peak"), ({"runs": []}, "at least one")],
)
def test_what_cannot_be_is_refused(tiny_random: Lab, run: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ll.sinks(tiny_random, options.pop("runs", run), **options)


@pytest.mark.long
def test_tiny_has_no_sink_among_its_image_tokens() -> None:
    """The finding of the README: attended patches and no outlier, in the tower and in the language model."""
    lab = ll.load("tiny")
    from llava_lab.worlds import picturebook

    runs = [lab.ask(picturebook.scene("test", index).picture(), "What color is the thing?") for index in range(3)]
    found = ll.sinks(lab, runs, control=False, progress=False)
    assert found.attended.any()
    assert not found.found.any()
    assert found.length.max() < found.limits["long"]


def test_the_command_prints_one_object(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    figure = tmp_path / "sinks.png"
    assert cli.main(["sinks", "--data", "picturebook", "--n", "2", "--json", "--figure", str(figure)]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["runs"] == 2
    assert data["sinks"] == 0
    assert len(data["layers"]) == len(data["mixed"]) == 10
    assert figure.stat().st_size > 10_000
    assert cli.main(["sinks"]) == 2
    assert "either a picture and a question" in capsys.readouterr().err
