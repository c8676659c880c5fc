"""Single operators against their plain definitions: values, logsumexps, gradients, selections.

Every tensor is judged on five sides, by the error that the plain definition itself makes on the same inputs. Where a
budget is exceeded, what no kernel can help is added to it (harness/operators/slack.py); where it still is, the reason
names the fault (harness/operators/diagnosis.py).

Letters: B batch, L query rows, S key slots, H attention heads, K selected keys, 2 = [start, end).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from reference.indexer import select_topk
from reports.schema import Measure, NullCandidate

from ..budgets import CAP, MARGIN_FACTOR, budget, measured_on, scalar_budget
from ..metrics import SIDES, Errors, errors, null_candidates, rejected
from ..operators.bench import Call, OperatorBench
from ..operators.cases import TIED_CASES
from ..operators.diagnosis import explain_lse, explain_selection, explain_tensor
from ..operators.selection import judge_selection, wrong_selections
from ..operators.slack import cancellation_errors, kink_errors, rounding, term_sizes
from .base import Answer, Check

# The forms in which an operator is called, and what its tensors are called then.
FORMS = {
    "index_scores": {"index_scores": ""},
    "indexer_topk": {"indexer_topk": ""},
    "sparse_mla": {"sparse_mla": ""},
    "dense_mla": {"dense_mla": "", "dense_mla, selected": "selected "},
    "indexer_kl": {"indexer_kl": "", "indexer_kl, selected": "selected "},
}
# The outputs whose gradients are asked for.
_FIRST = {"index_scores": ("I",), "sparse_mla": ("out",), "dense_mla": ("out",), "indexer_kl": ("kl", "kl_sum")}


@dataclass(frozen=True, slots=True)
class Compared:
    """One tensor of a call: the subject's, the oracle's, the baseline's. `name` is an output or an argument."""

    call: Call
    name: str
    label: str
    actual: torch.Tensor
    expected: torch.Tensor
    own: torch.Tensor


class Nulls:
    """Null candidates by kind: a kind is rejected when it was for every tensor that it was tried on."""

    def __init__(self) -> None:
        self._accepted: dict[str, list[str]] = {}

    def add(self, kind: str, tensor: str, seen: bool) -> None:
        """One candidate, and whether the check rejected it."""
        self._accepted.setdefault(kind, []).extend([] if seen else [tensor])

    def found(self) -> list[NullCandidate]:
        """One entry a kind."""
        return [
            NullCandidate(kind, not names, f"accepted for {', '.join(names)}" if names else "")
            for kind, names in self._accepted.items()
        ]


def data_of(bench: OperatorBench, output: str, dtype: torch.dtype) -> dict[str, object]:
    """What a record says of the budgets besides: the device that they come from, if it is another one."""
    origin = measured_on(output, dtype, bench.device.type)
    return {} if origin == bench.device.type else {"budgets_measured_on": origin}


def judge_tensors(bench: OperatorBench, output: str, tensors: Iterable[Compared]) -> Answer:
    """Every tensor against its own budget of kind `output`; one measure a tensor, its worst side."""
    measures, nulls = [], Nulls()
    data: dict[str, object] = {}
    failed: dict[Call, list[tuple[Compared, Errors]]] = {}
    for t in tensors:
        dtype = precision(bench, t.call, t.name)
        own, found = errors(t.own, t.expected), errors(t.actual, t.expected)
        allowed = budget(output, dtype, own, t.expected.numel(), bench.device.type)
        data |= data_of(bench, output, dtype)
        # What is wrong by nearly its own size is a fault, whatever cancels.
        if not found.used(allowed) <= 1:
            silent = _silent(t, dtype)
            if silent is not None:
                measures.append(silent[0])
                nulls.add("as large as its terms", t.label, silent[1])
                if not silent[0].within:
                    failed.setdefault(t.call, []).append((t, allowed))
                continue
            if max(found.max, found.row, found.channel) <= CAP:
                data["budgets_include"] = "cancellation and kinks"
                allowed = _widened(t, dtype, allowed)
        side = max(SIDES, key=lambda s: _share(found, allowed, s))
        measures.append(Measure(f"{t.label}, {side}", getattr(found, side), getattr(allowed, side)))
        for kind, wrong in null_candidates(t.expected):
            nulls.add(kind, t.label, rejected(wrong, t.expected, allowed))
        if not measures[-1].within:
            failed.setdefault(t.call, []).append((t, allowed))
    return Answer(measures, nulls.found(), "; ".join(map(_explained, failed.values())), data)


