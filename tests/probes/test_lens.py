"""Lenses: the naive way's numbers without its memory, one norm per state, nothing left behind; how often tokens name things."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llava_lab.cli import main as cli
from llava_lab.errors import CheckpointError, DataError, OptionError
from llava_lab.models import Lab, load
from llava_lab.models.layout import language_layers, language_model
from llava_lab.probes import activation_map, hallucination_check, lens, logit_lens, naming_share, patch_labels, train_lens
from llava_lab.replay import words as vocabulary
from llava_lab.replay.words import word_tokens
from llava_lab.results import HallucinationCheck, LogitLens, NamingShare, Run, WordActivation
from llava_lab.worlds.picturebook import scene
from llava_lab.worlds.scenes import COLOR_NAMES, KIND_NAMES
from tests.support.interrupts import interrupting
from tests.support.leftovers import state_of
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
        # words as likely as this one but for rounding may stand on either side of it
        above, below = (1 + (truth[:, :, None] > share * own[..., None]).sum(-1) for share in (1 + near, 1 - near))
        assert ((above.numpy() <= found.ranks) & (found.ranks <= below.numpy())).all()
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


def test_without_ranks_everything_else_is_the_same(tiny_random: Lab) -> None:
    states = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))[:, : vocabulary.output_head(tiny_random).in_features]
    full, quick = (vocabulary.read_words(tiny_random, states, top=3, ids=(5, 9), ranked=ranked) for ranked in (True, False))
    for name in ("top_ids", "top_probs", "entropy", "probs"):
        assert np.array_equal(getattr(full, name), getattr(quick, name))
    assert full.ranks.max() > 1
    assert (quick.ranks == 1).all()


@pytest.mark.long
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


def test_a_word_of_several_tokens_is_read_as_its_first_with_a_letter_and_said(tiny_random: Lab, run: Run) -> None:
    """Not as the space before it, which a tokenizer that has not learned the word spells as a token of its own."""
    found = logit_lens(tiny_random, run, words=["xylophone", "blue"])
    (note,) = (note for note in found.notes if "'xylophone' is " in note)
    assert "(' ', 'x'" in note
    assert "it is read as 'x', its first with a letter. What is said of it holds for that part alone" in note
    assert tiny_random.tokenizer.decode([found.word_ids[0]]) == "x"
    assert not any("'blue'" in note for note in found.notes)
    assert found.probs.shape[2] == 2
    said = [row[0] for row in found.table().below[0].rows]
    assert said == ["'x' alone, a part of 'xylophone'", "'blue'"]
    assert [word["read_as"].strip() for word in found.to_dict()["words"]] == ["x", "blue"]


@pytest.mark.long
def test_tuned_lens_comes_nearer_to_the_end_and_leaves_the_last_state(tiny_random: Lab, run: Run) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (32, 32, 3), dtype=np.uint8) for _ in range(6)]
    before = {name: one.clone() for name, one in tiny_random.model.state_dict().items()}
    tuned = train_lens(tiny_random, pictures, steps=60, rate=3e-3, progress=False)
    assert (tuned.after < 0.7 * tuned.before).all()
    assert all(torch.equal(one, before[name]) for name, one in tiny_random.model.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny_random.model.parameters())
    plain, other = logit_lens(tiny_random, run), logit_lens(tiny_random, run, fitted=tuned)
    np.testing.assert_array_equal(plain.top_probs[-1], other.top_probs[-1])
    assert np.abs(plain.top_probs[0] - other.top_probs[0]).max() > 1e-3
    zero = replace(tuned, weights=0 * tuned.weights, biases=0 * tuned.biases)
    np.testing.assert_array_equal(logit_lens(tiny_random, run, fitted=zero).top_probs, plain.top_probs)
    with pytest.raises(CheckpointError, match="tuned lens was made for .* with other weights"):
        logit_lens(tiny_random, run, fitted=replace(tuned, fingerprint="other"))


def test_the_divergence_a_lens_is_trained_from_is_the_naive_lens_s(tiny_random: Lab, run: Run) -> None:
    """One norm per state here too, for what is read and for what it should come to."""
    read = naive(tiny_random, run)
    tuned = train_lens(tiny_random, [run.picture], steps=1, per_picture=read.shape[1], progress=False)
    np.testing.assert_allclose(tuned.before, (read[-1] * (read[-1] / read[:-1]).log()).sum(-1).mean(-1), rtol=1e-3)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_behind_even_when_stopped(
    tiny_random: Lab, run: Run, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, logits = states_and_logits(tiny_random, run)
    before = state_of(tiny_random)

    def stop(*args: Any, **options: Any) -> None:
        raise error

    logit_lens(tiny_random, run)
    with monkeypatch.context() as patch:
        patch.setattr(lens, "read_words", stop)
        with pytest.raises(error):
            logit_lens(tiny_random, run)
    assert state_of(tiny_random) == before
    assert torch.equal(states_and_logits(tiny_random, run)[1], logits)


def test_a_stopped_check_keeps_the_pictures_done(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lens, "activation_map", interrupting(lens.activation_map, at=2))
    found = hallucination_check(tiny_random, [run, run], [["red"]] * 2, [["blue"]] * 2, progress=False)
    assert found.interrupted
    assert found.words == ("red", "blue")


def test_the_interval_of_a_check_resamples_pictures_and_not_words() -> None:
    rng = np.random.default_rng(0)
    where, there = np.repeat(np.arange(20), 2).astype(np.int32), np.tile([True, False], 20)
    sure = (rng.random(40) + 0.3 * there).astype(np.float32)
    once = lens._separation(where, there, sure, 0)
    often = lens._separation(np.repeat(where, 4), np.repeat(there, 4), np.repeat(sure, 4), 0)
    assert often == pytest.approx(once)
    assert once[1] < once[0] < once[2]


def test_results_survive_the_disk(tiny_random: Lab, run: Run, tmp_path: Path) -> None:
    found = logit_lens(tiny_random, run, words=WORDS)
    again = LogitLens.load(found.save(tmp_path / "lens.npz"))
    assert (again.states, again.words, again.pieces, again.map, again.notes) == (
        found.states, found.words, found.pieces, found.map, found.notes,
    )  # fmt: skip
    np.testing.assert_array_equal(again.top_ids, found.top_ids)
    assert again.at(2, 1, 1) == found.at(2, 1, 1)
    assert LogitLens.upgraded({"tuned": True}) == {"lens": "tuned"}  # before there were three
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


N = 3


@pytest.fixture(scope="module")
def tiny() -> Lab:
    return load("tiny")


def token(lab: Lab, word: str) -> int:
    return word_tokens(lab, word)[1][0]


def plant_names(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """State 0 says nothing; state 1 says the kind of the thing at its patches; state 2 its colour everywhere it is."""
    scenes = iter([scene("test", i) for i in range(N)])
    nothing = lab.tokenizer.encode(",", add_special_tokens=False)[0]
    real = lens._read

    def planted(lab: Lab, run: Any, layers: Any, top: int, *given: Any, **options: Any) -> Any:
        shown = next(scenes)
        states, found = real(lab, run, (0, 3), top, *given, **options)
        said = np.full((3, *found[0].top_ids.shape), nothing)
        for state, what, names in ((1, "kind", KIND_NAMES), (2, "color", COLOR_NAMES)):
            for patch, number in enumerate(patch_labels(lab, [shown], what)[0].ravel()):
                if number >= 0:
                    said[state, patch, -1] = token(lab, names[number])
        return states, [replace(read, top_ids=ids) for read, ids in zip(found, said, strict=True)]

    monkeypatch.setattr(lens, "_read", planted)


def test_a_lens_that_names_everything_scores_one_and_its_background_nothing(tiny: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_names(tiny, monkeypatch)
    found = naming_share(tiny, n=N, top=2, progress=False)
    assert found.of("object", "kind").tolist() == [0, 1, 0]
    assert found.of("object", "color").tolist() == [0, 0, 1]
    assert found.of("object").tolist() == [0, 1, 1]
    assert found.of("background").tolist() == [0, 0, 0]
    assert 0 <= found.of("shuffled", "kind")[1] < 1


def test_the_shuffled_control_tries_the_next_picture_s_things(tiny: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_names(tiny, monkeypatch)
    expected, patches = 0.0, 0
    for i in range(N):
        mine = patch_labels(tiny, [scene("test", i)], "kind")[0].ravel()
        others = [thing.kind for thing in scene("test", (i + 1) % N).things]
        expected += sum(others.count(KIND_NAMES[k]) / len(others) for k in mine[mine >= 0])
        patches += int((mine >= 0).sum())
    drawn = naming_share(tiny, n=N, top=2, progress=False).of("shuffled", "kind")[1]
    assert abs(drawn - expected / patches) < 4 * np.sqrt(0.25 / patches)  # a random thing of that picture each time


def test_on_the_shipped_model_a_naive_loop_gives_the_same_share(tiny: Lab) -> None:
    found = naming_share(tiny, n=2, progress=False)
    hit = count = 0
    for i in range(2):
        shown = scene("test", i)
        said = logit_lens(tiny, tiny.ask(shown.picture(), lens.ASKED, max_new_tokens=1))
        table = patch_labels(tiny, [shown], "color")[0]
        for (row, col), number in np.ndenumerate(table):
            if number >= 0:
                count += 1
                hit += any(text.strip().lower() == COLOR_NAMES[number] for text, _ in said.at(said.states[-1], row, col))
    assert found.patches[0] == count
    assert found.of("object", "color")[-1] == pytest.approx(hit / count)


def test_intervals_hold_the_share_and_the_file_gives_it_back(tiny: Lab, tmp_path: Path) -> None:
    found = naming_share(tiny, n=N, progress=False)
    assert (found.interval[..., 0] <= found.share + 1e-6).all()
    assert (found.share <= found.interval[..., 1] + 1e-6).all()
    back = NamingShare.load(found.save(tmp_path / "n.npz"))
    assert np.array_equal(back.share, found.share)
    assert back.table() == found.table()
    assert len(str(found.table()).splitlines()) == len(found.states) + 2  # title and headings


def test_bad_counts_and_splits_are_refused(tiny: Lab) -> None:
    with pytest.raises(OptionError, match="n must be a whole number of at least 2, got 1"):
        naming_share(tiny, n=1)
    with pytest.raises(OptionError, match="top must be"):
        naming_share(tiny, n=2, top=0)
    with pytest.raises(DataError, match="split must be one of"):
        naming_share(tiny, n=2, split="moon")


def test_naming_on_photographs_counts_the_patches_of_their_outlines(
    tiny: Lab, outlined: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dog, real = token(tiny, "fish"), lens._read
    monkeypatch.setattr(lens, "accepted", lambda name: ("fish",) if name == "dog" else ("star",))  # words that tiny has

    def all_dogs(*given: Any, **options: Any) -> Any:
        states, found = real(*given, **options)
        return states, [replace(read, top_ids=read.top_ids * 0 + dog) for read in found]

    monkeypatch.setattr(lens, "_read", all_dogs)
    told = naming_share(tiny, pictures=outlined, progress=False)
    # the dog has the left half of its picture, the fruit three fifths of the other; both are twice as wide as high
    rows, columns = tiny.grid
    half, most = 0.5 * rows * 0.5 * columns, 0.5 * rows * 0.6 * columns
    assert told.pictures == 2
    assert told.patches[0] == pytest.approx(half + most, rel=0.15)
    assert told.of("object", "kind") == pytest.approx(half / (half + most), abs=0.08)
    assert (told.of("object", "color") == 0).all()
    assert told.of("shuffled", "kind") == pytest.approx(1 - told.of("object", "kind"))  # the other picture's name
    with pytest.raises(DataError, match=r"classes\.txt"):
        naming_share(tiny, pictures=outlined / "nowhere")


def test_the_command_prints_what_the_function_finds(tiny: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["naming", "--n", "2", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    found = naming_share(tiny, n=2, progress=False)
    assert [one["share"] for one in data["shares"]["object"]["either"]] == pytest.approx(found.of("object").tolist())
    assert data["patches"]["object"] == found.patches[0]


def test_the_choice_adds_the_spellings_of_a_name_and_is_none_without_two_names() -> None:
    names = {"kind": [np.array([3, 5]), np.array([7])], "color": [np.array([9])]}
    probs = np.array([[[0.2, 0.2, 0.3, 0.1], [0.0, 0.1, 0.3, 0.1]]])  # one state, two patches, tokens 3, 5, 7 and 9
    told = lens._chosen(probs, [3, 5, 7, 9], names, np.array([[0, 0], [0, 0]]))
    np.testing.assert_allclose(told[0, 0], [[0.4 / 0.7, 1], [0.75, 0]])
    assert np.isnan(told[1]).all()
    share, error = lens._choices([told, told[:, :, :0]])
    np.testing.assert_allclose(share[0, 0], [0.5])
    assert np.isnan(share[1]).all()
    np.testing.assert_allclose(error[0], [(1 - 0.4 / 0.7 + 0.75) / 2], atol=1e-4)
    assert np.isnan(error[1]).all()


def test_many_split_names_are_told_in_one_note(tiny: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = lens.word_tokens
    monkeypatch.setattr(lens, "word_tokens", lambda lab, word: (*whole(lab, word)[:2], (f"{word!r} is two tokens",)))
    told = [note for note in naming_share(tiny, n=2, progress=False).notes if "token" in note]
    assert sum("names of several tokens" in note for note in told) == 2  # of kinds, and of colours
    assert "12 names" in told[0]
    assert "star" in told[0]
    assert not any("is two tokens" in note for note in told)
