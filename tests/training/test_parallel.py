"""Two processes train as one does at the same global batch: the loss curves agree, and so do the weights."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from tests.support.training_rows import write_rows

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


def _run(tiny_folder: Path, root: Path, out: str, processes: int) -> list[float]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    running = []
    for rank in range(processes):
        env = dict(os.environ)
        if processes > 1:  # what torchrun and accelerate launch set
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            env |= place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, "-c", RUN, str(tiny_folder), str(root / "mix.json"), str(root / out), str(root / "cache")]
        running.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=300) for process in running]
    assert all(process.returncode == 0 for process in running), said[0][1][-3000:] + said[-1][1][-3000:]
    return json.loads(said[0][0].splitlines()[-1])


def test_two_processes_give_the_loss_curve_of_one(tmp_path: Path, tiny_folder: Path) -> None:
    write_rows(tmp_path)
    one, two = _run(tiny_folder, tmp_path, "one", 1), _run(tiny_folder, tmp_path, "two", 2)
    assert len(one) == len(two) == 6
    assert one[-1] < one[0]
    np.testing.assert_allclose(two, one, atol=1e-4, rtol=0)
    a, b = (load_file(tmp_path / out / "instruct/model/model.safetensors") for out in ("one", "two"))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-3
    assert all(torch.isfinite(value).all() for value in b.values())
