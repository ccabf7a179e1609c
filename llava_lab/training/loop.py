"""One training loop: rates, mixed precision, logs, checkpoints, going on after a stop.

A stage is plain data (`recipe.Stage`), the loss is a function of a batch, and batches are numbered by their step.
Everything random comes from the step's own number, so a stage resumed at step n continues exactly as if it had never
stopped. Weight matrices may use Muon (orthogonalised momentum, torch.optim.Muon), the rest AdamW.

    losses = train(stage, {"connector": connector}, batches, lambda batch: (loss_of(model, batch), {}), folder=out)

Used by the recipes of `tiny` and `smol` and by the runs of a comparison. LLaVA's own two stages go through
transformers' Trainer (`trainer`), which brings processes and accumulation; connectors trained together (`together`)
keep the Trainer's schedule, so that each learns what it would learn alone.
"""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from llava_lab.capture import random_states_kept
from llava_lab.checks import not_finite, undoing
from llava_lab.errors import CheckpointError, LabError, OptionError, one_line
from llava_lab.results import only_writer, whole_file
from llava_lab.training.recipe import Stage

log = logging.getLogger(__name__)

SAVE_EVERY = 120.0  # seconds between checkpoints
LOG_EVERY = 20  # steps
NOT_MUON = ("embed", "head", "position")  # parts of names of two-dimensional parameters that are no hidden matrices

LossOf = Callable[[Any], tuple[Tensor, dict[str, Any]]]  # a batch's loss, and what its log line says beside it


class Diverged(LabError):
    """Training whose numbers are no longer finite; `losses` are those of every step so far, `step` the one not taken."""

    def __init__(self, message: str, step: int, losses: Sequence[float]) -> None:
        super().__init__(message)
        self.step, self.losses = step, list(losses)


@contextmanager
def own_folder(
    folder: Path, names: Sequence[str], *, chosen: Sequence[str] | None, steps_scale: float, resume: bool
) -> Iterator[None]:
    """A recipe's run in `folder`, whose stages are `names`: nobody else writes there, and random states come back.

    Raises OptionError when `chosen` names another stage, for no steps, or when the folder holds a run that is not resumed.
    """
    if unknown := set(chosen or ()) - set(names):
        raise OptionError(f"stages are {', '.join(names)}; got {', '.join(sorted(unknown))}")
    if steps_scale <= 0:
        raise OptionError(f"steps_scale must be above 0, got {steps_scale}")
    with only_writer(folder), random_states_kept():
        if not resume and any((folder / f"{name}.pt").exists() for name in names):
            raise OptionError(f"{folder} holds a run already; add --resume to go on with it, or choose another folder")
        yield


def refuse_diverged(
    what: str, step: int, losses: Sequence[float], *, rate: float, norm: float = 0.0, weights: Iterable[Tensor] = ()
) -> None:
    """Raise Diverged when the last loss, the gradient's norm or one of the `weights` is not finite: the rule of all training."""
    if losses and not math.isfinite(losses[-1]):
        found = f"its loss is {losses[-1]:g}"
    elif not math.isfinite(norm):
        found = f"the norm of its loss's gradient is {norm:g}"
    elif any(map(not_finite, weights)):
        found = "it leaves weights that are not finite"
    else:
        return
    raise Diverged(
        f"{what} ended at step {step}, at a rate of {rate:.3g}: {found}; nothing after the last good checkpoint is kept, "
        "train with a lower rate",
        step,
        losses,
    )


