"""FlowView as Python sees it: exact scores, what is refused, what is chosen, and what stays when no script runs."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import traitlets
from PIL import Image

from llava_lab.errors import OptionError
from llava_lab.plots.palette import FLOWS
from tests.support.flow_examples import grid_example, sweep_example, two
from tests.support.widget_examples import make_run
from widgets import FlowView
from widgets.flow_view import cut_sentence, patch_sentence


def test_every_score_reaches_the_page_exactly_and_holes_stay_holes() -> None:
    run, sweep, grid = two()
    got = np.frombuffer(FlowView(run, sweep, grid).data, "<f4")
    wanted = [sweep.before, sweep.after, grid.clean, grid.corrupt, grid.scores]
    np.testing.assert_array_equal(got, np.concatenate([one.ravel() for one in wanted]))
    assert np.isnan(got).sum() == 2


def test_targets_of_both_are_joined_and_each_half_knows_its_own() -> None:
    run, sweep, grid = two()
    other = replace(grid, targets=(grid.targets[1], run.target("car")))
    widget = FlowView(run, sweep, other)
    assert [chip["text"] for chip in widget.spec["chips"]] == ["red.", "red, not blue", "car"]
    assert widget.spec["sweep"]["targets"] == [0, 1, -1]
    assert widget.spec["grid"]["targets"] == [-1, 0, 1]
    assert FlowView(run, sweep).spec["grid"] is None
    assert FlowView(run, grid=grid).spec["sweep"] is None


def test_nothing_to_show_is_refused() -> None:
    with pytest.raises(ValueError, match="give sweep .* grid .*, or both"):
        FlowView(make_run())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "1" * 16}, "was measured on another checkpoint"),
        ({"targets": ()}, "has no target"),
        ({"windows": np.zeros((4, 3), np.int64)}, r"windows must have the shape \(4, 2\), got \(4, 3\)"),
    ],
)
@pytest.mark.parametrize("which", ["sweep", "grid"])
def test_a_result_that_does_not_fit_is_refused(which: str, change: dict[str, Any], message: str) -> None:
    run, sweep, grid = two()
    given = {"sweep": sweep, "grid": grid}
    broken = replace(given[which], **change)  # type: ignore[type-var]
    with pytest.raises(ValueError, match=f"{which}.*{message}"):
        FlowView(run, **{which: broken})  # type: ignore[arg-type]


def test_tables_of_a_wrong_shape_and_other_answers_are_refused() -> None:
    run, sweep, grid = two()
    with pytest.raises(ValueError, match=r"sweep.after must have the shape \(3, 4, 2\), got \(3, 3, 2\)"):
        FlowView(run, replace(sweep, after=sweep.after[:, :3]))
    with pytest.raises(ValueError, match=r"grid.answers must have the shape \(2, 3, 4\), got \(2, 3\)"):
        FlowView(run, grid=replace(grid, answers=grid.answers[..., 0]))
    with pytest.raises(ValueError, match="'red.', which this run does not say there"):
        FlowView(replace(run, token_ids=run.token_ids + 1), sweep)
    with pytest.raises(OptionError, match=r"sweep must be a result of ll.knockout_sweep or None, got PatchGrid"):
        FlowView(run, grid)  # type: ignore[arg-type]


def test_what_is_chosen_is_checked() -> None:
    run, sweep, grid = two()
    widget = FlowView(run, sweep, grid, target="red, not blue", component="mlp", selected={"flow": [1, 2], "cell": (2, 3)})
    assert (widget.target, widget.component) == (1, 1)
    assert widget.selected == {"flow": [1, 2], "cell": [2, 3]}
    for name, value, message in (
        ("target", 2, r"target must lie in 0\.\.1, got 2"),
        ("component", 2, r"component must lie in 0\.\.1, got 2"),
        ("selected", {"flow": [3, 0]}, r"selected flow must lie in 0\.\.2, got 3"),
        ("selected", {"cell": [0, 4]}, r"selected window must lie in 0\.\.3, got 4"),
        ("selected", {"cell": [True, 1]}, "two whole numbers"),
        ("selected", {"head": [0, 1]}, "may hold 'flow' and 'cell' here, got 'head'"),
    ):
        with pytest.raises(traitlets.TraitError, match=message):
            setattr(widget, name, value)
    with pytest.raises(traitlets.TraitError, match="may hold 'flow' here, got 'cell'"):
        FlowView(run, sweep, selected={"cell": [0, 0]})
    with pytest.raises(ValueError, match="target must be one of 'red.', 'red, not blue', got 'blue'"):
        FlowView(run, sweep, target="blue")
    with pytest.raises(OptionError, match="no option 'componnet'; did you mean 'component'"):
        FlowView(run, sweep, componnet=1)


def test_sentences_say_the_numbers_and_what_was_not_measured() -> None:
    run, sweep, grid = two()
    target = run.target("red.")
    said = "Cutting image -> question in layers 1-2 lowers log p(red.) by 1.30, from -0.20 to -1.50."
    assert cut_sentence(sweep, target, [0, 1]) == said
    assert cut_sentence(sweep, target, [2, 3]) == "Cutting image -> last in layer 3: not measured."
    assert patch_sentence(grid, target, 0, [0, 1]).startswith("Clean residual at image, layer 1, brings back 0.75 of what log p")
    assert '"red." (clean "red.", corrupted "blue.")' in patch_sentence(grid, target, 0, [0, 1])


def test_what_does_not_reach_the_noise_floor_is_negligible_in_words_and_in_the_tables() -> None:
    run, sweep, grid = two()
    target = run.target("red.")
    sweep, grid = replace(sweep, noise_floor=(0.45, 0.45)), replace(grid, noise_floor=(1.2, 1.2))  # a quarter of 4 is below
    said = "Cutting image -> question in layers 2-3 has a negligible effect on log p(red.): less than the noise floor."
    assert cut_sentence(sweep, target, [0, 2]) == said
    assert "lowers log p(red.) by 0.50" in cut_sentence(sweep, target, [1, 3])
    assert "brings back a negligible part (less than the noise floor) of what log p(red.) lost" in patch_sentence(
        grid, target, 0, [1, 3]
    )
    assert "brings back 0.50" in patch_sentence(grid, target, 0, [0, 2])
    assert [row[1] for row in sweep.table().rows] == ["negligible", "-1.300", "negligible", "negligible"]
    assert grid.table().below[0].rows[1] == ("question", "negligible", "negligible", "1.50", "negligible")
    assert '<td style="opacity: 0.5">negligible</td>' in grid.table()._repr_html_()


def test_the_still_picture_shows_each_flow_in_its_colour_and_each_half_alone() -> None:
    run, sweep, grid = two()
    widget = FlowView(run, sweep, grid, selected={"flow": [0, 1], "cell": [0, 1]})
    data, _ = widget._repr_mimebundle_()  # type: ignore[misc]
    assert data["text/plain"].endswith("3 flows x 4 windows cut; 3 sites x 4 windows patched; 'red.', 'red, not blue')")
    raw = base64.b64decode(data["image/png"])
    image = np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))
    assert image.shape[1] == 960
    assert len(raw) < 300_000
    colors = [tuple(bytes.fromhex(color[1:])) for color in FLOWS[:3]]
    assert all((image == color).all(-1).sum() > 100 for color in colors)
    for half in (FlowView(run, sweep_example(run)), FlowView(run, grid=grid_example(run), component=1)):
        assert Image.open(io.BytesIO(half.draw_png())).size[0] == 960


def test_a_target_of_one_half_alone_and_a_whole_answer_are_drawn() -> None:
    run, sweep, grid = two()
    answer = replace(sweep, targets=(run.target(None), sweep.targets[1]))
    widget = FlowView(run, answer, grid, target=0)
    assert widget.spec["chips"][0]["what"] == "log p(whole answer)"
    assert Image.open(io.BytesIO(widget.draw_png())).size[0] == 960
