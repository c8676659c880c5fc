"""Parity of arithmetic, given the choices: logits, LM loss and its gradients, KL loss and its gradients.

The second of the three verdicts (design: the decision tape). Errors are judged on five sides against budgets made of
the reference's own error in the same precision.
"""

import re
from collections.abc import Callable

import torch

from reports.schema import Measure, NullCandidate

from ..budgets import budget, scalar_budget
from ..kinks import kink_errors
from ..metrics import SIDES, Errors, errors, null_candidates, rejected
from ..observe import Gradients, Observation
from .base import Answer, Bench, Check

TOO_MANY_GRADIENTS = (
    "gradients of all weights in fp64 do not fit beside a model of this size; only the indexer's are computed: "
    "run a smaller config for the others"
)


def judge_tensor(
    actual: torch.Tensor, expected: torch.Tensor, allowed: Errors
) -> tuple[list[Measure], list[NullCandidate]]:
    """The five measures of one tensor, and what became of its null candidates."""
    found = errors(actual, expected)
    measures = [Measure(side, getattr(found, side), getattr(allowed, side)) for side in SIDES]
    nulls = [NullCandidate(kind, rejected(wrong, expected, allowed)) for kind, wrong in null_candidates(expected)]
    return measures, nulls


def judge_scalar(
    actual: torch.Tensor, expected: torch.Tensor, own: torch.Tensor, output: str, dtype: torch.dtype
) -> tuple[Measure, list[NullCandidate]]:
    """Relative error of one number. Null candidates: zero, 4 % more, 4 % less."""
    e = float(expected)

    def off(value: float) -> float:
        return abs(value - e) / abs(e)

    allowed = scalar_budget(output, dtype, off(float(own)))
    wrong = {"zero": 0.0, "4 % gain": e * 1.04, "4 % less": e * 0.96}
    return Measure(output, off(float(actual)), allowed), [
        NullCandidate(kind, not off(value) <= allowed) for kind, value in wrong.items()
    ]


def logits(bench: Bench) -> Answer:
    """Logits of real tokens."""
    real = bench.case.real_BL.to(bench.device)
    expected = bench.expected.logits[real]
    allowed = budget("logits", bench.dtype, errors(bench.baseline.logits[real], expected), expected.numel())
    measures, nulls = judge_tensor(bench.seen.logits[real], expected, allowed)
    return Answer(measures, nulls)


def lm_loss(bench: Bench) -> Answer:
    """The LM loss."""
    measure, nulls = judge_scalar(
        bench.seen.lm_loss, bench.expected.lm_loss, bench.baseline.lm_loss, "lm loss", bench.dtype
    )
    return Answer([measure], nulls)


def kl_loss(bench: Bench) -> Answer:
    """The indexer's KL loss."""
    seen, expected, own = (o.kl_loss for o in (bench.seen, bench.expected, bench.baseline))
    assert seen is not None and expected is not None and own is not None
    measure, nulls = judge_scalar(seen, expected, own, "kl loss", bench.dtype)
    return Answer([measure], nulls)


def gradients(output: str, pick: Callable[[Observation], Gradients]) -> Callable[[Bench], Answer]:
    """A check of every parameter's gradient: each against its own budget; the worst of each side is reported."""

    def check(bench: Bench) -> Answer:
        seen, expected, own = pick(bench.seen), pick(bench.expected), pick(bench.baseline)
        if strangers := sorted(set(expected) ^ set(seen)):
            return Answer([Measure("parameters not in both", float(len(strangers)), 0.0)], [], f"e.g. {strangers[0]}")
        reached = {name: gradient for name, gradient in expected.items() if gradient is not None}
        allowed = {n: budget(output, bench.dtype, errors(_held(own[n]), e), e.numel()) for n, e in reached.items()}
        found = {n: errors(_or_zeros(seen[n], e), e) for n, e in reached.items()}
        data: dict[str, object] = {}

        def exceeded() -> bool:
            return any(not found[n].used(allowed[n]) <= 1 for n in reached)

        plain = bench.dtype == torch.float32 and not bench.case.fp8
        if plain and exceeded():
            # Only now, because it costs some more backwards: more draws of the reference's own error.
            largest = bench.oracle.remember("neighbours", lambda: _neighbours(bench))[output]
            allowed = {
                n: budget(output, bench.dtype, largest[n].larger(errors(_held(own[n]), e)), e.numel())
                for n, e in reached.items()
            }
            data["budgets_include_neighbours"] = True
        if output == "kl gradients" and plain and exceeded():
            # Only now, because it costs two more backwards: the kinks can but widen a budget. In bf16 they are so many
            # that the reference's own error holds them, and so it is where FP8 moves whole entries.
            kinks = bench.oracle.remember(
                "kinks",
                lambda: kink_errors(
                    lambda: bench.oracle.model, bench.reference, bench.case, bench.oracle.tape, expected
                ),
            )
            allowed = {n: allowed[n].plus(kinks[n]) for n in reached}
            data["budgets_include_kinks"] = True
        worst = {side: max(_shares(found, allowed, side)) for side in SIDES}
        unreached = [n for n, g in seen.items() if (g is None) != (expected[n] is None)]
        measures = [Measure(f"{side}, share of budget", share, 1.0) for side, (share, _) in worst.items()]
        measures.append(Measure("reached by one model only", float(len(unreached)), 0.0, "parameters"))
        top = max(worst.values())
        reasons = [f"the gradient reaches {unreached[0]} in one model only"] if unreached else []
        reasons += [f"worst: {top[1]}"] if top[0] > 1 else []
        noisy = bench.dtype == torch.bfloat16 or bench.case.fp8
        nulls = bench.oracle.remember((output, "nulls", *data), lambda: _gradient_nulls(reached, allowed, noisy))
        used = sorted(((max(_share(found[n], allowed[n], s) for s in SIDES), n) for n in reached), reverse=True)
        data["worst_parameters"] = {name: share for share, name in used[:8]}
        return Answer(measures, nulls, "; ".join(reasons), data)

    return check


