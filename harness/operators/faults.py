"""Known faults of kernels, each recomputed from the plain definitions: the table by which a failure is named.

A fault is a sentence and what an operator with it would return and feed back. Most change the arguments of a right
call; some stand in for a formula. Where a subject agrees with one of them, that is what is wrong with it.

Letters: B batch, L query rows, S key slots, H attention heads, D width of a query or key, V width of a value,
J indexer heads, E width of an indexer head, K selected keys, 2 = [start, end).
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from reference.attention import attention_target
from reference.indexer import index_scores, select_topk, selected_mask

from .bench import PLAIN, Call, plain_outcome
from .masked import IndexerDivergence, MaskedAttention
from .plain import Scores, kl_target, visible_keys

Tensors = dict[str, torch.Tensor]
Fault = tuple[str, Callable[[], Tensors]]
Cast = Callable[[torch.Tensor], torch.Tensor]


def faults(call: Call, gradients: bool) -> Iterator[Fault]:
    """Every known fault of the operator of `call`, those of the backward alone first if gradients are asked for."""
    exact = call.to(torch.float64)
    if gradients and call.operator in _BACKWARD:
        yield from _BACKWARD[call.operator](exact)
    yield from _FORWARD[call.operator](exact, gradients)


def _again(call: Call, gradients: bool, function: Callable[..., Any] | None = None) -> Callable[[], Tensors]:
    """What the plain definition, or `function`, makes of a changed call."""

    def run() -> Tensors:
        outcome = plain_outcome(call, function, gradients)
        return {**outcome.outputs, **{n: g for n, g in outcome.gradients.items() if g is not None}}

    return run


def _attention(call: Call, gradients: bool) -> Iterator[Fault]:
    a, scale = call.arguments, call.arguments["scale"]
    for sentence, other in (
        ("the logits are not multiplied by scale", 1.0),
        ("1/√D stands in for the scale given", a["q_BLHD"].shape[-1] ** -0.5),
        ("1/√V stands in for the scale given", _value_width(call) ** -0.5),
        ("scale is applied twice", scale**2),
        ("exponentials are to base 2 without log2(e)", scale * math.log(2)),
        ("log2(e) is multiplied in twice", scale / math.log(2)),
    ):
        yield sentence, _again(call.changed(scale=other), gradients)
    yield from _of_bounds(call, gradients) if "bounds_BL2" in a else _of_indices(call, gradients)
    q = a["q_BLHD"]
    yield (
        "head 0's queries stand in for those of every head",
        _again(call.changed(q_BLHD=q[:, :, :1].expand_as(q)), gradients),
    )
    for name in ("kv_BSD", "k_BSHD", "v_BSHV"):
        if name in a:
            yield (
                f"{name} of batch entry 0 is read for every entry",
                _again(call.changed(**{name: a[name][:1].expand_as(a[name])}), gradients),
            )
    yield "softmax is not normalised: out is not divided by the sum of exponentials", lambda: _unnormalised(call)
    yield "it is the largest logit, not the logsumexp", lambda: _maximum(call)
    yield from _of_values(call, gradients)


def _value_width(call: Call) -> int:
    return int(call.arguments["d_v"] if call.operator == "sparse_mla" else call.arguments["v_BSHV"].shape[-1])


def _unnormalised(call: Call) -> Tensors:
    masked = MaskedAttention.of(call)
    top = masked.logits_BLHS.amax(-1, keepdim=True).masked_fill(masked.empty_BL[..., None, None], 0.0)
    return {"out": torch.einsum("blhs,bshv->blhv", (masked.logits_BLHS - top).exp(), masked.v_BSHV)}


def _maximum(call: Call) -> Tensors:
    return {"lse": MaskedAttention.of(call).logits_BLHS.amax(-1)}


def _of_values(call: Call, gradients: bool) -> Iterator[Fault]:
    a, width = call.arguments, _value_width(call)
    if call.operator == "dense_mla":
        if a["k_BSHD"].shape == a["v_BSHV"].shape:
            yield "keys and values are swapped", _again(call.changed(k_BSHD=a["v_BSHV"], v_BSHV=a["k_BSHD"]), gradients)
        for name in ("k_BSHD", "v_BSHV"):
            yield (
                f"head 0 of {name} stands in for every head's",
                _again(call.changed(**{name: a[name][:, :, :1].expand_as(a[name])}), gradients),
            )
        return
    rest = a["q_BLHD"].shape[-1] - width
    if rest:
        short = a["q_BLHD"].clone()
        short[..., width:] = 0.0
        yield (
            "only the first d_v columns enter the logits: the rotary part is left out",
            _again(call.changed(q_BLHD=short), gradients),
        )
        # The first d_v columns of the rolled latent are the last of the given one.
        rolled = {"q_BLHD": a["q_BLHD"].roll(-rest, -1), "kv_BSD": a["kv_BSD"].roll(-rest, -1)}
        yield "values are the last d_v columns of kv, not the first", _again(call.changed(**rolled), False)


def _of_indices(call: Call, gradients: bool) -> Iterator[Fault]:
    indices, slots = call.arguments["indices_BLK"], call.arguments["kv_BSD"].shape[1]
    named = indices >= 0
    last = named.long().cumsum(-1) == named.sum(-1, keepdim=True)
    for sentence, other in (
        ("index −1 is read as slot 0", indices.clamp_min(0)),
        ("index −1 is read as the last slot", torch.where(named, indices, slots - 1)),
        ("the last index of each row is left out", indices.masked_fill(last & named, -1)),
        ("the first index of each row is left out", indices.masked_fill((named.cumsum(-1) == 1) & named, -1)),
        ("what stands behind a row's first −1 is left out", indices.masked_fill((~named).cumsum(-1) > 0, -1)),
        ("indices of batch entry 0 are used for every entry", indices[:1].expand_as(indices)),
        ("every row reads the next row's indices", indices.roll(-1, 1)),
        ("every row reads the previous row's indices", indices.roll(1, 1)),
        ("row 0's indices are used for every row", indices[:, :1].expand_as(indices)),
    ):
        yield sentence, _again(call.changed(indices_BLK=other), gradients)
    if not gradients:
        kv = call.arguments["kv_BSD"]
        wider = torch.cat((kv, torch.zeros_like(kv[:, :1])), 1)
        unmasked = call.changed(kv_BSD=wider, indices_BLK=torch.where(named, indices, slots))
        yield "index −1 is not masked: it counts as a key of zeros", _again(unmasked, gradients)


def _of_bounds(call: Call, gradients: bool) -> Iterator[Fault]:
    for sentence, bounds in other_bounds(call):
        yield sentence, _again(call.changed(bounds_BL2=bounds), gradients)
    if "indices_BLK" in call.arguments:
        yield "the indices are ignored", _again(call.changed(indices_BLK=None), gradients)


def other_bounds(call: Call) -> Iterator[tuple[str, torch.Tensor]]:
    """Wrong readings of a call's bounds."""
    bounds = call.arguments["bounds_BL2"]
    slots = next(x.shape[1] for n, x in call.arguments.items() if n in ("k_BSE", "k_BSHD", "ik_BSE"))
    start, end = bounds.unbind(-1)
    everything = torch.stack((torch.zeros_like(start), torch.full_like(end, slots)), -1)
    yield "future keys are seen: the rows' ends are ignored", torch.stack((start, torch.full_like(end, slots)), -1)
    yield "documents are crossed: the rows' starts are ignored", torch.stack((torch.zeros_like(start), end), -1)
    yield "future keys are seen and documents crossed: the bounds are ignored", everything
    yield (
        "a future key is seen: a row's end is taken as inclusive",
        torch.stack((start, (end + 1).clamp_max(slots)), -1),
    )
    yield "each row's last key is left out", torch.stack((start, torch.maximum(end - 1, start)), -1)
    yield "each row's first key is left out", torch.stack((torch.minimum(start + 1, end), end), -1)
    yield "bounds of batch entry 0 are used for every entry", bounds[:1].expand_as(bounds)
    row = torch.arange(bounds.shape[1], device=bounds.device).expand_as(end) + 1
    yield "the offset of the chunk is ignored: row t ends at t + 1", torch.stack((torch.minimum(start, row), row), -1)


