"""Ablation: what is put in a token's place is what the model reads there, dropping is removal, and chance stands beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llava_lab.capture import hooked, undisturbed
from llava_lab.errors import OptionError
from llava_lab.interventions import ablate_tokens, ablated
from llava_lab.interventions.ablate import FILLS, shuffled
from llava_lab.interventions.plan import states_before
from llava_lab.models import Lab
from llava_lab.models.layout import connector_of
from llava_lab.replay.prefix import embedded, image_tokens
from llava_lab.results import Run
from tests.support.closeness import TERMS, close
from tests.support.gradients import noise_run
from tests.support.interrupts import interrupting
from tests.support.leftovers import state_of
from tests.support.planted import RED, planted_lab, red_picture, scripted_run

PATCHES = [(0, 1), (3, 2)]
PLACES = [1, 14]  # of them among the image tokens of a 4x4 grid


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    return noise_run(tiny_random, fit="crop")


def _score(lab: Lab, run: Run, logits: torch.Tensor, gone: int = 0) -> float:
    start, stop = run.segments["answer"]
    odds = torch.logit(logits[0].double().softmax(-1))
    return float(sum(odds[i - 1 - gone, run.token_ids[i]] for i in range(start, stop)))


def test_zero_at_the_connector_is_the_connector_with_zero_rows(tiny_random: Lab, run: Run) -> None:
    def zeroed(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        changed[:, PLACES] = 0
        return changed

    with undisturbed(tiny_random.model), hooked(connector_of(tiny_random.model), after=zeroed):
        expected = _score(tiny_random, run, tiny_random.model(**tiny_random.inputs(run)).logits)
    effect = ablate_tokens(tiny_random, run, PATCHES, fill="zero", draws=0)
    close(effect.after[0], expected, terms=TERMS)
    assert effect.proof["states"] == 2
    assert effect.proof["largest_change"] > 0


def test_dropping_is_removing_with_the_others_places_kept(tiny_random: Lab, run: Run) -> None:
    first = run.segments["image"][0]
    with undisturbed(tiny_random.model):
        sequence = embedded(tiny_random, run, image_tokens(tiny_random, run))
        keep = [i for i in range(sequence.shape[1]) if i - first not in PLACES]
        model: Any = tiny_random.model
        logits = model(inputs_embeds=sequence[:, keep], position_ids=torch.tensor([keep])).logits
    effect = ablate_tokens(tiny_random, run, PATCHES, fill="drop", draws=0)
    close(effect.after[0], _score(tiny_random, run, logits, gone=2), terms=TERMS)
    assert effect.proof["largest"] == 0
    deeper = ablate_tokens(tiny_random, run, PATCHES, fill="drop", at=2, draws=0)
    assert abs(deeper.change[0]) != abs(effect.change[0])


@pytest.mark.parametrize("at", ["projector", 1])
@pytest.mark.parametrize("fill", FILLS)
def test_only_the_chosen_tokens_change(tiny_random: Lab, run: Run, fill: str, at: Any) -> None:
    options: dict[str, Any] = {"other": np.zeros((30, 30, 3), np.uint8)} if fill == "other" else {}
    options |= {"pictures": [np.full((30, 30, 3), 90, np.uint8)]} if fill == "mean" else {}
    before = state_of(tiny_random)
    effect = ablate_tokens(tiny_random, run, PATCHES, fill=fill, at=at, draws=2, answer=False, **options)
    assert effect.change[0] != 0
    assert effect.control.shape == (2, 1)
    assert state_of(tiny_random) == before
    if fill == "drop":
        return
    layer = 1 if at == 1 else 0
    with undisturbed(tiny_random.model):
        plain = states_before(tiny_random, layer + 1, tiny_random.inputs(run))
        with ablated(tiny_random, run, PATCHES, fill=fill, at=at, **options):
            changed = states_before(tiny_random, layer + 1, tiny_random.inputs(run))
    first = run.segments["image"][0]
    assert torch.equal(plain[: first + 1], changed[: first + 1]), "what comes before the first patch cannot change"
    assert not torch.equal(plain[first + 1], changed[first + 1])


def test_shuffled_tokens_are_the_same_tokens_in_other_places() -> None:
    table = torch.arange(16.0)[:, None]
    values = shuffled(table, [1, 4, 9], 0)
    assert sorted(values[[1, 4, 9], 0].tolist()) == [1, 4, 9]
    assert all(values[i, 0] != i for i in (1, 4, 9))
    assert all(values[i, 0] == i for i in range(16) if i not in (1, 4, 9))
    assert shuffled(table, [3], 0)[3, 0] != 3


def test_the_planted_cause_beats_random_patches() -> None:
    lab = planted_lab()
    picture = red_picture(64, 64, (24, 24, 40, 40))
    run = scripted_run(lab, picture, "It is red.")
    cause = run.map.mask_to_patches((picture == np.array(RED)).all(-1)) > 0.5
    assert cause.sum() == 4
    effect = ablate_tokens(lab, run, cause, fill="zero", metric="red", draws=20, answer=False)
    assert effect.change[0] < effect.control[:, 0].min()
    assert effect.percentile[0] == 100
    beside = np.roll(cause, 4, 1)
    assert ablate_tokens(lab, run, beside, fill="zero", metric="red", draws=20, answer=False).percentile[0] < 100


@pytest.mark.parametrize(
    ("patches", "options", "message"),
    [
        ([], {}, "patches: expected at least one patch \\(row, col\\), got \\[\\]"),
        ([(4, 0)], {}, "rows 0 to 3 and columns 0 to 3, got \\(4, 0\\)"),
        (PATCHES, {"fill": "grey"}, "fill must be one of 'mean', 'zero'"),
        (PATCHES, {"at": 3}, "at must be 'projector' or a layer from 0 to 2, got 3"),
        (PATCHES, {"fill": "other"}, "expected other= \\(a picture\\)"),
        (PATCHES, {"pictures": []}, "at least one picture"),
    ],
)
def test_bad_input_is_said_in_one_line(tiny_random: Lab, run: Run, patches: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message) as error:
        ablate_tokens(tiny_random, run, patches, **options)
    assert "\n" not in str(error.value)


def test_ctrl_c_keeps_the_controls_that_are_done(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state_of(tiny_random)
    # kept, before, after, two controls
    monkeypatch.setattr(tiny_random.model, "forward", interrupting(tiny_random.model.forward, at=6))
    effect = ablate_tokens(tiny_random, run, PATCHES, fill="zero", draws=5)
    monkeypatch.undo()
    assert effect.interrupted
    assert len(effect.control) == 2
    assert "Interrupted after 2 of 5" in effect.notes[-1]
    assert state_of(tiny_random) == before
