"""Shuffled weights: from the top down, every value kept, back bitwise whatever happens; and maps alike by chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from llava_lab.judging.sanity import moved, parts_from_top, rank_likeness, ssim, top_likeness
from llava_lab.models import Lab
from llava_lab.models.weights import weights_put_back


def test_layers_are_shuffled_from_last_to_first_then_connector_then_tower(tiny_random: Lab) -> None:
    model = tiny_random.model
    assert [name for name, _ in parts_from_top(model, 8)] == ["layer 2", "layer 1", "layer 0", "connector", "vision tower"]
    assert [name for name, _ in parts_from_top(model, 1)] == ["layers 0 to 2", "connector", "vision tower"]
    assert [name for name, _ in parts_from_top(model, 2)[:2]] == ["layer 2", "layers 0 to 1"]
    taken = [id(parameter) for _, parameters in parts_from_top(model, 2) for parameter in parameters]
    assert len(taken) == len(set(taken))
    left = {name for name, parameter in model.named_parameters() if id(parameter) not in taken}
    assert left == {"lm_head.weight", "model.language_model.embed_tokens.weight", "model.language_model.norm.weight"}


def test_shuffling_keeps_every_value_and_is_seeded() -> None:
    layer = nn.Linear(20, 30)
    before = layer.weight.detach().clone()
    with weights_put_back(1) as shuffle:
        shuffle([layer.weight])
        once = layer.weight.detach().clone()
        shuffle([layer.weight, layer.bias])
        assert not torch.equal(layer.weight, once)
    assert torch.equal(layer.weight, before)
    assert torch.equal(once.flatten().sort().values, before.flatten().sort().values)
    assert (once == before).float().mean() < 0.1
    for seed, same in ((1, True), (2, False)):
        with weights_put_back(seed) as shuffle:
            shuffle([layer.weight])
            assert torch.equal(layer.weight, once) == same
    assert layer.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_come_back_bitwise_even_what_is_not_a_number(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-40, 3.0], dtype=dtype)
    parameter = nn.Parameter(values.clone())

    def failing() -> None:
        with weights_put_back() as shuffle:
            shuffle([parameter])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        failing()
    width = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert torch.equal(parameter.detach().view(width), values.view(width))


def test_ctrl_c_while_weights_are_put_back_waits_until_all_are() -> None:
    class Jumpy(nn.Parameter):
        """Is interrupted the first time it is put back."""

        writes = 0

        def copy_(self, source: torch.Tensor) -> torch.Tensor:
            Jumpy.writes += 1
            if Jumpy.writes == 2:
                raise KeyboardInterrupt
            return super().copy_(source)

    jumpy, plain = Jumpy(torch.arange(9.0)), nn.Parameter(torch.arange(9.0))
    with pytest.raises(KeyboardInterrupt), weights_put_back() as shuffle:
        shuffle([plain, jumpy])
    assert torch.equal(jumpy.detach(), torch.arange(9.0))
    assert torch.equal(plain.detach(), torch.arange(9.0))


# -- likeness of maps -----------------------------------------------------------------------


def test_structural_similarity_knows_equal_opposite_and_flat() -> None:
    values = np.random.default_rng(0).random((8, 8))
    assert ssim(values, values) == pytest.approx(1)
    assert ssim(values, 5 * values - 2) == pytest.approx(1)
    assert ssim(values, -values) < -0.5
    assert ssim(values, np.ones((8, 8))) == 0
    assert ssim(np.zeros((8, 8)), np.ones((8, 8))) == 1
    a, b = np.array([[0.0, 1.0], [0.0, 1.0]]), np.array([[0.0, 1.0], [1.0, 1.0]])  # one window: by hand
    light = (2 * 0.5 * 0.75 + 1e-4) / (0.25 + 0.5625 + 1e-4)
    contrast = (2 * (0.5 - 0.375) + 9e-4) / (0.25 + 0.1875 + 9e-4)
    assert ssim(a, b) == pytest.approx(light * contrast)


def test_a_moved_map_has_the_same_values_elsewhere() -> None:
    rng, values = np.random.default_rng(0), np.arange(20.0).reshape(4, 5)
    for _ in range(50):
        other = moved(values, rng)
        assert sorted(other.ravel()) == sorted(values.ravel())
        assert not np.array_equal(other, values)
    assert moved(np.arange(6.0).reshape(1, 6), rng).shape == (1, 6)
    maps = np.stack([[values], [-values]])
    np.testing.assert_allclose(top_likeness(values[None], maps, np.ones((4, 5), bool), 4), [[1], [0]])


def test_likeness_is_measured_where_the_picture_is() -> None:
    rng, seen = np.random.default_rng(1), np.zeros((3, 4), bool)
    seen[:2] = True
    first = rng.random((2, 3, 4))
    other = first.copy()
    other[:, 2] = 9 * rng.random((2, 4))  # only what holds no picture
    flat = np.ones_like(first)
    np.testing.assert_allclose(rank_likeness(first, np.stack([other, -first, flat]), seen), [[1, 1], [-1, -1], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(top_likeness(first, other[None], seen, 2), 1)
    np.testing.assert_allclose(top_likeness(first, flat[None], seen, 2), 2 / 8)
    assert rank_likeness(first, np.zeros((0, 2, 3, 4)), seen).shape == (0, 2)
