"""LLaVA's two stages on data in its format, with transformers' Trainer underneath.

`train_stage` checks the data, computes what the frozen tower sees once, trains, and saves an ordinary checkpoint to
``OUT/STAGE/model``. The same call runs in one process or, under ``accelerate launch``, in many; the global batch is
given, so their loss curves agree. A run that was killed goes on with ``resume`` to the same weights, bit for bit: the
order of data is a function of the seed, and a checkpoint that is not whole does not count.

Stage 2 may train LoRA through peft, as LLaVA does: adapters on every linear layer of the language model, none on the
head, the connector in full beside them; they are merged at the end.

    train_stage(lab, "rows.json", "align", "runs/mine", recipe=replace(LLAVA_15_7B.align, batch=32), steps=200)

Recipes: `llava_lab.training.recipe`. Source: haotian-liu/LLaVA @ c121f04 ``llava/train/train.py`` (also
find_all_linear_names) and ``scripts/v1_5/finetune_lora.sh``.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava_lab.capture import random_states_kept
from llava_lab.checks import entry, undoing, warnings_kept
from llava_lab.errors import CheckpointError, DataError, OptionError
from llava_lab.models import layout
from llava_lab.models.card import fingerprint
from llava_lab.models.folders import whole_folder
from llava_lab.results import file_hash, only_writer, whole_file
from llava_lab.training.features import FeatureCache, content_key
from llava_lab.training.loop import Diverged, freeze_all_but, restored, same_settings
from llava_lab.training.recipe import LLAVA_15_7B, LlavaStage, Lora
from llava_lab.training.rows import (
    LlavaData,
    Order,
    Problems,
    Source,
    Text,
    as_sources,
    build_index,
    open_index,
    read_pixels,
    samples_per_epoch,
    unreadable,
)
from llava_lab.training.text import STAGES
from llava_lab.training.trainer import (
    KEEP,
    Collate,
    LlavaTrainer,
    OnLog,
    Progress,
    Stop,
    last_checkpoint,
    load_trained,
    put_trained,
    reading_features,
    stopping,
    trained_state,
)

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from llava_lab.models import Lab

log = logging.getLogger(__name__)

NOT_DECIDING = ("device_batch", "checkpointing", "report_to", "save_every", "log_every", "workers", "progress")


@dataclass(frozen=True)
class Running:
    """How a run is carried out; of these only `seed` and `bf16` decide the weights beyond the last bits."""

    seed: int = 0
    bf16: bool = False  # autocast; weights and optimiser stay in the model's own precision
    device_batch: int | None = None  # samples a process takes at a time; None is as many as its share of the batch
    checkpointing: bool = False  # activations are computed again in the backward pass: less memory, a third more time
    report_to: str = "none"  # tensorboard, trackio, wandb, ... as transformers knows them
    save_every: int = 200  # steps
    log_every: int = 1  # steps
    workers: int = 0  # processes that read rows ahead
    progress: bool = True


@dataclass(frozen=True)
class Trained:
    """What a run did. `losses` are per logged step, of the whole run, also of what ran before a resume."""

    folder: str  # the saved model; of a run that diverged its last good checkpoint, "" where there is none
    steps: int
    of: int  # steps the schedule has
    stopped: str  # finished, interrupted, or diverged: a loss, gradient or weight was no longer finite
    losses: tuple[float, ...]
    logged: tuple[int, ...]  # the steps of `losses`
    seconds: float  # of this call
    skipped: tuple[str, ...]  # file, row and reason


@entry
def train_stage(
    lab: Lab,
    data: str | os.PathLike | Source | Sequence[Source],
    stage: str = "align",
    out: str | os.PathLike = "runs/llava",
    *,
    recipe: LlavaStage | None = None,
    steps: int | None = None,
    resume: bool = False,
    skip_bad: bool = False,
    cut_long: bool = False,
    cache: str | os.PathLike | bool = True,
    told: OnLog | None = None,
    running: Running | None = None,
) -> Trained:
    """Train one stage and save the model to ``out/stage/model``; `lab` has the new weights afterwards.

    `recipe` is a `LlavaStage` (default: LLaVA-1.5's); `steps` overrides its epochs. `cache`: a folder for vision
    features, True for the usual one, False to compute them as the run goes. `told` is called with each log row; the last
    one also has ``"ended"``, and where `told` raises KeyboardInterrupt the run ends as at an interrupt.
    Raises DataError naming file and row for bad data, before the first step; OptionError for a folder that holds a run or
    that another process writes, for data that is not what a resumed run began with, and, meanwhile, to other threads that
    use the lab; CheckpointError when a checkpoint cannot be written, which leaves the last good one. Damaged checkpoints are
    passed over, and the log says so.
    Interrupting keeps what is trained: `Trained.stopped` says so and ``resume`` goes on. Where numbers are no longer finite
    the run ends before that step, nothing is saved after the last good checkpoint, and `lab` gets its weights back.

    >>> from dataclasses import replace
    >>> from llava_lab.training import LLAVA_15_7B, Running
    >>> from llava_lab.worlds import picturebook
    >>> rows = picturebook.write_dataset(tmp / "rows", n=4, progress=False)
    >>> recipe = replace(LLAVA_15_7B.align, batch=2)
    >>> trained = ll.train_stage(ll.load("tiny"), rows, "align", tmp / "run", recipe=recipe, steps=1, cache=tmp,
    ...                          running=Running(progress=False))
    >>> trained.steps, trained.stopped
    (1, 'finished')
    """
    if stage not in STAGES:
        raise OptionError(f"stage must be {' or '.join(STAGES)}, got {stage!r}")
    recipe = recipe or LLAVA_15_7B.stage(stage)
    if recipe.name != stage:
        raise OptionError(f"the recipe is for stage {recipe.name!r}, the stage asked for is {stage!r}")
    running, folder, begin = running or Running(), Path(out) / stage, time.monotonic()
    args = arguments(lab, folder, recipe, running)
    problems = Problems(skip=skip_bad)
    text = Text(lab.tokenizer, lab.image_id, layout.image_token_count(lab.model), lab.context, stage, cut_long=cut_long)
    sources, first, show = as_sources(data), args.process_index == 0, running.progress
    with lab.turn.taken(training=True), only_writer(folder) if first else nullcontext(), random_states_kept():
        with args.main_process_first(local=False):
            if first and not resume and (folder / "run.json").exists():
                raise OptionError(f"{folder} holds a run already; add --resume to go on with it, or choose another folder")
            options: dict[str, Any] = {"cache": cache, "fit": recipe.fit, "first": first, "show": show}
            rows, features = open_rows(lab, sources, text, folder, problems, **options)
            per = args.per_device_train_batch_size
            order = order_of(rows, recipe, steps, batch=per, chunks=recipe.batch // per, seed=running.seed)
            if first:
                _remember(folder, lab, rows, recipe, running, order, resume=resume)
        args.max_steps = order.total // recipe.batch
        progress = Progress(stage, folder / "log.jsonl", Stop(), show=show, told=told)
        trainer = _train(lab, rows, order, args, recipe, folder=folder, features=features, progress=progress)
        if trainer.diverged is None:
            _save(lab, trainer, folder)
    if problems.count:
        log.warning("skipped %d rows", problems.count)
    history = [row for row in trainer.state.log_history if "loss" in row]
    stopped = "finished" if trainer.state.global_step >= args.max_steps else "interrupted"
    return Trained(
        folder=str(folder / "model") if trainer.diverged is None else str(last_checkpoint(folder) or ""),
        steps=trainer.state.global_step,
        of=args.max_steps,
        stopped=stopped if trainer.diverged is None else "diverged",
        losses=tuple(float(row["loss"]) for row in history),
        logged=tuple(int(row["step"]) for row in history),
        seconds=time.monotonic() - begin,
        skipped=tuple(problems.named),
    )


def arguments(lab: Lab, folder: Path, recipe: LlavaStage, running: Running) -> TrainingArguments:
    """transformers' TrainingArguments for a stage; under a launcher this also joins the other processes."""
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise OptionError("training needs accelerate; `pip install 'llava-lab[train]'` brings it") from None
    from transformers import TrainingArguments

    world = int(os.environ.get("WORLD_SIZE", "1"))
    per, accumulate = shares(recipe.batch, world, running.device_batch)
    on_cpu = not torch.cuda.is_available() or (world == 1 and lab.device.type == "cpu")
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and world > 1 else None,
        ddp_find_unused_parameters=False,
        ddp_timeout=86_400,  # other processes wait while the first reads the data and runs the tower
        per_device_train_batch_size=per,
        gradient_accumulation_steps=accumulate,
        learning_rate=recipe.rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup,  # below 1 it is a share of the steps
        weight_decay=recipe.decay,
        max_grad_norm=recipe.clip,
        optim="adamw_torch",
        num_train_epochs=1,  # the order runs through all epochs
        bf16=running.bf16,
        activation_checkpointing=running.checkpointing,
        report_to=running.report_to,
        logging_steps=running.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=running.save_every,
        save_total_limit=KEEP,
        seed=running.seed,
        dataloader_num_workers=running.workers,
        remove_unused_columns=False,
        disable_tqdm=True,
    )