def quick_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware; elsewhere it is some ten times as slow as float32."""
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def train(
    stage: Stage,
    modules: Mapping[str, nn.Module],
    data: Any,
    loss_of: LossOf,
    *,
    folder: Path | None = None,
    rates: Mapping[str, float] | None = None,
    bf16: bool = True,
    workers: int = 0,
    check: Callable[[int], dict[str, Any]] | None = None,
    check_every: int = 500,
    on_step: Callable[[int], Any] | None = None,
) -> list[float]:
    """Train the stage's steps and return every step's loss.

    `data[step]` is the whole batch of that step. Parameters of `modules` that ask for gradients train; `rates` gives some
    modules a peak of their own. With `folder` the run keeps ``STAGE.pt`` (modules under their names, optimisers, losses)
    and ``STAGE.jsonl`` (one line every `LOG_EVERY` steps, with what `check` says every `check_every`), and goes on from
    there. `workers` processes read batches ahead. `on_step` is called with 1 after every step.

    Raises Diverged where a loss, a gradient or a weight to be saved is not finite: the step is not taken, and nothing is
    saved after the last good checkpoint.
    """
    optimisers = optimizers(modules, stage, rates)
    start, used = 0, 0.0
    losses: list[float] = []
    if folder is not None:
        start, losses, used = _go_on(folder / f"{stage.name}.pt", modules, optimisers)
        if start >= stage.steps:
            return losses
    trained = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
    begin = last_save = time.monotonic()
    with (folder / f"{stage.name}.jsonl").open("a") if folder is not None else nullcontext() as lines:
        for step, batch in enumerate(_batches(data, start, stage.steps, workers), start):
            spent, share = used + time.monotonic() - begin, rate_at(stage, step, stage.steps)
            for group in (group for optimiser in optimisers for group in optimiser.param_groups):
                group["lr"] = group["peak"] * share
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss, facts = loss_of(batch)
            losses.append(loss.item())
            sound = partial(refuse_diverged, f"stage {stage.name!r}", step, losses, rate=stage.rate * share)
            sound()
            loss.backward()
            sound(norm=float(torch.nn.utils.clip_grad_norm_(trained, stage.clip)))
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            if on_step is not None:
                on_step(1)
            done = step + 1 == stage.steps
            if lines is not None and (step % LOG_EVERY == 0 or done):
                row = {"step": step, "loss": round(losses[-1], 5), "rate": round(share, 5), "seconds": round(spent, 1), **facts}
                if check and (step % check_every == 0 or done):
                    row |= check(step)
                lines.write(json.dumps(row) + "\n")
                lines.flush()
            if folder is not None and (done or time.monotonic() - last_save > SAVE_EVERY):
                sound(weights=trained)
                _save(folder / f"{stage.name}.pt", modules, optimisers, step + 1, losses, spent)
                last_save = time.monotonic()
    return losses


def _batches(data: Any, start: int, steps: int, workers: int) -> Iterator[Any]:
    if workers:
        yield from DataLoader(data, batch_size=None, sampler=range(start, steps), num_workers=workers, prefetch_factor=4)
    else:
        yield from (data[step] for step in range(start, steps))


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


@contextmanager
def restored(*modules: nn.Module) -> Iterator[None]:
    """On leaving, parameters ask for gradients as before and hold none, and every module is in the mode it was in."""
    flags = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters()]
    modes = [(part, part.training) for module in modules for part in module.modules()]

    def undo() -> None:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for part, mode in modes:
            part.training = mode

    with undoing(undo):
        yield


def optimizers(
    modules: Mapping[str, nn.Module], stage: Stage, rates: Mapping[str, float] | None = None
) -> list[torch.optim.Optimizer]:
    """AdamW for vectors, embeddings, heads and convolutions; Muon for matrices when the stage asks for it.

    A module named in `rates` has its own peak, and Muon's follows it in the stage's proportion.
    """
    ratio = stage.matrix_rate / stage.rate
    groups: dict[bool, dict[float, list[nn.Parameter]]] = {False: {}, True: {}}
    for module_name, module in modules.items():
        peak = (rates or {}).get(module_name, stage.rate)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                matrix = bool(ratio) and parameter.ndim == 2 and not any(part in name for part in NOT_MUON)
                groups[matrix].setdefault(peak * ratio if matrix else peak, []).append(parameter)
    adamw, muon = ([{"params": p, "lr": peak, "peak": peak} for peak, p in groups[matrix].items()] for matrix in (False, True))
    made: list[torch.optim.Optimizer] = []
    if adamw:
        made.append(torch.optim.AdamW(adamw, betas=(0.9, 0.98), weight_decay=stage.decay, fused=True))
    if muon:
        made.append(torch.optim.Muon(muon, weight_decay=stage.decay, momentum=0.95))
    return made


def rate_at(stage: Stage, step: int, steps: int) -> float:
    """Share of the peak rate: linear warm-up, then cosine down to `stage.final`."""
    warmup = max(1, round(stage.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return stage.final + (1 - stage.final) * 0.5 * (1 + math.cos(math.pi * done))


def remember_stage(folder: Path, stage: Stage, **also: Any) -> None:
    """Keep a stage's settings in ``STAGE.recipe.json``. Raises OptionError where its state is of a stage with others."""
    resume = (folder / f"{stage.name}.pt").exists()
    same_settings(folder / f"{stage.name}.recipe.json", asdict(stage) | also, resume=resume)


