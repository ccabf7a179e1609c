"""Token knockout: blocked entries are really zero, the numbers are those of whole masked forwards, and a leak is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llava_lab.attribution import attribute
from llava_lab.capture import Full, undisturbed, watch_attention
from llava_lab.errors import LabError, OptionError
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers
from llava_lab.replay.alter import open_altered
from llava_lab.replay.prefix import Branches
from llava_lab.results import Run
from tests.support.planted import RED, planted_lab, red_picture, scripted_run

TARGETS = ["answer", "blue", ("blue", "green")]


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "The car is blue.", fit="crop")


def _masked(run: Run, columns: list[int], first_row: int) -> Tensor:
    """An additive mask for the whole sequence: causal, and rows from `first_row` on may not see `columns`."""
    size = len(run.token_ids)
    hidden = torch.ones(size, size, dtype=torch.bool).triu(1)
    hidden[first_row:, columns] = True
    return torch.zeros(1, 1, size, size).masked_fill_(hidden, torch.finfo(torch.float32).min)


def _naive(lab: Lab, run: Run, mask: Tensor) -> np.ndarray:
    """Scores of `TARGETS` by one whole forward under `mask`."""
    inputs = {**lab.inputs(run), "attention_mask": mask}
    with torch.no_grad():
        logprobs = lab.model(**inputs).logits[0].float().log_softmax(-1)
    start, stop = run.segments["answer"]
    word = run.word("blue")
    against = lab.tokenizer.encode(" green", add_special_tokens=False)[0]
    said = [
        float(sum(logprobs[i - 1, run.token_ids[i]] for i in range(a, b))) for a, b in ((start, stop), (word.start, word.stop))
    ]
    at = logprobs[word.start - 1]
    return np.array([*said, float(at[run.token_ids[word.start]] - at[against])])


@contextmanager
def _attention(lab: Lab, implementation: str) -> Iterator[None]:
    lab.model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        lab.model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("rows", ["answer", "text"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_equals_whole_forwards_under_a_mask(tiny_random: Lab, run: Run, rows: str, implementation: str) -> None:
    with _attention(tiny_random, implementation):
        rel = attribute(tiny_random, run, method="token_knockout", rows=rows, target=TARGETS)
    image = run.segments["image"]
    first = run.segments["answer"][0] - 1 if rows == "answer" else image[1]
    with _attention(tiny_random, "eager"):
        whole = _naive(tiny_random, run, _masked(run, [], first))
        drops = [whole - _naive(tiny_random, run, _masked(run, [column], first)) for column in range(*image)]
    limit = np.maximum(1e-5, 5e-7 * np.abs(whole))[:, None]  # float32 holds a score of -50 to 4e-6
    assert (np.abs(rel.values.reshape(3, 16) - np.stack(drops, 1)) <= limit).all()
    assert np.abs(rel.values).max() > 0.01


def test_a_block_hides_all_of_its_tokens(tiny_random: Lab, run: Run) -> None:
    rel = attribute(tiny_random, run, method="token_knockout", block=2, target=TARGETS)
    image, first = run.segments["image"][0], run.segments["answer"][0] - 1
    columns = [image + 4 * row + col for row in (2, 3) for col in (0, 1)]
    drop = _naive(tiny_random, run, _masked(run, [], first)) - _naive(tiny_random, run, _masked(run, columns, first))
    np.testing.assert_allclose(rel.values[:, 3, 1], drop, atol=3e-5)
    assert (rel.values[:, 2, 0] == rel.values[:, 3, 1]).all()


def test_blocked_entries_are_zero_and_rows_still_sum_to_one(tiny_random: Lab, run: Run) -> None:
    model, start = tiny_random.model, run.segments["answer"][0] - 1
    image = run.segments["image"][0]
    with undisturbed(model):
        altered: Any = open_altered(tiny_random, run, (run.target(),), at="projector", fill="mean")
        branches = Branches(tiny_random, run, (run.target(),), altered.values.flatten(2).mT, room=start + 3 * 20)
        tails = branches.sequence[:, start:].expand(2, -1, -1)
        blocked = torch.zeros(2, start, dtype=torch.bool)
        blocked[0, image + 3] = blocked[1, image + 8] = True
        layers = language_layers(model)
        with watch_attention(layers, Full()) as full:
            branches.score(tails, start, blocked)
    length = tails.shape[1]
    for layer in range(len(layers)):
        attention = full.attention[layer][0]  # H, both variants' rows, the shared beginning and both variants
        one, two = attention[:, -2 * length : -length], attention[:, -length:]
        assert (one[..., image + 3] == 0).all()
        assert (two[..., image + 8] == 0).all()
        assert (one[..., image + 8] > 0).all()
        assert (one[..., start + length :] == 0).all(), "the first variant sees the second"
        assert (two[..., start : start + length] == 0).all(), "the second variant sees the first"
        torch.testing.assert_close(attention.sum(-1)[:, -2 * length :], torch.ones(attention.shape[0], 2 * length))


def test_the_proof_is_reported(tiny_random: Lab, run: Run) -> None:
    extras = attribute(tiny_random, run, method="token_knockout").extras
    assert extras["blocked_change"] == 0
    assert extras["unblocked_change"] > 0.01


def test_a_mask_that_is_not_followed_is_refused(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault to fear: nothing is blocked, every drop is about zero, and it reads as "no patch matters"."""
    honest = Branches._mask
    monkeypatch.setattr(
        Branches, "_mask", lambda self, count, length, start, blocked, like: honest(self, count, length, start, None, like)
    )
    with pytest.raises(LabError, match="expected a blocked token to have no say, got a change of .*sdpa or eager"):
        attribute(tiny_random, run, method="token_knockout")


