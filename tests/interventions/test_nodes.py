"""Heads and feed-forward parts: measured by hand, the estimate exact where the score is straight, sums, nothing left behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import llava_lab as ll
from llava_lab.capture import hooked, undisturbed
from llava_lab.errors import LabError, OptionError
from llava_lab.interventions.circuit import drawn_pairs, parting
from llava_lab.interventions.patching import reading_nodes, replacing
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers
from llava_lab.results import NodeScores, Run
from llava_lab.worlds.scenes import HELD_OUT
from llava_lab.worlds.twins import VARIABLES, twins
from tests.support.closeness import TERMS, close
from tests.support.leftovers import state_of


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    shown = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    return tiny_random.ask(shown, "What color is the car?", max_new_tokens=3)


def measured(lab: Lab, run: Run, **options: Any) -> NodeScores:
    return ll.patch_nodes(lab, run, "grey", **{"sites": ["image", "last"], "progress": False, **options})


def test_all_heads_of_a_layer_together_are_its_attention(tiny_random: Lab, run: Run) -> None:
    """Patched by hand, a layer's attention output at one site, against `patch` of the same: the heads' rows are the same."""
    grid = ll.patch(tiny_random, run, "grey", sites=["last"], components=("attention", "mlp"), layers=[1], score="logprob")
    one = measured(tiny_random, run, sites=["last"], layers=[1])
    close(one.mlps[0, 1], grid.scores[1, 0, 0, 0] - grid.corrupt[0], terms=TERMS)
    model: Any = tiny_random.model
    width = language_layers(model)[1].self_attn.o_proj.in_features
    with undisturbed(model), reading_nodes(tiny_random) as nodes:
        model(**tiny_random.inputs(run))
    assert nodes.heads[1].shape[-1] == width


def test_a_head_is_patched_as_by_hand(tiny_random: Lab, run: Run) -> None:
    """One head's part before the joining projection, at the last site, written by a hook of our own in whole forwards."""
    model: Any = tiny_random.model
    layer, head = 1, 2
    result = measured(tiny_random, run, sites=["last"], layers=[layer], metric=0, put="zero")
    heads = result.heads.shape[2]
    module = language_layers(model)[layer].self_attn.o_proj
    part = module.in_features // heads
    at = run.segments["answer"][0] - 1

    def cut(module: Any, args: Any) -> Any:
        new = args[0].clone()
        for position in range(at, run.segments["answer"][1] - 1):
            new[:, position, head * part : (head + 1) * part] = 0
        return (new,)

    def score() -> float:
        logits = model(**tiny_random.inputs(run)).logits[0, at].double()
        return float(logits.log_softmax(-1)[int(run.token_ids[at + 1])])

    with undisturbed(model):
        before = score()
        with hooked(module, before=cut):
            after = score()
    assert before == pytest.approx(result.clean, abs=1e-4)
    close(result.heads[0, layer, head], np.float32(after - before), of=np.array([after, before]), terms=TERMS)


def test_clean_into_clean_changes_nothing(tiny_random: Lab, run: Run) -> None:
    same = ll.patch_nodes(tiny_random, run, run, sites=["image"], progress=False)
    guess = ll.attribution_patch(tiny_random, run, run, sites=["image"])
    for result in (same, guess):
        close(result.heads, np.zeros_like(result.heads), of=same.clean, terms=TERMS)
        close(result.mlps, np.zeros_like(result.mlps), of=same.clean, terms=TERMS)


def test_the_estimate_is_the_slope_of_the_measured_curve(tiny_random: Lab, run: Run) -> None:
    """A small step of the node's value towards the clean one changes the score by the estimate times the step."""
    guess = ll.attribution_patch(tiny_random, run, "grey", sites=["last"], metric=0)
    from llava_lab.interventions.patching import corrupted_pixels
    from llava_lab.replay.prefix import Prefix, image_tokens
    from llava_lab.replay.targets import resolve_targets

    targets = resolve_targets(tiny_random, run, 0)
    model: Any = tiny_random.model
    heads, step = guess.heads.shape[2], 1e-2
    with undisturbed(model):
        start = run.segments["image"][0]
        pixels, _ = corrupted_pixels(tiny_random, run, "grey", 0)
        readings = [Prefix(tiny_random, run, targets, start, tokens=image_tokens(tiny_random, run, p)) for p in (None, pixels)]
        with reading_nodes(tiny_random) as clean:
            readings[0].score()
        with reading_nodes(tiny_random) as corrupt:
            before = float(readings[1].score()[0])
        where = [run.segments["answer"][0] - 1 - readings[1].start]
        for layer, head in ((0, 0), (1, 3), (2, 1)):
            values = corrupt.heads[layer] + step * (clean.heads[layer] - corrupt.heads[layer])
            module = language_layers(model)[layer].self_attn.o_proj
            with replacing(module, values, where, (head, heads)):
                slope = (float(readings[1].score()[0]) - before) / step
            assert slope == pytest.approx(float(guess.heads[0, layer, head]), rel=0.05, abs=1e-3)


