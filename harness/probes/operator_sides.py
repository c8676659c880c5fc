"""What probes of operators share: two runs of one operator compared, and inputs that hide keys or keep kinks away.

A probe needs no second implementation: it compares a subject with itself. Two runs may differ by what the operator may
differ from its plain definition on the case at hand, which is rounding; a fault that a probe is after is far larger.

Letters: B batch, L query rows, S key slots, H attention heads, J indexer heads, E width of an indexer head.
"""

from collections.abc import Callable, Iterable

import torch

from reference.indexer import selected_mask
from reports.schema import Measure, NullCandidate

from ..budgets import budget, scalar_budget
from ..checks.base import Answer, Check
from ..checks.operators import exact_scores, lse_error, precision
from ..metrics import errors
from ..operators.bench import Call, OperatorBench, Outcome
from ..operators.plain import visible_keys
from ..operators.slack import rounding_share

# What a call hides or changes: every argument that holds a key or a value.
KEYS = ("k_BSE", "ik_BSE", "kv_BSD", "k_BSHD", "v_BSHV", "k")


class Notes:
    """Collects the measures, null candidates and reasons of one probe."""

    def __init__(self, bench: OperatorBench) -> None:
        self.bench = bench
        self.data: dict[str, object] = {}
        self._measures: list[Measure] = []
        self._nulls: dict[str, bool] = {}
        self._reasons: list[str] = []

    def measure(self, name: str, value: float, allowed: float, reason: str, unit: str = "") -> None:
        """A number with its budget; `reason` says what is wrong when it is exceeded."""
        self._measures.append(Measure(name, value, allowed, unit))
        if not self._measures[-1].within:
            self._reasons.append(reason)

    def null(self, kind: str, seen: bool) -> None:
        """A wrong answer that was really tried, and whether the probe rejected it; a kind is as good as its worst try."""
        self._nulls[kind] = self._nulls.get(kind, True) and seen

    def same(
        self, name: str, call: Call, form: str, after: Outcome, before: Outcome, reason: str,
        rows: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Two runs must be the same up to rounding, in `rows` `[B, L]` or altogether; `before` is what `call` gave."""
        used = shares(self.bench, call, form, after, before, rows)
        worst = max(used, key=lambda n: used[n])
        self.measure(f"{name}, {worst}", used[worst], 1.0, f"{reason} (seen in {worst})", "of budget")

    def differs(
        self, kind: str, call: Call, form: str, after: Outcome, before: Outcome, rows: torch.Tensor | None = None
    ) -> None:
        """A null candidate: a run whose outputs must not be the same."""
        self.null(kind, max(shares(self.bench, call, form, after, Outcome(before.outputs), rows).values()) > 1)

    def answer(self) -> Answer:
        """All of it."""
        nulls = [NullCandidate(kind, seen) for kind, seen in self._nulls.items()]
        return Answer(self._measures, nulls, "; ".join(dict.fromkeys(self._reasons)), self.data)


def shares(
    bench: OperatorBench, call: Call, form: str, after: Outcome, before: Outcome, rows: torch.Tensor | None = None
) -> dict[str, float]:
    """By output and gradient: the share of its budget that the difference of two runs takes.

    With `rows` only outputs of these rows count. An index counts when its score is clear of the boundary. `form` is the
    call of the bench whose budgets apply, `call` the one that gave `before`.
    """
    expected, own = (f(form, bool(before.gradients)) for f in (bench.expected, bench.baseline))
    found = {}
    for name, b in before.outputs.items():
        if rows is not None and b.dim() < 2:
            continue
        a = after.outputs[name]
        if a.shape != b.shape:
            return {name: float("inf")}
        if rows is not None:
            a = torch.where(rows.reshape(*rows.shape, *[1] * (b.dim() - 2)), a, b)
        if name == "indices":
            found[name] = 2.0 * clear_differences(bench, a, b)
        elif name == "lse":
            own_error = lse_error(own.outputs[name], expected.outputs[name])
            share = lse_error(a, b.double()) / scalar_budget(f"{call.operator} lse", torch.float32, own_error)
            found[name] = share if share <= 1 else min(share, _rounded_share(call, name, torch.float32, a, b))
        else:
            found[name] = _share(bench, call, name, call.operator, a, b, own.outputs[name], expected.outputs[name])
    for name, gradient in before.gradients.items() if rows is None else ():
        e = expected.gradient(name, call.arguments[name])
        b = torch.zeros_like(e) if gradient is None else gradient
        a, o = after.gradient(name, b), own.gradient(name, e)
        label = f"d{name.partition('_')[0]}"
        found[label] = _share(bench, call, name, f"{call.operator} gradients", a, b, o, e)
    return found


def _share(
    bench: OperatorBench, call: Call, name: str, rule: str, a: torch.Tensor, b: torch.Tensor, own: torch.Tensor,
    expected: torch.Tensor,
) -> float:  # fmt: skip
    dtype = precision(bench, call, name)
    allowed = budget(rule, dtype, errors(own, expected), expected.numel(), bench.device.type)
    share = errors(a, b.double()).used(allowed)
    # Of a result that cancels an error relative to it says nothing.
    return (
        share if share <= 1 else min(float("inf") if share != share else share, _rounded_share(call, name, dtype, a, b))
    )


def _rounded_share(call: Call, name: str, dtype: torch.dtype, a: torch.Tensor, b: torch.Tensor) -> float:
    same_places = torch.equal(torch.isfinite(a), torch.isfinite(b))
    if not same_places:
        return float("inf")
    return rounding_share(call, name, dtype, a.nan_to_num(neginf=0.0), b.nan_to_num(neginf=0.0))


def clear_differences(bench: OperatorBench, a_BLK: torch.Tensor, b_BLK: torch.Tensor) -> int:
    """Keys that one of two selections holds and the other does not, though their scores are clear of the row's boundary."""
    scores, margin = exact_scores(bench)
    slots = scores.shape[-1]
    in_range = bool(((a_BLK >= -1) & (a_BLK < slots)).all())
    if not in_range:
        return int(a_BLK.numel())
    one, other = selected_mask(a_BLK, slots), selected_mask(b_BLK, slots)
    boundary = scores.masked_fill(~other, torch.inf).amin(-1, keepdim=True)
    return int(((one != other) & ~((scores - boundary).abs() <= 2 * margin)).sum())


def gradients_of(bench: OperatorBench, operator: str) -> bool:
    """Whether the subject declares a backward of `operator`."""
    return f"{operator}:backward" in bench.subject.capabilities


def seen_by(call: Call) -> torch.Tensor:
    """Which keys `[B, L, S]` each row of a call sees, by bounds and by indices."""
    a = call.arguments
    slots = next(x.shape[1] for n, x in a.items() if n in ("k_BSE", "k_BSHD", "ik_BSE", "kv_BSD"))
    if "bounds_BL2" in a:
        return visible_keys(a["bounds_BL2"], slots, a.get("indices_BLK"))
    return selected_mask(a["indices_BLK"], slots)


def with_keys(call: Call, slots: torch.Tensor, value: float | Callable[[torch.Tensor], torch.Tensor]) -> Call:
    """The call with every key and value in the marked slots `[S]` or `[B, S]` replaced."""
    changed = {}
    for name in KEYS:
        # In one operator k is a number.
        if isinstance(x := call.arguments.get(name), torch.Tensor):
            marked = slots if slots.dim() == 2 else slots.expand(x.shape[0], -1)
            new = value(x) if callable(value) else torch.full_like(x, value)
            changed[name] = torch.where(marked.reshape(*marked.shape, *[1] * (x.dim() - 2)), new.to(x), x)
    return call.changed(**changed)


def other_keys(bench: OperatorBench, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that draws other keys of the same size as those given."""
    generator = bench.case.generator(name)

    def draw(x: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
        return 2 * noise * x.double().square().mean().sqrt()

    return draw


def narrowed(call: Call, low: int, high: int) -> Call:
    """The call with every slot outside [low, high) hidden from every row, by bounds and by indices."""
    changed: dict[str, torch.Tensor] = {}
    if "bounds_BL2" in call.arguments:
        changed["bounds_BL2"] = call.arguments["bounds_BL2"].clamp(low, high)
    if "indices_BLK" in call.arguments:
        indices = call.arguments["indices_BLK"]
        changed["indices_BLK"] = torch.where((indices >= low) & (indices < high), indices, -1)
    return call.changed(**changed)


def clear_of_kinks(q_BLJE: torch.Tensor, k_BSE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, k) of these sizes none of whose dot products is near zero, half of the heads shut, others for other keys.

    A key lives on one half of the channels, and a head has one sign on each half.
    """
    width = q_BLJE.shape[-1]
    half = torch.arange(width, device=q_BLJE.device) < (width + 1) // 2
    slot = torch.arange(k_BSE.shape[1], device=k_BSE.device)
    even = (slot % 2 == 0) if width > 1 else torch.ones_like(slot, dtype=torch.bool)
    k = (k_BSE.abs() + 0.1 * k_BSE.abs().mean()) * (even[:, None] == half)
    row, head = torch.arange(q_BLJE.shape[1])[:, None, None], torch.arange(q_BLJE.shape[2])[:, None]
    place = torch.where(half.cpu(), (row + head) % 2, (row + head // 2) % 2).to(q_BLJE.device)
    return (q_BLJE.abs() + 0.1 * q_BLJE.abs().mean()) * (1 - 2 * place), k


def probe(
    name: str, run: Callable[[Notes], None], needs: Iterable[str], cases: Iterable[str] = (), fp32_only: bool = False
) -> Check:
    """A probe of operators as a check of the family "probes"."""

    def check(bench: OperatorBench) -> Answer:
        notes = Notes(bench)
        run(notes)
        return notes.answer()

    return Check(
        f"probes.{name}", "probes", check, frozenset(needs), frozenset({"operators"}), only_cases=frozenset(cases),
        only_dtypes=frozenset({torch.float32}) if fp32_only else frozenset(),
    )  # fmt: skip
