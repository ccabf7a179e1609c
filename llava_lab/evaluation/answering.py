"""Answers many questions in batches, greedily: the same tokens as `Lab.ask`, several at a time.

Padding stands on the left and is masked, so it changes no answer (tested). It keeps nothing
but the answers; for probabilities and positions ask with `Lab.ask`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tqdm.std import tqdm

from llava_lab.evaluation.items import Item
from llava_lab.models import Lab

BATCH = 64
LONGEST = 48  # tokens an answer may take


def answer_all(
    lab: Lab,
    items: Sequence[Item],
    *,
    prompt: str = "llava-1.5",
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
        prepared = {item.draw: lab.pixels(item.draw(), None) for item in {item.draw: item for item in chosen}.values()}
        answers += _answer(lab, sequences, torch.cat([prepared[item.draw] for item in chosen]), max_new_tokens)
        bar.update(len(chosen))
    bar.close()
    return answers


@torch.inference_mode()
def _answer(lab: Lab, sequences: list[np.ndarray], pixels: torch.Tensor, limit: int) -> list[str]:
    longest = max(len(ids) for ids in sequences)
    pad = lab.tokenizer.pad_token_id if lab.tokenizer.pad_token_id is not None else min(lab.eos_ids)
    ids = torch.full((len(sequences), longest), int(pad))
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = torch.from_numpy(sequence)
        mask[row, longest - len(sequence) :] = 1
    done = lab.model.generate(
        input_ids=ids.to(lab.device),
        attention_mask=mask.to(lab.device),
        pixel_values=pixels,
        max_new_tokens=limit,
        do_sample=False,
        pad_token_id=int(pad),
        eos_token_id=sorted(lab.eos_ids),
    )
    return [text.strip() for text in lab.tokenizer.batch_decode(done[:, longest:], skip_special_tokens=True)]
