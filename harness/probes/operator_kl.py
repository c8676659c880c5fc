"""Probes of the indexer's KL: its sign, its zero, its invariance, its closed gradient, and that it is a sum over rows.

Letters: B batch, L query rows, S key slots, H attention heads, D width of a query or key, J indexer heads, E width of
an indexer head.
"""

from collections.abc import Callable
from itertools import pairwise

import torch

from ..budgets import budget
from ..metrics import errors
from ..operators.bench import Call, OperatorBench, Outcome, plain_outcome
from ..operators.masked import IndexerDivergence
from ..operators.slack import rounding, rounding_share, term_sizes
from .operator_sides import Notes, clear_of_kinks, gradients_of, probe

FORMS = ("indexer_kl", "indexer_kl, selected")


def not_negative(notes: Notes) -> None:
    """No row's divergence is below 0, but for rounding. Null candidate: their negatives."""
    bench = notes.bench
    for form in FORMS:
        rows = bench.seen(form).outputs["kl"].double()
        allowed = float(rounding(term_sizes(bench.call(form), torch.float32)["kl"], torch.float32).max())
        lowest = float(-rows.min())
        reason = f"{int((rows < -allowed).sum())} rows have a divergence below 0"
        notes.measure(f"{form}, largest below 0", lowest, allowed, reason, "nats")
        notes.null("the negatives", float(rows.max()) > allowed)


def zero_at_equality(notes: Notes) -> None:
    """0, with gradient 0, where index scores are the main attention's logits.

    Every head is the same, all products are positive and w = scale / J, so that I = scale · q · k. Only rounding is
    left. Null candidate: head weights twice as large.
    """
    bench = notes.bench
    call = _equal(bench)
    gradients = gradients_of(bench, "indexer_kl")
    seen = bench.ask(call, gradients)
    sizes = term_sizes(call, torch.float32)
    pairs = {"kl": (seen.outputs["kl"], sizes["kl"])}
    for name in seen.gradients:
        pairs[f"d{name.partition('_')[0]}"] = (seen.gradient(name, call.arguments[name]), sizes[name])
    doubled = bench.ask(call.changed(w_BLJ=2 * call.arguments["w_BLJ"])).outputs["kl"]
    for label, (x, size) in pairs.items():
        allowed = float(rounding(size, torch.float32).max())
        notes.measure(
            label, float(x.double().abs().max()), allowed, f"{label} is not 0 where both distributions are the same"
        )
    notes.null(
        "head weights twice as large",
        float(doubled.double().abs().max()) > float(rounding(sizes["kl"], torch.float32).max()),
    )


