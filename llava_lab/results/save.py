"""Results as files: a frozen dataclass is one ``.npz``, its arrays as arrays and everything else as JSON beside them.

`Saved` gives every result its ``save`` and ``load``, and how it shows itself: one short line, a table, and a dict for
JSON. What a field holds is read from its annotation (`llava_lab.results.schema`), so a result is written as a plain
dataclass and nothing more. No pickle, as everywhere.

A file is a stranger's until it was checked: its sizes against the file's own before anything is allocated, then every
field against its annotation. `whole_file` is how every file of this project is written.

    @dataclass(frozen=True)
    class Widths(Saved):
        KIND = "widths"
        values: Float64[np.ndarray, " widths"]
        model: str

    Widths(np.zeros(3), "tiny").save("widths.npz")
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import logging
import math
import os
import secrets
import sys
import time
import typing
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from llava_lab.checks import reading, regular_file, shown
from llava_lab.errors import DataError, OptionError, WriteError, one_line
from llava_lab.results.schema import check_arrays, from_json, hints_of, is_array, is_arrays
from llava_lab.results.table import Table, plain

log = logging.getLogger(__name__)

Result = TypeVar("Result")
FORMAT = 1  # raised when a saved file's meaning changes
# What a file may unpack to: a plain picture of the largest size that is read packs a thousandfold, and takes 268 MB.
UNPACKED, TIMES = 300_000_000, 64
HEADER = 16_000_000  # bytes of JSON; its lists take twenty times that in memory
ORPHANS = 10.0  # seconds that workers of a killed process may live on and hold its lock
SHORT = 100  # signs of a result's one line
UNTOLD = ("map", "fingerprint", "notes", "knows", "seconds", "options", "passes", "proof", "extras")  # not in that line


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path` to write to; on leaving it takes the place of `path`, on an error it is deleted.

    So `path` holds the old file or the whole new one, never half of it. Folders on the way are made. The
    temporary file is new and its name is chosen at random, so two writers never meet and no link is followed.
    Raises WriteError (one line; an OSError too) where the disk is full or does not allow it, or where `path` is
    a device, a pipe or a folder.

        with whole_file("scores.json") as temporary:
            temporary.write_text("{}")
    """
    path = _place(path)
    temporary = _new_beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except WriteError:
        raise
    except OSError as error:
        raise WriteError.of(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _place(path: Any) -> Path:
    try:
        return Path(path)
    except TypeError:
        raise WriteError(f"expected the path of a file to write, got {shown(path)}") from None


def _new_beside(path: Path) -> Path:
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is there and is no regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        # a long name stays within what a folder allows
        temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(6)}.part")
        # not by tempfile, which gives 0600: a file is as readable as any other the user makes, and reading the umask is not
        # safe while other threads write
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except (OSError, ValueError) as error:  # a ValueError is a name that no file can have
        raise WriteError.of(path, error) from error
    return temporary


def file_hash(path: str | os.PathLike) -> str:
    """The hash of a file's bytes, 32 hexadecimal digits; what a state file is held against before it is used."""
    with reading(Path(path)) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def write_hashes(note: Path, files: Sequence[Path]) -> None:
    """Keep the hashes of finished files in `note`, for `as_written`."""
    with whole_file(note) as temporary:
        temporary.write_text(json.dumps([file_hash(file) for file in files]), encoding="utf-8")


