"""Rollout: the product by its definition, every option on kept matrices, sinks, and the vision tower alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GraniteConfig, MistralConfig, Olmo2Config

from llava_lab.attribution import attribute
from llava_lab.attribution.rollout import (
    FLOOR,
    Flow,
    TowerRollout,
    UniformFlow,
    chain_through_vision,
    column_pull,
    find_sinks,
    remove_columns,
    whole_rows,
)
from llava_lab.capture import Full, fuse_heads, hooked, undisturbed, watch_attention
from llava_lab.errors import LabError
from llava_lab.models import Lab, load
from llava_lab.models.layout import language_layers, used_vision_layers
from llava_lab.results import Run
from tests.support.checkpoints import build_llama_model, build_processor, byte_tokenizer, llava_config
from tests.support.closeness import TERMS, close
from tests.support.matrices import naive_rollout, uniform_attention
from tests.support.planted import planted_lab, scripted_run

# -- the product ---------------------------------------------------------------------------


def test_two_layers_by_hand() -> None:
    flow = Flow(2, causal=True)
    for rows in ([[1, 0], [0.5, 0.5]], [[1, 0], [0.25, 0.75]]):
        flow.step(torch.tensor(rows, dtype=torch.float32), 0.5)
    assert flow.total.tolist() == [[1, 0], [0.34375, 0.65625]]


# weight on attention, layers, mass on position 0, on system text, on the image, top image row / bottom row
COLLAPSE = [
    (0.5, 32, 0.976, 0.023, 0.000, 1.6e5),
    (0.8, 32, 1.000, 0.000, 0.000, None),
    (1.0, 32, 1.000, 0.000, 0.000, None),
    (0.2, 32, 0.393, 0.466, 0.141, 165),
    (0.1, 32, 0.093, 0.378, 0.493, 17.9),
    (0.05, 32, 0.020, 0.173, 0.609, 5.0),
    (0.02, 32, 0.003, 0.052, 0.416, 2.05),
    (0.5, 4, 0.021, None, 0.684, 8.6),
    (0.5, 8, 0.135, None, 0.370, 69),
    (0.5, 16, 0.576, None, 0.043, 1.6e3),
]


@pytest.mark.parametrize(("weight", "layers", "first", "system", "image", "ratio"), COLLAPSE)
def test_uniform_attention_collapses_as_tabled(
    weight: float, layers: int, first: float, system: float | None, image: float, ratio: float | None
) -> None:
    size, start, stop = 620, 35, 611  # LLaVA-1.5's 576 image tokens after a system sentence
    attention, flow, null = uniform_attention(size), Flow(size, causal=True), UniformFlow(size, causal=True)
    for _ in range(layers):
        flow.step(attention, 1 - weight)
        null.step(1 - weight)
    close(null.total, flow.total, terms=TERMS)
    row = flow.total[-1]
    assert row[0] == pytest.approx(first, abs=6e-4)
    assert row[start:stop].sum() == pytest.approx(image, abs=6e-4)
    if system is not None:
        assert row[1:start].sum() == pytest.approx(system, abs=6e-4)
    if ratio is not None:
        rows = row[start:stop].reshape(24, 24).mean(1)
        assert rows[0] / rows[-1] == pytest.approx(ratio, rel=0.04)  # tabled to two figures


@pytest.mark.parametrize("causal", [True, False])
def test_flow_equals_the_definition_and_keeps_rows_whole(causal: bool) -> None:
    size, generator = 150, torch.Generator().manual_seed(0)  # not a multiple of the block
    matrices = [torch.rand(size, size, generator=generator) ** 4 for _ in range(3)]
    matrices = [whole_rows(m.tril() if causal else m) for m in matrices]
    residuals = [torch.rand(size, generator=generator) for _ in range(3)]
    flow = Flow(size, causal=causal)
    for attention, residual in zip(matrices, residuals, strict=True):
        flow.step(attention, residual)
    close(flow.total, naive_rollout(matrices, residuals).float(), terms=TERMS)
    torch.testing.assert_close(flow.total.sum(1), torch.ones(size), atol=1e-5, rtol=0)
    assert not causal or flow.total.triu(1).abs().max() == 0


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("removed", [(), (0, 1, 7)])
def test_uniform_flow_is_flow_over_uniform_matrices(causal: bool, removed: tuple[int, ...]) -> None:
    size = 30
    attention = remove_columns(uniform_attention(size) if causal else torch.full((size, size), 1 / size), removed)
    residual = torch.linspace(0.1, 0.9, size)
    flow, uniform = Flow(size, causal=causal), UniformFlow(size, causal=causal, removed=removed)
    for _ in range(4):
        flow.step(attention, residual)
        uniform.step(residual)
    close(uniform.total, flow.total, terms=TERMS)
    torch.testing.assert_close(uniform.total.sum(1), torch.ones(size), atol=1e-6, rtol=0)


def test_a_planted_sink_is_found_and_nothing_in_uniform_attention() -> None:
    size = 100
    uniform = uniform_attention(size)
    torch.testing.assert_close(column_pull(uniform), torch.ones(size))
    assert find_sinks(column_pull(uniform)) == ()
    sunk = uniform.clone()
    for sink in (0, 40):
        sunk[sink + 1 :, sink] += 0.5
    sunk = whole_rows(sunk)
    assert find_sinks(column_pull(sunk)) == (0, 40)
    left = remove_columns(sunk, (0, 40))
    torch.testing.assert_close(left.sum(1), torch.ones(size))
    assert left[1:, 0].max() == 0
    assert left[0, 0] == 1, "a row with nothing left attends to itself"


def test_too_few_observers_make_no_sink() -> None:
    attention = uniform_attention(60)
    attention[56:, 55] = 50.0
    assert find_sinks(column_pull(whole_rows(attention))) == ()


# -- on a model ----------------------------------------------------------------------------


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
    close(rel.values[0], _expected(towers, run, options), terms=TERMS)
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


def _with_language_model(text: Any) -> Lab:
    """A random CLIP tower before another language model."""
    tokenizer = byte_tokenizer()
    config = llava_config(tokenizer, text=text)
    return Lab(build_llama_model(config), build_processor(config, tokenizer, do_pad=True))


SMALL: dict[str, Any] = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3} | {
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"residual": 0.5}, {"residual": 0.5, "sinks": "remove"}])
@pytest.mark.parametrize("window", [4, 9, 200])
def test_a_sliding_window_that_attends_uniformly_gets_an_empty_map(picture: np.ndarray, window: int, options: Any) -> None:
    lab = _with_language_model(MistralConfig(**SMALL, sliding_window=window))
    with torch.no_grad():
        for layer in language_layers(lab.model):
            layer.self_attn.q_proj.weight.zero_()
    rel = attribute(lab, scripted_run(lab, picture, "The car is red."), target="words", **options)
    np.testing.assert_allclose(rel.values, 0, atol=1e-4)
    assert not rel.extras.get("sinks")


@pytest.mark.parametrize("multiplier", [0.1, 0.5, 1.0])
def test_the_residual_weight_is_measured_of_what_a_layer_really_adds(picture: np.ndarray, multiplier: float) -> None:
    lab = _with_language_model(GraniteConfig(**SMALL, residual_multiplier=multiplier))
    run = scripted_run(lab, picture, "The car is red.")
    layer = language_layers(lab.model)[0]
    stream: list[Tensor] = []
    with (
        undisturbed(lab.model),
        hooked(layer, before=lambda module, args: stream.append(args[0])),
        hooked(layer.post_attention_layernorm, before=lambda module, args: stream.append(args[0])),
    ):
        lab.model(**lab.inputs(run))
    before, after = (part[0].norm(dim=-1) for part in stream)
    added = (stream[1] - stream[0])[0].norm(dim=-1)
    rel = attribute(lab, run, layers=(0, 1))
    assert rel.extras["residual_by_layer"] == [pytest.approx(float((before / (before + added)).mean()), abs=1e-5)]
    assert after.shape == before.shape


def test_a_branch_that_is_normed_before_it_is_added_is_not_measured(picture: np.ndarray) -> None:
    lab = _with_language_model(Olmo2Config(**SMALL))
    run = scripted_run(lab, picture, "The car is red.")
    with pytest.raises(LabError, match="expected layers that add their attention's output .* residual=0.5"):
        attribute(lab, run)
    assert np.isfinite(attribute(lab, run, residual=0.5).values).all()


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
    close(whole.values[0], _image_rows(total, run), terms=TERMS)
    rows = attribute(lab, run, method="attention").values[0]
    mean = torch.stack([a[0].mean(0) for a in full.attention.values()]).mean(0)
    close(rows, _image_rows(mean, run), terms=TERMS)
    assert np.isfinite(attribute(lab, run, through_vision=True).values).all()


def test_a_chained_tower_that_is_not_the_grid_is_refused(run: Run) -> None:
    tower = TowerRollout(causal=False, residual=0.5, null=False, fusion="mean", flow=Flow(9, causal=False))
    with pytest.raises(LabError, match="expected 16 patches and at most one CLS token in the vision tower, got 9 positions"):
        chain_through_vision(torch.ones(1, len(run.token_ids)), None, tower, run)


# -- the vision tower alone ----------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_vision_is_the_mean_patch_row_of_the_towers_rollout(tiny_random: Lab, run: Run, fusion: str) -> None:
    model = tiny_random.model
    with undisturbed(model), watch_attention(used_vision_layers(model), Full()) as full:
        model(**tiny_random.inputs(run))
    matrices = [whole_rows(fuse_heads(one, fusion)[0]) for one in full.attention.values()]
    total = naive_rollout(matrices, [torch.tensor(0.5)] * len(matrices))
    rel = attribute(tiny_random, run, method="vision", fusion=fusion)
    close(rel.values[0].ravel(), total[1:, 1:].mean(0).numpy(), terms=TERMS)
    assert rel.extras["lost_to_cls"] == pytest.approx(float(total[1:, 0].mean()), abs=1e-6)
    assert rel.values.sum() + rel.extras["lost_to_cls"] == pytest.approx(1, abs=1e-5)


def test_vision_knows_neither_the_question_nor_the_answer(tiny_random: Lab, run: Run) -> None:
    other = scripted_run(tiny_random, run.picture, "Yes, a tree.", question="Is there a tree?")
    one = attribute(tiny_random, run, method="vision", target=["blue", ("blue", "green")])
    np.testing.assert_array_equal(one.values[0], one.values[1])
    np.testing.assert_array_equal(one.values[0], attribute(tiny_random, other, method="vision").values[0])
    assert any("a control, not an explanation" in note for note in one.notes)
    flipped = scripted_run(tiny_random, np.ascontiguousarray(run.picture[:, ::-1]), "The car is blue.")
    assert not np.allclose(one.values[0], attribute(tiny_random, flipped, method="vision").values[0])


def test_a_tower_that_is_not_the_grid_is_refused(tiny_random: Lab, run: Run) -> None:
    wrong = replace(run, map=replace(run.map, rows=3))
    with pytest.raises(LabError, match="expected a grid of 4x4 patches, got 3x4"):
        attribute(tiny_random, wrong, method="vision")
