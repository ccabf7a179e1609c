"""PatchExplorer as Python sees it: options, traits, asking again, and what stays when no script runs."""

from __future__ import annotations

import io

import numpy as np
import pytest
import traitlets
from PIL import Image

from llava_lab.errors import OptionError
from tests.support.widget_examples import example, make_relevance, make_run, spots
from widgets import PatchExplorer
from widgets.patch_explorer import read_answer


@pytest.fixture
def widget() -> PatchExplorer:
    return PatchExplorer(*example(), ask=lambda patches: ("No car", [0.5, 0.25]))


def test_a_misspelt_option_is_an_error_that_names_the_choices() -> None:
    with pytest.raises(
        OptionError, match=r"PatchExplorer has no option 'opcity'; did you mean 'opacity'\? Its options are run, relevance, ask"
    ):
        PatchExplorer(*example(), opcity=0.5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"opacity": 1.5}, ValueError, r"opacity must lie in 0\.\.1, got 1\.5"),
        ({"ask": "later"}, OptionError, "ask must be a function of the selected patches, got str"),
        ({"word": 9}, traitlets.TraitError, r"word must lie in 0\.\.4, got 9"),
        ({"word": "blue"}, ValueError, "the answer has no word 'blue'"),
    ],
)
def test_wrong_options_say_what_is_right(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PatchExplorer(*example(), **options)


def test_the_first_word_is_the_last_one_with_a_map() -> None:
    run = make_run()
    assert PatchExplorer(*example()).word == 3
    assert PatchExplorer(run, {"a": make_relevance(run, spots(run)[1:2], [run.target("car")])}).word == 1
    assert PatchExplorer(run, {"a": make_relevance(run, spots(run)[:1], [run.target(None)])}).word == 4
    assert PatchExplorer(*example(), word="car").word == 1


def test_selection_is_sorted_unique_and_inside_the_grid(widget: PatchExplorer) -> None:
    widget.selected = [14, 3, 14]
    assert widget.selected == [3, 14]
    assert widget.patches == [(0, 3), (1, 2)]
    assert widget.mask.sum() == 2
    assert widget.mask[1, 2]
    for name, value in (("selected", [144]), ("selected", [-1]), ("word", 5), ("layer", 6), ("method", "rolout")):
        with pytest.raises(traitlets.TraitError, match=r"must (lie in|be one of)"):
            setattr(widget, name, value)


def test_asking_again_gives_rows_and_columns_to_the_callback() -> None:
    asked = []
    widget = PatchExplorer(*example(), ask=lambda patches: asked.append(patches) or ("No car", [0.5, 0.25]))
    states = []
    widget.observe(lambda change: states.append(change["new"]["state"]), "reply")
    widget._hear(widget, {"kind": "ask", "id": 7, "selected": [13, 14]}, [])
    assert asked == [[(1, 1), (1, 2)]]
    assert states == ["busy", "done"]
    assert widget.reply["id"] == 7
    assert widget.reply["words"] == [{"text": "No", "p": 0.5}, {"text": "car", "p": 0.25}]
    assert widget.reply["p"] == 0.125


def test_a_run_is_an_answer_too() -> None:
    run = make_run("A blue house.", probabilities=[0.5, 0.5, 0.5])
    answer = read_answer(run)
    assert answer["answer"] == "A blue house."
    assert [word["text"] for word in answer["words"]] == ["A", "blue", "house."]
    assert answer["p"] == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, r"ask must return a Run or \(answer, probabilities per word\), got NoneType"),
        (("a b", [0.1]), "ask returned 1 probabilities for 2 words"),
    ],
)
def test_what_the_callback_may_return_is_checked(given: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read_answer(given)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_errors_in_the_callback_become_a_reply(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    def fail(patches: list) -> None:
        raise error

    widget = PatchExplorer(*example(), ask=fail)  # type: ignore[arg-type]
    widget._hear(widget, {"kind": "ask", "id": 1, "selected": [3]}, [])
    assert widget.reply["state"] == "error"
    assert widget.reply["message"] in ("RuntimeError: out of memory", "KeyboardInterrupt")
    assert "in fail" in widget.reply["trace"]
    assert "asking again failed" in caplog.text


def test_other_messages_are_ignored(widget: PatchExplorer) -> None:
    widget._hear(widget, {"kind": "hello"}, [])
    widget._hear(widget, "noise", [])
    assert widget.reply == {}


def test_a_wrong_selection_in_a_message_is_a_reply_too(widget: PatchExplorer) -> None:
    widget._hear(widget, {"kind": "ask", "id": 1, "selected": [999]}, [])
    assert widget.reply["state"] == "error"
    assert "must lie in 0..143" in widget.reply["message"]


def test_long_answers_and_many_methods_still_fit_a_notebook() -> None:
    run = make_run(
        " ".join(f"word{i}" for i in range(40)), picture=np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    )
    rel = make_relevance(run, spots(run))
    png = PatchExplorer(run, {f"method {i}": rel for i in range(9)}).draw_png()
    assert len(png) < 700_000
    assert Image.open(io.BytesIO(png)).size[0] == 960


def test_maps_not_better_than_random_are_grey_in_the_explorer_too() -> None:
    run, maps = example()
    widget = PatchExplorer(run, maps, beats_random={"rollout": False, "occlusion": [True, False, True]})
    assert [method["beats"] for method in widget.spec["methods"]] == [[False] * 4, [True, False, True], [None] * 4]
    assert widget.draw_png() != PatchExplorer(run, maps).draw_png()
    with pytest.raises(
        ValueError, match="beats_random names 'rollot', which has no map; the maps are rollout, occlusion, random"
    ):
        PatchExplorer(run, maps, beats_random={"rollot": True})
