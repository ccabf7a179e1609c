"""Where contexts come from: COCO's json, lines of json, a world of our own, a folder of photographs with boxes.

A reader is iterated over as often as one likes, always in the same order, and holds one context in memory at a time.
COCO's files name pictures, captions and boxes in three lists in no common order; they are sorted once, in a small
database beside the output, and no file is ever in memory as a whole.

    for context in read_jsonl("contexts.jsonl"):
        print(context.id, context.captions)

Formats: COCO 2014/2017 ``captions_*.json`` and ``instances_*.json`` (boxes in pixels as x, y, width, height). A line of
json lines: ``{"image": "a.jpg", "captions": ["..."], "boxes": [["car", 0.1, 0.3, 0.5, 0.7]], "complete": ["car", "dog"]}``;
``boxes`` and ``complete`` may be left out. A folder of photographs holds the same without ``image`` in a file beside each
picture, ``a.json`` beside ``a.jpg``; captions may stand in ``a.txt`` instead, one a line.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llava_lab.checks import is_list, shown
from llava_lab.errors import DataError, one_line
from llava_lab.instructions.context import Box, Context, of_scene
from llava_lab.results.save import file_hash, whole_file
from llava_lab.training.rows import row_spans
from llava_lab.worlds import picturebook
from llava_lab.worlds.photo_names import SUFFIXES

CHUNK = 1 << 20  # bytes of a file read at a time
LONGEST = 1 << 26  # bytes of one element of a list
TOGETHER = 5000  # elements written to the database at a time


class Contexts(Protocol):
    """Contexts in a fixed order."""

    def __iter__(self) -> Iterator[Context]: ...

    def __len__(self) -> int: ...

    @property
    def source(self) -> Mapping[str, Any]:
        """What decides which contexts these are, for the note of a run that is resumed."""
        ...


# -- worlds --------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """The first `n` pictures of a split of the picture book. Raises DataError for an unknown split or an n below 1."""

    n: int
    split: str = "train"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise DataError(f"n must be 1 or more, got {self.n}")
        picturebook.scene(self.split, 0, seed=self.seed)

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[Context]:
        return (of_scene(picturebook.scene(self.split, index, seed=self.seed)) for index in range(self.n))

    @property
    def source(self) -> dict[str, Any]:
        return {"world": "picturebook", "n": self.n, "split": self.split, "seed": self.seed}


# -- lines of json, folders ----------------------------------------------------------------


class _Lines:
    def __init__(self, path: Path, most: int | None) -> None:
        self.path = path
        count = sum(1 for _ in row_spans(path))
        self._count = count if most is None else min(most, count)
        if not self._count:
            raise DataError(f"{path} holds no contexts; expected lines with image and captions or boxes")

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Context]:
        with self.path.open("rb") as file:
            for number, (start, stop) in enumerate(row_spans(self.path)):
                if number == self._count:
                    return
                file.seek(start)
                try:
                    yield _context(json.loads(file.read(stop - start).decode("utf-8-sig")))
                except ValueError as error:  # DataError too
                    raise DataError(f"{self.path} line {number + 1}: {error}") from None

    @property
    def source(self) -> dict[str, Any]:
        return {"jsonl": str(self.path.resolve()), "hash": file_hash(self.path), "n": self._count}


def read_jsonl(path: str | os.PathLike, *, n: int | None = None) -> Contexts:
    """Contexts from json lines (or a json list), the first `n` of them. Raises DataError naming file and line."""
    return _Lines(Path(path), n)


class _Folder:
    def __init__(self, folder: Path, most: int | None) -> None:
        if not folder.is_dir():
            raise DataError(f"no folder {folder}; expected one of photographs with a .json or .txt beside each")
        self.folder = folder
        pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        self.pictures = [p for p in pictures if p.with_suffix(".json").is_file() or p.with_suffix(".txt").is_file()][:most]
        if not self.pictures:
            raise DataError(
                f"{folder} has {len(pictures)} photographs and none has its captions or boxes in a .json or .txt beside it"
            )

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[Context]:
        for picture in self.pictures:
            beside, lines = picture.with_suffix(".json"), picture.with_suffix(".txt")
            try:
                data: Any = json.loads(beside.read_text("utf-8-sig")) if beside.is_file() else {}
                if not isinstance(data, Mapping):
                    raise DataError(f"expected an object with captions or boxes, got {type(data).__name__}")
                if lines.is_file():
                    said = [line for line in lines.read_text("utf-8-sig").splitlines() if line.strip()]
                    data = {**data, "captions": [*data.get("captions", ()), *said]}
                yield _context({**data, "image": picture.relative_to(self.folder).as_posix()})
            except (OSError, ValueError) as error:
                raise DataError(f"{beside if beside.is_file() else lines}: {error}") from None

    @property
    def source(self) -> dict[str, Any]:
        return {"photos": str(self.folder.resolve()), "n": len(self.pictures)}


def read_folder(folder: str | os.PathLike, *, n: int | None = None) -> Contexts:
    """Photographs in a folder and below it that have captions or boxes beside them. Raises DataError."""
    return _Folder(Path(folder).expanduser(), n)


def _context(data: Any) -> Context:
    """One line's context. Raises DataError that says what is wrong with it."""
    if not isinstance(data, Mapping):
        raise DataError(f"expected an object with image and captions or boxes, got {type(data).__name__}")
    image, captions, complete = data.get("image"), data.get("captions", ()), data.get("complete", ())
    if not isinstance(image, str) or not image:
        raise DataError(f"'image' must be the name of a picture file, got {shown(image)}")
    for name, value in (("captions", captions), ("complete", complete)):
        if not is_list(value) or not all(isinstance(text, str) for text in value):
            raise DataError(f"{name!r} must be a list of texts, got {shown(value)}")
    boxes = data.get("boxes", ())
    if not is_list(boxes):
        raise DataError(f"'boxes' must be a list of [name, left, top, right, bottom], got {shown(boxes)}")
    return Context(tuple(captions), tuple(map(_box, boxes)), str(data.get("id", image)), image, tuple(complete))


