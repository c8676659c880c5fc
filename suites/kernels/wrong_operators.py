"""Wrong operators, each with one fault that a kernel may have, and what the verdict must say of it.

Letters: B batch, L query rows, S key slots, H attention heads, J indexer heads, K selected keys.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from harness.operators.plain import kl_target, reference_operators, visible_keys
from harness.subjects import Subject, operator_capabilities, with_capabilities
from reference.indexer import index_scores, select_topk, selected_mask

PLAIN = reference_operators()
INF = math.inf
LN2 = math.log(2)
ARGUMENTS = {
    "index_scores": ("q", "k", "w"),
    "indexer_topk": ("q", "k", "w", "bounds", "count"),
    "sparse_mla": ("q", "kv", "indices", "scale", "d_v"),
    "dense_mla": ("q", "k", "v", "bounds", "scale", "indices"),
    "indexer_kl": ("iq", "ik", "w", "q", "k", "lse", "bounds", "scale", "indices"),
}


@dataclass(frozen=True)
class WrongOperator:
    """An operator with a fault; the check that must fail, and a pattern that its reason must match."""

    name: str
    operator: str
    function: Any
    check: str
    says: str

    def subject(self) -> Subject:
        """A subject that offers this operator alone."""
        extras = ("tie-rule",) if self.operator == "indexer_topk" else ("backward",)
        operators = {self.operator: with_capabilities(self.function, extras)}
        return Subject(self.name, None, operator_capabilities(operators), self.name, operators)


def given(operator, **changes):
    """The plain operator, called with some arguments that functions of all of them replace."""

    def function(*args):
        named = dict(zip(ARGUMENTS[operator], args, strict=False))
        return PLAIN[operator](*[changes[n](named) if n in changes else x for n, x in named.items()])

    return function


def after(operator, change):
    """The plain operator, whose first output, second output or both `change` rewrites."""
    return lambda *args: change(*PLAIN[operator](*args), args)


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient), None


def feeding_back(operator, place, change):
    """The plain operator, whose gradient of the argument at `place` `change` rewrites."""

    def function(*args):
        changed = list(args)
        changed[place] = _Back.apply(args[place], lambda gradient: change(gradient, args))
        return PLAIN[operator](*changed)

    return function


def with_end(bounds, end):
    return torch.stack((bounds[..., 0], end), -1)


def with_start(bounds, start):
    return torch.stack((start, bounds[..., 1]), -1)


# Index scores and selections


def scored(function):
    """The top-k of other scores, with the logsumexp of the right ones."""

    def topk(q, k, w, bounds, count):
        _, lse = PLAIN["indexer_topk"](q, k, w, bounds, count)
        return select_topk(function(q.float(), k.float(), w.float()), visible_keys(bounds, k.shape[1]), count), lse

    return topk


def causal_scores(q, k, w):
    length = q.shape[1]
    future = torch.arange(k.shape[1]) > torch.arange(length)[:, None] + k.shape[1] - length
    return index_scores(q, k, w).masked_fill(future, -INF)


def highest_first(q, k, w, bounds, count):
    _, lse = PLAIN["indexer_topk"](q, k, w, bounds, count)
    slots = k.shape[1]
    back = select_topk(index_scores(q, k, w).flip(-1), visible_keys(bounds, slots).flip(-1), count)
    place = torch.where(back < 0, slots, slots - 1 - back).sort(-1).values
    return torch.where(place == slots, -1, place).to(torch.int32), lse


def top_before_mask(q, k, w, bounds, count):
    _, lse = PLAIN["indexer_topk"](q, k, w, bounds, count)
    scores, visible = index_scores(q, k, w), visible_keys(bounds, k.shape[1])
    kept = selected_mask(select_topk(scores, torch.ones_like(visible), count), k.shape[1]) & visible
    return select_topk(torch.zeros_like(scores), kept, count), lse


def by_score(q, k, w, bounds, count):
    indices, lse = PLAIN["indexer_topk"](q, k, w, bounds, count)
    scores = index_scores(q, k, w).gather(-1, indices.clamp_min(0).long()).masked_fill(indices < 0, -INF)
    return indices.gather(-1, scores.argsort(-1, descending=True)), lse


def one_fewer(indices, lse, args):
    return torch.where((indices == indices.amax(-1, keepdim=True)) & (indices >= 0), -1, indices), lse


def lse_of_selected(indices, lse, args):
    chosen = selected_mask(indices, args[1].shape[1])
    return indices, index_scores(*args[:3]).masked_fill(~chosen, -INF).logsumexp(-1)


# Attention


def stale_rows(out, lse, args):
    """The last quarter of the rows holds what the first rows hold: a buffer that was not rewritten."""
    stale = out.clone()
    count = out.shape[1] // 4
    if count:
        stale[:, -count:] = out[:, :count]
    return stale, lse


def unnormalised(q, kv, indices, scale, d_v):
    _, lse = PLAIN["sparse_mla"](q, kv, indices, scale, d_v)
    named = indices >= 0
    keys = kv[torch.arange(kv.shape[0])[:, None, None], indices.clamp_min(0).long()]
    z = torch.einsum("blhd,blkd->blhk", q.float(), keys.float()) * scale
    z = z.masked_fill(~named[:, :, None], -INF)
    top = z.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    return torch.einsum("blhk,blkv->blhv", (z - top).exp(), keys[..., :d_v].float()).to(q), lse


def with_nan(out, lse, args):
    holes = (args[2] < 0).any(-1) & (args[2] >= 0).any(-1)
    return out.masked_fill(holes[..., None, None], math.nan), lse


def mean_where_empty(out, lse, args):
    empty = (args[2] < 0).all(-1)[..., None, None]
    return torch.where(empty, args[1][..., : args[4]].mean(1)[:, None, None].to(out), out), lse


def writing(q, kv, indices, scale, d_v):
    result = PLAIN["sparse_mla"](q, kv, indices, scale, d_v)
    indices.clamp_(min=0)
    return result


def dead(x, channel=17):
    x = x.clone()
    x[..., min(channel, x.shape[-1] - 1)] = 0
    return x


def largest(out, lse, args):
    q, kv, indices, scale, _ = args
    z = torch.einsum("blhd,bsd->blhs", q.float(), kv.float()) * scale
    return out, z.masked_fill(~selected_mask(indices, kv.shape[1])[:, :, None], -INF).amax(-1)


class SparseByHand(torch.autograd.Function):
    """Sparse attention with its gradient written out, and one fault in it."""

    @staticmethod
    def forward(ctx, q, kv, indices, scale, d_v, fault):
        ctx.save_for_backward(q, kv, indices)
        ctx.rest = scale, d_v, fault
        out, lse = PLAIN["sparse_mla"](q, kv, indices, scale, d_v)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _):
        q, kv, indices = ctx.saved_tensors
        scale, d_v, fault = ctx.rest
        named = (indices >= 0)[:, :, None]
        batch = torch.arange(kv.shape[0])[:, None, None]
        slots = indices.clamp_min(0).long()
        keys, dout, queries = kv[batch, slots].float(), dout.float(), q.float()
        z = torch.einsum("blhd,blkd->blhk", queries, keys) * scale
        p = z.masked_fill(~named, -INF).softmax(-1).nan_to_num()
        dp = torch.einsum("blhv,blkv->blhk", dout, keys[..., :d_v])
        delta = 0.0 if fault == "no delta" else (p * dp).sum(-1, keepdim=True)
        ds = (p * (dp - delta) * scale).masked_fill(~named, 0.0)
        dkeys = torch.einsum("blhk,blhd->blkd", ds, queries)
        if fault == "no values":
            p = p * 0
        dkeys[..., :d_v] += torch.einsum("blhk,blhv->blkv", p, dout)
        dkv = torch.zeros_like(kv, dtype=torch.float32)
        for b in range(kv.shape[0]):
            for row in range(q.shape[1]):
                here = indices[b, row] >= 0
                if fault == "overwritten":
                    dkv[b, slots[b, row, here]] = dkeys[b, row, here]
                else:
                    dkv[b].index_add_(0, slots[b, row, here], dkeys[b, row, here])
        return torch.einsum("blhk,blkd->blhd", ds, keys).to(q), dkv.to(kv), None, None, None, None


def by_hand(fault):
    return lambda *args: SparseByHand.apply(*args, fault)


# The indexer's KL


def divergence(target, over=None, kind=""):
    """The KL of another target over other keys."""

    def kl(iq, ik, w, q, k, lse, bounds, scale, indices=None):
        visible = visible_keys(bounds, ik.shape[1], indices)
        p = target(q, k, lse, visible, bounds, scale)
        seen = visible if over is None else over(bounds, ik.shape[1])
        empty = ~seen.any(-1, keepdim=True)
        scores = index_scores(iq, ik, w).masked_fill(~seen & ~empty, -INF)
        log_i = scores.log_softmax(-1).masked_fill(~seen, 0.0)
        log_p = p.clamp_min(1e-38).log()
        rows = (
            torch.where(seen, log_i.exp() * (log_i - log_p), 0.0) if kind == "reversed" else p * (log_p - log_i)
        ).sum(-1)
        return rows.sum(), rows.detach()

    return kl


def right_target(q, k, lse, visible, bounds, scale):
    return kl_target(q, k, lse, visible, scale)


def base_2_target(q, k, lse, visible, bounds, scale):
    pattern = "blhd,bsd->bhls" if k.dim() == 3 else "blhd,bshd->bhls"
    z = (
        torch.einsum(pattern, q.float(), k.float()) * scale
        - LN2 * lse.nan_to_num(neginf=0.0).transpose(1, 2)[..., None]
    )
    return z.masked_fill(~visible[:, None], -INF).exp().mean(1)


def full_target(q, k, lse, visible, bounds, scale):
    everything = visible_keys(bounds, k.shape[1])
    pattern = "blhd,bsd->bhls" if k.dim() == 3 else "blhd,bshd->bhls"
    z = torch.einsum(pattern, q.float(), k.float()) * scale
    p = z.masked_fill(~everything[:, None], -INF).softmax(-1).nan_to_num().sum(1).masked_fill(~visible, 0.0)
    return p / p.sum(-1, keepdim=True).clamp_min(1e-30)


def plain_logs(iq, ik, w, q, k, lse, bounds, scale, indices=None):
    """p · (log p − log softmax(I)) as it is written: 0 · (−inf) in every hidden key."""
    visible = visible_keys(bounds, ik.shape[1], indices)
    p = kl_target(q, k, lse, visible, scale)
    rows = (p * (p.log() - index_scores(iq, ik, w).masked_fill(~visible, -INF).log_softmax(-1))).sum(-1)
    return rows.sum(), rows.detach()


class _Scaled(torch.autograd.Function):
    """kl_sum whose gradient, kept since the forward, is not multiplied by what comes in."""

    @staticmethod
    def forward(ctx, total):  # noqa: ARG004 - the signature is autograd's
        return total.clone()

    @staticmethod
    def backward(ctx, gradient):  # noqa: ARG004
        return torch.ones_like(gradient)


def _wrong(operator, check, says, function, name):
    return WrongOperator(name, operator, function, f"operators.{check}", says)


def _of(operator, check=""):
    check = f"{operator}{check}"
    return lambda name, says, function: _wrong(operator, check, says, function, name)


_scores, _score_grads = _of("index_scores"), _of("index_scores", "_gradients")
_topk, _topk_lse, _ties = _of("indexer_topk"), _of("indexer_topk", "_lse"), _of("indexer_topk", "_ties")
_sparse, _sparse_lse, _sparse_grads = _of("sparse_mla"), _of("sparse_mla", "_lse"), _of("sparse_mla", "_gradients")
_dense, _dense_grads = _of("dense_mla"), _of("dense_mla", "_gradients")
_kl, _kl_grads = _of("indexer_kl"), _of("indexer_kl", "_gradients")

WRONG = [
    _scores("no ReLU", "ReLU is missing", lambda q, k, w: torch.einsum("blje,bse,blj->bls", q.float(), k.float(), w)),
    _scores("masked scores", "must be raw", causal_scores),
    _scores("head weights in bf16", "head weights are rounded to bf16", given("index_scores", w=lambda a: a["w"].bfloat16())),
    _scores("scores in bf16", "is rounded to bf16", lambda *a: index_scores(*a).bfloat16().float()),
    _score_grads("half of dk", "dk is off by a factor 0.5 everywhere", feeding_back("index_scores", 1, lambda g, a: g / 2)),
    _topk("bidirectional", "future keys", given("indexer_topk", bounds=lambda a: with_end(a["bounds"], torch.full_like(a["bounds"][..., 1], a["k"].shape[1])))),
    _topk("crosses documents", "crosses documents", given("indexer_topk", bounds=lambda a: with_start(a["bounds"], torch.zeros_like(a["bounds"][..., 0])))),
    _topk("k − 1", "k − 1 = 15 keys are selected", after("indexer_topk", one_fewer)),
    _topk("lowest scores", "the lowest scores are selected", scored(lambda *a: -index_scores(*a))),
    _topk("scores in fp16", "scores are rounded to fp16", scored(lambda *a: index_scores(*a).half().float())),
    _topk("top-k before the mask", "before the mask", top_before_mask),
    _topk("no ReLU", "ReLU is missing", scored(lambda q, k, w: torch.einsum("blje,bse,blj->bls", q, k, w))),
    _topk("ordered by score", "not ascending", by_score),
    _topk("long indices", "must be torch.int32", after("indexer_topk", lambda i, lse, a: (i.long(), lse))),
    _ties("highest first", "ties go to the highest index", highest_first),
    _ties("NaN lowest", "NaN ranks lowest", scored(lambda *a: index_scores(*a).nan_to_num(nan=-INF))),
    _topk_lse("lse to base 2", "factor 1.4427: looks like base 2", after("indexer_topk", lambda i, lse, a: (i, lse / LN2))),
    _topk_lse("lse of the selected keys", "over the selected keys alone", after("indexer_topk", lse_of_selected)),
    _sparse("−1 is slot 0", "index −1 is read as slot 0", given("sparse_mla", indices=lambda a: a["indices"].clamp_min(0))),
    _sparse("−1 is the last slot", "index −1 is read as the last slot", given("sparse_mla", indices=lambda a: torch.where(a["indices"] < 0, a["kv"].shape[1] - 1, a["indices"]))),
    _sparse("1/√D", "1/√D stands in", given("sparse_mla", scale=lambda a: a["q"].shape[-1] ** -0.5)),
    _sparse("4 % too large", "out is 4 % too large", after("sparse_mla", lambda out, lse, a: (out * 1.04, lse))),
    _sparse("a dead channel", r"out is dead \(0\) in channel 17", after("sparse_mla", lambda out, lse, a: (dead(out), lse))),
    _sparse("not normalised", "not normalised", unnormalised),
    _sparse("a mean where there is no key", "rows without keys are not 0", after("sparse_mla", mean_where_empty)),
    _sparse("NaN beside −1", "all of which hold −1", after("sparse_mla", with_nan)),
    _sparse("stale rows", "stale or never written in the last rows", after("sparse_mla", stale_rows)),
    _sparse("the last columns", "values are the last d_v columns", lambda q, kv, i, s, v: PLAIN["sparse_mla"](q.roll(v - q.shape[-1], -1), kv.roll(v - q.shape[-1], -1), i, s, v)),
    _sparse("one entry's keys", "batch entry 0 is read for every entry", given("sparse_mla", kv=lambda a: a["kv"][:1].expand_as(a["kv"]))),
    _sparse("writes into its indices", "wrote into its argument indices_BLK", writing),
    _sparse("returns no lse", r"must return out and lse", lambda *a: PLAIN["sparse_mla"](*a)[0]),
    _sparse_lse("lse to base 2", "looks like base 2", after("sparse_mla", lambda out, lse, a: (out, lse / LN2))),
    _sparse_lse("lse is the maximum", "it is the largest logit", after("sparse_mla", largest)),
    _sparse_lse("0 where there is no key", "must be −inf", after("sparse_mla", lambda out, lse, a: (out, lse.nan_to_num(neginf=0.0)))),
    _sparse_grads("overwritten slots", "only the last row counts|misses repeated slots", by_hand("overwritten")),
    _sparse_grads("no Δ", "Δ = Σ P dP is not subtracted", by_hand("no delta")),
    _sparse_grads("no gradient of values", "flows through the values is missing", by_hand("no values")),
    _sparse_grads("dq without scale", "factor scale is missing", feeding_back("sparse_mla", 0, lambda g, a: g / a[3])),
    _sparse_grads("no gradient at all", "carries no gradient", lambda *a: tuple(x.detach() for x in PLAIN["sparse_mla"](*a))),
    _dense("future keys", "future keys are seen", given("dense_mla", bounds=lambda a: with_end(a["bounds"], torch.full_like(a["bounds"][..., 1], a["k"].shape[1])))),
    _dense("documents crossed", "documents are crossed", given("dense_mla", bounds=lambda a: with_start(a["bounds"], torch.zeros_like(a["bounds"][..., 0])))),
    _dense("inclusive end", "end is taken as inclusive", given("dense_mla", bounds=lambda a: with_end(a["bounds"], (a["bounds"][..., 1] + 1).clamp_max(a["k"].shape[1])))),
    _dense("no indices", "the indices are ignored", given("dense_mla", indices=lambda a: None)),
    _dense("one head's keys", "head 0 of k_BSHD stands in", given("dense_mla", k=lambda a: a["k"][:, :, :1].expand_as(a["k"]))),
    _dense_grads("no gradient of values", "dv is 0 everywhere", given("dense_mla", v=lambda a: a["v"].detach())),
    _dense_grads("dk of one head", "only the first head feeds back|in head 0|dead", feeding_back("dense_mla", 1, lambda g, a: torch.cat((g[:, :, :1], g[:, :, 1:] * 0), 2))),
    _kl("mean over rows", "mean over rows", after("indexer_kl", lambda total, rows, a: (total / rows.numel(), rows))),
    _kl("reversed", "divergence is reversed", divergence(right_target, kind="reversed")),
    _kl("sum over heads", "not divided by their number", divergence(lambda q, *a: right_target(q, *a) * q.shape[2])),
    _kl("lse to base 2", "lse is read as a logarithm to base 2", divergence(base_2_target)),
    _kl("full softmax", "over all visible keys, not over the selected", divergence(right_target, over=visible_keys)),
    _kl("regathered target", "renormalised over the selected", divergence(full_target)),
    _kl("0 · −inf", "is not finite", plain_logs),
    _kl("bits, not nats", "looks like base 2", after("indexer_kl", lambda total, rows, a: (total / LN2, rows / LN2))),
    _kl_grads("the incoming gradient", "incoming gradient is ignored", after("indexer_kl", lambda total, rows, a: (_Scaled.apply(total), rows))),
    _kl_grads("the sign", "sign is reversed", feeding_back("indexer_kl", 0, lambda g, a: -g)),
]  # fmt: skip
