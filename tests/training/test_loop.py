"""The one training loop: rates, a run that was stopped goes on to the same bits, a loss that is lost ends it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llava_lab.errors import CheckpointError, OptionError
from llava_lab.training import TINY, Stage, loop

STAGE = Stage("toy", ("a",), steps=8, batch=4, rate=1e-2, matrix_rate=0.02)


class Data:
    """Step number -> batch."""

    def __getitem__(self, step: int) -> Tensor:
        return torch.randn(4, 3, generator=torch.Generator().manual_seed(step))


def made() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def run(module: nn.Module, **options: Any) -> list[float]:
    def loss_of(batch: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return (module(batch) - batch.sum(1, keepdim=True)).square().mean(), {"rows": len(batch)}

    return loop.train(STAGE, {"toy": module}, Data(), loss_of, bf16=False, **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_stopped_half_way_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    whole, stopped, again = made(), made(), made()
    losses = run(whole)
    assert losses[-1] < losses[0]
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    steps: list[int] = []

    def stop(count: int) -> None:
        steps.append(count)
        if len(steps) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stopped, folder=tmp_path, on_step=stop)
    assert run(again, folder=tmp_path, workers=workers) == losses
    assert same(again, whole)
    assert run(made(), folder=tmp_path) == losses  # finished: read, not trained
    rows = [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    assert rows[0]["rows"] == 4
    assert rows[-1]["step"] == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.before.pt", "toy.jsonl", "toy.pt"]  # no temporary names


def _cut(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def _flipped(raw: bytes) -> bytes:
    at = raw.index(b"PK", len(raw) // 3) - 70  # within the numbers of one part, where torch itself does not look
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


@pytest.mark.parametrize("spoil", [_cut, _flipped, lambda raw: b"", lambda raw: b"no state", lambda raw: raw[:-9]])
def test_a_damaged_state_gives_way_to_the_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, spoil: Callable[[bytes], bytes]
) -> None:
    losses = run(made())
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    run(made(), folder=tmp_path)
    path = tmp_path / "toy.pt"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CheckpointError, match="toy.pt is damaged"):
        loop.read_state(path)
    assert run(made(), folder=tmp_path) == losses
    assert "toy.pt is damaged" in caplog.text
    assert "going on from the state before it" in caplog.text
    path.write_bytes(spoil(path.read_bytes()))
    (tmp_path / "toy.before.pt").unlink()
    with pytest.raises(CheckpointError, match="remove it to train the stage from its beginning"):
        run(made(), folder=tmp_path)


def test_a_stage_half_done_is_not_gone_on_with_under_other_settings(tmp_path: Path) -> None:
    loop.remember_stage(tmp_path, STAGE, seed=0)
    loop.remember_stage(tmp_path, STAGE, seed=1)  # nothing is trained yet
    (tmp_path / "toy.pt").write_bytes(b"")
    with pytest.raises(OptionError, match="was begun with another seed: 1, now 2"):
        loop.remember_stage(tmp_path, STAGE, seed=2)
    with pytest.raises(OptionError, match="another batch: 4, now 5"):
        loop.remember_stage(tmp_path, replace(STAGE, batch=5), seed=1)
    (tmp_path / "toy.recipe.json").write_text("[1")
    with pytest.raises(CheckpointError, match="toy.recipe.json is damaged"):
        loop.remember_stage(tmp_path, STAGE, seed=1)


@pytest.mark.parametrize("what", ["its loss is nan", "the norm of its loss's gradient is", "it leaves weights that are not"])
def test_numbers_that_are_not_finite_end_the_stage_before_they_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Three good steps and their checkpoint, then one number that is lost; none of it reaches the file."""
    module, asked = made(), 0
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)

    def loss_of(batch: Tensor) -> tuple[Tensor, dict[str, Any]]:
        nonlocal asked
        asked += 1
        loss = module(batch).square().mean()
        if asked == 4 and "loss is" in what:
            loss = loss * torch.nan
        if asked == 4 and "norm" in what:
            loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss, {}

    def spoil(count: int) -> None:
        if asked == 4 and "weights" in what:
            with torch.no_grad():
                module[0].bias[0] = torch.inf

    with pytest.raises(loop.Diverged, match=f"stage 'toy' ended at step 3, at a rate of 0.00\\d+: {what}.*lower rate") as error:
        loop.train(STAGE, {"toy": module}, Data(), loss_of, bf16=False, folder=tmp_path, on_step=spoil)
    assert (error.value.step, len(error.value.losses)) == (3, 4)
    saved = torch.load(tmp_path / "toy.pt", weights_only=True)
    assert saved["step"] == 3
    assert all(torch.isfinite(value).all() for value in saved["modules"]["toy"].values())


def test_one_module_may_have_a_rate_of_its_own_and_muon_s_follows() -> None:
    module, other = made(), made()
    adamw, muon = loop.optimizers({"a": module, "b": other}, STAGE, {"a": 3e-3})
    assert isinstance(muon, torch.optim.Muon)
    assert [(len(group["params"]), group["peak"]) for group in adamw.param_groups] == [(2, 3e-3), (2, 1e-2)]
    assert [len(group["params"]) for group in muon.param_groups] == [2, 2]
    assert [group["peak"] for group in muon.param_groups] == pytest.approx([6e-3, 2e-2])
    assert len(loop.optimizers({"a": module, "b": other}, STAGE)[0].param_groups) == 1


def test_rates_warm_up_then_fall() -> None:
    rates = [loop.rate_at(TINY.align, step, 100) for step in range(100)]
    assert rates[0] < rates[2] == max(rates) == 1.0
    assert rates[-1] < 0.03
