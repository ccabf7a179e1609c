"""The log-sum-exp of sdpa's own kernel: the same output, the same attention, and a softmax where it cannot be had."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llava_lab.capture import Full, LayerByLayer, fused, undisturbed, watch, watch_attention
from llava_lab.capture.fused import KERNELS, attend_with_lse
from llava_lab.capture.watch import attention_rows
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers, used_vision_layers
from tests.support.closeness import TERMS, close

LENGTH, HEADS, WIDTH = 150, 4, 16
SCALING = WIDTH**-0.5
PICTURE = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
sdpa = torch.nn.functional.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def checked_afresh() -> Iterator[None]:
    fused._trusted.cache_clear()
    yield
    fused._trusted.cache_clear()


def _parts(dtype: torch.dtype = torch.float32, groups: int = HEADS, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, heads, LENGTH, WIDTH) for heads in (HEADS, groups, groups)]
    # sharp attention: scores of up to about twenty
    query, key, value = (3 * torch.randn(shape, generator=draw) for shape in shapes)
    return query.to(device, dtype), key.to(device, dtype), value.to(device, dtype)


def _padding() -> Tensor:
    """Causal, the second sequence padded by five on the left, whose rows may look nowhere."""
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(2, 1, -1, -1).clone()
    mask[1, :, :, :5] = False
    return mask


@pytest.mark.parametrize("groups", [HEADS, 2])
@pytest.mark.parametrize("form", ["causal", "both ways", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_is_sdpa_s_bit_for_bit_and_rows_are_the_softmax_s(dtype: torch.dtype, form: str, groups: int) -> None:
    query, key, value = _parts(dtype, groups)
    mask = _padding() if form == "padded" else None
    given = attend_with_lse(query, key, value, mask, SCALING, causal=form != "both ways")
    assert given is not None
    plain = sdpa(query, key, value, attn_mask=mask, is_causal=form == "causal", scale=SCALING, enable_gqa=groups < HEADS)
    assert torch.equal(given.output.nan_to_num(), plain.nan_to_num())
    for rows in (None, [3, 70, 149]):
        options: dict[str, Any] = {"causal": form != "both ways", "rows": rows, "chunk": 64}
        own = list(attention_rows(query, key, mask, SCALING, **options, lse=given.lse))
        softmax = list(attention_rows(query, key, mask, SCALING, **options))
        for (_, ours), (_, theirs) in zip(own, softmax, strict=True):
            close(ours, theirs, terms=WIDTH, dtype=torch.float32 if dtype == torch.float32 else torch.float16)
            assert ours.dtype == torch.float32  # whatever the model's dtype
            assert bool(((theirs > 0) | (ours == 0)).all())


def test_what_it_cannot_do_is_none() -> None:
    query, key, value = _parts()
    assert attend_with_lse(query, key, value, torch.zeros(1, 1, LENGTH, LENGTH), SCALING, causal=True) is None
    assert attend_with_lse(query[:, :, -3:], key, value, None, SCALING, causal=True) is None
    assert attend_with_lse(query, key, value[..., :7], None, SCALING, causal=True) is None  # sdpa takes another kernel
    for moved in ({"dtype": torch.float64}, {"device": "meta"}):
        q, k, v = (part.to(**moved) for part in (query, key, value))
        assert attend_with_lse(q, k, v, None, SCALING, causal=True) is None


def _watched(lab: Lab, inputs: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    layers, tower = language_layers(lab.model), used_vision_layers(lab.model)
    with undisturbed(lab.model), watch_attention(layers, Full()) as text, watch_attention(tower, Full()) as vision:
        logits = lab.model(**inputs).logits
    return [*text.attention.values(), *vision.attention.values()], logits


@pytest.mark.parametrize("broken", ["wrong sums", "another output", "no such operator", "no choice to ask for"])
def test_a_kernel_that_does_not_hold_is_not_used(tiny_random: Lab, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_random.ask(PICTURE, "What is it?", max_new_tokens=3)
    inputs = tiny_random.inputs(run)
    inputs["attention_mask"][:, :3] = 0  # left padding
    taken: list[bool] = []
    used = watch.with_lse
    monkeypatch.setattr(watch, "with_lse", lambda call: (taken.append((got := used(call)) is not None), got)[1])
    expected, logits = _watched(tiny_random, inputs)
    assert taken
    assert all(taken)
    right = KERNELS["cpu", "FLASH_ATTENTION"]

    def wrong(*parts: Any) -> tuple[Tensor, Tensor]:
        if broken == "no such operator":
            raise AttributeError("gone")
        output, lse = right(*parts)
        return (output, lse + 1e-3) if broken == "wrong sums" else (output + 1e-7, lse)

    if broken == "no choice to ask for":
        monkeypatch.delattr(torch, "_fused_sdp_choice")
    else:
        monkeypatch.setattr(fused, "KERNELS", {("cpu", "FLASH_ATTENTION"): wrong})
    fused._trusted.cache_clear()
    taken.clear()
    found, same = _watched(tiny_random, inputs)
    assert taken
    assert not any(taken)
    assert torch.equal(logits, same)
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs, terms=TERMS)


def test_gradients_and_dropout_take_the_plain_way(tiny_random: Lab) -> None:
    query, key, value = _parts()
    module = language_layers(tiny_random.model)[0].self_attn
    call = watch.Attention(module, query, key, value, None, SCALING, True)
    assert watch.with_lse(call) is not None
    assert watch.with_lse(watch.Attention(module, query, key, value, None, SCALING, True, 0.1)) is None
    assert watch.with_lse(watch.Attention(module, query.requires_grad_(), key, value, None, SCALING, True)) is None


def test_the_mean_over_heads_is_handed_over_layer_by_layer(tiny_random: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_random.ask(PICTURE, "What is it?", max_new_tokens=3)

    def folded() -> list[Tensor]:
        seen: list[Tensor] = []
        reducer = LayerByLayer(lambda layer, attention, norms: seen.append(attention.clone()))
        with undisturbed(tiny_random.model), watch_attention(language_layers(tiny_random.model), reducer):
            tiny_random.model(**tiny_random.inputs(run))
        return seen

    own = folded()
    monkeypatch.setattr(watch, "with_lse", lambda call: None)
    for ours, theirs in zip(own, folded(), strict=True):
        close(ours, theirs, terms=TERMS)


@pytest.mark.parametrize(("device", "name"), [key for key in KERNELS if key[0] != "cpu"])
@pytest.mark.parametrize("masked", [False, True])
def test_kernels_of_other_devices_are_called_as_torch_wants_them(device: str, name: str, masked: bool) -> None:
    """On tensors without numbers: the operator takes what it is given, and output and log-sum-exp have their shapes."""
    query, key, value = _parts(torch.bfloat16, 2 if name == "EFFICIENT_ATTENTION" else HEADS, "meta")
    mask = _padding().to("meta") if masked else None
    if masked and name == "FLASH_ATTENTION":
        with pytest.raises(ValueError, match="no mask"):
            KERNELS[device, name](query, key, value, mask, False, SCALING)
        return
    output, lse = KERNELS[device, name](query, key, value, mask, not masked, SCALING)
    assert output.shape == query.shape
    assert lse.shape == query.shape[:3]
