"""The one training loop: rates, a run that was stopped goes on to the same bits, a loss that is lost ends it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.jsonl", "toy.pt"]  # no temporary names


def test_a_loss_that_is_not_finite_ends_the_stage_before_the_step(tmp_path: Path) -> None:
    module = made()
    with torch.no_grad():
        next(module.parameters()).fill_(float("nan"))
    assert len(run(module, folder=tmp_path)) == 1
    assert not (tmp_path / "toy.pt").exists()


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
