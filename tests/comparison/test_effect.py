"""What a linear stand-in changes in the answers: nothing for a line, something for the controls, and by the stated measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llava_lab as ll
from llava_lab.comparison import effect as of_effects
from llava_lab.comparison.effect import plugged
from llava_lab.errors import OptionError
from llava_lab.evaluation.items import load_items
from llava_lab.evaluation.scoring import answer_all

PICTURES = [np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8) for i in range(16)]


@pytest.mark.long
def test_effects_are_nothing_for_a_line_and_something_for_the_controls(tiny_folder: Path, tmp_path: Path) -> None:
    lab = ll.load(tiny_folder)
    lab.swap(ll.new_connector(lab, "linear", seed=4))
    name = lab.fingerprint
    fit = ll.linearize(lab, PICTURES, ridge=0)
    effect = ll.linear_effect(lab, fit, n=2, ranks=(1,), progress=False)
    assert lab.fingerprint == name
    assert effect.variants == ("linear", "rank 1", "mean", "shuffle", "random")
    assert effect.types[0] == "all"
    assert effect.questions[0] == effect.questions[1:].sum() == 8
    assert effect.kl[0].max() < 1e-4
    assert not effect.flipped[0].any()
    assert not effect.accuracy_change[0].any()
    assert (effect.kl[1:, 0] > 1e-4).all()
    row = effect.row("random")
    low, high = row["kl_interval"]  # type: ignore[misc]
    assert low <= row["kl"] <= high  # type: ignore[operator]
    again = ll.LinearEffect.load(effect.save(tmp_path / "effect.npz"))
    assert np.array_equal(again.kl, effect.kl)
    with pytest.raises(OptionError, match="expected one of linear, rank 1, mean"):
        effect.row("median")


def test_kl_is_over_every_position_that_predicts_the_answer_and_its_end(tiny_folder: Path) -> None:
    lab = ll.load(tiny_folder)
    fit = ll.linearize(lab, PICTURES, ridge=0)
    effect = ll.linear_effect(lab, fit, n=1, progress=False)
    items = load_items("picturebook", split="test", n=1, seed=0)

    def by_hand(item: Any, answer: str) -> np.ndarray:
        prompt = lab.sequence(item.question).token_ids
        ids = np.concatenate([prompt, lab.tokenizer.encode(f" {answer}", add_special_tokens=False)])
        with torch.no_grad():
            out = lab.model(input_ids=torch.from_numpy(ids)[None], pixel_values=lab.pixels(item.draw()))
        return out.logits[0, len(prompt) - 1 :].double().log_softmax(-1).numpy()

    answers = answer_all(lab, items, progress=False)
    own = [by_hand(*pair) for pair in zip(items, answers, strict=True)]
    with plugged(lab, fit, "mean"):
        said = [by_hand(*pair) for pair in zip(items, answers, strict=True)]
    kl = [(np.exp(a) * (a - b)).sum(-1).mean() for a, b in zip(own, said, strict=True)]
    assert len(own[0]) > 1
    assert effect.row("mean")["kl"] == pytest.approx(np.mean(kl), rel=1e-3)


def test_intervals_are_over_pictures_and_not_questions() -> None:
    """Eight questions about a picture that go the same way say no more than one."""
    rng, pictures = np.random.default_rng(0), np.arange(12)
    rows = [tuple(rng.normal(size=(3, 12))) for _ in range(2)]
    often = [tuple(np.repeat(values, 8) for values in row) for row in rows]
    masks = [np.ones(12, bool), pictures < 7]
    once = of_effects._table(rows, masks, pictures, 0)
    again = of_effects._table(often, [np.repeat(mask, 8) for mask in masks], np.repeat(pictures, 8), 0)
    for name, values in once.items():
        np.testing.assert_allclose(again[name], values, err_msg=name)
