"""Does the truth check pay? Stage 2 on all rows, on those that pass, and on as many drawn at random.

A rule teacher writes rows about drawn pictures and lies at a stated rate. Four arms train the same fresh connector and the
same language model for the same number of steps, and answer the same questions about other pictures:

- *all*: every row, lies and all;
- *passed*: the rows in which the check finds nothing false; fewer, and clean as far as the check sees;
- *random*: as many rows as passed, drawn from all: what having fewer rows does by itself;
- *truthful*: the same questions answered by a teacher that never lies, all rows: the most a perfect correction could give.

``passed - random`` is what choosing by truth does at equal size, ``passed - all`` whether throwing rows away is worth it.
Every seed has rows, lies, draws and a connector of its own. Intervals and verdicts are those of `llava_lab.stats`: pictures
resampled, Student's t over seeds, Holm over the pairs. Beside them stands how well the check knew lies from truths, which is
exact here: the truthful teacher answers the same questions.

The language model is the shipped `tiny`'s by default, which has learnt from pictures before; one that has not (``--start``
with the folder of our own recipe) is the stricter start. Nothing here says what the check does for a 7B and photographs.

    result = check_pays(lie=0.3, n=600, seeds=3, out="runs/check")
    print(result.table())
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from llava_lab import stats
from llava_lab.capture import random_states_kept
from llava_lab.checks import PATIENCE, entry, one_of, shown
from llava_lab.comparison.run import Exam, feature_pool, fresh, loss_of, make_exam, refuse_other, sit
from llava_lab.comparison.start import Given, Start, load_start
from llava_lab.connectors import connector as plugged
from llava_lab.errors import DataError, OptionError
from llava_lab.instructions.claims import false_sentences
from llava_lab.instructions.context import TAUGHT, of_scene, read_kinds
from llava_lab.instructions.facts import Facts
from llava_lab.instructions.filters import Turn
from llava_lab.instructions.generate import sift
from llava_lab.instructions.rules import RuleTeacher
from llava_lab.models import layout
from llava_lab.results import CheckPays, Saved, only_writer
from llava_lab.shipped import ASSETS
from llava_lab.training import loop
from llava_lab.training.recipe import TINY, Stage
from llava_lab.training.tiny.batches import apart
from llava_lab.training.tiny.pictures import Pool
from llava_lab.training.tiny.tower import batch_indices

log = logging.getLogger(__name__)

ARMS = ("all", "passed", "random", "truthful")
PAIRS = (("passed", "all"), ("passed", "random"), ("truthful", "all"), ("truthful", "passed"))  # the first minus the second
CONNECTOR, RATE = "mlp2x_gelu", 3e-3  # the rate is the shipped comparison's choice for it
FEWEST = 20  # rows that an arm needs
SHIPPED = ASSETS / "tiny" / "check_pays.npz"


@dataclass(frozen=True)
class Row:
    picture: int  # number in the pool
    turns: tuple[Turn, ...]
    passes: bool


@dataclass(frozen=True)
class CheckRun(Saved):
    """One arm with one seed, as it is kept."""

    KIND = "check run"

    arm: str
    seed: int
    setup: dict[str, Any]
    rows: int
    right: Bool[np.ndarray, " questions"]
    losses: Float32[np.ndarray, " steps"]


class _Batches(Dataset):
    """Step number -> rows with their pictures' features, each turn asked apart."""

    def __init__(self, rows: Sequence[Row], pool: Pool, tokenizer: Any, *, batch: int, seed: int) -> None:
        self.rows, self.pool, self.tokenizer, self.batch, self.seed = rows, pool, tokenizer, batch, seed

    def __getitem__(self, step: int) -> tuple[str, Any, Tensor]:
        chosen = [self.rows[int(i)] for i in batch_indices(len(self.rows), self.batch, step, self.seed)]
        words = apart(self.tokenizer, [list(row.turns) for row in chosen], system=True)
        features = torch.from_numpy(np.array(self.pool.pictures[[row.picture for row in chosen]]))
        return "apart", words, features


