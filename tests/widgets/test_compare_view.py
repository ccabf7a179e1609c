"""CompareView as Python sees it: scores per target, verdicts, a Comparison taken whole, and what stays when no script runs."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import traitlets

from llava_lab.errors import OptionError
from tests.support.compare_examples import METHODS, comparison_example, methods_example
from tests.support.widget_examples import make_run
from widgets import CompareView
from widgets.compare_view import in_order


def scored(method: CompareView, name: str) -> list[float | None]:
    """A score of every method at the chip shown, in the order given."""
    found = []
    for one in method.spec["methods"]:
        target = one["chips"][method.target]
        found.append(one["scores"][name][target] if target >= 0 and name in one["scores"] else None)
    return found


def test_one_number_counts_for_every_target_and_a_list_for_each() -> None:
    run, maps = methods_example(names=("rollout", "attention"))
    each = [0.1, 0.2, 0.3, 0.4, 0.5]
    widget = CompareView(run, maps, scores={"rollout": {"gain": 0.7}, "attention": {"gain": each}}, target="car")
    assert scored(widget, "gain") == [0.7, 0.2]
    widget.target = 3
    assert scored(widget, "gain") == [0.7, 0.4]
    with pytest.raises(ValueError, match="gain has 2 values for the 5 targets of 'attention'; give one for each, or one"):
        CompareView(run, maps, scores={"attention": {"gain": [0.1, 0.2]}})


def test_what_was_not_measured_is_missing_and_not_a_number_that_misleads() -> None:
    run, maps = methods_example(names=("rollout", "attention"))
    widget = CompareView(run, maps, scores={"rollout": {"gain": math.nan, "deletion": None}, "attention": {"gain": 0.1}})
    assert scored(widget, "gain") == [None, 0.1]
    assert scored(widget, "deletion") == [None, None]


def test_verdicts_are_per_method_or_per_target() -> None:
    run, maps = methods_example(names=("rollout", "attention", "random"))
    beats = {"rollout": np.array([True, False, True, True, True]), "attention": False}
    methods = CompareView(run, maps, beats_random=beats).spec["methods"]
    assert [method["beats"] for method in methods] == [[True, False, True, True, True], [False] * 5, [None] * 5]


def test_a_comparison_brings_its_scores_verdicts_likeness_and_refusals() -> None:
    run, comparison = comparison_example()
    widget = CompareView(run, comparison, target="car")
    row = {row["method"]: row for row in comparison.rows(1)}
    for name in ("gain", "deletion", "insertion", "object", "seconds"):
        assert scored(widget, name) == [row[method][name] for method in comparison.methods], name
    for name in ("pointing", "mass", "auc", "iou"):
        assert scored(widget, name) == [row[method]["truth"][name] for method in comparison.methods], name
    assert scored(widget, "passes")[1] == 11
    grey = [method["name"] for method in widget.spec["methods"] if method["beats"][1] is False]
    assert tuple(grey) == comparison.greyed(1) == ("gradcam", "random", "center")
    np.testing.assert_allclose(widget.spec["agreement"], comparison.spearman)
    assert widget.spec["refused"] == [["relative_attention", "method 'relative_attention' needs a question"]]
    assert widget.spec["notes"] == list(comparison.notes)
    assert widget.sort == "gain"


def test_faithfulness_truth_and_cost_are_groups_of_their_own() -> None:
    scores = CompareView(*comparison_example()).spec["scores"]
    by_group: dict[str, list[str]] = {}
    for score in scores:
        by_group.setdefault(score["group"], []).append(score["name"])
    assert by_group == {
        "Faithful to the model": ["gain", "deletion", "insertion", "object"],
        "True to the picture": ["pointing", "mass", "auc", "iou"],
        "Cost": ["seconds", "passes"],
    }
    assert {score["name"] for score in scores if score["lower"]} == {"deletion", "seconds", "passes"}


def test_methods_are_ordered_best_first_whichever_way_a_score_runs() -> None:
    run, maps = methods_example(names=("rollout", "attention", "rise"))
    scores = {"rollout": {"gain": 0.1, "deletion": 0.1}, "attention": {"gain": 0.5, "deletion": 0.5}}
    spec = CompareView(run, maps, scores=scores).spec
    assert in_order(spec["methods"], "gain", 0) == [1, 0, 2]  # none is known of the last
    assert in_order(spec["methods"], "deletion", 0) == [0, 1, 2]
    assert in_order(spec["methods"], "", 0) == [0, 1, 2]


def test_contrasts_are_asked_as_a_question_and_only_some_methods_answer() -> None:
    run, maps = methods_example()
    widget = CompareView(run, maps, target="red, not blue")
    assert widget.spec["chips"][widget.target]["text"] == "why red, not blue"
    answering = [method["name"] for method in widget.spec["methods"] if method["chips"][widget.target] >= 0]
    assert answering == ["integrated_gradients", "direct_logit", "occlusion", "shapley"]
    assert CompareView(run, maps).target == 3  # the last word that all explain comes first


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sort": "gian"}, traitlets.TraitError, r"sort must be one of '' \(as given\), gain, got 'gian'"),
        ({"method": "rolout"}, traitlets.TraitError, "method must be one of rollout, attention, got 'rolout'"),
        ({"target": 9}, traitlets.TraitError, r"target must lie in 0\.\.4, got 9"),
        ({"target": "house"}, ValueError, "the answer has no word 'house'"),
        ({"scores": {"rise": {"gain": 1}}}, ValueError, "scores names 'rise', which has no map; the maps are rollout, attention"),
        ({"beats_random": {"rise": True}}, ValueError, "beats_random names 'rise', which has no map"),
        ({"scores": {"rollout": 0.3}}, OptionError, "scores must be numbers by name for each method"),
        ({"agreement": np.eye(3)}, ValueError, r"agreement must be 2 x 2 numbers, one row and column per map, got \(3, 3\)"),
        ({"opacity": 2}, ValueError, r"opacity must lie in 0\.\.1, got 2"),
        ({"beat_random": {}}, OptionError, r"no option 'beat_random'; did you mean 'beats_random'\?"),
    ],
)
def test_wrong_options_say_what_is_right(options: dict, error: type[Exception], message: str) -> None:
    run, maps = methods_example(names=("rollout", "attention"))
    with pytest.raises(error, match=message):
        CompareView(run, maps, **{"scores": {"rollout": {"gain": 0.3}}, **options})


def test_a_comparison_takes_no_scores_beside_its_own() -> None:
    with pytest.raises(OptionError, match="a Comparison brings its own scores"):
        CompareView(*comparison_example(), beats_random={"rollout": True})


def test_maps_of_another_answer_are_refused() -> None:
    run, maps = methods_example(names=("rollout",))
    other = replace(run, token_ids=run.token_ids + 1)
    with pytest.raises(ValueError, match="'rollout' explains 'The', which this run does not say there; attribute this run"):
        CompareView(other, maps)


def test_the_still_picture_follows_the_order_and_the_target() -> None:
    run, maps = methods_example(names=("rollout", "attention"))
    scores = {"rollout": {"gain": 0.1}, "attention": {"gain": 0.5}}
    one = CompareView(run, maps, scores=scores, target="car")
    assert one.draw_png() == CompareView(run, maps, scores=scores, target="car").draw_png()
    for other in ({"sort": ""}, {"target": "red."}, {"beats_random": {"rollout": False}}):
        assert CompareView(run, maps, **{"scores": scores, "target": "car", **other}).draw_png() != one.draw_png()  # type: ignore[arg-type]


def test_many_methods_still_fit_a_page() -> None:
    run, maps = methods_example(make_run(grid=24, size=336), METHODS)
    widget = CompareView(run, maps)
    assert len(widget.maps) == sum(len(rel.values) for rel in maps.values()) * 576
    assert len(widget.to_html()) < 700_000