def _attention_backward(call: Call) -> Iterator[Fault]:
    m = MaskedAttention.of(call)
    weights, nothing = m.weights_BLHS, torch.zeros_like(m.weights_BLHS)
    yield "Δ = Σ P dP is not subtracted", lambda: m.gradients(weights * m.dP_BLHS * m.scale, weights)
    if m.d_v is not None:
        yield "the part that flows through the values is missing", lambda: m.gradients(m.dS_BLHS, nothing)
        yield "the part that flows through the logits is missing", lambda: m.gradients(nothing, weights)
    rows = torch.arange(weights.shape[1], device=weights.device)[:, None]
    seen = m.visible_BLS
    for sentence, kept in (
        ("last", torch.where(seen, rows, -1).amax(1, keepdim=True)),
        ("first", torch.where(seen, rows, weights.shape[1]).amin(1, keepdim=True)),
    ):
        only = (rows == kept)[:, :, None]
        yield (
            f"slots that several rows name are overwritten, not added to: only the {sentence} row counts",
            partial(m.gradients, m.dS_BLHS * only, weights * only),
        )
    for head, sentence in ((0, "first"), (-1, "last")):
        one = torch.zeros(weights.shape[2], dtype=weights.dtype, device=weights.device)
        one[head] = 1.0
        one = one[:, None]
        yield f"only the {sentence} head feeds back", partial(m.gradients, m.dS_BLHS * one, weights * one)


