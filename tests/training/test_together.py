"""Connectors trained together: the lean step's gradients are the stock forward's, and each learns as it would alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llava_lab as ll
from llava_lab.errors import OptionError
from llava_lab.models import Lab
from llava_lab.training.recipe import LlavaStage
from llava_lab.training.text import IGNORE
from llava_lab.training.together import LeanStep, Texts, like_llama, texts, train_connectors, training
from tests.support.training_rows import turn, write_json, write_rows

KINDS: dict[str, dict[str, Any]] = {"linear": {}, "mlp2x_gelu": {}, "avgpool": {"side": 2}}
RECIPE = LlavaStage("align", ("multi_modal_projector",), rate=1e-2, batch=4)


def example_rows(image_id: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Three rows of unequal length with 5 shared ids; the last has no picture."""
    rng = np.random.default_rng(0)
    rows = []
    for tail, seen in ((4, True), (9, True), (6, False)):
        own = rng.integers(5, 60, tail)
        ids = np.concatenate([np.arange(5, 10), [10 + tail], [image_id] * seen, own])
        labels = np.where(np.arange(len(ids)) >= len(ids) - 3, ids, IGNORE)
        rows.append((ids.astype(np.int64), labels.astype(np.int64)))
    return rows


def stock_loss(lab: Lab, rows: list[tuple[np.ndarray, np.ndarray]], pixels: torch.Tensor) -> torch.Tensor:
    """Mean over labelled tokens by transformers' own forward, one row at a time, through tower and connector in place."""
    total, count, picture = torch.zeros(()), 0, 0
    size = lab.grid[0] * lab.grid[1]
    for ids, labels in rows:
        repeats = np.where(ids == lab.image_id, size, 1)
        given = {"input_ids": torch.from_numpy(np.repeat(ids, repeats))[None]}
        if (ids == lab.image_id).any():
            given["pixel_values"], picture = pixels[picture : picture + 1], picture + 1
        logits = lab.model(**given).logits[0, :-1]
        wanted = torch.from_numpy(np.repeat(labels, repeats))[1:]
        total = total + torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="sum")
        count += int((wanted != IGNORE).sum())
    return total / count


