"""The truth check of rows that are there already: anybody's file in LLaVA's format, held against captions and boxes.

Rows are found by their picture's name, the whole of it or its last part, in a database on disk; neither rows nor contexts are
in memory as a whole. So LLaVA's own 158K rows can be checked against COCO's boxes as they were published: how many claims
are true, and which sentences name what is not there.

    checked = check_rows("llava_instruct_150k.json", Coco("work", instances="instances_train2014.json"))
    print(checked.table())
"""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from llava_lab.checks import PATIENCE, entry
from llava_lab.errors import DataError
from llava_lab.instructions.claims import TYPES
from llava_lab.instructions.generate import check_readers, check_turns
from llava_lab.models.text import read_row
from llava_lab.results import Generated
from llava_lab.results.generated import VERDICTS
from llava_lab.training.rows import row_spans

REASONS = ("text alone", "no context")  # why a row could not be checked
PREFIX = "COCO_train2014_"  # LLaVA's rows leave it out of the names of COCO's pictures


@entry
def check_rows(data: str | os.PathLike, contexts: Any, *, progress: bool = True) -> Generated:
    """Look up every claim of the answers in a file in LLaVA's format; a `Generated` whose rows are those that were checked.

    `contexts` is a reader of what is known of the pictures. Rows about no picture, and about one that no context is about,
    are counted as rejected. Rows of a kind of their own (``"kind"``, as `generate` writes it) are counted apart.
    Raises DataError naming file and row for what is not in the format.
    """
    check_readers(contexts)
    begun, path = time.perf_counter(), Path(data)
    claims: dict[str, np.ndarray] = defaultdict(lambda: np.zeros((len(TYPES), len(VERDICTS)), np.int64))
    chair: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(4, np.int64))
    asked, kept, turns, passing = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    bare: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, closing(sqlite3.connect(Path(folder) / "rows.db")) as rows:
        rows.executescript(
            "pragma journal_mode = off; pragma synchronous = off; create table rows (image text, start int, stop int);"
        )
        with path.open("rb") as file:
            for number, (start, stop) in enumerate(row_spans(path)):
                kind, _, image = _read(file, start, stop, path, number)
                asked[kind] += 1
                if image is None:
                    bare[kind] += 1
                else:
                    rows.execute("insert into rows values (?, ?, ?)", (_name(image), start, stop))
            rows.execute("create index by_image on rows (image)")
            for context in tqdm(
                contexts, total=len(contexts), desc="checking", unit="picture", delay=PATIENCE, disable=not progress
            ):
                for start, stop in rows.execute(
                    "select start, stop from rows where image = ?", [_name(context.image)]
                ).fetchall():
                    kind, pairs, _ = _read(file, start, stop, path, 0)
                    found = check_turns(pairs, context)
                    for name, counts in found["claims"].items():
                        claims[kind][TYPES.index(name)] += counts
                    chair[kind] += found["chair"]
                    kept[kind] += 1
                    turns[kind] += len(pairs)
                    passing[kind] += not found["false"]
    if not asked:
        raise DataError(f"{path} holds no rows")
    kinds = tuple(asked)
    return Generated(
        folder=str(path.parent),
        teacher=path.name,
        terms="as its authors say",
        source=dict(contexts.source),
        kinds=kinds,
        asked=np.array([asked[kind] for kind in kinds]),
        kept=np.array([kept[kind] for kind in kinds]),
        turns=np.array([turns[kind] for kind in kinds]),
        passing=np.array([passing[kind] for kind in kinds]),
        reasons=REASONS,
        rejected=np.array([[bare[kind], asked[kind] - bare[kind] - kept[kind]] for kind in kinds]),
        types=TYPES,
        claims=np.stack([claims[kind] for kind in kinds]),
        chair=np.stack([chair[kind] for kind in kinds]),
        used=(0, 0),
        seed=0,
        finished=True,
        seconds=time.perf_counter() - begun,
    )


def _read(file: Any, start: int, stop: int, path: Path, number: int) -> tuple[str, list[tuple[str, str]], str | None]:
    """A row's kind, its turns and its picture."""
    file.seek(start)
    try:
        row = json.loads(file.read(stop - start).decode("utf-8-sig"))
        messages, image = read_row(row)
    except ValueError as error:  # DataError too
        raise DataError(f"{path} row {number}: {error}") from None
    said = [message.text for message in messages]
    kind = row.get("kind")
    return kind if isinstance(kind, str) and kind else "rows", list(zip(said[::2], said[1::2], strict=True)), image


def _name(image: str) -> str:
    return image.replace("\\", "/").rsplit("/", 1)[-1].removeprefix(PREFIX)
