"""Lesson 04 says what is so: what tokens are near to, what the lenses read, what probes and the cloud show, its exercises.

Other weights may turn some of these round; then the prose under the figures must change, not this test alone.
"""

from __future__ import annotations

from typing import Any

from tests.support.lessons import Lesson


def test_it_runs_and_what_is_stored_is_what_it_shows(lesson: Lesson) -> None:
    lesson.check()


def test_the_cars_token_is_nearest_to_red_large_and_car(found: dict[str, Any]) -> None:
    assert found["answer"] == "The car is red."
    assert found["nearest to the car"] == ["red", "large", "car"]
    assert set(found["left edge"]) == {"Car"}  # on bare paper: readable and wrong


def test_this_model_has_no_common_direction_and_one_put_in_fools_only_raw_cosine(found: dict[str, Any]) -> None:
    """Section 2."""
    added, own = found["common"]
    assert added > 0.9
    assert own < 0.01
    assert found["raw as before"] < 0.5
    assert found["centred as before"] == 1


def test_tokens_are_readable_on_the_way_in_and_not_on_the_way_out(found: dict[str, Any]) -> None:
    """Section 3: beside random tokens, then beside the names of another patch."""
    for way in ("False", "True"):
        share, _, most = found["readable"][f"input {way}"]
        assert share > 1.6 * most
        share, _, most = found["readable"][f"output {way}"]
        assert share < most + 0.05
    right = found["right"]
    for what in ("kind", "color"):
        assert right[f"input {what} its own"] > 0.9
        assert right[f"input {what} another's"] < 0.25
        assert right[f"output {what} its own"] < 0.05


def test_a_second_norm_changes_a_few_words_only(found: dict[str, Any]) -> None:
    assert 0 < found["changed"] < 0.2


def test_the_lenses_read_the_kind_late_and_the_color_hardly(found: dict[str, Any]) -> None:
    """Section 4, and that another patch's colour is more often among the five than the patch's own."""
    plain, tuned = (found["lenses"][f"{name} kind its own"] for name in ("plain lens", "tuned lens"))
    assert max(plain[:4]) < 0.02
    assert 0.35 < plain[-1] < 0.65
    another = found["lenses"]["tuned lens kind another's"]
    assert abs(tuned[0] - another[0]) < 0.08
    assert tuned[4] > another[4] + 0.08
    assert tuned[4] > plain[4] + 0.1
    for name in ("plain lens", "tuned lens"):
        own, other = (found["lenses"][f"{name} color {whose}"] for whose in ("its own", "another's"))
        assert max(own) < 0.2
        assert sum(a < b for a, b in zip(own, other, strict=True)) >= 4


def test_words_for_what_is_there_win_in_the_last_state_only(found: dict[str, Any]) -> None:
    """Section 5."""
    beats = found["beats"]
    assert beats["state 6"][1] > 0.9
    assert beats["state 0"][0] < 0.5
    assert beats["state 2"][2] < 0.5
    assert beats["state 6, another picture's words"][1] < 0.5 < beats["state 6, another picture's words"][2]
    highest = found["highest"]
    assert highest["fish 6"] > 0.9
    assert max(highest["cup 4"], highest["cup 6"]) > max(highest["car 4"], highest["car 6"])


def test_the_connector_shows_no_difference_and_the_layers_lose_the_row_and_add_the_number(found: dict[str, Any]) -> None:
    """Section 6."""
    assert {verdicts[0] for verdicts in found["verdicts"].values()} == {"no difference shown"}
    assert found["verdicts"]["row"][1] == "loses"
    assert found["verdicts"]["how many"][1] == "adds"
    assert found["ceiling"] > 0.9


def test_the_cloud_is_read_against_shuffled_weights(found: dict[str, Any]) -> None:
    """Section 7: the connector keeps no more than a shuffled one, the first layer changes most, things stand out."""
    connector, layer, shuffled_connector, shuffled_layer = found["cka"]
    assert connector < shuffled_connector + 0.02
    assert layer < connector - 0.2
    assert shuffled_layer > 0.95
    assert max(found["rank"][0]) < min(found["rank"][1])
    position, random = found["position"]
    assert position[0] > random[0] + 0.1
    assert position[-1] < random[-1] + 0.05
    (things, elsewhere), (after, _), (late, other) = found["far"]
    assert things == 1
    assert elsewhere < 0.15
    assert after > 0.2
    assert late == other == 0


def test_the_exercises_accept_what_is_right_and_name_the_mistake(found: dict[str, Any]) -> None:
    right, tokens, length = found["nearest"]
    assert right == "Yes, that is the nearest word."
    assert "subtract their mean, from the tokens" in tokens
    assert "divide by their length" in length
    right, kept, backwards = found["lost"]
    assert right.startswith("Yes: row from after to layer 6")
    assert "no difference shown" in kept
    assert "does not come before" in backwards
