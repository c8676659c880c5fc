"""What no kernel can help: sums whose terms cancel, and the kinks of the ReLU. Looked at only where a budget is exceeded.

A sum is off by rounding its terms, however small it comes out itself: of that an error relative to the sum says
nothing. And a dot product q · k within rounding of zero may fall on either side of the indexer's ReLU, which hardly
changes a score, but decides whether gradient flows (see harness/kinks.py).

Letters: B batch, L query rows, S key slots, H attention heads, D width of a query or key, V width of a value,
J indexer heads, E width of an indexer head.
"""

from dataclasses import replace
from functools import lru_cache, partial

import torch

from ..budgets import CANCELLATION, MARGIN_FACTOR
from ..metrics import Errors, errors
from .bench import PLAIN, Call, Outcome, plain_outcome
from .masked import IndexerDivergence, MaskedAttention
from .plain import scores_beyond, visible_keys


@lru_cache(maxsize=4)
@torch.no_grad()
def term_sizes(call: Call, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What each output and gradient of `call` would be if its terms were all positive, in fp64.

    A term with an exponential counts for more: its exponent is rounded too, and always in fp32. `dtype` is the one that
    the result is rounded to.
    """
    return _SIZES[call.operator](call.to(torch.float64), CANCELLATION[torch.float32] / CANCELLATION[dtype])


def _index_scores(call: Call, _: float) -> dict[str, torch.Tensor]:
    assert call.cotangent is not None
    sizes = _score_sizes(call, call.cotangent.double().abs())
    return {"I": sizes["I"], "q_BLJE": sizes["q"], "k_BSE": sizes["k"], "w_BLJ": sizes["w"]}


def _indexer_topk(call: Call, _: float) -> dict[str, torch.Tensor]:
    q, k, w = (call.arguments[name].abs() for name in ("q_BLJE", "k_BSE", "w_BLJ"))
    return {"lse": PLAIN["index_scores"](q, k, w).amax(-1)}


def _score_sizes(call: Call, dI_BLS: torch.Tensor) -> dict[str, torch.Tensor]:
    q, k, w = list(call.arguments.values())[:3]
    dots_BLJS = torch.einsum("blje,bse->bljs", q, k)
    flow_BLJS = (dots_BLJS > 0) * w.abs()[..., None] * dI_BLS[:, :, None]
    return {
        "I": PLAIN["index_scores"](q.abs(), k.abs(), w.abs()),
        "q": torch.einsum("bljs,bse->blje", flow_BLJS, k.abs()),
        "k": torch.einsum("bljs,blje->bse", flow_BLJS, q.abs()),
        "w": torch.einsum("bljs,bls->blj", dots_BLJS.relu(), dI_BLS),
    }


def _attention(call: Call, exponents: float) -> dict[str, torch.Tensor]:
    exact = MaskedAttention.of(call)
    positive = replace(
        exact, q_BLHD=exact.q_BLHD.abs(), k_BSHD=exact.k_BSHD.abs(), v_BSHV=exact.v_BSHV.abs(), scale=abs(exact.scale),
        dout_BLHV=None if exact.dout_BLHV is None else exact.dout_BLHV.abs(),
    )  # fmt: skip
    logits = positive.logits_BLHS.clamp_min(0.0)
    weights = exact.weights_BLHS * (1 + exponents * logits)
    sizes = {"out": torch.einsum("blhs,bshv->blhv", weights, positive.v_BSHV), "lse": logits.amax(-1)}
    if exact.dout_BLHV is None:
        return sizes
    # |P (dP − Δ)| is at most P (|dP| + Σ P |dP|).
    delta = (exact.weights_BLHS * positive.dP_BLHS).sum(-1, keepdim=True)
    return {**sizes, **positive.gradients(weights * (positive.dP_BLHS + delta) * positive.scale, weights)}


def _indexer_kl(call: Call, exponents: float) -> dict[str, torch.Tensor]:
    a = call.arguments
    visible = visible_keys(a["bounds_BL2"], a["ik_BSE"].shape[1], a.get("indices_BLK"))
    exact = IndexerDivergence.of(call)
    indexer = exact.q_BLJE, exact.k_BSE, exact.w_BLJ
    softmax, p = exact.softmax_BLS, exact.p_BLS
    seen = PLAIN["index_scores"](*(x.abs() for x in indexer)).masked_fill(~visible, 0.0)
    pattern = "blhd,bsd->blhs" if a["k"].dim() == 3 else "blhd,bshd->blhs"
    logits = torch.einsum(pattern, a["q_BLHD"].abs(), a["k"].abs()).amax(2) * abs(a["scale"])
    assert call.cotangent is not None
    sizes = _score_sizes(call, (softmax * (1 + exponents * seen) + p * (1 + exponents * logits)) * call.cotangent.abs())
    # Of n keys −log p is at most ln n and the logits' range, and −log softmax ln n and the scores'.
    choices = visible.sum(-1, keepdim=True).clamp_min(1).log()
    kl = (p * (logits + seen + 2 * choices)).sum(-1) + seen.amax(-1)
    return {"kl": kl, "kl_sum": kl.sum(), "iq_BLJE": sizes["q"], "ik_BSE": sizes["k"], "w_BLJ": sizes["w"]}


_SIZES = {
    "index_scores": _index_scores, "indexer_topk": _indexer_topk, "sparse_mla": _attention, "dense_mla": _attention,
    "indexer_kl": _indexer_kl,
}  # fmt: skip


def rounding(size: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What rounding may do to a sum in `dtype` whose terms have these sizes."""
    return size * CANCELLATION[dtype]


def rounding_share(call: Call, name: str, dtype: torch.dtype, a: torch.Tensor, b: torch.Tensor) -> float:
    """How two results of one `call` differ in its output or gradient `name`, as a share of what rounding may do to each."""
    allowed = 2 * rounding(term_sizes(call, dtype)[name], dtype)
    off = (a.double() - b.double()).abs()
    share = torch.where(off == 0, 0.0, off / allowed)
    return float(share.nan_to_num(nan=torch.inf).max()) if share.numel() else 0.0


def cancellation_errors(size: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> Errors:
    """What rounding the terms of `expected` may do to it: errors to be added to a budget."""
    off = rounding(size, dtype)
    change = errors(expected + off, expected)
    norm = float(expected.norm())
    # Independent errors cancel in the gain.
    return replace(change, gain=4 * float(off.norm()) / (norm * expected.numel() ** 0.5)) if norm else change


@lru_cache(maxsize=2)
def _opened_and_shut(call: Call) -> tuple[Outcome, Outcome]:
    """The gradients of `call` with every kink open, and with every one shut."""
    found = []
    for margins in (-MARGIN_FACTOR, MARGIN_FACTOR):
        scores = scores_beyond(margins)
        function = scores if call.operator == "index_scores" else partial(PLAIN["indexer_kl"], scores=scores)
        found.append(plain_outcome(call.to(torch.float64), function))
    return found[0], found[1]


def kink_errors(call: Call, name: str, expected: torch.Tensor) -> Errors:
    """What kinks may do to the gradient of argument `name`: its change from all of them shut to all open, as errors."""
    opened, shut = _opened_and_shut(call)
    change = opened.gradient(name, expected) - shut.gradient(name, expected)
    # Twice: in the sum over all kinks some cancel that need not cancel in a subject, which flips a few.
    result = errors(expected + 2 * change, expected)
    norm = float(expected.norm())
    return replace(result, gain=2 * float(change.norm()) / norm) if norm else result
