"""The answering loop: one prefill with the picture, then one token a step on the cache.

A plain loop, not ``model.generate``: the log-probability of every token comes with it, the sampling draws from its own generator,
and stopping half-way leaves nothing behind. Greedy answers equal ``model.generate``'s (tested). The image token is never chosen:
a sequence with a second picture in it could not be explained.

    generated = generate(lab.model, input_ids, pixel_values, limit=20, eos=lab.eos_ids, image_id=lab.image_id)
    generated.token_ids, generated.logprobs

`generate_many` answers a batch of prompts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Contrast:
    """Answer by what the picture says and another does not: visual contrastive decoding.

    Source: Leng et al. 2023 (arXiv 2311.16922), equations 3 and 4. Each side keeps its own cache; in the authors' code
    (DAMO-NLP-SG/VCD ``vcd_sample.py``) the other side takes over the picture's own after the first token.
    """

    pixel_values: Float[Tensor, "N 3 S S"]  # another picture in the place of each
    alpha: float = 1.0  # how much of the other side is taken off
    beta: float = 0.1  # only tokens at least this likely, as a share of the likeliest one's probability, may be chosen

    def apply(self, logits: Float[Tensor, "B V"], others: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """``(1 + alpha) logits - alpha others``, minus infinity where the picture itself makes a token unlikely."""
        least = logits.max(-1, keepdim=True).values + math.log(self.beta)
        return ((1 + self.alpha) * logits - self.alpha * others).masked_fill(logits < least, -torch.inf)


def generate(
    model: nn.Module,
    input_ids: Int[Tensor, "1 T"],
    pixel_values: Float[Tensor, "N *squares 3 S S"] | None = None,
    *,
    image_sizes: Int[Tensor, "1 2"] | None = None,
    limit: int,
    eos: Collection[int],
    image_id: int,
    temperature: float = 0.0,
    seed: int = 0,
    on_step: Callable[[int, Float[Tensor, " V"]], None] | None = None,
) -> Generated:
    """Answer greedily (``temperature=0``) or by seeded sampling, at most `limit` tokens; N pictures stand in the sequence.

    `on_step` is given each new token and the `log_probs` of every token at its place; it may raise KeyboardInterrupt, which
    ends the answer with that token.
    """
    answer: list[tuple[int, float]] = []
    stopped = "length"
    random = torch.Generator(device=input_ids.device).manual_seed(seed)  # never the global generator
    try:
        with evaluating(model), torch.no_grad():
            given = {"pixel_values": pixel_values, "image_sizes": image_sizes}
            shown = {name: value for name, value in given.items() if value is not None}
            out = model(input_ids=input_ids, **shown, use_cache=True, logits_to_keep=1)
            while True:
                logits = out.logits[0, -1].float()
                token = _choose(logits, image_id, temperature, random)
                if token in eos:
                    stopped = "eos"
                    break
                chances = log_probs(logits)
                answer.append((token, float(chances[token])))
                if on_step is not None:
                    on_step(token, chances)
                if len(answer) >= limit:
                    break
                step = torch.tensor([[token]], device=input_ids.device)
                out = model(input_ids=step, past_key_values=out.past_key_values, use_cache=True)
    except KeyboardInterrupt:
        stopped = "interrupted"
        logger.warning("interrupted after %d tokens; the answer so far is kept", len(answer))
    return _generated(answer, stopped)


def generate_many(
    model: nn.Module,
    prompts: Sequence[np.ndarray],
    pixel_values: Float[Tensor, "N 3 S S"] | None,
    owner: Sequence[int],
    *,
    limits: Sequence[int],
    eos: Collection[int],
    image_id: int,
    temperature: float = 0.0,
    seed: int = 0,
    contrast: Contrast | None = None,
) -> list[Generated]:
    """Answers to several prompts at a time, each as `generate` gives it but for rounding.

    Prompt i is about picture ``owner[i]`` of N, or with ``pixel_values=None`` all are without a picture. What the prompts say
    up to and with their picture must be the same; it runs once a picture, and the questions go on from its cache. Padding
    stands before each question and is masked. Ctrl-C passes; nothing of the batch is kept then.

    With a `contrast` every prompt runs twice, before its picture and before the other one, and both go on with the same tokens.
    """
    device = next(model.parameters()).device
    cut = 0 if pixel_values is None else int(np.flatnonzero(prompts[0] == image_id)[-1]) + 1
    assert all(np.array_equal(ids[:cut], prompts[0][:cut]) for ids in prompts), "prompts differ before their picture"
    randoms = [torch.Generator(device=device).manual_seed(seed) for _ in prompts]
    answers: list[list[tuple[int, float]]] = [[] for _ in prompts]
    stopped = ["" for _ in prompts]
    count, sides = len(prompts), 1
    if contrast is not None:
        assert pixel_values is not None, "a contrast is between pictures"
        owner, prompts, sides = [*owner, *(number + len(pixel_values) for number in owner)], [*prompts, *prompts], 2
        pixel_values = torch.cat([pixel_values, contrast.pixel_values])
    with evaluating(model), torch.no_grad():
        cache: Any = None
        if pixel_values is not None:
            prefix = torch.from_numpy(prompts[0][:cut]).expand(len(pixel_values), -1).to(device)
            cache = model(input_ids=prefix, pixel_values=pixel_values, use_cache=True, logits_to_keep=1).past_key_values
            cache.reorder_cache(torch.tensor(owner, device=device))
        ids, mask = (part.to(device) for part in _padded([row[cut:] for row in prompts], cut))
        while True:
            at = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            given = {"input_ids": ids, "attention_mask": mask, "position_ids": at, "past_key_values": cache}
            out = model(**given, use_cache=True, logits_to_keep=1)
            cache, logits = out.past_key_values, out.logits[:count, -1].float()
            weighed = logits if contrast is None else contrast.apply(logits, out.logits[count:, -1].float())
            tokens = _choose_each(weighed, image_id, temperature, randoms)
            chances = log_probs(logits)[range(len(tokens)), tokens].tolist()
            for row, (token, chance) in enumerate(zip(tokens, chances, strict=True)):
                if stopped[row]:
                    continue
                if token in eos:
                    stopped[row] = "eos"
                    continue
                answers[row].append((token, chance))
                if len(answers[row]) >= limits[row]:
                    stopped[row] = "length"
            if all(stopped):
                break
            ids = torch.tensor(tokens * sides, device=device)[:, None]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return [_generated(answer, why) for answer, why in zip(answers, stopped, strict=True)]


def _generated(answer: list[tuple[int, float]], stopped: str) -> Generated:
    ids = np.array([token for token, _ in answer], np.int64)
    return Generated(ids, np.array([logprob for _, logprob in answer], np.float32), stopped)


def _padded(rows: list[np.ndarray], prefix: int) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B K"]]:
    """Questions pushed to the right, and the mask over the `prefix` positions before them and over themselves."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.ones(len(rows), prefix + longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.from_numpy(row)
        mask[i, prefix : prefix + longest - len(row)] = 0
    return ids, mask


def _choose_each(
    logits: Float[Tensor, "B V"], image_id: int, temperature: float, randoms: Sequence[torch.Generator]
) -> list[int]:
    if temperature == 0:  # all rows in one go
        allowed = logits.clone()
        allowed[:, image_id] = -torch.inf
        return allowed.argmax(-1).tolist()
    return [_choose(row, image_id, temperature, random) for row, random in zip(logits, randoms, strict=True)]


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