def _box(data: Any) -> Box:
    fine = is_list(data) and len(data) == 5 and isinstance(data[0], str)
    if not fine or not all(isinstance(side, (int, float)) and not isinstance(side, bool) for side in data[1:]):
        raise DataError(f"a box must be [name, left, top, right, bottom], got {shown(data)}")
    left, top, right, bottom = map(float, data[1:])
    return Box(data[0], left, top, right, bottom)


# -- COCO ----------------------------------------------------------------------------------


class Coco:
    """COCO's captions, boxes, or both, by picture; `work` is where the sorted copy is kept, made once and found again."""

    def __init__(
        self,
        work: str | os.PathLike,
        *,
        captions: str | os.PathLike | None = None,
        instances: str | os.PathLike | None = None,
        n: int | None = None,
    ) -> None:
        """Raises DataError for a missing file, or one that is not COCO's format, naming its list and element."""
        files = {"captions": captions, "instances": instances}
        self.files = {name: Path(path) for name, path in files.items() if path is not None}
        if not self.files:
            raise DataError("COCO's contexts need a captions file, an instances file, or both")
        if missing := [str(path) for path in self.files.values() if not path.is_file()]:
            raise DataError(f"no such data file: {missing[0]}")
        self.hashes = {name: file_hash(path) for name, path in self.files.items()}
        self.database = Path(work) / f"coco-{'-'.join(value[:8] for value in self.hashes.values())}.db"
        if not self.database.is_file():
            with whole_file(self.database) as temporary:
                _sort(self.files, temporary)
        with closing(self._open()) as database:
            self.complete = tuple(name for (name,) in database.execute("select name from kinds order by number"))
            self._count = database.execute(f"select count(*) from images where {_USABLE}").fetchone()[0]
        self._count = self._count if n is None else min(n, self._count)
        if not self._count:
            raise DataError(f"{', '.join(map(str, self.files.values()))} holds no picture with captions or boxes")

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Context]:
        with closing(self._open()) as database:
            rows = database.execute(
                f"select id, name, width, height from images where {_USABLE} order by id limit ?", [self._count]
            )
            for number, name, width, height in rows:
                captions = tuple(
                    t for (t,) in database.execute("select text from captions where image = ? order by id", [number])
                )
                told = database.execute(
                    "select kinds.name, x, y, w, h, crowd from boxes join kinds on kinds.id = kind where image = ? "
                    "order by boxes.id",
                    [number],
                )
                try:
                    boxes = tuple(_from_pixels(width, height, *row) for row in told)
                    yield Context(captions, boxes, str(number), name, self.complete)
                except DataError as error:
                    raise DataError(f"picture {number} of {', '.join(map(str, self.files.values()))}: {error}") from None

    @property
    def source(self) -> dict[str, Any]:
        return {"coco": self.hashes, "n": self._count}

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(f"file:{self.database.resolve().as_posix()}?mode=ro", uri=True)


