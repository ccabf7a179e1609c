"""From states to words: the final norm and the output head, for chosen tokens or for the whole vocabulary.

`read_words` gives top words, entropy and the rank of chosen words without ever holding all logits: the vocabulary is
gone through `COLUMNS` rows of the output head at a time, keeping running sums. So beside the states themselves, at 7B
shape, 8 MB of weights and 1.2 MB of logits exist at once. Entropy comes from sum(exp(x - m) (x - m)) with a running
maximum m, so that large logits do not cancel.

    normed = final_norm(lab)(states)
    read_words(lab, normed, top=5, ids=()).top_ids

Source: transformers ``LlamaModel.norm`` and ``LlavaForConditionalGeneration.lm_head``; the logit lens of nostalgebraist (2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from llava_lab.checks import layer_window
from llava_lab.errors import LabError, OptionError
from llava_lab.models import Lab
from llava_lab.models.generation import precise
from llava_lab.models.layout import language_model
from llava_lab.models.text import pieces

ROWS = 64  # states at a time through the whole vocabulary: 8 MB of float32 at 32,000 words
EXACT = {torch.float32: 1e-4, torch.float64: 1e-6}  # agreement asked of a norm re-stated by hand; 16-bit types get ROUGH
ROUGH = 3e-2
COLUMNS = 512  # words at a time
BEFORE = "a"  # a word stands after something, so that its first token carries the space it has in a sentence


def final_norm(lab: Lab) -> nn.Module:
    """The norm between the last layer and the output head."""
    norm = getattr(language_model(lab.model), "norm", None)
    if not isinstance(norm, nn.Module):
        raise LabError(f"expected a language model with a final norm, got {type(language_model(lab.model)).__name__} without")
    return norm


def output_head(lab: Lab) -> nn.Linear:
    """The matrix from the last normed state to logits. Raises LabError when its rows cannot be read."""
    head = lab.model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        raise LabError(f"expected an output head of floating-point weights, got {type(head).__name__}; load it unquantised")
    return head


def word_rows(lab: Lab, ids: Sequence[int]) -> tuple[Float[Tensor, "N W"], Float[Tensor, " N"]]:
    """Each token's row of the output head and its bias (0 where there is none), float32."""
    head = output_head(lab)
    at = torch.tensor(list(ids), dtype=torch.long, device=head.weight.device)
    rows = head.weight.detach()[at].float()
    return rows, rows.new_zeros(len(at)) if head.bias is None else head.bias.detach()[at].float()


def token_logits(lab: Lab, states: Float[Tensor, "S W"], ids: Sequence[int]) -> Float[Tensor, "S N"]:
    """Logits of a few tokens at states that are already normed, float32."""
    rows, bias = word_rows(lab, ids)
    return states.to(rows.device).float() @ rows.T + bias


def log_total(lab: Lab, states: Float[Tensor, "S W"]) -> Float[Tensor, " S"]:
    """Log of the sum of exp(logit) over the vocabulary at normed states, float64: ``logit - log_total`` is a log-probability."""
    head = output_head(lab)
    device, dtype = head.weight.device, head.weight.dtype
    return torch.cat([precise(head(part.to(device, dtype))).logsumexp(-1) for part in states.split(ROWS)])


def norm_gain(norm: nn.Module, width: int) -> Float[Tensor, " W"]:
    """What a root-mean-square norm multiplies each direction by, float32: its answer to a vector of ones."""
    like = next(norm.parameters(), torch.ones(1))
    return norm(like.new_ones(1, width))[0].float() * (1 + _eps(norm)) ** 0.5


def norm_scale(norm: nn.Module, states: Float[Tensor, "S W"]) -> Float[Tensor, " S"]:
    """The one number per state that a root-mean-square norm divides by: ``norm(state) = gain * state * scale``, float32.

    With the scale held fixed the norm is linear, which is what splits a logit into a sum. Raises LabError
    when `norm` is another kind (a LayerNorm also subtracts the mean).
    """
    state = states.float()
    scale = (state.square().mean(-1) + _eps(norm)).rsqrt()
    known, mine = norm(states).float(), norm_gain(norm, states.shape[-1]) * state * scale[:, None]
    near = EXACT.get(states.dtype, ROUGH)
    if not torch.allclose(known, mine, rtol=near, atol=near * float(known.abs().max())):
        raise LabError(f"expected a root-mean-square final norm, got {type(norm).__name__}; its logits cannot be split exactly")
    return scale


def _eps(norm: nn.Module) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", None)) or 0.0)


@dataclass(frozen=True)
class Reading:
    """What one batch of normed states says; P states, K top words, N chosen ones."""

    top_ids: np.ndarray  # int32 (P, K), likeliest first
    top_probs: np.ndarray  # float32 (P, K)
    entropy: np.ndarray  # float32 (P,), nats
    ranks: np.ndarray  # int32 (P, N), 1 is the likeliest
    probs: np.ndarray  # float32 (P, N)


