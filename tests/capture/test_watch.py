"""Watching attention: equal to eager, causal, free for the logits, and gone afterwards; single heads and the values they mix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from llava_lab.capture import (
    FUSIONS,
    Full,
    HeadRows,
    LayerByLayer,
    PickedRows,
    Reducer,
    fuse_heads,
    undisturbed,
    watch,
    watch_attention,
)
from llava_lab.capture.watch import attention_rows
from llava_lab.errors import LabError, OptionError
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers, used_vision_layers, vision_layers
from llava_lab.results import Run
from tests.support.checkpoints import build_llama_model, byte_tokenizer, llava_config
from tests.support.closeness import TERMS, close
from tests.support.leftovers import state_of
from tests.support.planted import scripted_run
from tests.support.rounding import in_dtype

LENGTH = 150  # more than two chunks of query rows


@pytest.fixture(scope="module", params=[4, 2], ids=["every head its own key", "keys shared by two heads"])
def model(request: pytest.FixtureRequest) -> LlavaForConditionalGeneration:
    config = llava_config(byte_tokenizer(), vision_layers=3, vocab=400)
    config.text_config.num_key_value_heads = request.param
    model = build_llama_model(config)
    with torch.no_grad():
        model(**_inputs(model))  # transformers installs its own recording hooks once, at the first forward
    return model


def _inputs(model: LlavaForConditionalGeneration, batch: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 300, (batch, LENGTH), generator=generator)
    ids[:, 20:36] = model.config.image_token_id
    pixels = torch.randn(batch, 3, 32, 32, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.fixture
def eager(model: LlavaForConditionalGeneration) -> Iterator[Callable[[dict[str, Tensor]], Any]]:
    """The reference way: eager attention with everything kept."""

    def run(inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        model.set_attn_implementation("eager")
        with torch.no_grad():
            language = model(**inputs, output_attentions=True).attentions
            vision = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
        return list(language), list(vision)

    yield run
    model.set_attn_implementation("sdpa")


def _capture(model: LlavaForConditionalGeneration, inputs: dict[str, Tensor]) -> tuple[Full, Full, Tensor]:
    layers, patches = language_layers(model), vision_layers(model)
    with undisturbed(model), watch_attention(layers, Full()) as text, watch_attention(patches, Full()) as vision:
        logits = model(**inputs).logits
    return text, vision, logits


def test_capture_equals_eager_in_both_towers(model: LlavaForConditionalGeneration, eager: Callable) -> None:
    inputs = _inputs(model)
    text, vision, _ = _capture(model, inputs)
    for ours, theirs in zip((text, vision), eager(inputs), strict=True):
        assert len(ours.attention) == len(theirs) == 3
        for layer, reference in enumerate(theirs):
            close(ours.attention[layer], reference, terms=TERMS)


def test_rows_sum_to_one_and_the_future_is_zero(model: LlavaForConditionalGeneration) -> None:
    text, vision, _ = _capture(model, _inputs(model))
    for full in (text, vision):
        for attention in full.attention.values():
            close(attention.sum(-1), torch.ones_like(attention[..., 0]), terms=TERMS)
    for attention in text.attention.values():
        assert attention.triu(1).abs().max() == 0
    assert vision.attention[0].triu(1).max() > 0, "the vision tower looks both ways"


def test_logits_are_bitwise_the_same_while_watched(model: LlavaForConditionalGeneration) -> None:
    inputs = _inputs(model)
    with torch.no_grad():
        plain = model(**inputs).logits
    assert torch.equal(plain, _capture(model, inputs)[2])


@pytest.mark.parametrize("padded", [False, True])
def test_output_mixed_from_the_reported_rows_is_sdpa_s_but_for_rounding(
    model: LlavaForConditionalGeneration, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mixing(Full):
        mixes = True

    inputs = _inputs(model, batch=2)
    if padded:
        inputs["attention_mask"][1, :5] = 0
    mixed: list[int] = []
    mix = watch._mix
    monkeypatch.setattr(watch, "_mix", lambda attention, value: (mixed.append(1), mix(attention, value))[1])
    full, _, logits = _capture(model, inputs)
    assert not mixed
    with undisturbed(model), watch_attention(language_layers(model), Mixing()) as mixing:
        same = model(**inputs).logits
    assert len(mixed) == 3 * 3  # blocks of rows in three layers
    close(same[inputs["attention_mask"].bool()], logits[inputs["attention_mask"].bool()], terms=TERMS)
    for layer, attention in full.attention.items():
        close(mixing.attention[layer], attention, terms=TERMS)
    mixed.clear()
    with in_dtype(model, torch.bfloat16), undisturbed(model), watch_attention(language_layers(model), Mixing()):
        model(**inputs | {"pixel_values": inputs["pixel_values"].bfloat16()})
    assert not mixed  # 16 bits keep sdpa's output


def test_left_padding_gives_the_same_attention_and_padded_rows_none(model: LlavaForConditionalGeneration) -> None:
    inputs = _inputs(model)
    whole, _, _ = _capture(model, inputs)
    pad = torch.full((1, 5), 2)
    padded = {
        "input_ids": torch.cat([pad, inputs["input_ids"]], 1),
        "attention_mask": torch.cat([torch.zeros_like(pad), inputs["attention_mask"]], 1),
        "position_ids": torch.cat([torch.zeros_like(pad), torch.arange(LENGTH)[None]], 1),
        "pixel_values": inputs["pixel_values"],
    }
    text, _, _ = _capture(model, padded)
    for layer, attention in text.attention.items():
        close(attention[:, :, 5:, 5:], whole.attention[layer], terms=TERMS)
        assert attention[:, :, 5:, :5].max() == 0


def test_a_batch_is_captured_row_by_row(model: LlavaForConditionalGeneration, eager: Callable) -> None:
    inputs = _inputs(model, batch=2)
    text, _, _ = _capture(model, inputs)
    for layer, reference in enumerate(eager(inputs)[0]):
        close(text.attention[layer], reference, terms=TERMS)


def test_decoding_with_a_cache_reports_the_new_rows(model: LlavaForConditionalGeneration) -> None:
    inputs = _inputs(model)
    whole, _, _ = _capture(model, inputs)

    class Steps(Reducer):
        def __init__(self) -> None:
            self.seen: list[tuple[int, int, int, Tensor]] = []

        def add(self, layer: int, rows: slice | Tensor, attention: Tensor) -> None:
            assert isinstance(rows, slice)
            self.seen.append((layer, rows.start, rows.stop, attention))

    short = {name: value[:, : LENGTH - 1] if value.ndim == 2 else value for name, value in inputs.items()}
    with undisturbed(model), watch_attention(language_layers(model), Steps(), calls=2) as steps:
        cache = model(**short, use_cache=True).past_key_values
        model(input_ids=inputs["input_ids"][:, -1:], attention_mask=inputs["attention_mask"], past_key_values=cache)
    last = [one for one in steps.seen if one[1] == LENGTH - 1]
    assert [one[0] for one in last] == [0, 1, 2]
    for layer, _, stop, attention in last:
        assert stop == LENGTH
        close(attention, whole.attention[layer][:, :, -1:], terms=TERMS)


def test_reducers_keep_what_they_say(model: LlavaForConditionalGeneration) -> None:
    inputs, layers = _inputs(model), language_layers(model)
    full, _, _ = _capture(model, inputs)
    seen: dict[int, Tensor] = {}
    with undisturbed(model):
        with watch_attention(layers, PickedRows([140, 3, 99], fusion="max", heads=(1, 2))) as picked:
            model(**inputs)
        with watch_attention(layers, LayerByLayer(lambda i, a, norms: seen.update({i: a.clone()}))):
            model(**inputs)
    for layer, attention in full.attention.items():
        close(seen[layer], attention[0].mean(0), terms=TERMS)
        want = fuse_heads(attention, "max", (1, 2))[:, [3, 99, 140]]
        close(picked.layers[layer], want, terms=TERMS)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_fused_rows_still_sum_to_one(fusion: str) -> None:
    attention = torch.randn(1, 3, 5, 7).softmax(-1)
    torch.testing.assert_close(fuse_heads(attention, fusion).sum(-1), torch.ones(1, 5))


def test_norms_are_those_of_the_branch_and_of_the_stream_it_joins(model: LlavaForConditionalGeneration) -> None:
    inputs, layers = _inputs(model), language_layers(model)
    text, _, _ = _capture(model, inputs)
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    kept: list[Tensor] = []
    handle = layers[1].self_attn.register_forward_hook(lambda module, args, output: kept.append(output[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    close(text.layer_norms[1].stream, states[1].norm(dim=-1), terms=TERMS)
    close(text.layer_norms[1].branch, kept[0].norm(dim=-1), terms=TERMS)


def test_bfloat16_is_captured_in_float32(model: LlavaForConditionalGeneration) -> None:
    inputs = _inputs(model)
    exact, _, _ = _capture(model, inputs)
    with in_dtype(model, torch.bfloat16):
        text, _, _ = _capture(model, inputs | {"pixel_values": inputs["pixel_values"].bfloat16()})
    assert text.attention[0].dtype == torch.float32
    # 8 bits of mantissa in the scores, and sharp attention: rows agree to about a percent
    assert (text.attention[0] - exact.attention[0]).abs().mean() < 1e-3


@pytest.mark.parametrize("how", [None, RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_behind(model: LlavaForConditionalGeneration, how: type[BaseException] | None) -> None:
    class Failing(Full):
        def close(self, layer: int, norms: Any) -> None:
            super().close(layer, norms)
            torch.rand(1)  # a random number drawn inside must not shift the stream outside
            if layer == 1 and how is not None:
                raise how("stop")

    model.train()
    model.model.vision_tower.eval()  # a mixture of training flags must come back as the same mixture
    first = next(model.parameters())
    first.requires_grad_(True)
    lab = SimpleNamespace(model=model, fingerprint="")
    before = state_of(lab)
    assert before["attention"] == ["sdpa"] * 3
    try:
        layers, patches = language_layers(model), vision_layers(model)
        with undisturbed(model), watch_attention(layers, Failing()), watch_attention(patches, Full()):
            assert not model.training
            model(**_inputs(model))
    except (RuntimeError, KeyboardInterrupt):
        assert how is not None
    else:
        assert how is None
    after = state_of(lab)
    first.requires_grad_(False)
    model.eval()
    assert after == before
    _capture(model, _inputs(model))  # and it can be watched again


def _watched(model: LlavaForConditionalGeneration, layers: Any, reducer: Reducer, *, batch: int = 1, forwards: int = 1) -> None:
    with undisturbed(model), watch_attention(layers, reducer):
        for _ in range(forwards):
            model(**_inputs(model, batch))


def test_silent_emptiness_is_refused(model: LlavaForConditionalGeneration) -> None:
    layers = language_layers(model)
    with pytest.raises(LabError, match="no forward ran"):
        _watched(model, layers, Full(), forwards=0)
    with pytest.raises(LabError, match=r"1 time\(s\), got \[2, 2, 2\]"):
        _watched(model, layers, Full(), forwards=2)


def test_watching_twice_or_nothing_is_refused(model: LlavaForConditionalGeneration) -> None:
    layers = language_layers(model)
    with watch_attention(layers, Full(), calls=0), pytest.raises(LabError, match="watched already"):
        _watched(model, layers[:1], Full())
    with pytest.raises(LabError, match="watched already"):
        _watched(model, [layers[0], layers[0]], Full())
    with pytest.raises(LabError, match="at least one layer"):
        _watched(model, [], Full())
    with pytest.raises(LabError, match="self_attn"):
        _watched(model, [model.lm_head], Full())
    with pytest.raises(OptionError, match="batch of 2"):
        _watched(model, layers, LayerByLayer(lambda *_: None), batch=2)


def test_unwatched_layers_run_as_before(model: LlavaForConditionalGeneration) -> None:
    inputs = _inputs(model)
    full, _, _ = _capture(model, inputs)
    with undisturbed(model), watch_attention(language_layers(model)[1:2], Full()) as one:
        model(**inputs)
    assert list(one.attention) == [0]
    close(one.attention[0], full.attention[1], terms=TERMS)


def test_a_causal_chunk_without_a_mask_needs_all_its_keys() -> None:
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    with pytest.raises(LabError, match="expected a mask for 3 new rows over 5 keys"):
        list(attention_rows(query, key, None, 0.5, causal=True))


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
        close(every.layers[layer], want, terms=TERMS)
        close(some.layers[layer], want[..., start:stop], terms=TERMS)


def test_mixed_rows_are_weighted_sums_over_all_chunks(tiny_random: Lab, run: Run) -> None:
    rows = list(range(*run.segments["answer"]))
    assert len(rows) > 64
    mix = torch.rand(3, len(rows), generator=torch.Generator().manual_seed(0))
    full = _watch(tiny_random, run, Full())
    mixed = _watch(tiny_random, run, HeadRows(rows, mix=mix))
    for layer, attention in full.attention.items():
        want = torch.einsum("nq,bhqk->bhnk", mix, attention[:, :, rows])
        close(mixed.layers[layer], want, terms=TERMS)


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
    close(torch.cat(outputs, 1), torch.cat(seen, 1), terms=TERMS)
