"""Every method on many pictures of the picture book: is it faithful, does it find the thing, what does it cost?

One question is asked about each picture, its type in turn, and one the model answers right: the map of a wrong
answer has no right place to be. What is explained is the word that answers ("red", "Yes", "top left"), since
function words need no picture; a question that the model answers without the picture too (filling all of it
hardly lowers the probability) is passed over, for there is nothing to explain.

Each finished picture is one JSON line in `out`; asking again with the same settings goes on where the file
ends. The table is made by `llava_lab.evaluation.leaderboard_table`.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from tqdm.auto import tqdm

from llava_lab.attribution.base import whole_number
from llava_lab.attribution.compare import Options, chosen_methods, compare
from llava_lab.attribution.faithfulness import BATCH, SCALES, Judge, allowed_fills
from llava_lab.attribution.registry import METHODS
from llava_lab.attribution.verdict import FEWEST_FILLS
from llava_lab.errors import DataError
from llava_lab.evaluation.leaderboard_table import control_values, method_values, tabulate
from llava_lab.evaluation.metrics import exact_match
from llava_lab.evaluation.shared_work import spread
from llava_lab.results import Run, Target
from llava_lab.scores import Leaderboard
from llava_lab.worlds import picturebook

if TYPE_CHECKING:
    from llava_lab.models import Lab

STEPS = 5  # of a curve
SEEDS = 4  # random rankings per picture, each also read backwards; the intervals come from the pictures
ATTEMPTS = 6  # questions tried on one picture until one is answered right, from the picture
LONGEST = 48  # tokens an answer may take
FORMAT = 1  # of the lines

# What the sweeps may spend here: a leaderboard asks the same hundreds of times. About a thousand passes a picture in all,
# scoring included; single patches are too small for occlusion to matter in the picture book, so its blocks are larger too.
ECONOMY: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "occlusion": {"block": 3, "stride": 2},
        "rise": {"masks": 64},
        "shapley": {"orders": 3},
        "kernel_shap": {"samples": 48},
        "greedy": {"steps": 3},
        "integrated_gradients": {"steps": 12},
        "smoothgrad": {"samples": 6},
    }
)


def leaderboard(
    lab: Lab,
    *,
    data: str = "picturebook",
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

    `options` are per method and come before those of `ECONOMY`. Each picture has its own seed, so random maps
    differ from one to the next. `workers` processes share the pictures; the scores are the same.
    Raises DataError (unknown data or split, a file of other settings),
    OptionError (unknown method or option).
    """
    if data != "picturebook":
        raise DataError(f"a leaderboard needs to know what decides each question, so data must be picturebook, got {data!r}")
    n, seed = whole_number("n", n, least=1), whole_number("seed", seed)
    picturebook.scene(split, 0, seed=seed)  # an unknown split is said at once
    given = economical(methods, options or {})
    chosen = chosen_methods(methods, given)
    settings = {"data": data, "split": split, "seed": seed, "steps": steps, "seeds": seeds, "scale": scale}
    settings |= {"model": lab.name, "fingerprint": lab.fingerprint, "methods": json.loads(json.dumps(chosen))}
    measured = {"steps": steps, "seeds": seeds, "scale": scale, "batch": batch, "options": given}
    start, interrupted = time.perf_counter(), False
    with _Lines(out, settings) as lines, tqdm(total=n, desc="leaderboard", unit="picture", disable=not progress) as bar:
        bar.update(sum(index < n for index in lines.records))
        missing = [index for index in range(n) if index not in lines.records]
        piece = partial(_picture, split=split, seed=seed, chosen=chosen, measured=measured)
        try:
            for index, record in spread(lab, piece, missing, workers=workers):
                lines.add(index, record)
                bar.update()
        except KeyboardInterrupt:
            interrupted = True
    records = [lines.records[index] for index in sorted(lines.records) if index < n]
    if not any("methods" in record for record in records):
        if interrupted:
            raise KeyboardInterrupt
        raise DataError(f"{lab.name!r} answered no question of {n} pictures right and from the picture: nothing to explain")
    about = {
        **settings,
        "n": n,
        "seconds": round(time.perf_counter() - start, 1),
        "interrupted": interrupted,
        "versions": _versions(),
    }
    return tabulate(records, tuple(chosen), about)


def economical(methods: str | Sequence[str], options: Options) -> dict[str, dict[str, Any]]:
    """`options` filled up from `ECONOMY`, for the methods asked for."""
    wanted = list(METHODS) if methods == "all" else [methods] if isinstance(methods, str) else list(methods)
    given = {name: {**ECONOMY.get(name, {}), **options.get(name, {})} for name in {**dict.fromkeys(wanted), **options}}
    return {name: chosen for name, chosen in given.items() if chosen or name in options}


def answer_target(run: Run, short: str) -> Target:
    """The words of the answer that spell `short`, as one target; the whole answer where they do not stand together."""
    wanted = [_bare(word) for word in short.split()]
    for first in range(len(run.words) - len(wanted) + 1):
        words = run.words[first : first + len(wanted)]
        if [_bare(word.text) for word in words] == wanted:
            return run.target(replace(words[0], text=" ".join(word.text for word in words), stop=words[-1].stop))
    return run.target()


def _picture(
    lab: Lab, index: int, *, split: str, seed: int, chosen: Mapping[str, dict[str, Any]], measured: Mapping[str, Any]
) -> dict[str, Any]:
    """One picture's record: every method on the first question it answers right."""
    scene = picturebook.scene(split, index, seed=seed)
    asked, found = _ask(lab, scene, index, chosen, measured["scale"])
    record: dict[str, Any] = {"picture": scene.name, **asked}
    if found is None:
        return record
    question, run, target = found
    masks = scene.masks()
    result = compare(
        lab,
        run,
        list(chosen),
        target=target,
        things=masks,
        deciding=masks[list(question.deciding)] if question.deciding else None,
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
    lab: Lab, scene: picturebook.Scene, index: int, chosen: Mapping[str, dict[str, Any]], scale: str
) -> tuple[dict[str, int], tuple[picturebook.Question, Run, Target] | None]:
    """How many questions were asked, wrong, and answered without the picture; and the first that was answered from it."""
    rng = np.random.default_rng((picturebook.SPLITS[scene.split], scene.seed, index, 6))
    picture, types = np.asarray(scene.picture()), picturebook.TYPES
    counts = {"asked": 0, "wrong": 0, "blind": 0}
    for turn in range(len(types)):
        for question in picturebook.ask_about(scene, rng, 1, (types[(index + turn) % len(types)],)):
            run = lab.ask(picture, question.text, max_new_tokens=LONGEST)
            if run.options["stopped"] == "interrupted":
                raise KeyboardInterrupt
            counts["asked"] += 1
            if not exact_match(run.answer, question.answer):
                counts["wrong"] += 1
                continue
            target = answer_target(run, question.short)
            judge = Judge(lab, run, (target,), allowed_fills(list(chosen.values())), scale=scale)
            judge.choose_fills(FEWEST_FILLS)
            if judge.tells.sum() >= FEWEST_FILLS:
                return counts, (question, run, target)
            counts["blind"] += 1
        if counts["asked"] == ATTEMPTS:
            break
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
