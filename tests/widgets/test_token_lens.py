"""TokenLens as Python sees it: one buffer that gives every number back, refusals, and what stays when no script runs."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import traitlets
from PIL import Image

from llava_lab.errors import OptionError
from tests.support.lens_examples import CAR, ONCE, SPOT, STATES, VOCABULARY, big, example, lens_of, three
from tests.support.widget_examples import make_run
from widgets import TokenLens
from widgets.token_lens import COSINE_STEPS, STEPS


def part(widget: TokenLens, name: str) -> np.ndarray:
    """One table as the page reads it."""
    kind, start, count = widget.spec["parts"][name]
    assert start % np.dtype(kind).itemsize == 0
    return np.frombuffer(widget.maps, f"<{kind}", count, start)


def test_ids_and_ranks_come_back_exactly() -> None:
    run, lens, near = example()
    widget = TokenLens(run, lens, near)
    known = dict(zip(lens.piece_ids.tolist(), lens.pieces, strict=True))
    pieces = widget.spec["pieces"]
    assert [pieces[i] for i in part(widget, "ids")] == [known[i] for i in lens.top_ids.ravel().tolist()]
    assert [pieces[i] for i in part(widget, "near_ids")][3 * SPOT] == " wheel"
    np.testing.assert_array_equal(part(widget, "word_ranks"), lens.ranks.ravel())


def test_probabilities_come_back_to_the_step_and_one_in_a_million_keeps_two_figures() -> None:
    run, lens, near = example()
    widget = TokenLens(run, lens, near)
    for name, values in (("probs", lens.top_probs), ("word_probs", lens.probs)):
        given, got = values.ravel().astype(np.float64), (part(widget, name) / STEPS) ** 2
        assert (np.abs(got - given) <= 0.51 * (2 * np.sqrt(given) / STEPS + 1 / STEPS**2)).all()
    small = (part(widget, "word_probs") / STEPS) ** 2
    np.testing.assert_allclose(small[1::2], 1e-6, rtol=0.02)


def test_entropies_cosines_and_norms_come_back_to_their_steps() -> None:
    run, lens, near = example()
    widget = TokenLens(run, lens, near)
    step = np.log(VOCABULARY) / STEPS
    np.testing.assert_allclose(part(widget, "entropy") * step, lens.entropy.ravel(), atol=0.51 * step)
    np.testing.assert_allclose(part(widget, "cosines") / COSINE_STEPS, near.cosines.ravel(), atol=0.51 / COSINE_STEPS)
    np.testing.assert_array_equal(part(widget, "norms"), near.norms)


def test_more_words_than_two_bytes_can_count_take_four() -> None:
    run = make_run()
    ids = np.full((1, 144, 1), 70_000)
    lens = lens_of(run, ids, np.full((1, 144, 1), 0.5), vocabulary=128_000)
    lens = replace(lens, words=("x",), word_ids=(1,), ranks=np.full((1, 144, 1), 70_001, np.int32), probs=np.zeros((1, 144, 1)))
    widget = TokenLens(run, lens)
    assert widget.spec["parts"]["word_ranks"][0] == "u4"
    assert (part(widget, "word_ranks") == 70_001).all()


def test_7b_is_under_a_megabyte_with_its_texts() -> None:
    widget = TokenLens(*big())
    assert len(widget.maps) < 430_000
    assert len(widget.maps) + len(" ".join(widget.spec["pieces"])) < 1_000_000


def test_the_first_state_is_where_the_word_is_likeliest_else_the_last() -> None:
    run, lens, near = example()
    assert TokenLens(run, lens).state == STATES - 1
    assert TokenLens(run, lens, word="zebra").state == STATES - 1
    assert TokenLens(run, lens, word="red").state == ONCE[0]
    widget = TokenLens(run, lens, near, word=" car ", state=2, patch=(8, 5))
    assert (widget.word, widget.state, widget.selected, widget.patches) == ("car", 2, [SPOT], [(8, 5)])


def test_values_are_the_map_that_is_shown() -> None:
    run, lens, _ = example()
    widget = TokenLens(run, lens, state=1)
    np.testing.assert_array_equal(widget.values.ravel(), lens.entropy[1])
    widget.word = "car"
    assert widget.values[8, 5] == pytest.approx(CAR[1])


def test_states_are_called_by_their_own_numbers() -> None:
    run, lens, _ = example()
    few = replace(lens, states=(3, 4, 5, 6, 7))
    widget = TokenLens(run, few, word="red")
    assert widget.state == 6
    with pytest.raises(traitlets.TraitError, match="state must be one of 3 to 7, which this lens read, got 2"):
        widget.state = 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"state": 9}, traitlets.TraitError, "state must be one of 0 to 4, which this lens read, got 9"),
        ({"word": "two\nlines"}, traitlets.TraitError, "word must be one line of at most 80 signs"),
        ({"word": "x" * 81}, traitlets.TraitError, "word must be one line of at most 80 signs"),
        ({"patch": (12, 0)}, ValueError, r"patch must lie in the 12x12 grid, rows and columns from 0, got \(12, 0\)"),
        ({"patch": 7}, ValueError, r"patch must be a pair \(row, column\), got 7"),
        ({"opacity": 2}, ValueError, r"opacity must lie in 0\.\.1, got 2"),
        ({"wrod": "car"}, OptionError, r"no option 'wrod'; did you mean 'word'\?"),
    ],
)
def test_wrong_options_say_what_is_right(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TokenLens(*example(), **options)


def test_one_patch_can_be_locked_and_it_must_exist() -> None:
    widget = TokenLens(*example())
    with pytest.raises(traitlets.TraitError, match="one patch can be locked at a time, got 2"):
        widget.selected = [1, 2]
    with pytest.raises(traitlets.TraitError, match=r"selected patches must lie in 0\.\.143, got 144"):
        widget.selected = [144]
    widget.selected = [5]
    assert widget.patches == [(0, 5)]


def test_what_is_of_another_run_or_of_another_kind_is_refused() -> None:
    run, lens, near = example()
    moved = replace(lens.map, offset_x=3.0)
    wrong: dict[str, tuple[Any, Any]] = {
        "lens was read from another checkpoint": (replace(lens, fingerprint="other"), near),
        "near was read from another checkpoint": (lens, replace(near, fingerprint="other")),
        "lens was read through another picture geometry": (replace(lens, map=moved), near),
        "near was read through another picture geometry": (lens, replace(near, map=moved)),
        "values that are not finite": (replace(lens, entropy=np.full_like(lens.entropy, np.nan)), near),
        "lens must be a result of ll.logit_lens or a list, each a result of ll.logit_lens, got NearestWords": (near, lens),
        "near must be a result of ll.nearest_words or None, got LogitLens": (lens, lens),
        "lens must be a result of ll.logit_lens or a list, each a result of ll.logit_lens, got {}": ({}, None),
    }
    for message, given in wrong.items():
        with pytest.raises(OptionError, match=message):
            TokenLens(run, *given)


def test_the_still_follows_word_state_and_patch() -> None:
    run, lens, near = example()
    drawn = [
        TokenLens(run, lens, near, **options).draw_png()
        for options in ({}, {"word": "car"}, {"word": "zebra"}, {"word": "car", "patch": (0, 0)})
    ]
    assert len(set(drawn)) == 4
    assert TokenLens(run, lens, word="car").draw_png() != drawn[1]  # no nearest words to name


def test_the_still_of_many_states_shows_the_one_chosen() -> None:
    assert Image.open(io.BytesIO(TokenLens(*big(), state=19).draw_png())).size[0] == 960


def test_a_word_asked_for_is_known_everywhere_and_any_other_among_the_top_words_only() -> None:
    _, lens, _ = example()
    np.testing.assert_allclose(lens.probability_of(" car ")[:, SPOT], CAR, rtol=1e-6)
    assert lens.probability_of("car").min() > 0
    sky = lens.probability_of("sky")  # two tokens read so
    assert sorted(lens.matching("sky").tolist()) == [4, 7]
    assert sky[0, 0] == pytest.approx(0.2)
    assert sky[4, SPOT] == pytest.approx(0.9 / 16)
    assert np.argwhere(lens.probability_of("red")).tolist() == [list(ONCE)]  # case alone does not hide a word
    assert not lens.knows("zebra")
    assert not lens.probability_of("zebra").any()


def test_several_lenses_are_packed_each_and_the_one_chosen_is_shown() -> None:
    run, lenses, near = three()
    widget = TokenLens(run, lenses, near, word="cup")
    assert widget.spec["lenses"] == ["logit", "tuned", "jacobian"]
    known = dict(enumerate(widget.spec["pieces"]))
    for end, lens in (("", lenses[0]), ("@tuned", lenses[1]), ("@jacobian", lenses[2])):
        texts = dict(zip(lens.piece_ids.tolist(), lens.pieces, strict=True))
        assert [known[i] for i in part(widget, f"ids{end}")] == [texts[i] for i in lens.top_ids.ravel().tolist()]
        np.testing.assert_allclose((part(widget, f"word_probs{end}") / STEPS) ** 2, lens.probs.ravel(), atol=2e-5)
    assert widget.spec["notes"].count("Made by hand.") == 1
    assert "Led to the end." in widget.spec["notes"]
    assert (widget.kind, widget.lens.lens) == ("logit", "logit")
    plain, still = widget.values, widget.draw_png()
    widget.kind = "jacobian"
    assert widget.values[8, 5] == pytest.approx(0.95)
    assert plain[8, 5] < 1e-3
    assert widget.draw_png() != still
    assert TokenLens(run, lenses, word="cup", kind="tuned").lens is lenses[1]
    assert len(TokenLens(run, lenses[0]).maps) == len(TokenLens(run, lenses[:1]).maps)


def test_lenses_that_cannot_stand_beside_each_other_are_refused() -> None:
    run, (logit, tuned, _), _ = three()
    with pytest.raises(ValueError, match="expected at least one lens"):
        TokenLens(run, [])
    with pytest.raises(ValueError, match="expected lenses of different kinds, got logit, logit"):
        TokenLens(run, [logit, logit])
    with pytest.raises(ValueError, match=r"expected lenses with the same top, got logit 4, tuned 2"):
        TokenLens(run, [logit, replace(tuned, top_ids=tuned.top_ids[..., :2], top_probs=tuned.top_probs[..., :2])])
    with pytest.raises(traitlets.TraitError, match="kind must be one of the lenses given, logit, tuned; got 'jacobian'"):
        TokenLens(run, [logit, tuned], kind="jacobian")
    widget = TokenLens(run, [logit, tuned])
    with pytest.raises(traitlets.TraitError, match="kind must be one of the lenses given"):
        widget.kind = "other"
