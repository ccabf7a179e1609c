"""The logit lens: the naive way's numbers without its memory, one norm per state, nothing left behind, clear refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llava_lab.errors import CheckpointError, OptionError
from llava_lab.models import Lab, load
from llava_lab.models.layout import language_layers, language_model
from llava_lab.probes import activation_map, hallucination_check, lens, logit_lens, train_lens
from llava_lab.replay import words as vocabulary
from llava_lab.results import HallucinationCheck, LogitLens, Run, WordActivation
from tests.support.logit_cases import grouped_lab, speaking_lab, states_and_logits
from tests.support.planted import RED, red_picture, scripted_run

WORDS = ("red", "blue")


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "Yes, the car is blue.")


def naive(lab: Lab, run: Run) -> torch.Tensor:
    """Probabilities (states, patches, vocabulary) by transformers' own hidden states: the last is already normed."""
    states, _ = states_and_logits(lab, run)
    image = slice(*run.segments["image"])
    norm, head = language_model(lab.model).norm, lab.model.lm_head
    with torch.no_grad():
        normed = [norm(state[image]) for state in states[:-1]] + [states[-1][image]]
        return torch.stack([head(state.float().to(head.weight.dtype)).float().softmax(-1) for state in normed])


def hooks(lab: Lab) -> int:
    return sum(
        len(part)
        for module in lab.model.modules()
        for part in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    )


def check_against_naive(lab: Lab, run: Run, near: float) -> None:
    found, truth = logit_lens(lab, run, top=4, words=WORDS), naive(lab, run)
    values, _ = truth.topk(4)
    np.testing.assert_allclose(found.top_probs, values, rtol=near, atol=near / 10)
    said = truth.gather(2, torch.from_numpy(found.top_ids).long())
    np.testing.assert_allclose(said, values, rtol=near, atol=near / 10)
    np.testing.assert_allclose(found.entropy, torch.special.entr(truth).sum(-1), rtol=near, atol=near)
    own = truth[:, :, list(found.word_ids)]
    np.testing.assert_allclose(found.probs, own, rtol=near, atol=near / 10)
    if near < 1e-3:
        np.testing.assert_array_equal(found.ranks, 1 + (truth[:, :, None] > own[..., None]).sum(-1))
    assert found.top_ids.shape == (len(language_layers(lab.model)) + 1, run.map.rows * run.map.cols, 4)


@pytest.mark.parametrize("columns", [7, 100, 100_000])
def test_lens_is_the_naive_lens_however_the_vocabulary_is_cut(
    tiny_random: Lab, run: Run, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "COLUMNS", columns)
    check_against_naive(tiny_random, run, 1e-4)


def test_a_head_with_a_bias_and_grouped_heads_are_read_too(picture: np.ndarray) -> None:
    lab = grouped_lab()
    check_against_naive(lab, scripted_run(lab, picture, "It is red."), 1e-4)


def test_last_state_gives_the_model_s_own_logits_and_a_second_norm_would_not(tiny_random: Lab, run: Run) -> None:
    states, logits = states_and_logits(tiny_random, run)
    image = slice(*run.segments["image"])
    found = logit_lens(tiny_random, run, layers=len(states) - 1, top=3)
    np.testing.assert_allclose(found.top_probs[0], logits[image].softmax(-1).topk(3).values, rtol=1e-4)
    with torch.no_grad():
        twice = tiny_random.model.lm_head(language_model(tiny_random.model).norm(states[-1][image])).softmax(-1)
    assert np.abs(found.top_probs[0] - twice.topk(3).values.numpy()).max() > 1e-3


def test_bfloat16_agrees_with_its_own_naive_lens(tiny_folder: Path, picture: np.ndarray) -> None:
    lab = load(str(tiny_folder), dtype="bfloat16")
    check_against_naive(lab, scripted_run(lab, picture, "It is red."), 5e-2)  # naive logits carry 8 bits