def seen(lab: Lab) -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def gradients(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lean", [True, False])
def test_gradients_are_the_frozen_full_forward_s(tiny_random: Lab, kind: str, lean: bool) -> None:
    from llava_lab.training.features import tower_features

    made, rows, pixels = ll.new_connector(tiny_random, kind, **KINDS[kind]), example_rows(tiny_random.image_id), seen(tiny_random)
    words = texts(rows, tiny_random.image_id)
    assert len(words.prefix) == 5
    step = LeanStep(tiny_random.model)
    assert step.lean
    step.lean = lean
    with training(tiny_random.model, [made]):
        mine = step.loss(made, words, tower_features(tiny_random.model, pixels)) / words.count
        mine.backward()
        found = gradients(made).clone()
        made.zero_grad()
        with ll.connector(tiny_random, made):
            made.requires_grad_(True)
            theirs = stock_loss(tiny_random, rows, pixels)
            theirs.backward()
        expected = gradients(made)
        assert float(expected.abs().max()) > 1e-3
        assert abs(float(mine.detach() - theirs.detach())) < 1e-5
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def test_words_are_cut_where_labels_or_pictures_begin() -> None:
    rows = [(np.array([1, 99, 4, 5]), np.array([IGNORE, IGNORE, 4, 5])), (np.array([1, 7, 8]), np.array([IGNORE, 7, 8]))]
    found = texts(rows, 99)
    assert found.prefix.tolist() == []  # the first id of the second row predicts a label, so it cannot be shared
    assert [part.tolist() for part in found.before] == [[1], [1, 7]]
    assert [None if part is None else part.tolist() for part in found.after] == [[4], None]
    assert [part.tolist() for part in found.labels] == [[IGNORE, 4, 5], [7, 8]]
    assert found.count == 4
    assert texts(rows[:1], 99).prefix.tolist() == [1]
    with pytest.raises(OptionError, match="a row has 2 pictures, expected one at most"):
        texts([(np.array([99, 99, 3]), np.array([IGNORE, IGNORE, 3]))], 99)


def test_prefix_is_computed_once_and_other_architectures_go_whole(tiny_random: Lab) -> None:
    step, made = LeanStep(tiny_random.model), ll.new_connector(tiny_random, "linear")
    words: Texts = texts(example_rows(tiny_random.image_id), tiny_random.image_id)
    features = torch.randn(2, 16, 32)
    with torch.no_grad():
        first = step.loss(made, words, features)
        held = next(iter(step._prefixes.values()))
        again = step.loss(made, words, features)
    assert torch.equal(first, again)
    assert next(iter(step._prefixes.values())) is held
    language = tiny_random.model.model.language_model
    assert like_llama(language)
    language.config.sliding_window = 8
    try:
        assert not like_llama(language)
    finally:
        del language.config.sliding_window


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    write_rows(tmp_path, count=1)  # for its pictures
    said = ("a red car", "a blue house left of the tree", "three stars", "a green fish", "no flower", "the large white cup")
    rows = [
        {"id": str(i), "image": f"images/{i}.png", "conversations": turn("<image>\nDescribe it.", text)}
        for i, text in enumerate(said)
    ]
    return write_json(tmp_path / "captions.json", rows)


def made(lab: Lab) -> dict[str, torch.nn.Module]:
    return {kind: ll.new_connector(lab, kind, **options) for kind, options in KINDS.items()}


def test_together_is_as_alone_and_leaves_the_lab_as_it_was(tiny_random: Lab, captions: Path, tmp_path: Path) -> None:
    before, flags = tiny_random.fingerprint, [p.requires_grad for p in tiny_random.model.parameters()]
    together, alone = made(tiny_random), made(tiny_random)
    options: dict[str, Any] = {"recipe": RECIPE, "steps": 6, "cache": tmp_path / "cache", "progress": False}
    told: list[int] = []
    found = train_connectors(tiny_random, together, captions, told=lambda step, _: told.append(step), **options)
    for kind in KINDS:
        own = train_connectors(tiny_random, {kind: alone[kind]}, captions, **options)
        assert own[kind].losses == found[kind].losses
        assert all(torch.equal(a, b) for a, b in zip(alone[kind].parameters(), together[kind].parameters(), strict=True))
        assert found[kind].losses[-1] < found[kind].losses[0]
    assert told == [1, 2, 3, 4, 5, 6]
    assert tiny_random.fingerprint == before
    assert [p.requires_grad for p in tiny_random.model.parameters()] == flags
    assert not any(p.requires_grad or p.grad is not None for one in together.values() for p in one.parameters())


def test_a_connector_that_diverges_ends_alone(tiny_random: Lab, captions: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"recipe": RECIPE, "steps": 4, "cache": tmp_path / "cache", "progress": False}
    together, alone = made(tiny_random), made(tiny_random)
    lost = "mlp2x_gelu"
    rest = [kind for kind in KINDS if kind != lost]
    found = train_connectors(tiny_random, together, captions, rates={lost: 1e30}, **options)
    assert (found[lost].stopped, found[lost].steps < 4) == ("diverged", True)
    assert np.isfinite(found[lost].losses).all()
    assert all(torch.isfinite(p).all() for p in together[lost].parameters())
    for kind in rest:
        assert (found[kind].stopped, found[kind].steps) == ("finished", 4)
        assert train_connectors(tiny_random, {kind: alone[kind]}, captions, **options)[kind].losses == found[kind].losses


def test_no_cache_smaller_parts_and_bf16_learn_the_same(tiny_random: Lab, captions: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"recipe": RECIPE, "steps": 4, "progress": False}
    plain = train_connectors(tiny_random, made(tiny_random), captions, cache=tmp_path / "cache", **options)
    parts = train_connectors(tiny_random, made(tiny_random), captions, cache=False, device_batch=1, **options)
    half = train_connectors(tiny_random, made(tiny_random), captions, cache=tmp_path / "cache", bf16=True, **options)
    for kind in KINDS:
        np.testing.assert_allclose(parts[kind].losses, plain[kind].losses, rtol=1e-4)
        np.testing.assert_allclose(half[kind].losses, plain[kind].losses, rtol=0.03)
        assert half[kind].losses != plain[kind].losses


def test_cached_features_mean_no_vision_afterwards(
    tiny_random: Lab, captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"recipe": RECIPE, "steps": 2, "cache": tmp_path / "cache", "progress": False}
    train_connectors(tiny_random, made(tiny_random), captions, **options)
    tower = tiny_random.model.model.vision_tower
    monkeypatch.setattr(tower, "forward", lambda *args, **more: pytest.fail("the tower ran again"))
    train_connectors(tiny_random, made(tiny_random), captions, **{**options, "steps": 4}, seed=1)


def test_what_does_not_fit_is_refused(tiny_random: Lab, captions: Path) -> None:
    one = ll.new_connector(tiny_random, "linear")
    for connectors, options, expected in (
        ({}, {}, "no connectors: give at least one"),
        ({"a": one, "b": one}, {}, "two names share one connector"),
        ({"a": one}, {"rates": {"b": 1e-3}}, "rates name b, the connectors are a"),
        ({"a": one}, {"steps": 0}, "steps must be 1 or more, got 0"),
        ({"a": one}, {"device_batch": 0}, "device_batch must be 1 or more, got 0"),
        ({"a": torch.nn.Identity()}, {}, "connector 'a' has no parameters"),
    ):
        with pytest.raises(OptionError, match=expected):
            train_connectors(tiny_random, connectors, captions, **options)
