"""Interchange: the exchanged state by hand, a known subspace is found, the model is read as it is, placebos, nothing left."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import llava_lab as ll
from llava_lab.capture import hooked, undisturbed
from llava_lab.cli import main as cli
from llava_lab.errors import DataError, LabError, OptionError
from llava_lab.interventions.interchange import (
    NO_TOKEN,
    Family,
    Readings,
    exchange,
    exchanging,
    find_subspace,
    label_rows,
    random_subspace,
)
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers
from llava_lab.results import Interchange
from llava_lab.worlds.scenes import HELD_OUT
from llava_lab.worlds.twins import BESIDE, VARIABLES, crossed, value_of
from tests.support.closeness import TERMS, close
from tests.support.interrupts import interrupting
from tests.support.leftovers import state_of
from tests.support.result_examples import examples

MODULE = sys.modules["llava_lab.interventions.interchange"]  # the package has the function under that name


def test_the_exchanged_state_is_the_one_worked_out_by_hand() -> None:
    base, source = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[4.0, 6.0, 8.0]])
    along = torch.tensor([[0.6], [0.8], [0.0]])
    # the change is (3, 4, 5), its coordinate along (0.6, 0.8, 0) is 5, so (3, 4, 0) is added
    torch.testing.assert_close(exchange(base, source, along), torch.tensor([[4.0, 6.0, 3.0]]))
    turned = torch.tensor([[0.6, -0.8, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(exchange(base, source, turned), source)
    assert torch.equal(exchange(base, source, None), source)


def test_coordinates_along_the_subspace_are_the_source_s_and_all_others_the_base_s() -> None:
    base, source = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    every = random_subspace(12, 12, seed=1)
    inside, outside = every[:, :4], every[:, 4:]
    new = exchange(base, source, inside)
    torch.testing.assert_close(new @ inside, source @ inside)
    torch.testing.assert_close(new @ outside, base @ outside)


class Toy:
    """States of width 12 of which a linear layer reads a known plane: which of four quadrants the answer is."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        self.base, self.source = torch.randn(2, 6, 64, 12, generator=random)
        self.plane = random_subspace(12, 2, seed=5)
        self.reads = 4 * torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0]])

    def logits(self, states: Tensor) -> Tensor:
        return states @ self.plane @ self.reads

    def loss(self, batch: int, labels: Tensor, basis: Tensor) -> Tensor:
        new = exchange(self.base[batch], self.source[batch], basis)
        return torch.nn.functional.cross_entropy(self.logits(new), labels[batch])

    def share(self, basis: Tensor) -> float:
        """How often the answer becomes the source's, on states that were not learnt from."""
        base, source = torch.randn(2, 400, 12, generator=torch.Generator().manual_seed(9))
        return float((self.logits(exchange(base, source, basis)).argmax(-1) == self.logits(source).argmax(-1)).float().mean())


def test_the_search_finds_the_plane_that_a_linear_layer_reads_and_its_placebos_do_not() -> None:
    toy = Toy()
    demanded = toy.logits(toy.source).argmax(-1)
    mixed = demanded.flatten()[torch.randperm(demanded.numel(), generator=torch.Generator().manual_seed(2))].view_as(demanded)

    def search(labels: Tensor) -> Tensor:
        losses = [lambda basis, batch=batch: toy.loss(batch, labels, basis) for batch in range(6)]
        return find_subspace(losses, 12, 2, epochs=40, rate=0.05, seed=0)

    found, shuffled = search(demanded), search(mixed)
    torch.testing.assert_close(found.T @ found, torch.eye(2))
    # cosines of the angles between the two planes
    assert float(torch.linalg.svdvals(found.T @ toy.plane).min()) > 0.99
    assert toy.share(found) > 0.95
    assert toy.share(toy.plane) == 1.0
    assert max(toy.share(shuffled), toy.share(random_subspace(12, 2, seed=0))) < 0.6


