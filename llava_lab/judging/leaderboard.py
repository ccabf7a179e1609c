"""Every method on many pictures whose truth is known: is it faithful, does it find the thing, what does it cost?

The pictures are the picture book's, or photographs with outlines (`worlds.photo_names`). One question is asked about each, its
type in turn, and one the model answers right: the map of a wrong answer has no right place to be. What is explained is the word
that answers ("red", "Yes", "top left", "dog"), since function words need no picture; a question that the model answers without
the picture too (filling all of it hardly lowers the probability) is passed over, for there is nothing to explain.

Each finished picture is one JSON line in `out`; asking again with the same settings goes on where the file
ends. Pictures can be shared between processes (`spread`), since a small model's passes are too short to share between
threads; each process has a model of its own, and an interrupt loses only pictures under way.

The table (`tabulate`) has means and percentile bootstraps that resample pictures, the same resamples for every method,
so that methods are compared on equal terms. The difference from random is paired: taken picture by picture, from what
random maps score on that very picture. Faithfulness and ground truth stay in columns of their own.

What ships already computed opens in a moment: the leaderboard beside a model, for its own weights and no others, and
the comparison of connectors.

    board = leaderboard(load("tiny"), n=20, methods=["rollout", "random"], out="board.jsonl")
    board.at("rollout", "gain")
"""

from __future__ import annotations

import importlib
import itertools
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
import transformers

from llava_lab.attribution.registry import METHODS
from llava_lab.checks import Sweep, entry, whole_number
from llava_lab.errors import DataError, LabError, OptionError
from llava_lab.judging.compare import Options, chosen_methods, compare
from llava_lab.judging.faithfulness import BATCH, FEWEST_FILLS, SCALES, Judge, allowed_fills
from llava_lab.models import Lab
from llava_lab.models.folders import ABLATE, SHIP
from llava_lab.models.layout import connector_of, replace_connector
from llava_lab.results import Ablation, Comparison, Faithfulness, Leaderboard, Run, Target, area, mean_of_known, only_writer
from llava_lab.results.scores import COST, DIGITS, FAITHFUL, TRUE
from llava_lab.shipped import ABLATION, MODELS, PHOTO_COMPARISON
from llava_lab.stats import cluster_bootstrap, exact_match, percentiles, wilson
from llava_lab.worlds import picturebook
from llava_lab.worlds.photo_names import Outlined, accepted, read_outlined, with_article

MEASURES = (*FAITHFUL, *TRUE, *COST)
SHARES = ("better", "object", "pointing")  # yes or no on each picture
ASKED = ("asked", "wrong", "blind")  # questions: all, answered wrong, answered right without the picture

STEPS = 5  # of a curve
SEEDS = 4  # random rankings per picture, each also read backwards; the intervals come from the pictures
ATTEMPTS = 6  # questions tried on one picture until one is answered right, from the picture
LONGEST = 48  # tokens an answer may take
FORMAT = 1  # of the lines
FILE = "leaderboard.npz"
COMPARISON = ABLATION / "ablation.npz"
COMMAND = "llava-lab compare --model {name} --data picturebook --n 200 --methods all --save leaderboard.npz"

Record = Mapping[str, Any]
Kept = TypeVar("Kept")


