"""The answering loop: one prefill with the picture, then one token a step on the cache.

A plain loop, not ``model.generate``: the log-probability of every token comes with it, the sampling draws from its own generator,
and stopping half-way leaves nothing behind. Greedy answers equal ``model.generate``'s (tested). The image token is never chosen:
a sequence with a second picture in it could not be explained.

    generated = generate(lab.model, input_ids, pixel_values, limit=20, eos=lab.eos_ids, image_id=lab.image_id)
    generated.token_ids, generated.logprobs
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llava_lab.capture import evaluating

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generated:
    """New tokens without the closing one, their log-probabilities, and why the loop ended."""

    token_ids: np.ndarray  # int64 (n,)
    logprobs: np.ndarray  # float32 (n,), natural log, from the raw logits by `log_probs`
    stopped: str  # "eos" | "length" | "interrupted"


def generate(
    model: nn.Module,
    input_ids: Int[Tensor, "1 T"],
    pixel_values: Float[Tensor, "1 *squares 3 S S"],
    *,
    image_sizes: Int[Tensor, "1 2"] | None = None,
    limit: int,
    eos: Collection[int],
    image_id: int,
    temperature: float = 0.0,
    seed: int = 0,
    on_id: Callable[[int], None] | None = None,
) -> Generated:
    """Answer greedily (``temperature=0``) or by seeded sampling, at most `limit` tokens."""
    answer: list[tuple[int, float]] = []
    stopped = "length"
    random = torch.Generator(device=input_ids.device).manual_seed(seed)  # never the global generator
    try:
        with evaluating(model), torch.no_grad():
            shown = {"pixel_values": pixel_values} | ({} if image_sizes is None else {"image_sizes": image_sizes})
            out = model(input_ids=input_ids, **shown, use_cache=True, logits_to_keep=1)
            while True:
                logits = out.logits[0, -1].float()
                token = _choose(logits, image_id, temperature, random)
                if token in eos:
                    stopped = "eos"
                    break
                answer.append((token, float(log_probs(logits)[token])))
                if on_id is not None:
                    on_id(token)
                if len(answer) >= limit:
                    break
                step = torch.tensor([[token]], device=input_ids.device)
                out = model(input_ids=step, past_key_values=out.past_key_values, use_cache=True)
    except KeyboardInterrupt:
        stopped = "interrupted"
        logger.warning("interrupted after %d tokens; the answer so far is kept", len(answer))
    ids = np.array([token for token, _ in answer], np.int64)
    return Generated(ids, np.array([logprob for _, logprob in answer], np.float32), stopped)


def log_probs(logits: Float[Tensor, "*B V"]) -> Float[Tensor, "*B V"]:
    """Natural log-probabilities over a vocabulary, float64.

    In float32 the logits' own rounding is larger than what is left below certainty: a word of probability 1 - 1e-9 would
    read as certain, and hiding a patch would cost it nothing.

    >>> from llava_lab.models.generation import log_probs
    >>> f"{float(log_probs(torch.tensor([30.0, 9.0]))[0]):.2g}"
    '-7.6e-10'
    """
    return precise(logits).log_softmax(-1)


def precise(values: Tensor) -> Tensor:
    """The same in float64, on the processor where the device has none (mps)."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def _choose(logits: Float[Tensor, " V"], image_id: int, temperature: float, random: torch.Generator) -> int:
    allowed = logits.clone()
    allowed[image_id] = -torch.inf
    if temperature == 0:
        return int(allowed.argmax())
    return int(torch.multinomial(torch.softmax(allowed / temperature, -1), 1, generator=random))
