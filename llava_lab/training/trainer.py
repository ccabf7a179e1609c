"""transformers' Trainer as LLaVA's two stages need it: its order of data, its batches, its checkpoints, its progress.

*Trainer.* Rows come in the order of a sampler, the connector may have a rate of its own. A checkpoint holds the
parameters that train, not the frozen ones, with the optimiser, the schedule, the random states and the step, and last the
hash of each of its files; it counts while every file has its hash. Under FSDP the sharded files are transformers' own.

*Batches.* Logits are computed only at positions some row learns from (`logits_to_keep`), with the labels already moved
one place. `reading_features` lets a stock LLaVA take cached features in place of pixels and keeps the tower out of every
graph. A batch without pictures still goes through the connector, which gets zero gradients: processes that train together
must all reduce the same parameters.

*Progress.* One bar with the time left, one line of JSON a step, and a stop that keeps the work: the first interrupt
(Ctrl-C, a notebook's stop button) ends the run after the step under way, with a checkpoint; the second stops at once.
Beside the main thread, where no interrupt is heard, `told` may raise KeyboardInterrupt: it is the first interrupt, and
the step under way is its own.

Sources: transformers 5.23 ``trainer.py`` (`_save_checkpoint`, `_load_from_checkpoint`, `_get_train_sampler`,
`create_optimizer`); haotian-liu/LLaVA @ c121f04 ``llava_trainer.py`` (mm_projector_lr), ``llava/train/train.py`` (a zero
image for text-only samples) and ``llava_arch.py`` (features ``[0:0]``).
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.trainer import TRAINER_STATE_NAME

from llava_lab.capture import hooked
from llava_lab.checks import undoing
from llava_lab.errors import CheckpointError, one_line
from llava_lab.models import layout
from llava_lab.results import file_hash, whole_file
from llava_lab.training.features import tower_features
from llava_lab.training.loop import Diverged, refuse_diverged
from llava_lab.training.rows import LlavaData
from llava_lab.training.text import IGNORE, stacked

log = logging.getLogger(__name__)

CONNECTOR = "multi_modal_projector"
TRAINED = "trained.safetensors"
HASHES = "hashes.json"  # of a checkpoint's files, by name; written last
STATES = (TRAINED, "optimizer.pt", "scheduler.pt", "rng_state*.pth")  # without them a run goes on to other bits
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
        for callback in (PrinterCallback, ProgressCallback):  # ours says the same on one line, and to standard error
            self.remove_callback(callback)
        self.optimizer: torch.optim.Optimizer | None
        self._order, self._connector_rate = order, connector_rate
        self.diverged: Diverged | None = None  # how the run ended, where its numbers were no longer finite

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

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm, before the step it belongs to; every process has the same, so all of them end together."""
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None:
            refuse_diverged("training", self.state.global_step + 1, (), rate=self._get_learning_rate(), norm=float(norm))
        return norm

    # -- checkpoints ------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self.args.output_dir)
        folder = run / f"checkpoint-{self.state.global_step}"
        already = damage(folder) is None  # when the run stops at a step that was saved anyway
        self.accelerator.wait_for_everyone()
        if already:
            return
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            weights = trained_state(self.model).values()
            refuse_diverged("training", self.state.global_step, (), rate=self._get_learning_rate(), weights=weights)
        try:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                hashes = {path.relative_to(folder).as_posix(): file_hash(path) for path in folder.rglob("*") if path.is_file()}
                with whole_file(folder / HASHES) as temporary:
                    temporary.write_text(json.dumps(hashes, indent=1))
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save on a full disk raises RuntimeError
            shutil.rmtree(folder, ignore_errors=True)
            good = last_checkpoint(run)
            before = f"the last good one is {good}" if good else "there is none before it"
            raise CheckpointError(
                f"cannot write {folder} ({' '.join(str(error).split())[:200]}); {before}; make room and go on with --resume"
            ) from error
        self.accelerator.wait_for_everyone()

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
    put_trained(model, load_file(checkpoint / TRAINED), checkpoint)


def put_trained(model: nn.Module, saved: Mapping[str, Tensor], checkpoint: Path) -> None:
    """The same with the parameters of `checkpoint`, or of a run's start, in memory already."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if saved.keys() != own.keys() or any(saved[name].shape != p.shape for name, p in own.items()):
        odd = sorted(saved.keys() ^ own.keys())[:3] or [n for n, p in own.items() if saved[n].shape != p.shape][:3]
        raise CheckpointError(f"{checkpoint} trained other parameters than this run does (for example {', '.join(odd)})")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, None when it is whole: one is missing, or is not what was written."""
    try:
        hashes = dict(json.loads((checkpoint / HASHES).read_text()))
        wrong = next((name for name, known in hashes.items() if file_hash(checkpoint / name) != known), None)
        return f"{wrong} is damaged" if wrong else None
    except FileNotFoundError as error:
        if Path(error.filename).name != HASHES:
            return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, TypeError) as error:
        return f"its files cannot be read ({one_line(error)})"
    try:  # of a version that kept no hashes; transformers writes this file last
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return "it was never finished"
    sharded = any(path.is_dir() for path in checkpoint.iterdir())
    missing = next((name for name in STATES if not any(checkpoint.glob(name))), None)
    return f"{missing} is missing" if missing and not sharded else None


