"""Which runs a comparison needs: budgets, sweeps and seeds as plain data, before anything is trained.

Equal samples: every connector takes the recipe's steps. Equal operations: the dearest connector takes the recipe's
steps, the others as many more as cost the same; operations are counted while real batches pass (matrix products,
forward and backward, without the optimiser).

A sweep has a seed of its own, which no measured run uses, and is examined on validation only. The rate with the lowest
validation loss is taken: loss is finer than accuracy on the few hundred questions there are. Where equal operations
change the number of steps by less than a tenth, the rate found for equal samples is kept; where they change it by less
than two in a hundred, so are the runs, and the operations beside them say how far from equal they are.

    arms = make_arms(["linear", "mlp2x_gelu"], flops, ABLATION, budgets=BUDGETS, stage1=(True, False))
    jobs = [job for arm in arms for job in arm.sweep(RATES, seed=0)]
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch.utils.flop_counter import FlopCounterMode

from llava_lab.comparison.run import Finished, Job, Material, file_name
from llava_lab.connectors import connector as plugged
from llava_lab.errors import OptionError
from llava_lab.results import Saved
from llava_lab.training.loop import freeze_all_but
from llava_lab.training.recipe import TINY, Stage

CONNECTORS = ("linear", "mlp2x_gelu", "bottleneck", "linear2x")  # linear, LLaVA-1.5's, and one control for each
BUDGETS = ("samples", "flops")
RATES = (3e-4, 1e-3, 3e-3)
SWEEP_SEED = 9973  # added to the comparison's seed
VALIDATION = "validation"
NEAR = 0.1  # share of steps that may differ before a rate is chosen anew
SAME = 0.02  # share of steps that may differ before anything is trained anew

ABLATION = replace(
    TINY,
    name="tiny ablation",
    pictures=2000,
    align=replace(TINY.align, steps=80),
    instruct=replace(TINY.instruct, steps=100),
)


@dataclass(frozen=True)
class Arm:
    """A connector under one condition."""

    connector: str
    budget: str
    stage1: bool
    steps: tuple[int, int]
    sweep_steps: tuple[int, int]
    flops: float  # of one run

    def sweep(self, rates: Sequence[float], seed: int) -> list[Job]:
        return [Job(self.connector, rate, seed + SWEEP_SEED, self.sweep_steps, (VALIDATION,)) for rate in rates]

    def untuned(self) -> Arm:
        """The same for a connector that does not learn: it has no stage 1."""
        return replace(self, steps=(0, self.steps[1]), sweep_steps=(0, self.sweep_steps[1]))

    def runs(self, rate: float, seeds: Sequence[int], exams: tuple[str, ...]) -> list[Job]:
        return [Job(self.connector, rate, seed, self.steps, exams) for seed in seeds]


@dataclass(frozen=True)
class Counted(Saved):
    """Operations of a connector's steps, kept so that a resumed comparison does not count again."""

    KIND = "ablation flops"

    setup: dict[str, Any]
    flops: Float64[np.ndarray, " stages"]  # mean of a step of stage 1 and of stage 2


def step_flops(material: Material, connector: str, folder: Path) -> tuple[float, float]:
    """`count_flops`, read from `folder` where this comparison has counted before."""
    path, setup = folder / f"{file_name(connector)}.npz", json.loads(json.dumps(material.setup))
    known = Counted.load(path) if path.exists() else None
    if known is None or known.setup != setup:
        known = Counted(setup, np.array(count_flops(material, connector)))
        known.save(path)
    first, second = known.flops.tolist()
    return first, second


def count_flops(material: Material, connector: str) -> tuple[float, float]:
    """Mean floating-point operations of a step of stage 1 and of stage 2 with this connector, forward and backward."""
    start, means = material.start, []
    model: Any = start.lab.model
    module = material.fresh(connector, 0)
    try:
        with plugged(start.lab, module):
            for stage, cycle in zip(material.stages, material.CYCLE, strict=True):
                freeze_all_but(model, stage.trains)
                data = material.batches(stage, material.recipe.seed)
                total = 0
                for step in range(cycle):
                    item, counter = data[step], FlopCounterMode(display=False)  # a counter forgets when it is entered again
                    with counter, torch.autocast("cpu", torch.bfloat16, enabled=material.bf16):
                        material.loss(module, item).backward()
                    total += counter.get_total_flops()
                means.append(total / cycle)
                model.zero_grad(set_to_none=True)
    finally:
        model.requires_grad_(False)
        model.zero_grad(set_to_none=True)
    return means[0], means[1]


