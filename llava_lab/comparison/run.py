"""One run of a comparison: a fresh connector before the same start, the recipe's stages, one exam; kept as one file.

What every run reads and is asked is made once: features of the frozen tower, and questions in tokens. A pool whose
pictures are features instead of pixels goes through the recipe's own `AlignData` and `InstructData` unchanged, so that
batches, their order and their words are the recipe's. Exams are the questions `llava-lab evaluate` asks of a split; an
answer is right when every token of it, end mark included, is the most likely one, which is greedy exact match as long as
the tokenizer spells an answer in one way.

Everything random comes from the run's seed and the step's number, so that runs of one seed read the same batches in the
same order whatever the connector. The connector has a rate of its own; the language model keeps the recipe's.

    run = train_run(material, Job("linear", rate=1e-3, seed=0, steps=(80, 100), exams=("test",)))
    run.right.mean(), run.losses
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, UInt32
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from llava_lab.comparison.start import Start
from llava_lab.connectors import connector as plugged
from llava_lab.connectors import new_connector, save
from llava_lab.errors import DataError, OptionError
from llava_lab.evaluation.items import load_items
from llava_lab.models import layout
from llava_lab.results import Saved
from llava_lab.results.save import as_written, whole_file, write_hashes
from llava_lab.training import loop
from llava_lab.training.features import SPARE, tower_features
from llava_lab.training.recipe import Recipe, Stage
from llava_lab.training.text import IGNORE
from llava_lab.training.tiny.batches import Apart, Joined, apart, apart_loss, joined_loss
from llava_lab.training.tiny.pictures import Pool, default_workers, make_pool
from llava_lab.training.tiny.sight import AlignData, InstructData
from llava_lab.training.tiny.tower import normalise

log = logging.getLogger(__name__)

CHUNK = 32  # pictures through the tower, or through an exam, at a time

Item = tuple[str, Apart | Joined, Tensor]  # form, words, features (B, K, W)


@dataclass(frozen=True)
class Exam:
    """Questions about the first pictures of a pool, in batches."""

    split: str
    pool: Pool  # pictures are features
    batches: tuple[tuple[np.ndarray, Apart], ...]  # pictures' numbers and their questions
    asked: tuple[tuple[int, ...], ...]  # questions of each picture of a batch
    types: tuple[str, ...]  # (Q,)
    picture: np.ndarray  # int64 (Q,), number in the pool


def feature_pool(start: Start, folder: Path, split: str, n: int, *, seed: int, progress: bool = True) -> Pool:
    """`n` drawn pictures of a split as what the frozen tower sees of them: (n, K, W) float32, memory-mapped.

    Named by the tower's fingerprint, so that every connector, seed and comparison in this folder shares it.
    """
    config: Any = start.lab.model.config
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    grid = side // patch
    if side % patch:
        raise OptionError(f"connectors are compared on whole patches, got {side} pixels and patches of {patch}")
    pool = make_pool(folder / "pictures", n=n, side=side, grid=grid, split=split, seed=seed, workers=default_workers())
    path = folder / "features" / f"{split}-{seed}-{n}-{start.fingerprints['vision']}.npy"
    done = path.with_suffix(".done")
    if not as_written(done, [path]) and (done.exists() or not path.exists()):  # older versions kept no hashes
        shape = (n, grid * grid, config.vision_config.hidden_size * len(layout.feature_layers(config)))
        path.parent.mkdir(parents=True, exist_ok=True)
        needed, free = 4 * math.prod(shape), shutil.disk_usage(path.parent).free
        if needed + SPARE > free:
            raise OptionError(
                f"features of {n:,} pictures need {needed / 1e9:.1f} GB in {path.parent}, {free / 1e9:.1f} GB are free; "
                "take fewer pictures or another folder"
            )
        bar = tqdm(total=n, desc=f"vision features, {split}", unit="picture", disable=not progress)
        with whole_file(path) as temporary, bar:
            features = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
            for first in range(0, n, CHUNK):
                seen = tower_features(start.lab.model, normalise(pool.pictures[first : first + CHUNK]))
                features[first : first + len(seen)] = seen.numpy()
                bar.update(len(seen))
            features.flush()
        write_hashes(done, [path])
    return replace(pool, pictures=np.load(path, mmap_mode="r"))


def make_exam(tokenizer: PreTrainedTokenizerFast, pool: Pool, *, seed: int) -> Exam:
    """The questions `llava-lab evaluate` asks about these pictures. Raises DataError when there is none."""
    items = load_items("picturebook", split=pool.split, n=len(pool), seed=seed)
    if not items:
        raise DataError(f"{len(pool)} pictures of split {pool.split} gave no questions; ask for more pictures")
    numbers = {pool.scene(i).name: i for i in range(len(pool))}
    turns: dict[int, list[tuple[str, str]]] = {}
    for item in items:
        turns.setdefault(numbers[item.picture], []).append((item.question, item.answer))
    chosen = list(turns)
    batches, asked = [], []
    for first in range(0, len(chosen), CHUNK):
        rows = chosen[first : first + CHUNK]
        batches.append((np.array(rows), apart(tokenizer, [turns[row] for row in rows], system=True)))
        asked.append(tuple(len(turns[row]) for row in rows))
    picture = np.array([numbers[item.picture] for item in items])
    return Exam(pool.split, pool, tuple(batches), tuple(asked), tuple(item.type for item in items), picture)


@torch.no_grad()
def sit(model: nn.Module, connector: nn.Module, exam: Exam, image_id: int) -> tuple[np.ndarray, float]:
    """Which answers are right, bool (Q,), and the mean loss per labelled token, nats. Float32 throughout."""
    right: list[bool] = []
    total = count = 0.0
    for (rows, words), asked in zip(exam.batches, exam.asked, strict=True):
        features = torch.from_numpy(np.array(exam.pool.pictures[rows]))
        loss, hits = apart_loss(model, words, connector(features), image_id)
        labelled = int((words.labels != IGNORE).sum())
        total, count = total + float(loss) * labelled, count + labelled
        for row, questions in zip(hits.tolist(), asked, strict=True):
            right += row[:questions]
    return np.array(right), total / count


def loss_of(model: nn.Module, connector: nn.Module, item: Item, image_id: int) -> Tensor:
    """Mean loss over a training batch's labelled tokens, from features."""
    _, words, features = item
    tokens = connector(features)
    if isinstance(words, Joined):
        return joined_loss(model, words, tokens, image_id)
    return apart_loss(model, words, tokens, image_id)[0]


