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
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from llava_lab.checks import PATIENCE, entry
from llava_lab.errors import DataError
from llava_lab.instructions.claims import TYPES
from llava_lab.instructions.generate import Tally, check_readers, check_turns
from llava_lab.models.text import read_row
from llava_lab.results import Generated
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
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder, closing(sqlite3.connect(Path(folder) / "rows.db")) as rows:
        rows.executescript(
            "pragma journal_mode = off; pragma synchronous = off; create table rows (image text, start int, stop int);"
        )
        with path.open("rb") as file:
            for number, (start, stop) in enumerate(row_spans(path)):
                kind, _, image = _read(file, start, stop, path, number)
                tally.asked[kind] += 1
                if image is None:
                    tally.rejected[kind]["text alone"] += 1
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
                        tally.claims[kind][TYPES.index(name)] += counts
                    tally.chair[kind] += found["chair"]
                    tally.rows[kind] += 1
                    tally.turns[kind] += len(pairs)
                    tally.passing[kind] += not found["false"]
    if not tally.asked:
        raise DataError(f"{path} holds no rows")
    for kind, asked in tally.asked.items():
        tally.rejected[kind]["no context"] = asked - tally.rows[kind] - tally.rejected[kind]["text alone"]
    about: dict[str, Any] = {"folder": str(path.parent), "teacher": path.name, "terms": "as its authors say"}
    about |= {"source": dict(contexts.source), "used": (0, 0), "seed": 0, "finished": True}
    return tally.result(tuple(tally.asked), REASONS, seconds=time.perf_counter() - begun, **about)


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
