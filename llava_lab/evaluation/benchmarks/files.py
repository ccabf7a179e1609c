"""Benchmarks' files as their authors publish them: each value is checked where it is read, each error names file and row.

rows = read_lines(only(data, "coco_pope_random.json"))
"""

from __future__ import annotations

import csv
import json
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from llava_lab.checks import reading, regular_file
from llava_lab.errors import DataError, one_line
from llava_lab.models.pictures import read_picture
from llava_lab.results import whole_file

ENDINGS = ("", ".jpg", ".png", ".jpeg")
# what pandas, with which LLaVA reads tables, takes for an empty cell
EMPTY = frozenset(
    {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL"}
    | {"NaN", "None", "n/a", "nan", "null"}
)


class Row(Mapping[str, Any]):
    """One row with its place: what it lacks, or holds in another form, is said with file and row."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise DataError(f"{where}: expected an object with named values, got {type(values).__name__}")
        self.values_, self.where = values, where

    def __getitem__(self, name: str) -> Any:
        if name not in self.values_:
            raise DataError(f"{self.where}: lacks {name!r}; it has {', '.join(map(str, list(self.values_)[:12])) or 'nothing'}")
        return self.values_[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)

    def __contains__(self, name: object) -> bool:
        return name in self.values_

    def get(self, name: str, default: Any = None) -> Any:
        """A value that may be missing."""
        return self.values_.get(name, default)

    def text(self, name: str) -> str:
        """A value that is text and not blank."""
        value = self[name]
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{self.where}: {name!r} must be text, got {value!r}"[:300])
        return value

    def texts(self, name: str) -> list[str]:
        """A value that is a list of texts."""
        value = self[name]
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise DataError(f"{self.where}: {name!r} must be a list of texts, got {value!r}"[:300])
        return value

    def one_of(self, name: str, choices: Sequence[Any]) -> Any:
        """A value that is one of `choices`."""
        if self[name] not in choices:
            raise DataError(f"{self.where}: {name!r} must be one of {', '.join(map(repr, choices))}, got {self[name]!r}"[:300])
        return self[name]

    def refuse(self, why: str) -> DataError:
        """The error for whatever else is wrong with it."""
        return DataError(f"{self.where}: {why}"[:400])


def only(data: Path, *patterns: str) -> Path:
    """`data` itself if it is a file, else the one file in it that matches the first pattern that any does.

    Raises DataError that says what is missing, or which files could be meant.
    """
    if not data.is_dir():
        if not data.exists():
            raise DataError(f"no such file or folder: {data}")
        return regular_file(data)
    for pattern in patterns:
        found = sorted(path for path in data.glob(pattern) if path.is_file())
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise DataError(f"{data} holds {len(found)} files that may be meant ({names}); give the file itself")
        if found:
            return found[0]
    raise DataError(f"{data} holds no {' or '.join(patterns)}")


def maybe(data: Path, *patterns: str) -> Path | None:
    """As `only`, and None where there is no such file."""
    folder = data if data.is_dir() else data.parent
    return only(folder, *patterns) if any(any(folder.glob(pattern)) for pattern in patterns) else None


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """A file that is not there, or is no `what`, as one line of ours."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"no such file: {path}") from None
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"{path} is not {what} ({one_line(error)})") from None


def read_json(path: Path) -> Any:
    """A whole JSON file."""
    with _reading(path, "JSON"):
        return json.loads(regular_file(path).read_text("utf-8-sig"))


def read_object(path: Path) -> Row:
    """A JSON file of named values."""
    return Row(read_json(path), str(path))


def rows_of(path: Path, values: Any) -> list[Row]:
    """A list from a JSON file as rows."""
    if not isinstance(values, list) or not values:
        raise DataError(f"{path}: expected a list of rows, got {type(values).__name__ if values else 'nothing'}")
    return [Row(value, f"{path} row {number}") for number, value in enumerate(values, 1)]