def shares(batch: int, world: int, device_batch: int | None) -> tuple[int, int]:
    """(samples a process takes at a time, how many such batches it adds up) for a global batch."""
    if batch % world:
        raise OptionError(f"the global batch of {batch} cannot be split over {world} processes evenly")
    share = batch // world
    per = device_batch or share
    if per < 1 or share % per:
        raise OptionError(f"device_batch must divide {share}, each process's share of the batch of {batch}; got {per}")
    return per, share // per


# -- the data ------------------------------------------------------------------------------


def open_rows(
    lab: Lab,
    sources: list[Source],
    text: Text,
    folder: Path,
    problems: Problems,
    *,
    cache: str | os.PathLike | bool,
    fit: str | None,
    first: bool,
    show: bool,
) -> tuple[LlavaData, FeatureCache | None]:
    """The checked rows of all sources and their features' cache, None without one. The first process does the work.

    Raises DataError for bad rows and pictures, unless `problems` skips them. Without a cache pictures are read as they are
    needed, or all of them before, to know which to skip.
    """
    places = [folder / f"rows-{number}.index" for number in range(len(sources))]
    if first:
        key = content_key if cache or problems.skip else None
        indexes = [
            build_index(s, text, p, problems=problems, key=key, progress=show) for s, p in zip(sources, places, strict=True)
        ]
    else:
        indexes = [open_index(place) for place in places]
    rows = LlavaData(sources, indexes, text, read_pixels(lab.preprocessing, fit))
    problems.refuse()
    if not len(rows):
        raise DataError(f"no usable row in {', '.join(str(source.path) for source in sources)}")
    if not cache and not problems.skip:
        return rows, None
    features = FeatureCache(lab, None if cache is True else cache, fit=fit) if cache else None
    left_out = folder / "unreadable.json"
    if first:
        bad = (
            unreadable(rows, problems, progress=show)
            if features is None
            else features.prepare(rows, problems=problems, progress=show)
        )
        with whole_file(left_out) as temporary:
            temporary.write_text(json.dumps(sorted(bad)))
        problems.refuse()
    if features is not None:
        rows.see = features.read
    return rows.without(json.loads(left_out.read_text())), features


