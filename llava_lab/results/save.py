"""Frozen dataclasses as one ``.npz`` file: arrays as arrays, everything else as JSON beside them.

`Saved` gives a result of arrays, names and numbers its ``save`` and ``load``; `split` and `join` take a
result apart and put it together, for those that hold several. No pickle, as everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np

from llava_lab.geometry import PictureMap
from llava_lab.results.run import Target, load_npz, save_npz

Result = TypeVar("Result")


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


def _target(data: Mapping[str, Any]) -> Target:
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    return Target(**fields)
