"""LLaVA's stages: what one changes and leaves, its short cuts against the stock model, and runs that were stopped or killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_lab as ll
from llava_lab.cli.main import main
from llava_lab.errors import CheckpointError, DataError, OptionError
from llava_lab.models import Lab, layout
from llava_lab.models.pictures import read_picture
from llava_lab.training import trainer as trainer_module
from llava_lab.training.features import tower_features
from llava_lab.training.recipe import LLAVA_15_7B, LLAVA_RECIPES, Lora
from llava_lab.training.stages import Running, Trained, adapters, shares, train_stage
from llava_lab.training.trainer import Collate, last_checkpoint, reading_features
from tests.support.closeness import TERMS, close
from tests.support.families import family
from tests.support.interrupts import interrupting
from tests.support.leftovers import state_of
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


@family(
    "option",
    [{"cache": False}, {"running": replace(QUICK, checkpointing=True)}, {"running": replace(QUICK, device_batch=2)}],
    quick=1,
)
def test_cache_checkpointing_and_accumulation_give_the_same_losses(train: Train, option: dict[str, Any]) -> None:
    _, plain = train("instruct")
    _, other = train("instruct", "b", **option)
    np.testing.assert_allclose(other.losses, plain.losses, atol=2e-4)


@pytest.mark.long
def test_bfloat16_stays_near_float32(train: Train) -> None:
    _, plain = train("instruct")
    _, half = train("instruct", "b", running=replace(QUICK, bf16=True))
    assert half.losses != plain.losses
    np.testing.assert_allclose(half.losses, plain.losses, rtol=3e-2)


@family(
    ("stage", "save_every", "options"),
    [("align", 50, {}), ("instruct", 50, {}), ("instruct", 1, {}), ("instruct", 50, {"lora": Lora(rank=4, alpha=8)})],
    quick=("align",),
    ids=["align", "instruct", "with a checkpoint", "lora"],
)
def test_a_run_that_diverges_says_so_and_gives_good_weights_back(
    train: Train, tiny_folder: Path, caplog: pytest.LogCaptureFixture, stage: str, save_every: int, options: dict[str, Any]
) -> None:
    told: list[dict[str, Any]] = []
    recipe = replace(LLAVA_15_7B.stage(stage), batch=4, rate=1e30, connector_rate=None, warmup=0.5, **options)
    lab, done = train(stage, recipe=recipe, steps=6, running=replace(QUICK, save_every=save_every), told=told.append)
    assert (done.stopped, done.of) == ("diverged", 6)
    assert done.steps < 6
    assert np.isfinite(done.losses).all()
    assert told[-1]["ended"] == "diverged"
    assert f"training ended at step {done.steps + 1}, at a rate of" in caplog.text
    run = Path(done.folder or tiny_folder)
    if save_every == 1:
        good = load_file(run / "trained.safetensors")
        assert all(torch.isfinite(value).all() for value in good.values())
        assert all(torch.equal(dict(lab.model.named_parameters())[name], value) for name, value in good.items())
    else:
        assert not done.folder
        assert not changed(lab, tiny_folder)
    assert not list(run.parent.glob("model*")) or run == tiny_folder


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
    connector = layout.connector_of(model)
    try:
        connector.requires_grad_(True)
        wanted = model(**stock).loss
        expected = torch.autograd.grad(wanted, list(connector.parameters())) if seen else None
        with reading_features(model, cached=cached):
            got = model(**batch).loss
            got.backward()
        close(got, wanted, terms=TERMS)
        for i, parameter in enumerate(connector.parameters()):
            assert parameter.grad is not None  # also for text alone: processes reduce the same parameters
            aim = expected[i] if expected is not None else torch.zeros_like(parameter)
            close(parameter.grad, aim, terms=TERMS)
    finally:
        connector.requires_grad_(False)
        connector.zero_grad(set_to_none=True)


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
        ([], "--model belongs to --data"),
        (["tiny", "--data", data], "not both"),
        (["--data", f"{data},size=3", "--stage", "align"], r"got 'size=3'"),
        (["--data", data, "--stage", "align"], "mix.json row 3: stage align trains on pictures"),
    ):
        assert main([*common, *arguments]) == 2
        assert why in capsys.readouterr().err.splitlines()[-1]
    assert main(["train", "--out", out]) == 2
    assert "give tiny, or --data FILE" in capsys.readouterr().err.splitlines()[-1]
    asked: dict[str, Any] = {}
    monkeypatch.setattr("llava_lab.training.train", lambda name, out, **options: asked.update(options, name=name) or out)
    assert main(["train", "tiny", "--out", out, "--stage", "align", "--seed", "3"]) == 0
    assert asked == {"name": "tiny", "stages": ["align"], "resume": False, "steps_scale": 1.0, "seed": 3, "fused": False}


# -- runs that were stopped or killed

STEPS = 10
RECIPE = replace(LLAVA_15_7B.instruct, batch=4, rate=1e-3, lora=None)
EVERY_STEP = Running(save_every=1, progress=False)

KILLED = """
import json, os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
import transformers.trainer
import llava_lab as ll
from llava_lab.training import trainer
from transformers import TrainerState
from llava_lab.training.recipe import LLAVA_15_7B, Lora
from llava_lab.training.stages import Running, train_stage

