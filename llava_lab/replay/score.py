"""How probable the model finds its own answer for other pictures: teacher forcing, no sampling.

The finished sequence is given again with each picture, and the targets' log-probabilities are read at
their predicting positions. Every method that changes the input is scored here, by the same number.

    pixels, score = target_score(lab, run, (run.target(),))
    with undisturbed(lab.model):
        score(pixels)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lab.models.generation import log_probs, precise
from llava_lab.replay.targets import Targets, predicting_rows
from llava_lab.results import Run

if TYPE_CHECKING:
    from llava_lab.models import Lab

Score = Callable[[Float[Tensor, "B 3 Y X"]], Float[Tensor, "B N"]]  # pictures -> score of each target


def target_score(lab: Lab, run: Run, targets: Targets) -> tuple[Float[Tensor, "1 3 Y X"], Score]:
    """The run's own pixels, of its first picture, and a function from a batch of pixels to each target's score in float32.

    The score is the natural log-probability of the target's tokens, summed; for a contrast, the logit of
    the token said minus that of the token not said. Call it inside `capture.undisturbed`.
    """
    inputs = lab.inputs(run, tiles=True) if run.others else lab.inputs(run)
    every = inputs.pop("pixel_values")
    at = predicting_rows(targets)
    keep = torch.tensor(at, device=inputs["input_ids"].device)

    def score(batch: Tensor) -> Tensor:
        repeated = {name: value.expand(len(batch), *value.shape[1:]) for name, value in inputs.items()}
        if len(every) > 1:  # each variant beside the run's other pictures, which are the same in all
            shown = every.repeat(len(batch), 1, 1, 1)
            shown[run.number :: len(every)] = batch
        else:
            shown = batch
        logits = lab.model(**repeated, pixel_values=shown, logits_to_keep=keep, use_cache=False).logits
        return read_scores(logits, at, targets)

    return every[run.number : run.number + 1], score


def read_scores(
    logits: Float[Tensor, "B R V"], at: Sequence[int], targets: Targets, *, raw: bool = False
) -> Float[Tensor, "B N"]:
    """Each target's score from the logits at the positions `at`, one row of `logits` each; read in float64, given as float32.

    Log-probabilities are summed over the target's tokens, `raw` logits where a softmax would mix in every other word; for
    a contrast, those of the word not said are taken off.
    """
    where = {position: i for i, position in enumerate(at)}
    values = precise(logits) if raw else log_probs(logits)
    columns = []
    for target in targets:
        rows = [where[position] for position in target.positions]
        said = values[:, rows, list(target.token_ids)].sum(1)
        columns.append(said - values[:, rows, list(target.against_ids)].sum(1) if target.against_ids else said)
    return torch.stack(columns, 1).float().to(logits.device)


def divergence(one: Float[Tensor, "R V"], other: Float[Tensor, "R V"]) -> Float[Tensor, " R"]:
    """Kullback-Leibler divergence of `one` from `other`, both logits, in nats; never below 0."""
    first, second = log_probs(one), log_probs(other)
    return (first.exp() * (first - second)).sum(-1).clamp_min(0).float()
