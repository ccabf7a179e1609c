"""Answers many questions in batches, greedily: the same tokens as `Lab.ask`, several at a time.

What a prompt says up to and with its picture is the same for all questions about that picture, so
it runs once per picture; the questions go on from its cache. Padding stands before each question
and is masked, so it changes no answer (tested). It keeps nothing but the answers; for
probabilities and positions ask with `Lab.ask`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.std import tqdm
from transformers import Cache

from llava_lab.evaluation.items import Item
from llava_lab.models import Lab
from llava_lab.models.generation import evaluating

BATCH = 128
LONGEST = 48  # tokens an answer may take


def answer_all(
    lab: Lab,
    items: Sequence[Item],
    *,
    prompt: str | None = None,
    max_new_tokens: int = LONGEST,
    batch: int = BATCH,
    label: str = "answering",
    progress: bool = True,
) -> list[str]:
    """One answer per item, in order. Items in a row that share a picture have it drawn and prepared once."""
    answers: list[str] = []
    bar = tqdm(total=len(items), desc=label, unit="question", disable=not progress)
    for start in range(0, len(items), batch):
        chosen = items[start : start + batch]
        sequences = [lab.sequence(item.question, prompt=prompt).token_ids for item in chosen]
        draws = list(dict.fromkeys(item.draw for item in chosen))
        pixels = torch.cat([lab.pixels(draw(), None) for draw in draws])
        answers += _answer(lab, sequences, pixels, [draws.index(item.draw) for item in chosen], max_new_tokens)
        bar.update(len(chosen))
    bar.close()
    return answers


@torch.inference_mode()
def _answer(lab: Lab, sequences: list[np.ndarray], pixels: Float[Tensor, "N 3 S S"], owner: list[int], limit: int) -> list[str]:
    """Greedy answers; sequence i is about picture ``owner[i]``."""
    cut = int(np.flatnonzero(sequences[0] == lab.image_id)[-1]) + 1
    assert all((ids[:cut] == sequences[0][:cut]).all() for ids in sequences), "prompts differ before their picture"
    prefix = torch.from_numpy(sequences[0][:cut]).expand(len(pixels), -1).to(lab.device)
    with evaluating(lab.model):
        cache = lab.model(input_ids=prefix, pixel_values=pixels, use_cache=True, logits_to_keep=1).past_key_values
        cache.reorder_cache(torch.tensor(owner, device=lab.device))
        ids, mask = _padded([row[cut:] for row in sequences], cut)
        new = _go_on(lab, cache, ids.to(lab.device), mask.to(lab.device), limit)
    return [text.strip() for text in lab.tokenizer.batch_decode(new, skip_special_tokens=True)]


def _padded(rows: list[np.ndarray], cut: int) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B K"]]:
    """Questions pushed to the right, and the mask over the `cut` positions before them and over themselves."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.ones(len(rows), cut + longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.from_numpy(row)
        mask[i, cut : cut + longest - len(row)] = 0
    return ids, mask


def _go_on(lab: Lab, cache: Cache, ids: Int[Tensor, "B T"], mask: Int[Tensor, "B K"], limit: int) -> list[list[int]]:
    said: list[list[int]] = [[] for _ in ids]
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    ends = torch.tensor(sorted(lab.eos_ids), device=ids.device)
    for _ in range(limit):
        at = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
        out = lab.model(
            input_ids=ids, attention_mask=mask, position_ids=at, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        logits = out.logits[:, -1].float()
        logits[:, lab.image_id] = -torch.inf
        ids = logits.argmax(-1, keepdim=True)
        done |= torch.isin(ids[:, 0], ends)
        if done.all():
            break
        for row, token in zip((~done).nonzero()[:, 0].tolist(), ids[~done, 0].tolist(), strict=True):
            said[row].append(token)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return said
