"""The indexer's Triton kernels: selections, divergences and their gradients, interpreted where there is no GPU.

Letters: B batch, L query rows, S key slots, H attention heads, D q/k width, J indexer heads, E indexer head dim,
K selected keys, C rows of a chunk, n key slots that a chunk visits.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optimized.kernels.common import interpreted
from optimized.kernels.indexer_kl_target import split_width
from optimized.kernels.radix_topk import radix_topk
from optimized.ops import indexer_kl, indexer_topk
from reference.indexer import select_topk
from suites.kernels.plain import (
    INF,
    NAN,
    assert_near,
    causal,
    leaves,
    packed,
    plain_attention,
    plain_kl,
    plain_scores,
    plain_topk,
    randn,
    random_selection,
    visible_BLS,
)  # fmt: skip
from suites.kernels.test_indexer_kl_op import LargestTensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parents[2]
HALF = [torch.bfloat16, torch.float16]

GEOMETRIES = {
    "causal": (3, 9, 9, causal(3, 9, 9)),
    "one row": (1, 1, 33, causal(1, 1, 33)),
    "offset": (2, 5, 30, causal(2, 5, 30)),
    "packed": (1, 40, 40, packed(40, [1, 22, 12])),
    "no keys": (2, 5, 9, torch.tensor([[[3, 3], [0, 9], [9, 9], [8, 9], [0, 0]]] * 2)),
    "nothing at all": (2, 5, 9, torch.zeros(2, 5, 2, dtype=torch.int32)),
}
MODES = [(shared, selected) for shared in (True, False) for selected in (False, True)]


@pytest.fixture(params=list(GEOMETRIES))
def geometry(request):
    return GEOMETRIES[request.param]


def small_integers(*shape, dtype=torch.float32, largest=2):
    """Inputs whose scores are exact in any order of summation, and often equal."""
    return torch.randint(-largest, largest + 1, shape).to(dtype)


def triton_topk(q, k, w, bounds, count):
    inputs = [x.to(DEVICE) for x in (q, k, w, bounds)]
    return [x.cpu() for x in indexer_topk(*inputs, count, backend="triton")]


def triton_kl(indexer, q, k, lse, bounds, scale, indices=None, factor=1.7):
    """(rows, [diq, dik, dw]) of `factor` times their sum."""
    indexer = [x.detach().to(DEVICE).requires_grad_() for x in indexer]
    fixed = [x.to(DEVICE) for x in (q, k, lse, bounds)]
    indices = None if indices is None else indices.to(DEVICE)
    total, rows = indexer_kl(*indexer, *fixed, scale, indices, backend="triton")
    torch.testing.assert_close(total.detach(), rows.sum(), rtol=0, atol=0, equal_nan=True)
    assert not rows.requires_grad
    (factor * total).backward()
    return rows.cpu(), [x.grad.cpu() for x in indexer]


def kl_inputs(B, L, S, dtype=torch.float32, J=5, E=20, H=3, D=40, shared=True):
    indexer = (randn(B, L, J, E, dtype=dtype), randn(B, S, E, dtype=dtype), randn(B, L, J, dtype=dtype))
    # Logits of order 1 at any width, so that no softmax is one-hot.
    q = (randn(B, L, H, D) * D**-0.5).to(dtype)
    return indexer, q, randn(B, S, *(() if shared else (H,)), D, dtype=dtype)


def heads_of(k, H):
    return k.unsqueeze(2).expand(-1, -1, H, -1) if k.ndim == 3 else k


def plain_lse(q, k, visible, scale):
    k_heads = heads_of(k, q.shape[2]).double()
    return plain_attention(q.double(), k_heads, k_heads[..., :1], visible, scale)[1].float()


def plain_kl_and_gradients(indexer, q, k, visible, scale, factor=1.7):
    indexer = leaves(*indexer)
    rows = plain_kl(*indexer, q.double(), heads_of(k, q.shape[2]).double(), visible, scale)
    (factor * rows.sum()).backward()
    return rows, [x.grad for x in indexer]


def assert_rejected(actual, expected, **near):
    """The comparison that has just passed fails for a result that is half a percent too large."""
    with pytest.raises(AssertionError):
        assert_near(actual * 1.005 if "rounded_to" not in near else actual * 1.05, expected, **near)


# --- scores and their selection ---


@pytest.mark.parametrize(("J", "E"), [(3, 5), (20, 20)])
def test_selections_are_the_exact_ones(geometry, J, E):
    B, L, S, bounds = geometry
    q, k, w = small_integers(B, L, J, E), small_integers(B, S, E), small_integers(B, L, J)
    scores, visible = plain_scores(q, k, w), visible_BLS(bounds, S)
    for count in (1, 4, S, S + 5):
        indices, lse = triton_topk(q, k, w, bounds, count)
        assert indices.dtype == torch.int32
        assert torch.equal(indices, plain_topk(scores, visible, count)), count
        assert lse.dtype == torch.float32
        assert_near(lse, scores.masked_fill(~visible, -INF).logsumexp(-1))
    if visible.any():
        assert_rejected(lse, scores.masked_fill(~visible, -INF).logsumexp(-1))


def test_equal_scores_go_to_the_lowest_index():
    L = S = 12
    q, k, w = torch.zeros(1, L, 2, 4), small_integers(1, S, 4), small_integers(1, L, 2)
    indices, _ = triton_topk(q, k, w, causal(1, L, S), 3)
    assert torch.equal(indices[0, 2:], torch.tensor([0, 1, 2]).expand(L - 2, 3).int())
    # Scores of the other kind of zero are equal too: relu(0) times a negative weight.
    w = -torch.ones(1, L, 2)
    assert torch.equal(triton_topk(q, k, w, causal(1, L, S), 3)[0], indices)


def test_keys_at_the_edges_of_tiles():
    S = 258
    # A batch entry each, so that no row widens what another one's tile sees.
    bounds = torch.tensor([[31, 33], [127, 129], [128, 256], [127, 128], [64, 129], [0, 257], [255, 258]])[:, None]
    B = len(bounds)
    q, k, w = small_integers(B, 1, 3, 8), small_integers(B, S, 8), small_integers(B, 1, 3)
    scores, visible = plain_scores(q, k, w), visible_BLS(bounds, S)
    indices, lse = triton_topk(q, k, w, bounds, 50)
    assert torch.equal(indices, plain_topk(scores, visible, 50))
    assert_near(lse, scores.masked_fill(~visible, -INF).logsumexp(-1))

    indexer, main_q, main_k = kl_inputs(B, 1, S, J=2, E=8, H=2, D=8, shared=False)
    rows, grads = triton_kl(indexer, main_q, main_k, plain_lse(main_q, main_k, visible, 1.0), bounds, 1.0)
    expected_rows, expected = plain_kl_and_gradients(indexer, main_q, main_k, visible, 1.0)
    assert_near(rows, expected_rows)
    for mine, theirs in zip(grads, expected, strict=True):
        assert_near(mine, theirs)


@pytest.mark.parametrize("count", [4, 5, 6])
def test_rows_with_about_as_many_keys_as_selected(count):
    bounds = torch.tensor([[[0, 4], [3, 8], [2, 8], [0, 8], [7, 7]]])
    q, k, w = small_integers(1, 5, 3, 8), small_integers(1, 8, 8), small_integers(1, 5, 3)
    expected = plain_topk(plain_scores(q, k, w), visible_BLS(bounds, 8), count)
    assert torch.equal(triton_topk(q, k, w, bounds, count)[0], expected)


@pytest.mark.parametrize("dtype", HALF)
def test_selections_in_half_precision(dtype):
    B, L, S, bounds = GEOMETRIES["packed"]
    q, k, w = (small_integers(*shape, dtype=dtype) for shape in ((B, L, 4, 16), (B, S, 16), (B, L, 4)))
    expected = plain_topk(plain_scores(q, k, w), visible_BLS(bounds, S), 5)
    assert torch.equal(triton_topk(q, k, w, bounds, 5)[0], expected)
    # Mixed with fp32, the products are those of fp32.
    assert torch.equal(triton_topk(q, k.float(), w.float(), bounds, 5)[0], expected)
    third = randn(B, S, 16) / 3
    mixed = triton_topk(q, third, w, bounds, 5)[0]
    assert torch.equal(mixed, plain_topk(plain_scores(q, third, w), visible_BLS(bounds, S), 5))


def test_more_batches_than_heads_and_inputs_in_pieces():
    B, L, S, J, E = 5, 4, 8, 2, 4
    q = small_integers(B, J, E, L).permute(0, 3, 1, 2)
    k, w = small_integers(B, E, S).mT, small_integers(1, 1, J).expand(B, L, J)
    bounds = causal(1, L, S).expand(B, L, 2)
    assert not q.is_contiguous() and not k.is_contiguous()
    expected = plain_topk(plain_scores(q, k, w), visible_BLS(bounds, S), 3)
    assert torch.equal(triton_topk(q, k, w, bounds, 3)[0], expected)


def test_radix_selection_of_any_floats():
    n, C = 2500, 7
    logits = torch.randn(C, n)
    logits[1] = -logits[1].abs()
    logits[2, ::3], logits[2, 1::3] = 0.0, -0.0
    logits[3, 5::7], logits[3, 6::7], logits[3, 7] = NAN, torch.tensor(NAN).neg(), INF
    logits[4] = torch.arange(n).remainder(9) * 1e-45 - 4e-45
    logits[5, :1200], logits[5, 1200:] = -INF, INF
    logits[6] = -3.0
    bounds = torch.tensor([[3, 2500], [0, 2499], [17, 2100], [0, 2500], [1, 2500], [9, 2000], [1025, 2500]])
    selected = {}
    for k in (1, 299, 1000, 2048):
        indices = torch.full((C, k), -1, dtype=torch.int32, device=DEVICE)
        radix_topk(logits.to(DEVICE), bounds.int().to(DEVICE), k, 0, indices)
        expected = select_topk(logits[None], visible_BLS(bounds[None], n), k)[0]
        selected[k] = indices.cpu()
        assert torch.equal(selected[k], expected), k
    # The highest index among equals would be another selection, so the comparison can tell.
    lowest, highest = torch.arange(1025, 1025 + 299), torch.arange(2500 - 299, 2500)
    assert torch.equal(selected[299][6], lowest.int())
    assert not torch.equal(selected[299][6], highest.int())


def test_hidden_keys_reach_neither_selection_nor_lse():
    L = S = 6
    bounds = packed(L, [2, 3])
    q, k, w = randn(1, L, 3, 8), randn(1, S, 8), randn(1, L, 3)
    clean, clean_lse = triton_topk(q, k, w, bounds, 2)
    for poison in (NAN, -NAN, INF, 1e30):
        poisoned = k.clone()
        poisoned[:, 4:] = poison
        indices, lse = triton_topk(q, poisoned, w, bounds, 2)
        others = [0, 1, 2, 3, 5]
        assert torch.equal(indices[:, others], clean[:, others])
        assert torch.equal(lse[:, others], clean_lse[:, others])
        if poison != poison:
            assert 4 in indices[0, 4]
            assert lse[0, 4].isnan()


def test_neither_chunks_nor_runs_change_a_selection(monkeypatch):
    B, L, J, E = 2, 150, 3, 8
    bounds = torch.cat([packed(L, [70, 3, 60]), causal(1, L, L).long()])
    q, k, w = randn(B, L, J, E), randn(B, L, E), randn(B, L, J)
    once = triton_topk(q, k, w, bounds, 9)
    again = triton_topk(q, k, w, bounds, 9)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    chunks = []
    module = importlib.import_module("optimized.kernels.indexer_topk")
    select = radix_topk
    monkeypatch.setattr(module, "radix_topk", lambda *args: (chunks.append(len(args[0])), select(*args)))
    monkeypatch.setattr(importlib.import_module("optimized.kernels.index_logits"), "CHUNK_BYTES", 1)
    indices, lse = triton_topk(q, k, w, bounds, 9)
    assert max(chunks) < L
    assert torch.equal(indices, once[0])
    assert_near(lse, once[1])


def test_selection_at_the_models_sizes():
    L, S, J, E, k = 3, 2100, 64, 128, 2048
    q, key, w = (small_integers(1, *s, dtype=torch.bfloat16, largest=1) for s in ((L, J, E), (S, E), (L, J)))
    bounds = torch.tensor([[[0, S], [40, S], [52, 2099]]])
    indices, lse = triton_topk(q, key, w, bounds, k)
    scores, visible = plain_scores(q, key, w), visible_BLS(bounds, S)
    assert torch.equal(indices, plain_topk(scores, visible, k))
    assert (indices[0, 2] == -1).sum() == 1
    assert_near(lse, scores.masked_fill(~visible, -INF).logsumexp(-1))


# --- the divergence ---


@pytest.mark.parametrize(("shared", "selected"), MODES)
def test_divergence_and_gradients_equal_the_plain_formula(geometry, shared, selected):
    B, L, S, bounds = geometry
    indexer, q, k = kl_inputs(B, L, S, shared=shared)
    indices = random_selection(torch.rand(B, L, S) < 0.8, 6) if selected else None
    visible = visible_BLS(bounds, S, indices)
    rows, grads = triton_kl(indexer, q, k, plain_lse(q, k, visible, 1.3), bounds, 1.3, indices)
    expected_rows, expected = plain_kl_and_gradients(indexer, q, k, visible, 1.3)
    assert rows.dtype == torch.float32
    assert_near(rows, expected_rows)
    assert (rows[~visible.any(-1)] == 0).all()
    for mine, theirs in zip(grads, expected, strict=True):
        assert_near(mine, theirs)
        if visible.sum() > 1:
            assert_rejected(mine, theirs)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("shared", "selected"), MODES)
def test_divergence_in_half_precision(dtype, shared, selected):
    B, L, S, bounds = GEOMETRIES["offset"]
    indexer, q, k = kl_inputs(B, L, S, dtype, shared=shared)
    indices = random_selection(torch.rand(B, L, S) < 0.8, 6) if selected else None
    visible = visible_BLS(bounds, S, indices)
    rows, grads = triton_kl(indexer, q, k, plain_lse(q, k, visible, 0.9), bounds, 0.9, indices)
    expected_rows, expected = plain_kl_and_gradients(indexer, q, k, visible, 0.9)
    assert_near(rows, expected_rows)
    for mine, theirs in zip(grads, expected, strict=True):
        assert mine.dtype == dtype
        assert_near(mine, theirs, rounded_to=dtype)
        assert_rejected(mine, theirs, rounded_to=dtype)


@pytest.mark.parametrize("shared", [True, False])
def test_all_keys_selected_is_the_dense_divergence(shared):
    B, L, S = 2, 4, 11
    bounds = torch.tensor([[[0, 11], [2, 9], [5, 5], [10, 11]]] * B)
    indexer, q, k = kl_inputs(B, L, S, shared=shared)
    lse = plain_lse(q, k, visible_BLS(bounds, S), 1.0)
    everything = torch.stack([torch.randperm(S) for _ in range(B * L)]).view(B, L, S)
    dense, selected = (triton_kl(indexer, q, k, lse, bounds, 1.0, indices) for indices in (None, everything))
    assert_near(selected[0], dense[0])
    for mine, theirs in zip(selected[1], dense[1], strict=True):
        assert_near(mine, theirs)
    # One key less, and it is not.
    fewer = triton_kl(indexer, q, k, lse, bounds, 1.0, everything.masked_fill(everything == 4, -1))
    with pytest.raises(AssertionError):
        assert_near(fewer[0], dense[0])


@pytest.mark.parametrize("selected", [False, True])
def test_divergence_of_inputs_in_pieces(selected):
    B, L, S, J, E, H, D = 5, 3, 6, 2, 4, 2, 8
    iq, ik = randn(B, J, E, L).permute(0, 3, 1, 2), randn(B, E, S).mT
    w, q, k = randn(1, 1, J).expand(B, L, J), randn(B, D, H, L).permute(0, 3, 2, 1), randn(B, H, S, D).transpose(1, 2)
    bounds = causal(1, L, S).expand(B, L, 2)
    # Stored with rows and places the other way round, and of the dtype that needs no conversion.
    indices = torch.rand(B, L, S).argsort(-1)[..., :4].mT.contiguous().mT.int() if selected else None
    assert indices is None or not indices.is_contiguous()
    visible = visible_BLS(bounds, S, indices)
    rows, grads = triton_kl((iq, ik, w), q, k, plain_lse(q, k, visible, 0.4), bounds, 0.4, indices)
    expected_rows, expected = plain_kl_and_gradients((iq, ik, w), q, k, visible, 0.4)
    assert_near(rows, expected_rows)
    for mine, theirs in zip(grads, expected, strict=True):
        assert_near(mine, theirs)


@pytest.mark.parametrize(("shared", "selected"), MODES)
@pytest.mark.parametrize("poison", [NAN, 1e30])
def test_hidden_values_reach_neither_divergence_nor_gradients(poison, shared, selected):
    L = 6
    bounds = packed(L, [2, 3])
    indices = torch.tensor([0, -1, 1, 2, 4]).repeat(1, L, 1) if selected else None
    indexer, q, k = kl_inputs(1, L, L, J=3, E=5, H=2, D=8, shared=shared)
    if poison == 1e30:
        # The product with a hidden key then overflows, and 0 times infinity is NaN.
        indexer[0][:, 0] = poison
    inputs = {"iq": indexer[0], "ik": indexer[1], "w": indexer[2], "q": q, "k": k}

    def run(iq, ik, w, q, k):
        # As the operator would give them: a row's is not finite if what it sees is not.
        lse = plain_lse(q, k, visible_BLS(bounds, L, indices), 0.4)
        return triton_kl((iq, ik, w), q, k, lse, bounds, 0.4, indices)

    clean_rows, (clean_diq, clean_dik, clean_dw) = run(**inputs)
    for name, tensor in inputs.items():
        poisoned = tensor.clone()
        poisoned[:, 4:] = poison
        rows, (diq, dik, dw) = run(**{**inputs, name: poisoned})
        if poison != poison:
            assert rows[0, 4].isnan(), name
            assert diq[0, 4].isnan().any(), name
            assert dik[0, 2].isnan().any(), name
        others = [0, 1, 2, 3, 5]
        for mine, clean in ((rows, clean_rows), (diq, clean_diq), (dw, clean_dw)):
            assert torch.equal(mine[:, others], clean[:, others]), name
        # Row 4 sees keys 2 to 4, and nobody key 5.
        assert torch.equal(dik[:, [0, 1, 5]], clean_dik[:, [0, 1, 5]]), name


@pytest.mark.parametrize(("shared", "selected"), MODES)
def test_runs_and_chunks_of_the_divergence(monkeypatch, shared, selected):
    L = 70
    bounds = packed(L, [66, 3])
    # A few rows only, where each is a program of its own.
    bounds[:, 3:62, 1] = bounds[:, 3:62, 0] if selected else bounds[:, 3:62, 1]
    indexer, q, k = kl_inputs(1, L, L, J=5, E=8, H=2, D=8, shared=shared)
    indices = random_selection(visible_BLS(bounds, L), 6) if selected else None
    lse = plain_lse(q, k, visible_BLS(bounds, L, indices), 1.0)
    rows, grads = triton_kl(indexer, q, k, lse, bounds, 1.0, indices)
    again, again_grads = triton_kl(indexer, q, k, lse, bounds, 1.0, indices)
    assert torch.equal(rows, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, again_grads, strict=True))
    # Chunks of one tile (of one row), and heads in two groups that are not of one size.
    monkeypatch.setattr(importlib.import_module("optimized.kernels.index_logits"), "CHUNK_BYTES", 1)
    monkeypatch.setattr(importlib.import_module("optimized.kernels.indexer_kl_dense"), "BUSY_PROGRAMS", 2)
    pieces, pieces_grads = triton_kl(indexer, q, k, lse, bounds, 1.0, indices)
    assert torch.equal(rows, pieces)
    for mine, theirs in zip(pieces_grads, grads, strict=True):
        assert_near(mine, theirs)


def test_gradients_are_only_computed_where_they_are_wanted(monkeypatch):
    indexer, q, k = kl_inputs(1, 4, 4)
    bounds, indices = causal(1, 4, 4), torch.tensor([[[0, 1, -1]] * 4])
    inputs = [x.to(DEVICE) for x in (*indexer, q, k, plain_lse(q, k, visible_BLS(bounds, 4), 1.0), bounds)]
    module = importlib.import_module("optimized.kernels.indexer_kl")
    for name in ("dense_dq", "dense_dk", "selected_gradients"):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("computed a gradient"))
    for selection in (None, indices.to(DEVICE)):
        total, _ = indexer_kl(*inputs, 1.0, selection, backend="triton")
        assert not total.requires_grad
    inputs[0].requires_grad_()
    with torch.no_grad():
        assert torch.equal(indexer_kl(*inputs, 1.0, indices.to(DEVICE), backend="triton")[0], total)
    with pytest.raises(pytest.fail.Exception):
        indexer_kl(*inputs, 1.0, backend="triton")


@pytest.mark.parametrize(("width", "shared"), [(192, False), (576, True)])
def test_dense_divergence_at_the_models_sizes(width, shared):
    L, S = 2, 150
    bounds = torch.tensor([[[0, 150], [3, 131]]])
    indexer, q, k = kl_inputs(1, L, S, torch.bfloat16, J=64, E=128, H=128, D=width, shared=shared)
    check_models_sizes(indexer, q, k, bounds, None)


def test_selected_divergence_at_the_models_sizes():
    L, S, K = 2, 2100, 2048
    bounds = torch.tensor([[[0, S], [30, 1000]]])
    indexer, q, k = kl_inputs(1, L, S, torch.bfloat16, J=64, E=128, H=128, D=576)
    check_models_sizes(indexer, q, k, bounds, random_selection(visible_BLS(bounds, S), K))


def check_models_sizes(indexer, q, k, bounds, indices):
    # Head weights as the model scales them.
    indexer = (*indexer[:2], indexer[2] * (64 * 128) ** -0.5)
    visible = visible_BLS(bounds, k.shape[1], indices)
    rows, grads = triton_kl(indexer, q, k, plain_lse(q, k, visible, 1.0), bounds, 1.0, indices)
    expected_rows, expected = plain_kl_and_gradients(indexer, q, k, visible, 1.0)
    assert_near(rows, expected_rows)
    assert_rejected(rows, expected_rows)
    for mine, theirs in zip(grads, expected, strict=True):
        assert_near(mine, theirs, rounded_to=torch.bfloat16)
        assert_rejected(mine, theirs, rounded_to=torch.bfloat16)


# --- what holds of all of them ---


def test_buffers_grow_with_the_length_and_not_with_its_square(monkeypatch):
    monkeypatch.setattr(importlib.import_module("optimized.kernels.index_logits"), "CHUNK_BYTES", 1)
    largest = {}
    for L in (256, 512):
        bounds = causal(1, L, L)
        indexer, q, k = kl_inputs(1, L, L, J=2, E=4, H=2, D=4)
        with LargestTensor() as seen:
            triton_topk(*indexer, bounds, 3)
            triton_kl(indexer, q, k, torch.zeros(1, L, 2), bounds, 1.0)
        largest[L] = seen.numel
    # The interpreter copies storages as bytes, four an element.
    assert largest[512] < 4 * 512 * 512
    assert largest[512] <= 2 * largest[256]


@pytest.mark.skipif(not interpreted(), reason="On a GPU every other test runs its tiles.")
@pytest.mark.parametrize(
    ("arch", "dtype"), [(80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float32), (100, torch.bfloat16)]
)
def test_tiles_of_gpus(monkeypatch, arch, dtype):
    """The interpreter has tiles of its own, which suit it; here it runs those that GPUs get."""
    for name in ("index_logits", "indexer_kl_dense", "indexer_kl_selected", "indexer_kl_target", "radix_topk"):
        monkeypatch.setattr(importlib.import_module(f"optimized.kernels.{name}"), "interpreted", lambda: False)
    for name in ("indexer_topk", "indexer_kl"):
        monkeypatch.setattr(importlib.import_module(f"optimized.kernels.{name}"), "architecture", lambda _: arch)
    L, S = 3, 70
    bounds = torch.tensor([[[0, 70], [33, 66], [5, 5]]])
    q, k, w = (small_integers(1, *shape, dtype=dtype) for shape in ((L, 3, 20), (S, 20), (L, 3)))
    visible = visible_BLS(bounds, S)
    assert torch.equal(triton_topk(q, k, w, bounds, 9)[0], plain_topk(plain_scores(q, k, w), visible, 9))
    for shared, selected in MODES:
        indexer, q, k = kl_inputs(1, L, S, dtype, H=2, shared=shared)
        indices = random_selection(visible, 37) if selected else None
        seen = visible_BLS(bounds, S, indices)
        rows, grads = triton_kl(indexer, q, k, plain_lse(q, k, seen, 1.0), bounds, 1.0, indices)
        expected_rows, expected = plain_kl_and_gradients(indexer, q, k, seen, 1.0)
        assert_near(rows, expected_rows)
        for mine, theirs in zip(grads, expected, strict=True):
            assert_near(mine, theirs, rounded_to=dtype)


@pytest.mark.parametrize("width", [1, 16, 20, 40, 64, 128, 192, 200, 320, 576])
def test_a_width_is_held_as_two_powers_of_two(width):
    head, tail = split_width(width)
    assert head + tail >= width
    assert all(size == 0 or (size >= 16 and size & (size - 1) == 0) for size in (head, tail))
    # Never more lanes than one block would take, and none to spare where the model's widths are split.
    assert head + tail <= max(16, 1 << (width - 1).bit_length())
    if width in (192, 320, 576):
        assert head + tail == width


def test_float64_is_refused():
    q, k, w = randn(1, 2, 1, 4, dtype=torch.float64), randn(1, 2, 4), randn(1, 2, 1)
    with pytest.raises(ValueError, match="indexer_topk was given float64"):
        triton_topk(q, k, w, causal(1, 2, 2), 1)
    with pytest.raises(ValueError, match="indexer_kl was given float64"):
        triton_kl((q, k, w), randn(1, 2, 1, 4), randn(1, 2, 4), randn(1, 2, 1), causal(1, 2, 2), 1.0)


@pytest.mark.skipif(not interpreted(), reason="Memory that is promised and not given is a matter of CPUs.")
@pytest.mark.parametrize("program", ["strides", "length"])
def test_offsets_beyond_two_to_the_31(program):
    """In a process of its own: an offset that wraps around is an access to memory that is not there."""
    command = [sys.executable, "-m", "suites.kernels.far_offsets", program]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    name, megabytes = done.stdout.split()
    assert name == program
    assert int(megabytes) < 1024
