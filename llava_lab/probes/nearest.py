"""Which words of the vocabulary an image token behind the connector points nearest to, by cosine.

The input embedding (what the language model is used to read) and the output head (what it writes with) give
different answers. Raw cosine is dominated by one direction all words share, so the centred one is the default: the
vocabulary's mean is taken from the words and the picture's own mean from its tokens, which also takes away the gap
between the two clouds. A nearest word exists for any vector, so the share of readable ones stands beside that of
random vectors: the picture's own tokens with the entries of each put in random order.

    near = nearest_words(lab, run)
    near.readable_share, near.random_shares.mean()

Sources: Neo et al. 2024 (arXiv 2410.07149) and LatentLens (arXiv 2602.00462) for the question; the controls are ours.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from llava_lab.capture import undisturbed
from llava_lab.capture.residual import watch_stream
from llava_lab.checks import entry, made_by, one_of, whole_number
from llava_lab.errors import LabError, OptionError
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers
from llava_lab.models.text import pieces
from llava_lab.replay.words import COLUMNS, output_head
from llava_lab.results import NearestWords, Run

SPACES = ("input", "output")
SHORTEST_WORD = 3  # letters; shorter tokens are mostly pieces
ROUNDING = 1e-5  # of a token's length; what is left of it after centring is no direction when smaller
WORD_START = ("▁", "Ġ", " ")


@entry
def nearest_words(
    lab: Lab, run: Run, *, space: str = "input", centered: bool = True, top: int = 5, draws: int = 20, seed: int = 0
) -> NearestWords:
    """The `top` nearest words of every image token behind the connector, and how often they are whole words beside a control.

    `space`: "input" compares with the embeddings, "output" with the rows of the output head. Special tokens and rows
    without a token are left out. `draws` random controls. One forward; cosines are taken a few hundred words at a time.
    Raises OptionError (another space, `top` or `draws` out of range), CheckpointError, LabError (quantised embeddings).

    >>> near = ll.nearest_words(lab, run, draws=2)
    >>> near.top_ids.shape, near.random_shares.shape
    ((144, 5), (2,))
    """
    begin = time.perf_counter()
    one_of("space", space, SPACES)
    one_of("centered", centered, (True, False))
    whole_number("draws", draws, least=1)
    rows = _matrix(lab, space)
    words = _comparable(lab, len(rows))
    if whole_number("top", top, least=1) > len(words):
        raise OptionError(f"top must be at most the {len(words)} words compared with, got {top}")
    tokens = _image_tokens(lab, run).to(rows.device)
    middle, common = _vocabulary_means(rows, words)
    mean = middle if centered else torch.zeros_like(middle)
    ids, cosines = _nearest(_toward(tokens, centered), rows, words, mean, top)
    names = pieces(lab.tokenizer, np.arange(len(lab.tokenizer)))
    starts = lab.tokenizer.convert_ids_to_tokens(list(range(len(names))))
    whole = np.array([_whole_word(name, start) for name, start in zip(names, starts, strict=True)])
    shares, likeness = [], []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(draws):
        order = torch.rand(tokens.shape, generator=generator).argsort(-1).to(tokens.device)
        drawn, near = _nearest(_toward(tokens.gather(1, order), centered), rows, words, mean, 1)
        shares.append(whole[drawn].mean())
        likeness.append(near.mean())
    known = np.unique(ids).astype(np.int32)
    return NearestWords(
        top_ids=ids,
        cosines=cosines,
        piece_ids=known,
        pieces=tuple(names[i] for i in known),
        norms=tokens.norm(dim=-1).cpu().numpy(),
        readable=whole[ids[:, 0]],
        random_shares=np.array(shares, np.float32),
        random_cosines=np.array(likeness, np.float32),
        vocabulary_share=float(whole[words.cpu().numpy()].mean()),
        common_direction=common,
        space=space,
        centered=centered,
        map=run.map,
        **made_by(run, begin),
        notes=(_note(space, centered),),
    )


def _image_tokens(lab: Lab, run: Run) -> Float[Tensor, "P W"]:
    image, tokens = slice(*run.segments["image"]), []

    def fold(number: int, state: Tensor) -> None:
        if number == 0:
            tokens.append(state[0, image].float())

    with undisturbed(lab.model), watch_stream(language_layers(lab.model), fold):
        lab.model(**lab.inputs(run), use_cache=False, logits_to_keep=1)
    return tokens[0]


def _matrix(lab: Lab, space: str) -> Tensor:
    if space == "output":
        return output_head(lab).weight.detach()
    table = lab.model.get_input_embeddings()
    if not isinstance(table, nn.Embedding) or not table.weight.is_floating_point():
        raise LabError(f"expected an embedding of floating-point weights, got {type(table).__name__}; load it unquantised")
    return table.weight.detach()


def _comparable(lab: Lab, rows: int) -> Tensor:
    """Ids of the rows that are words: a token of the tokenizer and not a special one."""
    special = set(lab.tokenizer.all_special_ids) | {lab.image_id}
    return torch.tensor([i for i in range(min(rows, len(lab.tokenizer))) if i not in special])


def _vocabulary_means(rows: Tensor, words: Tensor) -> tuple[Tensor, float]:
    """The mean row, float32, and how much all rows share one direction: the squared length of their mean unit vector."""
    total = torch.zeros(rows.shape[1], device=rows.device)
    units = torch.zeros_like(total)
    for part in words.to(rows.device).split(COLUMNS):
        some = rows[part].float()
        total += some.sum(0)
        units += nn.functional.normalize(some, dim=-1).sum(0)
    return total / len(words), float((units / len(words)).square().sum())


def _toward(tokens: Tensor, centered: bool) -> Tensor:
    """Unit vectors; a token that equals the mean points nowhere and stays zero."""
    moved = tokens - tokens.mean(0) if centered else tokens
    size = moved.norm(dim=-1, keepdim=True)
    return torch.where(size > ROUNDING * tokens.norm(dim=-1, keepdim=True), moved / size, torch.zeros_like(moved))


def _nearest(tokens: Tensor, rows: Tensor, words: Tensor, mean: Tensor, top: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, cosines), (P, top) each, nearest first; `COLUMNS` words at a time."""
    best, ids = tokens.new_full((len(tokens), 0), 0), torch.zeros((len(tokens), 0), dtype=torch.long, device=tokens.device)
    for part in words.to(rows.device).split(COLUMNS):
        cosines = tokens @ nn.functional.normalize(rows[part].float() - mean, dim=-1).T
        values, columns = cosines.topk(min(top, len(part)), 1)
        best, order = torch.cat([best, values], 1).topk(min(top, best.shape[1] + values.shape[1]), 1)
        ids = torch.cat([ids, part[columns]], 1).gather(1, order)
    return ids.int().cpu().numpy(), best.clamp(-1, 1).cpu().numpy()


def _whole_word(text: str, piece: Any) -> bool:
    """Whether a token begins a word and is long enough to be one."""
    letters = text.strip()
    return str(piece).startswith(WORD_START) and letters.isalpha() and len(letters) >= SHORTEST_WORD


def _note(space: str, centered: bool) -> str:
    matrix = "input embeddings" if space == "input" else "rows of the output head"
    how = "each less the mean of its own kind" if centered else "as they are; raw cosine is dominated by a common direction"
    return (
        f"Cosine of projected image tokens with the {matrix}, {how}. Readable means: the nearest token begins a word and has "
        f"{SHORTEST_WORD} letters or more; the control is each image token with its entries in random order."
    )
