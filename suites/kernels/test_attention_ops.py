"""Selection and attention operators against dense formulas in fp64: values, gradients, edges.

Letters: B batch, L query rows, S key slots, H attention heads, D q/k width, V value width, J indexer heads,
E indexer head dim, K selected keys.
"""

import math

import pytest
import torch

from optimized.ops import backend, dense_mla, indexer_topk, sparse_mla
from optimized.ops.indexer_topk import GROUP, GROUPED_SEARCH_KEYS, select_topk
from suites.kernels.plain import (
    BOUNDS,
    FLOATS,
    INF,
    NAN,
    assert_near,
    causal,
    leaves,
    packed,
    plain_attention,
    plain_scores,
    plain_topk,
    randn,
    random_selection,
    visible_BLS,
)  # fmt: skip


@pytest.fixture(autouse=True)
def torch_operators(monkeypatch):
    """These tests are of the torch implementation, whatever the machine's default is."""
    monkeypatch.setattr(backend, "_DEFAULTS", {"cuda": "triton"})


@pytest.fixture(params=list(BOUNDS))
def geometry(request):
    return BOUNDS[request.param]


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