def _explained(failed: list[tuple[Compared, Errors]]) -> str:
    """Why the tensors of one call are wrong: the first in words, the others by name."""
    (t, allowed), *others = failed
    reason = explain_tensor(t.call, t.name, t.label, t.actual, t.expected, allowed)
    return reason + (f" (so are {', '.join(other.label for other, _ in others)})" if others else "")


def _share(found: Errors, allowed: Errors, side: str) -> float:
    share = float(getattr(found, side)) / float(getattr(allowed, side))
    return math.inf if math.isnan(share) else share


def _silent(t: Compared, dtype: torch.dtype) -> tuple[Measure, bool] | None:
    """(measure, whether terms that do not cancel are rejected) of a tensor of which rounding alone is left."""
    size = term_sizes(t.call, dtype)[t.name]
    allowed = float(rounding(size, dtype).max())
    if t.actual.shape != t.expected.shape or not float(t.expected.abs().max()) <= allowed:
        return None
    off = (t.actual.double() - t.expected).abs()
    value = float(off.max()) if bool(torch.isfinite(off).all()) else math.inf
    return Measure(f"{t.label}, all cancelled", value, allowed), not float(size.max()) <= allowed


def _widened(t: Compared, dtype: torch.dtype, allowed: Errors) -> Errors:
    allowed = allowed.plus(cancellation_errors(term_sizes(t.call, dtype)[t.name], t.expected, dtype))
    if t.name in ("q_BLJE", "k_BSE", "w_BLJ", "iq_BLJE", "ik_BSE"):
        allowed = allowed.plus(kink_errors(t.call, t.name, t.expected))
    return allowed


def precision(bench: OperatorBench, call: Call, name: str) -> torch.dtype:
    """The dtype that an output or gradient is rounded to: its argument's, at least fp32 for scores and divergences."""
    if name in call.arguments:
        return torch.promote_types(call.arguments[name].dtype, bench.dtype)
    return bench.dtype if name == "out" else torch.promote_types(bench.dtype, torch.float32)


def outputs(operator: str, *names: str, gradients: bool = False) -> Callable[[OperatorBench], Answer]:
    """A check of the outputs `names` of an operator, in each of its forms; with `gradients`, of the run that has them."""

    def tensors(bench: OperatorBench) -> Iterator[Compared]:
        for form, prefix in FORMS[operator].items():
            seen, expected, own = bench.seen(form, gradients), bench.expected(form), bench.baseline(form)
            for name in names:
                triple = (seen.outputs[name], expected.outputs[name], own.outputs[name])
                yield Compared(bench.call(form), name, prefix + name, *triple)

    return lambda bench: judge_tensors(bench, operator, tensors(bench))


def gradients(operator: str) -> Callable[[OperatorBench], Answer]:
    """A check of an operator's gradients, in each of its forms."""

    def tensors(bench: OperatorBench) -> Iterator[Compared]:
        for form, prefix in FORMS[operator].items():
            call = bench.call(form)
            seen, expected, own = (f(form, gradients=True) for f in (bench.seen, bench.expected, bench.baseline))
            for name in call.wrt:
                e = expected.gradient(name, call.arguments[name])
                label = f"{prefix}d{name.partition('_')[0]}"
                yield Compared(call, name, label, seen.gradient(name, e), e, own.gradient(name, e))

    def check(bench: OperatorBench) -> Answer:
        answer = judge_tensors(bench, f"{operator} gradients", tensors(bench))
        if not answer.reason:
            return answer
        forward = outputs(operator, *_FIRST[operator], gradients=True)(bench).reason
        return replace(answer, reason=f"the forward is wrong already: {forward}") if forward else answer

    return check