def make_arms(
    connectors: Sequence[str],
    flops: Mapping[str, tuple[float, float]],
    stages: tuple[Stage, Stage],
    *,
    budgets: Sequence[str],
    stage1: Sequence[bool],
) -> list[Arm]:
    """Every arm, budget by budget. Equal operations never give a connector fewer steps than equal samples."""
    arms = []
    for budget in budgets:
        for aligned in stage1:
            plain = (stages[0].steps if aligned else 0, stages[1].steps)
            cost = {name: _cost(flops[name], plain) for name in connectors}
            dearest = max(cost.values())
            for name in connectors:
                more = dearest / cost[name] if budget == "flops" else 1.0
                steps = (round(plain[0] * more), round(plain[1] * more))
                extra, shared = sum(steps) / sum(plain) - 1, "samples" in budgets
                near, steps = shared and extra <= NEAR, plain if shared and extra <= SAME else steps
                arms.append(Arm(name, budget, aligned, steps, plain if near else steps, _cost(flops[name], steps)))
    return arms


def _cost(flops: tuple[float, float], steps: tuple[int, int]) -> float:
    return flops[0] * steps[0] + flops[1] * steps[1]


def make_pairs(arms: Sequence[Arm]) -> tuple[list[tuple[int, int]], list[int]]:
    """Pairs of arms to compare, second minus first, and the family each is judged in.

    Within a budget, every two connectors under the same stages (one family), and every connector with stage 1 against
    itself without (another).
    """
    pairs: list[tuple[int, int]] = []
    families: list[int] = []
    names: dict[tuple[str, Any], int] = {}
    for i, first in enumerate(arms):
        for j, second in enumerate(arms):
            if first.budget != second.budget:
                continue
            beside = i < j and first.stage1 == second.stage1
            aligned = first.connector == second.connector and second.stage1 and not first.stage1
            if beside or aligned:
                pairs.append((i, j))
                families.append(names.setdefault((first.budget, first.stage1 if beside else "stages"), len(names)))
    return pairs, families


def choose(jobs: Sequence[Job], done: Mapping[Job, Finished]) -> float:
    """The rate with the lowest validation loss. Raises OptionError when every rate diverged."""
    sound = [np.isfinite(done[job].losses).all() and np.isfinite(done[job].loss).all() for job in jobs]
    losses = [float(done[job].loss[0]) if fine else math.inf for job, fine in zip(jobs, sound, strict=True)]
    best = min(range(len(jobs)), key=losses.__getitem__)
    if not math.isfinite(losses[best]):
        rates = ", ".join(f"{job.rate:g}" for job in jobs)
        raise OptionError(f"training {jobs[0].connector!r} diverged at every rate ({rates}); give smaller ones")
    return jobs[best].rate


def unique(jobs: Iterable[Job]) -> list[Job]:
    """Each job once, in order."""
    return list(dict.fromkeys(jobs))


def check_options(
    connectors: Sequence[str],
    rates: Sequence[float],
    seeds: int,
    budgets: Sequence[str],
    stage1: Sequence[bool],
    splits: Sequence[str],
) -> None:
    """Raises OptionError (one line) for a comparison that would say nothing."""

    def no_list(names: Sequence[str]) -> bool:
        return isinstance(names, str) or not names or len(set(names)) < len(names)

    few = isinstance(connectors, str) or len(connectors) < 2
    rules: list[tuple[bool, str]] = [
        (few, f"a comparison wants a list of two connectors or more, got {connectors!r}"),
        (len(set(connectors)) < len(connectors), f"a connector is named twice: {', '.join(connectors)}"),
        (len(set(rates)) < 3, f"each connector's sweep wants 3 different rates or more, got {list(rates)}"),
        (any(not 0 < rate < math.inf for rate in rates), f"rates must be above 0, got {list(rates)}"),
        (seeds < 2, f"seeds must be 2 or more (5 to conclude anything), got {seeds}: one run has no spread"),
        (
            no_list(budgets) or bool(set(budgets) - set(BUDGETS)),
            f"budgets are {', '.join(BUDGETS)}, each once; got {budgets!r}",
        ),
        (not stage1 or len(set(stage1)) < len(stage1), f"stage1 is (True,), (False,) or both, got {list(stage1)}"),
        (no_list(splits), f"splits must be a list of names, each once; got {splits!r}"),
        (bool({VALIDATION, "train"} & set(splits)), f"splits must be held out from training, got {splits!r}"),
    ]
    for broken, reason in rules:
        if broken:
            raise OptionError(reason)
