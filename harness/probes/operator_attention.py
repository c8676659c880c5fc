"""Probes of the two attentions against each other: absorbed is non-absorbed, and what was not selected bounds the error.

Letters: B batch, L query rows, S key slots, H attention heads, N width of a head without rotation, R rotary width,
C width of the latent, V width of a value, D = C + R, K selected keys.
"""

import math
from dataclasses import replace

import torch

from reference.indexer import selected_mask

from ..budgets import budget, scalar_budget
from ..checks.operators import lse_error
from ..metrics import Errors, errors
from ..operators.bench import PLAIN, Call, OperatorBench
from ..operators.masked import MaskedAttention
from ..operators.slack import rounding, term_sizes
from .operator_sides import Notes, probe

BOTH = ("sparse_mla", "dense_mla")


def absorbed(notes: Notes) -> None:
    """Attention on the latent with W_uk folded into the queries is attention on expanded keys and values (C11).

        q_h · [W_uk c ‖ k_pe] = [W_ukᵀ q_nope ‖ q_pe] · [c ‖ k_pe]        Σ P (W_uv c) = W_uv Σ P c

    Both forms of the subject, on the last k keys of every row. Each may be as wrong as its plain definition is, which
    reads inputs rounded to the same precision. Null candidates: the other rows' results, 4 % more, the wrong scale.
    """
    bench = notes.bench
    sparse, dense, w_uv = _two_forms(bench)
    exact = _expanded(PLAIN["sparse_mla"](*sparse.to(torch.float64).arguments.values())[0], w_uv)
    results = {}
    own = Errors(*[0.0] * 5)
    for name, call in (("sparse", sparse), ("dense", dense)):
        low = call.to(torch.float32)
        for who, outputs in (("plain", PLAIN[call.operator](*low.arguments.values())), ("seen", _asked(bench, low))):
            out, lse = outputs
            results[name, who] = (_expanded(out, w_uv) if name == "sparse" else out.double(), lse.double())
        own = own.plus(errors(results[name, "plain"][0], exact))
    allowed = budget("sparse_mla", torch.float32, own, exact.numel(), bench.device.type)
    (a, lse_a), (b, lse_b) = results["sparse", "seen"], results["dense", "seen"]
    reason = "the absorbed and the non-absorbed form differ"
    notes.measure("out, share of budget", errors(a, b).used(allowed), 1.0, reason)
    lse_allowed = 2 * scalar_budget(
        "sparse_mla lse",
        torch.float32,
        lse_error(results["dense", "plain"][1], results["sparse", "plain"][1]),
        bench.device.type,
    )
    notes.measure("lse", lse_error(lse_a, lse_b), lse_allowed, f"{reason} in their lse", "nats")
    notes.null("the next row's", not errors(a.roll(-1, 1), b).used(allowed) <= 1)
    notes.null("4 % more", not errors(a * 1.04, b).used(allowed) <= 1)
    wrong = sparse.to(torch.float32).changed(scale=sparse.arguments["scale"] * 0.9)
    notes.null("another scale", not errors(_expanded(_asked(bench, wrong)[0], w_uv), b).used(allowed) <= 1)


