"""From turns of a conversation to token ids, labels and the turn each token belongs to.

Labels come from character offsets of the rendered prompt, never from counting tokens: the
length arithmetic of the original code silently drops samples when a tokenizer disagrees
(haotian-liu/LLaVA issues 661, 779, 1166). Here a token that straddles an answer's edge raises.

Batches of questions as token arrays, the same for every stage that reads or sees.

Two forms. *Apart*: a common prefix with one picture slot, and many first questions beside it
(`streams.shared_prefix`). *Joined*: LLaVA's own, turns one after another in one sequence.

One row of LLaVA's data: its turns checked, its text tokenised, its answers labelled.

Stage 1 (``align``) uses LLaVA's ``plain`` form: picture, caption, newline; the request is thrown away and
the loss falls on the caption and its newline. Stage 2 (``instruct``) uses ``vicuna_v1`` with the loss on
answers and their end marks. The picture stands before the first question, wherever the row wrote it.

Source: haotian-liu/LLaVA @ c121f04 ``llava/train/train.py`` (preprocess_multimodal, preprocess_plain,
preprocess_v1); the response formats are LLaVA-1.5's, arXiv 2310.03744, Table 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from llava_lab.errors import DataError
from llava_lab.models.text import END_OF_TURN, IMAGE, SYSTEM
from llava_lab.training.tiny.streams import precise_attention, shared_prefix
from llava_lab.worlds.picturebook import TYPES, Scene, ask_about
from llava_lab.worlds.questions import RARE, SHORT

IGNORE = -100  # LLaVA's own value, and torch's default ignore_index
EOS = "</s>"


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens, with one ``<image>`` id where the picture goes."""

    ids: np.ndarray  # int64 (T,)
    labels: np.ndarray  # int64 (T,), IGNORE where nothing is learned
    turn: np.ndarray  # int64 (T,), 0 for what all turns share, then 1, 2, ...

    @property
    def supervised(self) -> float:
        return float((self.labels != IGNORE).mean())


def render(
    turns: list[tuple[str, str]], *, system: bool, picture: str | None = "<image>", apart: bool = False
) -> tuple[str, list[tuple[int, int]], list[int]]:
    """Prompt text, the character span of each answer with its end mark, and where each turn starts.

    LLaVA-1.5's ``vicuna_v1`` form, or transformers' without the system sentence. `picture` None is a
    conversation about no picture. With `apart`
    the turns are separate first questions that share the picture: none says ``USER:`` again.
    """
    text = f"{SYSTEM} " if system else ""
    spans, starts = [], []
    for i, (asked, answered) in enumerate(turns):
        if i == 0:
            text += "USER: " if picture is None else f"USER: {picture}\n"
        starts.append(len(text))
        if i > 0 and not apart:
            text += "USER: "
        text += f"{asked} ASSISTANT:"
        spans.append((len(text), len(text) + 1 + len(answered) + len(EOS)))
        text += f" {answered}{EOS}"
    return text, spans, starts


def encode(
    tokenizer: PreTrainedTokenizerFast,
    turns: list[tuple[str, str]],
    *,
    system: bool,
    picture: str | None = "<image>",
    apart: bool = False,
) -> Encoded:
    """Tokens and labels of one conversation; the loss falls on answers and their end marks only.

    Raises DataError when there is nothing to learn or a token straddles an answer's edge.
    """
    text, spans, starts = render(turns, system=system, picture=picture, apart=apart)
    encoding = tokenizer(text, return_offsets_mapping=True)
    ids = np.array(encoding["input_ids"], np.int64)
    offsets = np.array(encoding["offset_mapping"], np.int64).reshape(-1, 2)
    begin, end = offsets[:, 0], offsets[:, 1]
    labels = np.full(len(ids), IGNORE, np.int64)
    for start, stop in spans:
        inside = (begin >= start) & (end <= stop) & (end > begin)
        straddles = ((begin < start) & (end > start)) | ((begin < stop) & (end > stop))
        if straddles.any() or not inside.any():
            piece = tokenizer.convert_ids_to_tokens(int(ids[np.argmax(straddles)]))
            raise DataError(f"cannot mask the answer {text[start:stop]!r}: token {piece!r} straddles its edge")
        labels[inside] = ids[inside]
    # a turn's first token may begin with the space before it, so compare token ends
    turn = np.searchsorted(np.array(starts), end - 1, side="right")
    turn[0] = 0  # the beginning-of-sequence token has an empty span
    return Encoded(ids, labels, turn)


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


STAGES = ("align", "instruct")
HUMAN, MODEL = ("human", "user"), ("gpt", "assistant")