def read_lines(path: Path) -> list[Row]:
    """A file with one JSON object a line, blank lines left out."""
    rows = []
    with _reading(path, "text"):
        lines = regular_file(path).read_text("utf-8-sig").split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path} row {number}: not a JSON object ({one_line(error)})") from None
            rows.append(Row(value, f"{path} row {number}"))
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows


def read_table(path: Path) -> list[Row]:
    """A table with tabs and a line of headings; empty cells, in all the spellings that pandas knows, are None."""
    limit = csv.field_size_limit(sys.maxsize)  # a cell may hold a picture
    try:
        with _reading(path, "a table with tabs"), reading(regular_file(path), "r", encoding="utf-8-sig", newline="") as file:
            read = list(csv.DictReader(file, delimiter="\t"))
    finally:
        csv.field_size_limit(limit)
    if not read:
        raise DataError(f"{path} holds no rows")
    rows = []
    for number, cells in enumerate(read, 1):
        if None in cells or None in cells.values():
            raise DataError(f"{path} row {number}: has {len(cells)} cells, expected one for each heading")
        rows.append(Row({name: None if cell in EMPTY else cell for name, cell in cells.items()}, f"{path} row {number}"))
    return rows


class Pictures:
    """Where a benchmark's pictures lie; a picture that comes again is read by the same function, so that it is read once."""

    def __init__(self, *folders: Path) -> None:
        self.folders = [folder for folder in folders if folder.is_dir()]
        self.looked = folders
        self._readers: dict[Path, Callable[[], np.ndarray]] = {}

    def find(self, row: Row, *names: str) -> Callable[[], np.ndarray]:
        """How to read the first of `names`, with or without an ending, that a folder holds. Raises DataError."""
        for folder in self.folders:
            for path in (folder / f"{name}{ending}" for name in names for ending in ENDINGS):
                if path.is_file():
                    return self._readers.setdefault(path, partial(read_picture, path))
        raise row.refuse(f"no picture {' or '.join(names)} in {' or '.join(map(str, self.looked))}")


def write_json(path: Path, value: Any, *, lines: bool = False, indent: int | None = None) -> None:
    """JSON as one value or one a line, whole or not at all."""
    text = "".join(json.dumps(row) + "\n" for row in value) if lines else json.dumps(value, indent=indent)
    with whole_file(path) as temporary:
        temporary.write_text(text, "utf-8")


# -- one sheet of a workbook, which MMBench's server takes and nothing else ------------------

_PART = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006"
_SHEET = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_KIND = "application/vnd.openxmlformats-officedocument.spreadsheetml"
_BOOK = {
    "[Content_Types].xml": f'<Types xmlns="{_PACKAGE}/content-types">'
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Default Extension="xml" ContentType="application/xml"/>'
    f'<Override PartName="/xl/workbook.xml" ContentType="{_KIND}.sheet.main+xml"/>'
    f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{_KIND}.worksheet+xml"/></Types>',
    "_rels/.rels": f'<Relationships xmlns="{_PACKAGE}/relationships">'
    f'<Relationship Id="rId1" Type="{_OFFICE}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
    "xl/workbook.xml": f'<workbook xmlns="{_SHEET}" xmlns:r="{_OFFICE}"><sheets>'
    '<sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>',
    "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{_PACKAGE}/relationships">'
    f'<Relationship Id="rId1" Type="{_OFFICE}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
}


def write_workbook(path: Path, headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """An .xlsx file with one sheet: whole numbers as numbers, text as text, None as an empty cell."""

    def cell(value: Any) -> str:
        if value is None:
            return "<c/>"
        if isinstance(value, int):
            return f"<c><v>{value}</v></c>"
        clean = "".join(sign for sign in str(value) if sign in "\t\n" or sign >= " ")
        return f'<c t="inlineStr"><is><t xml:space="preserve">{escape(clean)}</t></is></c>'

    lines = "".join(f"<row>{''.join(map(cell, row))}</row>" for row in [headings, *rows])
    sheet = f'<worksheet xmlns="{_SHEET}"><sheetData>{lines}</sheetData></worksheet>'
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as book:
        for name, part in {**_BOOK, "xl/worksheets/sheet1.xml": sheet}.items():
            book.writestr(name, _PART + part)
