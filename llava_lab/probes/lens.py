"""Logit lens: what every image token would say at every layer, if the model stopped there.

State 0 is what the projector gives, state l the stream after l layers. Every state goes through the final norm
exactly once, the last one too, because all are taken before it (transformers' ``hidden_states[-1]`` is already
normed; norming it again is the usual mistake). Norm statistics are each state's own. Only the top words are kept.

With a `TunedLens` each state first goes through its own trained affine. Neither says that the model uses what it reads.

Sources: nostalgebraist 2020 (logit lens); Belrose et al. 2023 (arXiv 2303.08112, tuned lens); Jiang et al. 2025
(arXiv 2410.02762) for internal confidence on image tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from tqdm.std import tqdm

from llava_lab.attribution.base import whole_number
from llava_lab.attribution.unembed import final_norm, output_head
from llava_lab.capture import undisturbed
from llava_lab.capture.values import watch_stream
from llava_lab.errors import CheckpointError, OptionError
from llava_lab.models.layout import language_layers
from llava_lab.probes.tuned import TunedLens
from llava_lab.probes.vocabulary import Reading, read_words, state_window, token_texts, word_tokens
from llava_lab.results import Run
from llava_lab.results_probes import LEVEL, RESAMPLES, HallucinationCheck, LogitLens, WordActivation

if TYPE_CHECKING:
    from llava_lab.models import Lab


def logit_lens(
    lab: Lab,
    run: Run,
    *,
    layers: Any = None,
    top: int = 5,
    words: str | Sequence[str] = (),
    tuned: TunedLens | None = None,
) -> LogitLens:
    """The top words of every image patch at every state, with entropy, and the rank of chosen `words`.

    `layers`: None all states 0 .. L, a whole number that state alone, (start, stop) a window. A word of several
    tokens is read as its first; the notes say which. One forward, and the output head at each patch and state; at 7B
    width its memory stays below the forward's own peak (``llava-lab bench probes``).

    Raises OptionError (a state out of range, `top` below 1 or above the vocabulary), CheckpointError (another
    model's run or tuned lens), LabError (a quantised output head).
    """
    begin = time.perf_counter()
    vocabulary = len(output_head(lab).weight)
    if whole_number("top", top, least=1) > vocabulary:
        raise OptionError(f"top must be at most the vocabulary's {vocabulary}, got {top}")
    names, ids, notes = word_tokens(lab, words)
    states, read = _read(lab, run, layers, top, ids, tuned)
    top_ids = np.stack([one.top_ids for one in read])
    piece_ids, pieces = token_texts(lab, top_ids)
    return LogitLens(
        states=states,
        top_ids=top_ids,
        top_probs=np.stack([one.top_probs for one in read]),
        entropy=np.stack([one.entropy for one in read]),
        words=names,
        word_ids=ids,
        ranks=np.stack([one.ranks for one in read]),
        probs=np.stack([one.probs for one in read]),
        piece_ids=piece_ids,
        pieces=pieces,
        vocabulary=vocabulary,
        map=run.map,
        model=run.model,
        fingerprint=run.fingerprint,
        seconds=time.perf_counter() - begin,
        tuned=tuned is not None,
        notes=(_note(states, tuned), *notes),
    )


def activation_map(
    lab: Lab, run: Run, word: str | Sequence[str], *, layers: Any = None, tuned: TunedLens | None = None
) -> WordActivation:
    """How probable a word (or each of several) is at every patch and state; options and errors as `logit_lens`.

    Its `confidence`, the maximum over patches and states, is what vl-interp calls internal confidence.
    """
    begin = time.perf_counter()
    names, ids, notes = word_tokens(lab, word)
    if not names:
        raise OptionError("expected at least one word to look for, got none")
    states, read = _read(lab, run, layers, 1, ids, tuned)
    values = np.stack([one.probs for one in read]).transpose(2, 0, 1)
    return WordActivation(
        values=np.ascontiguousarray(values).reshape(len(ids), len(states), run.map.rows, run.map.cols),
        words=names,
        word_ids=ids,
        states=states,
        map=run.map,
        model=run.model,
        fingerprint=run.fingerprint,
        seconds=time.perf_counter() - begin,
        notes=(_note(states, tuned), *notes),
    )


def hallucination_check(
    lab: Lab,
    runs: Sequence[Run],
    present: Sequence[Sequence[str]],
    absent: Sequence[Sequence[str]],
    *,
    layers: Any = None,
    tuned: TunedLens | None = None,
    seed: int = 0,
    progress: bool = True,
) -> HallucinationCheck:
    """Whether words for what each picture shows are more confident than words for what it does not.

    `present` and `absent`: words for each run. The score is the chance that a present word beats an absent one
    (area under the ROC curve), its interval by resampling pictures. Ctrl-C gives the pictures done so far.
    Raises OptionError when the lists do not match the runs or one kind of word is missing altogether.
    """
    if not len(runs) == len(present) == len(absent):
        raise OptionError(f"expected words for {len(runs)} runs, got {len(present)} lists of present and {len(absent)} of absent")
    if not any(map(len, present)) or not any(map(len, absent)):
        raise OptionError("expected at least one present and one absent word, got none of one kind")
    rows: list[tuple[str, int, bool, float]] = []
    notes: dict[str, None] = {}
    interrupted = False
    try:
        for number, run in enumerate(tqdm(runs, desc="confidence", unit="picture", disable=not progress)):
            asked = [*present[number], *absent[number]]
            if asked:
                found = activation_map(lab, run, asked, layers=layers, tuned=tuned)
                notes |= dict.fromkeys(found.notes)
                there = [True] * len(present[number]) + [False] * len(absent[number])
                rows += zip(asked, [number] * len(asked), there, found.confidence.tolist(), strict=True)
    except KeyboardInterrupt:
        interrupted = True
        if len({row[2] for row in rows}) < 2:
            raise
    words, *columns = zip(*rows, strict=True)
    where, is_there, sure = (np.array(one, kind) for one, kind in zip(columns, (np.int32, bool, np.float32), strict=True))
    auc, low, high = _separation(where, is_there, sure, seed)
    about = (tuple(words), where, is_there, sure, auc, low, high)
    return HallucinationCheck(*about, lab.name, lab.fingerprint, interrupted, tuple(notes))


def auc(present: np.ndarray, absent: np.ndarray) -> float:
    """Chance that a value of `present` exceeds one of `absent`, ties counted half."""
    difference = present[:, None] - absent[None]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def _separation(where: np.ndarray, there: np.ndarray, sure: np.ndarray, seed: int) -> tuple[float, float, float]:
    rng, names = np.random.default_rng(seed), np.unique(where)
    groups = [np.flatnonzero(where == name) for name in names]
    draws = []
    for _ in range(RESAMPLES // 4):
        rows = np.concatenate([groups[i] for i in rng.integers(0, len(groups), len(groups))])
        if 0 < there[rows].sum() < len(rows):
            draws.append(auc(sure[rows][there[rows]], sure[rows][~there[rows]]))
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if draws else (0.0, 1.0)
    return auc(sure[there], sure[~there]), float(low), float(high)


def _read(
    lab: Lab, run: Run, layers: Any, top: int, ids: Sequence[int], tuned: TunedLens | None
) -> tuple[tuple[int, ...], list[Reading]]:
    """One forward; each state of the window is read inside it, so that no two states are held at once."""
    stack = language_layers(lab.model)
    start, stop = state_window(layers, len(stack))
    if tuned is not None and tuned.fingerprint != lab.fingerprint:
        raise CheckpointError(f"this tuned lens was trained for {tuned.model!r} with other weights; train it with `train_lens`")
    image, norm = slice(*run.segments["image"]), final_norm(lab)
    found: list[Reading] = []

    def fold(number: int, state: Tensor) -> None:
        if start <= number < stop:
            rows = state[0, image] if tuned is None else tuned.translate(number, state[0, image])
            found.append(read_words(lab, norm(rows), top=top, ids=ids))

    with undisturbed(lab.model), watch_stream(stack, fold):
        lab.model(**lab.inputs(run), use_cache=False, logits_to_keep=1)
    return tuple(range(start, stop)), found


def _note(states: tuple[int, ...], tuned: TunedLens | None) -> str:
    places = f"states {states[0]} to {states[-1]}" if len(states) > 1 else f"state {states[0]}"
    how = "each state put through its own trained affine, then normed once" if tuned else "each state normed once"
    return f"Image tokens at {places} read with the output head, {how}, with its own norm statistics."
