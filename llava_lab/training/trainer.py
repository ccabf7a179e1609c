"""transformers' Trainer with LLaVA's order of data, a rate for the connector, and checkpoints that are whole.

A checkpoint is written under ``.part/`` and renamed when every process has finished its share: a folder
``checkpoint-N`` is complete or not there. It holds the parameters that train, not the frozen ones, with the
optimiser, the schedule, the random states and the step. Under FSDP the sharded files are transformers' own.

Read against transformers 5.23 ``trainer.py`` (`_save_checkpoint`, `_load_from_checkpoint`, `_get_train_sampler`,
`create_optimizer`); the connector's own rate is haotian-liu/LLaVA @ c121f04 ``llava_trainer.py`` (mm_projector_lr).
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from llava_lab.errors import CheckpointError
from llava_lab.training.llava_data import LlavaData

log = logging.getLogger(__name__)

CONNECTOR = "multi_modal_projector"
TRAINED = "trained.safetensors"
PART = ".part"
KEEP = 2  # checkpoints that stay
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class LlavaTrainer(Trainer):
    """Trainer over `LlavaData` in the order of a sampler; `connector_rate` None gives the connector the common rate."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        data: LlavaData,
        order: Sampler[int],
        collate: Any,
        connector_rate: float | None = None,
        callbacks: list[Any],
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=data, data_collator=collate, callbacks=callbacks)
        for shown in (PrinterCallback, ProgressCallback):  # ours says the same on one line, and to standard error
            self.remove_callback(shown)
        self.optimizer: torch.optim.Optimizer | None
        self._order, self._connector_rate = order, connector_rate
        self._place: Path | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._order

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over decayed and undecayed parameters of the connector and of the rest, as LLaVA groups them."""
        if self.optimizer is None:
            trained = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(trained))
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            groups = []
            for connector in (False, True):
                for decay in (True, False):
                    chosen = [
                        p
                        for name, p in trained.named_parameters()
                        if p.requires_grad and (CONNECTOR in name) == connector and (name in decayed) == decay
                    ]
                    rate = self._connector_rate if connector and self._connector_rate is not None else self.args.learning_rate
                    if chosen:
                        groups.append({"params": chosen, "weight_decay": self.args.weight_decay * decay, "lr": rate})
            self.optimizer = kind(groups, **options)
        return self.optimizer

    # -- checkpoints ------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._place or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        if (run / name).is_dir():  # already there: stopped at a step that had been saved
            return
        self._place = run / PART
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                sync(self._place / name)
                os.replace(self._place / name, run / name)
                self._forget_old(run)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save on a full disk raises RuntimeError
            shutil.rmtree(run / PART, ignore_errors=True)
            good = last_checkpoint(run)
            kept = f"the last good one is {good}" if good else "there is none before it"
            raise CheckpointError(
                f"cannot write {run / name} ({' '.join(str(error).split())[:200]}); {kept}; make room and go on with --resume"
            ) from error
        finally:
            self._place = None
        self.accelerator.wait_for_everyone()

    def _forget_old(self, run: Path) -> None:
        for old in checkpoints(run)[:-KEEP]:
            os.replace(old, run / PART / f"old-{old.name}")  # a half-deleted checkpoint must not carry its name
        shutil.rmtree(run / PART, ignore_errors=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trained parameters only; what is frozen is in the model the run began with."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(trained_state(self.model), folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trained(model or self.model, Path(resume_from_checkpoint))


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter that trains, by name, contiguous."""
    return {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def load_trained(model: nn.Module, checkpoint: Path) -> None:
    """Put a checkpoint's parameters into a model. Raises CheckpointError when it trained other parameters."""
    saved = load_file(checkpoint / TRAINED)
    mine = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if saved.keys() != mine.keys() or any(saved[name].shape != p.shape for name, p in mine.items()):
        odd = sorted(saved.keys() ^ mine.keys())[:3] or [n for n, p in mine.items() if saved[n].shape != p.shape][:3]
        raise CheckpointError(f"{checkpoint} trained other parameters than this run does (for example {', '.join(odd)})")
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(saved[name])


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [(int(match.group(1)), path) for path in run.glob("checkpoint-*") if (match := CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def last_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint, None before the first."""
    found = checkpoints(run)
    return found[-1] if found else None


def sync(folder: Path) -> None:
    """Ask the system to put a folder's files on the disk, so that a rename never precedes what it names."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_file() or os.name == "posix":  # folders can be synced where they can be opened
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