@entry
def check_pays(
    *,
    lie: float = 0.3,
    n: int = 1500,
    seeds: int = 5,
    steps: int = 100,
    batch: int = 12,
    arms: Sequence[str] = ARMS,
    kinds: Sequence[str] = ("conversation",),
    start: Given = "tiny",
    test: int = 300,
    out: str | os.PathLike = "runs/check",
    seed: int = 0,
    bf16: bool = False,
    progress: bool = True,
) -> CheckPays:
    """Train stage 2 on rows of a teacher that lies with rate `lie`, checked or not, and compare; a `CheckPays`.

    `n` pictures have one row of each of `kinds`; each of `seeds` runs takes `steps` steps of `batch` rows in every arm of
    `arms`; `test` pictures with about four questions each are asked. `start` gives tower and language model
    (`llava_lab.comparison.start`). Finished runs stay in `out`, and the same call goes on from there.
    `bf16` is autocast; a processor without it is many times slower that way than in float32.
    Raises OptionError for an unknown arm or a rate outside 0 to 1, DataError where too few rows pass or `out` holds another
    experiment.

        check_pays(lie=0.1, n=60, seeds=2, steps=1, batch=2, test=2, out="runs/few").pairs  # a minute on one core
    """
    for name in arms:
        one_of("arms", name, ARMS)
    if len(set(arms)) < 2 or len(set(arms)) < len(arms) or seeds < 2 or min(n, steps, batch, test) < 1:
        raise OptionError("an experiment wants two arms or more, two seeds or more, and n, steps, batch and test of 1 or more")
    for name in kinds:
        one_of("kinds", name, TAUGHT)
    if not isinstance(start, (str, os.PathLike)) and not hasattr(start, "ask"):
        raise OptionError(f"start must be a loaded model, a name or a folder, got {shown(start)}")
    teacher, begun, folder = RuleTeacher(lie), load_start(start), Path(out)
    stage = replace(TINY.instruct, steps=steps, batch=batch)
    setup = {"lie": lie, "n": n, "kinds": list(kinds), "steps": steps, "batch": batch, "test": test, "seed": seed, "bf16": bf16}
    setup |= {"start": begun.fingerprints, "prompts": {name: kind.hash for name, kind in read_kinds(kinds).items()}}
    with only_writer(folder), random_states_kept():
        pools = {
            name: feature_pool(begun, folder, name, count, seed=seed, progress=progress)
            for name, count in (("train", n), ("test", test))
        }
        exam = make_exam(begun.lab.tokenizer, pools["test"], seed=seed)
        runs: dict[tuple[str, int], CheckRun] = {}
        known: list[np.ndarray] = []  # of each seed: lies found, lies, truths called false, truths
        with tqdm(
            total=seeds * len(arms) * steps, desc="does the check pay", unit="step", delay=PATIENCE, disable=not progress
        ) as bar:
            for number in range(seed, seed + seeds):
                rows, counts = make_rows(pools["train"], teacher, kinds, number)
                known.append(counts)
                for arm in arms:
                    path = folder / "runs" / f"{arm}-{number}.npz"
                    if path.exists():
                        run = CheckRun.load(path)
                        refuse_other(path, run.setup, setup)
                        bar.update(steps)
                    else:
                        chosen = choose(arm, rows, number)
                        run = _train(begun, chosen, pools["train"], exam, stage, arm, number, setup, bf16, bar)
                        run.save(path)
                    runs[arm, number] = run
    return _result(tuple(arms), runs, exam, np.stack(known), setup, begun)


@entry
def shipped_check_pays() -> CheckPays:
    """The experiment as it ships, made with `tiny` by ``llava-lab check-pays`` (the command stands on `tiny`'s card).

    >>> from llava_lab.instructions import shipped_check_pays
    >>> shipped_check_pays().arms
    ('all', 'passed', 'random', 'truthful')
    """
    return CheckPays.load(SHIPPED)


def make_rows(pool: Pool, teacher: RuleTeacher, kinds: Sequence[str], seed: int) -> tuple[dict[str, list[Row]], np.ndarray]:
    """Rows of the lying teacher (``lying``) and of one that tells the truth, and how the check knew them apart.

    The counts are of turns: lies found, lies, truths called false, truths.
    """
    honest, counts = RuleTeacher(0.0), np.zeros(4, np.int64)
    rows: dict[str, list[Row]] = {"lying": [], "truthful": []}
    for number in range(len(pool)):
        context = of_scene(pool.scene(number))
        facts = Facts.of(context)
        for kind in read_kinds(kinds).values():
            asked = kind.questions[seed % len(kind.questions)] if kind.questions else ""
            told = {
                name: sift(kind, context, who.ask(kind, context, seed=seed), asked)
                for name, who in (("lying", teacher), ("truthful", honest))
            }
            for name, (turns, _, checked) in told.items():
                if turns:
                    rows[name].append(Row(number, tuple(turns), not checked["false"]))
            for said, truth in zip(told["lying"][0], told["truthful"][0], strict=False):
                false = bool(false_sentences(*said, facts))
                counts += (false, 1, 0, 0) if said != truth else (0, 0, false, 1)
    return rows, counts