@entry
def leaderboard(
    lab: Lab,
    *,
    data: str = "picturebook",
    pictures: str | os.PathLike | None = None,
    split: str = "test",
    n: int = 200,
    methods: str | Sequence[str] = "all",
    options: Options | None = None,
    seed: int = 0,
    steps: int = STEPS,
    seeds: int = SEEDS,
    scale: str = SCALES[0],
    batch: int = BATCH,
    out: str | os.PathLike | None = None,
    workers: int = 1,
    progress: bool = True,
) -> Leaderboard:
    """Score `methods` on `n` pictures. Ctrl-C gives the table of the pictures finished so far.

    ``data="photos"`` takes the photographs of the folder `pictures`, which has an outline of every object in them
    (`worlds.photo_names.read_outlined`): what is in the picture, where an accepted word of the answer is explained, and whether
    there is one of the things that are there.
    `options` are per method and come before its `Method.economy`: a leaderboard asks the same hundreds of times, and about a
    thousand passes a picture in all, scoring included, is what it may spend. Each picture has its own seed, so random maps
    differ from one to the next. `workers` processes share the pictures; the scores are the same.
    Raises DataError (unknown data or split, a folder without outlines, a file of other settings),
    OptionError (unknown method or option).

    >>> board = ll.leaderboard(lab, n=1, methods=["center", "random"], steps=2, seeds=2, progress=False)
    >>> board.methods
    ('center', 'random')
    """
    n, seed = whole_number("n", n, least=1), whole_number("seed", seed)
    subject_of: Callable[[int], Subject]
    if data == "picturebook" and pictures is None:
        picturebook.scene(split, 0, seed=seed)  # an unknown split is said at once
        subject_of = partial(_drawn, split=split, seed=seed)
    elif data == "photos" and pictures is not None:
        photographs = read_outlined(Path(pictures))
        n, split = min(n, len(photographs)), Path(pictures).name
        subject_of = partial(photographed, photographs=photographs)
    else:
        raise DataError(
            "a leaderboard needs to know what decides each question: data must be picturebook, or photos with pictures=, "
            f"a folder of photographs with outlines; got {data!r} and pictures={pictures!r}"
        )
    given = economical(methods, options or {})
    chosen = chosen_methods(methods, given)
    settings = {"data": data, "split": split, "seed": seed, "steps": steps, "seeds": seeds, "scale": scale}
    settings |= {"model": lab.name, "fingerprint": lab.fingerprint, "methods": json.loads(json.dumps(chosen))}
    measured = {"steps": steps, "seeds": seeds, "scale": scale, "batch": batch, "options": given}
    start = time.perf_counter()
    alone = nullcontext() if out is None else only_writer(out, folder=False)
    with alone, _Lines(out, settings) as lines, Sweep("leaderboard", total=n, unit="picture", least=0, show=progress) as done:
        missing = [index for index in range(n) if index not in lines.records]
        done.step(n - len(missing))
        piece = partial(_picture, subject_of=subject_of, seed=seed, chosen=chosen, measured=measured)
        for index, record in spread(lab, piece, missing, workers=workers):
            lines.add(index, record)
            done.step()
    records = [lines.records[index] for index in sorted(lines.records) if index < n]
    if not any("methods" in record for record in records):
        if done.interrupted:
            raise KeyboardInterrupt
        raise DataError(f"{lab.name!r} answered no question of {n} pictures right and from the picture: nothing to explain")
    about = {
        **settings,
        "n": n,
        "seconds": round(time.perf_counter() - start, 1),
        "interrupted": done.interrupted,
        "versions": _versions(),
    }
    return tabulate(records, tuple(chosen), about)


def economical(methods: str | Sequence[str], options: Options) -> dict[str, dict[str, Any]]:
    """`options` filled up from each method's `economy`, for the methods asked for."""
    wanted = list(METHODS) if methods == "all" else [methods] if isinstance(methods, str) else list(methods)
    given = {
        name: {**(METHODS[name].economy if name in METHODS else {}), **options.get(name, {})}
        for name in {**dict.fromkeys(wanted), **options}
    }
    return {name: chosen for name, chosen in given.items() if chosen or name in options}


def answer_target(run: Run, short: str) -> Target:
    """The words of the answer that spell `short`, as one target; the whole answer where they do not stand together."""
    return spelt(run, short) or run.target()


def spelt(run: Run, text: str) -> Target | None:
    """The answer's words that spell `text`, as one target; None where they do not stand together."""
    wanted = [_bare(word) for word in text.split()]
    for first in range(len(run.words) - len(wanted) + 1):
        words = run.words[first : first + len(wanted)]
        if [_bare(word.text) for word in words] == wanted:
            return run.target(replace(words[0], text=" ".join(word.text for word in words), stop=words[-1].stop))
    return None


Told = tuple[Target, tuple[int, ...]]  # the words that answer a question, and which of the picture's masks decide it


@dataclass(frozen=True)
class Asked:
    """A question about a picture."""

    text: str
    type: str
    told: Callable[[Run], Told | None]  # None: the answer is wrong


@dataclass(frozen=True)
class Subject:
    """A picture, the mask of each thing in it, and the questions to ask until one is answered right."""

    name: str
    picture: np.ndarray
    masks: np.ndarray  # bool (things, height, width)
    questions: Iterable[Asked]