# What LLaVA-1.5 appends to a conversation's first question, by kind of answer.
FORMATS: Mapping[str, str] = MappingProxyType(
    {
        "none": "",
        "word": SHORT,
        "letter": "Answer with the option's letter from the given choices directly.",
        "caption": "Provide a one-sentence caption for the provided image.",
        "region": "Provide a short description for this region.",
        "box": "Provide the bounding box coordinate of the region this sentence describes.",
    }
)

Turns = list[tuple[str, str]]


def read_turns(row: Any, *, stage: str, suffix: str = "none") -> tuple[Turns, str | None]:
    """A row's (question, answer) turns and its picture's name, None for text alone.

    Raises DataError that says what of the row is not LLaVA's format; the caller adds file and row number.
    """
    if not isinstance(row, dict):
        raise DataError(f"expected an object with 'conversations', got {type(row).__name__}")
    said = row.get("conversations")
    if not isinstance(said, list) or not all(isinstance(turn, dict) for turn in said):
        raise DataError("'conversations' must be a list of {'from': ..., 'value': ...}")
    if said and said[0].get("from") not in HUMAN:
        said = said[1:]  # LLaVA skips a first turn that is not the human's
    for number, turn in enumerate(said):
        expected = (HUMAN, MODEL)[number % 2]
        if turn.get("from") not in expected:
            raise DataError(f"turn {number} is from {turn.get('from')!r}, expected {expected[0]!r}: human and gpt must alternate")
        if not isinstance(turn.get("value"), str):
            raise DataError(f"turn {number} has no text in 'value'")
    if not said or len(said) % 2:
        raise DataError(f"the conversation has {len(said)} turns; expected question and answer in turn, ending with an answer")
    picture = _picture(row, [turn["value"] for turn in said], stage)
    values = [turn["value"].replace(IMAGE, "").strip() for turn in said]
    if any(END_OF_TURN in value for value in values):
        raise DataError(f"the text holds {END_OF_TURN!r}, which ends an answer; take it out")
    turns = list(zip(values[::2], values[1::2], strict=True))
    if not all(answer for _, answer in turns):
        raise DataError("an answer is empty")
    request = FORMATS[suffix]
    if request and request not in turns[0][0]:
        turns[0] = (f"{turns[0][0]}\n{request}", turns[0][1])
    return turns, picture


def _picture(row: dict[str, Any], values: list[str], stage: str) -> str | None:
    picture, asked = row.get("image"), [IMAGE in value for value in values]
    if picture is None:
        if any(asked):
            raise DataError(f"the text has {IMAGE} but the row names no 'image'")
        if stage == "align":
            raise DataError("stage align trains on pictures with captions; this row has no 'image'")
        return None
    if not isinstance(picture, str) or not picture:
        raise DataError(f"'image' must be the path of one picture, got {picture!r}")
    if any(asked[1::2]) or not any(asked):
        raise DataError(f"a row with a picture has {IMAGE} in a question (and in no answer)")
    return picture


def count_words(turns: Turns) -> int:
    """LLaVA's measure of length for grouping: words of all turns, image tokens not counted."""
    return sum(len(text.split()) for turn in turns for text in turn)


def tokens_at_most(turns: Turns, *, stage: str, fixed: int) -> int:
    """A number of tokens the row cannot exceed: no token is shorter than a byte."""
    texts = [turns[0][1]] if stage == "align" else [text for turn in turns for text in turn]
    return fixed + sum(len(text.encode()) + 40 for text in texts)  # 40: USER, ASSISTANT, end marks, their spaces


def tokenise(
    tokenizer: Any, turns: Turns, *, picture: bool, stage: str, image_id: int, image_tokens: int, system: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids with the picture's tokens expanded, and labels; both int64 (T,), IGNORE where nothing is learned."""
    if stage == "align":
        ids, labels = _plain(tokenizer, turns[0][1])
    else:
        coded = encode(tokenizer, turns, system=system, picture=IMAGE if picture else None)
        ids, labels = coded.ids, coded.labels
    where = np.flatnonzero(ids == image_id)
    if len(where) != int(picture):
        raise DataError(f"the text has {len(where)} image tokens, expected {int(picture)}")
    if picture:
        at = int(where[0])
        ids = np.concatenate([ids[:at], np.full(image_tokens, image_id, np.int64), ids[at + 1 :]])
        labels = np.concatenate([labels[:at], np.full(image_tokens, IGNORE, np.int64), labels[at + 1 :]])
    return ids, labels


def _plain(tokenizer: Any, caption: str) -> tuple[np.ndarray, np.ndarray]:
    coded = tokenizer(f"{IMAGE}{caption}\n", return_offsets_mapping=True)
    ids = np.array(coded["input_ids"], np.int64)
    begin, end = np.array(coded["offset_mapping"], np.int64).reshape(-1, 2).T
    return ids, np.where((begin >= len(IMAGE)) & (end > begin), ids, IGNORE)