def choose(arm: str, rows: dict[str, list[Row]], seed: int) -> list[Row]:
    """The rows an arm trains on. Raises DataError where fewer than `FEWEST` pass."""
    if arm == "truthful":
        return rows["truthful"]
    passed = [row for row in rows["lying"] if row.passes]
    if len(passed) < FEWEST:
        few = f"only {len(passed)} of {len(rows['lying'])} rows pass the check, at least {FEWEST} are needed"
        raise DataError(f"{few}; take a larger n or a lower lie")
    if arm == "random":
        picked = np.random.default_rng((seed, 71)).choice(len(rows["lying"]), len(passed), replace=False)
        return [rows["lying"][int(i)] for i in np.sort(picked)]
    return passed if arm == "passed" else rows["lying"]


def _train(
    begun: Start,
    rows: list[Row],
    pool: Pool,
    exam: Exam,
    stage: Stage,
    arm: str,
    seed: int,
    setup: dict[str, Any],
    bf16: bool,
    bar: Any,
) -> CheckRun:
    """A fresh connector and the start's language model on these rows, then the exam; the start comes back as it was."""
    model: Any = begun.lab.model
    module = fresh(begun, CONNECTOR, seed)
    parts = {"connector": module, "language": layout.language_model(model), "head": model.get_output_embeddings()}
    data = _Batches(rows, pool, begun.lab.tokenizer, batch=min(stage.batch, len(rows)), seed=seed)
    loss = partial(loss_of, model, module, image_id=begun.lab.image_id)
    try:
        with plugged(begun.lab, module):
            loop.freeze_all_but(model, stage.trains)
            losses = loop.train(
                stage, parts, data, lambda item: (loss(item), {}), rates={"connector": RATE}, bf16=bf16, on_step=bar.update
            )
            model.requires_grad_(False)
            right, _ = sit(model, module, exam, begun.lab.image_id)
    finally:
        model.requires_grad_(False)
        begun.reset()
    return CheckRun(arm, seed, json.loads(json.dumps(setup)), len(rows), right, np.array(losses, np.float32))


def _result(
    arms: tuple[str, ...],
    runs: dict[tuple[str, int], CheckRun],
    exam: Exam,
    known: np.ndarray,
    setup: dict[str, Any],
    begun: Start,
) -> CheckPays:
    seeds = tuple(sorted({number for _, number in runs}))
    right = np.array([[runs[arm, number].right for number in seeds] for arm in arms])
    types = ("all", *sorted(set(exam.types)))
    kind = np.array([types.index(name) for name in exam.types])
    asked = stats.Questions(np.zeros(len(kind), np.int64), kind, exam.picture, 1, len(types))
    named = [pair for pair in PAIRS if set(pair) <= set(arms)]
    pairs = [(arms.index(second), arms.index(first)) for first, second in named]  # stats: second minus first
    table = stats.table(right, pairs, np.zeros(len(pairs), np.int64), asked, seed=setup["seed"])
    scores = stats.accuracies(right, asked, seed=setup["seed"])
    return CheckPays(
        arms=arms,
        seeds=seeds,
        types=types,
        rows=np.array([[runs[arm, number].rows for number in seeds] for arm in arms]),
        accuracy=right.mean(2),
        by_type=scores["accuracy"][:, 0],
        interval=scores["accuracy_interval"][:, 0, 0],
        last_loss=np.array([[runs[arm, number].losses[-10:].mean() for number in seeds] for arm in arms], np.float64),
        pairs=tuple(f"{first} - {second}" for first, second in named),
        effect=table["effect"][:, 0, 0],
        picture_interval=table["picture_interval"][:, 0, 0],
        seed_interval=table["seed_interval"][:, 0, 0],
        p_adjusted=table["p_adjusted"][:, 0, 0],
        verdict=table["verdict"][:, 0, 0],
        lies_found=known.sum(0),
        setup=setup,
        start=begun.name,
        questions=int(right.shape[2]),
        notes=begun.notes,
    )