def _drawn(index: int, *, split: str, seed: int) -> Subject:
    """A scene of the picture book, with a question of each type; the type that comes first changes with the number."""
    scene, types = picturebook.scene(split, index, seed=seed), picturebook.TYPES
    rng = np.random.default_rng((picturebook.SPLITS[split], seed, index, 6))
    turns = (types[(index + turn) % len(types)] for turn in range(len(types)))
    questions = (question for one in turns for question in picturebook.ask_about(scene, rng, 1, (one,)))
    asked = (Asked(question.text, question.type, partial(_says, question=question)) for question in questions)
    return Subject(scene.name, np.asarray(scene.picture()), scene.masks(), asked)


def _says(run: Run, *, question: picturebook.Question) -> Told | None:
    right = exact_match(run.answer, question.answer)
    return (answer_target(run, question.short), tuple(question.deciding)) if right else None


def photographed(index: int, *, photographs: Sequence[Outlined]) -> Subject:
    """A photograph: what is in it, and whether there is each of the things that are there, the largest first."""
    photo = photographs[index]
    masks, names_of = photo.masks(), np.array(photo.names)
    sizes = {name: float(masks[names_of == name].any(0).mean()) for name in photo.names}
    names = sorted(sizes, key=lambda name: -sizes[name])
    places = {name: tuple(i for i, other in enumerate(photo.names) if other == name) for name in names}
    asked = [Asked("What is in this picture?", "naming", partial(_names, places=places))]
    for name in names:
        text = f"Is there {with_article(name)} in the picture?"
        asked.append(Asked(text, "presence", partial(_agrees, deciding=places[name])))
    return Subject(photo.path.name, photo.picture(), masks, asked[index % 2 :] + asked[: index % 2])


def _names(run: Run, *, places: Mapping[str, tuple[int, ...]]) -> Told | None:
    """The first name whose word is in the answer; a word that names another thing of the picture too does not count."""
    words = {name: {word.casefold() for word in accepted(name)} for name in places}
    for name in places:
        doubtful = set().union(*(words[other] for other in places if other != name))
        for word in sorted(words[name] - doubtful, key=len, reverse=True):
            if found := spelt(run, word):
                return found, places[name]
    return None


def _agrees(run: Run, *, deciding: tuple[int, ...]) -> Told | None:
    yes = bool(run.words) and _bare(run.words[0].text) == "yes"
    return (run.target(run.words[0]), deciding) if yes else None


def _picture(
    lab: Lab,
    index: int,
    *,
    subject_of: Callable[[int], Subject],
    seed: int,
    chosen: Mapping[str, dict[str, Any]],
    measured: Mapping[str, Any],
) -> dict[str, Any]:
    """One picture's record: every method on the first question it answers right."""
    subject = subject_of(index)
    asked, found = _ask(lab, subject, chosen, measured["scale"])
    record: dict[str, Any] = {"picture": subject.name, **asked}
    if found is None:
        return record
    question, run, target, deciding = found
    result = compare(
        lab,
        run,
        list(chosen),
        target=target,
        things=subject.masks,
        deciding=subject.masks[list(deciding)] if deciding else None,
        seed=seed + index,
        progress=False,
        **measured,
    )
    if result.interrupted:
        raise KeyboardInterrupt
    score = next(iter(result.faithfulness.values()))
    record |= {"type": question.type, "question": question.text, "answer": run.answer, "target": score.targets[0].text}
    record |= {"fills": list(score.fills), "control": control_values(result), "methods": method_values(result)}
    return record | {"refused": result.refused, "spearman": _rounded(result.spearman), "seconds": round(result.seconds, 3)}


