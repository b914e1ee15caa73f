"""The forms of a run folder's JSON files, and the check that a file has its form.

A form is a type (`str`, `int`, `float` for any number), a tuple of alternative forms, a list of one form for a list of
any length, a list of several forms for a list of exactly these, or a dictionary: either form by name, where names
ending in "?" may be missing and further names are allowed, or `{str: form}` for any names.
"""

from typing import Any

LARGEST = 1e100
"""The largest number allowed: far more than a run reaches, yet small enough for what a page computes with it."""

_PLAIN = (None, bool, float, str)
_SETTING = (*_PLAIN, [_PLAIN])
CONFIG = {str: (*_SETTING, {str: _SETTING})}

ENTRY = {"images": int}
LINE = {str: _PLAIN}
CHANGE = {"images": int, "changed": [str]}

_COUNTS = {"total": int, "trained": int}
_LAYER = {"name": str, **_COUNTS, "channels?": [int, int], "cells?": {str: _COUNTS}}
UNET = {**_COUNTS, "enc": [_LAYER], "dec": [_LAYER], "beside": [_LAYER]}

_NETWORK = {"sigmas": [float], "output_change": [[float]], "relative_norm": [[float]]}
LAYERS = {"images": int, "layers": [{"name": str, "kind": str}], "teacher": _NETWORK, "student?": _NETWORK}

DISTANCES = {"distances": {str: {str: (float, None)}}}


def check(value: Any, form: Any, where: str = "it") -> None:
    """Raise a `ValueError` that says where, if `value` is not of `form`."""
    match form:
        case tuple():
            if not any(_fits(value, choice) for choice in form):
                raise ValueError(f"{where} is {_short(value)}")
        case [single]:
            _require(isinstance(value, list), value, where, "a list")
            for number, item in enumerate(value):
                check(item, single, f"{where}[{number}]")
        case [*several]:
            _require(isinstance(value, list) and len(value) == len(several), value, where, f"{len(several)} values")
            for number, item in enumerate(several):
                check(value[number], item, f"{where}[{number}]")
        case dict():
            _require(isinstance(value, dict), value, where, "a JSON object")
            any_name = form.get(str)
            if any_name is not None:
                for name, item in value.items():
                    check(name, str, f"a name in {where}")
                    check(item, any_name, f"{where}.{name}")
                return
            for name, item in form.items():
                plain = name.removesuffix("?")
                if plain in value:
                    check(value[plain], item, f"{where}.{plain}")
                elif plain == name:
                    raise ValueError(f"{where} has no {plain}")
        case None:
            _require(value is None, value, where, "null")
        case _:
            _require(
                _is_a(value, form), value, where, {int: "a whole number", float: "a number", str: "text"}.get(form)
            )


def _fits(value: Any, form: Any) -> bool:
    try:
        check(value, form)
    except ValueError:
        return False
    return True


def _is_a(value: Any, kind: type) -> bool:
    if kind is str:
        return isinstance(value, str)
    if kind is bool:
        return isinstance(value, bool)
    number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return number and abs(value) <= LARGEST


def _require(holds: bool, value: Any, where: str, what: str | None) -> None:
    if not holds:
        raise ValueError(f"{where} is {_short(value)}, not {what}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
