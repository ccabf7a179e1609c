"""What changes how much a model makes up: contrast decoding by hand, cuts in a batch as in single questions, controls beside."""

from __future__ import annotations

import sys
from functools import partial

import numpy as np
import pytest
import torch

import llava_lab as ll
from llava_lab.errors import OptionError
from llava_lab.evaluation import Item, answer_all
from llava_lab.evaluation.hallucination import arms_of, blindfold, grained, hallucination, noised, pushing
from llava_lab.evaluation.scoring import Change
from llava_lab.models.generation import Contrast
from llava_lab.models.layout import language_layers

QUESTIONS = ("What color is the car?", "Is there a blue house left of the tree?", "How many stars?", "Car?")


@pytest.fixture(scope="module")
def items() -> list[Item]:
    rng = np.random.default_rng(0)
    draws = [partial(np.copy, rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)) for _ in range(3)]
    return [Item(str(i), draw, text, "", "", "all") for i, draw in enumerate(draws) for text in QUESTIONS]


def arms_with(lab, draws: int):
    clear = torch.eye(lab.model.config.text_config.hidden_size)[0]
    return arms_of(lab, clear, alpha=1, beta=0.1, noise=5, push=0.1, seed=0, draws=draws)


def test_a_contrast_by_hand() -> None:
    """Twice 2, 1, 0 less 0, 1, 2 is 4, 1, -2. The picture gives 2; half of its likeliest is 2 + log(0.5) = 1.31: two go."""
    clean, other = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
    assert Contrast(torch.zeros(1, 3, 2, 2), 1.0, 0.1).apply(clean, other).tolist() == [[4.0, 1.0, -2.0]]
    assert Contrast(torch.zeros(1, 3, 2, 2), 1.0, 0.5).apply(clean, other).tolist() == [[4.0, -np.inf, -np.inf]]


def test_a_contrast_with_itself_or_of_no_weight_changes_nothing(tiny_random, items) -> None:
    plain = answer_all(tiny_random, items, max_new_tokens=6, batch=5, progress=False)
    for contrast in (lambda pixels: Contrast(pixels, 1.0), lambda pixels: Contrast(pixels.flip(-1), 0.0)):
        changed = Change(contrast=contrast)
        assert answer_all(tiny_random, items, max_new_tokens=6, batch=5, progress=False, change=changed) == plain


def test_a_contrast_keeps_a_cache_of_its_own(tiny_random, items) -> None:
    """Token by token on two caches gives what whole forwards of both sides give."""
    item, lab = items[0], tiny_random
    changed = Change(contrast=lambda pixels: Contrast(pixels.flip(-1), 2.0, 1e-6))
    (said,) = answer_all(lab, [item], max_new_tokens=5, progress=False, change=changed)
    ids = torch.from_numpy(lab.sequence(item.question).token_ids)[None]
    pixels, new = lab.pixels(item.drawn(), None), []
    for _ in range(5):
        both = [lab.model(input_ids=ids, pixel_values=shown).logits[:, -1] for shown in (pixels, pixels.flip(-1))]
        logits = Contrast(pixels, 2.0, 1e-6).apply(*both)
        logits[:, lab.image_id] = -np.inf
        token = int(logits.argmax())
        if token in lab.eos_ids:
            break
        new.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    assert said == lab.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_a_cut_in_a_batch_is_the_cut_of_single_questions(tiny_random, items) -> None:
    window = (1, 3)
    changed = Change(around=partial(blindfold, window=window))
    batched = answer_all(tiny_random, items, max_new_tokens=6, batch=5, progress=False, change=changed)
    single = []
    for item in items:
        run = tiny_random.ask(item.drawn(), item.question, max_new_tokens=6)
        with ll.knocked_out(tiny_random, run, source="image", target="last", layers=window):
            single.append(tiny_random.ask(item.drawn(), item.question, max_new_tokens=6).answer.strip())
    assert batched == single
    assert batched != answer_all(tiny_random, items, max_new_tokens=6, batch=5, progress=False)