def read_words(lab: Lab, normed: Float[Tensor, "P W"], *, top: int, ids: Sequence[int], ranked: bool = True) -> Reading:
    """The words that states say which have been through the final norm already.

    A rank is a pass over the vocabulary for each of `ids`; without `ranked` all are 1 and hundreds of words cost what one does.
    """
    head = output_head(lab)
    states = normed.to(head.weight.device).float()
    vocabulary, count = len(head.weight), len(states)
    own = token_logits(lab, states, ids)
    above = torch.zeros_like(own, dtype=torch.int32)
    best, best_ids = states.new_full((count, 0), 0), torch.zeros((count, 0), dtype=torch.long, device=states.device)
    peak = states.new_full((count, 1), torch.finfo(torch.float32).min)
    wide = torch.float32 if peak.device.type == "mps" else torch.float64  # where a word is all but certain, 1 + 1e-9 is not 1
    total, moment = torch.zeros_like(peak, dtype=wide), torch.zeros_like(peak, dtype=wide)
    for first in range(0, vocabulary, COLUMNS):
        logits = states @ head.weight.detach()[first : first + COLUMNS].float().T
        if head.bias is not None:
            logits += head.bias.detach()[first : first + COLUMNS].float()
        for number, token in enumerate(ids if ranked else ()):
            higher = logits > own[:, number, None]
            if first <= token < first + logits.shape[1]:
                higher[:, token - first] = False  # a word is not above itself, whatever the last bit says
            above[:, number] += higher.sum(1, dtype=torch.int32)
        values, columns = logits.topk(min(top, logits.shape[1]), 1)
        best, order = torch.cat([best, values], 1).topk(min(top, best.shape[1] + values.shape[1]), 1)
        best_ids = torch.cat([best_ids, columns + first], 1).gather(1, order)
        highest = torch.maximum(peak, best[:, :1])
        logits -= highest
        weights = logits.exp()
        fade = (peak - highest).exp()
        moment = fade * (moment + (peak - highest) * total) + logits.mul_(weights).sum(1, keepdim=True, dtype=wide)
        total = fade * total + weights.sum(1, keepdim=True, dtype=wide)
        peak = highest
    log_total = total.log() + peak
    return Reading(
        best_ids.int().cpu().numpy(),
        (best - log_total).exp().float().cpu().numpy(),
        (total.log() - moment / total)[:, 0].clamp_min(0).float().cpu().numpy(),
        (above + 1).cpu().numpy(),
        (own - log_total).exp().float().cpu().numpy(),
    )


def word_tokens(lab: Lab, words: Sequence[str]) -> tuple[tuple[str, ...], tuple[int, ...], tuple[str, ...]]:
    """(words, the token each is read as, notes). A word of several tokens is read as its first with a letter; a note says so.

    Raises OptionError when a word is empty or the tokenizer does not know it.
    """
    wanted = (words,) if isinstance(words, str) else tuple(words)
    ids, notes = [], []
    for word in wanted:
        if not isinstance(word, str) or not word.strip():
            raise OptionError(f"expected words to look for, got {word!r}")
        spelt = spelt_inside(lab.tokenizer, word.strip())
        if not spelt or spelt[0] == lab.tokenizer.unk_token_id:
            raise OptionError(f"the tokenizer of {lab.name!r} has no token for {word!r}; choose another word")
        parts = pieces(lab.tokenizer, np.array(spelt))
        # a tokenizer that has not learned the word may spell the space before it as a token of its own
        first = next((i for i, part in enumerate(parts) if part.strip()), 0)
        if len(spelt) > 1:
            named, letters = (
                ", ".join(map(repr, parts)),
                "its first" if not first else f"{parts[first]!r}, its first with a letter",
            )
            notes.append(
                f"{word!r} is {len(spelt)} tokens ({named}); it is read as {letters}. What is said of it holds for that part "
                "alone, in whatever word it stands; to look for a word, choose one that the model has as one token."
            )
        ids.append(spelt[first])
    return wanted, tuple(ids), tuple(notes)


def token_texts(lab: Lab, ids: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Every token that occurs in `ids`, sorted, int32, and the text of each."""
    known = np.unique(ids).astype(np.int32)
    names = len(lab.tokenizer)
    named = iter(pieces(lab.tokenizer, known[known < names]))
    return known, tuple(next(named) if i < names else f"<unused {i}>" for i in known.tolist())


def state_window(layers: Any, count: int) -> tuple[int, int]:
    """``[start, stop)`` of the states 0 .. count: None is all, a whole number that state alone."""
    if isinstance(layers, Integral) and not isinstance(layers, bool):
        if not 0 <= int(layers) <= count:
            raise OptionError(f"layers must be a state from 0 (connector output) to {count} (last layer), got {layers}")
        return int(layers), int(layers) + 1
    return layer_window(layers, count + 1)


def spelt_inside(tokenizer: Any, word: str) -> list[int]:
    """The tokens of `word`, or of several, as it stands inside a sentence."""
    alone = tokenizer.encode(BEFORE, add_special_tokens=False)
    after = tokenizer.encode(f"{BEFORE} {word}", add_special_tokens=False)
    return after[len(alone) :] if after[: len(alone)] == alone else tokenizer.encode(word, add_special_tokens=False)
