"""How probable the model finds its own answer for other pictures: teacher forcing, no sampling.

The finished sequence is given again with each picture, and the targets' scores are read at their predicting positions.
Every method that changes the input is scored here, by one of `SCORES`:

- ``logodds``: ``ln(p / (1 - p))`` of each of the target's tokens, summed: the token's logit against all others together.
  It does not saturate. Far from certainty it is the log-probability; near certainty, where the log-probability has nowhere
  to go, each unit still counts. Perturbation and patching use it unless asked otherwise.
- ``logprob``: ``ln p``, summed. In a sum over several tokens the least certain one outweighs all others.

Of a contrast both are the same: the logit of the token said minus that of the token not said.

A `Reader` also says how far rounding alone may move a score (`noise_floor`). What changes a score by less has done nothing
that can be told.

    pixels, score = target_score(lab, run, (run.target(),))
    with undisturbed(lab.model):
        score(pixels)

Source of the score: the logit difference of activation patching (Heimersheim and Nanda 2024, arXiv 2404.15255, section 4),
against all other tokens where none is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lab.models import Lab
from llava_lab.models.generation import log_probs, precise
from llava_lab.replay.targets import Targets, predicting_rows
from llava_lab.results import Run

Score = Callable[[Float[Tensor, "B 3 Y X"]], Float[Tensor, "B N"]]  # pictures -> score of each target

LOGODDS, LOGPROB = "logodds", "logprob"
SCORES = (LOGODDS, LOGPROB)
NAMES = {LOGODDS: "log-odds", LOGPROB: "log-probability"}

# How many units in the last place of the logits a score may move by rounding. Measured on `tiny` against float64: changes of
# token_knockout are off by up to 8 units in float32, and by up to 1.9 in bfloat16, whose matrix products add up in float32.
ROUNDINGS = {torch.float32: 8.0, torch.float64: 8.0}
ROUNDINGS_HALF = 2.0


class Reader:
    """Reads the targets' scores out of logits, (B, R, V) at the positions `at`, and knows what rounding makes of them."""

    floors: Float[Tensor, "B N"]  # of what was read last; 0 before anything was

    def __init__(self, targets: Targets, score: str = LOGPROB) -> None:
        self.targets, self.score, self.at = targets, score, predicting_rows(targets)
        self.floors = torch.zeros(1, len(targets))

    def __call__(self, logits: Float[Tensor, "B R V"]) -> Float[Tensor, "B N"]:
        self.floors = noise_floor(logits, self.at, self.targets, score=self.score).cpu()
        return read_scores(logits, self.at, self.targets, score=self.score)


def target_score(lab: Lab, run: Run, targets: Targets, read: Reader | None = None) -> tuple[Float[Tensor, "1 3 Y X"], Score]:
    """The run's own pixels, of its first picture, and a function from a batch of pixels to each target's score in float32.

    The score is the natural log-probability of the target's tokens, summed, or what `read` reads; for a contrast, the logit
    of the token said minus that of the token not said. Call it inside `capture.undisturbed`.
    """
    inputs = lab.inputs(run, tiles=True) if run.others else lab.inputs(run)
    every = inputs.pop("pixel_values")
    read = read or Reader(targets)
    keep = torch.tensor(read.at, device=inputs["input_ids"].device)

    def score(batch: Tensor) -> Tensor:
        repeated = {name: value.expand(len(batch), *value.shape[1:]) for name, value in inputs.items()}
        if len(every) > 1:  # each variant beside the run's other pictures, which are the same in all
            shown = every.repeat(len(batch), 1, 1, 1)
            shown[run.number :: len(every)] = batch
        else:
            shown = batch
        return read(lab.model(**repeated, pixel_values=shown, logits_to_keep=keep, use_cache=False).logits)

    return every[run.number : run.number + 1], score


def read_scores(
    logits: Float[Tensor, "B R V"], at: Sequence[int], targets: Targets, *, score: str = LOGPROB
) -> Float[Tensor, "B N"]:
    """Each target's score from the logits at the positions `at`, one row of `logits` each; read in float64, given as float32.

    Summed over the target's tokens; for a contrast, those of the token not said are taken off. `score` is one of `SCORES`, or
    ``logit`` where a softmax would mix in every other word.
    """
    where = {position: i for i, position in enumerate(at)}
    values = log_probs(logits) if score == LOGPROB else precise(logits)
    columns = []
    for target in targets:
        rows = [where[position] for position in target.positions]
        said = values[:, rows, list(target.token_ids)]
        if target.against_ids:
            column = said.sum(1) - values[:, rows, list(target.against_ids)].sum(1)
        else:
            column = ((said - _others(values, rows, target.token_ids)) if score == LOGODDS else said).sum(1)
        columns.append(column)
    return torch.stack(columns, 1).float().to(logits.device)


def noise_floor(
    logits: Float[Tensor, "B R V"], at: Sequence[int], targets: Targets, *, score: str = LOGPROB
) -> Float[Tensor, "B N"]:
    """What rounding in the logits' own type may change in each target's score, in the score's unit.

    `ROUNDINGS` units in the last place of the larger of the two logits that are told apart (the token's, and all others'
    together or the one not said); of a log-probability times 1 - p, its slope; tokens err independently, so their squares
    add up.

    >>> import torch
    >>> from llava_lab.replay.score import noise_floor
    >>> from llava_lab.results import Target
    >>> certain = torch.tensor([[[12.0, -4.0]]])
    >>> said = (Target("word", "red", (0,), (0,)),)
    >>> [f"{float(noise_floor(certain.to(kind), (0,), said, score='logodds')):.1e}" for kind in (torch.float32, torch.bfloat16)]
    ['1.1e-05', '1.9e-01']
    """
    units = ROUNDINGS.get(logits.dtype, ROUNDINGS_HALF) * torch.finfo(logits.dtype).eps
    where = {position: i for i, position in enumerate(at)}
    values = precise(logits)
    columns = []
    for target in targets:
        rows = [where[position] for position in target.positions]
        said = values[:, rows, list(target.token_ids)]
        against = values[:, rows, list(target.against_ids)] if target.against_ids else _others(values, rows, target.token_ids)
        noise = units * torch.maximum(said.abs(), against.abs())
        if score == LOGPROB and not target.against_ids:
            noise = noise * torch.sigmoid(against - said)
        columns.append(noise.square().sum(1).sqrt())
    return torch.stack(columns, 1).to(logits.device)


def _others(values: Float[Tensor, "B R V"], rows: Sequence[int], ids: Sequence[int]) -> Float[Tensor, "B n"]:
    """All other tokens together, as one logit: their log-sum-exp."""
    parts = []
    for row, token in zip(rows, ids, strict=True):
        others = values[:, row].clone()
        others[:, token] = -torch.inf
        parts.append(others.logsumexp(-1))
    return torch.stack(parts, 1)


def divergence(one: Float[Tensor, "R V"], other: Float[Tensor, "R V"]) -> Float[Tensor, " R"]:
    """Kullback-Leibler divergence of `one` from `other`, both logits, in nats; never below 0."""
    first, second = log_probs(one), log_probs(other)
    return (first.exp() * (first - second)).sum(-1).clamp_min(0).float()
