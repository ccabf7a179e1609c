"""Saved results as accidents and strangers leave them: seeded changes of a good file, each of one kind."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 10**9, 2**63, 10**400, 0.5, float("nan"), float("inf"), -1e300, 1e-300),
    *("", "x", "\ud800", "\0", "<image>", [], [[]], [1, 2], ["a"], {}, {"a": 1}, [[[[]]]] * 3),
)
DEEP = "[" * 100_000 + "]" * 100_000


def unpacked(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A file's header and arrays, read without our reader."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    return json.loads(arrays.pop("header").tobytes()), arrays


def packed(header: Any, arrays: dict[str, np.ndarray]) -> bytes:
    """A file of a header, given as JSON's text where it is a str, and arrays."""
    text = header if isinstance(header, str) else json.dumps(header)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, header=np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8), **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def changes(path: Path, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """`count` changed files of the good one at `path`, each with what was done."""
    rng, whole = np.random.default_rng(seed), path.read_bytes()
    for number in range(count):
        header, arrays = unpacked(path)
        way = number % 6
        if way < 3 or not arrays:
            yield f"header {_change_json(header, rng)}", packed(header, arrays)
        elif way < 5:
            yield f"array {_change_array(arrays, rng)}", packed(header, arrays)
        else:
            raw = bytearray(whole)
            for at in rng.integers(0, len(raw), rng.integers(1, 9)):
                raw[at] = rng.integers(256)
            yield "bytes", bytes(raw[: rng.integers(len(raw))] if rng.random() < 0.3 else raw)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) within a value of JSON."""
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()):
        yield value, key
        yield from _places(item)


def _change_json(header: dict[str, Any], rng: np.random.Generator) -> str:
    places = [(inside, key) for inside, key in _places(header) if inside is not header or key not in ("kind", "llava_lab")]
    inside, key = places[rng.integers(len(places))]
    if rng.random() < 0.15:
        del inside[key]
        return f"without {key!r}"
    inside[key] = VALUES[rng.integers(len(VALUES))]
    return f"{key!r}: {inside[key]!r}"[:80]


def _change_array(arrays: dict[str, np.ndarray], rng: np.random.Generator) -> str:
    name = list(arrays)[rng.integers(len(arrays))]
    array = arrays[name]
    if array.dtype.kind in "fiu" and array.size:
        worst = np.array([np.nan, np.inf, -1e30, 1e30] if array.dtype.kind == "f" else [-1, 0, 127, -128])
        with np.errstate(all="ignore"):
            array.flat[rng.integers(array.size)] = worst[rng.integers(4)].astype(array.dtype)
        spoilt = array
    else:
        spoilt = ~array if array.dtype == bool else array[..., :0]
    ways: list[Any] = [
        *(spoilt, array[..., :-1], array[:0], array[None], array.ravel(), array[..., None], np.zeros((), array.dtype)),
        *(np.concatenate([array, array]) if array.ndim else array, array.astype(str), np.zeros(array.shape, complex)),
        *(
            array.astype(array.dtype.newbyteorder(">")),
            np.zeros(array.shape, "V4"),
            np.zeros(array.shape, bool),
            np.zeros(array.shape),
        ),
    ]
    number = int(rng.integers(len(ways) + 1))
    if number == len(ways):
        del arrays[name]
        return f"without {name}"
    arrays[name] = ways[number]
    return f"{name}: {ways[number].dtype} {ways[number].shape}, way {number}"


def hostile(path: Path) -> Iterator[tuple[str, bytes]]:
    """Files that would take the reader's time or memory, from a good one."""
    header, arrays = unpacked(path)
    name = next(iter(arrays))
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (7 << 40,)})
    yield "an array of 28 TiB", _archive(path, {f"{name}.npy": head.getvalue()})
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    yield "a pickle", _archive(path, {f"{name}.npy": head.getvalue() + b"cos\nsystem\n(S'true'\ntR."})
    yield "a file that unpacks to 2.5 GB", _swollen(_archive(path, {"more.npy": b"\0" * 1000}), 2_500_000_000)
    yield "an unknown way of packing", _archive(path, {}, zipfile.ZIP_BZIP2)
    yield "a name twice", _archive(path, {f"{name}": b"x"})
    yield "no header", _archive(path, {"header.npy": None})
    yield "a header of lists", packed(DEEP, arrays)
    yield "a header of a million digits", packed('{"a": ' + "9" * 1_000_000 + "}", arrays)
    yield "options nested deep", packed(header | {"options": json.loads("[" * 500 + "]" * 500)}, arrays)
    yield "a header that is a list", packed([], arrays)
    yield "a header in UTF-16", packed(json.dumps(header).encode("utf-16").decode("latin-1"), arrays)
    yield "another version", packed(header | {"llava_lab": 99}, arrays)
    yield "nothing", b""
    yield "an array alone", head.getvalue()


def _archive(path: Path, changed: dict[str, bytes | None], packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    with zipfile.ZipFile(path) as archive:
        members: dict[str, bytes | None] = {name: archive.read(name) for name in archive.namelist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packing) as archive:
        for name, raw in (members | changed).items():
            if raw is not None:
                archive.writestr(name, raw)
    return buffer.getvalue()


def _swollen(raw: bytes, size: int) -> bytes:
    """The archive with the last member's size declared as `size`, in both places where it stands."""
    local, central = raw.rindex(b"PK\3\4"), raw.rindex(b"PK\1\2")
    changed = bytearray(raw)
    changed[local + 22 : local + 26] = changed[central + 24 : central + 28] = struct.pack("<I", size)
    return bytes(changed)