def same_settings(note: Path, now: Mapping[str, Any], *, resume: bool) -> None:
    """Keep what decides a run's weights in `note`, or hold a resumed run against it.

    Raises OptionError for another run's, CheckpointError for a note that cannot be read.
    """
    now = json.loads(json.dumps(now))
    if resume and note.exists():
        try:
            then = dict(json.loads(note.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{note} is damaged ({one_line(error)}); remove it to resume without this check") from None
        # what an older version did not note is not known to differ
        if name := next((name for name in now if name in then and now[name] != then[name]), None):
            raise OptionError(f"{note.parent} was begun with another {name}: {then[name]}, now {now[name]}; resume with the same")
    with whole_file(note) as temporary:
        temporary.write_text(json.dumps(now, indent=1))


def _save(
    path: Path, modules: Mapping[str, nn.Module], optimisers: list[torch.optim.Optimizer], step: int, losses: list, used: float
) -> None:
    state = {
        "modules": {name: module.state_dict() for name, module in modules.items()},
        "optimizers": [optimiser.state_dict() for optimiser in optimisers],
        "step": step,
        "losses": losses,
        "seconds": used,
    }
    if path.exists():
        with whole_file(_before(path)) as temporary:
            shutil.copyfile(path, temporary)
    with whole_file(path) as temporary:
        torch.save(state, temporary)


def _before(path: Path) -> Path:
    """The state before the one in `path`."""
    return path.with_name(f"{path.stem}.before.pt")


def read_state(path: Path) -> dict[str, Any]:
    """What a stage's file holds: ``modules``, ``losses``, ... Raises CheckpointError where it is missing or damaged.

    torch keeps a checksum of each part in the file and does not look at it again; here it is looked at.
    """
    try:
        with zipfile.ZipFile(path) as file:
            wrong = file.testzip()
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; expected a training state of our recipe") from None
    except (OSError, RuntimeError, EOFError, ValueError, TypeError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is damaged, or no training state of our recipe ({one_line(error)})") from None
    if wrong or "modules" not in state:
        raise CheckpointError(f"{path} is damaged, or no training state of our recipe ({wrong or 'it holds no modules'})")
    return state


def _go_on(
    path: Path, modules: Mapping[str, nn.Module], optimisers: list[torch.optim.Optimizer]
) -> tuple[int, list[float], float]:
    """(next step, losses so far, seconds used) of the run that `path` keeps, put into modules and optimisers."""
    if not path.exists():
        return 0, [], 0.0
    try:
        state = read_state(path)
    except CheckpointError as error:
        if not _before(path).exists():
            raise CheckpointError(f"{error}; remove it to train the stage from its beginning") from None
        log.warning("%s; going on from the state before it", error)
        state = read_state(_before(path))
        os.replace(_before(path), path)
    for name, module in modules.items():
        module.load_state_dict(state["modules"][name])
    for optimiser, saved in zip(optimisers, state["optimizers"], strict=True):
        peaks = [group["peak"] for group in optimiser.param_groups]
        optimiser.load_state_dict(saved)
        for group, peak in zip(optimiser.param_groups, peaks, strict=True):
            group["peak"] = peak  # the stage's rate counts, not the one it was saved with
    log.info("resuming %s at step %d", path.stem, state["step"])
    return state["step"], state["losses"], state["seconds"]