def order_of(rows: LlavaData, recipe: LlavaStage, steps: int | None, *, batch: int, chunks: int, seed: int) -> Order:
    """The order of a whole run: `steps` of the recipe's batch, or its epochs. A batch is `chunks` parts of `batch` samples."""
    if steps is None:
        steps = math.ceil(samples_per_epoch(rows.sizes, rows.weights) * recipe.epochs / recipe.batch)
    if steps < 1:
        raise OptionError(f"steps must be 1 or more, got {steps}")
    total = steps * recipe.batch
    return Order(rows.words, rows.sizes, rows.weights, total=total, batch=batch, chunks=chunks, group=recipe.group, seed=seed)


def _remember(
    folder: Path, lab: Lab, rows: LlavaData, recipe: LlavaStage, running: Running, order: Order, *, resume: bool
) -> None:
    """Write what decides the weights, or hold a resumed run against it."""
    data = [
        [str(source.path.resolve()), size, source.weight, source.suffix]
        for source, size in zip(rows.sources, rows.sizes, strict=True)
    ]
    now = {
        "model": _frozen(lab, recipe),
        "recipe": asdict(replace(recipe, sources=())),
        "running": {name: value for name, value in asdict(running).items() if name not in NOT_DECIDING},
        "data": data,
        "samples": order.total,
        "hash of the data files": [file_hash(source.path) for source in rows.sources],
    }
    same_settings(folder / "run.json", now, resume=resume)