def last_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint, None before the first; one that is damaged is passed over, and the log says so."""
    numbered = [(int(match.group(1)), path) for path in run.glob("checkpoint-*") if (match := CHECKPOINT.fullmatch(path.name))]
    for _, path in sorted(numbered, reverse=True):
        if (why := damage(path)) is None:
            return path
        log.warning("%s is passed over: %s", path, why)
    return None


# -- batches -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collate:
    """Rows of `LlavaData` as one batch; `empty` is the shape of one picture, features (K, W) or pixels (3, S, S)."""

    pad_id: int
    empty: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The model's keywords: ``input_ids``, ``attention_mask`` (B, T), ``pixel_values`` (pictures, *empty), ``labels`` (B, K),
        ``logits_to_keep`` (K,) positions. Without a picture in any row ``pixel_values`` is one of zeros, which meets no token.
        """
        ids, nexts = stacked([(row["ids"], row["labels"]) for row in rows], self.pad_id)
        lengths = torch.tensor([len(row["ids"]) for row in rows])
        keep = (nexts != IGNORE).any(0).nonzero().flatten()
        pictures = [torch.as_tensor(row["picture"]) for row in rows if row["picture"] is not None]
        labels = nexts[:, keep]
        return {
            "input_ids": ids,
            "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
            "pixel_values": torch.stack(pictures) if pictures else torch.zeros(1, *self.empty, dtype=self.dtype),
            "labels": labels,
            "shift_labels": labels,
            "logits_to_keep": keep,
        }


@contextmanager
def reading_features(model: Any, *, cached: bool) -> Iterator[None]:
    """Within it the model's pictures are cached features (B, K, W), or pixels through the tower without a graph.

    A batch's only picture may be of zeros and belong to no row: it passes the connector and then is no token.
    """
    inner = model.model
    connector, image_id = layout.connector_of(model), int(model.config.image_token_index)
    expected = {"tokens": True}

    def image_features(pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        features = pixel_values if cached else tower_features(model, pixel_values)
        weight = next(connector.parameters(), None)
        tokens = connector(features if weight is None else features.to(weight.dtype)).flatten(0, 1)
        return BaseModelOutputWithPooling(pooler_output=[tokens if expected["tokens"] else tokens[:0]])

    def look(module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        ids = options["input_ids"] if "input_ids" in options else args[0]
        expected["tokens"] = bool((ids == image_id).any())

    with undoing(lambda: vars(inner).pop("get_image_features", None)), hooked(inner, before=look, with_kwargs=True):
        inner.get_image_features = image_features
        yield


# -- progress ------------------------------------------------------------------------------

OnLog = Callable[[dict[str, Any]], None]


class Stop:
    """Whether someone asked to stop."""

    def __init__(self) -> None:
        self.asked = False


class Progress(TrainerCallback):
    """Bar, ``log.jsonl`` and `told` with every logged step; ends the run when `stop` was asked for."""

    def __init__(self, name: str, log_file: Path, stop: Stop, *, show: bool = True, told: OnLog | None = None) -> None:
        self.name, self.log_file, self.stop, self.show, self.told = name, log_file, stop, show, told
        self.bar: Any = None
        self.stepping = False  # within the optimiser's step weights are half new
        self.begin = 0.0
        self.last: dict[str, Any] = {}  # row that was logged

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begin = time.monotonic()
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.name, unit="step", disable=not self.show)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stepping = True

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stepping = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
        if self.stop.asked:
            control.should_training_stop = control.should_save = control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self.bar is None or not logs or "loss" not in logs:
            return
        row = {"step": state.global_step, **logs, "seconds": round(time.monotonic() - self.begin, 2)}
        self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
        with self.log_file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.last = row
        if state.global_step >= state.max_steps or self.stop.asked:
            row["ended"] = "finished" if state.global_step >= state.max_steps else "interrupted"
        try:
            if self.told is not None:
                self.told(row)
        except KeyboardInterrupt:
            if self.stop.asked:
                raise
            self.stop.asked = control.should_training_stop = control.should_save = True

    def on_diverged(self) -> None:
        """Say again what was logged last, and that the run ended there."""
        if self.told is not None and self.last:
            self.told({**self.last, "ended": "diverged"})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away; also after an exception."""
        if self.bar is not None:
            self.bar.close()


@contextmanager
def stopping(stop: Stop) -> Iterator[None]:
    """Within it the first interrupt asks `stop`, the second raises KeyboardInterrupt; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        log.warning("stopping after this step; interrupt again to stop at once")

    before = signal.getsignal(signal.SIGINT)
    with undoing(lambda: signal.signal(signal.SIGINT, before)):
        signal.signal(signal.SIGINT, on_interrupt)
        yield
