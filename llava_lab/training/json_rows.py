"""Where each row of a LLaVA data file begins and ends, found without reading the file into memory.

Two forms: a JSON list, as LLaVA ships its data, and JSON lines. Rows are byte ranges, so that a file of
any length costs one buffer; what stands inside a row is not looked at here, only brackets and quotation
marks are counted. A broken row therefore does not hide its neighbours, unless a bracket itself is missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from llava_lab.errors import DataError

CHUNK = 1 << 20  # bytes read at a time

_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["{}\[\]]', re.DOTALL)  # a whole string, or one mark
_SPACE = b" \t\r\n"


def row_spans(path: Path) -> Iterator[tuple[int, int]]:
    """(first byte, byte after the last) of every row, in order.

    Raises DataError for a file that is missing, empty, of neither form, or that ends inside a row.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"cannot read the data file {path} ({error.strerror or error})") from None
    with file:
        head = file.read(CHUNK).lstrip(b"\xef\xbb\xbf" + _SPACE)[:1]
        file.seek(0)
        if head == b"[":
            yield from _listed(file, path)
        elif head == b"{" or path.suffix == ".jsonl":
            yield from _lines(file)
        else:
            raise DataError(f"{path} is neither a JSON list nor JSON lines; expected LLaVA's format, a list of conversations")


def _lines(file: BinaryIO) -> Iterator[tuple[int, int]]:
    start = 0
    for line in file:
        stop = start + len(line)
        if line.strip(_SPACE):
            yield start, stop
        start = stop


def _listed(file: BinaryIO, path: Path) -> Iterator[tuple[int, int]]:
    buffer, base, at = b"", 0, 0  # `base` is the byte of the file at which `buffer` begins
    depth, start, row = 0, 0, 0
    while chunk := file.read(CHUNK):
        buffer, base, at = buffer[at:] + chunk, base + at, 0
        for token in _TOKEN.finditer(buffer):
            mark = token.group()
            if mark == b'"':  # a string that goes on in the next chunk
                at = token.start()
                break
            if depth == 1 and mark not in (b"]", b"}"):
                _refuse_between(buffer[at : token.start()], path, row)
                start = base + token.start()
            at = token.end()
            depth += (mark in (b"{", b"[")) - (mark in (b"}", b"]"))
            if depth == 1 and mark != b"[":  # a row's last mark; the list's own opening is none
                yield start, base + token.end()
                row += 1
    if depth != 0:
        raise DataError(f"{path} ends inside row {row}: a bracket or a quotation mark of that row, or the list's own, is missing")


def _refuse_between(between: bytes, path: Path, row: int) -> None:
    if odd := between.strip(_SPACE + b","):
        raise DataError(f"{path} has {odd[:30]!r} before row {row}; expected a list of rows like {{...}}, {{...}}")
