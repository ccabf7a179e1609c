"""What a result's fields may hold, read from their annotations: the types of JSON, the dtypes and axes of arrays.

An array's annotation says its dtype and names its axes, ``Float32[np.ndarray, "targets rows cols"]``. An axis named like a
tuple, a dict or a whole number of the same result has as many entries as that; ``rows``, ``cols`` and ``patches`` are those
of its `map`; a number is itself and ``_`` any number. Other names have one size within a result. Another width of the same
kind of number is taken (float64 for float32). ``Shaped`` is text.

A field whose floats may be missing or infinite is named in the class's ``GAPS``; all others are finite.

What no annotation can say, a dataclass says in its method ``check``, which is asked when it was read from a file.

    check_arrays(result)  # DataError where an array is not what its annotation says
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import AbstractArray

from llava_lab.errors import DataError, OptionError

DEEPEST = 32  # levels of lists and dicts in what may hold anything
LARGEST = 2**63  # whole numbers beyond it belong to no count, seed or position


def hints_of(kind: Any) -> dict[str, Any]:
    """The annotations of a dataclass's fields, resolved."""
    return _resolved(kind)


@cache
def _resolved(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def is_array(hint: Any) -> bool:
    """Whether an annotation is an array's."""
    return hint is np.ndarray or (isinstance(hint, type) and issubclass(hint, AbstractArray))


def is_arrays(hint: Any) -> bool:
    """Whether an annotation is a tuple's of arrays."""
    return typing.get_origin(hint) is tuple and is_array(typing.get_args(hint)[0])


def from_json(hint: Any, value: Any, where: str) -> Any:
    """A value of JSON as its annotation says: lists that were tuples are tuples again, dicts that were dataclasses too.

    Raises DataError that names `where` for a value the annotation does not allow.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _anything(value, where)
    if origin is typing.Literal:
        if value not in parts:
            raise DataError(f"{where} must be one of {', '.join(map(repr, parts))}, got {_seen(value)}")
        return value
    if origin is tuple:
        values = _of(list, value, where)
        kinds = parts[:1] * len(values) if parts[-1] is Ellipsis else parts
        if len(kinds) != len(values):
            raise DataError(f"{where} must have {len(kinds)} entries, got {len(values)}")
        return tuple(from_json(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, values, strict=True)))
    if origin is dict:
        items = _of(dict, value, where).items()
        return {_text(key, where): from_json(parts[1], item, f"{where}[{key!r}]"[:80]) for key, item in items}
    if is_dataclass(hint):
        return _of_class(typing.cast(type, hint), _of(dict, value, where), where)
    if hint is str:
        return _text(_of(str, value, where), where)
    if hint is bool:
        return _of(bool, value, where)
    assert hint in (int, float), f"{where} is annotated with {hint}, which no file can hold"
    return _number(value, where, (int,) if hint is int else (int, float))


def check_arrays(result: Any) -> None:
    """Raise DataError where an array has another dtype or shape than its annotation says, or numbers that are not finite."""
    sizes = dict(_sizes(result))
    for name, hint, array in _arrays(result):
        _check_dtype(array, hint, name)
        _check_shape(array, hint, name, sizes)
    check_finite(result)


def check_finite(result: Any) -> None:
    """Raise DataError for a float array with NaN or infinity in it that the class does not name in its ``GAPS``."""
    for name, _, array in _arrays(result):
        if array.dtype.kind == "f" and name not in result.GAPS and (wrong := int((~np.isfinite(array)).sum())):
            raise DataError(f"{name} must be finite numbers, got {wrong} of {array.size} that are not")


def within(name: str, values: Any, start: int, stop: int) -> None:
    """Raise DataError where one of `values` is not from `start` up to but without `stop`."""
    values = np.asarray(values)
    if values.size and not (start <= values.min() and values.max() < stop):
        raise DataError(f"{name} must lie from {start} to {stop - 1}, got {values.min()} to {values.max()}")


def filled(**values: Any) -> None:
    """Raise DataError where one of `values` is empty."""
    for name, value in values.items():
        if not len(value):
            raise DataError(f"{name} must not be empty")


def place_of(what: str, name: str, names: tuple[str, ...]) -> int:
    """Where a name stands among those of a result. Raises OptionError for one that is not there."""
    if name not in names:
        raise OptionError(f"no {what} {name!r} here; there is {', '.join(names)}")
    return names.index(name)


def _of_class(kind: type, value: dict[str, Any], where: str) -> Any:
    hints = hints_of(kind)
    if unknown := sorted(value.keys() - hints.keys()):
        raise DataError(f"{where} has {unknown[0]!r}, which a {kind.__name__} has not")
    for field in fields(kind):
        if field.name not in value and field.default is MISSING and field.default_factory is MISSING:
            raise DataError(f"{where} lacks {field.name!r}")
    made = kind(**{name: from_json(hints[name], item, f"{where}.{name}") for name, item in value.items()})
    if hasattr(made, "check"):
        made.check()
    return made


def _anything(value: Any, where: str, depth: int = 0) -> Any:
    """`value` if it is plain JSON that can be shown and written again."""
    if depth > DEEPEST:
        raise DataError(f"{where} is nested more than {DEEPEST} levels deep")
    if isinstance(value, dict):
        for key, item in value.items():
            _anything(item, f"{where}[{_text(key, where)!r}]"[:80], depth + 1)
    elif isinstance(value, list):
        for item in value:
            _anything(item, where, depth + 1)
    elif isinstance(value, str):
        _text(value, where)
    elif value is not None and not isinstance(value, bool):
        _number(value, where, (int, float))
    return value


def _number(value: Any, where: str, kinds: tuple[type, ...]) -> Any:
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise DataError(f"{where} must be a {'whole ' if float not in kinds else ''}number, got {_seen(value)}")
    if isinstance(value, int) and abs(value) >= LARGEST:
        raise DataError(f"{where} must be a number below 2**63, got one of {value.bit_length()} bits")
    return value


def _text(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where} holds text that is no Unicode (half a surrogate pair)") from None
    return value


def _of(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, kind):
        raise DataError(f"{where} must be a {kind.__name__}, got {_seen(value)}")
    return value


def _seen(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"[:60]


def _arrays(result: Any) -> Iterator[tuple[str, Any, np.ndarray]]:
    """Every array of a result with its field's name and its annotation."""
    for name, hint in hints_of(type(result)).items():
        if is_array(hint):
            yield name, hint, getattr(result, name)
        elif is_arrays(hint):
            yield from ((name, typing.get_args(hint)[0], array) for array in getattr(result, name))


def _sizes(result: Any) -> Iterator[tuple[str, int]]:
    """Axes whose size other fields say."""
    for name, hint in hints_of(type(result)).items():
        value = getattr(result, name)
        if isinstance(value, (tuple, dict)) and not is_arrays(hint):
            yield name, len(value)
        elif hint is int:
            yield name, value
    grid = getattr(result, "map", result)
    if hasattr(grid, "cols"):
        yield from (("rows", grid.rows), ("cols", grid.cols), ("patches", grid.rows * grid.cols))


def _check_dtype(array: np.ndarray, hint: Any, name: str) -> None:
    names = getattr(hint, "dtypes", None)
    if not isinstance(names, (tuple, list)):
        fine, wanted = array.dtype.kind == "U", "text"
    else:
        want = np.dtype(names[0])
        fine, wanted = array.dtype.kind == want.kind and array.dtype.itemsize <= max(8, want.itemsize), want.name
        fine &= want.kind != "u" or array.dtype == want
    if not fine or not array.dtype.isnative:
        raise DataError(f"{name} must be {wanted}, got {array.dtype.str}")
    if array.dtype.kind == "U":
        try:
            _text("".join(array.ravel().tolist()), name)
        except ValueError:
            raise DataError(f"{name} holds text that is no Unicode") from None


def _check_shape(array: np.ndarray, hint: Any, name: str, sizes: dict[str, int]) -> None:
    axes = hint.dim_str.split()
    wanted = [int(axis) if axis.isdecimal() else None if axis == "_" else sizes.get(axis) for axis in axes]
    if len(axes) != array.ndim or any(want not in (None, has) for want, has in zip(wanted, array.shape, strict=True)):
        shape = ", ".join(f"{axis} {want}" if want is not None and not axis.isdecimal() else axis
                          for axis, want in zip(axes, wanted, strict=True))  # fmt: skip
        raise DataError(f"{name} must be ({shape}), got {array.shape}")
    sizes |= {axis: size for axis, size in zip(axes, array.shape, strict=True) if not axis.isdecimal() and axis != "_"}