def test_576_patches_and_a_large_vocabulary(llava15_folder: Path, picture: np.ndarray) -> None:
    lab = load(str(llava15_folder))
    run = scripted_run(lab, picture, "red")
    found, truth = logit_lens(lab, run, top=2, words="red", layers=1), naive(lab, run)[1]
    assert found.top_ids.shape == (1, 576, 2)
    assert found.vocabulary == 32064
    np.testing.assert_allclose(found.top_probs[0], truth.topk(2).values, rtol=1e-3)
    np.testing.assert_allclose(found.entropy[0], torch.special.entr(truth).sum(-1), rtol=1e-4)
    assert len(found.pieces) == len(found.piece_ids)


def test_no_table_of_all_words_is_ever_made(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "COLUMNS", 8)
    widest: list[int] = []
    real = torch.Tensor.exp
    monkeypatch.setattr(torch.Tensor, "exp", lambda tensor: widest.append(tensor.shape[-1]) or real(tensor))
    logit_lens(tiny_random, run, top=2)
    assert max(widest) == 8


def test_entropy_of_equal_words_is_the_logarithm_of_their_number(tiny_random: Lab) -> None:
    zeros = torch.zeros(3, 64)
    found = vocabulary.read_words(tiny_random, zeros, top=1, ids=(5,))
    words = len(tiny_random.model.lm_head.weight)
    np.testing.assert_allclose(found.entropy, np.log(words), rtol=1e-6)
    np.testing.assert_allclose(found.probs, 1 / words, rtol=1e-5)
    np.testing.assert_array_equal(found.ranks, 1)


def test_huge_logits_stay_finite(tiny_random: Lab) -> None:
    found = vocabulary.read_words(
        tiny_random, 1e4 * torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), top=2, ids=()
    )
    np.testing.assert_allclose(found.top_probs[:, 0], 1, atol=1e-4)
    np.testing.assert_allclose(found.entropy, 0, atol=1e-3)
    assert found.ranks.shape == (3, 0)


def test_a_red_patch_that_speaks_says_red_and_the_others_do_not() -> None:
    lab = speaking_lab()
    run = scripted_run(lab, red_picture(96, 96, (12, 60, 36, 84)), "red")
    share = run.map.mask_to_patches((run.picture == RED).all(-1))
    found = activation_map(lab, run, "red")
    assert found.values.shape == (1, 3, 8, 8)
    assert share[found.peak("red")[1:]] > 0.99
    assert found.values[0, -1][share > 0.99].min() > 2 * found.values[0, -1][share == 0].max()
    seen = logit_lens(lab, run, words="red")
    assert set(seen.rank_of("red")[-1][share > 0.99]) == {1}
    row, col = np.argwhere(share > 0.99)[0]
    assert seen.at(2, int(row), int(col))[0][0].strip() == "red"
    np.testing.assert_allclose(found.values[0].reshape(3, -1), seen.probs[:, :, 0])
    check = hallucination_check(lab, [run], [["red"]], [["blue", "green"]], progress=False)
    assert check.auc == 1.0
    assert check.confidence[0] == pytest.approx(float(found.confidence[0]))


def test_a_word_of_several_tokens_is_read_as_its_first_and_said(tiny_random: Lab, run: Run) -> None:
    found = logit_lens(tiny_random, run, words=["xylophone", "blue"])
    assert any("'xylophone' is " in note and "read as its first" in note for note in found.notes)
    assert not any("'blue'" in note for note in found.notes)
    assert found.probs.shape[2] == 2


