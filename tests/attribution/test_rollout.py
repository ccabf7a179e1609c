"""Rollout on a model: every option equals the definition on kept matrices, and says what it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llava_lab.attribution import attribute
from llava_lab.attribution.rollout import FLOOR, Flow, TowerRollout, chain_through_vision, remove_columns
from llava_lab.capture import Full, fuse_heads, undisturbed, watch_attention
from llava_lab.errors import LabError, OptionError, TargetError
from llava_lab.models import Lab, load
from llava_lab.models.layout import language_layers, used_vision_layers
from llava_lab.results import Relevance, Run
from tests.attribution.test_flow import naive_rollout, uniform_attention
from tests.support.planted import planted_lab, scripted_run

PLAIN: dict[str, Any] = {"residual": 0.5, "null": "none", "sinks": "keep"}  # Abnar & Zuidema's own


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "The car is blue.")


@pytest.fixture(scope="module")
def towers(tiny_random: Lab, run: Run) -> tuple[Full, Full]:
    """Everything both towers attend to, kept, as the reference works with."""
    model = tiny_random.model
    layers, patches = language_layers(model), used_vision_layers(model)
    with undisturbed(model), watch_attention(layers, Full()) as text, watch_attention(patches, Full()) as vision:
        model(**tiny_random.inputs(run))
    return text, vision


def _image_rows(total: Tensor, run: Run) -> np.ndarray:
    target = run.target()
    return total[list(target.positions)].mean(0)[slice(*run.segments["image"])].reshape(run.map.rows, run.map.cols).numpy()


def _expected(towers: tuple[Full, Full], run: Run, options: dict[str, Any]) -> np.ndarray:
    """Every option, from kept matrices and the definition."""
    chosen = {"residual": 0.5, "layers": None, "fusion": "mean", "null": "none", "through_vision": False, **options}
    totals = []
    for full, causal in zip(towers, (True, False), strict=True):
        start, stop = chosen["layers"] if causal and chosen["layers"] else (0, len(full.attention))
        matrices = [fuse_heads(full.attention[i], chosen["fusion"])[0] for i in range(start, stop)]
        norms = [full.layer_norms[i] for i in range(start, stop)]
        measured = chosen["residual"] == "measured"
        residuals = [n.stream[0] / (n.stream[0] + n.branch[0]) if measured else torch.tensor(chosen["residual"]) for n in norms]
        uniform = torch.ones_like(matrices[0]).tril() if causal else torch.ones_like(matrices[0])
        uniform /= uniform.sum(1, keepdim=True)
        totals.append((naive_rollout(matrices, residuals), naive_rollout([uniform] * len(matrices), residuals)))
    maps = []
    for language, vision in zip(*totals, strict=True):
        image = _image_rows(language, run)
        maps.append((image.ravel() @ vision[1:, 1:].numpy()).reshape(image.shape) if chosen["through_vision"] else image)
    return np.log((maps[0] + FLOOR) / (maps[1] + FLOOR)) if chosen["null"] == "causal" else maps[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"residual": 0.9},
        {"residual": 0.0},
        {"residual": "measured"},
        {"layers": (1, 3)},
        {"fusion": "max"},
        {"fusion": "min"},
        {"null": "causal"},
        {"null": "causal", "residual": "measured"},
        {"through_vision": True},
        {"through_vision": True, "residual": "measured", "null": "causal", "fusion": "max", "layers": (0, 2)},
    ],
    ids=str,
)
def test_every_option_equals_the_definition_on_kept_matrices(
    tiny_random: Lab, run: Run, towers: tuple[Full, Full], options: dict[str, Any]
) -> None:
    rel = attribute(tiny_random, run, **{**PLAIN, **options})
    np.testing.assert_allclose(rel.values[0], _expected(towers, run, options), atol=1e-5)
    assert rel.passes == {"forward": 1, "backward": 0}


def test_the_defaults_are_measured_residual_and_causal_null(tiny_random: Lab, run: Run) -> None:
    rel = attribute(tiny_random, run)
    assert (rel.method, rel.options["residual"], rel.options["null"]) == ("rollout", "measured", "causal")
    assert any("Residual weight measured" in note for note in rel.notes)
    assert any("0 is what the mask alone would give" in note for note in rel.notes)
    plain = attribute(tiny_random, run, **PLAIN)
    assert any("early image rows look important" in note for note in plain.notes)


def test_mass_over_the_segments_is_one(tiny_random: Lab, run: Run) -> None:
    rel = attribute(tiny_random, run, target="words", **PLAIN)
    for mass, values in zip(rel.extras["mass"], rel.values, strict=True):
        assert sum(mass.values()) == pytest.approx(1, abs=1e-5)
        assert mass["image"] == pytest.approx(values.sum(), abs=1e-6)


def test_a_model_that_attends_uniformly_gets_an_empty_map() -> None:
    lab = planted_lab()
    with torch.no_grad():
        lab.model.model.language_model.layers[0].self_attn.q_proj.weight.zero_()
    picture = np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    run = scripted_run(lab, picture, "The car is red.")
    for options in ({}, {"residual": 0.5}, {"through_vision": True}):
        rel = attribute(lab, run, target="words", **options)
        np.testing.assert_allclose(rel.values, 0, atol=1e-4)


def test_what_goes_to_the_class_token_is_reported(tiny_random: Lab, run: Run, towers: tuple[Full, Full]) -> None:
    rel = attribute(tiny_random, run, through_vision=True, **PLAIN)
    without = attribute(tiny_random, run, **PLAIN)
    image = without.extras["mass"][0]["image"]
    assert rel.extras["lost_to_cls"][0] == pytest.approx(1 - rel.values.sum() / image, abs=1e-5)
    assert 0 < rel.extras["lost_to_cls"][0] < 1
    assert any("CLS" in note for note in rel.notes)


def test_removed_sinks_are_listed_and_get_nothing(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = attribute(tiny_random, run, sinks="remove", residual=0.5, null="none")
    assert kept.passes["forward"] == 2
    monkeypatch.setattr("llava_lab.attribution.rollout.find_sinks", lambda pull: (0, 3))
    rel = attribute(tiny_random, run, sinks="remove", residual=0.5, null="none")
    assert rel.extras["sinks"] == [{"position": i, "token": run.tokens[i]} for i in (0, 3)]
    assert repr(run.tokens[0]) in " ".join(rel.notes)
    assert sum(rel.extras["mass"][0].values()) == pytest.approx(1, abs=1e-5)
    assert not np.allclose(rel.values, kept.values)


def test_the_null_has_the_same_sinks_removed(
    tiny_random: Lab, run: Run, towers: tuple[Full, Full], monkeypatch: pytest.MonkeyPatch
) -> None:
    sinks = (0, 60)
    monkeypatch.setattr("llava_lab.attribution.rollout.find_sinks", lambda pull: sinks)
    rel = attribute(tiny_random, run, sinks="remove", residual=0.5)
    matrices = [remove_columns(a[0].mean(0), sinks) for a in towers[0].attention.values()]
    uniform = remove_columns(uniform_attention(len(matrices[0])), sinks)
    half = [torch.tensor(0.5)] * len(matrices)
    seen, null = (_image_rows(naive_rollout(one, half), run) for one in (matrices, [uniform] * len(matrices)))
    np.testing.assert_allclose(rel.values[0], np.log((seen + FLOOR) / (null + FLOOR)), atol=1e-5)


@pytest.fixture(scope="module")
def big(llava15_folder: Path) -> tuple[Lab, Run]:
    lab = load(str(llava15_folder))
    wide = np.random.default_rng(3).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    return lab, scripted_run(lab, wide, "The car is blue.")


def test_576_image_tokens_take_the_same_path(big: tuple[Lab, Run]) -> None:
    lab, run = big
    plain = attribute(lab, run, target="words", **PLAIN)
    assert plain.values.shape == (len(run.words), 24, 24)
    assert sum(plain.extras["mass"][0].values()) == pytest.approx(1, abs=1e-5)
    with undisturbed(lab.model), watch_attention(language_layers(lab.model), Full()) as full:
        lab.model(**lab.inputs(run))
    total = naive_rollout([a[0].mean(0) for a in full.attention.values()], [torch.tensor(0.5)] * 2)
    whole = attribute(lab, run, **PLAIN)
    np.testing.assert_allclose(whole.values[0], _image_rows(total, run), atol=1e-6)
    rows = attribute(lab, run, method="attention").values[0]
    mean = torch.stack([a[0].mean(0) for a in full.attention.values()]).mean(0)
    np.testing.assert_allclose(rows, _image_rows(mean, run), atol=1e-6)
    assert np.isfinite(attribute(lab, run, through_vision=True).values).all()


def test_contrast_is_refused_because_attention_cannot_tell_words_apart(tiny_random: Lab, run: Run) -> None:
    for method in ("rollout", "attention"):
        with pytest.raises(TargetError, match=f"{method!r} cannot tell 'blue, not green'.*occlusion"):
            attribute(tiny_random, run, method=method, target=("blue", "green"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": 1.5}, "weight of the identity, 0 to 1, or 'measured'; got 1.5"),
        ({"residual": "half"}, "got 'half'"),
        ({"layers": (2, 2)}, r"0 <= start < stop <= 3.*got \(2, 2\)"),
        ({"layers": 4}, "or None for all; got 4"),
        ({"fusion": "sum"}, "fusion must be one of 'mean', 'max', 'min', got 'sum'"),
        ({"sinks": "drop"}, "sinks must be one of 'keep', 'remove', got 'drop'"),
        ({"null": True}, "null must be one of 'none', 'causal', got True"),
        ({"through_vision": "yes"}, "through_vision must be one of False, True, got 'yes'"),
    ],
)
def test_options_out_of_range_are_refused(tiny_random: Lab, run: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        attribute(tiny_random, run, **options)


def test_a_tower_that_is_not_the_grid_is_refused(run: Run) -> None:
    tower = TowerRollout(causal=False, residual=0.5, null=False, fusion="mean", flow=Flow(9, causal=False))
    with pytest.raises(LabError, match="expected 16 patches and at most one CLS token in the vision tower, got 9 positions"):
        chain_through_vision(torch.ones(1, len(run.token_ids)), None, tower, run)


def test_result_survives_saving(tiny_random: Lab, run: Run, tmp_path: Path) -> None:
    rel = attribute(tiny_random, run, layers=(0, 2), through_vision=True, sinks="remove")
    again = Relevance.load(rel.save(tmp_path / "map.npz"))
    assert again.options == rel.options
    assert again.extras == rel.extras
    np.testing.assert_array_equal(again.values, rel.values)
