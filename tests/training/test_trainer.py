"""What one stage changes, what it leaves, and that its short cuts give the stock model's loss and gradients."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llava_lab as ll
from llava_lab.cli.main import main
from llava_lab.errors import DataError, OptionError
from llava_lab.models import Lab, layout
from llava_lab.models.pictures import read_picture
from llava_lab.training.features import tower_features
from llava_lab.training.recipe import LLAVA_15_7B, LLAVA_RECIPES, Lora
from llava_lab.training.stages import Running, Trained, shares, train_stage
from llava_lab.training.trainer import Collate, reading_features
from tests.support.training_rows import write_rows

QUICK = Running(save_every=50, progress=False)
Train = Callable[..., tuple[Lab, Trained]]


@pytest.fixture
def train(tmp_path: Path, tiny_folder: Path) -> Train:
    """Train a fresh copy of the random model for three steps of four rows."""

    def run(stage: str = "align", name: str = "a", **options: Any) -> tuple[Lab, Trained]:
        if not (tmp_path / "mix.json").exists():
            write_rows(tmp_path, text_every=0 if stage == "align" else 4)
        lab = options.pop("lab", None) or ll.load(str(tiny_folder))
        recipe = replace(LLAVA_15_7B.stage(stage), batch=4, rate=1e-3)
        given: dict[str, Any] = {"recipe": recipe, "steps": 3, "cache": tmp_path / "cache", "running": QUICK} | options
        return lab, train_stage(lab, tmp_path / "mix.json", stage, tmp_path / name, **given)

    return run


def changed(lab: Lab, folder: Path) -> set[str]:
    start = dict(ll.load(str(folder)).model.named_parameters())
    return {name for name, value in lab.model.named_parameters() if not torch.equal(value, start[name])}


def test_align_changes_the_connector_alone_and_puts_everything_back(train: Train, tiny_folder: Path) -> None:
    lab, done = train()
    found = changed(lab, tiny_folder)
    assert found == {name for name, _ in lab.model.named_parameters() if "multi_modal_projector" in name}
    assert not any(p.requires_grad or p.grad is not None for p in lab.model.parameters())
    assert not any(module.training for module in lab.model.modules())
    assert "get_image_features" not in vars(lab.model.model)
    assert not lab.model.model._forward_pre_hooks
    assert lab.model.config.to_dict() == ll.load(str(tiny_folder)).model.config.to_dict()
    saved = ll.load(done.folder)  # refuses missing or unexpected keys
    assert all(torch.equal(a, b) for a, b in zip(saved.model.parameters(), lab.model.parameters(), strict=True))
    assert saved.ask(np.zeros((20, 20, 3), np.uint8), "What?", max_new_tokens=2).answer is not None


def test_instruct_changes_connector_and_language_model_and_not_the_tower(train: Train, tiny_folder: Path) -> None:
    lab, done = train("instruct")
    assert {name.split(".")[1] for name in changed(lab, tiny_folder)} == {"multi_modal_projector", "language_model", "weight"}
    assert done.losses[-1] < done.losses[0]
    assert done.logged == (1, 2, 3)


@pytest.mark.parametrize(
    "option", [{"cache": False}, {"running": replace(QUICK, checkpointing=True)}, {"running": replace(QUICK, device_batch=2)}]
)
def test_cache_checkpointing_and_accumulation_give_the_same_losses(train: Train, option: dict[str, Any]) -> None:
    _, plain = train("instruct")
    _, other = train("instruct", "b", **option)
    np.testing.assert_allclose(other.losses, plain.losses, atol=2e-4)


def test_bfloat16_stays_near_float32(train: Train) -> None:
    _, plain = train("instruct")
    _, half = train("instruct", "b", running=replace(QUICK, bf16=True))
    assert half.losses != plain.losses
    np.testing.assert_allclose(half.losses, plain.losses, rtol=3e-2)


def test_lora_is_merged_and_leaves_no_adapter(train: Train, tiny_folder: Path) -> None:
    assert LLAVA_15_7B.instruct_lora is not None
    recipe = replace(LLAVA_15_7B.instruct_lora, batch=4, rate=1e-2, connector_rate=1e-3, lora=Lora(rank=4, alpha=8))
    lab, done = train("instruct", recipe=recipe)
    found = changed(lab, tiny_folder)
    assert not any("lora" in name for name, _ in lab.model.named_parameters())
    assert "lm_head.weight" not in found
    assert not any("embed_tokens" in name or "norm" in name or "vision" in name for name in found)
    assert sum("language_model" in name for name in found) == 3 * 7  # every linear layer of three layers
    saved = ll.load(done.folder)
    assert all(torch.equal(a, b) for a, b in zip(saved.model.parameters(), lab.model.parameters(), strict=True))


def test_an_exception_leaves_model_and_adapters_as_they_were(train: Train, tiny_folder: Path) -> None:
    def fail(row: dict[str, Any]) -> None:
        raise RuntimeError("told")

    lab = ll.load(str(tiny_folder))
    recipe = replace(LLAVA_15_7B.instruct, batch=4, lora=Lora(rank=2), trains=("multi_modal_projector",))
    with pytest.raises(RuntimeError, match="told"):
        train("instruct", lab=lab, recipe=recipe, told=fail)
    assert not any("lora" in name for name, _ in lab.model.named_parameters())
    assert {name for name in changed(lab, tiny_folder) if "multi_modal_projector" not in name} == set()
    assert "get_image_features" not in vars(lab.model.model)
    assert not any(p.requires_grad for p in lab.model.parameters())


def _rows(lab: Lab, seen: int, alone: int) -> list[dict[str, Any]]:
    rng, rows = np.random.default_rng(0), []
    for i in range(seen + alone):
        words = rng.integers(10, 200, 9 + i)
        ids = np.concatenate([[1], np.full(16, lab.image_id), words]) if i < seen else words
        labels = np.where(np.arange(len(ids)) >= len(ids) - 4, ids, -100)
        picture = torch.from_numpy(
            lab.preprocessing.pixels(read_picture(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8))).numpy()[0]
        )
        rows.append({"ids": ids, "labels": labels, "picture": picture if i < seen else None})
    return rows


@pytest.mark.parametrize(("seen", "alone"), [(2, 0), (2, 1), (0, 2)])
@pytest.mark.parametrize("cached", [False, True])
def test_loss_and_gradients_are_the_stock_models(tiny_random: Lab, seen: int, alone: int, cached: bool) -> None:
    model, rows = tiny_random.model, _rows(tiny_random, seen, alone)
    longest = max(len(row["ids"]) for row in rows)
    pad = lambda values, fill: torch.tensor([[*v, *[fill] * (longest - len(v))] for v in values])
    stock: dict[str, Any] = {"input_ids": pad([r["ids"] for r in rows], 2), "labels": pad([r["labels"] for r in rows], -100)}
    stock["attention_mask"] = pad([np.ones(len(r["ids"]), int) for r in rows], 0)
    if seen:
        stock["pixel_values"] = torch.stack([r["picture"] for r in rows[:seen]])
    if cached:
        for row in rows[:seen]:
            row["picture"] = tower_features(model, row["picture"][None])[0]
    batch = Collate(2, (16, 32) if cached else (3, 32, 32))(rows)
    projector = layout.connector_of(model)
    try:
        projector.requires_grad_(True)
        wanted = model(**stock).loss
        expected = torch.autograd.grad(wanted, list(projector.parameters())) if seen else None
        with reading_features(model, cached=cached):
            got = model(**batch).loss
            got.backward()
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
        for i, parameter in enumerate(projector.parameters()):
            assert parameter.grad is not None  # also for text alone: processes reduce the same parameters
            aim = expected[i] if expected is not None else torch.zeros_like(parameter)
            torch.testing.assert_close(parameter.grad, aim, atol=1e-5, rtol=1e-4)
    finally:
        projector.requires_grad_(False)
        projector.zero_grad(set_to_none=True)


def test_every_number_of_the_published_recipes_has_its_source() -> None:
    for recipe in LLAVA_RECIPES.values():
        for stage in filter(None, (recipe.align, recipe.instruct, recipe.instruct_lora)):
            told = dict(stage.sources)
            wanted = {"rate", "batch", "epochs", "warmup", "decay", "clip", "fit", "group"}
            wanted |= {name for name in ("connector_rate", "lora") if getattr(stage, name) is not None}
            assert told.keys() == wanted
            assert all(len(source) > 10 for source in told.values())
    assert (LLAVA_15_7B.align.rate, LLAVA_15_7B.align.batch) == (1e-3, 256)
    assert (LLAVA_RECIPES["llava-1-7b"].align.rate, LLAVA_RECIPES["llava-1-7b"].connector) == (2e-3, "linear")


def test_mistakes_are_refused_before_the_first_step(train: Train, tmp_path: Path) -> None:
    write_rows(tmp_path, text_every=0)
    (tmp_path / "images/1.png").unlink()
    with pytest.raises(DataError, match=r"mix.json row 1: missing picture .*1.png; .*mix.json row 7.*--skip-bad"):
        train()
    assert not (tmp_path / "a/align/run.json").exists()
    lab, done = train(skip_bad=True)
    assert len(done.skipped) == 3
    assert done.steps == 3
    with pytest.raises(OptionError, match="stage must be align or instruct, got 'tune'"):
        train_stage(lab, tmp_path / "mix.json", "tune", tmp_path / "x")
    with pytest.raises(DataError, match="no such data file"):
        train_stage(lab, tmp_path / "none.json", "align", tmp_path / "x", running=QUICK)


def test_global_batch_is_shared_out_exactly() -> None:
    assert shares(128, 8, None) == (16, 1)
    assert shares(128, 8, 4) == (4, 4)
    with pytest.raises(OptionError, match="cannot be split over 3"):
        shares(128, 3, None)
    with pytest.raises(OptionError, match="device_batch must divide 16"):
        shares(128, 8, 5)


def test_command_line_trains_a_stage_and_keeps_tiny(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path)
    data, out = f"{tmp_path / 'mix.json'},weight=0.5,suffix=word", str(tmp_path / "out")
    common = ["train", "--out", out, "--model", str(tiny_folder), "--cache", str(tmp_path / "cache"), "--json"]
    assert main([*common, "--data", data, "--stage", "instruct", "--batch", "4", "--steps", "2"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["steps"], said["of"], said["stopped"], said["skipped"]) == (2, 2, "finished", [])
    assert ll.load(said["folder"]).card.connector == "mlp2x_gelu"
    for arguments, why in (
        (["--data", data, "--stage", "tune"], "--stage must be align or instruct"),
        (["--data", data], "trains one stage at a time"),
        ([], "give tiny, or --data FILE"),
        (["tiny", "--data", data], "not both"),
        (["--data", f"{data},size=3", "--stage", "align"], r"got 'size=3'"),
        (["--data", data, "--stage", "align"], "mix.json row 3: stage align trains on pictures"),
    ):
        assert main([*common, *arguments]) == 2
        assert why in capsys.readouterr().err.splitlines()[-1]
    asked: dict[str, Any] = {}
    monkeypatch.setattr("llava_lab.training.train", lambda name, out, **options: asked.update(options, name=name) or out)
    assert main(["train", "tiny", "--out", out, "--stage", "align", "--seed", "3"]) == 0
    assert asked == {"name": "tiny", "stages": ["align"], "resume": False, "steps_scale": 1.0, "seed": 3, "fused": False}
