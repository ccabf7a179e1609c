"""Every head's map against eager matrices, and localisation heads by their criterion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llava_lab.attribution import attribute, find_localization_heads, head_maps
from llava_lab.attribution.heads import elbow, rank_heads, smooth, spatial_entropy
from llava_lab.capture import Full, undisturbed, watch_attention
from llava_lab.errors import CheckpointError, DataError, OptionError, TargetError
from llava_lab.models import Lab, load
from llava_lab.models.layout import language_layers
from llava_lab.results import HeadMaps, Run
from tests.support.checkpoints import build_llava
from tests.support.planted import planted_lab, red_picture, scripted_run

ANSWER = "The car is blue."


HALF: Any = {"rtol": 1e-3, "atol": 1e-6}  # what float16 keeps of a number between 0 and 1


def _wide() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    return scripted_run(tiny_random, _wide(), ANSWER)


@pytest.fixture(scope="module")
def found(tiny_random: Lab, run: Run) -> HeadMaps:
    return head_maps(tiny_random, run)


def _by_eager(lab: Lab, run: Run, targets: Any) -> np.ndarray:
    """The same maps from whole matrices: (targets, layers, heads, patches)."""
    with torch.no_grad():
        kept = lab.model.eval()(**lab.inputs(run), output_attentions=True, use_cache=False).attentions
    image = slice(*run.segments["image"])
    whole = torch.stack([layer[0].float() for layer in kept])  # L H Q K
    return np.stack([whole[:, :, list(target.positions), image].mean(2).numpy() for target in targets])


def test_every_head_equals_eager_attention(tiny_folder: Path, found: HeadMaps, run: Run) -> None:
    want = _by_eager(load(str(tiny_folder), attention="eager"), run, found.targets)
    assert found.values.shape == (len(run.words), 3, 4, 4, 4)
    assert found.values.dtype == np.float16
    np.testing.assert_allclose(found.values.reshape(want.shape), want, **HALF)


def test_the_mean_over_heads_and_layers_is_the_attention_method(tiny_random: Lab, found: HeadMaps, run: Run) -> None:
    rel = attribute(tiny_random, run, method="attention", target="words")
    np.testing.assert_allclose(found.values.astype(np.float32).mean((1, 2)), rel.values, **HALF)


def test_each_map_sums_to_the_head_s_share_on_the_picture(tiny_random: Lab, found: HeadMaps, run: Run) -> None:
    share = found.image_share
    assert share.shape == (len(run.words), 3, 4)
    assert share.dtype == np.float32
    assert ((share > 0) & (share < 1)).all()
    rel = attribute(tiny_random, run, method="attention", target="words")
    np.testing.assert_allclose(share.mean((1, 2)), rel.extras["image_share"], rtol=1e-3)


def test_the_planted_heads_look_at_the_red_patch() -> None:
    lab = planted_lab()
    run = scripted_run(lab, red_picture(64, 64, (40, 16, 48, 24)), "It is red.")
    found = head_maps(lab, run, target="red")
    assert (found.values[0, 0].reshape(4, -1).argmax(1) == 2 * 8 + 5).all()  # the layer that was written
    assert found.values[0, 1].std() < 1e-4  # the layer that was not


def test_a_word_of_several_tokens_is_the_mean_of_its_tokens(tiny_random: Lab) -> None:
    run = scripted_run(tiny_random, _wide(), "The zzyzx is blue.")
    word = run.word("zzyzx")
    start = run.segments["answer"][0]
    tokens = list(range(word.start - start, word.stop - start))
    assert len(tokens) > 1
    one = head_maps(tiny_random, run, target=word).values[0].astype(np.float32)
    several = head_maps(tiny_random, run, target=tokens).values.astype(np.float32)
    np.testing.assert_allclose(one, several.mean(0), **HALF)


def test_it_comes_back_from_its_file_exactly(found: HeadMaps, tmp_path: Path) -> None:
    again = HeadMaps.load(found.save(tmp_path / "heads.npz"))
    np.testing.assert_array_equal(again.values, found.values)
    assert again.values.dtype == np.float16
    for name in ("targets", "map", "model", "fingerprint", "seconds", "notes"):
        assert getattr(again, name) == getattr(found, name), name


def test_nothing_stays_behind_also_after_an_interrupt(tiny_random: Lab, run: Run) -> None:
    layers = language_layers(tiny_random.model)
    hooks = [(len(one._forward_hooks), len(one._forward_pre_hooks)) for one in tiny_random.model.modules()]
    before = tiny_random.model.config.text_config._attn_implementation

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        head_maps(tiny_random, run)
    handle.remove()
    assert tiny_random.model.config.text_config._attn_implementation == before
    assert [(len(one._forward_hooks), len(one._forward_pre_hooks)) for one in tiny_random.model.modules()] == hooks
    assert all(parameter.grad is None for parameter in tiny_random.model.parameters())


def test_what_it_cannot_show_is_refused_in_one_line(tiny_random: Lab, run: Run, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"cannot tell .*blue.*attention is the same for every word"):
        head_maps(tiny_random, run, target=("blue", "red"))
    with pytest.raises(TargetError, match="the answer has no word 'green'.*it has 'The', 'car'"):
        head_maps(tiny_random, run, target="green")
    other = load(str(build_llava(tmp_path / "other", seed=5)))
    with pytest.raises(CheckpointError, match="got one by .* with other weights; ask again"):
        head_maps(other, run)


def test_a_wrong_shape_is_refused(found: HeadMaps) -> None:
    with pytest.raises(DataError, match=r"must be \(targets, layers, heads, rows, cols\)"):
        replace(found, values=found.values[0])


# -- localisation heads --------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tiny_random: Lab, run: Run) -> Tensor:
    """Every attention weight, L H Q K."""
    with undisturbed(tiny_random.model), watch_attention(language_layers(tiny_random.model), Full()) as full:
        tiny_random.model(**tiny_random.inputs(run))
    return torch.stack([full.attention[i][0] for i in range(3)])


def test_entropy_of_regions_by_hand() -> None:
    one, diagonal, two, lopsided = (np.zeros((6, 6)) for _ in range(4))
    one[1:3, 1:3] = 1
    diagonal[1, 1] = diagonal[2, 2] = diagonal[3, 1] = 1  # corners touch: one region
    two[0, 0] = two[5, 5] = 1
    lopsided[0, 0], lopsided[5, 5] = 4, 2
    above = np.array([4 - 6 / 36, 2 - 6 / 36])
    shares = above / above.sum()
    assert spatial_entropy(one) == pytest.approx(0)
    assert spatial_entropy(diagonal) == pytest.approx(0)
    assert spatial_entropy(two) == pytest.approx(np.log(2))
    assert spatial_entropy(lopsided) == pytest.approx(-(shares * np.log(shares)).sum())
    assert spatial_entropy(np.full((6, 6), 0.5)) == float("inf")


def test_elbow_is_the_value_farthest_below_the_line() -> None:
    assert elbow(np.array([0.9, 0.0, 0.1, 0.2, 0.1])) == pytest.approx(0.2)  # line at 0, .225, .45, .675, .9
    assert elbow(np.array([0.3, 0.1])) == pytest.approx(0.1)


def test_ranking_wants_the_picture_first_and_then_one_place() -> None:
    maps = np.full((2, 3, 4, 4), 0.001)
    maps[0, 0, 1, 1] = 0.8  # one place
    maps[0, 2, 0, 0] = maps[0, 2, 3, 3] = 0.42  # two places
    maps[1, 1, 2, 2] = 0.9  # one place, more of it
    maps[1, 0, 2, 2] = 0.02  # one place, hardly looked at
    ranked = rank_heads(maps, first=5, threshold=0.5)
    assert [(one.layer, one.head) for one in ranked] == [(6, 1), (5, 0), (5, 2)]
    assert ranked[0].image_share == pytest.approx(0.915)
    assert [(one.layer, one.head) for one in rank_heads(maps)][:1] == [(1, 1)]


def test_smoothing_keeps_a_flat_map_and_spreads_a_peak() -> None:
    flat = np.full((5, 7), 0.25)
    np.testing.assert_allclose(smooth(flat, 1.0), flat)
    peak = np.zeros((15, 15))
    peak[7, 7] = 1
    spread = smooth(peak, 1.0)
    bump = np.exp(-(np.arange(-3, 4) ** 2) / 2)
    np.testing.assert_allclose(spread[4:11, 4:11], np.outer(bump, bump) / bump.sum() ** 2)
    assert spread[3].max() == 0, "seven patches wide"
    assert smooth(peak, 0) is peak


def _one_pointing_head() -> tuple[Lab, list[Run]]:
    """The hand-written model with only L0H2 looking at red; the others look everywhere alike."""
    lab = planted_lab()
    attention = language_layers(lab.model)[0].self_attn
    with torch.no_grad():
        for head in (0, 1, 3):
            attention.q_proj.weight[head * attention.head_dim : (head + 1) * attention.head_dim] = 0
    boxes = [(12, 60, 36, 84), (60, 12, 84, 36), (36, 36, 60, 60)]
    return lab, [scripted_run(lab, red_picture(96, 96, box), "The car is red.") for box in boxes]


def test_the_one_pointing_head_is_found_and_followed() -> None:
    lab, runs = _one_pointing_head()
    rel = attribute(lab, runs[0], method="localization_heads", target="red", top=1)
    found = rel.extras["heads"][0]
    assert [(one["layer"], one["head"]) for one in found] == [(0, 2)]
    assert found[0]["entropy"] == pytest.approx(0, abs=1e-6)
    y, x = np.unravel_index(int(rel.values[0].argmax()), rel.values[0].shape)
    assert 5 <= y < 7
    assert 1 <= x < 3
    assert "L0H2" in rel.notes[0]
    assert find_localization_heads(lab, runs, top=1) == ((0, 2),)
    given = attribute(lab, runs[0], method="localization_heads", target="red", heads=((0, 2),))
    np.testing.assert_array_equal(given.values, rel.values)
    plain = attribute(lab, runs[0], method="localization_heads", target="red", heads=((0, 2),), sigma=0)
    row = attribute(lab, runs[0], method="attention", target="red", heads=((0, 2),))
    np.testing.assert_allclose(plain.values, row.values, atol=1e-7)


def test_the_map_is_the_smoothed_mean_of_the_heads_it_names(tiny_random: Lab, run: Run, kept: Tensor) -> None:
    rel = attribute(tiny_random, run, method="localization_heads", target=["blue", 0])
    for i, target in enumerate(rel.targets):
        rows = kept[:, :, list(target.positions)].mean(2)[..., slice(*run.segments["image"])]
        maps = rows.reshape(3, 4, 4, 4).numpy()
        want = rank_heads(maps)[:3]
        named = [(one["layer"], one["head"]) for one in rel.extras["heads"][i]]
        assert named == [(one.layer, one.head) for one in want]
        np.testing.assert_allclose(rel.values[i], smooth(np.mean([maps[pair] for pair in named], 0), 1.0), atol=1e-6)


def test_the_first_two_layers_are_left_out_of_a_deep_model(tmp_path: Path) -> None:
    lab = load(str(build_llava(tmp_path / "deep", layers=5)))
    run = scripted_run(lab, _wide(), ANSWER)
    rel = attribute(lab, run, method="localization_heads", threshold=0, top=99)
    assert {one["layer"] for one in rel.extras["heads"][0]} == {2, 3, 4}
    assert any("among layers 2 to 4" in note for note in rel.notes)
    all_of_them = attribute(lab, run, method="localization_heads", threshold=0, top=99, layers=(0, 5))
    assert len(all_of_them.extras["heads"][0]) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0}, "top must be a whole number of at least 1, got 0"),
        ({"sigma": -1}, "sigma must be a number of at least 0, got -1"),
        ({"threshold": "high"}, "threshold must be a number of at least 0, got 'high'"),
        ({"threshold": 2.0}, "no head gives the picture 2 of its attention, the most is 0"),
        ({"heads": (1, 2)}, r"heads must be \(layer, head\) pairs like"),
        ({"heads": ((9, 2),)}, "with layers from 0 to 2; got"),
    ],
)
def test_localisation_options_out_of_range_are_refused(tiny_random: Lab, run: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        attribute(tiny_random, run, method="localization_heads", **options)


def test_heads_cannot_be_found_on_no_runs(tiny_random: Lab) -> None:
    with pytest.raises(OptionError, match="at least one run to find localisation heads on, got none"):
        find_localization_heads(tiny_random, [])
