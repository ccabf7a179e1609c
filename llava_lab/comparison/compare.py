"""Which connector is better: trained side by side, in a way that allows a conclusion.

Each connector has a learning rate of its own, chosen on validation; then every seed trains it anew from the same tower
and language model, on the same batches in the same order; all answer the same questions. Beside the linear and the MLP
stand their controls: a bottleneck with the linear's parameters, and two linear layers with the MLP's.

Every finished run is one file in `out`. The same call goes on where it was stopped, and trains only what is missing when
connectors, seeds, rates or budgets are added.

    result = compare_connectors(["linear", "mlp2x_gelu"], start="runs/tiny", out="runs/ablation")
    print(result.rows())

`start` is where every run begins, `plan` which runs there are, `run` one of them; `ship` writes what the package holds.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from llava_lab import stats
from llava_lab.capture import random_states_kept
from llava_lab.checks import entry, number
from llava_lab.comparison import photos, plan
from llava_lab.comparison.photos import PhotoRecipe
from llava_lab.comparison.plan import ABLATION, BUDGETS, CONNECTORS, RATES, VALIDATION, Arm
from llava_lab.comparison.run import Finished, Job, Material, feature_pool, fresh, make_exam, read, refuse_foreign, train_run
from llava_lab.comparison.start import Given, Start, load_start
from llava_lab.errors import DataError, OptionError
from llava_lab.results import ALL, Ablation, only_writer
from llava_lab.training.recipe import Recipe
from llava_lab.training.tiny import streams

log = logging.getLogger(__name__)

PICTUREBOOK = "picturebook"
ENOUGH = 5  # seeds below which a result says so


@entry
def compare_connectors(
    connectors: Sequence[str] = CONNECTORS,
    data: str = "picturebook",
    *,
    pictures: str | os.PathLike | None = None,
    test_pictures: str | os.PathLike | None = None,
    start: Given = "tiny",
    language: Given | None = None,
    out: str | os.PathLike = "runs/ablation",
    rates: Sequence[float] = RATES,
    seeds: int = ENOUGH,
    stage1: Sequence[bool] = (True, False),
    budgets: Sequence[str] = BUDGETS,
    splits: Sequence[str] | None = None,
    validation: int = 200,
    test: int = 300,
    recipe: Recipe | PhotoRecipe | None = None,
    steps_scale: float = 1.0,
    keep: bool = True,
    bf16: bool = True,
    fused: bool = False,
    stated: float = stats.STATED,
    seed: int = 0,
    progress: bool = True,
) -> Ablation:
    """Train connectors side by side and say which answers better; an `Ablation`.

    `connectors` are names from ``llava_lab.CONNECTORS``, options after a colon (``bottleneck:parameters=5000``).
    `start` gives vision tower and language model, `language` another language model: a Lab, a name, a folder, or training
    states of our recipe (`llava_lab.comparison.start`); a language model that saw no picture is the fair start.
    `rates` are peaks to choose from on validation; `stage1` with, without, or both; `budgets` equal "samples" and equal
    "flops". `validation` and `test` are pictures of validation and of each of `splits`. `recipe` sets steps, batches and
    training pictures, `steps_scale` multiplies steps and pictures. `keep` saves each connector's first seed as a folder under
    ``out/models``. ``data="photos"`` trains between `photo`'s pretrained parts, on the photographs in the folder `pictures`, and
    tests on those in `test_pictures` (`llava_lab.comparison.photos`): one split, "test", no `start` or `language`, nothing
    kept, and stage 1 teaches the word embeddings of the tower's classes. `recipe` and `splits` None are that data's own.
    `bf16` is autocast, `fused` joins small operations with torch.compile (faster, needs a C++ compiler, other last digits).
    `stated` is a true difference worth telling, 0 to 1: how many seeds would find it is said of every pair.
    Interrupted, finished runs stay and KeyboardInterrupt is raised; the same call goes on.
    Raises OptionError or DataError (one line) for what cannot be compared, or for an `out` of another comparison.

    What such a call gives after an hour ships with the package:

    >>> result = ll.shipped_ablation()
    >>> len(result.seeds), result.row("mlp2x_gelu", "linear", budget="samples", stage1=True)["verdict"]
    (5, 'not distinguishable')
    """
    if data not in (PICTUREBOOK, photos.PHOTOS):
        raise OptionError(f"connectors are compared on {PICTUREBOOK} or {photos.PHOTOS}, got data {data!r}")
    drawn = data == PICTUREBOOK
    splits = splits or (("test", "compositions") if drawn else ("test",))
    plan.check_options(connectors, rates, seeds, budgets, stage1, splits)
    if steps_scale <= 0 or min(validation, test) < 1:
        raise OptionError(f"steps_scale, validation and test must be above 0, got {steps_scale}, {validation} and {test}")
    if not 0 < number("stated", stated) <= 1:
        raise OptionError(f"stated is a difference in the share of right answers, above 0 and at most 1, got {stated}")
    scaled = _scaled(recipe or (ABLATION if drawn else photos.PHOTO_ABLATION), steps_scale, seed)
    if isinstance(scaled, Recipe) != drawn:
        raise OptionError(f"recipe {scaled.name!r} is not of data {data!r}; leave it out for that data's own")
    if not drawn:
        photos.check_options(pictures, test_pictures, start=start, language=language, splits=splits, fused=fused)
    elif pictures is not None or test_pictures is not None:
        raise OptionError(f"pictures and test_pictures belong to data {photos.PHOTOS!r}, got data {data!r}")
    folder = Path(out)
    if drawn:
        begun = load_start(start, language)
        for name in connectors:
            fresh(begun, name, seed)  # what does not fit is said before anything is drawn
    with only_writer(folder), random_states_kept():
        material: Material
        if isinstance(scaled, PhotoRecipe):
            material = photos.prepare(scaled, pictures, test_pictures, validation=validation, test=test, bf16=bf16)
        else:
            counts = {"train": scaled.pictures, VALIDATION: validation, **dict.fromkeys(splits, test)}
            material = prepare(begun, folder, scaled, counts, bf16=bf16, fused=fused, progress=progress)
        refuse_foreign(folder / "runs", material.setup)
        counting = tqdm(connectors, desc="counting operations", unit="connector", disable=not progress, leave=False)
        flops = {name: plan.step_flops(material, name, folder / "flops") for name in counting}
        arms = plan.make_arms(connectors, flops, material.stages, budgets=budgets, stage1=stage1)
        arms = [arm if material.tuned(arm.connector) else arm.untuned() for arm in arms]
        measured = tuple(range(seed, seed + seeds))
        with streams.fused(fused), _Runs(material, folder, progress) as runs:
            several = sorted(set(rates))
            swept = [arm.sweep(several if material.tuned(arm.connector) else several[:1] * len(several), seed) for arm in arms]
            runs.expect([job for jobs in swept for job in jobs], arms, len(measured))
            runs.finish([job for jobs in swept for job in jobs])
            chosen = [plan.choose(jobs, runs.done) for jobs in swept]
            final = [arm.runs(rate, measured, tuple(splits)) for arm, rate in zip(arms, chosen, strict=True)]
            by_seed = [job for of_seed in zip(*final, strict=True) for job in of_seed]  # a stop leaves whole seeds
            runs.finish(by_seed, keep=folder / "models" if keep and drawn else None, keep_seed=seed)
        check_same_batches(runs.done)
        return _result(material, arms, several, swept, final, runs.done, stated)


def _scaled(recipe: Recipe | PhotoRecipe, scale: float, seed: int) -> Recipe | PhotoRecipe:
    """The recipe with its steps and pictures times `scale`."""
    align, instruct = (replace(stage, steps=max(1, round(stage.steps * scale))) for stage in (recipe.align, recipe.instruct))
    pictures = max(align.batch, instruct.batch, round(recipe.pictures * min(1.0, scale)))
    return replace(recipe, seed=seed, pictures=pictures, align=align, instruct=instruct)


def prepare(
    begun: Start, folder: Path, recipe: Recipe, counts: dict[str, int], *, bf16: bool, fused: bool, progress: bool
) -> Material:
    """Features and exams of `counts` pictures of each split, and what an `out` folder must agree in."""
    seed, tokenizer = recipe.seed, begun.lab.tokenizer
    pools = {name: feature_pool(begun, folder, name, n, seed=seed, progress=progress) for name, n in counts.items()}
    exams = {name: make_exam(tokenizer, pools[name], seed=seed) for name in counts if name != "train"}
    stages = {stage.name: {k: v for k, v in asdict(stage).items() if k != "steps"} for stage in (recipe.align, recipe.instruct)}
    setup = {"start": begun.fingerprints, "pictures": counts, "seed": seed, "bf16": bf16, "fused": fused, "stages": stages}
    return Material(begun, recipe, pools["train"], exams, setup, bf16)


class _Runs:
    """Finished runs by job, and the bar that counts their steps."""

    def __init__(self, material: Material, folder: Path, progress: bool) -> None:
        self.material, self.folder, self.progress = material, folder / "runs", progress
        self.done: dict[Job, Finished] = {}
        self.bar: Any = None

    def __enter__(self) -> _Runs:
        self.bar = tqdm(desc="ablation", unit="step", disable=not self.progress)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.bar.close()
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            log.warning("stopped; %d finished runs stay in %s, the same call goes on from there", len(self.done), self.folder)

    def expect(self, sweep: Sequence[Job], arms: Sequence[Arm], seeds: int) -> None:
        """Tell the bar how many steps there will be."""
        final = {(arm.connector, arm.stage1, arm.steps) for arm in arms}
        self.bar.reset(sum(sum(job.steps) for job in plan.unique(sweep)) + seeds * sum(sum(steps) for *_, steps in final))

    def finish(self, jobs: Sequence[Job], *, keep: Path | None = None, keep_seed: int = 0) -> None:
        """Read what is there, train what is not."""
        for job in plan.unique(jobs):
            self.bar.set_postfix_str(job.id, refresh=False)
            before = self.bar.n
            run = read(self.folder, job, self.material.setup)
            if run is None:
                place = keep / job.id if keep is not None and job.seed == keep_seed else None
                run = train_run(self.material, job, advance=self.bar.update, keep=place)
                run.save(self.folder / f"{job.id}.npz")
            # also where nothing was trained, or a diverged run ended early
            self.bar.update(before + sum(job.steps) - self.bar.n)
            self.done[job] = run


def check_same_batches(done: dict[Job, Finished]) -> None:
    """Every run of a seed must have read the same batches, stage by stage, as far as both went. Raises DataError."""
    longest: dict[tuple[int, int], tuple[Job, np.ndarray]] = {}
    for job, run in done.items():
        for stage, stamps in enumerate((run.order[: job.steps[0]], run.order[job.steps[0] :])):
            other, others = longest.setdefault((job.seed, stage), (job, stamps))
            both = min(len(stamps), len(others))
            if not np.array_equal(stamps[:both], others[:both]):
                raise DataError(f"{job.id} and {other.id} did not read the same batches; remove both and run again")
            if len(stamps) > len(others):
                longest[job.seed, stage] = job, stamps


def _questions(material: Material, splits: Sequence[str]) -> tuple[stats.Questions, tuple[str, ...]]:
    """Where each question of the splits belongs, and the names of the types."""
    exams = [material.exams[name] for name in splits]
    types = (ALL, *sorted({kind for exam in exams for kind in exam.types}))
    split = np.concatenate([np.full(len(exam.types), number) for number, exam in enumerate(exams)])
    kind = np.array([types.index(kind) for exam in exams for kind in exam.types])
    return stats.Questions(split, kind, np.concatenate([exam.picture for exam in exams]), len(splits), len(types)), types


def _result(
    material: Material,
    arms: list[Arm],
    rates: list[float],
    swept: list[list[Job]],
    final: list[list[Job]],
    done: dict[Job, Finished],
    stated: float,
) -> Ablation:
    splits, seeds = final[0][0].exams, tuple(job.seed for job in final[0])
    asked, types = _questions(material, splits)
    right = np.array([[done[job].right for job in jobs] for jobs in final])
    pairs, families = plan.make_pairs(arms)
    losses = np.full((len(arms), len(seeds), max(sum(arm.steps) for arm in arms)), np.nan, np.float32)
    for row, jobs in zip(losses, final, strict=True):
        for line, job in zip(row, jobs, strict=True):
            line[: len(done[job].losses)] = done[job].losses
    return Ablation(
        connectors=tuple(arm.connector for arm in arms),
        budgets=tuple(arm.budget for arm in arms),
        stage1=np.array([arm.stage1 for arm in arms]),
        steps=np.array([arm.steps for arm in arms]),
        rate=np.array([jobs[0].rate for jobs in final]),
        parameters=np.array([done[jobs[0]].parameters for jobs in final]),
        flops=np.array([arm.flops for arm in arms]),
        sweep_rates=np.array(rates),  # an arm that does not learn has one run for all of them
        sweep_loss=np.array([[done[job].loss[0] for job in jobs] for jobs in swept]),
        sweep_accuracy=np.array([[done[job].right.mean() for job in jobs] for jobs in swept]),
        seeds=seeds,
        splits=splits,
        types=types,
        right=right,
        question_split=asked.split,
        question_type=asked.kind,
        question_picture=asked.pictures,
        losses=losses,
        **stats.accuracies(right, asked, seed=material.recipe.seed),
        pairs=np.array(pairs),
        **stats.table(right, pairs, np.array(families), asked, stated=stated, seed=material.recipe.seed),
        stated=stated,
        data=material.DATA,
        pictures=tuple(material.setup["pictures"].values()),
        seed=material.recipe.seed,
        model=material.start.name,
        start=material.start.fingerprints,
        recipe=asdict(material.recipe),
        seconds=sum(run.seconds for run in done.values()),
        notes=_notes(material, arms, swept, final, done),
    )


def _notes(
    material: Material,
    arms: list[Arm],
    swept: list[list[Job]],
    final: list[list[Job]],
    done: dict[Job, Finished],
) -> tuple[str, ...]:
    """What a reader must know before concluding."""
    notes = [*material.start.notes]
    if len(final[0]) < ENOUGH:
        notes.append(f"{len(final[0])} seeds: fewer than {ENOUGH}, so only a large difference can show")
    for arm, jobs, runs in zip(arms, swept, final, strict=True):
        where = f"{arm.connector} ({arm.budget}, {'with' if arm.stage1 else 'without'} stage 1)"
        if material.tuned(arm.connector) and runs[0].rate in (jobs[0].rate, jobs[-1].rate):
            notes.append(f"{where}: the best rate, {runs[0].rate:g}, is at the sweep's edge; a wider sweep may find a better one")
        diverged = [str(job.seed) for job in runs if not np.isfinite(done[job].losses).all()]
        if diverged:
            notes.append(f"{where}: training diverged with seed {', '.join(diverged)}; its answers count as they are")
    notes.append("Without stage 1 a run is shorter by stage 1's steps: that comparison is not at equal samples.")
    notes.append("Matrices are trained with Muon, the rest with AdamW; another optimiser may rank connectors otherwise.")
    return tuple(notes)
