"""Nearest words: the naive cosine, words written into the connector are found, the control tells reading from chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llava_lab.errors import CheckpointError, OptionError
from llava_lab.models import Lab, load
from llava_lab.models.layout import connector_of
from llava_lab.probes import nearest, nearest_words
from llava_lab.replay.words import word_tokens
from llava_lab.results import NearestWords, Run
from tests.support.closeness import TERMS, close
from tests.support.leftovers import state_of
from tests.support.logit_cases import states_and_logits
from tests.support.planted import scripted_run


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "Yes, the car is blue.")


def table(lab: Lab, run: Run, space: str, *, centered: bool) -> tuple[np.ndarray, np.ndarray]:
    """All cosines (patches, words) the obvious way, and which words count."""
    tokens = states_and_logits(lab, run)[0][0][slice(*run.segments["image"])].float()
    rows = (lab.model.get_input_embeddings() if space == "input" else lab.model.lm_head).weight.detach().float()
    words = np.array([i for i in range(len(lab.tokenizer)) if i not in lab.tokenizer.all_special_ids])
    rows = rows[words]
    if centered:
        tokens, rows = tokens - tokens.mean(0), rows - rows.mean(0)
    return torch.cosine_similarity(tokens[:, None], rows[None], dim=-1).numpy(), words


@pytest.mark.parametrize("space", nearest.SPACES)
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("columns", [9, 10_000])
def test_nearest_words_are_the_naive_ones(
    tiny_random: Lab, run: Run, space: str, centered: bool, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest, "COLUMNS", columns)
    found = nearest_words(tiny_random, run, space=space, centered=centered, top=3, draws=2)
    cosines, words = table(tiny_random, run, space, centered=centered)
    order = np.argsort(-cosines, axis=1)[:, :3]
    close(found.cosines, np.take_along_axis(cosines, order, 1), terms=TERMS)
    np.testing.assert_array_equal(found.top_ids[:, 0], words[order[:, 0]])
    assert found.readable_share == found.readable.mean()
    assert (np.diff(found.cosines, axis=1) <= 0).all()


def test_a_word_written_into_the_connector_is_found_and_counts_as_readable(tiny_folder: Path, picture: np.ndarray) -> None:
    lab = load(str(tiny_folder))
    (_, (blue,), notes) = word_tokens(lab, "blue")
    assert not notes
    connector: Any = connector_of(lab.model)
    with torch.no_grad():
        connector.linear_2.weight.zero_()
        connector.linear_2.bias.copy_(lab.model.get_input_embeddings().weight[blue])
    run = scripted_run(lab, picture, "red")
    found = nearest_words(lab, run, centered=False)
    assert set(found.top_ids[:, 0]) == {blue}
    np.testing.assert_allclose(found.cosines[:, 0], 1, atol=1e-5)
    assert found.at(0, 0)[0][0].strip() == "blue"
    assert found.readable_share == 1
    assert found.random_cosines.mean() < 0.8
    assert found.random_shares.mean() < 1
    flat = nearest_words(lab, run, centered=True)  # every token is the mean: it points nowhere
    np.testing.assert_allclose(flat.cosines, 0, atol=1e-5)


def test_a_common_direction_dominates_raw_cosine_and_not_the_centred_one(tiny_folder: Path, picture: np.ndarray) -> None:
    lab = load(str(tiny_folder))
    with torch.no_grad():
        lab.model.get_input_embeddings().weight[:, 0] += 50
        connector: Any = connector_of(lab.model)
        connector.linear_2.bias[0] += 50
    run = scripted_run(lab, picture, "red")
    raw, centred = (nearest_words(lab, run, centered=centered, draws=1) for centered in (False, True))
    assert raw.common_direction > 0.9
    assert raw.cosines.min() > 0.9
    assert centred.cosines.max() < 0.9


def test_special_tokens_and_unused_rows_are_never_near(llava15_folder: Path, picture: np.ndarray) -> None:
    lab = load(str(llava15_folder), dtype="bfloat16")
    found = nearest_words(lab, scripted_run(lab, picture, "red"), draws=1, top=2)
    assert found.top_ids.shape == (576, 2)
    assert not np.isin(found.top_ids, [*lab.tokenizer.all_special_ids, lab.image_id]).any()
    assert found.top_ids.max() < len(lab.tokenizer)


def test_a_whole_word_begins_a_word_and_has_letters() -> None:
    assert nearest._whole_word(" red", "Ġred")
    assert nearest._whole_word("red", "▁red")
    assert not nearest._whole_word("ing", "ing")
    assert not nearest._whole_word(" a", "Ġa")
    assert not nearest._whole_word(" 123", "Ġ123")


def test_same_seed_same_control_and_the_disk_keeps_it(tiny_random: Lab, run: Run, tmp_path: Path) -> None:
    found, same = (nearest_words(tiny_random, run, seed=4, draws=3) for _ in range(2))
    np.testing.assert_array_equal(found.random_cosines, same.random_cosines)
    assert len(set(found.random_cosines.tolist())) == 3
    again = NearestWords.load(found.save(tmp_path / "near.npz"))
    assert again.at(1, 2) == found.at(1, 2)
    assert again.map == found.map


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_behind(tiny_random: Lab, run: Run, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    logits = states_and_logits(tiny_random, run)[1]  # transformers keeps hooks of its own once hidden states were asked for
    before = state_of(tiny_random)

    def stop(*args: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(type(tiny_random.model.lm_head), "forward", stop)
        with pytest.raises(error):
            nearest_words(tiny_random, run)
    assert state_of(tiny_random) == before
    assert torch.equal(states_and_logits(tiny_random, run)[1], logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": "middle"}, "space must be one of 'input', 'output', got 'middle'"),
        ({"top": 10**6}, "top must be at most the"),
        ({"draws": 0}, "draws must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_input_is_refused(tiny_random: Lab, run: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        nearest_words(tiny_random, run, **options)


def test_another_model_s_run_is_refused(tiny_random: Lab, llava15_folder: Path, run: Run) -> None:
    with pytest.raises(CheckpointError, match="ask again with this lab"):
        nearest_words(load(str(llava15_folder)), run)