def _neighbours(bench: Bench) -> dict[str, dict[str, Errors]]:
    """The largest errors, side by side, of the reference on weights that differ by rounding, by loss and parameter."""
    largest: dict[str, dict[str, Errors]] = {output: {} for output in _GRADIENTS}
    for seen in bench.oracle.neighbours():
        for output, pick in _GRADIENTS.items():
            for name, e in pick(bench.expected).items():
                if e is not None:
                    found = errors(_held(pick(seen)[name]), e)
                    largest[output][name] = found.larger(largest[output].get(name, found))
    return largest


def _held(gradient: torch.Tensor | None) -> torch.Tensor:
    assert gradient is not None, "the reference's gradients reach the same parameters in every dtype"
    return gradient


def _or_zeros(gradient: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _share(found: Errors, allowed: Errors, side: str) -> float:
    value, limit = getattr(found, side), getattr(allowed, side)
    return value / limit if value == value else float("inf")


def _shares(found: dict[str, Errors], allowed: dict[str, Errors], side: str) -> list[tuple[float, str]]:
    return [(_share(found[name], allowed[name], side), name) for name in found]


def _gradient_nulls(reached: dict[str, torch.Tensor], allowed: dict[str, Errors], noisy: bool) -> list[NullCandidate]:
    """Each kind of null candidate, tried on every parameter by itself and rejected for every one.

    In bf16 or FP8 the noise of one short vector hides a fault that the same parameter of another layer shows. There
    (`noisy`) a candidate is tried on a role, the parameters of one name in all layers, and 4 % on all parameters at once.
    """
    accepted: dict[str, list[str]] = {}
    gain_rejected = False
    seen_of: dict[tuple[str, str], bool] = {}
    for name, e in reached.items():
        role = re.sub(r"layers\.\d+\.", "", name) if noisy else name
        for kind, wrong in null_candidates(e):
            seen = rejected(wrong, e, allowed[name])
            if kind == "4 % gain" and noisy:
                gain_rejected |= seen
            else:
                seen_of[kind, role] = seen_of.get((kind, role), False) or seen
    for (kind, role), seen in seen_of.items():
        accepted.setdefault(kind, []).extend([] if seen else [role])
    if noisy:
        accepted["4 % gain on all"] = [] if gain_rejected else ["every parameter"]
    return [
        NullCandidate(kind, not names, f"accepted for {len(names)}, e.g. {names[0]}" if names else "")
        for kind, names in accepted.items()
    ]


_GRADIENTS: dict[str, Callable[[Observation], Gradients]] = {
    "lm gradients": lambda o: o.lm_grads,
    "kl gradients": lambda o: o.kl_grads,
}
_TAPE = frozenset({"tape"})
CHECKS = [
    Check("parity.logits", "parity", logits, _TAPE),
    Check("parity.lm_loss", "parity", lm_loss, _TAPE),
    Check(
        "parity.lm_gradients",
        "parity",
        gradients("lm gradients", _GRADIENTS["lm gradients"]),
        _TAPE,
        too_large=TOO_MANY_GRADIENTS,
    ),
    Check("kl.loss", "kl", kl_loss, _TAPE | {"indexer-kl"}),
    # Rounding to FP8 flips entries, and bf16 hides which: together they leave the indexer's small gradients no
    # significant digit. Each alone is judged, FP8 in fp32 and bf16 on the other cases.
    Check(
        "kl.gradients",
        "kl",
        gradients("kl gradients", _GRADIENTS["kl gradients"]),
        _TAPE | {"indexer-kl"},
        except_for=frozenset({("fp8", torch.bfloat16)}),
    ),
]
