"""What a value in a manifest may be; every check names the place, and refuses with InputError."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

from ..data.errors import InputError

_HEX = re.compile(r"[0-9a-f]+")
_WORD = re.compile(r"[\w.+:\- ]{1,64}", re.ASCII)
_SETTING = re.compile(r"[A-Za-z0-9_.\-]{0,64}")
_NUMBER = 1 << 31
_ITEMS = 4096
_DEPTH = 3

Check = Callable[[Any, str], Any]


def refuse(place: str, value: Any, allowed: str) -> InputError:
    """The error for a value that is not allowed."""
    shown = repr(value)
    return InputError(f"{place}: {shown if len(shown) <= 60 else shown[:60] + '...'} is refused; allowed: {allowed}")


def fields(value: Any, place: str, allowed: Collection[str]) -> dict[str, Any]:
    """An object with exactly these keys."""
    if not isinstance(value, dict):
        raise refuse(place, value, "an object")
    for name in sorted(value.keys() ^ set(allowed)):
        state = "is missing" if name in allowed else "does not belong there"
        raise InputError(f"{place}: {name[:60]!r} {state}; it is refused, ask for what tlfast offsite wrote")
    return value


def whole(low: int, high: int) -> Check:
    """Integers from low to high."""

    def check(value: Any, place: str) -> int:
        if type(value) is not int or not low <= value <= high:
            raise refuse(place, value, f"a whole number from {low} to {high}")
        return value

    return check


def hexadecimal(digits: int) -> Check:
    """Text of so many hexadecimal digits."""

    def check(value: Any, place: str) -> str:
        if not isinstance(value, str) or len(value) != digits or not _HEX.fullmatch(value):
            raise refuse(place, value, f"{digits} hexadecimal digits")
        return value

    return check


def word(value: Any, place: str) -> str:
    """A short text: a version, a recipe."""
    if not isinstance(value, str) or not _WORD.fullmatch(value):
        raise refuse(place, value, "at most 64 letters, digits and . _ + : -")
    return value


def one_of(*names: Any) -> Check:
    """One of these values."""

    def check(value: Any, place: str) -> Any:
        if not any(type(value) is type(name) and value == name for name in names):
            raise refuse(place, value, ", ".join(map(str, names)))
        return value

    return check


def listed(check: Check, most: int = _ITEMS) -> Check:
    """A list of at most `most` values, each of which passes `check`."""

    def run(value: Any, place: str) -> list[Any]:
        if not isinstance(value, list) or len(value) > most:
            raise refuse(place, value, f"a list of at most {most}")
        return [check(item, f"{place}[{i}]") for i, item in enumerate(value)]

    return run


def number(value: Any, place: str) -> float:
    """A finite number."""
    if type(value) not in (int, float) or not abs(value) <= _NUMBER:  # false for NaN too; no float holds every integer
        raise refuse(place, value, f"a finite number of at most {_NUMBER}")
    return value


def setting(value: Any, place: str, depth: int = 0) -> Any:
    """A value of a configuration: numbers, truth values, short names, lists and objects of them.

    A name has no slash: transformers would look some of them up on a hub and run what it finds.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return number(value, place)
    if isinstance(value, str):
        if not _SETTING.fullmatch(value):
            raise refuse(place, value, "names of at most 64 letters, digits and . _ -")
        return value
    if isinstance(value, list | dict) and len(value) <= _ITEMS and depth < _DEPTH:
        if isinstance(value, list):
            return [setting(item, f"{place}[{i}]", depth + 1) for i, item in enumerate(value)]
        return {
            setting(name, place, depth): setting(item, f"{place}.{name[:40]}", depth + 1)
            for name, item in value.items()
        }
    raise refuse(place, value, "numbers, names, lists and objects of them")