def score_faults() -> Iterator[tuple[str, Scores]]:
    """Wrong index scores, as functions of q, k and w."""

    def dots(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.einsum("blje,bse->bljs", q, k)

    def weighted(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bljs,blj->bls", x, w)

    yield "the ReLU is missing", lambda q, k, w: weighted(dots(q, k), w)
    yield "the ReLU comes after the sum over heads", lambda q, k, w: weighted(dots(q, k), w).relu()
    yield "the ReLU is an absolute value", lambda q, k, w: weighted(dots(q, k).abs(), w)
    yield "the head weights are missing", lambda q, k, w: weighted(dots(q, k).relu(), torch.ones_like(w))
    yield "the head weights are taken by their absolute value", lambda q, k, w: weighted(dots(q, k).relu(), w.abs())
    yield "the head weights are softmaxed", lambda q, k, w: weighted(dots(q, k).relu(), w.softmax(-1))
    yield "the largest head stands in for the sum", lambda q, k, w: (dots(q, k).relu() * w[..., None]).amax(2)
    yield "only the first indexer head counts", lambda q, k, w: index_scores(q[:, :, :1], k, w[:, :, :1])
    yield "the last indexer head is left out", lambda q, k, w: index_scores(q[:, :, :-1], k, w[:, :, :-1])
    yield "keys of batch entry 0 are read for every entry", lambda q, k, w: index_scores(q, k[:1].expand_as(k), w)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        cast = partial(_rounded, dtype=dtype)
        yield f"scores are rounded to {name}", partial(_cast_scores, scores=cast)
        yield f"dot products are rounded to {name}", partial(_cast_scores, dots=cast)
        yield f"the head weights are rounded to {name}", partial(_cast_scores, weights=cast)


def _rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype).to(x)


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def _cast_scores(
    q: torch.Tensor, k: torch.Tensor, w: torch.Tensor, *, weights: Cast = _as_it_is, dots: Cast = _as_it_is,
    scores: Cast = _as_it_is,
) -> torch.Tensor:  # fmt: skip
    products = dots(torch.einsum("blje,bse->bljs", q, k)).relu()
    return scores(torch.einsum("bljs,blj->bls", products, weights(w)))


def _scores(call: Call, gradients: bool) -> Iterator[Fault]:
    for sentence, function in score_faults():
        yield sentence, _again(call, gradients, function)


def _topk(call: Call, _: bool) -> Iterator[Fault]:
    """Only of the logsumexp: selections are judged by what they hold."""
    a = call.arguments
    q, k, w = a["q_BLJE"], a["k_BSE"], a["w_BLJ"]
    exact = index_scores(q, k, w)
    visible = visible_keys(a["bounds_BL2"], k.shape[1])

    def over(scores: torch.Tensor, seen: torch.Tensor) -> Tensors:
        return {"lse": scores.masked_fill(~seen, -torch.inf).logsumexp(-1)}

    yield (
        "it is the largest score, not the logsumexp",
        lambda: {"lse": exact.masked_fill(~visible, -torch.inf).amax(-1)},
    )
    chosen = selected_mask(select_topk(exact, visible, a["k"]), k.shape[1])
    yield "it runs over the selected keys alone, not over all visible ones", lambda: over(exact, chosen)
    for sentence, function in score_faults():
        yield sentence, lambda function=function: over(function(q, k, w), visible)  # type: ignore[misc]
    for sentence, bounds in other_bounds(call):
        yield sentence, partial(over, exact, visible_keys(bounds, k.shape[1]))


def _kl(call: Call, gradients: bool) -> Iterator[Fault]:
    a = call.arguments
    for sentence, function in score_faults():
        yield sentence, _again(call, gradients, partial(PLAIN["indexer_kl"], scores=function))
    target = partial(_with_target, call, gradients)
    if "indices_BLK" in a:
        full = visible_keys(a["bounds_BL2"], a["ik_BSE"].shape[1])
        yield "softmax(I) runs over all visible keys, not over the selected ones", target(lambda t: t.p, over=full)
        yield (
            "p is taken over all visible keys and renormalised over the selected ones",
            target(lambda t: t.regathered()),
        )
    for sentence, p in (
        ("p is summed over heads and not divided by their number", lambda t: t.p * t.heads),
        ("lse is read as a logarithm to base 2", lambda t: t.unnormalised(math.log(2))),
        ("lse is not subtracted", lambda t: t.unnormalised(0.0)),
        ("p is the softmax of the heads' mean logits", lambda t: t.of_mean_logits()),
        ("p is normalised by its Euclidean length, not by its sum", lambda t: t.p / t.p.norm(dim=-1, keepdim=True)),
        ("only the first head enters p", lambda t: t.of_one_head()),
    ):
        yield sentence, target(p)
    yield "the divergence is reversed: KL(softmax(I) ‖ p)", target(lambda t: t.p, kind="reversed")
    yield "Σ p log p is left out: it is a cross-entropy", target(lambda t: t.p, kind="cross-entropy")
    for sentence, other in (
        ("the main attention's logits are not multiplied by scale", 1.0),
        ("1/√D stands in for the scale given", a["q_BLHD"].shape[-1] ** -0.5),
    ):
        yield sentence, target(lambda t: t.unnormalised(1.0), call=call.changed(scale=other))
    yield from _of_bounds(call, gradients)


class _Target:
    """The main attention of one call of indexer_kl, from which right and wrong targets are made."""

    def __init__(self, call: Call) -> None:
        a = call.arguments
        self.visible_BLS = visible_keys(a["bounds_BL2"], a["ik_BSE"].shape[1], a.get("indices_BLK"))
        self.within_BLS = visible_keys(a["bounds_BL2"], a["ik_BSE"].shape[1])
        self.heads = a["q_BLHD"].shape[2]
        self.lse_BHL1 = a["lse_BLH"].transpose(1, 2)[..., None]
        pattern = "blhd,bsd->bhls" if a["k"].dim() == 3 else "blhd,bshd->bhls"
        self.logits_BHLS = torch.einsum(pattern, a["q_BLHD"], a["k"]) * a["scale"]
        self.p = kl_target(a["q_BLHD"], a["k"], a["lse_BLH"], self.visible_BLS, a["scale"])

    def unnormalised(self, lse_factor: float) -> torch.Tensor:
        lse = self.lse_BHL1.nan_to_num(neginf=0.0) * lse_factor
        return (self.logits_BHLS - lse).masked_fill(~self.visible_BLS[:, None], -torch.inf).exp().mean(1)

    def of_mean_logits(self) -> torch.Tensor:
        return self._softmax(self.logits_BHLS.mean(1), self.visible_BLS)

    def of_one_head(self) -> torch.Tensor:
        return self._softmax(self.logits_BHLS[:, 0], self.visible_BLS)

    def regathered(self) -> torch.Tensor:
        full = self._softmax(self.logits_BHLS, self.within_BLS[:, None])
        return attention_target(full.masked_fill(~self.visible_BLS[:, None], 0.0))

    @staticmethod
    def _softmax(logits: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        empty = ~visible.any(-1, keepdim=True)
        return logits.masked_fill(~visible & ~empty, -torch.inf).softmax(-1).masked_fill(~visible, 0.0)


def _with_target(
    given: Call, gradients: bool, p: Callable[[_Target], torch.Tensor], *, call: Call | None = None,
    over: torch.Tensor | None = None, kind: str = "",
) -> Callable[[], Tensors]:  # fmt: skip
    """The divergence with another target, over other keys, or of another kind; p need not sum to 1."""

    def run() -> Tensors:
        target = _Target(call or given)
        visible = target.visible_BLS if over is None else over
        wrong_p = p(target).masked_fill(~target.visible_BLS, 0.0).nan_to_num()

        def divergence(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
            empty = ~visible.any(-1, keepdim=True)
            scores = index_scores(*arguments[:3]).masked_fill(~visible & ~empty, -torch.inf)
            log_i = scores.log_softmax(-1).masked_fill(~visible, 0.0)
            log_p = wrong_p.clamp_min(torch.finfo(wrong_p.dtype).tiny).log()
            if kind == "reversed":
                rows = torch.where(visible, log_i.exp() * (log_i - log_p), 0.0).sum(-1)
            else:
                rows = (wrong_p * ((0.0 if kind == "cross-entropy" else log_p) - log_i)).sum(-1)
            return rows.sum(), rows.detach()

        return _again(given, gradients, divergence)()

    return run


def _kl_backward(call: Call) -> Iterator[Fault]:
    exact = IndexerDivergence.of(call)
    right = exact.softmax_BLS - exact.p_BLS
    yield "p is not subtracted: dI = softmax(I)", lambda: exact.gradients(exact.softmax_BLS)
    yield "softmax(I) is missing: dI = −p", lambda: exact.gradients(-exact.p_BLS)
    yield "gradient flows through heads that the ReLU shuts", lambda: exact.gradients(right, gated=False)
    yield "the head weight is missing", lambda: exact.gradients(right, weighted=False)


_FORWARD: dict[str, Callable[[Call, bool], Iterator[Fault]]] = {
    "index_scores": _scores, "indexer_topk": _topk, "sparse_mla": _attention, "dense_mla": _attention, "indexer_kl": _kl,
}  # fmt: skip
_BACKWARD: dict[str, Callable[[Call], Iterator[Fault]]] = {
    "sparse_mla": _attention_backward, "dense_mla": _attention_backward, "indexer_kl": _kl_backward,
}  # fmt: skip
