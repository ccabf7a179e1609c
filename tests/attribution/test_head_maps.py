"""Head maps: every head of every layer against eager matrices, their sums, their file, and nothing left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llava_lab as ll
from llava_lab.attribution import attribute, head_maps
from llava_lab.errors import CheckpointError, DataError, TargetError
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


def test_a_prompt_of_576_image_tokens_equals_eager_attention(llava15_folder: Path) -> None:
    lab = load(str(llava15_folder))
    run = scripted_run(lab, _wide(), ANSWER)
    found = head_maps(lab, run, target=["blue", "answer"])
    want = _by_eager(load(str(llava15_folder), attention="eager"), run, found.targets)
    assert found.values.shape[3:] == (24, 24)
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


def test_bfloat16_equals_eager_in_bfloat16(tiny_folder: Path, run: Run) -> None:
    lab, eager = (load(str(tiny_folder), dtype="bfloat16", attention=how) for how in ("sdpa", "eager"))
    run = replace(run, fingerprint=lab.fingerprint)
    coarse = head_maps(lab, run)
    want = _by_eager(eager, run, coarse.targets)
    # eager rounds the scores to bfloat16 before the softmax, watching keeps them in float32
    np.testing.assert_allclose(coarse.values.reshape(want.shape), want, atol=2e-2)


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


def test_the_public_name_is_this_function() -> None:
    assert ll.head_maps is head_maps
    assert ll.HeadMaps is HeadMaps
