"""Families of tests of which a few telling members run by default; the others are `long` (`run.py test --all`, and CI)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def family(
    names: str | tuple[str, ...], members: Iterable[Any], *, quick: int | Collection[Any], ids: Any = None
) -> pytest.MarkDecorator:
    """`pytest.mark.parametrize` whose members are long but for the `quick` ones.

        @family("name", METHODS, quick=("rollout", "occlusion"))
        @family("value", NO_PATCHES, quick=4)

    Members are named by their id or by the first of their values; a number takes so many, spread from the first to the last.
    """
    several = not isinstance(names, str) or "," in names
    whole = [one if isinstance(one, type(pytest.param())) else _param(one, several) for one in members]
    if isinstance(quick, int):
        last = max(quick - 1, 1)
        kept = {i * (len(whole) - 1) // last for i in range(quick)}
        absent: set[Any] = set()
    else:
        kept = {place for place, one in enumerate(whole) if any(_is(one, name) for name in quick)}
        absent = {name for name in quick if not any(_is(one, name) for one in whole)}
    assert not absent, f"no such members: {absent}"
    marked = [
        one if place in kept else pytest.param(*one.values, id=one.id, marks=[*one.marks, pytest.mark.long])
        for place, one in enumerate(whole)
    ]
    return pytest.mark.parametrize(names, marked, ids=ids)


def _param(member: Any, several: bool) -> Any:
    return pytest.param(*member) if several else pytest.param(member)


def _is(member: Any, name: Any) -> bool:
    """Never compares an array, whose equality is no truth."""
    return any(type(one) is type(name) and one == name for one in (member.id, member.values[0]))
