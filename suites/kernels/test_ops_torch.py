"""The operators against dense formulas in fp64: values, gradients, edges, repeatability and memory.

Shape legend: B batch, L query rows, S key slots, H attention heads, D q/k width, V value width, J indexer
heads, E indexer head dim, K selected keys.

The formulas below are written the plain way (every score of every head at once, autograd for the gradients)
and share nothing with the operators. Tolerances: inputs are exact in fp64, so an operator differs by its own
rounding, a small multiple of the compute dtype's epsilon, and by rounding its result to the input's dtype.
"""

import importlib
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from optimized.ops import backend, dense_mla, indexer_kl, indexer_topk, sparse_mla
from optimized.ops.indexer_topk import GROUP, GROUPED_SEARCH_KEYS, select_topk

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


@pytest.fixture(params=list(BOUNDS))
def geometry(request):
    return BOUNDS[request.param]


# Selection


@pytest.mark.parametrize("dtype", FLOATS)
def test_topk_selects_what_a_stable_sort_selects(geometry, dtype):
    B, L, S, bounds = geometry
    # Small whole numbers make every score exact in every dtype, and many of them equal.
    q, k, w = (torch.randint(-2, 3, shape).to(dtype) for shape in ((B, L, 3, 4), (B, S, 4), (B, L, 3)))
    for budget in (1, 4, 16, S, S + 5):
        indices, lse = indexer_topk(q, k, w, bounds, budget)
        visible = visible_BLS(bounds, S)
        scores = plain_scores(q, k, w)
        assert indices.dtype == torch.int32
        assert torch.equal(indices, plain_topk(scores, visible, budget))
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_near(lse, scores.masked_fill(~visible, -INF).logsumexp(-1))


def test_topk_scores_in_fp32_whatever_the_inputs():
    B, L, S = 2, 9, 40
    q, k, w = randn(B, L, 4, 16, dtype=torch.bfloat16), randn(B, S, 16, dtype=torch.bfloat16), randn(B, L, 4)
    scores, visible = plain_scores(q, k, w), visible_BLS(causal(B, L, S), S)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        indices, lse = indexer_topk(q, k, w, causal(B, L, S), 8)
    assert torch.equal(indices, plain_topk(scores, visible, 8))
    assert_near(lse, scores.masked_fill(~visible, -INF).logsumexp(-1))


@pytest.mark.parametrize("n_visible", [7, 8, 9])
def test_topk_around_k_visible_keys(n_visible):
    q, k, w = randn(1, 1, 2, 8), randn(1, 20, 8), randn(1, 1, 2)
    bounds = torch.tensor([[[5, 5 + n_visible]]])
    indices, _ = indexer_topk(q, k, w, bounds, 8)
    assert torch.equal(indices, plain_topk(plain_scores(q, k, w), visible_BLS(bounds, 20), 8))
    assert (indices >= 0).sum() == min(n_visible, 8)


def test_topk_takes_the_lowest_indices_among_exact_zeros():
    # One positive score, the others exactly zero since relu closes every head; half of them -0.0.
    q, k = torch.ones(1, 1, 2, 4), -torch.ones(1, 50, 4)
    k[0, 30] = 1.0
    indices, _ = indexer_topk(q, k, torch.tensor([[[1.0, -0.5]]]), torch.tensor([[[2, 50]]]), 6)
    assert indices.tolist() == [[[2, 3, 4, 5, 6, 30]]]
    score = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0]])
    assert select_topk(score, torch.ones(1, 5, dtype=torch.bool), 3).tolist() == [[True] * 3 + [False] * 2]


