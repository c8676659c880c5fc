"""What the training guide claims of length and memory, beside what a run of `v32 bench` measured.

The guide's tables stand under "Performance Considerations". Dense attention is measured as the contestant
`dense-flash`, sparse attention as the subject of the run.
"""

from __future__ import annotations

from dataclasses import dataclass

from reports.schema import Run
from reports.text import number
from reports.timings import QUANTITIES, Row, Timings, timings

DENSE = "dense-flash"
# Tokens from, tokens to, and the guide's words.
CLAIMS = (
    (0, 2048, "≤ 2K tokens", "Dense", "Indexer overhead > attention savings"),
    (2049, 4095, "2K-4K tokens", "Either", "Similar performance"),
    (4096, 16384, "4K-16K tokens", "Sparse", "Significant memory savings"),
    (16385, 2**62, "> 16K tokens", "Sparse (required)", "Dense attention OOM"),
)
LENGTH_COLUMNS = ("context length", "the guide recommends", "because", "measured: dense over sparse")
MEMORY_COLUMNS = ("tokens", "elements, dense", "elements, sparse", "fewer", "measured peak growth")
GROWTH_COLUMNS = ("attention", "the guide", "measured peak growth")


@dataclass(frozen=True, slots=True)
class Guide:
    """The guide's tables, regenerated: rows of `LENGTH_COLUMNS`, `MEMORY_COLUMNS` and `GROWTH_COLUMNS`."""

    setting: str
    lengths: list[list[str]]
    memory: list[list[str]]
    growth: list[list[str]]


def guide(run: Run) -> Guide | None:
    """The guide beside the measurements of `run`; None for a run without points of whole models."""
    found, fields = timings(run), run.header.get("config_fields")
    topk = fields.get("index_topk") if isinstance(fields, dict) else None
    if found is None or not isinstance(topk, int):
        return None
    points = [row for row in found.rows if not row.pass_.startswith("op:")]
    own = [row for row in points if row.contestant == found.subject]
    if not own:
        return None
    setting = (
        f"The guide speaks of the 671B model on GPUs, with k = 2048; this is the config {run.header.get('config')} with "
        f"k = {topk} on {run.header.get('device')}. A ratio above 1 means that dense attention takes more."
    )
    lengths = [
        [title, advice, reason, "; ".join(_ratios(row, points) for row in own if start <= row.length <= end)]
        for start, end, title, advice, reason in CLAIMS
    ]
    return Guide(setting, [[*row[:3], row[3] or "not measured"] for row in lengths], _memory(own, points, topk),
                 _growth(found))  # fmt: skip


def _ratios(row: Row, points: list[Row]) -> str:
    other = next((p for p in points if p.contestant == DENSE and (p.pass_, p.length) == (row.pass_, row.length)), None)
    at = f"{row.pass_} at {row.length}"
    if other is None:
        return f"{at}: no dense run beside it"
    parts = [
        f"{theirs / mine:.3g}x the {word}"
        for quantity, word in (("seconds", "time"), ("peak_mib", "memory"))
        if (mine := row.middle(quantity)) and (theirs := other.middle(quantity))
    ]
    return f"{at}: {', '.join(parts) or 'no samples'}"


def _memory(own: list[Row], points: list[Row], topk: int) -> list[list[str]]:
    rows = []
    for length in sorted({row.length for row in own}):
        dense, sparse = length * length, length * min(topk, length)
        peaks = [
            f"{row.contestant}, {row.pass_} {number(peak, 'MiB')}"
            for row in points
            if row.length == length and (peak := row.middle("peak_mib")) is not None
        ]
        rows.append([str(length), f"{dense:,}", f"{sparse:,}", f"{dense / sparse:.3g}x", "; ".join(peaks)])
    return rows


def _growth(found: Timings) -> list[list[str]]:
    def exponents(contestant: str) -> str:
        parts = [
            f"{event.data.get('pass')}: L^{event.data['exponent']:.2f}"
            for event in found.growth
            if (event.data.get("contestant"), event.data.get("quantity")) == (contestant, QUANTITIES["peak_mib"])
            and isinstance(event.data.get("exponent"), (int, float))
        ]
        return ", ".join(parts) or "not fitted: that takes three lengths"

    return [
        ["dense", "O(L²) memory for attention scores", exponents(DENSE)],
        ["sparse", "O(L×k) memory where k = index_topk (default 2048)", exponents(found.subject)],
    ]
