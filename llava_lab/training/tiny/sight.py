"""Stages 1 and 2 of `tiny`, LLaVA's own: alignment of the connector, then visual instruction tuning.

Stage 1 trains the connector alone, on captions in the plain form (picture, caption, newline) and
on single facts in the same form; LLaVA has captions only.
Stage 2 trains connector and language model with the loss on answers only: of ten batches six ask
apart (`streams`), two join turns into conversations as LLaVA does, two go on with single facts.
The vision tower is frozen in both. Source: arXiv 2310.03744 and haotian-liu/LLaVA @ c121f04
``llava/train/train.py`` (preprocess_plain, preprocess_v1).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from llava_lab.training.text import IGNORE, encode
from llava_lab.training.tiny.batches import (
    ASKED,
    SHORT_SHARE,
    apart,
    apart_loss,
    facts,
    joined,
    joined_loss,
    plain,
    question_turns,
)
from llava_lab.training.tiny.language import statements
from llava_lab.training.tiny.pictures import Pool
from llava_lab.training.tiny.tower import batch_indices, normalise
from llava_lab.worlds.picturebook import REQUESTS, caption, conversation, description

IMAGE = "<image>"
CHECK_PICTURES = 192
FORMS = ("apart", "fact", "apart", "apart", "joined", "apart", "fact", "apart", "apart", "joined")  # of stage 2
FACTS = 16  # single facts per picture in stage 1


class AlignData(Dataset):
    """Batch number -> pictures with texts about them: caption and description, or single facts in turn."""

    def __init__(self, pool: Pool, tokenizer: PreTrainedTokenizerFast, *, batch: int, seed: int) -> None:
        self.pool, self.tokenizer, self.batch, self.seed = pool, tokenizer, batch, seed
        self.image_id = int(tokenizer.convert_tokens_to_ids(IMAGE))

    def __getitem__(self, step: int) -> tuple[str, Any, Tensor]:
        rng = np.random.default_rng((self.seed, 41, step))
        chosen = batch_indices(len(self.pool), self.batch, step, self.seed + 1)
        scenes = [self.pool.scene(int(i)) for i in chosen]
        pictures = torch.from_numpy(self.pool.pictures[chosen])
        if step % 3:
            known = [statements(s, rng, FACTS) for s in scenes]
            return "apart", facts(self.tokenizer, known, self.image_id), pictures
        texts = [[caption(s), description(s, rng)] for s in scenes]
        return "apart", plain(self.tokenizer, texts, self.image_id), pictures


class InstructData(Dataset):
    """Batch number -> pictures with questions apart, turns joined, or single facts."""

    def __init__(self, pool: Pool, tokenizer: PreTrainedTokenizerFast, *, batch: int, turns: int, seed: int) -> None:
        self.pool, self.tokenizer, self.batch, self.turns, self.seed = pool, tokenizer, batch, turns, seed
        self.image_id = int(tokenizer.convert_tokens_to_ids(IMAGE))

    def __getitem__(self, step: int) -> tuple[str, Any, Tensor]:
        rng = np.random.default_rng((self.seed, 42, step))
        chosen = batch_indices(len(self.pool), self.batch, step, self.seed + 2)
        scenes, system = [self.pool.scene(int(i)) for i in chosen], bool(rng.random() < 0.6)
        pictures = torch.from_numpy(self.pool.pictures[chosen])
        form = FORMS[step % len(FORMS)]
        if form == "fact":
            known = [statements(s, rng, 2 * self.turns) for s in scenes]
            return "apart", facts(self.tokenizer, known, self.image_id), pictures
        if form == "joined":
            turns = [conversation(s, rng, 1 + int(rng.integers(self.turns // 2))) for s in scenes]
            # now and then a scene has no question of the types drawn
            turns = [pairs or [(REQUESTS[0], caption(s))] for pairs, s in zip(turns, scenes, strict=True)]
            return "joined", joined(self.tokenizer, [encode(self.tokenizer, t, system=system) for t in turns]), pictures
        short = bool(rng.random() < SHORT_SHARE)
        samples = [question_turns(s, rng, self.turns, short=short, types=ASKED)[0] for s in scenes]
        if not short:  # half of the pictures are also described
            chance = rng.random(len(scenes)) < 0.5
            request = [(str(rng.choice(REQUESTS)), caption(s)) for s in scenes]
            samples = [[r, *pairs[1:]] if c else pairs for c, r, pairs in zip(chance, request, samples, strict=True)]
        return "apart", apart(self.tokenizer, samples, system=system), pictures


def sight_loss(model: nn.Module, item: tuple[str, Any, Tensor], image_id: int) -> tuple[Tensor, dict[str, float]]:
    """Loss of one batch with pictures; the share of supervised tokens goes to the log."""
    form, batch, pictures = item
    tokens = features(model, pictures)
    share = float((batch.labels != IGNORE).float().mean())
    if form == "joined":
        return joined_loss(model, batch, tokens, image_id), {"joined": 1.0, "supervised": round(share, 4)}
    loss, right = apart_loss(model, batch, tokens, image_id)
    asked = (batch.labels != IGNORE).any(-1)
    return loss, {"joined": 0.0, "supervised": round(share, 4), "right": round(float(right.sum() / asked.sum()), 4)}


def features(model: nn.Module, pictures: Tensor) -> Tensor:
    """uint8 pictures (B, side, side, 3) -> projected image tokens (B, K, D), through the model's own path."""
    return torch.stack(list(model.model.get_image_features(pixel_values=normalise(pictures.numpy())).pooler_output))


def make_check(
    model: nn.Module, pool: Pool, tokenizer: PreTrainedTokenizerFast, *, turns: int = 8
) -> Callable[[int], dict[str, Any]]:
    """A function that scores questions about unseen pictures: right in every answer token, by type.

    Teacher-forced with every token the most likely one, which is the same as greedy exact match.
    """
    rng = np.random.default_rng(43)
    count = min(CHECK_PICTURES, len(pool))
    scenes = [pool.scene(i) for i in range(count)]
    asked = [question_turns(s, rng, turns) for s in scenes]
    batch = apart(tokenizer, [pairs for pairs, _ in asked], system=True)
    pictures = torch.from_numpy(np.array(pool.pictures[:count]))
    image_id = int(tokenizer.convert_tokens_to_ids(IMAGE))

    @torch.no_grad()
    def check(step: int) -> dict[str, Any]:
        with torch.autocast("cpu", torch.bfloat16):
            _, right = apart_loss(model, batch, features(model, pictures), image_id)
        hits: dict[str, list[bool]] = defaultdict(list)
        for row, (_, types) in zip(right.tolist(), asked, strict=True):
            for hit, kind in zip(row, types, strict=False):
                hits[kind].append(hit)
        overall = sum(map(sum, hits.values())) / sum(map(len, hits.values()))
        return {"check": round(overall, 4), "by_type": {k: round(sum(v) / len(v), 3) for k, v in sorted(hits.items())}}

    return check