def lse(operator: str) -> Callable[[OperatorBench], Answer]:
    """A check of an operator's logsumexps: −inf exactly where there are no keys, elsewhere off by some nats at most.

    An absolute error, because a relative one forgives much to large numbers. Null candidates: base 2, off by ln 2,
    zeros, the next row's, a number in rows without keys.
    """

    def check(bench: OperatorBench) -> Answer:
        measures, nulls, reasons = [], Nulls(), []
        for form, prefix in FORMS[operator].items():
            seen, expected, own = (f(form).outputs["lse"] for f in (bench.seen, bench.expected, bench.baseline))
            label = f"{prefix}lse"
            allowed = scalar_budget(f"{operator} lse", torch.float32, lse_error(own, expected), bench.device.type)
            found = lse_error(seen, expected)
            if not found <= allowed:
                allowed += float(rounding(term_sizes(bench.call(form), torch.float32)["lse"].max(), torch.float32))
            measures.append(Measure(label, found, allowed, "nats"))
            for kind, wrong in _wrong_lse(expected):
                nulls.add(kind, label, not lse_error(wrong, expected) <= allowed)
            if not measures[-1].within:
                reasons.append(explain_lse(bench.call(form), label, seen, expected, allowed))
        return Answer(measures, nulls.found(), "; ".join(reasons), data_of(bench, f"{operator} lse", torch.float32))

    return check