Advance = Callable[[int], None]  # steps done since the last call


@dataclass(frozen=True)
class Job:
    """What decides a run, beside what all runs of a comparison share."""

    connector: str  # a name, or name:option=value,option=value
    rate: float  # the connector's peak, AdamW's; Muon's follows in the recipe's proportion
    seed: int
    steps: tuple[int, int]  # of stage 1 and 2; 0 leaves a stage out
    exams: tuple[str, ...]  # the splits it is asked about

    @property
    def id(self) -> str:
        exams, steps = ("+".join(map(str, values)) for values in (self.exams, self.steps))
        return f"{exams}-{file_name(self.connector)}-rate{self.rate:g}-steps{steps}-seed{self.seed}"


@dataclass(frozen=True)
class Finished(Saved):
    """What a run leaves behind."""

    KIND = "ablation run"
    GAPS = ("loss", "losses")

    job: dict[str, Any]
    setup: dict[str, Any]  # what all runs of the comparison share
    right: Bool[np.ndarray, " questions"]  # exam after exam
    loss: Float64[np.ndarray, " exams"]  # nats per labelled token; not finite where training diverged
    losses: Float32[np.ndarray, " taken"]  # of training, for each step that was taken
    order: UInt32[np.ndarray, " taken"]  # a stamp of each batch
    parameters: int
    seconds: float


@dataclass(frozen=True)
class Material:
    """What all runs share, and what they do with it; this one is of the drawn world, `photos.PhotoMaterial` of photographs."""

    start: Start
    recipe: Recipe
    pool: Any  # training pictures, as features
    exams: Mapping[str, Any]
    setup: dict[str, Any]
    bf16: bool = True

    DATA: ClassVar[str] = "picturebook"
    CYCLE: ClassVar[tuple[int, int]] = (3, 10)  # steps until the forms of batches come round again: stage 1, stage 2

    @property
    def image_id(self) -> int:
        return self.start.lab.image_id

    @property
    def stages(self) -> tuple[Stage, Stage]:
        return self.recipe.align, self.recipe.instruct

    def fresh(self, connector: str, seed: int) -> nn.Module:
        """An untrained connector. Raises OptionError for one that does not fit, or has nothing to train."""
        return fresh(self.start, connector, seed)

    def tuned(self, connector: str) -> bool:
        """Whether this connector learns, so that its rate matters."""
        return True

    def parts(self, module: nn.Module) -> dict[str, nn.Module]:
        model: Any = self.start.lab.model
        return {"connector": module, "language": layout.language_model(model), "head": model.get_output_embeddings()}

    def batches(self, stage: Stage, seed: int) -> Any:
        """Step number -> batch; the same for every connector."""
        common: dict[str, Any] = {"batch": stage.batch, "seed": seed}
        tokenizer = self.start.lab.tokenizer
        if stage.name == "align":
            return AlignData(self.pool, tokenizer, **common)
        return InstructData(self.pool, tokenizer, turns=stage.turns, **common)

    def loss(self, module: nn.Module, item: Any) -> Tensor:
        return loss_of(self.start.lab.model, module, item, self.image_id)

    def stamp(self, item: Any) -> int:
        """A number for exactly this batch, words and pictures: two runs that read the same have the same stamps."""
        _, words, features = item
        number = zlib.crc32(features[:, 0].contiguous().numpy().tobytes())
        for name in ("prefix", "ids", "labels"):
            part = getattr(words, name, None)
            if part is not None:
                number = zlib.crc32(part.numpy().tobytes(), number)
        return number

    def sit(self, module: nn.Module, name: str) -> tuple[np.ndarray, float]:
        """Which answers of an exam are right, bool (Q,), and the mean loss per labelled token, nats (nan: not measured)."""
        return sit(self.start.lab.model, module, self.exams[name], self.image_id)