def test_the_poison_is_put_right_again(tiny_random: Lab, run: Run) -> None:
    start = run.segments["answer"][0] - 1
    with undisturbed(tiny_random.model):
        altered: Any = open_altered(tiny_random, run, (run.target(),), at="projector", fill="mean")
        branches = Branches(tiny_random, run, (run.target(),), altered.values.flatten(2).mT, room=start + 60)
        tail = branches.sequence[:, start:]
        before = branches.score(tail, start)
        with branches.poisoned(run.segments["image"][0]):
            assert not torch.allclose(branches.score(tail, start), before)
        torch.testing.assert_close(branches.score(tail, start), before, rtol=0, atol=0)
        with pytest.raises(AssertionError, match="a variant of another length"), branches.poisoned(run.segments["image"][0]):
            branches.score(tail[:, 1:], start)
        torch.testing.assert_close(branches.score(tail, start), before, rtol=0, atol=0)


def test_all_patches_cost_a_few_passes(tiny_random: Lab, run: Run) -> None:
    rel = attribute(tiny_random, run, method="token_knockout")
    assert rel.passes["forward"] < 7
    assert rel.extras["positions"] < 5 * len(run.token_ids)


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("rows", ["answer", "text"])
def test_a_planted_cause_is_found(fit: str, rows: str) -> None:
    lab = planted_lab()
    picture = red_picture(80, 120, (10, 60, 30, 80))
    run = scripted_run(lab, picture, "The car is red.", fit=fit)
    covered = run.map.mask_to_patches((picture == np.array(RED)).all(-1))
    for target in ("red", ("red", "blue")):
        values = attribute(lab, run, method="token_knockout", rows=rows, target=target).values[0]
        assert covered.ravel()[values.argmax()] > 0.99 * covered.max()
        assert values[covered == 1].min() > values[covered == 0].max()


def test_ctrl_c_gives_the_finished_part(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_lab.attribution.occlusion.ROWS", 20)
    whole = attribute(tiny_random, run, method="token_knockout")
    length = run.segments["answer"][1] - run.segments["answer"][0]
    done = 2 * (20 // length)
    calls, forward = 0, tiny_random.model.forward

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:  # the plain forward, the kept one, two passes of variants
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(tiny_random.model, "forward", interrupted)
    part = attribute(tiny_random, run, method="token_knockout")
    assert 0 < done < 16
    np.testing.assert_allclose(part.values[0].ravel()[:done], whole.values[0].ravel()[:done], atol=1e-5)
    assert (part.values[0].ravel()[done:] == 0).all()
    assert f"Interrupted after {done} of 16 blocks; patches not reached are 0." in part.notes
    calls = 2
    with pytest.raises(KeyboardInterrupt):
        attribute(tiny_random, run, method="token_knockout")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": "image"}, "rows must be one of 'answer', 'text', got 'image'"),
        ({"block": 5}, "block must be at most 4 .* got 5"),
    ],
)
def test_options_out_of_range_are_refused(tiny_random: Lab, run: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        attribute(tiny_random, run, method="token_knockout", **options)
