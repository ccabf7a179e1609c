"""Image against text: KL by its definition, Shapley values against games with known values, planted extremes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import llava_lab as ll
from llava_lab.attribution import attribute, image_share
from llava_lab.attribution.image_share import (
    Pieces,
    divergence,
    find_players,
    shapley_orders,
    share_interval,
    share_of,
    stand_in_token,
)
from llava_lab.attribution.shapley import Game
from llava_lab.capture import undisturbed
from llava_lab.errors import CheckpointError, OptionError, TargetError
from llava_lab.models import Lab, load
from llava_lab.replay import fill_pixels, target_score
from llava_lab.replay.score import read_scores
from llava_lab.results import Run
from tests.support.closeness import TERMS, close
from tests.support.leftovers import state_of
from tests.support.planted import planted_lab, red_picture, scripted_run


@pytest.fixture(scope="module")
def run(tiny_random: Lab) -> Run:
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return scripted_run(tiny_random, wide, "The car is blue.")


def test_divergence_by_hand() -> None:
    one, other = torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    want = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    torch.testing.assert_close(divergence(one.log() + 3, other.log()), torch.tensor([0.0, want]).float())


def test_kl_and_drop_equal_whole_forwards_without_the_picture(tiny_random: Lab, run: Run) -> None:
    share = image_share(tiny_random, run, target="blue", orders=0, fill="mean")
    inputs = tiny_random.inputs(run)
    start, stop = run.segments["image"]
    rows = list(share.target.positions)
    blank = fill_pixels(tiny_random, inputs["pixel_values"], "mean", run.map)
    bare = torch.cat([inputs["input_ids"][:, :start], inputs["input_ids"][:, stop:]], 1)
    with torch.no_grad():
        whole = tiny_random.model(**inputs).logits[0].double().log_softmax(-1)[rows]
        removed = tiny_random.model(input_ids=bare).logits[0].double().log_softmax(-1)[[r - (stop - start) for r in rows]]
        filled = tiny_random.model(**{**inputs, "pixel_values": blank}).logits[0].double().log_softmax(-1)[rows]
    for i, other in enumerate((removed, filled)):
        close(share.kl[i], (whole.exp() * (whole - other)).sum(-1).numpy(), terms=TERMS)
        said = [sum(float(one[k, token]) for k, token in enumerate(share.target.token_ids)) for one in (whole, other)]
        close(share.drop[i], said[0] - said[1], of=said, terms=TERMS)
    assert share.ways == ("removed", "mean")
    assert share.tokens == tuple(run.tokens[r + 1] for r in rows)


def test_mass_is_that_of_the_methods(tiny_random: Lab, run: Run) -> None:
    share = image_share(tiny_random, run, orders=0)
    raw = attribute(tiny_random, run, method="attention")
    rolled = attribute(tiny_random, run, method="rollout", null="none")
    close(share.mass["attention"], float(raw.values.sum()), terms=TERMS)
    close(share.mass["rollout"], float(rolled.values.sum()), terms=TERMS)
    relevancy = attribute(tiny_random, run, method="relevancy").extras["mass"][0]
    close(share.mass["relevancy"], relevancy["image"] / sum(relevancy.values()), terms=TERMS)
    assert all(0 <= one <= 1 for one in share.mass.values())
    assert share.passes["backward"] == 1


class Table(Game):
    """A game whose worth is written down."""

    def __init__(self, players: int, score: Callable[[np.ndarray], float]) -> None:
        self.players, self._score = players, score

    def worth(self, shown: Tensor) -> Tensor:
        return torch.tensor([[score] for score in map(self._score, shown.numpy())], dtype=torch.float64).float()


def test_an_additive_game_pays_each_player_its_own_in_every_order() -> None:
    own = np.array([3.0, -1.0, 0.5, 0.0, 2.0])
    gains = shapley_orders(Table(5, lambda there: 7 + there @ own), orders=4, seed=0)
    np.testing.assert_allclose(gains, np.repeat(own[None], 4, 0), atol=1e-12)
    assert share_of(gains, 2) == pytest.approx(4 / 6.5)
    np.testing.assert_allclose(share_interval(gains, 2, 0.95), 4 / 6.5, atol=1e-12)  # every order says the same


def test_players_who_need_each_other_share_and_every_order_adds_up() -> None:
    def score(there: np.ndarray) -> float:
        return 6.0 * (there[0] and there[1]) + 2.0 * there[2] - 3.0 * (there[0] and there[2] and there[3])

    gains = shapley_orders(Table(4, score), orders=4000, seed=1)
    np.testing.assert_allclose(gains.sum(1), 5)
    np.testing.assert_allclose(gains.mean(0), [2, 3, 1, -1], atol=0.15)  # half of 6; thirds of -3
    assert len({tuple(row) for row in gains}) > 3, "orders must differ"


def test_interval_is_the_jackknife_with_students_quantile() -> None:
    gains = np.array([[1.0, 1.0], [3.0, 1.0], [2.0, 1.0]])
    left = np.array([2.5 / 3.5, 1.5 / 2.5, 2 / 3])
    error = np.sqrt(2 / 3 * ((left - left.mean()) ** 2).sum())
    want = 4.302653 * error  # 97.5% point at two degrees of freedom
    low, high = share_interval(gains, 1, 0.95)
    assert low == pytest.approx(2 / 3 - want, abs=1e-6)
    assert high == pytest.approx(min(2 / 3 + want, 1), abs=1e-6)
    assert share_interval(gains[:1], 1, 0.95) == (0.0, 1.0)
    assert share_of(np.zeros((3, 2)), 1) == 0


def test_a_missing_player_is_covered_or_replaced(tiny_random: Lab, run: Run) -> None:
    players = find_players(tiny_random, run, 2)
    targets = (run.target("blue"),)
    with undisturbed(tiny_random.model):
        game = Pieces(tiny_random, run, targets, players, fill="grey", batch=2)
        pixels, score = target_score(tiny_random, run, targets)
        everyone = torch.ones(3, len(players), dtype=torch.bool)
        everyone[1, 3] = everyone[2, len(players.blocks)] = False
        got = game.worth(everyone)[:, 0].numpy()
        covered = pixels.clone()
        covered[..., 16:, 16:] = fill_pixels(tiny_random, pixels, "grey", run.map)[..., 16:, 16:]
        want = [float(score(one)[0, 0]) for one in (pixels, covered)]
    close(got[:2], want, terms=TERMS)
    ids = run.token_ids.copy()
    ids[players.tokens[0]] = stand_in_token(tiny_random)
    rows = list(targets[0].positions)
    with undisturbed(tiny_random.model):
        logits = tiny_random.model(**{**tiny_random.inputs(run), "input_ids": torch.from_numpy(ids)[None]}).logits
    close(got[2], read_scores(logits[:, rows], rows, targets)[0, 0], terms=TERMS)
    assert len(set(got.round(5))) == 3


def test_players_are_the_questions_words_and_the_pictures_blocks(tiny_random: Lab, run: Run) -> None:
    players = find_players(tiny_random, run)
    spoken = "".join(run.tokens[i] for i in players.tokens)
    assert "".join(spoken.split()) == "".join(run.question.split())
    assert len(players.blocks) <= 16
    rows = sorted((y.start, x.start) for y, x in find_players(tiny_random, run, 3).blocks)
    sizes = [(y.stop - y.start) * (x.stop - x.start) for y, x in find_players(tiny_random, run, 3).blocks]
    assert rows == sorted(set(rows))
    assert sum(sizes) == 16, "blocks of uneven size cover the grid once"


def test_blocks_of_mere_padding_do_not_play(tiny_random: Lab) -> None:
    strip = np.full((8, 64, 3), 90, np.uint8)
    run = scripted_run(tiny_random, strip, "Yes.", fit="pad")
    shown = run.map.coverage() > 0
    assert all(shown[block].any() for block in find_players(tiny_random, run, 4).blocks)
    assert len(find_players(tiny_random, run, 4).blocks) < 16


def test_a_model_that_only_looks_takes_all_from_the_picture() -> None:
    lab = planted_lab()
    run = scripted_run(lab, red_picture(96, 96, (24, 48, 48, 72)), "The car is red.")
    share = ll.image_share(lab, run, target="red", orders=4, side=4)
    assert share.shap == pytest.approx(1, abs=1e-6)
    assert share.text_shap == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(np.array(share.interval), 1, atol=1e-6)
    assert np.abs(share.token_values).max() == 0, "every word is the same to this model"
    assert share.players["blocks"][int(share.block_values.argmax())] == (4, 6, 2, 4)
    assert share.kl.min() > 0.001
    assert share.drop.min() > 0
    # efficiency: the same fill, the words do nothing
    close(share.block_values.sum(), share.drop[1], of=run.logprobs.sum(), terms=TERMS)


def test_a_blind_model_takes_all_from_the_text(tiny_folder: Path) -> None:
    lab = load(str(tiny_folder))
    with torch.no_grad():
        lab.model.model.multi_modal_projector.linear_2.weight.zero_()
    wide = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    share = image_share(lab, scripted_run(lab, wide, "The car is blue."), orders=3)
    assert share.kl[1].max() < 1e-9, "the filled picture looks the same to it"
    assert share.shap == pytest.approx(0, abs=1e-4)
    assert share.interval is not None
    assert share.interval[1] < 1e-3


def test_gains_of_all_players_are_what_everything_is_worth(tiny_random: Lab, run: Run) -> None:
    share = image_share(tiny_random, run, target="blue", orders=2, batch=5)
    players = find_players(tiny_random, run)
    with undisturbed(tiny_random.model):
        game = Pieces(tiny_random, run, (run.target("blue"),), players, fill="grey", batch=8)
        nothing, everything = float(game.nobody()), float(game.everyone())
    close(share.block_values.sum() + share.token_values.sum(), everything - nothing, of=everything, terms=TERMS)
    assert share.passes["forward"] >= 3 + 2 + 2 * (len(players) - 1)


def test_a_seed_repeats_itself_and_another_differs(tiny_random: Lab, run: Run) -> None:
    one, again, other = (image_share(tiny_random, run, orders=3, side=2, seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one.block_values, again.block_values)
    assert not np.allclose(one.block_values, other.block_values)
    assert one.interval is not None
    assert one.shap is not None
    assert 0 <= one.interval[0] <= one.shap <= one.interval[1] <= 1


def test_a_contrast_has_no_attention_mass_and_says_so(tiny_random: Lab, run: Run) -> None:
    share = image_share(tiny_random, run, target=("blue", "green"), orders=2, side=2)
    assert "attention" not in share.mass
    assert any("No attention mass: method 'attention' cannot tell 'blue, not green'" in note for note in share.notes)
    assert share.shap is not None
    assert share.kl.shape == (2, 1)


def test_without_orders_there_is_no_game(tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pieces, "worth", lambda *_: pytest.fail("a game was played"))
    share = image_share(tiny_random, run, orders=0)
    assert (share.shap, share.text_shap, share.interval, share.orders) == (None, None, None, 0)


def test_the_result_is_plain_enough_for_json(tiny_random: Lab, run: Run) -> None:
    share = image_share(tiny_random, run, target="blue", orders=2, side=2)
    plain = json.loads(json.dumps(share.to_dict(), allow_nan=False))
    assert plain["target"]["text"] == "blue"
    np.testing.assert_allclose(plain["kl"], share.kl)
    assert plain["options"] == {"fill": "grey", "orders": 2, "side": 2, "seed": 0, "batch": 8}


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"fill": "black"}, OptionError, "fill must be one of 'grey'.*, got 'black'"),
        ({"orders": -1}, OptionError, "orders must be a whole number of at least 0, got -1"),
        ({"side": 5}, OptionError, "side must be 1 to 4 blocks for a 4x4 grid, or None; got 5"),
        ({"side": 0}, OptionError, "side must be a whole number of at least 1, got 0"),
        ({"batch": 0}, OptionError, "batch must be a whole number of at least 1"),
        ({"seed": "a"}, OptionError, "seed must be a whole number"),
        ({"target": "words"}, TargetError, "expected one target to share out, got 5; ask for one at a time"),
        ({"target": "zebra"}, TargetError, "has no word 'zebra'"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(
    tiny_random: Lab, run: Run, options: dict[str, Any], kind: type[ValueError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        image_share(tiny_random, run, **options)


def test_a_run_by_other_weights_is_refused(tiny_random: Lab, run: Run) -> None:
    with pytest.raises(CheckpointError, match="other weights; ask again"):
        image_share(tiny_random, replace(run, fingerprint="0" * 16))


@pytest.mark.parametrize("after", [0, 1, 2])
def test_ctrl_c_gives_the_finished_orders_and_leaves_nothing(
    tiny_random: Lab, run: Run, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    tiny_random.model.train()
    before, whole, forwards = state_of(tiny_random), tiny_random.model.forward, [0]
    # three forwards for KL, one batch for the ends, one batch for each order of two blocks to a side
    last = 3 + 1 + after

    def tired(*args: Any, **kwargs: Any) -> Any:
        forwards[0] += 1
        if forwards[0] == last + 1:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(tiny_random.model, "forward", tired)
            if after == 0:
                with pytest.raises(KeyboardInterrupt):
                    image_share(tiny_random, run, orders=4, side=2, batch=64)
            else:
                share = image_share(tiny_random, run, orders=4, side=2, batch=64)
                assert share.orders == after
                assert any(f"Interrupted after {after} of 4 orders" in note for note in share.notes)
        assert state_of(tiny_random) == before
    finally:
        tiny_random.model.eval()


@pytest.mark.long
def test_576_image_tokens_and_bfloat16(llava15_folder: Path) -> None:
    lab = load(str(llava15_folder))
    run = scripted_run(lab, red_picture(90, 60, (10, 10, 30, 30)), "The car is blue.")
    share = image_share(lab, run, target="blue", orders=1, side=2)
    assert share.shap is not None
    assert 0 < share.shap < 1
    assert np.isfinite(share.kl).all()
    rough = load(str(llava15_folder), dtype="bfloat16")
    again = image_share(rough, scripted_run(rough, run.picture, run.answer), target="blue", orders=0)
    np.testing.assert_allclose(again.kl, share.kl, rtol=0.1, atol=0.02)
