"""Results as files: a frozen dataclass is one ``.npz``, its arrays as arrays and everything else as JSON beside them.

`Saved` gives every result its ``save`` and ``load``, and how it shows itself: one short line, a table, and a dict for
JSON. What a field holds is read from its annotation, so a result is written as a plain dataclass and nothing more. No
pickle, as everywhere.

    @dataclass(frozen=True)
    class Widths(Saved):
        KIND = "widths"
        values: np.ndarray
        model: str

    Widths(np.zeros(3), "tiny").save("widths.npz")
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import os
import secrets
import sys
import time
import types
import typing
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from llava_lab.errors import DataError, OptionError
from llava_lab.results.table import Table, plain

Result = TypeVar("Result")
FORMAT = 1  # raised when a saved file's meaning changes
ORPHANS = 10.0  # seconds that workers of a killed process may live on and hold its lock
SHORT = 100  # signs of a result's one line
UNTOLD = ("map", "fingerprint", "notes", "seconds", "options", "passes", "proof", "extras")  # not in that line


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path` to write to; on leaving it takes the place of `path`, on an error it is deleted.

    So `path` holds the old file or the whole new one, never half of it. Folders on the way are made. The
    temporary file is new and its name is chosen at random, so two writers never meet and no link is followed.

        with whole_file("scores.json") as temporary:
            temporary.write_text("{}")
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    # not by tempfile, which gives 0600: a file is as readable as any other the user makes, and reading the umask is not
    # safe while other threads write
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_hash(path: str | os.PathLike) -> str:
    """The hash of a file's bytes, 32 hexadecimal digits; what a state file is held against before it is used."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@contextmanager
