"""Numbers and texts as reports show them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

# Control characters, surrogates and direction overrides would act on the reader's terminal or page.
_ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LEVELS = "▁▂▃▄▅▆▇█"
_ASCII = str.maketrans("·—…▁▂▃▄▅▆▇█", "|-._.,-=+*#")


def clean(text: str) -> str:
    """The text with every character that would act instead of showing written as its escape."""
    return _ACTING.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def one_line(text: str) -> str:
    """The text, cleaned and on one line."""
    return clean(" ".join(text.split()))


def ascii_only(text: str) -> str:
    """The text for a terminal that shows only ASCII."""
    return text.translate(_ASCII).encode("ascii", "backslashreplace").decode()


def heading(title: str) -> str:
    """The title with a large first letter, and every other letter as it was."""
    return title[:1].upper() + title[1:]


def number(value: float, unit: str = "") -> str:
    """Three significant digits, and the unit."""
    whole = math.isfinite(value) and value == int(value) and abs(value) < 1e6
    shown = f"{value:.0f}" if whole else f"{value:.3g}"
    return f"{shown} {unit}".rstrip()


def percent(used: float) -> str:
    """A share of a budget; rounded so that what is above the budget never reads as 100 %."""
    if not math.isfinite(used):
        return str(used)
    if 0 < used < 0.01:
        return "<1%"
    if abs(used) >= 100:
        return f"{used:.3g}x"
    hundredths = round(100 * used, 6)
    return f"{max(101, math.ceil(hundredths)) if used > 1 else math.floor(hundredths)}%"


def duration(seconds: float) -> str:
    """A time such as 1.2s, 3m05s or 2h10m."""
    if not math.isfinite(seconds) or round(seconds, 1) < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def sparkline(values: Sequence[float], width: int = 16) -> str:
    """A curve as a row of bars; ! marks what is not finite."""
    picked = [values[step] for step in spread(len(values), width)]
    finite = [value for value in picked if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    top = len(_LEVELS) - 1
    bars = []
    for value in picked:
        if not math.isfinite(value):
            bars.append("!")
        else:
            # Halved, because the difference of two finite floats may overflow.
            share = (value / 2 - low / 2) / (high / 2 - low / 2) if high > low else 0.0
            bars.append(_LEVELS[min(top, max(0, round(share * top)))])
    return "".join(bars)


def spread(length: int, most: int) -> list[int]:
    """At most `most` steps out of `length`, even, with the first and the last."""
    if length <= most:
        return list(range(length))
    return [round(index * (length - 1) / (most - 1)) for index in range(most)]
