"""Watching single heads and the values they mix: rows as kept in full, weighted sums as of kept rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llava_lab.capture import Full, HeadRows, Reducer, undisturbed, watch_attention
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers, used_vision_layers
from llava_lab.results import Run
from tests.support.planted import scripted_run


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "The car is blue. " * 20)  # answer rows in more than one chunk


def _watch(lab: Lab, run: Run, reducer: Any, *, vision: bool = False) -> Any:
    layers = used_vision_layers(lab.model) if vision else language_layers(lab.model)
    with undisturbed(lab.model), watch_attention(layers, reducer):
        lab.model(**lab.inputs(run))
    return reducer


def test_head_rows_are_the_rows_of_every_head(tiny_random: Lab, run: Run) -> None:
    full = _watch(tiny_random, run, Full())
    start, stop = run.segments["image"]
    end = len(run.token_ids)
    rows = [end - 1, 3, start, *range(end - 90, end, 2)]
    some = _watch(tiny_random, run, HeadRows(rows, columns=slice(start, stop)))
    every = _watch(tiny_random, run, HeadRows(rows))
    for layer, attention in full.attention.items():
        want = attention[:, :, sorted(set(rows))]
        torch.testing.assert_close(every.layers[layer], want, atol=1e-6, rtol=0)
        torch.testing.assert_close(some.layers[layer], want[..., start:stop], atol=1e-6, rtol=0)


def test_mixed_rows_are_weighted_sums_over_all_chunks(tiny_random: Lab, run: Run) -> None:
    rows = list(range(*run.segments["answer"]))
    assert len(rows) > 64
    mix = torch.rand(3, len(rows), generator=torch.Generator().manual_seed(0))
    full = _watch(tiny_random, run, Full())
    mixed = _watch(tiny_random, run, HeadRows(rows, mix=mix))
    for layer, attention in full.attention.items():
        want = torch.einsum("nq,bhqk->bhnk", mix, attention[:, :, rows])
        torch.testing.assert_close(mixed.layers[layer], want, atol=1e-5, rtol=0)


def test_rows_that_are_kept_do_not_hold_on_to_whole_chunks(tiny_random: Lab, run: Run) -> None:
    kept = _watch(tiny_random, run, HeadRows([5, 9], columns=slice(2, 4)))
    for part in kept.layers.values():
        assert part.untyped_storage().nbytes() == part.numel() * 4


@pytest.mark.parametrize("vision", [False, True], ids=["language model", "vision tower"])
def test_values_come_before_the_rows_and_give_the_layers_output(tiny_random: Lab, run: Run, vision: bool) -> None:
    outputs: list[Tensor] = []

    class Mixed(Reducer):
        def values(self, layer: int, value: Tensor) -> None:
            self.value = value

        def add(self, layer: int, rows: slice | Tensor, attention: Tensor) -> None:
            mixed = attention @ self.value[:, :, : attention.shape[-1]].float()
            outputs.append(mixed.transpose(1, 2).flatten(2))

    layers = (used_vision_layers if vision else language_layers)(tiny_random.model)
    seen: list[Tensor] = []
    name = "out_proj" if vision else "o_proj"
    handles = [
        getattr(layer.self_attn, name).register_forward_pre_hook(lambda module, args: seen.append(args[0])) for layer in layers
    ]
    _watch(tiny_random, run, Mixed(), vision=vision)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(torch.cat(outputs, 1), torch.cat(seen, 1), atol=1e-5, rtol=0)
