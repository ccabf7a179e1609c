"""One training loop for every stage: rates, mixed precision, logs, checkpoints, resuming.

A stage is a function from a batch to a loss; everything random comes from the step's own
number, so a stage resumed at step n continues exactly as if it had never stopped. Weight
matrices may use Muon (orthogonalised momentum, torch.optim.Muon), the rest AdamW.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from llava_lab.training.recipe import Stage

log = logging.getLogger(__name__)

SAVE_EVERY = 120.0  # seconds between checkpoints
LOG_EVERY = 20  # steps
NOT_MUON = ("embed", "head", "position")  # parts of names of two-dimensional parameters that are no hidden matrices


def freeze_all_but(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Let only parameters under the named parts train; returns their names and logs the split."""
    wanted = tuple(names)
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name.split(".") for part in wanted))
        if parameter.requires_grad:
            trained.append(name)
    total = sum(p.numel() for p in model.parameters())
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info("training %s: %d of %d parameters", ", ".join(wanted), count, total)
    return trained


def optimizers(modules: list[nn.Module], stage: Stage) -> list[torch.optim.Optimizer]:
    """AdamW for vectors, embeddings, heads and convolutions; Muon for matrices when the stage asks for it."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            inner = parameter.ndim == 2 and not any(part in name for part in NOT_MUON)
            (matrices if inner and stage.matrix_rate else rest).append(parameter)
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=stage.rate, betas=(0.9, 0.98), weight_decay=stage.decay, fused=True)
    ]
    if matrices:
        muon = torch.optim.Muon(matrices, lr=stage.matrix_rate, weight_decay=stage.decay, momentum=0.95)
        found.append(muon)
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return found


def rate_at(stage: Stage, step: int, steps: int) -> float:
    """Share of the peak rate: linear warm-up, then cosine down to `stage.final`."""
    warmup = max(1, round(stage.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return stage.final + (1 - stage.final) * 0.5 * (1 + math.cos(math.pi * done))


def run_stage(
    stage: Stage,
    modules: dict[str, nn.Module],
    data: Dataset,
    loss_of: Callable[[Any], tuple[Tensor, dict[str, float]]],
    *,
    folder: Path,
    steps: int | None = None,
    seconds: float | None = None,
    workers: int = 1,
    check: Callable[[int], dict[str, float]] | None = None,
    check_every: int = 500,
) -> list[float]:
    """Train until `steps` are done and return every step's loss; resumes from `folder` if it can.

    `data[step]` is the whole batch of that step. `modules` are saved under their names. With
    `seconds` the schedule follows the clock instead: the rate falls with the time used, and the
    stage ends when it is spent (the step count then is what the card reports).
    """
    steps = steps or stage.steps
    opts = optimizers(list(modules.values()), stage)
    state_file, log_file = folder / f"{stage.name}.pt", folder / f"{stage.name}.jsonl"
    start, losses, used = _resume(state_file, modules, opts)
    if start >= steps or (seconds and used >= seconds):
        return losses
    loader = DataLoader(
        data, batch_size=None, sampler=range(start, steps), num_workers=workers, prefetch_factor=4 if workers else None
    )
    trained = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
    begin = last_save = time.monotonic()
    with log_file.open("a") as lines:
        for step, batch in enumerate(loader, start):
            spent = used + time.monotonic() - begin
            share = rate_at(stage, step, steps) if not seconds else rate_at(stage, round(1e4 * spent / seconds), 10_000)
            for optimizer in opts:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * share
            with torch.autocast("cpu", torch.bfloat16):
                loss, extra = loss_of(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, stage.clip)
            for optimizer in opts:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            done = step + 1 == steps or bool(seconds and spent >= seconds)
            if step % LOG_EVERY == 0 or done:
                row = {"step": step, "loss": round(losses[-1], 5), "rate": round(share, 5), "seconds": round(spent, 1), **extra}
                if check and (step % check_every == 0 or done):
                    row |= check(step)
                lines.write(json.dumps(row) + "\n")
                lines.flush()
            if done or time.monotonic() - last_save > SAVE_EVERY:
                _save(state_file, modules, opts, step + 1, losses, spent)
                last_save = time.monotonic()
            if done:
                break
    return losses


def _save(
    path: Path, modules: dict[str, nn.Module], opts: list[torch.optim.Optimizer], step: int, losses: list[float], used: float
) -> None:
    state = {
        "modules": {name: module.state_dict() for name, module in modules.items()},
        "optimizers": [optimizer.state_dict() for optimizer in opts],
        "step": step,
        "losses": losses,
        "seconds": used,
    }
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def _resume(path: Path, modules: dict[str, nn.Module], opts: list[torch.optim.Optimizer]) -> tuple[int, list[float], float]:
    if not path.exists():
        return 0, [], 0.0
    state = torch.load(path, weights_only=True)
    for name, module in modules.items():
        module.load_state_dict(state["modules"][name])
    for optimizer, saved in zip(opts, state["optimizers"], strict=True):
        peaks = [group["peak"] for group in optimizer.param_groups]
        optimizer.load_state_dict(saved)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["peak"] = peak  # the stage's rate counts, not the one it was saved with
    log.info("resuming %s at step %d", path.stem, state["step"])
    return state["step"], state["losses"], state["seconds"]
