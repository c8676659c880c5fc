"""Probes of single operators that hold for all of them: isolation, batches, repeats, derivatives.

Letters: B batch, L query rows, S key slots, H attention heads, K selected keys.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from reference.indexer import selected_mask

from ..budgets import DERIVATIVES
from ..checks.base import Check, SubjectError
from ..operators.bench import OUTPUTS, Call, OperatorBench, Outcome, copied
from ..operators.cases import OperatorCase
from ..operators.slack import term_sizes
from . import operator_attention, operator_kl
from .operator_sides import (
    Notes,
    clear_differences,
    clear_of_kinks,
    gradients_of,
    narrowed,
    other_keys,
    probe,
    seen_by,
    with_keys,
)  # fmt: skip

FORMS = {
    "index_scores": ("index_scores",),
    "indexer_topk": ("indexer_topk",),
    "sparse_mla": ("sparse_mla",),
    "dense_mla": ("dense_mla", "dense_mla, selected"),
    "indexer_kl": ("indexer_kl", "indexer_kl, selected"),
}
NOT_A_NUMBER, HUGE = float("nan"), 1e30
Run = Callable[..., None]


def hidden_keys(notes: Notes, operator: str) -> None:
    """NaN, 1e30 and other numbers in keys that no row sees change no output and no gradient (B10, C01).

    The first and the last fifth of the slots are hidden: slot 0, which a clamped −1 would read, and the last one, which
    a wrapped −1 would, are among them. Null candidates: other numbers in the keys that rows do see.
    """
    bench = notes.bench
    gradients = gradients_of(bench, operator)
    slots = torch.arange(bench.case.sizes.slots, device=bench.device)
    low = max(1, bench.case.sizes.slots // 5)
    high = max(low + 1, bench.case.sizes.slots - low)
    hidden = (slots < low) | (slots >= high)
    for form in FORMS[operator]:
        call = narrowed(bench.call(form), low, high)
        before = bench.ask(call, gradients)
        draw = other_keys(bench, "hidden keys")
        for kind, value in (("NaN", NOT_A_NUMBER), ("1e30", HUGE), ("other numbers", draw)):
            after = bench.ask(with_keys(call, hidden, value), gradients)
            reason = (
                f"{kind} in a key that no row sees reaches the result: −1, the bounds or the mask do not keep it out"
            )
            notes.same(f"{kind} in hidden keys", call, form, after, before, reason)
        seen = bench.ask(with_keys(call, ~hidden, draw))
        notes.differs("other numbers in seen keys", call, form, seen, before)


def columns(notes: Notes, operator: str) -> None:
    """A key changes its own column of the index scores, and no other. Null candidate: the column itself."""
    bench = notes.bench
    call, before = bench.call(operator), bench.seen(operator)
    slots = torch.arange(bench.case.sizes.slots, device=bench.device)
    changed = slots % 3 == 0
    for kind, value in (("NaN", NOT_A_NUMBER), ("1e30", HUGE), ("other numbers", other_keys(bench, "columns"))):
        after = bench.ask(with_keys(call, changed, value))
        kept = Outcome({"I": torch.where(changed, before.outputs["I"], after.outputs["I"])})
        reason = f"{kind} in one key reaches the scores of another"
        notes.same(f"{kind} in other keys", call, operator, kept, before, reason)
        notes.differs("the key itself", call, operator, after, before)


def unseen_rows(notes: Notes, operator: str) -> None:
    """Keys changed that some rows see and others do not leave the others as they were (B01, B02, B05, B07).

    The keys are the later half of what is visible, so that a row that sees the future notices; then every key of a row's
    neighbours in the middle, so that another document notices. Null candidates: the rows that do see them.
    """
    bench = notes.bench
    for form in FORMS[operator]:
        call, before = bench.call(form), bench.seen(form)
        visible = seen_by(call)
        slots = torch.arange(visible.shape[-1], device=bench.device)
        last = torch.where(visible, slots, -1).amax(-1)
        for name, changed in (
            ("later keys", slots > int(last.flatten().median())),
            ("keys in the middle", _middle(visible, slots)),
        ):
            untouched = ~(visible & changed).any(-1)
            if not bool(untouched.any()) or not bool((~untouched).any()):
                continue
            kinds: dict[str, float | Callable[[torch.Tensor], torch.Tensor]] = {
                "1e30": HUGE,
                "other numbers": other_keys(bench, name),
            }
            # A tile of dense attention multiplies what one of its rows sees by a weight of 0 in the others, and 0 · NaN
            # is NaN: that much is granted. Gathered keys have no such excuse.
            if operator == "sparse_mla":
                kinds["NaN"] = NOT_A_NUMBER
            for kind, value in kinds.items():
                after = bench.ask(with_keys(call, changed, value))
                reason = (
                    f"{kind} in {name} reach rows that do not see them: they look at the future, or across documents"
                )
                notes.same(f"{kind} in {name}", call, form, after, before, reason, untouched)
            after = bench.ask(with_keys(call, changed, other_keys(bench, name)))
            notes.differs("rows that see the keys", call, form, after, before, ~untouched)


def _middle(visible_BLS: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The keys of the row in the middle: its whole document as far as it sees it."""
    return visible_BLS[:, visible_BLS.shape[1] // 2].any(0).expand_as(slots)


def batches(notes: Notes, operator: str) -> None:
    """A batch in another order gives the same in that order, and an entry by itself the same as in the batch.

    Null candidates: the results in the wrong order, and 4 % more.
    """
    bench = notes.bench
    gradients = gradients_of(bench, operator)
    for form in FORMS[operator]:
        call, before = bench.call(form), bench.seen(form, gradients)
        turned = _entries(call, lambda x: x.flip(0))
        after = _of_outcome(bench.ask(turned, gradients), lambda x: x.flip(0))
        notes.same("entries in reverse order", call, form, after, before, "an entry depends on its place in the batch")
        size = bench.case.sizes.batch
        single = [bench.ask(_entries(call, _entry(b)), gradients) for b in range(size)]
        alone = Outcome(
            {n: _merge([one.outputs[n] for one in single]) for n in before.outputs},
            {n: _merge([one.gradient(n, call.arguments[n][:1]) for one in single]) for n in before.gradients},
        )
        notes.same("entries one by one", call, form, alone, before, "an entry depends on the others in its batch")
        if size > 1:
            notes.differs("results in the wrong order", call, form, _of_outcome(before, lambda x: x.roll(1, 0)), before)
        name = OUTPUTS[operator][0] if operator != "indexer_topk" else "lse"
        more = {**before.outputs, name: before.outputs[name] * 1.04}
        notes.differs("4 % more", call, form, Outcome(more), Outcome(before.outputs))


def _entry(b: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x[b : b + 1]


def _entries(call: Call, change: Callable[[torch.Tensor], torch.Tensor]) -> Call:
    """The call with `change` applied along the batch, to what is fed back as well."""
    arguments = {n: change(x) if isinstance(x, torch.Tensor) else x for n, x in call.arguments.items()}
    cotangent = call.cotangent
    return replace(
        call,
        arguments=arguments,
        cotangent=change(cotangent) if cotangent is not None and cotangent.dim() else cotangent,
    )


def _of_outcome(outcome: Outcome, change: Callable[[torch.Tensor], torch.Tensor]) -> Outcome:
    return Outcome(
        {n: change(x) if x.dim() else x for n, x in outcome.outputs.items()},
        {n: None if g is None else change(g) for n, g in outcome.gradients.items()},
    )


def _merge(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if parts[0].dim() else torch.stack(parts).sum(0)


def nested(notes: Notes, operator: str) -> None:
    """What is selected with fewer keys is selected with more, as far as scores are clear of the boundary.

    Null candidate: the selection of the next row.
    """
    bench = notes.bench
    call, k = bench.call(operator), bench.case.sizes.k
    larger = bench.seen(operator).outputs["indices"]
    for fewer in sorted({1, k // 2, k - 1} - {0, k}):
        smaller = bench.ask(call.changed(k=fewer)).outputs["indices"]
        lost = _lost(bench, smaller, larger)
        notes.measure(
            f"k = {fewer} of {k}",
            float(lost),
            0.0,
            f"{lost} keys that are among the best {fewer} are not among the best {k}",
            "keys",
        )
        notes.null("the next row's selection", _lost(bench, smaller, larger.roll(-1, 1)) > 0)


def _lost(bench: OperatorBench, smaller: torch.Tensor, larger: torch.Tensor) -> int:
    slots = bench.case.sizes.slots
    if not bool(((smaller >= -1) & (smaller < slots)).all() and ((larger >= -1) & (larger < slots)).all()):
        return int(smaller.numel())
    union = selected_mask(smaller, slots) | selected_mask(larger, slots)
    # The larger selection with what it lost put back: where that differs clearly, it was lost.
    width = int(union.sum(-1).max())
    place = torch.where(union, torch.arange(slots, device=union.device), slots).sort(-1).values[..., :width]
    return clear_differences(bench, torch.where(place == slots, -1, place).to(torch.int32), larger)


def bitwise(notes: Notes, operator: str) -> None:
    """The same bits when run again, after a longer input has passed through, and for other numbers in the same memory.

    Null candidates: one entry off by one unit in the last place, and another input (B11, C05).
    """
    bench = notes.bench
    gradients = gradients_of(bench, operator)
    sizes = bench.case.sizes
    longer = OperatorCase(
        bench.case.name, replace(sizes, rows=2 * sizes.rows, slots=2 * sizes.slots), bench.case.family, bench.case.seed,
        bench.case.scale, bench.case.config,
    )  # fmt: skip
    between = OperatorBench(longer, bench.subject, bench.dtype, bench.device)
    for form in FORMS[operator]:
        call = bench.call(form)
        first = bench.ask(call, gradients)
        notes.measure(
            "run again",
            float(_bits_apart(bench.ask(call, gradients), first)),
            0.0,
            "a second run gives other bits",
            "entries",
        )
        between.ask(between.call(form), gradients)
        after = _bits_apart(bench.ask(call, gradients), first)
        notes.measure(
            "after a longer input",
            float(after),
            0.0,
            "a run after a longer input gives other bits: a buffer is stale",
            "entries",
        )
        other = call.changed(**{n: _rolled(x) for n, x in call.arguments.items() if _numbers(x)})
        fresh = bench.ask(other)
        stale = _bits_apart(_in_the_same_memory(bench, call, other), fresh)
        notes.measure(
            "other numbers in the same memory",
            float(stale),
            0.0,
            "an answer is kept by where its input lies, not by what it is",
            "entries",
        )
        notes.null("another input", _bits_apart(fresh, Outcome(first.outputs)) > 0)
        notes.null("one unit in the last place", _bits_apart(_nudged(first), first) == 1)


def _numbers(argument: object) -> bool:
    """Whether an argument holds numbers that can be written over: expanded memory cannot."""
    return isinstance(argument, torch.Tensor) and argument.is_floating_point() and 0 not in argument.stride()


def _rolled(x: torch.Tensor) -> torch.Tensor:
    """x with its second axis moved on by one, in memory that is laid out like x's."""
    return copied(x).copy_(x.roll(1, 1))


def _in_the_same_memory(bench: OperatorBench, call: Call, other: Call) -> Outcome:
    """What the subject answers to `other` written over the memory in which it was given `call` just before."""
    held = {n: copied(x) if isinstance(x, torch.Tensor) else x for n, x in call.arguments.items()}

    def twice() -> Any:
        function = bench.subject.operators[call.operator]
        with torch.no_grad():
            function(*held.values())
            for name, x in held.items():
                if _numbers(x):
                    x.copy_(other.arguments[name])
            return function(*held.values())

    returned = bench.of_subject(twice)
    tensors = returned if isinstance(returned, (tuple, list)) else (returned,)
    return Outcome(dict(zip(OUTPUTS[call.operator], tensors, strict=True)))


def _bits_apart(a: Outcome, b: Outcome) -> int:
    """Entries of outputs and gradients that are not the same bits; NaN is the same as NaN."""
    count = 0
    for mine, theirs in ((a.outputs, b.outputs), (a.gradients, b.gradients)):
        for name, y in theirs.items():
            x = mine[name]
            if x is None or y is None:
                count += x is not y
            elif x.shape != y.shape:
                count += y.numel()
            else:
                count += int(((x != y) & ~((x != x) & (y != y))).sum())
    return count


def _nudged(outcome: Outcome) -> Outcome:
    name = "lse" if "indices" in outcome.outputs else next(iter(outcome.outputs))
    x = outcome.outputs[name].clone()
    place = int(torch.isfinite(x).flatten().byte().argmax())
    flat = x.flatten()
    flat[place] = torch.nextafter(flat[place], torch.full_like(flat[place], torch.inf))
    return Outcome({**outcome.outputs, name: flat.view(x.shape)}, outcome.gradients)


def derivatives(notes: Notes, operator: str) -> None:
    """The gradient along a direction of random lengths is what central differences say, one argument at a time.

    In fp64 where the operator computes in it, else in fp32 with a longer step. Indices are frozen, and dot products of
    the indexer are kept away from the kinks of the ReLU. Null candidates: no gradient, 4 % more, a gradient that lacks
    its last channel's share.
    """
    bench = notes.bench
    for form in FORMS[operator]:
        call = _smooth(bench, form)
        generator = bench.case.generator("directions")
        step, allowed, wide = _precision(bench, call, notes)
        gradients, sizes = bench.ask(wide, gradients=True), term_sizes(wide, torch.float32)
        for name in call.wrt:
            x = wide.arguments[name]
            g = gradients.gradient(name, x).double()
            lengths = torch.randn(x.shape, generator=generator, dtype=torch.float64).abs().to(x.device)
            # Along the gradient's own signs no two shares of the slope cancel, so that a small fault is seen, too.
            # Rows may be of very different size, and each moves by a share of its own.
            moved = torch.where(g < 0, -lengths, lengths) * x.double().square().mean(-1, keepdim=True).sqrt()
            slope = (_value(bench, wide, name, moved, step) - _value(bench, wide, name, moved, -step)) / (2 * step)
            # Where everything cancels, such as with one key a row, rounding is all there is.
            size = max(abs(slope), abs(float((g * moved).sum()))) + 0.01 * float((sizes[name] * moved.abs()).sum())

            def off(
                gradient: torch.Tensor, slope: float = slope, size: float = size, moved: torch.Tensor = moved
            ) -> float:
                return abs(float((gradient * moved).sum()) - slope) / size if size else 0.0

            label = f"{form}, d{name.partition('_')[0]}"
            reason = f"d{name.partition('_')[0]} is not the derivative of its own forward"
            notes.measure(label, off(g), allowed, reason, "of its size")
            lacking = g.clone()
            lacking[..., -1] = 0.0
            notes.null("no gradient", off(torch.zeros_like(g)) > allowed)
            notes.null("4 % more", off(1.04 * g) > allowed)
            notes.null("the last channel's share is missing", off(lacking) > allowed)


def _smooth(bench: OperatorBench, form: str) -> Call:
    """The call of `form` in fp64, without kinks, and with the logsumexp that its inputs have in fp64."""
    call = bench.call(form).to(torch.float64)
    if "lse_BLH" in call.arguments:
        attention = "sparse_mla" if "indices_BLK" in call.arguments else "dense_mla"
        call = call.changed(lse_BLH=bench.expected(attention).outputs["lse"])
    if call.operator not in ("index_scores", "indexer_kl"):
        return call
    first, second = list(call.arguments)[:2]
    q, k = clear_of_kinks(call.arguments[first], call.arguments[second])
    return call.changed(**{first: q, second: k})


def _precision(bench: OperatorBench, call: Call, notes: Notes) -> tuple[float, float, Call]:
    """(step, tolerance, the call) in fp64 if the operator computes in it, else in fp32.

    It does when outputs change smoothly with a step that fp32 would drown.
    """
    rule = DERIVATIVES[torch.float64]
    try:
        name = call.wrt[0]
        x = call.arguments[name]
        base, up, down = (bench.ask(call.changed(**{name: x * (1 + s)})) for s in (0.0, rule.step, -rule.step))
    except SubjectError as error:
        notes.data["computed in"] = f"float32, because in float64 {error}"
    else:
        last = OUTPUTS[call.operator][0] if call.operator != "indexer_kl" else "kl"
        middle, rest = base.outputs[last].double(), up.outputs[last].double() + down.outputs[last].double()
        if float((rest - 2 * middle).abs().max()) <= rule.noise * float(middle.abs().max()):
            notes.data["computed in"] = "float64"
            return rule.step, rule.allowed, call
        notes.data["computed in"] = "float32, although float64 is accepted"
    rule = DERIVATIVES[torch.float32]
    return rule.step, rule.allowed, call.to(torch.float32)


def _value(bench: OperatorBench, call: Call, name: str, direction: torch.Tensor, step: float) -> float:
    """What is fed back, times the output, at a step along `direction`."""
    x = call.arguments[name]
    out = bench.ask(call.changed(**{name: (x.double() + step * direction).to(x)})).outputs[OUTPUTS[call.operator][0]]
    assert call.cotangent is not None
    return float((out.double() * call.cotangent.to(out.device).double()).sum())


def _each(
    run: Run, suffix: str, operators: tuple[str, ...], *extra: str, cases: tuple[str, ...], fp32_only: bool = False
) -> list[Check]:
    return [
        probe(
            f"{name}_{suffix}", partial(run, operator=name), {name, *(f"{name}:{e}" for e in extra)}, cases, fp32_only
        )
        for name in operators
    ]


_ROWS = ("indexer_topk", "sparse_mla", "dense_mla", "indexer_kl")
_BACKWARD = ("index_scores", "sparse_mla", "dense_mla", "indexer_kl")
CHECKS: list[Check] = [
    *_each(hidden_keys, "hidden_keys", _ROWS, cases=("causal", "odd-shapes")),
    *_each(columns, "columns", ("index_scores",), cases=("causal", "odd-shapes")),
    *_each(unseen_rows, "unseen_rows", _ROWS, cases=("documents", "chunk")),
    *_each(batches, "batches", (*_ROWS, "index_scores"), cases=("documents", "odd-shapes")),
    *_each(nested, "nested", ("indexer_topk",), cases=("causal", "duplicate-keys", "negative-weights", "narrow-range")),
    *_each(bitwise, "bitwise", _ROWS, "bitwise", cases=("causal", "odd-shapes")),
    *_each(derivatives, "derivatives", _BACKWARD, "backward", cases=("chunk", "odd-shapes"), fp32_only=True),
    *operator_attention.CHECKS,
    *operator_kl.CHECKS,
]
