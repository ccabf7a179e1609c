"""A tuned lens: for each state one affine, trained so that reading the state early predicts what is read at the end.

``state + state A + b`` with A and b zero at first (which is the plain lens), trained on image tokens with Adam to
lessen the Kullback-Leibler divergence from the final distribution. It reads what the plain lens cannot, in another
basis; it may also learn what the model only works out later, so compare on pictures it was not trained on.

Source: Belrose et al. 2023 (arXiv 2303.08112), section 2; there SGD with momentum on text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm.std import tqdm

from llava_lab.attribution.base import number, whole_number
from llava_lab.attribution.unembed import final_norm, output_head
from llava_lab.errors import OptionError
from llava_lab.models.layout import language_layers
from llava_lab.packing import Saved
from llava_lab.probes.features import QUESTION, read_stages, subset

if TYPE_CHECKING:
    from llava_lab.models import Lab

BATCH = 256  # tokens a step


@dataclass(frozen=True)
class TunedLens(Saved):
    """One affine per state below the last; the last state is read as it is."""

    KIND: ClassVar[str] = "tuned lens"

    weights: np.ndarray  # float32 (layers, W, W)
    biases: np.ndarray  # float32 (layers, W)
    before: np.ndarray  # float32 (layers,), divergence of the plain lens on the training tokens, nats
    after: np.ndarray  # float32 (layers,), the same when trained
    model: str
    fingerprint: str

    def translate(self, number: int, states: Tensor) -> Tensor:
        """States (P, W) as the last layer would leave them, in their own dtype; the last state is given back."""
        if number >= len(self.weights):
            return states
        weight, bias = (torch.from_numpy(part[number]).to(states.device) for part in (self.weights, self.biases))
        state = states.float()
        return (state + state @ weight + bias).to(states.dtype)


def train_lens(
    lab: Lab,
    pictures: Sequence[Any],
    *,
    question: str = QUESTION,
    steps: int = 200,
    rate: float = 1e-3,
    per_picture: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> TunedLens:
    """Train a lens on image tokens of `pictures` asked `question`; the model is not changed.

    Holds ``pictures x per_picture`` tokens of every state in memory. Ctrl-C raises, nothing half-trained comes back.
    Raises OptionError for no pictures, a negative rate or fewer than one step.
    """
    whole_number("steps", steps, least=1)
    number("rate", rate)
    if not len(pictures):
        raise OptionError("expected pictures to train a lens on, got none")
    count, rng = len(language_layers(lab.model)), np.random.default_rng(seed)
    kept: list[list[np.ndarray]] = [[] for _ in range(count + 1)]
    for picture in tqdm(pictures, desc="tokens", unit="picture", disable=not progress):
        found = read_stages(lab, picture, tuple(range(count + 1)), question=question)
        chosen = subset(rng, len(found[0]), per_picture)
        for state in range(count + 1):
            kept[state].append(found[state][chosen])
    tokens = [torch.from_numpy(np.concatenate(rows)).to(lab.device) for rows in kept]
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(range(count), desc="lens", unit="state", disable=not progress)
    trained = [_train_one(lab, tokens[state], tokens[-1], steps, rate, generator) for state in bar]
    weights, biases, before, after = zip(*trained, strict=True)
    gaps = (np.array(before, np.float32), np.array(after, np.float32))
    return TunedLens(np.stack(weights), np.stack(biases), gaps[0], gaps[1], lab.name, lab.fingerprint)


def _train_one(
    lab: Lab, states: Tensor, last: Tensor, steps: int, rate: float, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray, float, float]:
    width = states.shape[1]
    weight = torch.zeros(width, width, device=states.device, requires_grad=True)
    bias = torch.zeros(width, device=states.device, requires_grad=True)
    optimiser = torch.optim.Adam([weight, bias], lr=rate)

    def loss(rows: Tensor) -> Tensor:
        read = _log_probs(lab, states[rows] + states[rows] @ weight + bias)
        with torch.no_grad():
            goal = _log_probs(lab, last[rows])
        return (goal.exp() * (goal - read)).sum(-1).mean()

    def whole() -> float:
        with torch.no_grad():
            parts = torch.arange(len(states), device=states.device).split(BATCH)
            return sum(float(loss(rows)) * len(rows) for rows in parts) / len(states)

    before = whole()
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(states), (min(BATCH, len(states)),), generator=generator).to(states.device)
            weight.grad, bias.grad = torch.autograd.grad(loss(rows), (weight, bias))  # so the model's own grads stay None
            optimiser.step()
    return weight.detach().cpu().numpy(), bias.detach().cpu().numpy(), before, whole()


def _log_probs(lab: Lab, states: Tensor) -> Tensor:
    head = output_head(lab)
    normed = final_norm(lab)(states.to(head.weight.dtype))
    return head(normed).float().log_softmax(-1)
