"""Strict JSON for floats that JSON has no word for.

NaN and the infinities are written as the strings "nan", "inf" and "-inf" and read back as floats. A real text
that looks like one of them gets a backslash in front, so that every value comes back as it went in.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, NoReturn, TypeAlias

# None, bool, int, float, str, and lists and mappings of these; `dumps` refuses the rest. A recursive type
# would tell the type checker so, but lists are invariant: it would refuse a list[float] as well.
JSON: TypeAlias = Any

_NON_FINITE = re.compile(r"(\\*)(nan|inf|-inf)")


def dumps(value: Mapping[str, object]) -> str:
    """One line of ASCII, without the line's end, that `loads` gives back unchanged."""
    return json.dumps(_encode(value, ""), allow_nan=False, separators=(",", ":"))


def loads(line: bytes) -> JSON:
    """The value of one line; a ValueError says why it is not strict JSON."""
    try:
        return _decode(json.loads(line.decode("utf-8"), parse_constant=_refuse_constant))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _encode(value: object, where: str) -> JSON:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return "\\" + value if _NON_FINITE.fullmatch(value) else str(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        return number if math.isfinite(number) else str(number)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where or 'record'} has the key {key!r}; allowed are texts.")
        start = f"{where}." if where else ""
        return {str(key): _encode(item, f"{start}{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise ValueError(
        f"{where or 'record'} is of type {type(value).__name__}; allowed are None, bool, int, float, str, "
        "and lists and mappings of these."
    )


def _decode(value: JSON) -> JSON:
    if isinstance(value, str):
        found = _NON_FINITE.fullmatch(value)
        if found is None:
            return value
        return value[1:] if found[1] else float(value)
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which strict JSON does not have")