model, data, root, steps = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
recipe = replace(LLAVA_15_7B.instruct_lora, batch=4, rate=1e-3, lora=Lora(rank=4, alpha=8, dropout=0.1))

def run(out, resume):
    running = Running(save_every=1, progress=False)
    options = {"recipe": recipe, "steps": steps, "resume": resume, "cache": root / "cache", "running": running}
    train_stage(ll.load(model), data, "instruct", out, **options)

def die_inside(where, name, count):
    real, left = getattr(where, name), [count]
    def deadly(*args, **options):
        left[0] -= 1
        if left[0] == 0:
            if name != "rotate_checkpoints":
                Path(args[1]).write_bytes(b"half a checkpoint")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)
    setattr(where, name, deadly)

def attempt(out, resume, kill=None, after=None):
    child = os.fork()
    if child == 0:
        if kill:
            die_inside(*kill)
        try:
            run(out, resume)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]

begin = time.monotonic()
assert attempt(root / "whole", False) == 0
whole = time.monotonic() - begin
dice = random.Random(7)
moments = [("weights", (trainer, "save_file", 2)), ("state", (TrainerState, "save_to_json", 2))]
moments += [("rotation", (transformers.trainer, "rotate_checkpoints", 2))]
moments += [("time", dice.uniform(0.2, 0.7) * whole) for _ in range(3)]
codes = []
for kind, what in moments:
    resume = (root / "killed" / "instruct" / "run.json").exists()
    codes.append(attempt(root / "killed", resume, **({"after": what} if kind == "time" else {"kill": what})))
