"""The plain formulas that the operators are compared with, and their inputs.

Shape legend: B batch, L query rows, S key slots, H attention heads, D q/k width, V value width, J indexer
heads, E indexer head dim, K selected keys.

The formulas below are written the plain way (every score of every head at once, autograd for the gradients)
and share nothing with the operators. Tolerances: inputs are exact in fp64, so an operator differs by its own
rounding, a small multiple of the compute dtype's epsilon, and by rounding its result to the input's dtype.
"""

import math

import torch

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAN, INF = math.nan, math.inf


def assert_near(actual, expected, *, rounded_to=None, factor=64):
    """Largest error at most `factor` epsilons of the compute dtype, times the largest expected magnitude.

    A result that was rounded to a narrower dtype may be off by one more epsilon of that dtype.
    """
    assert actual.shape == expected.shape
    compute = torch.float64 if actual.dtype == torch.float64 else torch.float32
    epsilon = factor * torch.finfo(compute).eps
    if rounded_to is not None and rounded_to not in (torch.float32, torch.float64):
        epsilon += torch.finfo(rounded_to).eps
    actual, expected = actual.detach().double(), expected.detach().double()
    finite = expected.isfinite()
    torch.testing.assert_close(actual[~finite], expected[~finite], equal_nan=True, rtol=0, atol=0)
    size = expected[finite].abs().max().item() if finite.any() else 0.0
    torch.testing.assert_close(actual[finite], expected[finite], rtol=0, atol=epsilon * max(size, 1e-6))


def visible_BLS(bounds_BL2, S, indices_BLK=None):
    slot_S = torch.arange(S)
    visible = (slot_S >= bounds_BL2[..., :1]) & (slot_S < bounds_BL2[..., 1:])
    if indices_BLK is not None:
        visible &= (indices_BLK.unsqueeze(-1) == slot_S).any(2)
    return visible


def plain_scores(q_BLJE, k_BSE, w_BLJ):
    a_BLJS = torch.einsum("blje,bse->bljs", q_BLJE.double(), k_BSE.double())
    return torch.einsum("blj,bljs->bls", w_BLJ.double(), a_BLJS.relu())


def plain_attention(q_BLHD, k_BSHD, v_BSHV, visible, scale):
    """Returns out, lse and the weights. Rows without keys: 0, -inf, 0."""
    z_BLHS = torch.einsum("blhd,bshd->blhs", q_BLHD, k_BSHD) * scale
    z_BLHS = z_BLHS.masked_fill(~visible.unsqueeze(2), -INF)
    none = ~visible.any(-1)[..., None, None]
    p_BLHS = z_BLHS.masked_fill(none, 0).softmax(-1).masked_fill(none, 0)
    return torch.einsum("blhs,bshv->blhv", p_BLHS, v_BSHV), z_BLHS.logsumexp(-1), p_BLHS


def plain_kl(iq_BLJE, ik_BSE, w_BLJ, q_BLHD, k_BSHD, visible, scale):
    p_BLS = plain_attention(q_BLHD, k_BSHD, k_BSHD, visible, scale)[2].mean(2).detach()
    none = ~visible.any(-1, keepdim=True)
    score_BLS = plain_scores(iq_BLJE, ik_BSE, w_BLJ).masked_fill(~visible, -INF).masked_fill(none, 0)
    log_ratio_BLS = p_BLS.clamp_min(1e-300).log() - score_BLS.log_softmax(-1)
    term_BLS = torch.where(p_BLS > 0, p_BLS * log_ratio_BLS, 0.0)
    return term_BLS.masked_fill(~visible, 0).sum(-1)


def plain_topk(scores_BLS, visible, k):
    """Python's stable sort: highest first, NaN above all, lowest slot first among equals."""
    B, L, S = scores_BLS.shape
    indices = torch.full((B, L, min(k, S)), -1, dtype=torch.int32)
    for b in range(B):
        for t in range(L):
            row = scores_BLS[b, t].tolist()
            slots = [s for s in range(S) if visible[b, t, s]]
            rank = [-INF if math.isnan(score) else -score for score in row]
            slots.sort(key=rank.__getitem__)
            chosen = sorted(slots[:k])
            indices[b, t, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return indices


def causal(B, L, S, dtype=torch.int32):
    end_L = torch.arange(S - L + 1, S + 1, dtype=dtype)
    return torch.stack([torch.zeros_like(end_L), end_L], -1).expand(B, L, 2)


def packed(L, lengths, dtype=torch.int64):
    """Documents one after another, then rows without keys up to L."""
    bounds = torch.zeros(1, L, 2, dtype=dtype)
    start = 0
    for length in lengths:
        bounds[0, start : start + length, 0] = start
        bounds[0, start : start + length, 1] = torch.arange(start + 1, start + length + 1)
        start += length
    return bounds


def random_selection(visible, K):
    """K of each row's visible slots in random places of the row, -1 in the others."""
    noise = torch.rand(visible.shape).masked_fill(~visible, -1)
    value, slot = noise.topk(min(K, visible.shape[-1]), dim=-1)
    slot = torch.where(value < 0, -1, slot)
    return slot.gather(-1, torch.rand(slot.shape).argsort(-1)).int()


def randn(*shape, dtype=torch.float32, grad=False):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_(grad)


def leaves(*tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


BOUNDS = {
    "causal": (3, 20, 20, causal(3, 20, 20)),
    "one row": (3, 1, 33, causal(3, 1, 33)),
    "offset": (2, 7, 30, causal(2, 7, 30)),
    "packed": (1, 200, 200, packed(200, [1, 140, 37, 12])),
    "no keys": (2, 5, 9, torch.tensor([[[3, 3], [0, 9], [9, 9], [8, 9], [0, 0]]] * 2)),
    "nothing at all": (2, 5, 9, torch.zeros(2, 5, 2, dtype=torch.int64)),
}
