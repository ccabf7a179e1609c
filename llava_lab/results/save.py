"""Frozen dataclasses as one ``.npz`` file: arrays as arrays, everything else as JSON beside them.

`Saved` gives a result of arrays, names and numbers its ``save`` and ``load``; `split` and `join` take a
result apart and put it together, for those that hold several. No pickle, as everywhere.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np

from llava_lab.errors import DataError
from llava_lab.geometry import PictureMap

Result = TypeVar("Result")
FORMAT = 1  # raised when a saved file's meaning changes


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
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp gives 0600; a file is as readable as any other the user makes
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_npz(path: str | os.PathLike, kind: str, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Path:
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
        found = f"{header.get('kind')} of format {header.get('llava_lab')}"
        raise DataError(f"{path} holds a {found}; expected a {kind} of format {FORMAT}")
    return header, arrays


class Saved:
    """A result that is one file: `save` writes it, `load` gives it back exactly."""

    KIND: ClassVar[str]

    def save(self, path: str | os.PathLike) -> Path:
        return save_npz(path, self.KIND, *split(self))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        return join(cls, *load_npz(path, cls.KIND))


def split(result: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A result's fields as JSON and as arrays."""
    header: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for one in fields(result):
        value = getattr(result, one.name)
        if isinstance(value, np.ndarray):
            arrays[one.name] = value
        elif one.name == "targets":
            header["targets"] = [asdict(target) for target in value]
        else:
            header[one.name] = value.to_dict() if isinstance(value, PictureMap) else value
    return header, arrays


def join(cls: type[Result], header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Result:
    """The result that `split` took apart; lists that were tuples are tuples again."""
    found: dict[str, Any] = dict(arrays)
    for one in fields(cls):  # type: ignore[arg-type]
        if one.name in arrays:
            continue
        value = header[one.name]
        if one.name == "targets":
            value = tuple(_target(item) for item in value)
        elif one.type == "PictureMap":
            value = PictureMap.from_dict(value)
        elif str(one.type).startswith("tuple"):
            value = tuple(value)
        found[one.name] = value
    return cls(**found)


def _target(data: Mapping[str, Any]) -> Any:
    from llava_lab.results.run import Target  # it saves itself with this file

    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    return Target(**fields)
