"""Instruction rows from captions and boxes: asked, parsed, filtered, checked, written in LLaVA's format.

Contexts are cut into chunks. A worker takes a chunk that nobody has, asks the teacher about its pictures, and writes it as one
file, whole or not at all; so several workers, started with the same command in the same folder, share the work, none of them
doubles or loses a row, and a run that was killed goes on. Answers that cost something are kept by request beside the chunks.
Whoever finishes the last chunk joins them in the contexts' order, whoever made them, so that any number of workers writes
the same ``rows.json``. Nothing grows with the number of rows but files.

The folder then holds:

- ``rows.json``: a list of ``{"id", "image", "conversations"}`` as LLaVA's training reads it, with ``kind`` and ``made_by``, the
  hash of what made the row (the kind's files, the picture's context, the teacher);
- ``provenance.jsonl``: for each row where it comes from, tokens, time, and what the truth check found;
- ``rejected.jsonl``: every row and turn that was thrown away, and why;
- ``truth.npz``: the report, an `llava_lab.results.Generated`; ``README.md``: the data card.

    result = generate(World(100), "data", teacher=RuleTeacher())
    print(result.table())  # then: llava-lab train --data data/rows.json --stage instruct --out runs/mine
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from llava_lab.checks import PATIENCE, entry, shown
from llava_lab.errors import DataError, OptionError
from llava_lab.instructions.claims import TYPES, read_claims, sentences
from llava_lab.instructions.context import TAUGHT, Context, Kind, read_kinds
from llava_lab.instructions.facts import Facts
from llava_lab.instructions.filters import REASONS, Turn, judge, parse, plain, yes_or_no
from llava_lab.instructions.readers import Contexts
from llava_lab.instructions.teachers import Teacher, Told, request_key
from llava_lab.remote.replies import Reply, ReplyCache
from llava_lab.results import Generated, whole_file
from llava_lab.results.generated import VERDICTS
from llava_lab.training.loop import same_settings

log = logging.getLogger(__name__)

CHUNK = 50  # pictures in a chunk
MOST_OF_ONE = 0.6  # share of yes, or of no, among answers that say either
FIRST_FEW = 20  # such answers before the share counts
CHARACTERS = 4  # of English text to a token, about

ROWS, PROVENANCE, REJECTED, TRUTH, CARD = "rows.json", "provenance.jsonl", "rejected.jsonl", "truth.npz", "README.md"


@dataclass(frozen=True)
class Plan:
    """What a run will ask for, at most; str() is a line to read before it starts."""

    requests: int
    read: int  # tokens
    written: int
    cost: float | None
    left: int | None  # requests the teacher may still send; None where there is no budget

    def __str__(self) -> str:
        line = f"at most {self.requests:,} requests, about {self.read:,} tokens to read and at most {self.written:,} to write"
        line += "" if self.cost is None else f", {self.cost:.4g} at the price given"
        return line + ("" if self.left is None else f"; the budget allows {self.left:,} requests")


@entry
def estimate_generation(
    contexts: Any, teacher: Any, kinds: Sequence[str] = TAUGHT, folder: str | os.PathLike | None = None
) -> Plan:
    """What `generate` would ask of a teacher, from the lengths of its texts; nothing is sent. Tokens are characters over 4.

    >>> from llava_lab.instructions import RuleTeacher, World, estimate_generation
    >>> estimate_generation(World(3), RuleTeacher(), ["detail"]).requests
    3
    """
    _check(contexts, teacher)
    chosen = [kind for kind in read_kinds(kinds, folder).values() if kind.form != "caption"]
    first = list(islice(contexts, 20))
    read = written = 0.0
    for kind in chosen:
        lengths = [sum(len(message["content"]) for message in kind.messages(context)) for context in first]
        read += len(contexts) * float(np.mean(lengths)) / CHARACTERS
        written += len(contexts) * kind.tokens
    price = getattr(teacher, "price", None)
    cost = None if price is None else (read * price[0] + written * price[1]) / 1e6
    endpoint = getattr(teacher, "endpoint", None)
    return Plan(len(contexts) * len(chosen), round(read), round(written), cost, endpoint.left if endpoint else None)


@entry
def generate(
    contexts: Any,
    out: str | os.PathLike,
    *,
    teacher: Any,
    kinds: Sequence[str] = TAUGHT,
    folder: str | os.PathLike | None = None,
    drop_false: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Generated:
    """Write instruction rows about every picture of `contexts` to the folder `out`; what came of it as a `Generated`.

    `contexts` is a reader (`World`, `Coco`, `read_jsonl`, `read_folder`), `teacher` a `ServerTeacher`, `LocalTeacher`,
    `RuleTeacher` or anything like them. `folder` holds edited kinds. `drop_false` rejects rows with a claim that the truth
    check finds false; else they stay and are marked. The same call goes on where it was stopped, in any number of processes;
    where another one still works on the last chunks, the result says ``finished=False`` and that one writes the files.
    Raises OptionError for a folder of another run, DataError for contexts that cannot be read, EndpointError and BudgetError
    as the client of the server does; what was answered by then is kept.

    >>> from llava_lab.instructions import RuleTeacher, World
    >>> made = ll.generate(World(2), tmp / "data", teacher=RuleTeacher(), progress=False)
    >>> made.rows, made.finished
    (6, True)
    """
    _check(contexts, teacher)
    begun, place = time.perf_counter(), Path(out)
    work = _Work(contexts, place, teacher, read_kinds(kinds, folder), drop_false, seed)
    work.remember()
    total = -(-len(contexts) // CHUNK)
    with tqdm(total=total, desc=f"rows by {teacher.name}", unit="chunk", delay=PATIENCE, disable=not progress) as bar:
        for number, chunk in enumerate(_chunks(contexts)):
            if not work.file(number).exists():
                work.make(number, chunk)
            bar.update()
    finished = all(work.file(number).exists() for number in range(total))
    with FileLock(place / "work" / "join.lock"):
        return _join(work, total, finished, begun)


def check_readers(contexts: Any) -> None:
    """Raises OptionError for what is no reader of contexts."""
    if not all(hasattr(contexts, name) for name in ("__iter__", "__len__", "source")):
        raise OptionError(f"contexts must be a reader (World, Coco, read_jsonl or read_folder give one), got {shown(contexts)}")


def _check(contexts: Any, teacher: Any) -> None:
    """Raises OptionError for what is no reader, or no teacher."""
    check_readers(contexts)
    if missing := [name for name in ("ask", "name", "terms", "settings", "parallel", "keeps") if not hasattr(teacher, name)]:
        made = "ServerTeacher, LocalTeacher and RuleTeacher make one"
        raise OptionError(f"teacher must be a teacher ({made}), got {shown(teacher)}, which has no {missing[0]!r}")


def _chunks(contexts: Contexts) -> Iterator[list[Context]]:
    reading = iter(contexts)
    while chunk := list(islice(reading, CHUNK)):
        yield chunk


class _Work:
    """A run: its folder, and how a chunk of it is made."""

    def __init__(
        self, contexts: Contexts, out: Path, teacher: Teacher, kinds: Mapping[str, Kind], drop_false: bool, seed: int
    ) -> None:
        self.contexts, self.out, self.teacher, self.kinds = contexts, out, teacher, kinds
        self.drop_false, self.seed = drop_false, seed
        self.settings = {
            "contexts": dict(contexts.source),
            "teacher": teacher.settings,
            "kinds": {name: kind.hash for name, kind in kinds.items()},
            "drop_false": drop_false,
            "seed": seed,
            "chunk": CHUNK,
        }

    def file(self, number: int) -> Path:
        return self.out / "work" / f"chunk-{number:07d}.jsonl"

    def remember(self) -> None:
        """Note what decides the rows, or hold this call against the note. Raises OptionError."""
        note = self.out / "work" / "run.json"
        note.parent.mkdir(parents=True, exist_ok=True)
        if (self.out / ROWS).exists() and not note.exists():
            raise OptionError(f"{self.out} holds rows that were not made here; choose another folder")
        with FileLock(note.with_suffix(".lock")):
            same_settings(note, self.settings, resume=True)

    def make(self, number: int, chunk: list[Context]) -> None:
        """Make a chunk, unless another worker is at it."""
        try:
            with FileLock(self.file(number).with_suffix(".lock"), timeout=0):
                if self.file(number).exists():  # finished meanwhile
                    return
                jobs = [(context, kind) for context in chunk for kind in self.kinds.values()]
                for context in chunk:
                    self._draw(context)
                cache = ReplyCache(self.out / "work" / "replies") if self.teacher.keeps else None
                if self.teacher.parallel > 1:
                    with ThreadPoolExecutor(self.teacher.parallel) as pool:
                        futures = [pool.submit(self._row, *job, cache) for job in jobs]
                        try:
                            records = [future.result() for future in futures]
                        except BaseException:
                            pool.shutdown(wait=True, cancel_futures=True)  # what is on its way is paid for
                            raise
                else:
                    records = [self._row(*job, cache) for job in jobs]
                with whole_file(self.file(number)) as temporary:
                    temporary.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
        except Timeout:
            log.info("chunk %d is being made by another worker", number)

    def _draw(self, context: Context) -> None:
        """The picture of a world's context, which is nowhere yet."""
        if context.scene is not None and not (target := self.out / context.image).exists():
            with whole_file(target) as temporary:
                context.scene.picture().save(temporary, "PNG")

    def _row(self, context: Context, kind: Kind, cache: ReplyCache | None) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, int(context.hash, 16), int(kind.hash, 16)))
        asked = kind.questions[int(rng.integers(len(kind.questions)))] if kind.questions else ""
        first = bool(rng.random() < 0.5)  # the picture before the question, or after it, as LLaVA has both
        told = self._told(context, kind, cache)
        settings = json.dumps(self.teacher.settings, sort_keys=True).encode()
        mark = f"{kind.hash}-{context.hash}-{hashlib.blake2b(settings, digest_size=4).hexdigest()}"
        record: dict[str, Any] = {"id": f"{context.id}-{kind.name}", "image": context.image, "kind": kind.name, "made_by": mark}
        record |= {"teacher": self.teacher.name, "used": told.used, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        turns, faults, claims = sift(kind, context, told, asked, drop_false=self.drop_false)
        return record | {"picture_first": first, "turns": turns, "faults": faults, **claims}

    def _told(self, context: Context, kind: Kind, cache: ReplyCache | None) -> Told:
        if kind.form == "caption":
            return Told(context.captions[0] if context.captions else "", None, "" if context.captions else "there is no caption")
        if cache is None:
            return self.teacher.ask(kind, context, seed=self.seed)
        key = request_key(self.teacher, kind, context, self.seed)
        known = cache.get(key)
        if known is None:
            told = self.teacher.ask(kind, context, seed=self.seed)
            known = Reply(told.text, None, "eos", told.used, told.silence)
            cache.put(key, known)
        return Told(known.text, known.used, known.silence)


def sift(
    kind: Kind, context: Context, told: Told, asked: str, *, drop_false: bool = False
) -> tuple[list[Turn], list[list[str]], dict[str, Any]]:
    """A teacher's text as the turns that pass, the faults [reason, question, answer], and what the truth check found."""
    if not told.text:
        return [], [["silent", "", told.silence]], {}
    try:
        turns = parse(kind, told.text, asked=asked)
    except DataError as error:
        return [], [["format", str(error), told.text[:2000]]], {}
    kept, thrown = judge(kind, turns, context)
    faults = [[reason, *turn] for reason, turn in thrown]
    checked = check_turns(kept, context)
    if drop_false and checked["false"]:
        return [], [*faults, *(["false", *turn] for turn in kept)], checked
    return kept, faults, checked


def check_turns(turns: Sequence[Turn], context: Context) -> dict[str, Any]:
    """The truth check of a row's turns: claims by type and verdict, false sentences, and things named (for CHAIR)."""
    facts = Facts.of(context)
    counts = {name: [0, 0, 0] for name in TYPES}
    false: list[str] = []
    named = wrong = total = invented = 0
    for question, answer in turns:
        total += len(sentences(answer))
        bad: set[str] = set()
        for claim in read_claims(question, answer, facts):
            counts[claim.type][VERDICTS.index(claim.true)] += 1
            if claim.true is False and claim.sentence not in false:
                false.append(claim.sentence)
            if claim.type in ("kind", "presence") and not claim.says.startswith("no ") and claim.true is not None:
                named += 1
                wrong += claim.true is False
                if claim.true is False:
                    bad.add(claim.sentence)
        invented += len(bad)
    claims = {name: values for name, values in counts.items() if any(values)}
    return {"claims": claims, "false": false, "chair": [wrong, named, invented, total]}


# -- joining -------------------------------------------------------------------------------


@dataclass
class Tally:
    """What is counted of rows, by their kind."""

    rows: Counter[str] = field(default_factory=Counter)
    turns: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    passing: Counter[str] = field(default_factory=Counter)
    rejected: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    claims: dict[str, np.ndarray] = field(
        default_factory=lambda: defaultdict(lambda: np.zeros((len(TYPES), len(VERDICTS)), np.int64))
    )
    chair: dict[str, np.ndarray] = field(default_factory=lambda: defaultdict(lambda: np.zeros(4, np.int64)))
    said: Counter[str] = field(default_factory=Counter)
    used: list[int] = field(default_factory=lambda: [0, 0])

    def result(self, kinds: tuple[str, ...], reasons: tuple[str, ...], **about: Any) -> Generated:
        """The counts of these kinds and reasons, with what `about` says of the run."""
        counters = {"asked": self.asked, "kept": self.rows, "turns": self.turns, "passing": self.passing}
        about |= {name: np.array([counter[kind] for kind in kinds]) for name, counter in counters.items()}
        rejected = np.array([[self.rejected[kind][reason] for reason in reasons] for kind in kinds])
        claims, chair = (np.stack([found[kind] for kind in kinds]) for found in (self.claims, self.chair))
        about |= {"kinds": kinds, "reasons": reasons, "rejected": rejected, "types": TYPES, "claims": claims, "chair": chair}
        return Generated(**about)


def _join(work: _Work, total: int, finished: bool, begun: float) -> Generated:
    """Read the chunks in order, take out what only all rows together show, and write the files where all are there."""
    out, tally = work.out, Tally()
    with ExitStack() as files:
        names = (ROWS, PROVENANCE, REJECTED) if finished else ()
        paths = {name: files.enter_context(whole_file(out / name)) for name in names}
        lines = {name: files.enter_context(path.open("w", encoding="utf-8")) for name, path in paths.items()}
        before = files.enter_context(whole_file(out / "work" / "seen.db"))
        seen = files.enter_context(closing(sqlite3.connect(before)))
        seen.executescript(
            "pragma journal_mode = off; pragma synchronous = off; create table said (hash blob primary key) without rowid;"
        )
        if finished:
            lines[ROWS].write("[")
        for number in range(total):
            if not work.file(number).exists():
                continue
            with work.file(number).open(encoding="utf-8") as chunk:
                for line in chunk:
                    record = json.loads(line)
                    for reason, question, answer in _settle(record, seen, tally):
                        tally.rejected[record["kind"]][reason] += 1
                        if finished:
                            thrown = {"id": record["id"], "kind": record["kind"], "reason": reason}
                            thrown |= {"question": question, "answer": answer}
                            lines[REJECTED].write(json.dumps(thrown, ensure_ascii=False) + "\n")
                    if record["turns"] and finished:
                        first = sum(tally.rows.values()) == 1
                        lines[ROWS].write(("\n" if first else ",\n") + json.dumps(as_row(record), ensure_ascii=False))
                        lines[PROVENANCE].write(json.dumps(_provenance(record, work), ensure_ascii=False) + "\n")
        if finished:
            lines[ROWS].write("\n]\n")
    (out / "work" / "seen.db").unlink(missing_ok=True)
    teacher, used = work.teacher, (tally.used[0], tally.used[1])
    about: dict[str, Any] = {
        "folder": str(out),
        "teacher": teacher.name,
        "terms": teacher.terms,
        "source": dict(work.contexts.source),
    }
    about |= {"used": used, "seed": work.seed, "finished": finished, "seconds": time.perf_counter() - begun}
    result = tally.result(tuple(work.kinds), REASONS, **about)
    if finished:
        result.save(out / TRUTH)
        with whole_file(out / CARD) as temporary:
            temporary.write_text(data_card(result, work.settings), encoding="utf-8")
    return result


def _settle(record: dict[str, Any], seen: sqlite3.Connection, tally: Tally) -> list[list[str]]:
    """Count a row; what is thrown away of it comes back, and `record["turns"]` keeps the rest."""
    kind, faults = record["kind"], record["faults"]
    tally.asked[kind] += 1
    if record["used"]:
        tally.used = [a + b for a, b in zip(tally.used, record["used"], strict=True)]
    if record.get("claims") is not None:  # also of rows that fail
        for name, values in record["claims"].items():
            tally.claims[kind][TYPES.index(name)] += values
        tally.chair[kind] += record["chair"]
    turns, said = [], tally.said.copy()
    for question, answer in record["turns"]:
        word = yes_or_no(answer)
        if word and said.total() >= FIRST_FEW and said[word] + 1 > MOST_OF_ONE * (said.total() + 1):
            faults.append(["balance", question, answer])
            continue
        if word:
            said[word] += 1
        turns.append((question, answer))
    if turns and kind != "brief":
        words = plain(" ".join(text for turn in turns for text in turn))
        mark = hashlib.blake2b(words.encode(), digest_size=12).digest()
        if not seen.execute("insert or ignore into said values (?)", [mark]).rowcount:
            faults += [["duplicate", *turn] for turn in turns]
            turns = []
    record["turns"] = turns
    if turns:
        tally.said = said
        tally.rows[kind] += 1
        tally.turns[kind] += len(turns)
        tally.passing[kind] += not record["false"]
    return faults


def as_row(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as LLaVA's training reads it: the picture's mark before or after the first question."""
    said = []
    for number, (question, answer) in enumerate(record["turns"]):
        if number == 0:
            question = f"<image>\n{question}" if record["picture_first"] else f"{question}\n<image>"
        said += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    head = {"id": record["id"], "image": record["image"], "conversations": said}
    return head | {"kind": record["kind"], "made_by": record["made_by"]}


def _provenance(record: Mapping[str, Any], work: _Work) -> dict[str, Any]:
    names = ("id", "image", "kind", "made_by", "teacher", "used", "time", "claims", "false", "chair")
    return {name: record[name] for name in names} | {"terms": work.teacher.terms, "seed": work.seed}


# -- the data card --------------------------------------------------------------------------

CLAIMS = (
    "A claim is a thing, colour, size, number, place or relation that a sentence states; it is looked up in the scene where "
    'the world is drawn, in boxes and captions otherwise. "Not told" is what neither of them can say. CHAIR (Rohrbach et al., '
    "EMNLP 2018) is the share of named things, and of sentences naming one, that are not in the picture. Claims are read by "
    "rules that know a few dozen words: what they do not read is counted nowhere."
)


def data_card(result: Generated, settings: Mapping[str, Any]) -> str:
    """The card as Markdown, from the result alone."""
    table = result.table()
    return "\n".join(
        [
            "# Instruction rows made by llava-lab",
            "",
            f"{result.rows:,} rows about pictures of {_source(result.source)}, written by **{result.teacher}** on "
            f"{time.strftime('%Y-%m-%d')} from captions and boxes alone: the teacher never saw a picture.",
            "",
            "## What may be done with them",
            "",
            f"Terms of the teacher: {result.terms}.",
            "",
            "Pictures, captions and boxes keep the terms of their own data set. The prompts are llava-lab's own (Apache-2.0).",
            "",
            "## How many, and why others are not here",
            "",
            "```",
            str(table),
            "```",
            "",
            CLAIMS,
            "",
            "## Train on them",
            "",
            "    llava-lab train --data rows.json --stage instruct --out runs/mine",
            "",
            "`provenance.jsonl` has a line per row, `rejected.jsonl` a line per row or turn that was thrown away.",
            "",
            "## What made them",
            "",
            "```json",
            json.dumps(settings, indent=1),
            "```",
            "",
        ]
    )


def _source(source: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in source.items() if not isinstance(value, Mapping))