def test_topk_of_negative_scores_prefers_the_nearest_to_zero():
    q, w = torch.ones(1, 1, 1, 1), -torch.ones(1, 1, 1)
    k = torch.arange(1.0, 9.0).flip(0).reshape(1, 8, 1)
    indices, lse = indexer_topk(q, k, w, torch.tensor([[[0, 7]]]), 3)
    assert indices.tolist() == [[[4, 5, 6]]]
    assert_near(lse, torch.arange(-8.0, -1.0).double().logsumexp(-1).reshape(1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_topk_order_of_special_values(dtype):
    score = torch.tensor([[1.0, INF, NAN, -INF, -0.0, 5e-324, -NAN, 0.0, -3.0]], dtype=dtype)
    score[0, 5] = torch.finfo(dtype).tiny
    visible = torch.ones_like(score, dtype=torch.bool)
    best_first = [2, 6, 1, 0, 5, 4, 7, 8, 3]
    for k in range(1, 10):
        assert select_topk(score, visible, k).nonzero()[:, 1].tolist() == sorted(best_first[:k])
    # A visible -inf still ranks above a hidden key.
    visible[0, [0, 1, 2]] = False
    assert select_topk(score, visible, 7).nonzero()[:, 1].tolist() == [3, 4, 5, 6, 7, 8]


def test_topk_shows_nan_scores_and_ignores_hidden_ones():
    q, k, w = randn(1, 12, 2, 4).abs(), randn(1, 12, 4).abs(), randn(1, 12, 2).abs()
    clean = indexer_topk(q, k, w, causal(1, 12, 12), 3)
    k[0, 8] = NAN
    indices, lse = indexer_topk(q, k, w, causal(1, 12, 12), 3)
    assert (indices[0, 8:] == 8).any(-1).all()
    assert lse[0, 8:].isnan().all()
    assert torch.equal(indices[0, :8], clean[0][0, :8])
    assert torch.equal(lse[0, :8], clean[1][0, :8])


@pytest.mark.parametrize("distinct", [3, 400, 10**6])
def test_topk_two_level_search_is_exact(distinct):
    n = GROUPED_SEARCH_KEYS + GROUP + 5
    score = torch.randint(0, distinct, (4, n)).float() - distinct / 2
    # A group's members lie n // GROUP apart: the best keys share one group, then none of them does.
    score[1, 5 :: n // GROUP] = distinct
    score[2, 640 : 640 + 60] = distinct
    # The last keys belong to no group.
    score[3, -5:] = distinct
    visible = torch.ones(4, n, dtype=torch.bool)
    visible[0, 100:] = False
    for k in (1, 16, 60):
        order = score.masked_fill(~visible, -INF).sort(dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(select_topk(score, visible, k), torch.zeros_like(visible).scatter(1, order, True))


def test_topk_runs_outside_of_autograd():
    q, k, w = randn(1, 3, 2, 4, grad=True), randn(1, 3, 4, grad=True), randn(1, 3, 2, grad=True)
    indices, lse = indexer_topk(q, k, w, causal(1, 3, 3), 2)
    assert not lse.requires_grad
    assert not indices.requires_grad


# Attention


@pytest.mark.parametrize("dtype", FLOATS)
def test_sparse_mla_equals_the_plain_formula(geometry, dtype):
    B, L, S, bounds = geometry
    H, D, V = 2, 12, 8
    q, kv = randn(B, L, H, D, dtype=dtype, grad=True), randn(B, S, D, dtype=dtype, grad=True)
    indices = random_selection(visible_BLS(bounds, S), 6)
    out, lse = sparse_mla(q, kv, indices, 0.3, V)
    dout = randn(B, L, H, V, dtype=dtype)
    out.backward(dout)

    q_, kv_ = leaves(q, kv)
    visible = visible_BLS(torch.tensor([0, S]).expand(B, L, 2), S, indices)
    k_ = kv_.unsqueeze(2).expand(B, S, H, D)
    expected, expected_lse, _ = plain_attention(q_, k_, k_[..., :V], visible, 0.3)
    expected.backward(dout.double())
    assert (out.dtype, q.grad.dtype, kv.grad.dtype) == (dtype,) * 3
    assert_near(out, expected, rounded_to=dtype)
    assert_near(lse, expected_lse)
    assert_near(q.grad, q_.grad, rounded_to=dtype)
    assert_near(kv.grad, kv_.grad, rounded_to=dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("selected", [False, True])
def test_dense_mla_equals_the_plain_formula(geometry, dtype, selected):
    B, L, S, bounds = geometry
    H, D, V = 2, 12, 8
    q, k, v = (randn(*x, dtype=dtype, grad=True) for x in ((B, L, H, D), (B, S, H, D), (B, S, H, V)))
    # The selection is made without the bounds, which then restrict it.
    indices = random_selection(torch.rand(B, L, S) < 0.8, 6) if selected else None
    out, lse = dense_mla(q, k, v, bounds, 0.3, indices)
    dout = randn(B, L, H, V, dtype=dtype)
    out.backward(dout)

    q_, k_, v_ = leaves(q, k, v)
    expected, expected_lse, _ = plain_attention(q_, k_, v_, visible_BLS(bounds, S, indices), 0.3)
    expected.backward(dout.double())
    assert (out.dtype, q.grad.dtype, k.grad.dtype, v.grad.dtype) == (dtype,) * 4
    assert_near(out, expected, rounded_to=dtype)
    assert_near(lse, expected_lse)
    for mine, theirs in ((q, q_), (k, k_), (v, v_)):
        assert_near(mine.grad, theirs.grad, rounded_to=dtype)


def test_masked_and_gathered_attention_agree():
    B, L, H, D, V = 2, 30, 3, 10, 6
    q, kv = randn(B, L, H, D, dtype=torch.float64), randn(B, L, D, dtype=torch.float64)
    indices = random_selection(visible_BLS(causal(B, L, L), L), 5)
    k = kv.unsqueeze(2).expand(B, L, H, D)
    masked = dense_mla(q, k, k[..., :V], causal(B, L, L), 0.3, indices)
    for a, b in zip(masked, sparse_mla(q, kv, indices, 0.3, V), strict=True):
        assert_near(a, b)


def test_attention_passes_gradcheck():
    B, L, S, H, D, V = 2, 3, 5, 2, 4, 3
    bounds = torch.tensor([[[0, 2], [2, 2], [1, 5]]] * B)
    indices = torch.tensor([[[-1, 4, 1], [-1, -1, -1], [0, -1, 3]]] * B)
    shapes = (B, L, H, D), (B, S, D), (B, S, H, D), (B, S, H, V)
    q, kv, k, v = (randn(*shape, dtype=torch.float64, grad=True) for shape in shapes)
    assert torch.autograd.gradcheck(lambda q, kv: sparse_mla(q, kv, indices, 0.7, V)[0], (q, kv))
    assert torch.autograd.gradcheck(lambda q, k, v: dense_mla(q, k, v, bounds, 0.7)[0], (q, k, v))
    assert torch.autograd.gradcheck(lambda q, k, v: dense_mla(q, k, v, bounds, 0.7, indices)[0], (q, k, v))


def test_gradient_of_one_input_alone():
    q, kv = randn(1, 4, 2, 6), randn(1, 4, 6)
    indices = random_selection(visible_BLS(causal(1, 4, 4), 4), 3)
    both = []
    for leaf in (q, kv):
        leaf.requires_grad_()
        sparse_mla(q, kv, indices, 0.5, 4)[0].sum().backward()
        both.append(leaf.grad.clone())
        leaf.requires_grad_(False).grad = None
    q.requires_grad_(), kv.requires_grad_()
    sparse_mla(q, kv, indices, 0.5, 4)[0].sum().backward()
    assert torch.equal(q.grad, both[0])
    assert torch.equal(kv.grad, both[1])


@pytest.mark.parametrize("poison", [NAN, INF, 1e30])
def test_sparse_mla_never_touches_unselected_keys(poison):
    B, L, S, H, D, V = 2, 6, 9, 2, 6, 4
    q, kv, dout = randn(B, L, H, D), randn(B, S, D), randn(B, L, H, V)
    # Never chosen: slot 0, which a clamped -1 would read, slot 8, which a wrapped one would, 3 and 5.
    indices = torch.tensor([1, -1, 2, 7, -1, 4]).repeat(B, L, 1)
    indices[:, 3] = -1

    def run(kv, dout):
        q_, kv_ = q.clone().requires_grad_(), kv.clone().requires_grad_()
        out, lse = sparse_mla(q_, kv_, indices, 0.5, V)
        out.backward(dout)
        return out.detach(), lse, q_.grad, kv_.grad

    poisoned, poisoned_dout = kv.clone(), dout.clone()
    poisoned[:, [0, 3, 5, 8]] = poison
    # The gradient that arrives at a row without keys does not matter either.
    poisoned_dout[:, 3] = poison
    for mine, clean in zip(run(poisoned, poisoned_dout), run(kv, dout), strict=True):
        assert torch.equal(mine, clean)


@pytest.mark.parametrize("poison", [NAN, INF, 1e30])
@pytest.mark.parametrize("selected", [False, True])
def test_dense_mla_keeps_hidden_values_hidden(poison, selected):
    B, L, S, H, D, V = 2, 6, 6, 2, 6, 4
    bounds = packed(6, [2, 3]).expand(B, L, 2)
    indices = torch.tensor([0, -1, 1, 2, 4]).repeat(B, L, 1) if selected else None
    q, k, v, dout = randn(B, L, H, D), randn(B, S, H, D), randn(B, S, H, V), randn(B, L, H, V)

    def run(q, k, v, dout):
        q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
        out, lse = dense_mla(q, k, v, bounds, 0.5, indices)
        out.backward(dout)
        return {"out": out.detach(), "lse": lse, "q": q.grad, "k": k.grad, "v": v.grad}

    clean = run(q, k, v, dout)
    # Documents are rows and keys 0 to 1 and 2 to 4, row 5 has no keys: only row 4 may see key 4.
    for name in ("q", "k", "v", "dout"):
        inputs = {"q": q.clone(), "k": k.clone(), "v": v.clone(), "dout": dout.clone()}
        inputs[name][:, 4] = poison
        inputs[name][:, 5] = poison
        mine = run(**inputs)
        rows, keys = [0, 1, 2, 3, 5], [0, 1, 5]
        for result in ("out", "lse", "q"):
            assert torch.equal(mine[result][:, rows], clean[result][:, rows]), (name, result)
        for result in ("k", "v"):
            assert torch.equal(mine[result][:, keys], clean[result][:, keys]), (name, result)
        if math.isnan(poison):
            # What row 4 does see must show: its keys 2 and 4, in the gradients that its own values enter.
            for result in {"q": "kv", "k": "q", "v": "q", "dout": "qkv"}[name]:
                assert mine[result][:, 4].isnan().all(), (name, result)
                assert result == "q" or mine[result][:, 2].isnan().all(), (name, result)
            assert mine["out"][:, 4].isnan().all() == (name != "dout")


def test_a_visible_nan_in_v_reaches_its_channel_and_its_readers_only():
    q, k, v = randn(1, 5, 2, 4), randn(1, 5, 2, 4), randn(1, 5, 2, 3)
    v[0, 2, 1, 0] = NAN
    out, _ = dense_mla(q, k, v, causal(1, 5, 5), 1.0)
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[0, 2:, 1, 0] = True
    assert torch.equal(out.isnan(), expected)


# The indexer's loss


def kl_inputs(B, L, S, dtype, grad=True):
    J, E, H, D = 3, 5, 2, 8
    # Scaled so that a third of the relus is closed and the softmaxes are far from flat.
    iq, ik, w = randn(B, L, J, E, dtype=dtype), randn(B, S, E, dtype=dtype), randn(B, L, J, dtype=dtype)
    q, k = randn(B, L, H, D, dtype=dtype), randn(B, S, H, D, dtype=dtype)
    for x in (iq, ik, w):
        x.requires_grad_(grad)
    return (iq, ik, w), q, k


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("selected", [True, False])
def test_indexer_kl_equals_the_plain_formula(geometry, dtype, shared, selected):
    B, L, S, bounds = geometry
    (iq, ik, w), q, k = kl_inputs(B, L, S, dtype)
    k = k[:, :, 0] if shared else k
    k_heads = (k.unsqueeze(2).expand(B, S, 2, 8) if shared else k).double()
    indices = random_selection(torch.rand(B, L, S) < 0.8, 6) if selected else None
    visible = visible_BLS(bounds, S, indices)
    # In the compute dtype, as an operator would return it.
    lse = plain_attention(q.double(), k_heads, k_heads, visible, 0.4)[1].to(backend.compute_dtype(dtype))
    total, rows = indexer_kl(iq, ik, w, q, k, lse, bounds, 0.4, indices)
    (1.7 * total).backward()

    iq_, ik_, w_ = leaves(iq, ik, w)
    expected = plain_kl(iq_, ik_, w_, q.double(), k_heads, visible, 0.4)
    (1.7 * expected.sum()).backward()
    assert total.dtype == rows.dtype == backend.compute_dtype(dtype)
    assert not rows.requires_grad
    assert torch.equal(total, rows.sum())
    assert_near(rows, expected)
    assert (rows[~visible.any(-1)] == 0).all()
    for mine, theirs in ((iq, iq_), (ik, ik_), (w, w_)):
        assert mine.grad.dtype == dtype
        assert_near(mine.grad, theirs.grad, rounded_to=dtype)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("selected", [True, False])
def test_indexer_kl_passes_gradcheck(shared, selected):
    bounds = torch.tensor([[[0, 2], [2, 2], [1, 5]]] * 2)
    indices = torch.tensor([[[-1, 0, 1], [-1, -1, -1], [2, -1, 3]]] * 2) if selected else None
    indexer, q, k = kl_inputs(2, 3, 5, torch.float64)
    heads = k[:, :, :1].expand_as(k) if shared else k
    _, lse = dense_mla(q, heads, heads, bounds, 0.4, indices)
    k = k[:, :, 0] if shared else k

    def loss(iq, ik, w):
        return indexer_kl(iq, ik, w, q, k, lse, bounds, 0.4, indices)[0]

    assert torch.autograd.gradcheck(loss, indexer)


def test_indexer_kl_gives_gradient_to_the_indexer_only(monkeypatch):
    (iq, ik, w), q, k = kl_inputs(1, 6, 6, torch.float32)
    q.requires_grad_(), k.requires_grad_()
    _, lse = dense_mla(q, k, k, causal(1, 6, 6), 0.4)
    total, _ = indexer_kl(iq, ik, w, q, k, lse, causal(1, 6, 6), 0.4)
    total.backward()
    assert q.grad is None
    assert k.grad is None

    # Where nobody will ask for gradients, none are computed. (The module's name is taken by its function.)
    module = importlib.import_module("optimized.ops.indexer_kl")
    monkeypatch.setattr(module, "_add_gradients", lambda *_: pytest.fail("computed a gradient"))
    frozen, _ = indexer_kl(iq.detach(), ik.detach(), w.detach(), q, k, lse, causal(1, 6, 6), 0.4)
    assert not frozen.requires_grad
    assert torch.equal(frozen, total)
    with torch.no_grad():
        assert torch.equal(indexer_kl(iq, ik, w, q, k, lse, causal(1, 6, 6), 0.4)[0], total)


def test_indexer_kl_is_zero_where_the_indexer_is_right():
    # One head of each kind and a single positive relu: I = q . k, the main attention's own logits.
    q, k = randn(1, 8, 1, 4, dtype=torch.float64).abs(), randn(1, 8, 4, dtype=torch.float64).abs()
    w = torch.ones(1, 8, 1, dtype=torch.float64)
    _, lse = dense_mla(q, k.unsqueeze(2), k.unsqueeze(2), causal(1, 8, 8), 1.0)
    leaf = q.clone().requires_grad_()
    total, rows = indexer_kl(leaf, k, w, q, k, lse, causal(1, 8, 8), 1.0)
    total.backward()
    assert rows.abs().max() < 1e-14
    assert leaf.grad.abs().max() < 1e-14


@pytest.mark.parametrize("poison", [NAN, INF, 1e30])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("selected", [True, False])
def test_indexer_kl_keeps_hidden_values_hidden(poison, shared, selected):
    B, L = 2, 6
    bounds = packed(L, [2, 3]).expand(B, L, 2)
    indices = torch.tensor([0, -1, 1, 2, 4]).repeat(B, L, 1) if selected else None
    (iq, ik, w), q, k = kl_inputs(B, L, L, torch.float32, grad=False)
    heads = k[:, :, :1].expand_as(k) if shared else k

    def run(iq, ik, w, q, k):
        iq, ik, w = (x.clone().requires_grad_() for x in (iq, ik, w))
        heads = k[:, :, :1].expand_as(k) if shared else k
        _, lse = dense_mla(q, heads, heads, bounds, 0.4, indices)
        total, rows = indexer_kl(iq, ik, w, q, k[:, :, 0] if shared else k, lse, bounds, 0.4, indices)
        total.backward()
        return rows.detach(), iq.grad, w.grad, ik.grad

    inputs = {"iq": iq, "ik": ik, "w": w, "q": q, "k": heads}
    clean = run(**inputs)
    for name, tensor in inputs.items():
        poisoned = tensor.clone()
        poisoned[:, 4:] = poison
        mine = run(**{**inputs, name: poisoned})
        if math.isnan(poison):
            assert mine[0][:, 4].isnan().all(), name
        for result, expected in zip(mine[:3], clean[:3], strict=True):
            assert torch.equal(result[:, [0, 1, 2, 3, 5]], expected[:, [0, 1, 2, 3, 5]]), name
        assert torch.equal(mine[3][:, [0, 1, 5]], clean[3][:, [0, 1, 5]]), name


# All of them


def every_operator(B, L, S, K, bounds, dtype=torch.float32, views=lambda x: x):
    """Runs all operators forward and backward; returns every output and gradient."""
    generator = torch.Generator().manual_seed(1)
    H, D, V, J, E = 2, 6, 4, 2, 4

    def leaf(*shape):
        return views(torch.randn(*shape, generator=generator).to(dtype)).detach().requires_grad_()

    iq, ik, w = leaf(B, L, J, E), leaf(B, S, E), leaf(B, L, J)
    q, kv, k, v = leaf(B, L, H, D), leaf(B, S, D), leaf(B, S, H, D), leaf(B, S, H, V)
    indices, lse_index = indexer_topk(iq, ik, w, bounds, K)
    indices = views(indices)
    sparse, lse_sparse = sparse_mla(q, kv, indices, 0.5, V)
    dense, lse_dense = dense_mla(q, k, v, bounds, 0.5)
    masked, lse_masked = dense_mla(q, k, v, bounds, 0.5, indices)
    losses = [
        indexer_kl(iq, ik, w, q, k, lse_dense, bounds, 0.5)[0],
        indexer_kl(iq, ik, w, q, k, lse_masked, bounds, 0.5, indices)[0],
        indexer_kl(iq, ik, w, q, kv, lse_sparse, bounds, 0.5, indices)[0],
    ]
    sums = [out.float().square().sum() for out in (sparse, dense, masked)]
    torch.autograd.backward(sums + losses)
    outputs = [indices, lse_index, sparse, lse_sparse, dense, lse_dense, masked, lse_masked, *losses]
    return [x.detach() for x in outputs] + [x.grad for x in (iq, ik, w, q, kv, k, v)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_five_runs_give_the_same_bits(dtype):
    first = every_operator(2, 150, 150, 8, causal(2, 150, 150), dtype)
    for _ in range(4):
        for a, b in zip(first, every_operator(2, 150, 150, 8, causal(2, 150, 150), dtype), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_inputs_are_left_as_they_were(integer):
    bounds = packed(12, [5, 6], integer)
    indices = random_selection(visible_BLS(bounds, 12), 4).to(integer)
    assert (indices == -1).any()
    # In the compute dtype and with one head, where a conversion or a transposition copies nothing.
    iq, ik, w = randn(1, 12, 1, 4, grad=True), randn(1, 12, 4, grad=True), randn(1, 12, 1, grad=True)
    q, k, v = randn(1, 12, 1, 6, grad=True), randn(1, 12, 1, 6, grad=True), randn(1, 12, 1, 6, grad=True)
    inputs = [bounds, indices, iq, ik, w, q, k, v]
    before = [x.detach().clone() for x in inputs]
    indexer_topk(iq, ik, w, bounds, 3)
    sparse_mla(q, k[:, :, 0], indices, 0.5, 4)[0].sum().backward()
    for chosen in (None, indices):
        out, lse = dense_mla(q, k, v, bounds, 0.5, chosen)
        out.sum().backward()
        for keys in (k, k[:, :, 0]):
            indexer_kl(iq, ik, w, q, keys, lse, bounds, 0.5, chosen)[0].backward()
    for x, copy in zip(inputs, before, strict=True):
        assert torch.equal(x, copy)


def test_inputs_need_not_be_contiguous():
    def spread(x):
        """The same values with gaps between them and the axes stored in reverse order."""
        axes = tuple(reversed(range(x.ndim)))
        gap = NAN if x.is_floating_point() else 10**6
        wide = torch.full((*(x.shape[axis] for axis in axes), 2), gap, dtype=x.dtype)
        return wide[..., 0].permute(axes).copy_(x)

    bounds = causal(3, 20, 20)
    plain = every_operator(3, 20, 20, 5, bounds)
    for a, b in zip(every_operator(3, 20, 20, 5, spread(bounds), views=spread), plain, strict=True):
        assert_near(a, b)


def test_empty_sizes():
    bounds = torch.zeros(1, 0, 2, dtype=torch.int32)
    for result in every_operator(1, 0, 5, 3, bounds) + every_operator(1, 3, 0, 3, torch.zeros(1, 3, 2).int()):
        assert not result.isnan().any()


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation inside of it returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


def test_no_tensor_grows_with_the_square_of_the_length():
    largest = {}
    for L in (512, 1024):
        # All chunks have the most rows that they can have, so that only S differs.
        assert backend.chunk_rows(L, 2 * L, torch.float32) == backend.MAX_CHUNK_ROWS
        with LargestTensor() as seen:
            every_operator(1, L, L, 8, causal(1, L, L))
        largest[L] = seen.numel
        assert seen.numel < L * L
    assert largest[1024] <= 2 * largest[512]


def test_the_memory_test_sees_backward_passes_and_squares():
    x = torch.ones(64, 1, requires_grad=True)
    with LargestTensor() as seen:
        (x * 2).sum().backward()
    assert seen.numel == 64
    with LargestTensor() as seen:
        _ = x.detach() @ x.detach().T
    assert seen.numel == 64 * 64

    class SquareInBackward(torch.autograd.Function):
        @staticmethod
        def forward(_, x):
            return x.clone()

        @staticmethod
        def backward(_, grad):
            return (grad @ grad.T) @ grad

    with LargestTensor() as seen:
        SquareInBackward.apply(x).sum().backward()
    assert seen.numel == 64 * 64


def test_chunks_are_cut_by_size_alone():
    assert backend.chunk_rows(1000, 1, torch.float32) == 128
    assert backend.chunk_rows(1000, 10**9, torch.float32) == 16
    assert [backend.chunk_rows(rows, 10**9, torch.float32) for rows in (0, 1, 5)] == [1, 1, 5]
    rows = backend.chunk_rows(1000, 2**16, torch.float32)
    assert 16 < rows < 128
    assert rows * 2**16 * 4 <= backend.CHUNK_BYTES
    assert backend.chunk_rows(1000, 2**16, torch.float64) == rows // 2


def good_arguments():
    f, bounds, indices = torch.zeros, causal(1, 3, 4), torch.zeros(1, 3, 2, dtype=torch.int32)
    q, k, lse = f(1, 3, 2, 6), f(1, 4, 2, 6), f(1, 3, 2)
    iq, ik, w = f(1, 3, 5, 7), f(1, 4, 7), f(1, 3, 5)
    return {
        indexer_topk: {"q_BLJE": iq, "k_BSE": ik, "w_BLJ": w, "bounds_BL2": bounds, "k": 2},
        sparse_mla: {"q_BLHD": q, "kv_BSD": f(1, 4, 6), "indices_BLK": indices, "scale": 1.0, "d_v": 4},
        dense_mla: {
            "q_BLHD": q,
            "k_BSHD": k,
            "v_BSHV": k,
            "bounds_BL2": bounds,
            "scale": 1.0,
            "indices_BLK": indices,
        },
        indexer_kl: {
            "iq_BLJE": iq,
            "ik_BSE": ik,
            "w_BLJ": w,
            "q_BLHD": q,
            "k": k,
            "lse_BLH": lse,
            "bounds_BL2": bounds,
            "scale": 1.0,
            "indices_BLK": indices,
        },
    }


@pytest.mark.parametrize("operator", [indexer_topk, sparse_mla, dense_mla, indexer_kl])
def test_wrong_arguments_are_named(operator):
    good = good_arguments()[operator]
    operator(**good)
    operator(**good, backend="torch")
    wrong: list[tuple[str, object, str]] = [
        ("backend", "triton", f"'triton'.*{operator.__name__} has implementations: torch")
    ]
    for name, value in good.items():
        if not isinstance(value, torch.Tensor):
            continue
        wrong += [(name, value[..., 0], "shape"), (name, value.bool(), "dtype")]
        # The first argument sets the batch size, so that another one is named.
        wrong += [(name, torch.cat([value, value]), "shape")]
        if not value.is_floating_point():
            wrong += [(name, value.float(), "dtype"), (name, value * 0 + 5, "5"), (name, value - 2, "-2")]
    scalars = {"k": (0, -1, 2.0, True), "d_v": (0, 7, 2.0), "scale": (NAN, INF, "1", None)}
    for name, values in scalars.items():
        if name in good and not isinstance(good[name], torch.Tensor):
            wrong += [(name, value, f"^{name} is") for value in values]
    if "bounds_BL2" in good:
        wrong.append(("bounds_BL2", good["bounds_BL2"].flip(-1), "lengths from -4"))
    for name, value, words in wrong:
        with pytest.raises(ValueError, match=words) as error:
            operator(**{**good, name: value})
        message = str(error.value)
        assert message.endswith(".")
        assert name in message or "shape" in message


def test_an_unknown_operator_is_named():
    with pytest.raises(ValueError, match=r"'softmax'.*dense_mla, indexer_kl, indexer_topk, sparse_mla"):
        backend.resolve_backend("softmax", None, torch.device("cpu"))
    assert backend.resolve_backend("sparse_mla", None, torch.device("cuda")) == "torch"
