"""Pruning: rankings by hand, what is dropped, costs by hand, and the sweep's table."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import llava_lab as ll
from llava_lab.cli import main as cli
from llava_lab.errors import DataError, OptionError
from llava_lab.judging.prune import class_attention, patches_dropped, prefill_share, prune, prune_sweep, ranking
from llava_lab.models import Lab
from llava_lab.models.folders import NAMES
from llava_lab.models.layout import language_layers
from llava_lab.results import Pruning, Run
from tests.support.closeness import TERMS, close


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    shown = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    return tiny_random.ask(shown, "What color is the car?", max_new_tokens=4)


@pytest.fixture(scope="module")
def tiny() -> Lab:
    return ll.load("tiny")


def attentions(lab: Lab, run: Run) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Of the decoder and of the tower, as transformers gives them."""
    model: Any = lab.model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            inputs = lab.inputs(run)
            decoder = model(**inputs, output_attentions=True).attentions
            tower = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    return decoder, tower


@pytest.mark.parametrize("at", [1, 2])
def test_fastv_is_the_last_prompt_positions_attention_in_the_layer_before(tiny_random: Lab, run: Run, at: int) -> None:
    decoder, _ = attentions(tiny_random, run)
    first = run.segments["answer"][0]
    expected = decoder[at - 1][0, :, first - 1, slice(*run.segments["image"])].mean(0)
    close(ranking(tiny_random, run, "fastv", at=at).ravel(), expected.numpy(), terms=TERMS)


def test_visionzip_is_the_class_tokens_attention_in_the_layer_that_is_read(tiny_random: Lab, run: Run) -> None:
    _, tower = attentions(tiny_random, run)
    layer = tiny_random.model.config.vision_feature_layer  # counted from the end, over states: -2 is what the layer before wrote
    close(class_attention(tiny_random, run).ravel(), tower[layer][0, :, 0, 1:].mean(0).numpy(), terms=TERMS)


def test_the_highest_are_kept_and_equal_ones_at_random(run: Run) -> None:
    values = np.arange(run.map.rows * run.map.cols, dtype=float).reshape(run.map.rows, run.map.cols)
    dropped = patches_dropped(run, values, 3, 0)
    kept = {(row, col) for row in range(run.map.rows) for col in range(run.map.cols)} - set(dropped)
    assert kept == {(run.map.rows - 1, run.map.cols - 1 - i) for i in range(3)}
    flat = [patches_dropped(run, values * 0, 5, seed) for seed in range(3)]
    assert flat[0] != flat[1] != flat[2]
    for keep in (0, values.size, -1):
        with pytest.raises(OptionError, match="keep must be"):
            patches_dropped(run, values, keep, 0)


def test_pruning_is_dropping_the_rest(tiny_random: Lab, run: Run) -> None:
    values = np.random.default_rng(1).random((run.map.rows, run.map.cols))
    effect = prune(tiny_random, run, keep=9, by=values, draws=2)
    same = ll.ablate_tokens(tiny_random, run, patches_dropped(run, values, 9, 0), fill="drop", at=2, draws=2)
    assert effect.options["patches"] == values.size - 9
    np.testing.assert_array_equal(effect.after, same.after)
    map_ = replace(ll.attribute(tiny_random, run, method="center"), values=values[None].astype(np.float32))
    np.testing.assert_array_equal(prune(tiny_random, run, keep=9, by=map_, draws=0).after, same.after)


def test_the_cost_by_hand(tiny_random: Lab) -> None:
    layers = language_layers(tiny_random.model)
    count = len(layers)
    assert prefill_share(tiny_random, 100, 0, 2) == 1
    config = tiny_random.model.config.text_config
    width, heads = config.hidden_size, config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    keys = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    weights = 2 * width * heads + 2 * width * keys + 3 * width * config.intermediate_size
    one, few = (2 * weights * n + 4 * n * n * heads for n in (100, 40))
    assert prefill_share(tiny_random, 100, 60, 1) == pytest.approx((one + (count - 1) * few) / (count * one))


@pytest.mark.long
def test_the_truth_keeps_the_answer_where_chance_does_not(tiny: Lab) -> None:
    found = prune_sweep(tiny, n=12, keeps=(9, 36), by=("truth", "random", "fastv"), draws=2, progress=False)
    assert found.full.mean() > 0.8
    truth, random = found.accuracy[0], found.accuracy[1]
    assert truth[1] > random[1]
    assert (found.cost[0], found.cost[1]) == pytest.approx(sorted(found.cost))
    table = str(found.table())
    assert "9 of 144" in table
    assert "cost of the prefill" in table
    assert isinstance(found, Pruning)


def test_the_shipped_numbers_are_of_the_shipped_weights_and_stand_in_the_card(tiny: Lab, tiny_random: Lab) -> None:
    found = ll.shipped_pruning(tiny)
    assert (len(found.pictures), found.split, found.tokens, found.interrupted) == (40, "test", 144, False)
    assert found.accuracy[found.rankings.index("truth"), 0] > found.accuracy[found.rankings.index("random"), 0]
    card = (NAMES["tiny"] / "README.md").read_text("utf-8")
    for row in found.table().rows:
        assert f"| {' | '.join(row)} |" in card
    with pytest.raises(DataError, match="no pruning ships with .*llava-lab prune --model"):
        ll.shipped_pruning(tiny_random)


def test_mistakes_are_refused(tiny_random: Lab, run: Run) -> None:
    for by in ("rolout", np.ones((2, 2)), np.full((run.map.rows, run.map.cols), np.nan), 3):
        with pytest.raises(OptionError, match="by must be"):
            prune(tiny_random, run, keep=9, by=by)
    other = replace(ll.attribute(tiny_random, run, method="center"), fingerprint="another")
    with pytest.raises(OptionError, match="map of this run"):
        prune(tiny_random, run, keep=9, by=other)
    with pytest.raises(OptionError, match="at must be"):
        prune(tiny_random, run, keep=9, at=99)
    with pytest.raises(DataError, match="split"):
        prune_sweep(tiny_random, n=1, split="moon")
    with pytest.raises(OptionError, match="by must name"):
        prune_sweep(tiny_random, n=1, by=())


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    saved, figure = tmp_path / "p.npz", tmp_path / "p.png"
    command = ["prune", "--data", "picturebook", "--n", "2", "--keep", "18", "--by", "fastv,random", "--save", str(saved)]
    assert cli.main([*command, "--figure", str(figure), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["keeps"], told["rankings"]) == ([18], ["fastv", "random"])
    assert Pruning.load(saved).keeps.tolist() == [18]
    assert figure.stat().st_size > 1000
    assert cli.main(["prune", "--json"]) == 2
