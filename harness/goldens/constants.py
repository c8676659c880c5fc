"""Constants with a golden value: what the reference computes, and what it must agree with.

Every value comes from the reference's own functions, and stands beside the number that the specification prints, or
one that was worked out without the reference: a closed form, or the formula of `plain.py`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from reports.strict_json import JSON, dumps

# By how much, as a share of itself, a value may differ between two machines: rounding in the arithmetic it was
# computed in.
ROUNDING = {"fp64": 1e-12, "fp32": 2.4e-7, "exact": 0.0}


@dataclass(frozen=True, slots=True)
class Constant:
    """One number, or nested list of numbers, with its second opinion.

    name: unique, `family.what`. section: of the specification sheet. meaning: one sentence, ASCII.
    value: from the reference. expected: of the same nesting, from `source`. within: the largest |value − expected|;
    a share of |expected| when `relative`. arithmetic: what the value was computed in. given: the inputs, if any.
    """

    name: str
    section: str
    meaning: str
    value: JSON
    expected: JSON
    source: str
    within: float = 0.0
    relative: bool = False
    arithmetic: Literal["fp64", "fp32", "exact"] = "fp64"
    given: Mapping[str, JSON] = field(default_factory=dict)

    def disagreement(self) -> str | None:
        """One sentence when the reference does not give what was expected; None when it does."""
        found = first_difference(self.value, self.expected, lambda e: self.within * (abs(e) if self.relative else 1.0))
        if found is None:
            return None
        where, value, expected, allowed = found
        return (
            f"constant {self.name}{where}: the reference gives {shown(value)}, {self.source} says {shown(expected)}"
            f"{_off(value, expected, allowed)}."
        )

    def change(self, stored: "Constant") -> str | None:
        """One sentence on how `stored`, an older state of this constant, differs; None when it does not."""
        for name in ("section", "meaning", "source", "within", "relative", "arithmetic", "given"):
            here, there = getattr(self, name), getattr(stored, name)
            # As JSON, in which NaN equals itself.
            if dumps({name: here}) != dumps({name: there}):
                return f"constant {self.name}: its {name} is {shown(here)}, stored {shown(there)}."
        for label, here, there in (
            ("", self.value, stored.value), (", expected value", self.expected, stored.expected),
        ):  # fmt: skip
            found = first_difference(here, there, lambda e: ROUNDING[self.arithmetic] * abs(e))
            if found is not None:
                where, value, old, allowed = found
                return (
                    f"constant {self.name}{label}{where} is {shown(value)}, stored {shown(old)}"
                    f"{_off(value, old, allowed)}."
                )
        return None

    def as_json(self) -> str:
        """The constant as one line of strict JSON (`reports.strict_json`: "nan", "inf" and "-inf" are texts).

        An expected value that `plain.py` computes is left out: it is the value again.
        """
        expected = None if self.source.startswith("plain.") else self.expected
        return dumps({
            "name": self.name, "section": self.section, "meaning": self.meaning, "given": self.given,
            "value": self.value, "expected": expected, "source": self.source, "within": self.within,
            "relative": self.relative, "arithmetic": self.arithmetic,
        })  # fmt: skip

    @staticmethod
    def from_json(entry: Any) -> "Constant":
        """The inverse of `as_json`, from a decoded line.

        Raises:
            ValueError: fields that are missing or that a constant does not have, or a name that is no text.
        """
        if not isinstance(entry, dict) or entry.keys() != {f.name for f in fields(Constant)}:
            raise ValueError("a constant in it has other fields than a constant has")
        if not isinstance(entry["name"], str):
            raise ValueError(f"a constant in it has the name {entry['name']!r}")
        return Constant(**entry)


def all_constants() -> list[Constant]:
    """Every constant of spec 1.5 and 2 with a golden value, and those of the gate and the KL loss."""
    from . import table_choices, table_indexer, table_rope

    return [*table_rope.constants(), *table_indexer.constants(), *table_choices.constants()]


def disagreements(constants: list[Constant]) -> list[str]:
    """One sentence for each constant that the reference does not reproduce."""
    return [said for constant in constants if (said := constant.disagreement()) is not None]


def first_difference(
    actual: JSON, expected: JSON, allowed: Callable[[float], float]
) -> tuple[str, JSON, JSON, float] | None:
    """Where two nested lists of numbers first differ by more than `allowed(e)`: (", entry [i, j]", a, e, allowed).

    Equal non-finite numbers agree. Another nesting, length or kind of value is a difference of the whole.
    """
    try:
        pairs = list(_pairs(actual, expected, ()))
    except ValueError:
        return "", actual, expected, 0.0
    for path, a, e in pairs:
        if a == e or (_is_number(a) and _is_number(e) and math.isnan(a) and math.isnan(e)):
            continue
        if not (_is_number(a) and _is_number(e)):
            return _place(path), a, e, 0.0
        limit = allowed(e)
        if not abs(a - e) <= limit:
            return _place(path), a, e, limit
    return None


def shown(value: JSON) -> str:
    """A value in a sentence: twelve digits, long lists cut."""
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {shown(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        inside = ", ".join(shown(v) for v in value[:4])
        return f"[{inside}, … {len(value)} in all]" if len(value) > 4 else f"[{inside}]"
    # A text may be a sentence, and stands in one here.
    return str(value).removesuffix(".")


def _pairs(a: JSON, e: JSON, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], JSON, JSON]]:
    lists = isinstance(a, (list, tuple)), isinstance(e, (list, tuple))
    if lists == (False, False):
        yield path, a, e
    elif lists == (True, True):
        if len(a) != len(e):
            raise ValueError
        for i, (x, y) in enumerate(zip(a, e, strict=True)):
            yield from _pairs(x, y, (*path, i))
    else:
        raise ValueError


def _is_number(value: JSON) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _place(path: tuple[int, ...]) -> str:
    return f", entry {list(path)}" if path else ""


def _off(value: JSON, expected: JSON, allowed: float) -> str:
    if not (_is_number(value) and _is_number(expected)):
        return ""
    return f", off by {abs(value - expected):.3g}, allowed {allowed:.3g}"
