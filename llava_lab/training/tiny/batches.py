"""Batches of texts about pictures as token arrays, the same for every stage of `tiny` that reads or sees, and their losses.

Two forms. *Apart*: a common prefix with one picture slot, and many first questions beside it (`streams.shared_prefix`).
*Joined*: LLaVA's own, turns one after another in one sequence.

    batch = apart(tokenizer, [[("What color is the car?", "The car is red.")]], system=True)
    loss, right = apart_loss(model, batch, image_tokens, image_id)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from llava_lab.training.text import IGNORE, Encoded, encode, stacked
from llava_lab.training.tiny.streams import precise_attention, shared_prefix
from llava_lab.worlds.questions import RARE, SHORT, TYPES, ask_about
from llava_lab.worlds.scenes import Scene

SHORT_SHARE = 0.15  # of batches want single words
# the types in training, those that take several steps of thought more often
ASKED = (
    *TYPES,
    "kind",
    "existence",
    *("count", "comparison", "relation", "same color", *RARE) * 2,
    "comparison",
    "relation",
    *RARE,
)


@dataclass(frozen=True)
class Apart:
    """Questions asked apart. One prefix for the whole batch, so that nothing needs padding but the turns."""

    prefix: Tensor  # int64 (P,), one image id in it
    ids: Tensor  # int64 (B, N, T)
    labels: Tensor  # int64 (B, N, T), already shifted: labels[t] is what hidden[t] must predict
    types: tuple[tuple[str, ...], ...] = ()  # (B, up to N) question types


def question_turns(
    scene: Scene, rng: np.random.Generator, turns: int, *, short: bool = False, types: tuple[str, ...] = ()
) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """(question, answer) pairs asked apart, in sentences or in LLaVA's short form, and their types."""
    asked = ask_about(scene, rng, turns, types)
    pairs = [(f"{q.text}\n{SHORT}", q.short) if short else (q.text, q.answer) for q in asked]
    return pairs, tuple(q.type for q in asked)


def apart(
    tokenizer: PreTrainedTokenizerFast,
    samples: list[list[tuple[str, str]]],
    *,
    system: bool,
    types: tuple[tuple[str, ...], ...] = (),
) -> Apart:
    """Encode samples of turns that share a picture each, all with the same prefix form."""
    encoded = [encode(tokenizer, turns, system=system, apart=True) for turns in samples]
    prefix = next(e.ids[e.turn == 0] for e in encoded if e.turn.max() > 0)  # the same for all that ask anything
    turns = [[(e.ids[e.turn == i], e.labels[e.turn == i]) for i in range(1, int(e.turn.max()) + 1)] for e in encoded]
    return _side_by_side(tokenizer, torch.from_numpy(prefix), turns, types)


def plain(tokenizer: PreTrainedTokenizerFast, samples: list[list[str]], image_id: int) -> Apart:
    """LLaVA's stage 1 form: picture, caption, newline; everything after the picture is learned."""
    turns = []
    for texts in samples:
        captions = [np.array(tokenizer(text + "\n", add_special_tokens=False)["input_ids"], np.int64) for text in texts]
        # the first token is predicted too, by a padding token put in front of it
        turns.append([(np.append(tokenizer.pad_token_id, ids), np.append(IGNORE, ids)) for ids in captions])
    return _side_by_side(tokenizer, torch.tensor([tokenizer.bos_token_id, image_id]), turns)


def facts(tokenizer: PreTrainedTokenizerFast, samples: list[list[tuple[str, str]]], image_id: int) -> Apart:
    """(given, known) texts right after the picture; only the known part is learned."""
    turns = []
    for pairs in samples:
        statements = []
        for given, known in pairs:
            before, after = (np.array(ids, np.int64) for ids in tokenizer([given, known], add_special_tokens=False)["input_ids"])
            statements.append((np.concatenate([before, after]), np.concatenate([np.full(len(before), IGNORE), after])))
        turns.append(statements)
    return _side_by_side(tokenizer, torch.tensor([tokenizer.bos_token_id, image_id]), turns)


def _side_by_side(
    tokenizer: PreTrainedTokenizerFast,
    prefix: Tensor,
    turns: list[list[tuple[np.ndarray, np.ndarray]]],
    types: tuple[tuple[str, ...], ...] = (),
) -> Apart:
    """Each sample's turns (ids, labels) beside each other, (B, N, T); turns a sample lacks are all padding."""
    pad = int(tokenizer.pad_token_id)
    ids, labels = stacked([turn for sample in turns for turn in sample], pad)
    most = max(len(sample) for sample in turns)
    there = torch.tensor([[n < len(sample) for n in range(most)] for sample in turns])[..., None]
    shape = (len(turns), most, ids.shape[1])
    ids, labels = (torch.full(shape, fill).masked_scatter(there, part) for fill, part in ((pad, ids), (IGNORE, labels)))
    return Apart(prefix, ids, labels, types)


def apart_loss(model: nn.Module, batch: Apart, pictures: Tensor, image_id: int) -> tuple[Tensor, Tensor]:
    """Mean loss over labelled tokens, and which turns are right in every token, bool (B, N).

    `pictures` (B, K, D) are embeddings that take the place of the prefix's image id.
    """
    embed = model.model.language_model.embed_tokens
    at = int((batch.prefix == image_id).nonzero()[0])
    text = embed(batch.prefix)[None].expand(len(pictures), -1, -1)
    prefix = torch.cat([text[:, :at], pictures.to(text.dtype), text[:, at + 1 :]], 1)
    hidden = shared_prefix(model.model.language_model, prefix, embed(batch.ids))
    return answer_loss(model.lm_head, hidden, batch.labels)


def answer_loss(head: nn.Module, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy at labelled rows only, and whether each sequence's labelled tokens are all right."""
    wanted = labels != IGNORE
    logits = head(hidden[wanted]).float()
    wrong = torch.zeros(labels.shape, dtype=torch.bool)
    wrong[wanted] = logits.argmax(-1) != labels[wanted]
    asked = wanted.any(-1)
    return F.cross_entropy(logits, labels[wanted]), torch.where(asked, ~wrong.any(-1), False)


@dataclass(frozen=True)
class Joined:
    """Whole conversations, padded at the end; causal attention needs no mask for that."""

    ids: Tensor  # int64 (B, T), one image id each where there is a picture
    labels: Tensor  # int64 (B, T), shifted


def joined(tokenizer: PreTrainedTokenizerFast, samples: list[Encoded]) -> Joined:
    """Conversations as one batch."""
    return Joined(*stacked([(sample.ids, sample.labels) for sample in samples], tokenizer.pad_token_id))


def joined_loss(model: nn.Module, batch: Joined, pictures: Tensor | None, image_id: int) -> Tensor:
    """Mean loss over labelled tokens; each row's image id is replaced by its picture's embeddings (K, D)."""
    embeds, labels = model.model.language_model.embed_tokens(batch.ids), batch.labels
    if pictures is not None:
        places = [int((ids == image_id).nonzero()[0]) for ids in batch.ids]
        rows = zip(embeds, pictures.to(embeds.dtype), places, strict=True)
        embeds = torch.stack([torch.cat([row[:at], picture, row[at + 1 :]]) for row, picture, at in rows])
        fill = torch.full((pictures.shape[1] - 1,), IGNORE)
        labels = torch.stack([torch.cat([row[:at], fill, row[at:]]) for row, at in zip(labels, places, strict=True)])
    with precise_attention(model.model.language_model):
        hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    return answer_loss(model.lm_head, hidden, labels)[0]