def test_single_positions_add_up_to_their_site(tiny_random: Lab, run: Run) -> None:
    start, stop = run.segments["image"]
    whole = ll.attribution_patch(tiny_random, run, "grey", sites=["image"], steps=2)
    each = ll.attribution_patch(tiny_random, run, "grey", sites="positions", steps=2)
    assert each.sites[0] == str(start)
    close(each.heads[: stop - start].sum(0), whole.heads[0], terms=TERMS)
    close(each.mlps[: stop - start].sum(0), whole.mlps[0], terms=TERMS)


def test_agreement_is_a_correlation_and_wants_the_same_nodes(tiny_random: Lab, run: Run) -> None:
    one = measured(tiny_random, run)
    assert one.agreement(one)["heads: pearson"] == pytest.approx(1)
    guess = ll.attribution_patch(tiny_random, run, "grey", sites=["image", "last"])
    known = np.isfinite(one.heads)
    expected = np.corrcoef(guess.heads[known], one.heads[known])[0, 1]
    assert guess.agreement(one)["heads: pearson"] == pytest.approx(expected)
    with pytest.raises(OptionError, match="same nodes"):
        one.agreement(measured(tiny_random, run, put="zero"))


def test_nothing_stays_behind_also_after_an_error(tiny_random: Lab, run: Run) -> None:
    before = state_of(tiny_random)
    measured(tiny_random, run, layers=[0])
    ll.attribution_patch(tiny_random, run, "grey")
    module = language_layers(tiny_random.model)[0].mlp
    with pytest.raises(LabError, match="no forward"), replacing(module, torch.zeros(1, 2, 3), [0]):
        pass
    assert state_of(tiny_random) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [({"put": "dirty"}, "put"), ({"layers": [99]}, "layers"), ({"sites": "image"}, "sites"), ({"sites": ["system"]}, "before")],
)
def test_what_cannot_be_is_refused(tiny_random: Lab, run: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(LabError, match=message):
        measured(tiny_random, run, **options)


@pytest.mark.parametrize("variable", VARIABLES)
def test_twins_differ_in_one_variable_of_one_thing(variable: str) -> None:
    for pair in twins(variable, n=6):
        (which,) = pair.question.deciding
        one, two = pair.scene.things[which], pair.other.things[which]
        same = [a == b for a, b in zip(pair.scene.things, pair.other.things, strict=True)]
        assert same.count(False) == 1
        assert not same[which]
        differ = {
            name for name in ("kind", "color", "size", "x", "y", "side", "shade") if getattr(one, name) != getattr(two, name)
        }
        assert differ <= ({"x", "y"} if variable == "place" else {variable})
        assert pair.other_short != pair.question.short
        assert (two.color, two.kind) not in HELD_OUT


def test_pairs_are_answered_rightly_and_part_where_the_target_is() -> None:
    lab = ll.load("tiny")
    for pair in drawn_pairs(lab, "color", n=2):
        assert pair.twins is not None
        assert pair.other is not None
        assert pair.target == parting(pair.run, pair.other)
        assert pair.twins.question.short in pair.run.answer
        assert pair.twins.other_short in pair.other.answer
        (position,) = pair.target.positions
        assert pair.run.token_ids[position + 1] == pair.target.token_ids[0]
        assert pair.other.token_ids[position + 1] == pair.target.against_ids[0]


@pytest.mark.long
def test_the_estimate_is_close_on_tiny() -> None:
    """The finding of the README, on one pair and its last position."""
    lab = ll.load("tiny")
    (pair,) = drawn_pairs(lab, "color", n=1)
    assert pair.other is not None
    options: dict[str, Any] = {"sites": ["last"], "metric": pair.target}
    truth = ll.patch_nodes(lab, pair.run, pair.other, progress=False, **options)
    guess = ll.attribution_patch(lab, pair.run, pair.other, **options)
    assert guess.agreement(truth)["heads: pearson"] > 0.95
    assert guess.passes["forward"] == 2
    assert guess.passes["backward"] == 1