def lse_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest |a − e| in nats; infinite where one is −inf (or not a number) and the other is not."""
    if actual.shape != expected.shape:
        return math.inf
    finite = torch.isfinite(expected)
    if not torch.equal(actual.double()[~finite], expected[~finite]):
        return math.inf
    off = (actual.double() - expected)[finite].abs()
    return 0.0 if off.numel() == 0 else float(off.max()) if bool(torch.isfinite(off).all()) else math.inf


def _wrong_lse(expected: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    finite = torch.isfinite(expected)
    if bool(finite.any()):
        yield "base 2", torch.where(finite, expected / math.log(2), expected)
        yield "ln 2 more", expected + math.log(2)
        yield "zeros", torch.where(finite, 0.0, expected)
    if bool(finite.any()) and expected.shape[1] > 1:
        yield "the next row's", torch.where(finite, expected.roll(-1, 1).nan_to_num(neginf=0.0), expected)
    if not bool(finite.all()):
        yield "a number in rows without keys", expected.nan_to_num(neginf=-1e30)


def selection(bench: OperatorBench) -> Answer:
    """The selected keys: within bounds, distinct, min(k, visible) of them, ascending, and right where that is clear.

    A key is clear whose exact score is farther from the boundary than the margin: MARGIN_FACTOR times the error of the
    plain scores in the subject's dtype, never the subject's own.
    """
    k, bounds = bench.case.sizes.k, bench.bounds_BL2
    scores, margin = exact_scores(bench)
    found = judge_selection(bench.seen("indexer_topk").outputs["indices"], scores, bounds, k, margin)
    nulls = Nulls()
    for kind, candidate in wrong_selections(scores, bounds, k, bench.case.generator("wrong keys")):
        nulls.add(kind, "indices", judge_selection(candidate, scores, bounds, k, margin).total > 0)
    measures = [
        Measure("wrong keys", float(found.total), 0.0, "keys"),
        Measure("flips within the margin", float(found.flips), None, "keys"),
        Measure("margin", margin, None, "score"),
    ]
    reason = ""
    if found.total:
        reason = explain_selection(
            bench.call("indexer_topk"), bench.seen("indexer_topk").outputs["indices"], found, margin
        )
    elif int((bounds[..., 1] - bounds[..., 0]).max()) <= k:
        reason = f"no row sees more than k = {k} keys, so that any selection is right: choose a larger --seq-len"
    return Answer(measures, nulls.found(), reason, {"margin_measured_on": bench.device.type})


def exact_scores(bench: OperatorBench) -> tuple[torch.Tensor, float]:
    """(exact scores `[B, L, S]`, the margin within which a selection may differ)."""
    exact, low = (f("index_scores").outputs["I"] for f in (bench.expected, bench.baseline))
    return exact, MARGIN_FACTOR * float((low.double() - exact).abs().masked_fill(~bench.visible_BLS, 0.0).max())


def ties(bench: OperatorBench) -> Answer:
    """Among equal scores the lowest index, −0.0 equal to 0.0, NaN highest: the one right set, on scores that are exact.

    Null candidates: the highest index among equal scores; NaN lowest, or never selected.
    """
    call = bench.call("indexer_topk")
    k = bench.case.sizes.k
    exact, _ = exact_scores(bench)
    # One key in seven is not a number; rows see some of them.
    poisoned = call.arguments["k_BSE"].clone()
    poisoned[:, 3::7, 0] = torch.nan
    with_nan = exact.clone()
    with_nan[:, :, 3::7] = torch.nan
    measures, nulls, reasons = [], Nulls(), []
    for label, asked, scores in (
        ("ties", call, exact),
        ("not a number", call.changed(k_BSE=poisoned), with_nan),
    ):
        expected = select_topk(scores, bench.visible_BLS, k)
        seen = bench.seen("indexer_topk") if asked is call else bench.ask(asked)
        wrong = rows_apart(seen.outputs["indices"], expected)
        measures.append(Measure(f"{label}, wrong rows", float(wrong), 0.0, "rows"))
        for kind, candidate in _wrong_ties(scores, bench.visible_BLS, k):
            nulls.add(kind, label, rows_apart(candidate, expected) > 0)
            if wrong and rows_apart(seen.outputs["indices"], candidate) == 0:
                reasons.append(kind)
        if wrong and not reasons:
            reasons.append(f"{wrong} rows hold other keys than those of the lowest index ({label})")
    return Answer(measures, nulls.found(), "; ".join(dict.fromkeys(reasons)))


def rows_apart(a_BLK: torch.Tensor, b_BLK: torch.Tensor) -> int:
    """Rows whose indices are not the same; all of them when the shapes differ."""
    return int((a_BLK != b_BLK).any(-1).sum()) if a_BLK.shape == b_BLK.shape else b_BLK.shape[0] * b_BLK.shape[1]


def _wrong_ties(scores: torch.Tensor, visible: torch.Tensor, k: int) -> Iterator[tuple[str, torch.Tensor]]:
    slots = scores.shape[-1]
    backwards = select_topk(scores.flip(-1), visible.flip(-1), k)
    mirrored = torch.where(backwards < 0, slots, slots - 1 - backwards).sort(-1).values
    yield "ties go to the highest index", torch.where(mirrored == slots, -1, mirrored).to(torch.int32)
    if bool(scores.isnan().any()):
        yield "NaN ranks lowest", select_topk(scores.nan_to_num(nan=-torch.inf), visible, k)
        yield "NaN is never selected", select_topk(scores, visible & ~scores.isnan(), k)


def _check(
    name: str, run: Callable[[OperatorBench], Answer], *needs: str, cases: frozenset[str] = frozenset()
) -> Check:
    return Check(f"operators.{name}", "operators", run, frozenset(needs), frozenset({"operators"}), only_cases=cases)


CHECKS = [
    _check("index_scores", outputs("index_scores", "I"), "index_scores"),
    _check("index_scores_gradients", gradients("index_scores"), "index_scores", "index_scores:backward"),
    _check("indexer_topk", selection, "indexer_topk"),
    _check("indexer_topk_ties", ties, "indexer_topk", "indexer_topk:tie-rule", cases=TIED_CASES),
    _check("indexer_topk_lse", lse("indexer_topk"), "indexer_topk"),
    _check("sparse_mla", outputs("sparse_mla", "out"), "sparse_mla"),
    _check("sparse_mla_lse", lse("sparse_mla"), "sparse_mla"),
    _check("sparse_mla_gradients", gradients("sparse_mla"), "sparse_mla", "sparse_mla:backward"),
    _check("dense_mla", outputs("dense_mla", "out"), "dense_mla"),
    _check("dense_mla_lse", lse("dense_mla"), "dense_mla"),
    _check("dense_mla_gradients", gradients("dense_mla"), "dense_mla", "dense_mla:backward"),
    _check("indexer_kl", outputs("indexer_kl", "kl", "kl_sum"), "indexer_kl"),
    _check("indexer_kl_gradients", gradients("indexer_kl"), "indexer_kl", "indexer_kl:backward"),
]
