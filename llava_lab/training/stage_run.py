"""One stage carried out: the model prepared and put back, the Trainer run, the result saved whole.

The heavy imports (accelerate, transformers' Trainer) are here, so that `two_stages` can be named cheaply.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llava_lab.errors import CheckpointError, OptionError
from llava_lab.models import layout
from llava_lab.training.collate import Collate, reading_features
from llava_lab.training.llava_data import LlavaData
from llava_lab.training.loop import freeze_all_but
from llava_lab.training.lora import adapters
from llava_lab.training.mixing import Order
from llava_lab.training.progress import OnLog, Progress, Stop, stopping
from llava_lab.training.recipe import LlavaStage
from llava_lab.training.trainer import LlavaTrainer, last_checkpoint, load_trained

if TYPE_CHECKING:
    from llava_lab.models import Lab
    from llava_lab.training.two_stages import Running

log = logging.getLogger(__name__)

_ABSENT = object()

Done = tuple[int, int, str, tuple[float, ...], tuple[int, ...]]


def carry_out(
    lab: Lab,
    rows: LlavaData,
    order: Order,
    args: Any,
    recipe: LlavaStage,
    running: Running,
    *,
    folder: Path,
    cached: Any,
    told: OnLog | None,
) -> Done:
    """Train, save ``folder/model``, and say (steps, of, stopped, losses, their steps); see `two_stages.Trained`."""
    stop = Stop()
    progress = Progress(recipe.name, folder / "log.jsonl", stop, show=running.progress, told=told)
    resume = last_checkpoint(folder)
    if args.process_index == 0:
        _forget_later(folder / "log.jsonl", resume)
    collate = Collate(int(lab.tokenizer.pad_token_id or 0), *_picture_shape(lab, cached))
    with ExitStack() as held:
        held.enter_context(parts_training(lab.model, recipe.trains))
        held.enter_context(reading_features(lab.model, cached=cached is not None))
        model = held.enter_context(adapters(lab.model, recipe.lora))
        held.enter_context(stopping(stop))
        options: dict[str, Any] = {"data": rows, "order": order, "collate": collate, "connector_rate": recipe.connector_rate}
        trainer = LlavaTrainer(model, args, **options, callbacks=[progress])
        if recipe.lora and trainer.is_fsdp_enabled:
            raise OptionError("LoRA adapters are merged in one piece, FSDP has them in parts; launch without --use_fsdp")
        stopped = _train(trainer, progress, folder, resume)
    _save(lab, trainer, folder)
    history = [row for row in trainer.state.log_history if "loss" in row]
    losses, logged = tuple(float(row["loss"]) for row in history), tuple(int(row["step"]) for row in history)
    finished = trainer.state.global_step >= args.max_steps
    return trainer.state.global_step, args.max_steps, "finished" if finished else stopped, losses, logged


def _train(trainer: LlavaTrainer, progress: Progress, folder: Path, resume: Path | None) -> str:
    """Run it; an interrupt ends it, and weights caught half-way through a step go back to the last checkpoint."""
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return "interrupted"  # unless every step is done, which the caller sees
    except KeyboardInterrupt:
        good = last_checkpoint(folder)
        if progress.stepping and good is not None and not trainer.is_fsdp_enabled:
            load_trained(trainer.model, good)
        log.warning("stopped at step %d", trainer.state.global_step)
        return "interrupted"
    finally:
        progress.close()


def _save(lab: Lab, trainer: LlavaTrainer, folder: Path) -> None:
    """Write the model as an ordinary transformers folder, whole or not at all."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_fsdp_enabled else None
    if trainer.is_world_process_zero():
        part, target = folder / "model.part", folder / "model"
        try:
            shutil.rmtree(part, ignore_errors=True)
            lab.model.save_pretrained(part, state_dict=state)
            lab.processor.save_pretrained(part)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(part, target)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise CheckpointError(f"cannot write {target} ({error}); its checkpoints stay, make room and --resume") from error
    trainer.accelerator.wait_for_everyone()


@contextmanager
def parts_training(model: Any, names: Sequence[str]) -> Iterator[list[str]]:
    """Within it only parameters under the named parts train; flags, modes and config are put back afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    caches = [(part, part.__dict__.get("use_cache", _ABSENT)) for part in (model.config, model.config.text_config)]
    try:
        trained = freeze_all_but(model, names)
        if not trained:
            raise OptionError(f"nothing to train: no parameter under {', '.join(names)}")
        yield trained
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, mode in modes:
            module.training = mode
        for part, value in caches:
            if value is not _ABSENT:
                part.use_cache = value
            elif "use_cache" in part.__dict__:  # the Trainer sets it on configurations that never had it
                del part.use_cache
        if model.is_activation_checkpointing:
            model.activation_checkpointing_disable()


def _picture_shape(lab: Lab, cached: Any) -> tuple[tuple[int, ...], torch.dtype]:
    config: Any = lab.model.config
    vision = config.vision_config
    if cached is None:
        return (3, vision.image_size, vision.image_size), torch.float32
    tokens = (vision.image_size // vision.patch_size) ** 2
    if config.vision_feature_select_strategy != "default":
        tokens += int(layout.has_class_token(lab.model))
    return (tokens, vision.hidden_size * len(layout.feature_layers(config))), cached.dtype


def _forget_later(log_file: Path, resume: Path | None) -> None:
    """Drop log rows of steps that will be done again."""
    if not log_file.exists():
        return
    step = int(resume.name.split("-")[1]) if resume else 0
    kept = []
    for line in log_file.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut short by the end of the process that wrote it
        if row["step"] <= step:
            kept.append(line + "\n")
    log_file.write_text("".join(kept))