def _asked(bench: OperatorBench, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = bench.ask(call).outputs
    return outputs["out"], outputs["lse"]


def _expanded(out_BLHC: torch.Tensor, w_uv_HVC: torch.Tensor) -> torch.Tensor:
    return torch.einsum("blhc,hvc->blhv", out_BLHC.double(), w_uv_HVC)


def _two_forms(bench: OperatorBench) -> tuple[Call, Call, torch.Tensor]:
    """The same attention in absorbed and non-absorbed form, over the last k keys of every row, and W_uv."""
    s, config = bench.case.sizes, bench.case.config
    nope = s.values // 2 + 1 if config is None else config.qk_nope_head_dim
    v_dim = s.values // 2 + 2 if config is None else config.v_head_dim
    generator = bench.case.generator("projections")

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(bench.device)

    w_uk_HNC, w_uv_HVC = (draw(s.heads, n, s.values) / math.sqrt(s.values) for n in (nope, v_dim))
    kv_BSD = bench.case.kv_BSD.to(bench.device)
    latent, rotary = kv_BSD[..., : s.values], kv_BSD[..., s.values :]
    q_nope = draw(s.batch, s.rows, s.heads, nope) * 2 / (bench.case.scale * math.sqrt(nope + rotary.shape[-1]))
    q_pe = draw(s.batch, s.rows, s.heads, rotary.shape[-1]) / (bench.case.scale * math.sqrt(nope + rotary.shape[-1]))
    start, end = bench.bounds_BL2.unbind(-1)
    bounds = torch.stack((torch.maximum(start, end - s.k), end), -1)
    steps = torch.arange(min(s.k, s.slots), device=bench.device)
    indices = bounds[..., :1] + steps
    indices = torch.where(indices < bounds[..., 1:], indices, -1).to(torch.int32)
    q_latent = torch.einsum("blhn,hnc->blhc", q_nope, w_uk_HNC)
    k_nope = torch.einsum("bsc,hnc->bshn", latent, w_uk_HNC)
    k = torch.cat((k_nope, rotary[:, :, None].expand(-1, -1, s.heads, -1)), -1)
    v = torch.einsum("bsc,hvc->bshv", latent, w_uv_HVC)
    sparse = {
        "q_BLHD": torch.cat((q_latent, q_pe), -1), "kv_BSD": kv_BSD, "indices_BLK": indices, "scale": bench.case.scale,
        "d_v": s.values,
    }  # fmt: skip
    dense = {
        "q_BLHD": torch.cat((q_nope, q_pe), -1),
        "k_BSHD": k,
        "v_BSHV": v,
        "bounds_BL2": bounds,
        "scale": bench.case.scale,
    }
    return Call("sparse_mla", sparse), Call("dense_mla", dense), w_uv_HVC


def unselected_mass(notes: Notes) -> None:
    """Sparse attention is off by at most twice what it left out, and its logsumexp by exactly that.

    Let p be the softmax over all of a row's keys A, S ⊂ A the selected ones, U = A \\ S, and δ = Σ_U p < 1. With
    out_S = Σ_S p v / (1 − δ) and out_U = Σ_U p v / δ, both weighted means of values,

        out_A = Σ_S p v + Σ_U p v = (1 − δ) out_S + δ out_U
        out_S − out_A = δ (out_S − out_U),      so that |out_S − out_A| ≤ δ (|out_S| + |out_U|) ≤ 2 δ max_A |v|.

    And Σ_S e^z = (1 − δ) Σ_A e^z, whose logarithm is lse_S = lse_A + ln(1 − δ). The selection holds each row's k keys of
    largest weight, so that δ is small and the bound is sharp. Null candidates: the next row's output, whose δ is another;
    the dense logsumexp itself; ln(1 − δ) to base 2.
    """
    bench = notes.bench
    s = bench.case.sizes
    kv = bench.call("sparse_mla").arguments["kv_BSD"]
    k = kv[:, :, None].expand(-1, -1, s.heads, -1)
    dense = replace(bench.call("dense_mla").changed(k_BSHD=k, v_BSHV=k[..., : s.values]), wrt=(), cotangent=None)
    everything = MaskedAttention.of(dense)
    weight_BLS = everything.weights_BLHS.sum(2)
    best = weight_BLS.masked_fill(~everything.visible_BLS, -1.0).topk(min(s.k, s.slots), dim=-1)
    indices = torch.where(best.values < 0, -1, best.indices).to(torch.int32)
    sparse = bench.call("sparse_mla").changed(indices_BLK=indices)
    out_S, lse_S = (x.double() for x in _asked(bench, sparse))
    out_A, lse_A = (x.double() for x in _asked(bench, dense))
    left = ~selected_mask(indices, s.slots)[:, :, None] & everything.visible_BLS[:, :, None]
    delta_BLH = (everything.weights_BLHS * left).sum(-1)
    loudest = everything.v_BSHV.abs().amax(-1).transpose(1, 2)[:, None].expand_as(everything.weights_BLHS)
    bound = 2 * delta_BLH * loudest.masked_fill(~everything.visible_BLS[:, :, None], 0.0).amax(-1)
    own = errors(*(f("sparse_mla").outputs["out"] for f in (bench.baseline, bench.expected)))
    slack = 2 * budget("sparse_mla", bench.dtype, own, out_A.numel(), bench.device.type).max * float(out_A.abs().max())

    def beyond(out: torch.Tensor) -> float:
        return float(((out - out_A).abs().amax(-1) / (bound + slack)).max())

    notes.measure(
        "out_S − out_A, share of 2 δ max |v|",
        beyond(out_S),
        1.0,
        "sparse attention is farther from dense attention than what it left out allows",
    )
    notes.null("the next row's output", beyond(out_S.roll(-1, 1)) > 1)
    seen = ~everything.empty_BL
    # By the logits, because δ may be so near to 1 that it is rounded to it.
    kept = everything.logits_BLHS.masked_fill(left, -torch.inf).logsumexp(-1)
    inside = kept - everything.logits_BLHS.logsumexp(-1)
    expected = (lse_A + inside)[seen]
    own_lse = lse_error(*(f("sparse_mla").outputs["lse"] for f in (bench.baseline, bench.expected)))
    allowed = 2 * scalar_budget("sparse_mla lse", torch.float32, own_lse, bench.device.type)
    allowed += float(rounding(term_sizes(dense, torch.float32)["lse"].max(), torch.float32))
    notes.measure(
        "lse_S − lse_A − ln(1 − δ)",
        lse_error(lse_S[seen], expected),
        allowed,
        "the sparse logsumexp is not the dense one plus ln(1 − δ)",
        "nats",
    )
    notes.null("lse_A", lse_error(lse_A[seen], expected) > allowed)
    notes.null("base 2", lse_error((lse_A + inside / math.log(2))[seen], expected) > allowed)


CHECKS = [
    probe("absorbed", absorbed, BOTH, ("causal", "documents"), fp32_only=True),
    probe("unselected_mass", unselected_mass, BOTH, ("causal", "documents", "outliers")),
]