def _frozen(lab: Lab, recipe: LlavaStage) -> str:
    """A name for the parts that do not train: those that do come from the checkpoint when a run goes on."""
    parts = {
        "vision_tower": layout.vision_tower,
        "multi_modal_projector": layout.connector_of,
        "language_model": layout.language_model,
    }
    return fingerprint(nn.ModuleDict({name: find(lab.model) for name, find in parts.items() if name not in recipe.trains}))


# -- the run -------------------------------------------------------------------------------

_ABSENT = object()
KEPT = 2**31  # bytes of trained weights, up to which a run remembers what it began with
CAPTURING = "_output_capturing_hooks_installed"  # transformers' own note of hooks that stay with a model


def _train(
    lab: Lab,
    rows: LlavaData,
    order: Order,
    args: TrainingArguments,
    recipe: LlavaStage,
    *,
    folder: Path,
    features: FeatureCache | None,
    progress: Progress,
) -> LlavaTrainer:
    """Train until the end or an interrupt; weights caught half-way through a step go back to the last checkpoint.

    So do weights whose training diverged, or to those it began with, where they are few enough to be kept for it.
    """
    resume = last_checkpoint(folder)
    if args.process_index == 0:
        _forget_later(folder / "log.jsonl", resume)
    collate = Collate(int(lab.tokenizer.pad_token_id or 0), *_picture_shape(lab, features))
    with ExitStack() as stack:
        stack.enter_context(parts_training(lab.model, recipe.trains))
        stack.enter_context(reading_features(lab.model, cached=features is not None))
        model = stack.enter_context(adapters(lab.model, recipe.lora, seed=args.seed))
        stack.enter_context(stopping(progress.stop))
        options: dict[str, Any] = {"data": rows, "order": order, "collate": collate, "connector_rate": recipe.connector_rate}
        trainer = LlavaTrainer(model, args, **options, callbacks=[progress])
        if recipe.lora and trainer.is_fsdp_enabled:
            raise OptionError("LoRA adapters are merged in one piece, FSDP has them in parts; launch without --use_fsdp")
        begun: dict[str, Tensor] | None = None
        if resume is None and sum(p.nbytes for p in model.parameters() if p.requires_grad) <= KEPT:
            begun = {name: value.to("cpu", copy=True) for name, value in trained_state(model).items()}
        try:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        except KeyboardInterrupt:
            good = last_checkpoint(folder)
            if progress.stepping and good is not None and not trainer.is_fsdp_enabled:
                load_trained(trainer.model, good)
            log.warning("stopped at step %d", trainer.state.global_step)
        except Diverged as error:
            trainer.diverged = error
            good = last_checkpoint(folder)
            if good is not None and not trainer.is_fsdp_enabled:
                load_trained(trainer.model, good)
                now = f"the model has the weights of {good}"
            elif begun is not None:
                put_trained(trainer.model, begun, folder)
                now = "there is none: the model has the weights it began with"
            else:
                now = "there is none: the model has the weights of its last step, load it again"
            log.warning("%s; %s", error, now)
            progress.on_diverged()
        finally:
            progress.close()
    return trainer