def file_name(connector: str) -> str:
    """A connector's name and options as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", connector)


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """``bottleneck:parameters=5000`` as (name, options). Raises OptionError where it does not read so."""
    kind, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for pair in rest.split(",") if rest else []:
        name, equals, value = pair.partition("=")
        try:
            options[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            equals = ""
        if not equals:
            raise OptionError(f"a connector is a name or name:option=number,..., got {text!r}")
    return kind.strip(), options


def fresh(start: Start, connector: str, seed: int) -> nn.Module:
    """An untrained connector. Raises OptionError for one that does not fit, or has nothing to train."""
    kind, options = parse(connector)
    made = new_connector(start.lab, kind, seed=seed, **options)
    if not any(True for _ in made.parameters()):
        raise OptionError(f"connector {connector!r} has no parameters, so nothing to train")
    return made


def train_run(material: Material, job: Job, *, advance: Advance | None = None, keep: Path | None = None) -> Finished:
    """Train and examine one connector; `keep` also writes the trained model as a folder. The start comes back as it was."""
    begin = time.perf_counter()
    start = material.start
    model: Any = start.lab.model
    module = material.fresh(job.connector, job.seed)
    parts = material.parts(module)
    losses: list[float] = []
    order: list[int] = []

    def stamped_loss(item: Item) -> tuple[Tensor, dict[str, Any]]:
        order.append(material.stamp(item))
        return material.loss(module, item), {}

    try:
        with plugged(start.lab, module):
            for stage, steps in zip(material.stages, job.steps, strict=True):
                if steps and (not losses or math.isfinite(losses[-1])):  # a run that diverged ends there
                    loop.freeze_all_but(model, stage.trains)
                    if not material.tuned(job.connector):
                        module.requires_grad_(False)
                    data, rates = material.batches(stage, job.seed), {"connector": job.rate}
                    stage = replace(stage, steps=steps)
                    try:
                        losses += loop.train(stage, parts, data, stamped_loss, rates=rates, bf16=material.bf16, on_step=advance)
                    except loop.Diverged as error:  # counted as such, beside the others
                        log.warning("%s, seed %d: %s", job.connector, job.seed, error)
                        losses += error.losses if not math.isfinite(error.losses[-1]) else [*error.losses, math.nan]
            model.requires_grad_(False)
            graded = [material.sit(module, name) for name in job.exams]
            if keep is not None:
                _write(start, keep)
    finally:
        model.requires_grad_(False)
        start.reset()
    return Finished(
        job=asdict(job),
        setup=material.setup,
        right=np.concatenate([right for right, _ in graded]),
        loss=np.array([loss for _, loss in graded]),
        losses=np.array(losses, np.float32),
        order=np.array(order, np.uint32),
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        seconds=time.perf_counter() - begin,
    )


def _write(start: Start, folder: Path) -> None:
    """The model as it stands, without transformers' own bar, which would break ours."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        save(start.lab, folder)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def read(folder: Path, job: Job, setup: Mapping[str, Any]) -> Finished | None:
    """A finished run of this comparison, None when it is still to come. Raises DataError for another comparison's."""
    path = folder / f"{job.id}.npz"
    if not path.exists():
        return None
    run = Finished.load(path)
    refuse_other(path, run.setup, setup)
    if run.job != json.loads(json.dumps(asdict(job))):
        raise DataError(f"{path} holds another run than its name says ({run.job}); remove it and run again")
    return run


def refuse_other(path: Path, setup: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises DataError when the comparison that made a run is not the expected one."""
    for name, value in json.loads(json.dumps(expected)).items():
        if setup.get(name) != value:
            raise DataError(
                f"{path} belongs to another comparison: {name} was {setup.get(name)}, now {value}; choose another folder"
            )


def refuse_foreign(folder: Path, setup: Mapping[str, Any]) -> None:
    """Raises DataError when any run in a folder is another comparison's, before anything is written there."""
    for path in sorted(folder.glob("*.npz")):
        refuse_other(path, Finished.load(path).setup, setup)
