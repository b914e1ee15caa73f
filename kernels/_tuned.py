"""Reads tuned.json, the table of launch options to which people add measurements; _launch.py describes its format.

The whole file is checked when it is read. Otherwise a wrong option would show only at the first launch of its kernel,
in the middle of a run, as a Triton error that does not name the file.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

# By option: the smallest and largest values, and whether only powers of two are allowed. Tiles: Triton lays out at most
# 2^20 elements at once, its products take at least 16 rows.
_TILE = (1, 1 << 16, True)
_ROWS = (16, 256, True)
_LIMITS = {
    "BLOCK": _TILE,
    "elements": _TILE,
    "BLOCK_Q": _ROWS,
    "BLOCK_K": _ROWS,
    "num_warps": (1, 32, True),
    "num_stages": (1, 8, False),
    "maxnreg": (24, 255, False),
}
# The options that each kernel requires; num_stages and maxnreg may be left to Triton.
_TILED = {
    "relu_bits": {"BLOCK"},
    "max_pool2x2": {"BLOCK"},
    "attention": {"BLOCK_Q", "BLOCK_K"},
    "group_norm_silu.forward": {"elements"},
    "group_norm_silu.backward": {"elements"},
    "residual": {"elements"},
}
_MEASURED_BY_SHAPE = {name for name, tile in _TILED.items() if tile == {"elements"}}
_ATTENTIONS = {
    f"{direction}-{width}-{kind}"
    for direction in ("forward", "backward")
    for width in (64, 128, 256)
    for kind in ("half", "fp32")
}
_TYPES = ("float32", "float16", "bfloat16")
_CONVOLUTION = "[channels, results' channels, kernel, stride, side, float16|bfloat16]"


class TableError(ValueError):
    """A table that is missing, is not JSON, or has an entry with which no kernel can be launched."""


def read(path: Path) -> dict[str, Any]:
    """The table at `path`. Raises a TableError that names the entry and what belongs there."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TableError(f"cannot be read: {error}") from error
    _keys(table, "the table", required={*_TILED, "frozen_conv2d_relu"})
    for operator, entries in table.items():
        match operator:
            case "attention":
                _check_attention(entries)
            case "frozen_conv2d_relu":
                _keys(entries, operator, required={"faster_by_cudnn"})
                _check_shapes(f"{operator}, faster_by_cudnn", entries["faster_by_cudnn"], 5, _TYPES[1:], _CONVOLUTION)
            case _:
                _check(operator, entries)
    return table


def _check(operator: str, entries: Any) -> None:
    architectures = _architectures(operator, entries, required={"default"})
    tile = _TILED[operator]
    _check_options(f"{operator}, default", entries["default"], tile, required=tile | {"num_warps"})
    for architecture in architectures:
        at, options = f"{operator}, {architecture}", entries[architecture]
        if operator in _MEASURED_BY_SHAPE and isinstance(options, dict) and "measured" in options:
            options = dict(options)
            _check_measured(at, options.pop("measured"), tile)
        _check_options(at, options, tile)


def _check_measured(at: str, measured: Any, tile: set[str]) -> None:
    _want(isinstance(measured, list), f"{at}, measured", "a list", measured)
    for number, entry in enumerate(measured):
        place = f"{at}, measured {number}"
        _keys(entry, place, required={"shape", "options"})
        shape = entry["shape"]
        whole = isinstance(shape, list) and len(shape) == 3 and all(_is_size(size) for size in shape)
        _want(whole, f"{place}, shape", "[samples, channels, pixels]", shape)
        _check_options(f"{place}, options", entry["options"], tile)


def _check_attention(entries: Any) -> None:
    architectures = _architectures("attention", entries, required={"default", "faster_than_sdpa"})
    tile = _TILED["attention"]
    _keys(entries["default"], "attention, default", required=_ATTENTIONS)
    for architecture in ("default", *architectures):
        named = entries[architecture]
        _keys(named, f"attention, {architecture}", allowed=_ATTENTIONS)
        for name, options in named.items():  # each replaces the default's whole
            _check_options(f"attention, {architecture}, {name}", options, tile, required=tile | {"num_warps"})
    wanted = f"[tokens, channels per head, {'|'.join(_TYPES)}]"
    _check_shapes("attention, faster_than_sdpa", entries["faster_than_sdpa"], 2, _TYPES, wanted)


def _check_shapes(at: str, faster: Any, sizes: int, types: Collection[str], wanted: str) -> None:
    """By architecture, lists of shapes: so many sizes and a type."""
    for architecture in _architectures(at, faster):
        place, shapes = f"{at}, {architecture}", faster[architecture]
        _want(isinstance(shapes, list), place, "a list", shapes)
        for shape in shapes:
            whole = isinstance(shape, list) and len(shape) == sizes + 1 and all(_is_size(size) for size in shape[:-1])
            _want(whole and shape[-1] in types, place, wanted, shape)


def _architectures(at: str, entries: Any, required: Collection[str] = ()) -> list[str]:
    """The keys other than the required ones, each of which must be an architecture."""
    _want(isinstance(entries, dict), at, "an object", entries)
    _keys({name: None for name in entries if name in required}, at, required=required)
    found = [name for name in entries if name not in required]
    for name in found:
        _want(re.fullmatch(r"sm_\d{2,3}", name) is not None, at, 'an architecture, "sm_90" say', name)
    return found


def _check_options(at: str, options: Any, tile: set[str], required: Collection[str] = ()) -> None:
    _keys(options, at, allowed=tile | {"num_warps", "num_stages", "maxnreg"}, required=required)
    for name, value in options.items():
        low, high, power = _LIMITS[name]
        fits = _is_size(value) and low <= value <= high and not (power and value & (value - 1))
        _want(fits, f"{at}, {name}", f"{'a power of two' if power else 'a whole number'} from {low} to {high}", value)


def _keys(value: Any, at: str, required: Collection[str] = (), allowed: Collection[str] = ()) -> None:
    """Check that `value` is an object with all of `required`, and nothing other than `allowed` (by default, those)."""
    _want(isinstance(value, dict), at, "an object", value)
    missing, unknown = sorted(set(required) - value.keys()), sorted(value.keys() - set(allowed or required))
    if missing or unknown:
        wrong = f"{', '.join(missing)} missing" if missing else f"{_shown(unknown[0])} is unknown"
        raise TableError(f"{at}: {wrong}; there are {', '.join(sorted(allowed or required))}")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**63


def _want(fits: bool, at: str, wanted: str, value: Any) -> None:
    if not fits:
        raise TableError(f"{at}: {wanted} is wanted, not {_shown(value)}")


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
