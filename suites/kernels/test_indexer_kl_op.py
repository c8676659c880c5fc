"""The KL operator against the dense formula, and what holds of all operators: repeatability, memory, errors.

Letters: B batch, L query rows, S key slots, H attention heads, D q/k width, V value width, J indexer heads,
E indexer head dim, K selected keys.
"""

import importlib
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from optimized.ops import backend, dense_mla, indexer_kl, indexer_topk, sparse_mla
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
    plain_kl,
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
        ("backend", "vulkan", f"'vulkan'.*{operator.__name__} has implementations: native, torch, triton")
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
    assert backend.resolve_backend("sparse_mla", None, torch.device("cuda")) == "triton"
    assert backend.resolve_backend("sparse_mla", None, torch.device("meta")) == "torch"