def only_writer(place: str | os.PathLike, *, folder: bool = True) -> Iterator[None]:
    """Inside the block nobody else works in the folder `place`, which is made then, or on the file with ``folder=False``.

    Raises OptionError that says who does: process, command and since when. The lock ends with the process, also when it
    is killed; its empty ``.lock`` file stays.

        with only_writer("runs/mine"):
            ...
    """
    place = Path(place)
    home, stem = (place, "") if folder else (place.parent, f".{place.name}")
    note = home / f"{stem}.writer"
    lock = FileLock(home / f"{stem}.lock", thread_local=False)
    try:
        home.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if _alive(note):
                raise
            lock.acquire(timeout=ORPHANS)
    except Timeout:
        raise OptionError(f"{place} is being written by {_writer(note)}; wait for it to end, or choose another place") from None
    except OSError as error:
        raise OptionError(f"cannot write in {home} ({error.strerror or error}); choose another place") from None
    try:
        now = {"pid": os.getpid(), "command": " ".join(sys.argv)[:200], "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with whole_file(note) as temporary:
            temporary.write_text(json.dumps(now), encoding="utf-8")
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def _read_writer(note: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(note.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return {}  # it has just begun, or just ended


def _writer(note: Path) -> str:
    known = _read_writer(note)
    return f"process {known['pid']} ({known['command']}), since {known['since']}" if known else "another process"


def _alive(note: Path) -> bool:
    """Whether the process that wrote `note` runs still; children that outlive it by seconds hold its lock as long."""
    pid = _read_writer(note).get("pid")
    if os.name != "posix" or not isinstance(pid, int):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


class Saved:
    """A result that is one file, and shows itself as a line, a table or JSON."""

    KIND: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # a dataclass keeps the class's own __repr__; its generated one would print pages of arrays
        cls.__repr__ = Saved.__repr__  # type: ignore[method-assign]

    def save(self, path: str | os.PathLike) -> Path:
        """Write to one ``.npz`` file, whole or not at all; `load` gives it back exactly, without the model."""
        return save_npz(path, self.KIND, *split(self))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Read what `save` wrote. Raises DataError with one line on anything else."""
        header, arrays = load_npz(path, cls.KIND)
        try:
            return join(cls, header, arrays)
        except KeyError as error:
            raise DataError(f"{path} is not a saved {cls.KIND}: it lacks {error}") from None

    @classmethod
    def upgraded(cls, header: dict[str, Any]) -> dict[str, Any]:
        """The header of an older file with what was not kept then."""
        return header

    def table(self) -> Table:
        """The result as rows with headings; ``str()`` of it is what the command line prints."""
        rows = ((field.name, _short(getattr(self, field.name))) for field in fields(self))  # type: ignore[arg-type]
        return Table(("field", "value"), tuple(rows))

    def to_dict(self) -> dict[str, Any]:
        """The result ready for JSON, as ``--json`` prints it where a command does."""
        return {field.name: plain(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]

    def __repr__(self) -> str:
        parts: list[str] = []
        # arrays last: where there is room
        named = [(field, getattr(self, field.name)) for field in fields(self)]  # type: ignore[arg-type]
        for field, value in sorted(named, key=lambda pair: isinstance(pair[1], np.ndarray)):
            empty = value is None or (isinstance(value, (tuple, dict)) and not value)
            part = f"{field.name}={_short(value)}"
            if field.name not in UNTOLD and not empty and len(", ".join([*parts, part])) <= SHORT:
                parts.append(part)
        return f"{type(self).__name__}({', '.join(parts)})"

    def _repr_html_(self) -> str:
        return f"<p><code>{html.escape(repr(self))}</code></p>{self.table()._repr_html_()}"


def save_npz(path: str | os.PathLike, kind: str, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Path:
    """Write one result to `path`, whole or not at all."""
    path = Path(path)
    text = json.dumps({"llava_lab": FORMAT, "kind": kind, **header}, ensure_ascii=False)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, header=np.frombuffer(text.encode(), np.uint8), **arrays)  # type: ignore[arg-type]
    with whole_file(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return path


def load_npz(path: str | os.PathLike, kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read what `save_npz` wrote. Raises DataError with one line on anything else."""
    try:
        with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(arrays.pop("header").tobytes().decode())
    except FileNotFoundError:
        raise DataError(f"no such file: {path}") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not a saved {kind} ({type(error).__name__}: {error})") from None
    if header.get("kind") != kind or header.get("llava_lab") != FORMAT:
        held = f"{header.get('kind')} of format {header.get('llava_lab')}"
        raise DataError(f"{path} holds a {held}; expected a {kind} of format {FORMAT}")
    return header, arrays


def split(result: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A result's fields as JSON and as arrays.

    An array is stored under its field's name. Several arrays in a tuple are numbered, ``view_0``; the results in a
    mapping too, ``maps.0.values``. Empty `views` are left out, as before there were any.
    """
    header: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for field in fields(result):
        value, name = getattr(result, field.name), _stored(field)
        if isinstance(value, np.ndarray):
            arrays[name] = value
        elif _of_arrays(_hints(type(result))[field.name]):
            arrays |= {f"{name}_{number}": array for number, array in enumerate(value)}
        elif isinstance(value, dict) and any(isinstance(item, Saved) for item in value.values()):
            header[name] = {}
            for number, (key, item) in enumerate(value.items()):
                header[name][key], inner = split(item)
                arrays |= {f"{name}.{number}.{part}": array for part, array in inner.items()}
        elif value or field.name != "views":
            header[name] = _as_json(value)
    return header, arrays


def join(cls: type[Result], header: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Result:
    """The result that `split` took apart. Raises KeyError for a field that is missing and has no default."""
    hints = _hints(cls)
    header = cls.upgraded(header) if issubclass(cls, Saved) else header
    values: dict[str, Any] = {}
    for field in fields(cls):  # type: ignore[arg-type]
        hint, name = hints[field.name], _stored(field)
        if name in arrays:
            values[field.name] = arrays[name]
        elif _of_arrays(hint):
            values[field.name] = tuple(arrays[f"{name}_{n}"] for n in range(len(arrays)) if f"{name}_{n}" in arrays)
        elif name in header:
            values[field.name] = _from_json(hint, header[name], name, arrays)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise KeyError(name)
    return cls(**values)


def _stored(field: Field) -> str:
    """The name a field has in the file, where that is not its own."""
    return field.metadata.get("stored", field.name)


def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _of_arrays(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple and np.ndarray in typing.get_args(hint)


def _as_json(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return [_as_json(item) for item in value] if isinstance(value, tuple) else value


def _from_json(hint: Any, value: Any, name: str = "", arrays: Mapping[str, np.ndarray] = types.MappingProxyType({})) -> Any:
    """A value of JSON as its annotation says: lists that were tuples are tuples again, dicts that were dataclasses too."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and value is not None:
        kinds = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return tuple(_from_json(kind, item) for kind, item in zip(kinds, value, strict=True))
    if origin is dict and isinstance(parts[1], type) and issubclass(parts[1], Saved):
        kind, results = parts[1], {}
        for number, (key, inner) in enumerate(value.items()):
            mark = f"{name}.{number}."
            own = {part.removeprefix(mark): array for part, array in arrays.items() if part.startswith(mark)}
            results[key] = join(kind, inner, own)
        return results
    if origin is dict:
        return {key: _from_json(parts[1], item) for key, item in value.items()}
    if is_dataclass(hint) and isinstance(value, dict):
        hints = _hints(typing.cast(type, hint))
        return typing.cast(type, hint)(**{key: _from_json(hints[key], item) for key, item in value.items()})
    return value


def _short(value: Any) -> str:
    """A field's value in a few signs."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple) and value and is_dataclass(value[0]):
        names = [getattr(item, "text", getattr(item, "name", "")) for item in value[:3]]
        return f"({', '.join(map(repr, names))}{', …' if len(value) > 3 else ''})"
    if isinstance(value, dict) and any(isinstance(item, Saved) for item in value.values()):
        return f"({', '.join(value)})"
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