def test_tuned_lens_comes_nearer_to_the_end_and_leaves_the_last_state(tiny_random: Lab, run: Run) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (32, 32, 3), dtype=np.uint8) for _ in range(6)]
    before = {name: one.clone() for name, one in tiny_random.model.state_dict().items()}
    tuned = train_lens(tiny_random, pictures, steps=60, rate=3e-3, progress=False)
    assert (tuned.after < 0.7 * tuned.before).all()
    assert all(torch.equal(one, before[name]) for name, one in tiny_random.model.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny_random.model.parameters())
    plain, other = logit_lens(tiny_random, run), logit_lens(tiny_random, run, tuned=tuned)
    np.testing.assert_array_equal(plain.top_probs[-1], other.top_probs[-1])
    assert np.abs(plain.top_probs[0] - other.top_probs[0]).max() > 1e-3
    zero = replace(tuned, weights=0 * tuned.weights, biases=0 * tuned.biases)
    np.testing.assert_array_equal(logit_lens(tiny_random, run, tuned=zero).top_probs, plain.top_probs)
    with pytest.raises(CheckpointError, match="trained for .* with other weights"):
        logit_lens(tiny_random, run, tuned=replace(tuned, fingerprint="other"))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_behind_even_when_stopped(
    tiny_random: Lab, run: Run, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, logits = states_and_logits(tiny_random, run)
    hung = hooks(tiny_random)

    def stop(*args: Any, **options: Any) -> None:
        raise error

    logit_lens(tiny_random, run)
    with monkeypatch.context() as patch:
        patch.setattr(lens, "read_words", stop)
        with pytest.raises(error):
            logit_lens(tiny_random, run)
    assert hooks(tiny_random) == hung
    assert torch.equal(states_and_logits(tiny_random, run)[1], logits)


def test_a_stopped_check_keeps_the_pictures_done(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real: Callable[..., WordActivation] = lens.activation_map

    def second_stops(*args: Any, **options: Any) -> WordActivation:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(lens, "activation_map", second_stops)
    found = hallucination_check(tiny_random, [run, run], [["red"]] * 2, [["blue"]] * 2, progress=False)
    assert found.interrupted
    assert found.words == ("red", "blue")


def test_results_survive_the_disk(tiny_random: Lab, run: Run, tmp_path: Path) -> None:
    found = logit_lens(tiny_random, run, words=WORDS)
    again = LogitLens.load(found.save(tmp_path / "lens.npz"))
    assert (again.states, again.words, again.pieces, again.map, again.notes) == (
        found.states, found.words, found.pieces, found.map, found.notes,
    )  # fmt: skip
    np.testing.assert_array_equal(again.top_ids, found.top_ids)
    assert again.at(2, 1, 1) == found.at(2, 1, 1)
    light = activation_map(tiny_random, run, "red")
    np.testing.assert_array_equal(WordActivation.load(light.save(tmp_path / "a.npz")).values, light.values)
    check = hallucination_check(tiny_random, [run], [["red"]], [["blue"]], progress=False)
    assert HallucinationCheck.load(check.save(tmp_path / "h.npz")).auc == check.auc


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 4}, "layers must be a state from 0 .* to 3 .*, got 4"),
        ({"layers": (2, 2)}, r"layers must be \(start, stop\) with 0 <= start < stop <= 4"),
        ({"top": 0}, "top must be a whole number of at least 1, got 0"),
        ({"top": 10**6}, "top must be at most the vocabulary's"),
        ({"words": [" "]}, "expected words to look for, got ' '"),
    ],
)
def test_bad_input_is_refused_in_one_line(tiny_random: Lab, run: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message) as error:
        logit_lens(tiny_random, run, **options)
    assert "\n" not in str(error.value)


def test_a_run_of_other_weights_and_lists_that_do_not_match_are_refused(tiny_random: Lab, run: Run) -> None:
    with pytest.raises(CheckpointError, match="ask again with this lab"):
        logit_lens(tiny_random, replace(run, fingerprint="other"))
    with pytest.raises(OptionError, match="expected words for 1 runs, got 2 lists of present and 1 of absent"):
        hallucination_check(tiny_random, [run], [["red"], ["blue"]], [["red"]])
    with pytest.raises(OptionError, match="at least one present and one absent word"):
        hallucination_check(tiny_random, [run], [["red"]], [[]])
    with pytest.raises(OptionError, match="at least one word to look for"):
        activation_map(tiny_random, run, [])
    found = logit_lens(tiny_random, run, layers=(1, 3), words="red")
    with pytest.raises(OptionError, match="this lens read states 1 to 2, got 0"):
        found.at(0, 0, 0)
    with pytest.raises(OptionError, match="patches lie in a 4x4 grid"):
        found.at(1, 4, 0)
    with pytest.raises(OptionError, match="asked for: red; got 'blue'"):
        found.rank_of("blue")