def test_the_same_seed_gives_the_same_subspace() -> None:
    toy = Toy()
    labels = toy.logits(toy.source).argmax(-1)
    losses = [lambda basis: toy.loss(0, labels, basis), lambda basis: toy.loss(1, labels, basis)]
    one, two, other = (find_subspace(losses, 12, 2, epochs=2, rate=0.05, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.allclose(one @ one.T, other @ other.T)


# -- in a model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def families(tiny_random: Lab) -> list[Family]:
    """Drawn scenes with what an untrained model says of them, which is nothing right."""
    made = []
    for some in crossed("color", n=4, count=3):
        shown = [np.asarray(scene.picture()) for scene in some.scenes]
        runs = tuple(tiny_random.ask(one, some.questions[0], max_new_tokens=2) for one in shown)
        beside = tiny_random.ask(shown[0], some.questions[1], max_new_tokens=2)
        masks = [scene.masks()[some.which] for scene in some.scenes]
        made.append(Family(some.scenes[0].index, runs, beside, runs[0].map.mask_to_patches(np.any(masks, 0)) > 0))
    return made


@pytest.mark.parametrize("at_thing", [False, True])
def test_a_batch_is_the_model_s_own_forward_with_the_state_changed(
    tiny_random: Lab, families: list[Family], at_thing: bool
) -> None:
    """By hand: each picture alone, its whole sequence in one forward, the change added by a hook."""
    model: Any = tiny_random.model
    layer, basis = 1, random_subspace(model.config.text_config.hidden_size, 3, seed=0)
    bases, sources = ([family.runs[number] for family in families] for number in (0, 1))
    labels = label_rows(sources, 1)
    where = [family.patches for family in families] if at_thing else None
    largest = 0.0
    with undisturbed(model):
        ours, theirs = (Readings(tiny_random, runs, where, [layer]) for runs in (bases, sources))
        for batch in ours.batches:
            logits = batch.logits(labels[batch.numbers], layer, theirs.at(layer, batch.numbers), basis)
            for row, number in enumerate(batch.numbers):
                base, source, answer = bases[number], sources[number], labels[number, :-1].clamp_min(0).numpy()
                stop = base.segments["answer"][0]
                at = [stop - 1]
                if at_thing:
                    at = (base.segments["image"][0] + np.flatnonzero(families[number].patches)).tolist()
                states, plain = [], []
                for run in (base, source):
                    ids = torch.from_numpy(np.concatenate([run.token_ids[:stop], answer]))[None]
                    inputs = {"input_ids": ids, "pixel_values": tiny_random.pixels(run.picture)}
                    out = model(**inputs, output_hidden_states=True)
                    states.append(out.hidden_states[layer][0, at])
                    plain.append((inputs, out.logits[0, stop - 1 :]))

                def put(module: Any, args: Any, kwargs: Any, at: Any = at, states: Any = states) -> Any:
                    new = args[0].clone()
                    new[0, at] += (states[1] - states[0]) @ basis @ basis.T
                    return (new, *args[1:]), kwargs

                with hooked(language_layers(model)[layer], before=put, with_kwargs=True):
                    by_hand = model(**plain[0][0]).logits[0, stop - 1 :]
                close(logits[row].numpy(), by_hand.numpy(), terms=TERMS)
                largest = max(largest, float((by_hand - plain[0][1]).abs().max()))
    assert largest > 1e-4


def test_a_picture_for_its_own_source_changes_nothing(tiny_random: Lab, families: list[Family]) -> None:
    runs = [family.runs[0] for family in families]
    labels = label_rows(runs, 1)
    with undisturbed(tiny_random.model):
        readings = Readings(tiny_random, runs, None, [0, 1])
        for batch in readings.batches:
            own = [batch.logits(labels[batch.numbers], layer, readings.at(layer, batch.numbers), None) for layer in (0, 1)]
            close(own[0].numpy(), own[1].numpy(), terms=TERMS)
            assert torch.equal(own[0].argmax(-1)[:, 0], labels[batch.numbers, 0])  # what it says by itself


def test_labels_are_whole_answers_with_their_end(tiny_random: Lab, families: list[Family]) -> None:
    longer = families[0].runs[0]
    shorter = tiny_random.ask(longer.picture, longer.question, max_new_tokens=1)
    one, two = (run.token_ids[slice(*run.segments["answer"])].tolist() for run in (longer, shorter))
    assert len(one) == 2
    assert label_rows([longer, shorter], 1).tolist() == [[*one, 1], [*two, 1, NO_TOKEN]]


def test_an_exchange_without_a_forward_is_refused(tiny_random: Lab) -> None:
    nowhere = torch.zeros(1, 1, dtype=torch.bool)
    with pytest.raises(LabError, match="no forward"), exchanging(tiny_random, 0, nowhere, torch.zeros(0, 1), None):
        pass


@pytest.fixture
def with_families(monkeypatch: pytest.MonkeyPatch, families: list[Family]) -> None:
    """`interchange` takes these scenes for rightly answered ones."""
    monkeypatch.setattr(MODULE, "answered", lambda lab, variable, *, n, **options: families[:n])


@pytest.mark.usefixtures("with_families")
@pytest.mark.parametrize("position", ["last", "thing"])
def test_it_leaves_nothing_behind_and_labels_its_axes(tiny_random: Lab, position: str) -> None:
    before = state_of(tiny_random)
    found = ll.interchange(tiny_random, position=position, layers=[1, 0], dim=2, n=2, held=2, epochs=1, seeds=2, progress=False)
    assert state_of(tiny_random) == before
    assert found.layers.tolist() == [0, 1]
    assert found.changed.shape == found.kept.shape == (2, 5, 2, 2)
    assert np.isnan(found.kept[:, found.ARMS.index("untrained")]).all()
    assert np.isfinite(np.delete(found.kept, found.ARMS.index("untrained"), 1)).all()
    assert (found.variable, found.beside, found.position, found.dim, found.learnt_on) == ("color", "kind", position, 2, 2)


@pytest.mark.usefixtures("with_families")
def test_ctrl_c_keeps_the_layers_that_are_done_and_is_raised_before(tiny_random: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches: one a layer in the model with mixed weights, then two a layer in the trained one."""
    before = state_of(tiny_random)
    plain = find_subspace
    for at, layers in ((1, None), (3, None), (4, None), (5, 1)):
        monkeypatch.setattr(MODULE, "find_subspace", interrupting(plain, at=at))
        if layers is None:
            with pytest.raises(KeyboardInterrupt):
                ll.interchange(tiny_random, layers=[0, 1], dim=2, n=2, held=2, epochs=1, progress=False)
        else:
            part = ll.interchange(tiny_random, layers=[0, 1], dim=2, n=2, held=2, epochs=1, progress=False)
            assert part.interrupted
            assert part.layers.tolist() == [0]
            assert "1 of 2 layers" in part.notes[-1]
        assert state_of(tiny_random) == before


@pytest.mark.long
def test_on_tiny_a_few_dimensions_carry_the_colour_and_placebos_do_not() -> None:
    """The finding of the docstring, small: after five layers the prompt's last token carries it."""
    found = ll.interchange(ll.load("tiny"), layers=[5], n=8, held=8, progress=False)
    iia, alone = (dict(zip(found.ARMS, values[0].tolist(), strict=True)) for values in (found.iia, found.alone))
    assert iia["found"] >= 0.5
    assert max(iia["random"], iia["shuffled"], iia["untrained"]) < 0.4
    assert alone["found"] > 0.7 > 0.3 > alone["whole"]


# -- scenes, refusals, the command ------------------------------------------------------------


@pytest.mark.parametrize("variable", VARIABLES)
def test_crossed_scenes_differ_in_two_variables_of_one_thing(variable: str) -> None:
    both = variable, BESIDE[variable]
    for some in crossed(variable, n=4, count=3):
        things = [scene.things[some.which] for scene in some.scenes]
        assert some.shorts == tuple(tuple(value_of(thing, name) for name in both) for thing in things)
        for values in zip(*some.shorts, strict=True):
            assert len(set(values)) == 3
            assert None not in values
        assert all(len({value_of(thing, name) for thing in things}) == 1 for name in {"color", "kind", "place"} - set(both))
        assert len({(thing.size, thing.side) for thing in things}) == 1
        assert [thing.size for thing in some.scenes[0].things].count(things[0].size) == 1
        assert len({scene.things[: some.which] + scene.things[some.which + 1 :] for scene in some.scenes}) == 1
        assert not {(one.color, two.kind) for one in things for two in things} & HELD_OUT
        assert all(things[0].size in question for question in some.questions)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"variable": "size"}, OptionError, "variable"),
        ({"position": "image"}, OptionError, "position"),
        ({"variable": "place", "position": "thing"}, OptionError, "stands elsewhere"),
        ({"layers": [99]}, OptionError, "layers must be numbers from 0 to"),
        ({"layers": []}, OptionError, "layers"),
        ({"dim": 10**4}, OptionError, "at most the model's width"),
        ({"n": 1, "held": 1}, DataError, "the model answers 0 rightly, and 1 were asked for"),
    ],
)
def test_what_cannot_be_is_refused(tiny_random: Lab, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ll.interchange(tiny_random, progress=False, **options)


def test_packed_weights_are_refused_since_the_untrained_control_would_be_none(
    tiny_random: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "is_quantized", lambda model: True)
    with pytest.raises(OptionError, match="without quantization"):
        ll.interchange(tiny_random, progress=False)


def test_rates_and_intervals_by_hand() -> None:
    """Of four pairs three became the source's and three kept the other answer, two of them both."""
    found = examples()[Interchange]
    assert isinstance(found, Interchange)
    assert found.iia[0].tolist() == [0.75, 0, 0, 0, 1]
    assert found.alone[0, :3].tolist() == [0.75, 0.75, 0.75]
    assert found.both[0, 0] == 0.5
    assert np.isnan(found.alone[0, 3])
    edges = found.interval()
    np.testing.assert_allclose(edges[0, 4], (4 / (4 + 1.959964**2), 1), rtol=1e-4)  # Wilson's where all are right
    assert edges[0, 0, 0] < 0.75 < edges[0, 0, 1]
    assert "-" in found.table().below[0].rows[0]
    with pytest.raises(OptionError, match="no measure"):
        found.interval("x")


def test_the_command_prints_one_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: dict[str, Any] = {}

    def small(lab: Any, **options: Any) -> Interchange:
        asked.update(options)
        found = examples()[Interchange]
        assert isinstance(found, Interchange)
        return found

    monkeypatch.setattr(ll, "interchange", small)
    assert cli.main(["interchange", "--variable", "kind", "--layers", "1", "3", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (asked["variable"], asked["layers"], asked["position"]) == ("kind", [1, 3], "last")
    assert {"iia", "alone", "both", "iia_interval", "arms"} <= set(data)
    assert data["alone"][0][3] is None