def as_written(note: Path, files: Sequence[Path]) -> bool:
    """Whether all `files` are there and are what `note` says; an empty note, as older versions left it, says nothing of them.

    A note of files that are not what they were is a warning in the log.
    """
    try:
        hashes = json.loads(note.read_text("utf-8") or "null")
        if all(file.is_file() for file in files) and hashes in (None, [file_hash(file) for file in files]):
            return True
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        pass
    log.warning("%s is damaged, or a file it speaks of is; they are made anew", note)
    return False


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
    GAPS: ClassVar[tuple[str, ...]] = ()  # fields whose floats may be missing (NaN) or infinite

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # a dataclass keeps the class's own __repr__; its generated one would print pages of arrays
        cls.__repr__ = Saved.__repr__  # type: ignore[method-assign]

    def save(self, path: str | os.PathLike) -> Path:
        """Write to one ``.npz`` file, whole or not at all; `load` gives it back exactly, without the model.

        Raises DataError for what `load` would refuse, as numbers that are not finite where they must be, WriteError where
        the disk does not allow it.
        """
        header, arrays = split(self)
        try:
            join(type(self), json.loads(json.dumps(header)), arrays)  # what `load` would refuse is not written
        except DataError as error:
            raise DataError(f"this {self.KIND} cannot be saved: {error}") from None
        except (TypeError, ValueError, RecursionError) as error:  # a set or an array among options, a circle
            raise DataError(f"this {self.KIND} cannot be saved ({one_line(error)})") from None
        return save_npz(path, self.KIND, header, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Read what `save` wrote. Raises DataError with one line on anything else."""
        header, arrays = load_npz(path, cls.KIND)
        try:
            return join(cls, header, arrays)
        except DataError as error:
            raise DataError(f"{path} is not a saved {cls.KIND}: {error}") from None

    def check(self) -> None:
        """What the annotations cannot say, asked after `load`. Raises DataError where numbers do not fit together."""

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
        return self.line()

    def line(self) -> str:
        """The result on one short line."""
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
        return f"<p><code>{html.escape(repr(self))}</code></p>{self.pictured()}{self.table()._repr_html_()}"

    def pictured(self) -> str:
        """The result as small pictures above its table, finished HTML (`llava_lab.results.table`); nothing for most."""
        return ""


def save_npz(path: str | os.PathLike, kind: str, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Path:
    """Write one result to `path`, whole or not at all."""
    text = json.dumps({"llava_lab": FORMAT, "kind": kind, **header}, ensure_ascii=False)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, header=np.frombuffer(text.encode(), np.uint8), **arrays)  # type: ignore[arg-type]
    path = _place(path)
    with whole_file(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return path


def load_npz(path: str | os.PathLike, kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read what `save_npz` wrote. Raises DataError with one line on anything else."""
    try:
        with reading(regular_file(path)) as raw, zipfile.ZipFile(raw) as archive:
            arrays = _read_arrays(archive, size=os.fstat(raw.fileno()).st_size)
        text = arrays.pop("header")
        if text.nbytes > HEADER:
            raise DataError(f"its header has {text.nbytes:,} bytes, more than {HEADER:,}")
        header = json.loads(text.tobytes().decode())
        if not isinstance(header, dict):
            raise DataError(f"its header is a {type(header).__name__}")
    except DataError as error:
        raise DataError(f"{path} is not a saved {kind}: {error}") from None
    except FileNotFoundError:
        raise DataError(f"no such file: {path}") from None
    except Exception as error:  # whatever a damaged archive makes zipfile, zlib, numpy and json raise
        raise DataError(f"{path} is not a saved {kind} ({one_line(error)})") from None
    if header.get("kind") != kind or header.get("llava_lab") != FORMAT:
        held = f"{header.get('kind')} of format {header.get('llava_lab')}"[:80]
        raise DataError(f"{path} holds a {held}; expected a {kind} of format {FORMAT}")
    return header, arrays


def _read_arrays(archive: zipfile.ZipFile, size: int) -> dict[str, np.ndarray]:
    """The arrays of an archive of `size` bytes, once what they say of themselves fits what is there."""
    members = archive.infolist()
    limit = max(UNPACKED, TIMES * size)
    if (total := sum(member.file_size for member in members)) > limit:
        raise DataError(f"its {size:,} bytes would unpack to {total:,}, more than {limit:,}")
    arrays: dict[str, np.ndarray] = {}
    for member in members:
        name = member.filename.removesuffix(".npy")
        if name in arrays or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"it holds {name!r} twice, or packed in a way that is not ours")
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read_head = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read_head(file)
            if math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
                raise DataError(f"{name} says it is {dtype} {shape}, and its size is another")
        with archive.open(member) as file:
            arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    return arrays


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
        elif is_arrays(hints_of(type(result))[field.name]):
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
    """The result that `split` took apart, checked. Raises DataError for a field that is missing or holds something else."""
    hints = hints_of(cls)
    header = cls.upgraded(header) if issubclass(cls, Saved) else header
    values: dict[str, Any] = {}
    for field in fields(cls):  # type: ignore[arg-type]
        hint, name = hints[field.name], _stored(field)
        if is_arrays(hint):
            values[field.name] = tuple(arrays[f"{name}_{n}"] for n in range(len(arrays)) if f"{name}_{n}" in arrays)
        elif is_array(hint) and name in arrays:
            values[field.name] = arrays[name]
        elif not is_array(hint) and name in header:
            values[field.name] = _join_inner(hint, header[name], name, arrays)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise DataError(f"it lacks {name!r}")
    result = cls(**values)
    check_arrays(result)
    if isinstance(result, Saved):
        result.check()
    return result


def _join_inner(hint: Any, value: Any, name: str, arrays: Mapping[str, np.ndarray]) -> Any:
    """A field of JSON; the results in a mapping have their arrays beside them."""
    parts = typing.get_args(hint)
    if not (typing.get_origin(hint) is dict and isinstance(parts[1], type) and issubclass(parts[1], Saved)):
        return from_json(hint, value, name)
    results = {}
    for number, (key, inner) in enumerate(from_json(dict[str, Any], value, name).items()):
        if not isinstance(inner, dict):
            raise DataError(f"{name}[{key!r}] must be a dict, got a {type(inner).__name__}")
        mark = f"{name}.{number}."
        own = {part.removeprefix(mark): array for part, array in arrays.items() if part.startswith(mark)}
        results[key] = join(parts[1], inner, own)
    return results


def _stored(field: Field) -> str:
    """The name a field has in the file, where that is not its own."""
    return field.metadata.get("stored", field.name)


def _as_json(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return [_as_json(item) for item in value] if isinstance(value, tuple) else value


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
    return shortened(value)


def shortened(value: Any, most: int = 60) -> str:
    """``repr`` of a value on at most so many signs."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 1] + "…"