def _equal(bench: OperatorBench) -> Call:
    call = bench.call("indexer_kl")
    a = call.arguments
    width = min(a["iq_BLJE"].shape[-1], a["q_BLHD"].shape[-1])

    def alike(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The first head's absolute values in the first channels of every head, 0 in the others."""
        short = x[..., :width].abs()
        if like.dim() == 4:
            short = (short[:, :, :1] if short.dim() == 4 else short[:, :, None]).expand(-1, -1, like.shape[2], -1)
        return torch.nn.functional.pad(short, (0, like.shape[-1] - width))

    q, k = alike(a["q_BLHD"], a["q_BLHD"]), alike(a["k"], a["k"])
    wide = q.double() * a["scale"], k.double()
    pattern = "blhd,bshd->blhs" if k.dim() == 4 else "blhd,bsd->blhs"
    logits = torch.einsum(pattern, *wide).masked_fill(~bench.visible_BLS[:, :, None], -torch.inf)
    heads = a["iq_BLJE"].shape[2]
    return call.changed(
        iq_BLJE=alike(a["q_BLHD"], a["iq_BLJE"]), ik_BSE=alike(k[:, :, 0] if k.dim() == 4 else k, a["ik_BSE"]),
        w_BLJ=torch.full_like(a["w_BLJ"], a["scale"] / heads), q_BLHD=q, k=k, lse_BLH=logits.logsumexp(-1).to(a["lse_BLH"]),
    )  # fmt: skip


def shift(notes: Notes) -> None:
    """A constant added to all scores of a row changes nothing: softmax does not see it.

    The last head's dot product is 1 with every key, so that its weight is the constant. The gradient of that weight is
    Σ (softmax(I) − p) = 0. Null candidate: scores half as large again.
    """
    bench = notes.bench
    gradients = gradients_of(bench, "indexer_kl")
    for form in FORMS:
        call = bench.call(form)
        iq, ik, w = (call.arguments[n].clone() for n in ("iq_BLJE", "ik_BSE", "w_BLJ"))
        iq[..., -1], ik[..., -1] = 0.0, 1.0
        iq[:, :, -1] = 0.0
        iq[:, :, -1, -1] = 1.0
        w[..., -1] = 0.0
        moved = w.clone()
        moved[..., -1] = 2.0 - torch.arange(w.shape[1], device=w.device) % 5
        call = call.changed(iq_BLJE=iq, ik_BSE=ik)
        before, after = (bench.ask(call.changed(w_BLJ=x), gradients) for x in (w, moved))
        notes.same(
            f"{form}, a constant more", call.changed(w_BLJ=moved), form, _without_constant(after), _without_constant(before),
            "a constant added to a row's scores changes the divergence",
        )  # fmt: skip
        larger = bench.ask(call.changed(w_BLJ=1.5 * w))
        notes.differs("scores half as large again", call, form, larger, before)
        if gradients:
            rest = float(after.gradient("w_BLJ", w)[..., -1].double().abs().max())
            allowed = float(
                rounding(term_sizes(call.changed(w_BLJ=moved), torch.float32)["w_BLJ"][..., -1], torch.float32).max()
            )
            notes.measure(f"{form}, the constant's own gradient", rest, allowed, "Σ (softmax(I) − p) of a row is not 0")


def _without_constant(outcome: Outcome) -> Outcome:
    """The gradients without what the constant's own head and channel feed back."""
    found = {}
    for name, gradient in outcome.gradients.items():
        kept = None if gradient is None else gradient.clone()
        if kept is not None:
            if name == "ik_BSE":
                kept[..., -1] = 0.0
            else:
                kept[:, :, -1] = 0.0
        found[name] = kept
    return Outcome(outcome.outputs, found)


def closed_form(notes: Notes) -> None:
    """The gradient is dI = softmax(I) − p carried to w, q and k (spec 3.3), on products that are clear of the kinks.

    Null candidates: p left out, softmax(I) left out, the gate of the ReLU left out.
    """
    bench = notes.bench
    for form in FORMS:
        call = bench.call(form)
        iq, ik = clear_of_kinks(call.arguments["iq_BLJE"], call.arguments["ik_BSE"])
        call = call.changed(iq_BLJE=iq, ik_BSE=ik)
        seen = bench.ask(call, gradients=True)
        own = plain_outcome(call)
        exact = IndexerDivergence.of(call)
        dI_BLS = exact.softmax_BLS - exact.p_BLS
        right = exact.gradients(dI_BLS)
        wrong = {
            "p left out": exact.gradients(exact.softmax_BLS), "softmax(I) left out": exact.gradients(-exact.p_BLS),
            "the gate of the ReLU left out": exact.gradients(dI_BLS, gated=False),
        }  # fmt: skip
        for name in call.wrt:
            e = right[name]
            dtype = torch.promote_types(call.arguments[name].dtype, bench.dtype)
            allowed = budget(
                "indexer_kl gradients", dtype, errors(own.gradient(name, e), e), e.numel(), bench.device.type
            )
            label = f"{form}, d{name.partition('_')[0]}"
            reason = f"{label} is not softmax(I) − p carried back"
            share = errors(seen.gradient(name, e), e).used(allowed)
            if not share <= 1:
                share = rounding_share(call, name, dtype, seen.gradient(name, e), e)
            notes.measure(f"{label}, share of budget", share, 1.0, reason)
            for kind, other in wrong.items():
                notes.null(kind, not errors(other[name], e).used(allowed) <= 1)


def a_sum_over_rows(notes: Notes) -> None:
    """Rows in three micro-batches add up to the whole, in the loss and in every gradient; rows without keys add nothing.

    Null candidates: a micro-batch left out, and appended rows that do see keys.
    """
    bench = notes.bench
    gradients = gradients_of(bench, "indexer_kl")
    for form in FORMS:
        call, before = bench.call(form), bench.seen(form, gradients)
        rows = bench.case.sizes.rows
        cuts = sorted({0, rows // 4, rows // 2, rows})
        blocks = [slice(a, b) for a, b in pairwise(cuts)]
        parts = [bench.ask(_rows(call, _slicing(here)), gradients) for here in blocks]
        reason = "blocks of rows do not add up to the whole"
        notes.same(f"{form}, in blocks of rows", call, form, _summed(parts, call), before, reason)
        if len(parts) > 1:
            notes.differs("a block left out", call, form, _total(parts[:-1]), _total([before]))
        for kind, empty in (("rows without keys", True), ("rows with keys", False)):
            longer = bench.ask(_appended(call, empty), gradients and empty)
            cut = Outcome(
                {"kl_sum": longer.outputs["kl_sum"], "kl": longer.outputs["kl"][:, :rows]},
                {n: g if g is None or n == "ik_BSE" else g[:, :rows] for n, g in longer.gradients.items()},
            )
            if not empty:
                notes.differs("rows with keys appended", call, form, cut, before)
                continue
            notes.same(f"{form}, {kind} appended", call, form, cut, before, "rows without keys change the result")
            more = [g[:, rows:] for n, g in longer.gradients.items() if g is not None and n != "ik_BSE"]
            extra = sum(float(x.abs().nan_to_num(nan=1.0).sum()) for x in (longer.outputs["kl"][:, rows:], *more))
            notes.measure(
                f"{form}, of the rows appended",
                extra,
                0.0,
                "rows without keys have a divergence or a gradient of their own",
            )


def _rows(call: Call, change: Callable[[torch.Tensor], torch.Tensor]) -> Call:
    return call.changed(
        **{n: change(x) for n, x in call.arguments.items() if isinstance(x, torch.Tensor) and "_BL" in n}
    )


def _slicing(rows: slice) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x[:, rows]


def _summed(parts: list[Outcome], call: Call) -> Outcome:
    gradients = {}
    for name in parts[0].gradients:
        found = [p.gradient(name, call.arguments[name]) for p in parts]
        gradients[name] = torch.stack(found).sum(0) if name == "ik_BSE" else torch.cat(found, 1)
    total = torch.stack([p.outputs["kl_sum"] for p in parts]).sum()
    return Outcome({"kl_sum": total, "kl": torch.cat([p.outputs["kl"] for p in parts], 1)}, gradients)


def _total(parts: list[Outcome]) -> Outcome:
    return Outcome({"kl_sum": torch.stack([p.outputs["kl_sum"] for p in parts]).sum()})


def _appended(call: Call, empty: bool) -> Call:
    """The call with its middle rows repeated behind the last, without keys if `empty`."""
    rows = call.arguments["bounds_BL2"].shape[1]
    count = min(5, rows)
    middle = slice((rows - count) // 2, (rows - count) // 2 + count)
    longer = _rows(call, lambda x: torch.cat((x, x[:, middle]), 1))
    if not empty:
        return longer
    changed = {"bounds_BL2": longer.arguments["bounds_BL2"].clone(), "lse_BLH": longer.arguments["lse_BLH"].clone()}
    changed["bounds_BL2"][:, -count:] = 0
    changed["lse_BLH"][:, -count:] = -torch.inf
    if "indices_BLK" in longer.arguments:
        changed["indices_BLK"] = longer.arguments["indices_BLK"].clone()
        changed["indices_BLK"][:, -count:] = -1
    return longer.changed(**changed)


_KL = ("indexer_kl",)
CHECKS = [
    probe("kl_not_negative", not_negative, _KL),
    probe("kl_zero_at_equality", zero_at_equality, _KL, ("causal", "documents")),
    probe("kl_shift", shift, _KL, ("causal", "documents")),
    probe("kl_closed_form", closed_form, (*_KL, "indexer_kl:backward"), ("causal", "chunk")),
    probe("kl_sum_over_rows", a_sum_over_rows, _KL, ("documents", "odd-shapes")),
]
