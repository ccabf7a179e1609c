"""A run killed at any moment goes on to the same bits; a full disk leaves the last good checkpoint.

The runs are forked from one process that has done the imports, and killed with SIGKILL: at random moments,
and inside the writing and renaming of checkpoints.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_lab as ll
from llava_lab.errors import CheckpointError, OptionError
from llava_lab.training import trainer as trainer_module
from llava_lab.training.recipe import LLAVA_15_7B, Lora
from llava_lab.training.stages import Running, train_stage
from llava_lab.training.trainer import checkpoints, last_checkpoint
from tests.support.training_rows import write_rows

STEPS = 10
RECIPE = replace(LLAVA_15_7B.instruct, batch=4, rate=1e-3, lora=None)
QUICK = Running(save_every=1, progress=False)

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
    given: dict[str, Any] = {"recipe": RECIPE, "steps": 6, "running": QUICK, "cache": root / "cache"} | options
    return train_stage(ll.load(str(folder)), root / "mix.json", "instruct", out, **given)


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
    assert [path.name for path in checkpoints(tmp_path / "full/instruct")] == ["checkpoint-2", "checkpoint-3"]
    assert not (tmp_path / "full/instruct/.part").exists()
    again = _train(tiny_folder, tmp_path / "full", tmp_path, resume=True)
    assert again.losses == whole.losses
    a, b = (load_file(Path(done.folder) / "model.safetensors") for done in (whole, again))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("how", ["signal", "exception"])
def test_stopping_keeps_what_is_trained_and_resumes_to_the_same_bits(tmp_path: Path, tiny_folder: Path, how: str) -> None:
    write_rows(tmp_path)
    whole = _train(tiny_folder, tmp_path / "whole", tmp_path)
    before = signal.getsignal(signal.SIGINT)

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            if how == "exception":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)

    done = _train(tiny_folder, tmp_path / "stopped", tmp_path, told=stop, running=replace(QUICK, save_every=2))
    assert signal.getsignal(signal.SIGINT) == before
    assert done.stopped == "interrupted"
    assert (done.steps, done.of) == ((3, 6) if how == "exception" else (4, 6))
    assert ll.load(done.folder).card.parameters == ll.load(str(tiny_folder)).card.parameters
    again = _train(tiny_folder, tmp_path / "stopped", tmp_path, resume=True)
    assert (again.stopped, again.steps, again.losses) == ("finished", 6, whole.losses)
    a, b = (load_file(Path(one.folder) / "model.safetensors") for one in (whole, again))
    assert all(torch.equal(a[name], b[name]) for name in a)


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
