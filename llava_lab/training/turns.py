"""Batches of questions as token arrays, the same for every stage that reads or sees.

Two forms. *Apart*: a common prefix with one picture slot, and many first questions beside it
(`streams.shared_prefix`). *Joined*: LLaVA's own, turns one after another in one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from llava_lab.training.masks import IGNORE, Encoded, encode
from llava_lab.training.streams import precise_attention, shared_prefix
from llava_lab.worlds.picturebook import SHORT, TYPES, Scene, ask_about
from llava_lab.worlds.questions import RARE

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
    tails = [[(e.ids[e.turn == i], e.labels[e.turn == i]) for i in range(1, int(e.turn.max()) + 1)] for e in encoded]
    return Apart(torch.from_numpy(prefix), *_pad(tails, tokenizer.pad_token_id), types)


def plain(tokenizer: PreTrainedTokenizerFast, samples: list[list[str]], image_id: int) -> Apart:
    """LLaVA's stage 1 form: picture, caption, newline; everything after the picture is learned."""
    tails = []
    for texts in samples:
        rows = [np.array(tokenizer(text + "\n", add_special_tokens=False)["input_ids"], np.int64) for text in texts]
        tails.append([(np.concatenate([[tokenizer.pad_token_id], ids]), np.concatenate([[IGNORE], ids])) for ids in rows])
    return Apart(torch.tensor([tokenizer.bos_token_id, image_id]), *_pad(tails, tokenizer.pad_token_id))


def facts(tokenizer: PreTrainedTokenizerFast, samples: list[list[tuple[str, str]]], image_id: int) -> Apart:
    """(given, known) texts right after the picture; only the known part is learned."""
    tails = []
    for pairs in samples:
        rows = []
        for given, known in pairs:
            before, after = (np.array(ids, np.int64) for ids in tokenizer([given, known], add_special_tokens=False)["input_ids"])
            rows.append((np.concatenate([before, after]), np.concatenate([np.full(len(before), IGNORE), after])))
        tails.append(rows)
    return Apart(torch.tensor([tokenizer.bos_token_id, image_id]), *_pad(tails, tokenizer.pad_token_id))


def _pad(tails: list[list[tuple[np.ndarray, np.ndarray]]], pad: int) -> tuple[Tensor, Tensor]:
    longest = max(len(ids) for rows in tails for ids, _ in rows)
    most = max(len(rows) for rows in tails)
    ids = torch.full((len(tails), most, longest), pad)
    labels = torch.full((len(tails), most, longest), IGNORE)
    for b, rows in enumerate(tails):
        for n, (tokens, learned) in enumerate(rows):
            ids[b, n, : len(tokens)] = torch.from_numpy(tokens)
            labels[b, n, : len(tokens) - 1] = torch.from_numpy(learned[1:])
    return ids, labels


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
    longest = max(len(s.ids) for s in samples)
    ids = torch.full((len(samples), longest), tokenizer.pad_token_id)
    labels = torch.full((len(samples), longest), IGNORE)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.ids)] = torch.from_numpy(sample.ids)
        labels[row, : len(sample.ids) - 1] = torch.from_numpy(sample.labels[1:])
    return Joined(ids, labels)


def joined_loss(model: nn.Module, batch: Joined, pictures: Tensor | None, image_id: int) -> Tensor:
    """Mean loss over labelled tokens; each row's image id is replaced by its picture's embeddings (K, D)."""
    embeds, labels = model.model.language_model.embed_tokens(batch.ids), batch.labels
    if pictures is not None:
        rows, count = [], pictures.shape[1]
        for row in range(len(embeds)):
            at = int((batch.ids[row] == image_id).nonzero()[0])
            rows.append(torch.cat([embeds[row, :at], pictures[row].to(embeds.dtype), embeds[row, at + 1 :]]))
        embeds = torch.stack(rows)
        fill = torch.full((count - 1,), IGNORE)
        ats = [int((ids == image_id).nonzero()[0]) for ids in batch.ids]
        labels = torch.stack([torch.cat([row[:at], fill, row[at:]]) for row, at in zip(labels, ats, strict=True)])
    with precise_attention(model.model.language_model):
        hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    return answer_loss(model.lm_head, hidden, labels)[0]