_USABLE = "id in (select image from captions) or id in (select image from boxes)"
_TABLES = """
create table images (id integer primary key, name text, width real, height real);
create table captions (id integer primary key, image integer, text text);
create table kinds (id integer primary key, name text, number integer);
create table boxes (id integer primary key, image integer, kind integer, x real, y real, w real, h real, crowd integer);
"""
_ROWS = {
    "images": ("insert or ignore into images values (?, ?, ?, ?)", ("id", "file_name", "width", "height")),
    "captions": ("insert into captions values (?, ?, ?)", ("id", "image_id", "caption")),
    "categories": ("insert into kinds values (?, ?, ?)", ("id", "name", "id")),
    "instances": ("insert into boxes values (?, ?, ?, ?, ?, ?, ?, ?)", ("id", "image_id", "category_id", "bbox", "iscrowd")),
}


def _sort(files: Mapping[str, Path], out: Path) -> None:
    """Write the lists of COCO's files into tables."""
    with closing(sqlite3.connect(out)) as database:
        database.executescript("pragma journal_mode = off; pragma synchronous = off;" + _TABLES)
        for content, path in files.items():
            counts: dict[str, int] = {}
            waiting: dict[str, list[tuple[Any, ...]]] = {}
            for name, element in elements(path):
                table = content if name == "annotations" else name
                if table not in _ROWS or (table == "categories" and content == "captions"):
                    continue
                statement, names = _ROWS[table]
                try:
                    values = [element[field] if field != "iscrowd" else element.get(field, 0) for field in names]
                    if table == "instances":
                        values[3:4] = map(float, values[3])
                        if len(values) != 8:
                            raise ValueError("bbox has not four numbers")
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    where = f"{path} {name}[{counts.get(name, 0)}]"
                    raise DataError(f"{where} lacks what COCO's {content} file has ({one_line(error)})") from None
                counts[name] = counts.get(name, 0) + 1
                waiting.setdefault(statement, []).append(tuple(values))
                if len(waiting[statement]) == TOGETHER:
                    _write(database, path, statement, waiting.pop(statement))
            for statement, rows in waiting.items():
                _write(database, path, statement, rows)
            if "images" not in counts or "annotations" not in counts:
                had = ", ".join(counts) or "none of them"
                raise DataError(f"{path} is not COCO's {content} file: expected lists 'images' and 'annotations', found {had}")
        database.executescript("create index captions_of on captions (image); create index boxes_of on boxes (image);")
        database.commit()


def _write(database: sqlite3.Connection, path: Path, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
    try:
        database.executemany(statement, rows)
    except sqlite3.Error as error:
        raise DataError(f"{path} cannot be sorted by picture ({one_line(error)})") from None


def elements(path: Path) -> Iterator[tuple[str, Any]]:
    """(name of the list, element) of every list at the top of a JSON object, one element in memory at a time.

    Raises DataError for a file that is not such an object, or breaks off.
    """
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig") as file:
        buffer, at, ended = "", 0, False

        def more() -> None:
            nonlocal buffer, at, ended
            part = file.read(max(CHUNK, len(buffer) - at))
            buffer, at, ended = buffer[at:] + part, 0, not part
            if len(buffer) > LONGEST:
                raise DataError(f"{path} has an element of more than {LONGEST:,} characters")

        def sign() -> str:
            """The next character that is no space; "" at the end."""
            nonlocal at
            while True:
                while at < len(buffer) and buffer[at] in " \t\r\n":
                    at += 1
                if at < len(buffer) or ended:
                    return buffer[at : at + 1]
                more()

        def value() -> Any:
            nonlocal at
            while True:
                try:
                    found, stop = decoder.raw_decode(buffer, at)
                    if stop < len(buffer) or ended:  # a number may go on in what is not read yet
                        at = stop
                        return found
                except ValueError as error:
                    if ended:
                        raise DataError(f"{path} is broken JSON, or breaks off ({one_line(error)})") from None
                more()

        def expect(*signs: str) -> str:
            nonlocal at
            found = sign()
            if found not in signs or not found:
                raise DataError(f"{path} is broken JSON: expected {' or '.join(signs)}, got {found or 'the end'!r}")
            at += 1
            return found

        try:
            expect("{")
            while True:
                if sign() == "}":
                    return
                name = value()
                expect(":")
                if sign() == "[":
                    at += 1
                    while sign() != "]":
                        yield name, value()
                        if sign() != "]":
                            expect(",")
                    at += 1
                else:
                    value()
                if expect(",", "}") == "}":
                    return
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 ({one_line(error)})") from None


def _from_pixels(width: float | None, height: float | None, name: str, x: float, y: float, w: float, h: float, crowd: int) -> Box:
    """COCO's box as shares of the picture; what stands over an edge by rounding is cut."""
    if not width or not height:
        raise DataError("the picture has boxes and no width or height")
    sides = (x / width, y / height, (x + w) / width, (y + h) / height)
    left, top, right, bottom = (min(max(side, 0.0), 1.0) for side in sides)
    return Box(name, left, top, right, bottom, crowd=bool(crowd))