codes.append(attempt(root / "killed", True))
print(json.dumps(codes))
"""


@pytest.mark.long
def test_killed_runs_go_on_to_the_same_bits(tmp_path: Path, tiny_folder: Path) -> None:
    data = write_rows(tmp_path)
    command = [sys.executable, "-c", KILLED, str(tiny_folder), str(data), str(tmp_path), str(STEPS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    codes = json.loads(done.stdout.splitlines()[-1])
    print("exit codes:", codes)
    assert codes[:3] == [9, 9, 9]  # the three aimed ones hit; random ones may come after the end
    assert codes[-1] == 0, done.stderr[-3000:]
    names = [tmp_path / run / "instruct" / "model" / "model.safetensors" for run in ("whole", "killed")]
    whole, killed = (load_file(name) for name in names)
    start = load_file(tiny_folder / "model.safetensors")
    assert whole.keys() == killed.keys() == start.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert any(not torch.equal(whole[name], start[name]) for name in whole)
    logs = [
        [json.loads(line) for line in (tmp_path / run / "instruct/log.jsonl").read_text().splitlines()]
        for run in ("whole", "killed")
    ]
    assert [(row["step"], row["loss"]) for row in logs[0]] == [(row["step"], row["loss"]) for row in logs[1]]


def _train(folder: Path, out: Path, root: Path, **options: Any) -> Any:
    given: dict[str, Any] = {"recipe": RECIPE, "steps": 6, "running": EVERY_STEP, "cache": root / "cache"} | options
    return train_stage(ll.load(str(folder)), root / "mix.json", "instruct", out, **given)


@pytest.mark.long
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path)
    whole = _train(tiny_folder, tmp_path / "whole", tmp_path)
    calls = []

    def full(state: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) == 4:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(state, path)

    monkeypatch.setattr(trainer_module, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*the last good one is .*checkpoint-3; make room"):
        _train(tiny_folder, tmp_path / "full", tmp_path)
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "full/instruct").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert not (tmp_path / "full/instruct/.part").exists()
    again = _train(tiny_folder, tmp_path / "full", tmp_path, resume=True)
    assert again.losses == whole.losses
    a, b = (load_file(Path(done.folder) / "model.safetensors") for done in (whole, again))
    assert all(torch.equal(a[name], b[name]) for name in a)


@family("how", ["signal", "exception"], quick=("exception",))
def test_stopping_keeps_what_is_trained_and_resumes_to_the_same_bits(tmp_path: Path, tiny_folder: Path, how: str) -> None:
    write_rows(tmp_path)
    whole = _train(tiny_folder, tmp_path / "whole", tmp_path)
    before = signal.getsignal(signal.SIGINT)

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            if how == "exception":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)

    done = _train(tiny_folder, tmp_path / "stopped", tmp_path, told=stop, running=replace(EVERY_STEP, save_every=2))
    assert signal.getsignal(signal.SIGINT) == before
    assert done.stopped == "interrupted"
    assert (done.steps, done.of) == ((3, 6) if how == "exception" else (4, 6))
    assert ll.load(done.folder).card.parameters == ll.load(str(tiny_folder)).card.parameters
    again = _train(tiny_folder, tmp_path / "stopped", tmp_path, resume=True)
    assert (again.stopped, again.steps, again.losses) == ("finished", 6, whole.losses)
    a, b = (load_file(Path(one.folder) / "model.safetensors") for one in (whole, again))
    assert all(torch.equal(a[name], b[name]) for name in a)


def _spoil(checkpoint: Path, name: str, how: str) -> None:
    file = checkpoint / name
    raw = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes({"cut": raw[:-1], "empty": b"", "flipped": bytes([*raw[:-1], raw[-1] ^ 1])}[how])


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_rows(tmp_path)
    whole = _train(tiny_folder, tmp_path / "whole", tmp_path)
    run, newest = tmp_path / "whole/instruct", "checkpoint-6"
    assert last_checkpoint(run) == run / newest
    names = ("trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin")
    for name in names:
        for how in ("gone", "cut", "empty", "flipped"):
            caplog.clear()
            shutil.copytree(run, tmp_path / "copy", dirs_exist_ok=True)
            if name in (tmp_path / "copy" / newest / "hashes.json").read_text():
                _spoil(tmp_path / "copy" / newest, name, how)
                assert last_checkpoint(tmp_path / "copy") == tmp_path / "copy/checkpoint-5"
                assert f"{newest} is passed over: {name} is {'missing' if how == 'gone' else 'damaged'}" in caplog.text
            shutil.copytree(run, tmp_path / "copy", dirs_exist_ok=True)
            (tmp_path / "copy" / newest / "hashes.json").unlink()  # as an older version left it
            assert last_checkpoint(tmp_path / "copy") == tmp_path / "copy" / newest
            if how == "gone" and name != "training_args.bin":
                _spoil(tmp_path / "copy" / newest, name, how)
                assert last_checkpoint(tmp_path / "copy") == tmp_path / "copy/checkpoint-5"
    made = load_file(run / "model/model.safetensors")
    _spoil(run / newest, "optimizer.pt", "gone")
    again = _train(tiny_folder, tmp_path / "whole", tmp_path, resume=True)
    assert again.losses == whole.losses
    assert all(torch.equal(made[name], value) for name, value in load_file(run / "model/model.safetensors").items())


@pytest.mark.long
def test_a_resumed_run_reads_the_data_it_was_begun_with(tmp_path: Path, tiny_folder: Path) -> None:
    data = write_rows(tmp_path)
    _train(tiny_folder, tmp_path / "out", tmp_path, steps=2)
    data.write_text(data.read_text().replace('"red"', '"tan"'))
    with pytest.raises(OptionError, match="was begun with another hash of the data files"):
        _train(tiny_folder, tmp_path / "out", tmp_path, steps=2, resume=True)
    write_rows(tmp_path)
    note = tmp_path / "out/instruct/run.json"
    note.write_text(json.dumps({k: v for k, v in json.loads(note.read_text()).items() if "hash" not in k}))  # an older one
    assert _train(tiny_folder, tmp_path / "out", tmp_path, steps=2, resume=True).stopped == "finished"
    note.write_text("{")
    with pytest.raises(CheckpointError, match="run.json is damaged"):
        _train(tiny_folder, tmp_path / "out", tmp_path, steps=2, resume=True)


@pytest.mark.long
def test_lora_starts_from_the_seed_and_leaves_nothing_not_even_random_states(tmp_path: Path, tiny_folder: Path) -> None:
    write_rows(tmp_path)
    recipe, found = replace(RECIPE, lora=Lora(rank=2, alpha=4, dropout=0.1)), {}
    for name, before, seed in (("a", 1, 0), ("b", 2, 0), ("c", 1, 3)):
        torch.manual_seed(before)
        running = replace(QUICK, seed=seed, bf16=True, checkpointing=name != "b")
        options: dict[str, Any] = {"recipe": recipe, "steps": 3, "running": running}
        lab = ll.load(str(tiny_folder))
        lab.ask(np.zeros((9, 9, 3), np.uint8), "What?", max_new_tokens=1)  # transformers' own hooks come with the first forward
        states = state_of(lab) | {"weights": ""}
        assert len(train_stage(lab, tmp_path / "mix.json", "instruct", tmp_path / name, cache=tmp_path, **options).losses) == 3
        assert state_of(lab) | {"weights": ""} == states
        found[name] = lab.fingerprint
    assert found["a"] == found["b"] != found["c"]


def test_merging_adapters_is_peft_s_and_an_interrupt_in_the_middle_of_it_waits(tiny_folder: Path) -> None:
    merged = []
    for stop in (False, True):
        lab = ll.load(str(tiny_folder))
        plain = dict(lab.model.named_modules())
        with pytest.raises(KeyboardInterrupt) if stop else nullcontext(), adapters(lab.model, Lora(rank=2), seed=1) as wrapped:
            with torch.no_grad():
                for number, (_, part) in enumerate(wrapped.named_parameters()):
                    part.add_(0.01 * number if part.requires_grad else 0)
            layers = [part for part in wrapped.modules() if hasattr(part, "get_delta_weight")]
            expected = [part.get_base_layer().weight + part.get_delta_weight("default") for part in layers]
            bases = [part.get_base_layer() for part in layers]
            if stop:
                layers[3].get_delta_weight = interrupting(layers[3].get_delta_weight, at=1, times=1)
        assert all(torch.equal(base.weight, weight) for base, weight in zip(bases, expected, strict=True))
        assert dict(lab.model.named_modules()) == plain
        merged.append(lab.fingerprint)
    assert merged[0] == merged[1]


@pytest.mark.long
def test_without_a_cache_bad_pictures_are_skipped_as_with_one(train: Train, tmp_path: Path) -> None:
    write_rows(tmp_path, text_every=0)
    (tmp_path / "images/1.png").write_bytes(b"no picture")
    (tmp_path / "images/2.png").write_bytes((tmp_path / "images/2.png").read_bytes()[:100])
    _, cached = train(skip_bad=True)
    _, plain = train(name="b", skip_bad=True, cache=False)
    assert plain.skipped == cached.skipped
    assert len(plain.skipped) == 2
    np.testing.assert_allclose(plain.losses, cached.losses, atol=2e-4)


def test_a_folder_with_a_run_wants_resume_and_the_same_settings(tmp_path: Path, tiny_folder: Path) -> None:
    write_rows(tmp_path)
    _train(tiny_folder, tmp_path / "out", tmp_path, steps=2)
    assert last_checkpoint(tmp_path / "out/instruct") is not None
    with pytest.raises(OptionError, match="holds a run already; add --resume"):
        _train(tiny_folder, tmp_path / "out", tmp_path, steps=2)
    with pytest.raises(OptionError, match="was begun with another samples: 8, now 12"):
        _train(tiny_folder, tmp_path / "out", tmp_path, steps=3, resume=True)
    with pytest.raises(OptionError, match="begun with another recipe"):
        _train(tiny_folder, tmp_path / "out", tmp_path, steps=2, resume=True, recipe=replace(RECIPE, lora=Lora()))


# -- several processes

RUN = """
import json, sys
from dataclasses import replace
import llava_lab as ll
from llava_lab.training.recipe import LLAVA_15_7B
from llava_lab.training.stages import Running, train_stage
model, data, out, cache = sys.argv[1:]
recipe = replace(LLAVA_15_7B.instruct, batch=8, rate=1e-3)
done = train_stage(ll.load(model), data, "instruct", out, recipe=recipe, steps=6, cache=cache,
                   running=Running(device_batch=2, save_every=3, progress=False))
print(json.dumps(done.losses))
"""


def _launched(tiny_folder: Path, root: Path, out: str, processes: int) -> list[float]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    running = []
    for rank in range(processes):
        env = dict(os.environ)
        if processes > 1:  # what torchrun and accelerate launch set
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            env |= place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, "-c", RUN, str(tiny_folder), str(root / "mix.json"), str(root / out), str(root / "cache")]
        running.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=300) for process in running]
    assert all(process.returncode == 0 for process in running), outputs[0][1][-3000:] + outputs[-1][1][-3000:]
    return json.loads(outputs[0][0].splitlines()[-1])


@pytest.mark.long
def test_two_processes_give_the_loss_curve_of_one(tmp_path: Path, tiny_folder: Path) -> None:
    write_rows(tmp_path)
    one, two = _launched(tiny_folder, tmp_path, "one", 1), _launched(tiny_folder, tmp_path, "two", 2)
    assert len(one) == len(two) == 6
    assert one[-1] < one[0]
    np.testing.assert_allclose(two, one, atol=1e-4, rtol=0)
    a, b = (load_file(tmp_path / out / "instruct/model/model.safetensors") for out in ("one", "two"))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-3
    assert all(torch.isfinite(value).all() for value in b.values())