def test_a_push_in_a_batch_is_the_push_of_single_questions(tiny_random, items) -> None:
    direction = np.random.default_rng(1).normal(size=tiny_random.model.config.text_config.hidden_size).astype(np.float32)
    unit, layers = torch.from_numpy(direction / np.linalg.norm(direction)), len(language_layers(tiny_random.model))
    changed = Change(around=partial(pushing, window=(0, layers), unit=unit, amount=0.8))
    batched = answer_all(tiny_random, items[:4], max_new_tokens=4, progress=False, change=changed)
    single = []
    for item in items[:4]:
        run = tiny_random.ask(item.drawn(), item.question, max_new_tokens=4)
        with ll.steered(tiny_random, run, direction=direction, alpha=0.8):
            single.append(tiny_random.ask(item.drawn(), item.question, max_new_tokens=4).answer.strip())
    assert batched == single


def test_noise_takes_the_picture_away_step_by_step() -> None:
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    like = [
        float(torch.corrcoef(torch.stack([pixels.flatten(), noised(pixels, step).flatten()]))[0, 1]) for step in (0, 500, 999)
    ]
    assert like[0] > 0.999
    assert 0.5 < like[1] < 0.95
    assert like[2] < 0.35
    assert torch.equal(noised(pixels, 500, seed=1), noised(pixels, 500, seed=1))
    assert not torch.equal(noised(pixels, 500, seed=1), noised(pixels, 500, seed=2))


def test_each_change_stands_beside_its_control(tiny_random, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["llava_lab.evaluation.hallucination"], "LONGEST", 8)
    weights = tiny_random.fingerprint
    scores = hallucination(tiny_random, n=2, draws=2, grain=60, progress=False)
    arms = arms_with(tiny_random, draws=2)
    assert scores.controls == tuple(dict.fromkeys(name for arm in arms for name in (arm.name, arm.control)))
    assert [len(arm.controlled) for arm in arms] == [2, 1, 2, 2]
    assert len(scores.about["against"]) == 4 * len(scores.measures)
    assert len(scores.notes) == 8
    for row in scores.about["against"]:
        change, control = (scores.at(row["measure"], row[side])["value"] for side in ("change", "control"))
        assert row["difference"] == pytest.approx(change - control, nan_ok=True)
        assert np.mean(row["each"]) == pytest.approx(row["difference"], nan_ok=True)
    assert set(scores.about["answers"]) == {"as it is", *scores.controls}
    assert tiny_random.fingerprint == weights
    assert str(scores.table())


def test_controls_by_lot_differ_from_draw_to_draw(tiny_random) -> None:
    *_, steering = arms_with(tiny_random, draws=3)
    units = [change.around.keywords["unit"] for change in steering.controlled]
    assert [float(unit.norm()) for unit in units] == pytest.approx([1.0, 1.0, 1.0])
    assert all(abs(float(one @ other)) < 0.9 for one, other in ((units[0], units[1]), (units[1], units[2])))
    assert float(steering.change.around.keywords["unit"][0]) == 1.0  # the last arm steers along what it was given
    contrast, *_ = arms_with(tiny_random, draws=2)
    pixels = torch.arange(3.0)[:, None, None, None].expand(3, 3, 2, 2)
    others = [change.contrast(pixels).pixel_values[:, 0, 0, 0].tolist() for change in contrast.controlled]
    assert others == [[2.0, 0.0, 1.0], [1.0, 2.0, 0.0]]


def test_grain_is_noise_of_the_stated_size_and_the_same_for_every_question_about_a_picture(items) -> None:
    grey = [Item(str(i), partial(np.full, (64, 64, 3), 128, np.uint8), text, "", "", "all") for i in (0, 1) for text in "ab"]
    shown = grained(grey, 20, seed=1)
    assert shown[0].draw is shown[1].draw
    first, second, again = (one.drawn().astype(float) for one in (shown[0], shown[2], grained(grey, 20, seed=1)[1]))
    assert first.std() == pytest.approx(20, rel=0.03)
    assert first.mean() == pytest.approx(128, abs=1)
    assert np.abs(first - second).mean() > 10
    assert np.array_equal(first, again)
    assert grained(items, 0) == items


def test_what_makes_no_sense_is_refused(tiny_random) -> None:
    for wrong in ({"noise": 1000}, {"beta": 0.0}, {"beta": 1.5}, {"alpha": -1.0}, {"grain": -1.0}, {"draws": 0}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            hallucination(tiny_random, n=1, **wrong)
