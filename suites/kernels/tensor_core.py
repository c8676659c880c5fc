"""Right operators as tensor cores compute them: base 2 inside, probabilities and their gradients rounded to bf16.

They show that budgets leave room for a kernel that is right: plain PyTorch, with the roundings of a flash kernel at
the places where it has them. Δ is summed from an output that is rounded already.

Letters: B batch, L query rows, S key slots, H attention heads, J indexer heads.
"""

import math

import torch

from harness.operators.plain import kl_target, reference_operators, visible_keys
from harness.subjects import OPERATORS, Subject, operator_capabilities, with_capabilities
from reference.indexer import index_scores, selected_mask

INF = math.inf
LOG2E = math.log2(math.e)


def rounded(x, like):
    """x through bf16 where the inputs are bf16, as an operand of a matrix product is."""
    return x.to(torch.bfloat16).to(x) if like.dtype == torch.bfloat16 else x


def wide(x):
    return x if x.dtype == torch.float64 else x.float()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, visible, scale):
        z = torch.einsum("blhd,bshd->blhs", wide(q), wide(k)) * (scale * LOG2E)
        z = z.masked_fill(~visible[:, :, None], -INF)
        top = z.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        p = torch.exp2(z - top)
        total = p.sum(-1, keepdim=True)
        out = torch.einsum("blhs,bshv->blhv", rounded(p, q), wide(v)) / total.masked_fill(total == 0, 1.0)
        out, lse = out.to(q.dtype), top + total.log2()
        ctx.save_for_backward(q, k, v, visible, out, lse)
        ctx.scale = scale
        natural = (lse / LOG2E).squeeze(-1)
        ctx.mark_non_differentiable(natural)
        return out, natural

    @staticmethod
    def backward(ctx, dout, _):
        q, k, v, visible, out, lse = ctx.saved_tensors
        z = torch.einsum("blhd,bshd->blhs", wide(q), wide(k)) * (ctx.scale * LOG2E)
        p = torch.exp2(z - lse.nan_to_num(neginf=0.0)).masked_fill(~visible[:, :, None], 0.0)
        dp = torch.einsum("blhv,bshv->blhs", wide(dout), wide(v))
        ds = rounded(p * (dp - (wide(dout) * wide(out)).sum(-1, keepdim=True)), q)
        dq = torch.einsum("blhs,bshd->blhd", ds, wide(k)) * ctx.scale
        dk = torch.einsum("blhs,blhd->bshd", ds, wide(q)) * ctx.scale
        dv = torch.einsum("blhs,blhv->bshv", rounded(p, q), wide(dout))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def dense_mla(q, k, v, bounds, scale, indices=None):
    return _Attention.apply(q, k, v, visible_keys(bounds, k.shape[1], indices), scale)


def sparse_mla(q, kv, indices, scale, d_v):
    # Wide before it is expanded, so that the heads' shares of dkv add up in fp32.
    k = wide(kv)[:, :, None].expand(-1, -1, q.shape[2], -1)
    return _Attention.apply(q, k, k[..., :d_v], selected_mask(indices, kv.shape[1]), scale)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, iq, ik, w, p, visible):
        empty = ~visible.any(-1, keepdim=True)
        scores = index_scores(iq, ik, w).masked_fill(~visible & ~empty, -INF)
        log_i = scores.log_softmax(-1).masked_fill(~visible, 0.0)
        rows = (torch.xlogy(p, p) - p * log_i).sum(-1)
        ctx.save_for_backward(iq, ik, w, (log_i.exp() - p).masked_fill(~visible, 0.0))
        ctx.mark_non_differentiable(rows)
        return rows.sum(), rows

    @staticmethod
    def backward(ctx, upstream, _):
        iq, ik, w, di = ctx.saved_tensors
        dots = torch.einsum("blje,bse->bljs", wide(iq), wide(ik))
        flow = rounded(di[:, :, None] * w[..., None] * (dots > 0) * upstream, iq)
        dw = torch.einsum("bls,bljs->blj", di, dots.relu()) * upstream
        diq, dik = torch.einsum("bljs,bse->blje", flow, wide(ik)), torch.einsum("bljs,blje->bse", flow, wide(iq))
        return diq.to(iq.dtype), dik.to(ik.dtype), dw.to(w.dtype), None, None


def indexer_kl(iq, ik, w, q, k, lse, bounds, scale, indices=None):
    visible = visible_keys(bounds, ik.shape[1], indices)
    return _Divergence.apply(iq, ik, w, kl_target(q, k, lse, visible, scale), visible)


def tensor_core_subject() -> Subject:
    """Both attentions and the divergence so; scores and selections are the plain ones."""
    plain = reference_operators()
    found = {**plain, "sparse_mla": sparse_mla, "dense_mla": dense_mla, "indexer_kl": indexer_kl}
    operators = {name: with_capabilities(function, OPERATORS[name]) for name, function in found.items()}
    return Subject("tensor cores", None, operator_capabilities(operators), "tensor cores", operators)
