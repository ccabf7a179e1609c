"""What ships of a comparison of connectors: its numbers, one small model of each of linear and MLP, and a card.

`ship_ablation` reads a finished comparison and trains nothing. It takes the first seed, with stage 1, at equal samples;
keeps it as a compact folder (`llava_lab.models.compact`); and measures what keeping it so has changed, on test questions
that the result has answers to: a folder that answers otherwise than the result says is another run's, and is refused.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava_lab.errors import CheckpointError, DataError, OptionError
from llava_lab.evaluation import answer_all, load_items
from llava_lab.models import Lab, compact, load
from llava_lab.models.folders import ABLATE, ABLATION
from llava_lab.results_ablation import Ablation
from llava_lab.training import ablation_card as card
from llava_lab.training.ablation_run import Finished, Job

CONNECTORS = ("linear", "mlp2x_gelu")  # whose first seed ships
RESULT, CARD = "ablation.npz", "README.md"
LARGEST = 2_000_000  # bytes of the result
PICTURES = 25  # of the test split, four questions each
COMPARED = 8  # questions whose logits are compared
AGREE = 0.95  # share of answers on which a folder and the result must agree


@dataclass(frozen=True)
class Change:
    """What keeping a model as bytes did to it, beside the folder the run wrote. Logits are over whole finished sequences."""

    questions: int
    same: int  # answers that are the same word for word
    right_before: int
    right_after: int
    logit: float  # largest difference of any logit
    logit_rounded: float  # the same when the folder's weights are only rounded to bfloat16
    logit_spread: float  # standard deviation of the folder's logits
    of_result: int  # answers right or wrong as the result has them
    bytes: int  # of the small folder

    def in_words(self) -> str:
        return (
            f"{self.same} of {self.questions} answers are the same; right {self.right_before} before, {self.right_after} "
            f"after; largest change of a logit {self.logit:.3f} (rounding to bfloat16 alone: {self.logit_rounded:.3f}; "
            f"logits spread by {self.logit_spread:.2f}); {self.bytes / 1e6:.1f} MB"
        )


def ship_ablation(
    out: str | os.PathLike,
    assets: str | os.PathLike = ABLATION,
    *,
    result: Ablation | str | os.PathLike | None = None,
    start: str = "runs/tiny",
    pictures: int = PICTURES,
    progress: bool = True,
) -> dict[str, Change]:
    """Write folder `assets` (``linear/``, ``mlp2x_gelu/``, ``ablation.npz``, ``README.md``) of the comparison in folder `out`.

    `result` None is ``out/ablation.npz``. `start` is what card and result call the start, which there may be a path of one
    machine. `pictures` of the test split are answered before and after. Returns what the bytes changed, by connector.
    Everything is written beside `assets` first and then renamed; an older shipped comparison gives way only then.
    Raises DataError for a result that is missing, larger than 2 MB or of other models than the folders hold,
    CheckpointError for a folder that is missing, OptionError where `assets` holds something else.
    """
    out, assets = Path(out), Path(assets)
    found = result if isinstance(result, Ablation) else _result(Path(result) if result else out / RESULT)
    if assets.exists() and any(assets.iterdir()) and not (assets / RESULT).is_file():
        raise OptionError(f"{assets} holds something that is not a shipped comparison; remove it or give another folder")
    found = replace(found, model=start)
    jobs = {name: first_job(found, name) for name in CONNECTORS}
    for job in jobs.values():
        if not (out / "models" / job.id / "config.json").is_file():
            raise CheckpointError(f"{out / 'models' / job.id} is missing; run {ABLATE} without --no-keep")
    with compact.whole(assets) as part:
        size = found.save(part / RESULT).stat().st_size
        if size > LARGEST:
            raise DataError(f"the result takes {size:,} bytes and at most {LARGEST:,} ship; test on fewer pictures")
        changes = {}
        for name, job in jobs.items():
            compact.write(out / "models" / job.id, part / name)
            (part / name / CARD).write_text(card.of_model(found, job), encoding="utf-8")
            changes[name] = measure(out / "models" / job.id, part / name, found, name, pictures=pictures, progress=progress)
        said = {name: change.in_words() for name, change in changes.items()}
        (part / CARD).write_text(card.of_result(found, said, fused=_fused(out, jobs["linear"])), encoding="utf-8")
    return changes


def first_job(result: Ablation, connector: str) -> Job:
    """The run of a connector's first seed with stage 1 at equal samples. Raises OptionError when there is none."""
    arm = result.arm(connector, budget="samples", stage1=True)
    first, second = result.steps[arm].tolist()
    return Job(connector, float(result.rate[arm]), int(result.seeds[0]), (first, second), result.splits)


def measure(before: Path, after: Path, result: Ablation, connector: str, *, pictures: int, progress: bool = True) -> Change:
    """Both folders on the first questions of the result's first split. Raises DataError when `before` is not the result's."""
    old, new = load(before, device="cpu", dtype="float32"), load(after, device="cpu", dtype="float32")
    split = result.splits[0]
    items = load_items("picturebook", split=split, n=min(pictures, result.pictures[2]), seed=result.seed)
    kept = result.right[result.arm(connector, budget="samples", stage1=True), 0, result.question_split == 0][: len(items)]
    first = answer_all(old, items, label=f"{connector} as trained", progress=progress)
    right = [said == item.answer for said, item in zip(first, items, strict=True)]
    agree = int((np.array(right) == kept).sum())
    if agree < AGREE * len(items):
        raise DataError(
            f"{before} answers {agree} of {len(items)} {split} questions as the result says; it is of another run: "
            "give the result of this folder"
        )
    second = answer_all(new, items, label=f"{connector} as bytes", progress=progress)
    logit, rounded, spread = _logits(old, new, items[:: max(1, len(items) // COMPARED)][:COMPARED])
    return Change(
        questions=len(items),
        same=sum(a == b for a, b in zip(first, second, strict=True)),
        right_before=sum(right),
        right_after=sum(said == item.answer for said, item in zip(second, items, strict=True)),
        logit=logit,
        logit_rounded=rounded,
        logit_spread=spread,
        of_result=agree,
        bytes=sum(file.stat().st_size for file in after.iterdir()),
    )


@torch.inference_mode()
def _logits(old: Lab, new: Lab, items: Any) -> tuple[float, float, float]:
    """(largest change as bytes, largest change in bfloat16's rounding, spread) over the sequences `old` finishes."""
    rounded: Any = copy.deepcopy(old.model).to(torch.bfloat16).to(torch.float32)
    changes, roundings, spreads = [], [], []
    for item in items:
        given = old.inputs(old.ask(item.draw(), item.question))
        logits = old.model(**given).logits
        changes.append(float((new.model(**given).logits - logits).abs().max()))
        roundings.append(float((rounded(**given).logits - logits).abs().max()))
        spreads.append(float(logits.std()))
    return max(changes), max(roundings), float(np.mean(spreads))


def _result(path: Path) -> Ablation:
    if not path.is_file():
        raise DataError(f"{path} is missing; make it with: {ABLATE}")
    return Ablation.load(path)


def _fused(out: Path, job: Job) -> bool:
    """Whether the run was compiled, as its own file says."""
    path = out / "runs" / f"{job.id}.npz"
    return path.is_file() and bool(Finished.load(path).setup.get("fused"))
