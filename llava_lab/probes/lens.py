"""Lenses: what every image token would say at every layer, if the model stopped there.

State 0 is what the connector gives, state l the stream after l layers. Every state goes through the final norm
exactly once, the last one too, because all are taken before it (transformers' ``hidden_states[-1]`` is already
normed; norming it again is the usual mistake). Norm statistics are each state's own. Only the top words are kept.

With a `TunedLens` each state first goes through its own trained affine, ``state + state A + b`` with A and b zero at first
(which is the plain lens), trained on image tokens with Adam to lessen the Kullback-Leibler divergence from the final
distribution. It reads what the plain lens cannot, in another basis; it may also learn what the model only works out later,
so compare on pictures it was not trained on. A `JacobianLens` (`llava_lab.probes.jacobian`) carries each state
to the end by the mean derivative instead. No lens says that the model uses what it reads.

`naming_share` counts how often image tokens name what they show. A patch counts when one thing covers most of it
(`patch_labels`); at every state its top words are looked up among the ways to spell the thing's kind and colour. Two controls
stand beside it: patches that no thing touches, tried with the words of a random thing of the same picture, and the same
object patches tried with the words of a thing in the next picture. Beside it stands the choice: whether of all kinds (of all
colours) the likeliest is the thing's own, and how far the confidence in it is from how often it is right.

    lens = logit_lens(lab, run, words="red")
    lens.rank_of("red")[-1]

Sources: nostalgebraist 2020 (logit lens); Belrose et al. 2023 (arXiv 2303.08112, tuned lens, section 2; there SGD with
momentum on text); Jiang et al. 2025 (arXiv 2410.02762) for reading image tokens' confidence in a word; Neo et al. 2025 (arXiv
2410.07149) read visual tokens with the logit lens and count those that name their object; the controls and intervals of
that count are ours.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor
from tqdm.auto import tqdm

from llava_lab.capture import undisturbed
from llava_lab.capture.residual import watch_stream
from llava_lab.checks import PATIENCE, Sweep, entry, made_by, number, one_of, whole_number
from llava_lab.errors import DataError, OptionError
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers
from llava_lab.models.text import pieces
from llava_lab.probes.jacobian import JacobianLens, check_lens, fit_jacobian
from llava_lab.probes.linear import LEFT_OUT, QUESTION, patch_labels, read_stages, subset
from llava_lab.replay.words import Reading, final_norm, output_head, read_words, state_window, token_texts, word_tokens
from llava_lab.results import HallucinationCheck, LogitLens, NamingShare, Run, Saved, WordActivation
from llava_lab.stats import RESAMPLES, calibration, cluster_bootstrap, percentiles, roc_auc
from llava_lab.worlds.photo_names import accepted, read_outlined
from llava_lab.worlds.picturebook import ask_about, scene
from llava_lab.worlds.scenes import COLOR_NAMES, KIND_NAMES

BATCH = 256  # tokens a step of training
ASKED = "What do you see?"  # of each scene whose tokens are tried with names
FEW = 3  # notes of split names that are told one by one
MOST = 0.5  # share of a patch that a thing must cover to be what it shows


@dataclass(frozen=True)
class TunedLens(Saved):
    """One affine per state below the last; the last state is read as it is."""

    KIND: ClassVar[str] = "tuned lens"

    weights: Float32[np.ndarray, "layers width width"]
    biases: Float32[np.ndarray, "layers width"]
    before: Float32[np.ndarray, " layers"]  # divergence of the plain lens on the training tokens, nats
    after: Float32[np.ndarray, " layers"]  # the same when trained
    model: str
    fingerprint: str

    def translate(self, number: int, states: Tensor) -> Tensor:
        """States (P, W) as the last layer would leave them, in their own dtype; the last state is given back."""
        if number >= len(self.weights):
            return states
        weight, bias = (torch.from_numpy(part[number]).to(states.device) for part in (self.weights, self.biases))
        state = states.float()
        return (state + state @ weight + bias).to(states.dtype)


@entry
def logit_lens(
    lab: Lab,
    run: Run,
    *,
    layers: Any = None,
    top: int = 5,
    words: str | Sequence[str] = (),
    fitted: TunedLens | JacobianLens | None = None,
) -> LogitLens:
    """The top words of every image patch at every state, with entropy, and the rank of chosen `words`.

    `fitted`: a lens that carries each state to the last layer first, from `train_lens` (tuned) or `fit_jacobian`; None reads
    it as it is. `layers`: None all states 0 .. L, a whole number that state alone, (start, stop) a window. A word of several
    tokens is read as its first with a letter; the notes say which. One forward, and the output head at each patch and state; at
    7B width its memory stays below the forward's own peak (``llava-lab bench probes``).

    Raises OptionError (a state out of range or not fitted, `top` below 1 or above the vocabulary), CheckpointError
    (another model's run or lens), LabError (a quantised output head).

    >>> lens = ll.logit_lens(lab, run, words="red")
    >>> lens.top_ids.shape, lens.rank_of("red").shape
    ((7, 144, 5), (7, 12, 12))
    """
    begin = time.perf_counter()
    vocabulary = len(output_head(lab).weight)
    if whole_number("top", top, least=1) > vocabulary:
        raise OptionError(f"top must be at most the vocabulary's {vocabulary}, got {top}")
    names, ids, notes = word_tokens(lab, words)
    states, read = _read(lab, run, layers, top, ids, fitted)
    top_ids = np.stack([state.top_ids for state in read])
    piece_ids, texts = token_texts(lab, top_ids)
    return LogitLens(
        states=states,
        top_ids=top_ids,
        top_probs=np.stack([state.top_probs for state in read]),
        entropy=np.stack([state.entropy for state in read]),
        words=names,
        word_ids=ids,
        ranks=np.stack([state.ranks for state in read]),
        probs=np.stack([state.probs for state in read]),
        piece_ids=piece_ids,
        pieces=texts,
        vocabulary=vocabulary,
        map=run.map,
        **made_by(run, begin),
        lens=_lens_name(fitted),
        notes=(_note(states, fitted), *notes),
        read_as=tuple(pieces(lab.tokenizer, np.array(ids, np.int64))),
    )


@entry
def activation_map(
    lab: Lab, run: Run, word: str | Sequence[str], *, layers: Any = None, fitted: TunedLens | JacobianLens | None = None
) -> WordActivation:
    """How probable a word (or each of several) is at every patch and state; options and errors as `logit_lens`.

    Its `confidence` is the maximum over patches and states. vl-interp's internal confidence is such a maximum too, but
    takes states without the final norm and the most probable of a word's tokens; here each state is normed once and a
    word of several tokens is read as its first, so the numbers are not those of that program.

    >>> ll.activation_map(lab, run, "red").values.shape
    (1, 7, 12, 12)
    """
    begin = time.perf_counter()
    names, ids, notes = word_tokens(lab, word)
    if not names:
        raise OptionError("expected at least one word to look for, got none")
    states, read = _read(lab, run, layers, 1, ids, fitted)
    values = np.stack([state.probs for state in read]).transpose(2, 0, 1)
    return WordActivation(
        values=np.ascontiguousarray(values).reshape(len(ids), len(states), run.map.rows, run.map.cols),
        words=names,
        word_ids=ids,
        states=states,
        map=run.map,
        **made_by(run, begin),
        notes=(_note(states, fitted), *notes),
    )


@entry
def hallucination_check(
    lab: Lab,
    runs: Sequence[Run],
    present: Sequence[Sequence[str]],
    absent: Sequence[Sequence[str]],
    *,
    layers: Any = None,
    fitted: TunedLens | JacobianLens | None = None,
    seed: int = 0,
    progress: bool = True,
) -> HallucinationCheck:
    """Whether words for what each picture shows are more confident than words for what it does not.

    `present` and `absent`: words for each run. The score is the chance that a present word beats an absent one
    (area under the ROC curve), its interval by resampling pictures. Ctrl-C gives the pictures done so far.
    Raises OptionError when the lists do not match the runs or one kind of word is missing altogether.

    >>> check = ll.hallucination_check(lab, [run], [["red"]], [["green"]], progress=False)
    >>> check.words, check.auc
    (('red', 'green'), 1.0)
    """
    if not len(runs) == len(present) == len(absent):
        raise OptionError(f"expected words for {len(runs)} runs, got {len(present)} lists of present and {len(absent)} of absent")
    if not any(map(len, present)) or not any(map(len, absent)):
        raise OptionError("expected at least one present and one absent word, got none of one kind")
    rows: list[tuple[str, int, bool, float]] = []  # word, number of its picture, whether it is there, confidence
    notes: dict[str, None] = {}
    with Sweep("confidence", total=len(runs), unit="picture", show=progress) as sweep:
        for picture, run in enumerate(runs):
            asked = [*present[picture], *absent[picture]]
            if asked:
                activation = activation_map(lab, run, asked, layers=layers, fitted=fitted)
                notes |= dict.fromkeys(activation.notes)
                there = [True] * len(present[picture]) + [False] * len(absent[picture])
                rows += zip(asked, [picture] * len(asked), there, activation.confidence.tolist(), strict=True)
            sweep.step()
    if sweep.interrupted and len({row[2] for row in rows}) < 2:
        raise KeyboardInterrupt
    words, *columns = zip(*rows, strict=True)
    where, is_there, sure = (np.array(column, kind) for column, kind in zip(columns, (np.int32, bool, np.float32), strict=True))
    auc, low, high = _separation(where, is_there, sure, seed)
    about = (tuple(words), where, is_there, sure, auc, low, high)
    return HallucinationCheck(*about, lab.name, lab.fingerprint, sweep.interrupted, tuple(notes))


def _separation(where: np.ndarray, there: np.ndarray, sure: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Area under the ROC curve, and its interval over resamples of pictures that hold words of both kinds."""
    pictures, picture = np.unique(where, return_inverse=True)
    present, absent = sure[there][:, None], sure[~there]
    wins = (present > absent) + 0.5 * (present == absent)

    def areas(weights: np.ndarray) -> np.ndarray:
        yes, no = weights[:, picture[there]], weights[:, picture[~there]]
        pairs = yes.sum(1) * no.sum(1)
        return ((yes @ wins) * no).sum(1)[pairs > 0] / pairs[pairs > 0]

    draws = cluster_bootstrap(areas, len(pictures), seed=seed, resamples=RESAMPLES // 4, one_by_one=True)
    low, high = percentiles(draws) if len(draws) else (0.0, 1.0)
    return roc_auc(sure, there), float(low), float(high)


def _read(
    lab: Lab,
    run: Run,
    layers: Any,
    top: int,
    ids: Sequence[int],
    fitted: TunedLens | JacobianLens | None,
    *,
    ranked: bool = True,
) -> tuple[tuple[int, ...], list[Reading]]:
    """One forward; each state of the window is read inside it, so that no two states are held at once."""
    stack = language_layers(lab.model)
    start, stop = state_window(layers, len(stack))
    check_lens(lab, fitted)
    image, norm = slice(*run.segments["image"]), final_norm(lab)
    readings: list[Reading] = []

    def fold(number: int, state: Tensor) -> None:
        if start <= number < stop:
            rows = state[0, image] if fitted is None else fitted.translate(number, state[0, image])
            readings.append(read_words(lab, norm(rows), top=top, ids=ids, ranked=ranked))

    with undisturbed(lab.model), watch_stream(stack, fold):
        lab.model(**lab.inputs(run), use_cache=False, logits_to_keep=1)
    return tuple(range(start, stop)), readings


def _lens_name(fitted: TunedLens | JacobianLens | None) -> str:
    return "logit" if fitted is None else "jacobian" if isinstance(fitted, JacobianLens) else "tuned"


def _note(states: tuple[int, ...], fitted: TunedLens | JacobianLens | None) -> str:
    places = f"states {states[0]} to {states[-1]}" if len(states) > 1 else f"state {states[0]}"
    how = {
        "logit": "each state normed once",
        "tuned": "each state put through its own trained affine, then normed once",
        "jacobian": "each state carried to the end by the mean derivative, then normed once",
    }[_lens_name(fitted)]
    return f"Image tokens at {places} read with the output head, {how}, with its own norm statistics."


# -- training a lens --------------------------------------------------------------------------


@entry
def train_lens(
    lab: Lab,
    pictures: Sequence[Any],
    *,
    question: str = QUESTION,
    steps: int = 200,
    rate: float = 1e-3,
    per_picture: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> TunedLens:
    """Train a lens on image tokens of `pictures` asked `question`; the model is not changed.

    Holds ``pictures x per_picture`` tokens of every state in memory. Ctrl-C raises, nothing half-trained comes back.
    Raises OptionError for no pictures, a negative rate or fewer than one step.

    >>> tuned = ll.train_lens(lab, [picture], steps=2, per_picture=16, progress=False)
    >>> ll.logit_lens(lab, run, fitted=tuned).lens
    'tuned'
    """
    whole_number("steps", steps, least=1)
    number("rate", rate)
    if not len(pictures):
        raise OptionError("expected pictures to train a lens on, got none")
    count, rng = len(language_layers(lab.model)), np.random.default_rng(seed)
    rows: list[list[np.ndarray]] = [[] for _ in range(count + 1)]
    for picture in tqdm(pictures, desc="tokens", unit="picture", delay=PATIENCE, disable=not progress):
        stages = read_stages(lab, picture, tuple(range(count + 1)), question=question)
        chosen = subset(rng, len(stages[0]), per_picture)
        for state in range(count + 1):
            rows[state].append(stages[state][chosen])
    tokens = [torch.from_numpy(np.concatenate(of_state)).to(lab.device) for of_state in rows]
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(range(count), desc="lens", unit="state", delay=PATIENCE, disable=not progress)
    trained = [_train_state(lab, tokens[state], tokens[-1], steps, rate, generator) for state in bar]
    weights, biases, before, after = zip(*trained, strict=True)
    gaps = (np.array(before, np.float32), np.array(after, np.float32))
    return TunedLens(np.stack(weights), np.stack(biases), gaps[0], gaps[1], lab.name, lab.fingerprint)


def _train_state(
    lab: Lab, states: Tensor, last: Tensor, steps: int, rate: float, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Weight and bias for one state, and the divergence before and after."""
    width = states.shape[1]
    weight = torch.zeros(width, width, device=states.device, requires_grad=True)
    bias = torch.zeros(width, device=states.device, requires_grad=True)
    optimiser = torch.optim.Adam([weight, bias], lr=rate)

    def loss(rows: Tensor) -> Tensor:
        read = _log_probs(lab, states[rows] + states[rows] @ weight + bias)
        with torch.no_grad():
            goal = _log_probs(lab, last[rows])
        return (goal.exp() * (goal - read)).sum(-1).mean()

    def mean_loss() -> float:
        with torch.no_grad():
            parts = torch.arange(len(states), device=states.device).split(BATCH)
            return sum(float(loss(rows)) * len(rows) for rows in parts) / len(states)

    before = mean_loss()
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(states), (min(BATCH, len(states)),), generator=generator).to(states.device)
            # not `backward`, so that the model's own grads stay None
            weight.grad, bias.grad = torch.autograd.grad(loss(rows), (weight, bias))
            optimiser.step()
    return weight.detach().cpu().numpy(), bias.detach().cpu().numpy(), before, mean_loss()


def _log_probs(lab: Lab, states: Tensor) -> Tensor:
    head = output_head(lab)
    normed = final_norm(lab)(states.to(head.weight.dtype))
    return head(normed).float().log_softmax(-1)


LENS_PROMPTS = {"tuned": 40, "jacobian": 8}  # pictures a lens is fitted on where nothing else is said


def lens_by_name(
    lab: Lab,
    name: str,
    *,
    prompts: int | None = None,
    targets: str = "text",
    pictures: str | os.PathLike | None = None,
    after: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> TunedLens | JacobianLens | None:
    """A lens of that name ("logit": none), fitted on pictures that no test shows.

    These are of the picture book's training split, every other one described and the rest asked one question, or with
    `pictures` the photographs of that folder behind the first `after`. Raises DataError where there are too few.
    """
    one_of("lens", name, ("logit", *LENS_PROMPTS))
    if name == "logit":
        return None
    count = whole_number("prompts", LENS_PROMPTS[name] if prompts is None else prompts, least=1)
    if pictures is None:
        scenes = [scene("train", i, seed=seed) for i in range(count)]
        asked = [ask_about(drawn, np.random.default_rng((seed, 7, i)), 1)[0].text for i, drawn in enumerate(scenes)]
        asked[::2] = [ASKED] * len(asked[::2])
        shown: list[Any] = [drawn.picture() for drawn in scenes]
    else:
        shown = [photo.picture() for photo in read_outlined(Path(pictures))[after : after + count]]
        asked = [ASKED] * count
        if len(shown) < count:
            raise DataError(f"{pictures} has {len(shown)} photographs behind the first {after}; a lens on {count} needs more")
    if name == "tuned":
        return train_lens(lab, shown, question=ASKED, seed=seed, progress=progress)
    return fit_jacobian(lab, lab.ask_many(shown, asked, progress=progress), targets=targets, progress=progress)


# -- how often tokens name what they show --------------------------------------------------------


@entry
def naming_share(
    lab: Lab,
    *,
    n: int = 60,
    split: str = "test",
    pictures: str | os.PathLike | None = None,
    top: int = 5,
    question: str = ASKED,
    fitted: TunedLens | JacobianLens | None = None,
    seed: int = 0,
    progress: bool = True,
) -> NamingShare:
    """Shares by state over the first `n` scenes of a split, with intervals that resample pictures, and the choice among names.

    `fitted`: a lens to read through, as in `logit_lens`; fit it on other pictures.

    With `pictures`, a folder of photographs with outlines (`worlds.photo_names.read_outlined`), the scenes are its photographs: a
    token names its thing by any accepted word, and nothing is counted for colours. What no outline covers may still be a thing.

    One answer and one forward a picture. A word of several tokens counts by its first (the notes list them).
    Raises OptionError for `n` below 2 (the shuffled control needs another picture) or `top` below 1, DataError for a split or a
    folder without outlines.

    >>> ll.naming_share(lab, n=2, progress=False).of("object").shape
    (7,)
    """
    begin = time.perf_counter()
    whole_number("n", n, least=2)
    whole_number("top", top, least=1)
    shown, names, notes = _drawn(lab, n, split, seed) if pictures is None else _photographed(lab, n, Path(pictures))
    n, split = len(shown), split if pictures is None else Path(pictures).name
    rng = np.random.default_rng((seed, n))
    hits, counts, chosen = [], [], []
    states: tuple[int, ...] = ()
    ids = sorted({int(token) for spelt in names.values() for tokens in spelt for token in tokens})
    for i, subject in enumerate(tqdm(shown, desc="naming", unit="picture", delay=PATIENCE, disable=not progress)):
        run = lab.ask(subject.picture(), question, max_new_tokens=1)
        states, read = _read(lab, run, None, top, ids, fitted, ranked=False)
        top_ids, probs = np.stack([each.top_ids for each in read]), np.stack([each.probs for each in read])
        there, blank = np.flatnonzero(subject.labels[0] >= 0), np.flatnonzero(subject.empty)
        groups = (
            (there, subject.labels[:, there]),
            (blank, subject.some(len(blank), rng)),
            (there, shown[(i + 1) % n].some(len(there), rng)),
        )
        hits.append(np.stack([_named(top_ids[:, where], names, labels) for where, labels in groups]))
        chosen.append([_chosen(probs[:, where], ids, names, labels) for where, labels in groups])
        counts.append([len(where) for where, _ in groups])
    share, interval = _shares(np.stack(hits).astype(float), np.array(counts, float), seed)
    choice, error = _choices([np.concatenate(of_group, 2) for of_group in zip(*chosen, strict=True)])
    return NamingShare(
        states=states,
        share=share,
        interval=interval,
        choice=choice,
        calibration_error=error,
        patches=tuple(int(x) for x in np.sum(counts, 0)),
        top=top,
        split=split,
        pictures=n,
        **made_by(lab, begin),
        lens=_lens_name(fitted),
        notes=notes,
    )


Names = dict[str, list[np.ndarray]]  # "kind" and "color" -> for each label the tokens that name it


@dataclass(frozen=True)
class _Shown:
    """A picture and what its patches show: labels are places in `Names`, of kind and colour."""

    picture: Callable[[], Any]
    labels: np.ndarray  # int (2, P), -1 where no thing covers most of a patch
    empty: np.ndarray  # bool (P,), where no thing is
    things: np.ndarray  # int (2, things)

    def some(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Labels of so many things of the picture, drawn at random: int (2, count)."""
        return self.things[:, rng.integers(self.things.shape[1], size=count)]


def _drawn(lab: Lab, n: int, split: str, seed: int) -> tuple[list[_Shown], Names, tuple[str, ...]]:
    scenes = [scene(split, i, seed=seed) for i in range(n)]
    labels = np.stack([patch_labels(lab, scenes, what).reshape(n, -1) for what in ("kind", "color")], 1)
    empty = patch_labels(lab, scenes, "object").reshape(n, -1) == 0
    kind, kind_notes = _spellings(lab, [[name] for name in KIND_NAMES])
    color, color_notes = _spellings(lab, [[name] for name in COLOR_NAMES])
    shown = []
    for drawn, label, bare in zip(scenes, labels, empty, strict=True):
        things = [(KIND_NAMES.index(thing.kind), COLOR_NAMES.index(thing.color)) for thing in drawn.things]
        shown.append(_Shown(drawn.picture, label, bare, np.array(things).T))
    return shown, {"kind": kind, "color": color}, tuple(dict.fromkeys(kind_notes + color_notes))


def _photographed(lab: Lab, n: int, folder: Path) -> tuple[list[_Shown], Names, tuple[str, ...]]:
    photographs = read_outlined(folder)[:n]
    if len(photographs) < 2:
        raise DataError(f"{folder} has one photograph with outlines; the shuffled control needs another")
    classes = sorted({name for photo in photographs for name in photo.names})
    shown = []
    for photo in photographs:
        masks = photo.masks()
        way = lab.preprocessing.map(masks.shape[2], masks.shape[1])
        covered = np.stack([way.mask_to_patches(mask).ravel() for mask in masks])
        labels = np.full((2, covered.shape[1]), LEFT_OUT)
        for name, share in zip(photo.names, covered, strict=True):
            labels[:, share > MOST] = [[classes.index(name)], [0]]
        empty = (way.coverage().ravel() > MOST) & (covered.max(0) == 0)
        things = [(classes.index(name), 0) for name in dict.fromkeys(photo.names)]
        shown.append(_Shown(photo.picture, labels, empty, np.array(things).T))
    kind, notes = _spellings(lab, [accepted(name) for name in classes])
    return shown, {"kind": kind, "color": [np.array([], int)]}, notes


def _spellings(lab: Lab, things: Sequence[Sequence[str]]) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """For every thing the first tokens of its words: in a sentence, at its start, with a capital; and notes.

    The first token of several words does not name a thing, so such names are left out where there is another.
    """
    spellings, notes = [], dict[str, str]()
    for words in things:
        ids = set()
        for word in [word for word in words if " " not in word] or words[:1]:
            _, (inside,), about = word_tokens(lab, word)
            if about:
                notes[word] = about[0]
            ids.add(inside)
            for spelt in (word, word.capitalize(), f" {word.capitalize()}"):
                alone = lab.tokenizer.encode(spelt, add_special_tokens=False)
                if len(alone) == 1 and alone[0] != lab.tokenizer.unk_token_id:
                    ids.add(alone[0])
        spellings.append(np.array(sorted(ids)))
    if len(notes) > FEW:
        return spellings, (f"{len(notes)} names of several tokens are read as their first alone: {', '.join(notes)}.",)
    return spellings, tuple(notes.values())


def _named(top_ids: np.ndarray, names: Names, labels: np.ndarray) -> np.ndarray:
    """(S, P, top) tokens, labels (2, P) -> patches that name their kind, their colour, either: int (3, S)."""
    hit = np.zeros((2, *top_ids.shape[:2]), bool)
    for row, what in enumerate(("kind", "color")):
        for patch, label in enumerate(labels[row]):
            hit[row, :, patch] = np.isin(top_ids[:, patch], names[what][int(label)]).any(-1)
    return np.stack([*hit, hit.any(0)]).sum(-1)


def _chosen(probs: np.ndarray, ids: Sequence[int], names: Names, labels: np.ndarray) -> np.ndarray:
    """The likeliest kind and colour of all at each patch: (kind and color, S, P, confidence and whether right).

    NaN where there are not two names to choose from.
    `probs` (S, P, ids) are those of every token that names something; a thing's are added, and divided by all things'.
    """
    told = np.full((2, *probs.shape[:2], 2), np.nan)
    for row, what in enumerate(("kind", "color")):
        if len(names[what]) > 1:
            each = np.stack([probs[..., np.isin(ids, tokens)].sum(-1, dtype=float) for tokens in names[what]], -1)
            told[row, ..., 0] = each.max(-1) / np.maximum(each.sum(-1), 1e-300)
            told[row, ..., 1] = each.argmax(-1) == labels[row]
    return told


def _choices(told: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(2, S, P, 2) of each group -> share right (groups, 2, S), and the calibration error of the first group (2, S)."""
    share = np.stack([group[..., 1].mean(-1) if group.shape[2] else np.full(group.shape[:2], np.nan) for group in told])
    error = [[np.nan if np.isnan(at).any() else calibration(at[:, 0], at[:, 1] > 0)["error"] for at in what] for what in told[0]]
    return share.astype(np.float32), np.array(error, np.float32)


def _shares(hits: np.ndarray, counts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(pictures, groups, 3, S) hits and (pictures, groups) patches -> pooled shares (groups, 3, S) and their intervals."""

    def shares(weights: np.ndarray) -> np.ndarray:
        return np.einsum("rn,ngws->rgws", weights, hits) / np.maximum(weights @ counts, 1)[:, :, None, None]

    draws = cluster_bootstrap(shares, len(hits), seed=seed, resamples=RESAMPLES // 4, one_by_one=True)
    return shares(np.ones((1, len(hits))))[0].astype(np.float32), percentiles(draws).astype(np.float32)