def _ask(
    lab: Lab, subject: Subject, chosen: Mapping[str, dict[str, Any]], scale: str
) -> tuple[dict[str, int], tuple[Asked, Run, Target, tuple[int, ...]] | None]:
    """How many questions were asked, wrong, and answered without the picture; and the first that was answered from it."""
    counts = {"asked": 0, "wrong": 0, "blind": 0}
    for question in itertools.islice(subject.questions, ATTEMPTS):
        run = lab.ask(subject.picture, question.text, max_new_tokens=LONGEST)
        if run.options["stopped"] == "interrupted":
            raise KeyboardInterrupt
        counts["asked"] += 1
        if (told := question.told(run)) is None:
            counts["wrong"] += 1
            continue
        target, deciding = told
        judge = Judge(lab, run, (target,), allowed_fills(chosen.items()), scale=scale)
        judge.choose_fills(FEWEST_FILLS)
        if judge.tells.sum() >= FEWEST_FILLS:
            return counts, (question, run, target, deciding)
        counts["blind"] += 1
    return counts, None


class _Lines:
    """The finished pictures: in memory, and one JSON line each in a file when there is one."""

    def __init__(self, path: str | os.PathLike | None, settings: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.settings = {"llava_lab_leaderboard": FORMAT, **settings}
        self.records: dict[int, dict[str, Any]] = {}
        self.file: IO[bytes] | None = None

    def __enter__(self) -> _Lines:
        if self.path is not None:
            whole = self._read()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("ab")
            self.file.truncate(whole)  # a line that a crash cut short is written anew
            if not whole:
                self._write(self.settings)
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def add(self, index: int, record: dict[str, Any]) -> None:
        self.records[index] = record
        self._write({"index": index, **record})

    def _write(self, data: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.write(json.dumps(data, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            self.file.flush()

    def _read(self) -> int:
        """Take in the lines that are there; returns how many bytes of them are whole."""
        assert self.path is not None
        text = self.path.read_bytes() if self.path.exists() else b""
        whole = text.rfind(b"\n") + 1
        lines = text[:whole].splitlines()
        try:
            head, *records = [json.loads(line) for line in lines] or [self.settings]
            self.records = {record.pop("index"): record for record in records}
        except (ValueError, KeyError, AttributeError, TypeError):
            raise DataError(f"{self.path} does not hold the lines of a leaderboard; give another file") from None
        differing = [name for name, value in self.settings.items() if not isinstance(head, dict) or head.get(name) != value]
        if differing or (text and not whole):
            raise DataError(
                f"{self.path} was made with other settings ({', '.join(differing) or 'unreadable'}); give another file"
            )
        return whole


def _bare(text: str) -> str:
    return text.strip(" .,!?").casefold()


def _rounded(values: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(value) else round(float(value), 4) for value in row] for row in values]


def _versions() -> dict[str, str]:
    ours = importlib.import_module("llava_lab").__version__
    return {"llava_lab": ours, "torch": torch.__version__, "transformers": transformers.__version__}


Piece = Callable[["Lab", int], Any]

_here: dict[str, Any] = {}  # of a worker: what it works with


def spread(lab: Lab, piece: Piece, indices: Sequence[int], *, workers: int = 1) -> Iterator[tuple[int, Any]]:
    """(index, ``piece(lab, index)``) for each index, in any order; `piece` must be picklable when `workers` is above 1.

    Raises OptionError for no workers, or for several on a GPU, which one process fills.
    """
    if whole_number("workers", workers, least=1) > 1 and lab.device.type != "cpu":
        raise OptionError(f"workers above 1 are for a model on the processor; this one is on {lab.device}, so leave workers at 1")
    if workers == 1 or len(indices) < 2:
        yield from ((index, piece(lab, index)) for index in indices)
        return
    threads = max(1, torch.get_num_threads() // workers)
    level = logging.getLogger("llava_lab").level
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(min(workers, len(indices)), initializer=_settle, initargs=(_packed(lab), piece, threads, level)) as pool:
        yield from pool.imap_unordered(_work, indices)
        pool.close()
        pool.join()


def _packed(lab: Lab) -> dict[str, Any]:
    """What a Lab is made of; the model itself cannot be pickled once transformers has hung its hooks on it."""
    model: Any = lab.model
    return {
        "config": model.config,
        "attention": model.config._attn_implementation,
        "dtype": model.dtype,
        "weights": model.state_dict(),
        "connector": connector_of(model),  # the config does not rebuild every kind
        "processor": lab.processor,
        "name": lab.name,
        "card": lab.card,
    }


def _unpacked(parts: dict[str, Any]) -> Lab:
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration._from_config(
        parts["config"], dtype=parts["dtype"], attn_implementation=parts["attention"]
    )
    replace_connector(model, parts["connector"])
    model.load_state_dict(parts["weights"])
    return Lab(model.eval(), parts["processor"], name=parts["name"], card=parts["card"])


def _settle(parts: dict[str, Any], piece: Piece, threads: int, level: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(threads)
    logging.getLogger("llava_lab").setLevel(level)
    try:
        _here.update(lab=_unpacked(parts), piece=piece)
    except Exception as error:  # a worker that dies here is started again without end
        said = (str(error).strip().splitlines() or [""])[-1].strip()
        _here["failed"] = f"a worker cannot build this model again ({type(error).__name__}: {said}); leave workers at 1"


def _work(index: int) -> tuple[int, Any]:
    if "failed" in _here:
        raise LabError(_here["failed"])
    return index, _here["piece"](_here["lab"], index)


def method_values(result: Comparison) -> dict[str, dict[str, float | None]]:
    """Every measure of every method on one example's first target."""
    found = {}
    for name in result.methods:
        score, rel = result.faithfulness[name], result.maps[name]
        values = {"gain": score.gain[0], "deletion": score.deletion_area[0], "insertion": score.insertion_area[0]}
        judged = not np.isnan(score.interval[0]).any()
        values |= {"better": float(score.beats_random[0]) if judged else np.nan, "object": score.hits[0]}
        if name in result.truth:
            values |= {measure: result.truth[name].value(measure) for measure in TRUE}
        values |= {"forward": rel.passes["forward"], "backward": rel.passes["backward"], "seconds": rel.seconds}
        found[name] = {measure: _plain(value) for measure, value in values.items()}
    return found


def control_values(result: Comparison) -> dict[str, float | None]:
    """What random maps score on average on the same example."""
    score: Faithfulness = next(iter(result.faithfulness.values()))
    level = area(score.fractions, score.random[:, :, 0])  # (2, seeds, fills); reversed maps swap the two areas
    middle = float(mean_of_known(level.mean((0, 1))))
    values = {"gain": middle * 0, "deletion": middle, "insertion": middle, "object": score.random_hits[0]}
    if result.truth:
        truth = next(iter(result.truth.values()))
        values |= dict(zip(truth.measures, truth.expected, strict=True))
    return {measure: _plain(value) for measure, value in values.items()}


def tabulate(records: Sequence[Record], methods: tuple[str, ...], about: Mapping[str, Any]) -> Leaderboard:
    """The table of what is in `records`; pictures without a right answer only count among the asked."""
    told = [record for record in records if "methods" in record]
    values = np.array([[_values(record["methods"].get(name, {})) for name in methods] for record in told])
    control = np.array([_values(record["control"]) for record in told])
    types = np.array([record["type"] for record in told])
    names = ("all", *(name for name in dict.fromkeys((*picturebook.TYPES, *types.tolist())) if name in types))
    cells = [_cells(values[rows], control[rows]) for rows in (types == name if name != "all" else types != "" for name in names)]
    mean, interval, against, against_interval, counts = (np.stack(part, 1) for part in zip(*cells, strict=True))
    refused = {name: reason for record in told for name, reason in record["refused"].items()}
    numbers = {"pictures": len(records), "explained": len(told)}
    numbers |= {name: sum(record[name] for record in records) for name in ASKED}
    return Leaderboard(
        methods=methods,
        types=names,
        measures=MEASURES,
        mean=mean,
        interval=interval,
        against=against,
        against_interval=against_interval,
        counts=counts,
        spearman=_agreement(told, methods),
        refused=refused,
        about={**about, **numbers},
    )


def _cells(values: np.ndarray, control: np.ndarray) -> tuple[np.ndarray, ...]:
    """values (pictures, methods, measures), control (pictures, measures) -> means and intervals (methods, measures, ...)."""
    share = np.array([measure in SHARES for measure in MEASURES])
    mean, interval = _bootstrap(values, share)
    against, against_interval = _bootstrap(values - control[:, None], np.zeros_like(share))
    constant = share & ~np.isnan(against) & ((mean == 0) | (mean == 1))  # all or none: as sure as the share itself, no more
    against_interval[constant] = interval[constant] - (mean - against)[constant][:, None]
    return mean, interval, against, against_interval, (~np.isnan(values)).sum(0)


def _bootstrap(values: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over pictures of what is known, and their intervals (..., 2); one picture alone has no interval."""
    pictures, *shape = values.shape
    flat = values.reshape(pictures, -1)
    known = ~np.isnan(flat)
    filled = np.where(known, flat, 0.0)
    mean = mean_of_known(flat.T)

    def means(weights: np.ndarray) -> np.ndarray:
        counts = weights @ known
        # a resample without any says nothing new
        return np.where(counts > 0, weights @ filled / np.maximum(counts, 1), np.nan_to_num(mean))

    interval = percentiles(cluster_bootstrap(means, pictures, seed=pictures))
    interval[known.sum(0) < 2] = np.nan
    for column in np.flatnonzero(np.tile(share, shape[0]) & (known.sum(0) > 1) & ((mean == 0) | (mean == 1))):
        n = int(known[:, column].sum())  # all or none: the bootstrap has no spread
        interval[column] = wilson(n if mean[column] == 1 else 0, n)
    return mean.reshape(shape), interval.reshape(*shape, 2)


def _agreement(told: Sequence[Record], methods: tuple[str, ...]) -> np.ndarray:
    """Mean rank correlation over pictures, (methods, methods); a method that refused a picture is missing there."""
    every = np.full((len(told), len(methods), len(methods)), np.nan)
    for number, record in enumerate(told):
        at = [methods.index(name) for name in record["methods"]]
        every[number][np.ix_(at, at)] = np.array(record["spearman"], float)
    return mean_of_known(every.transpose(1, 2, 0))


def _values(given: Mapping[str, Any]) -> list[float]:
    return [np.nan if given.get(measure) is None else float(given[measure]) for measure in MEASURES]


def _plain(value: Any) -> float | None:
    number = float(value)
    return None if np.isnan(number) else round(number, DIGITS)


@entry
def shipped_leaderboard(lab: Lab) -> Leaderboard:
    """The leaderboard of the loaded model, as it ships with this project.

    Raises DataError when none ships with it, or when it was computed on other weights than the loaded ones;
    the message holds the command that computes one.

    >>> ll.shipped_leaderboard(lab).about["model"]
    'tiny'
    """
    return shipped(lab, FILE, Leaderboard.load, lambda board: board.about.get("fingerprint"), f"compute one with: {COMMAND}")


def shipped(lab: Lab, file: str, read: Callable[[Path], Kept], made_by: Callable[[Kept], Any], again: str) -> Kept:
    """What `read` makes of the `file` that ships beside the loaded model, if its weights are those that it was `made_by`."""
    path, what = MODELS[lab.name].folder / file if lab.name in MODELS else None, Path(file).stem
    again = again.format(name=lab.name)
    if path is None or not path.is_file():
        raise DataError(f"no {what} ships with {lab.name!r}; {again}")
    result = read(path)
    if (of := made_by(result)) != lab.fingerprint:
        raise DataError(f"the shipped {what} is of weights {of}, and {lab.name!r} now has {lab.fingerprint}; {again}")
    return result


@entry
def shipped_ablation(data: str = "picturebook") -> Ablation:
    """The comparison of connectors as it ships: linear, MLP and their controls, every answer of every seed.

    `data` is "picturebook", the drawn world, or "photos", between `photo`'s pretrained parts. The models of the drawn world's
    first seed are ``load("tiny-linear")`` and ``load("tiny-mlp")``. Raises OptionError for other data, DataError with the
    command that makes one when none ships.

    >>> sorted(set(ll.shipped_ablation().connectors))
    ['bottleneck', 'linear', 'linear2x', 'mlp2x_gelu']
    """
    if data not in ("picturebook", "photos"):
        raise OptionError(f"comparisons of connectors ship for data picturebook and photos, got {data!r}")
    path, again = COMPARISON, f"make one with: {ABLATE}; then {SHIP}"
    if data == "photos":
        path, again = PHOTO_COMPARISON / COMPARISON.name, "make one with llava-lab ablate --data photos and its two folders"
    if not path.is_file():
        raise DataError(f"no comparison of connectors ships at {path}; {again}")
    return Ablation.load(path)