@contextmanager
def parts_training(model: Any, names: Sequence[str]) -> Iterator[list[str]]:
    """Within it only parameters under the named parts train; flags, modes and config are put back afterwards."""
    caches = [(part, part.__dict__.get("use_cache", _ABSENT)) for part in (model.config, model.config.text_config)]
    own = {part: set(vars(part)) for part in model.modules()}

    def undo() -> None:
        for part, value in caches:
            if value is not _ABSENT:
                part.use_cache = value
            else:  # the Trainer sets it on configurations that never had it
                part.__dict__.pop("use_cache", None)
        if model.is_activation_checkpointing:
            model.activation_checkpointing_disable()
        model.disable_input_require_grads()  # hooks that transformers leaves after activation checkpointing
        for part, names in own.items():  # what peft and accelerate note on them, a forward under autocast among it
            for name in set(vars(part)) - names - {CAPTURING}:
                vars(part).pop(name, None)

    with undoing(undo), restored(model):
        trained = freeze_all_but(model, names)
        if not trained:
            raise OptionError(f"nothing to train: no parameter under {', '.join(names)}")
        yield trained


@contextmanager
def adapters(model: Any, lora: Lora | None, *, seed: int = 0) -> Iterator[Any]:
    """The model with adapters drawn from `seed`, or as it is without `lora`. They are merged on leaving, or removed after an
    exception; an interrupt meanwhile waits until that is done.
    """
    if lora is None:
        yield model
        return
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise OptionError("LoRA needs peft; `pip install 'llava-lab[train]'` brings it") from None
    inside = layout.language_model(model)
    prefix = next(name for name, module in model.named_modules() if module is inside)
    linears = {name: module for name, module in inside.named_modules() if isinstance(module, nn.Linear)}
    ended = False
    merged: dict[str, Tensor] = {}

    def unwrap() -> None:
        """Every linear layer in its place again, with its merged weight where the block has ended."""
        for name, linear in linears.items():
            parent, _, last = name.rpartition(".")
            wrapped = getattr(inside.get_submodule(parent), last)
            if ended and wrapped is not linear:
                if name not in merged:
                    with torch.no_grad():
                        delta = wrapped.get_delta_weight("default")
                    merged[name] = (linear.weight.data + delta).to(linear.weight.dtype)
                linear.weight.data = merged[name]
            setattr(inside.get_submodule(parent), last, linear)

    names = [f"{prefix}.{name}" for name in linears]
    options: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "bias": "none"}
    with undoing(unwrap):
        with random_states_kept(), warnings_kept():  # peft asks transformers by a name that is on its way out
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            torch.manual_seed(seed)
            with_adapters = get_peft_model(model, LoraConfig(target_modules=names, **options))
        layout.connector_of(model).requires_grad_(True)
        yield with_adapters
        ended = True


def _picture_shape(lab: Lab, features: FeatureCache | None) -> tuple[tuple[int, ...], torch.dtype]:
    config: Any = lab.model.config
    vision = config.vision_config
    if features is None:
        return (3, vision.image_size, vision.image_size), torch.float32
    return (layout.vision_tokens(lab.model)[1], vision.hidden_size * len(layout.feature_layers(config))), features.dtype


def _save(lab: Lab, trainer: LlavaTrainer, folder: Path) -> None:
    """Write the model as an ordinary transformers folder, whole or not at all."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_fsdp_enabled else None
    if trainer.is_world_process_zero():
        target = folder / "model"
        try:
            with whole_folder(target) as part:
                lab.model.save_pretrained(part, state_dict=state)
                lab.processor.save_pretrained(part)
        except OSError as error:
            raise CheckpointError(f"cannot write {target} ({error}); its checkpoints stay, make room and --resume") from error
    trainer.accelerator.wait_for_everyone()


def _forget_later(log_file: Path, resume: Path | None) -> None:
    """Drop log rows of steps that will be done again."""
    if not log_file.exists():
        return
    step = int(resume.name.split("-")[1]) if resume else 0
    lines = []
    for line in log_file.read_text().splitlines():
        try:
            early = json.loads(line)["step"] <= step
        except (ValueError, TypeError, KeyError):
            continue  # cut short by the end of the process that wrote it
        if early:
            lines.append(line + "\n")
    with whole_file(log_file) as temporary:
        temporary.write_text("".join(lines))
