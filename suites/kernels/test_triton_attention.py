"""Both attentions in Triton against plain formulas in fp64: values, gradients, edges, V3.2's dims.

Where there is no GPU the kernels are interpreted; they get fp32 copies of narrower inputs then, so that products and
their order are tested, and the roundings to bf16 inside are not.

Tolerances. A result in fp32 may be off by 64 epsilons times the largest value, as everywhere in this suite. Inputs of
16 bits add, element by element, what a flash kernel rounds to them: P and dS as operands, the output that Delta is
summed from, a row's share in the gradient of a key, and the result. `Oracle` sums the sizes of what is rounded.

Letters: B batch, L query rows, S key slots, H attention heads, D q/k width, V value width, K selected keys.
"""

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only.")

from optimized.kernels import dense_mla_forward, sparse_mla_backward, sparse_mla_forward
from optimized.kernels.common import interpreted
from optimized.kernels.segment_sum import scatter_rows_
from optimized.ops import dense_mla, sparse_mla
from optimized.ops.backend import implementation
from suites.kernels.plain import (
    BOUNDS,
    INF,
    NAN,
    causal,
    leaves,
    packed,
    plain_attention,
    randn,
    random_selection,
    visible_BLS,
)  # fmt: skip

DEVICE = torch.device("cpu" if interpreted() else "cuda")
NARROW = (torch.bfloat16, torch.float16)


class Oracle:
    """Attention over the keys of each row, in fp64, with its gradients and the sizes of what 16 bits round in them.

    `keys` [B, L, H, K, D] and `values` [B, L, H, K, V] are functions of leaves, with 1 for H where heads share them;
    `visible` [B, L, K].
    """

    def __init__(self, q, keys, values, visible, scale, dout, dtype):
        self.u = torch.finfo(dtype).eps / 2 if dtype in NARROW else 0.0
        hidden, empty = ~visible[:, :, None], ~visible.any(-1)[..., None, None]
        # Overwritten, not multiplied by 0: what is hidden may be anything.
        keys, values = (x.masked_fill(hidden.unsqueeze(-1), 0) for x in (keys, values))
        dout = dout.double().masked_fill(empty, 0)
        z = torch.einsum("blhd,blhkd->blhk", q, keys) * scale
        p = z.masked_fill(hidden, -INF).masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
        self.out = torch.einsum("blhk,blhkv->blhv", p, values)
        self.lse = z.masked_fill(hidden, -INF).logsumexp(-1).detach()
        self.out.backward(dout)
        self.p, keys, values = p.detach(), keys.detach(), values.detach()
        dp = torch.einsum("blhv,blhkv->blhk", dout, values)
        size = torch.einsum("blhk,blhkv->blhv", self.p, values.abs())
        of_delta = (dout.abs() * size).sum(-1, keepdim=True)
        self.ds = abs(scale) * self.p * ((dp - (self.p * dp).sum(-1, keepdim=True)).abs() + 2 * of_delta)
        self.sizes = {"out": size, "q": torch.einsum("blhk,blhkd->blhd", self.ds, keys.abs())}

    def allowed(self, name, expected):
        """[...]: how far a result may be from what is expected."""
        finite = expected[expected.isfinite()]
        largest = float(finite.abs().max()) if finite.numel() else 0.0
        return 64 * torch.finfo(torch.float32).eps * max(largest, 1e-6) + self.u * (
            self.sizes.get(name, 0.0) + expected.abs()
        )


def close(oracle, name, actual, expected):
    """Whether a result is the expected one up to rounding; where that is infinite, so must it be."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double().cpu(), expected.detach()
    infinite = expected.isinf()
    if not torch.equal(actual[infinite], expected[infinite]):
        return False
    within = (actual - expected).abs() <= oracle.allowed(name, expected)
    return bool(within[~infinite].all())


def sparse_oracle(q, kv, indices, scale, d_v, dout, dtype):
    q_, kv_ = leaves(q, kv)
    (B, S, D), (L, K) = kv.shape, indices.shape[1:]
    slots = indices.long().clamp(min=0).flatten(1).unsqueeze(-1).expand(B, L * K, D)
    keys = kv_.gather(1, slots).view(B, L, 1, K, D)
    oracle = Oracle(q_, keys, keys[..., :d_v], indices >= 0, scale, dout, dtype)
    # Twice: rounded as operands, and again as parts of a row's share.
    size = 2 * torch.einsum("blhk,blhd->blkd", oracle.ds, q_.detach().abs())
    size[..., :d_v] += 2 * torch.einsum("blhk,blhv->blkv", oracle.p, dout.double().abs().nan_to_num())
    oracle.sizes["kv"] = torch.zeros(B, S, D, dtype=torch.float64).scatter_add_(1, slots, size.flatten(1, 2))
    return oracle, {"out": oracle.out, "lse": oracle.lse, "q": q_.grad, "kv": kv_.grad}


def run_sparse(q, kv, indices, scale, d_v, dout, deterministic=True):
    """Results of the kernels, on the CPU."""
    q, kv, indices, dout = (x.detach().to(DEVICE) for x in (q, kv, indices, dout))
    q_, kv_ = q.requires_grad_(), kv.requires_grad_()
    if deterministic:
        out, lse = sparse_mla(q_, kv_, indices, scale, d_v, backend="triton")
    else:
        run = implementation("sparse_mla", "triton", DEVICE)
        out, lse = run(q_, kv_, indices, scale, d_v, deterministic=False)
    out.backward(dout)
    return {name: x.detach().cpu() for name, x in (("out", out), ("lse", lse), ("q", q_.grad), ("kv", kv_.grad))}


def check_sparse(q, kv, indices, scale, d_v, **options):
    dout = randn(*q.shape[:3], d_v, dtype=q.dtype)
    oracle, expected = sparse_oracle(q, kv, indices, scale, d_v, dout, q.dtype)
    actual = run_sparse(q, kv, indices, scale, d_v, dout, **options)
    assert (actual["out"].dtype, actual["lse"].dtype) == (q.dtype, torch.float32)
    assert (actual["q"].dtype, actual["kv"].dtype) == (q.dtype, kv.dtype)
    for name, value in expected.items():
        assert close(oracle, name, actual[name], value), name
    return oracle, expected, actual


def holes(L, K, S, where):
    """Distinct slots with -1 at one end of the rows, between them, or everywhere."""
    indices = torch.rand(L, S).argsort(-1)[:, :K].int()
    n = indices.shape[1]
    gone = {
        "nowhere": [], "front": range(n // 3 + 1), "back": range(n // 2, n), "middle": range(n // 3, n - 2),
        "everywhere": range(n),
    }[where]  # fmt: skip
    indices[:, list(gone)] = -1
    return indices.unsqueeze(0)


# B, L, S, H, D, V, K.
SHAPES = {
    "one of everything": (1, 1, 1, 1, 1, 1, 1),
    "widths padded": (2, 3, 9, 3, 48, 32, 5),
    "more batch than heads": (4, 2, 7, 1, 20, 12, 3),
    "more k than keys": (1, 2, 5, 5, 80, 64, 8),
    "no key-only columns": (1, 3, 9, 2, 12, 12, 4),
    "two value parts": (1, 2, 40, 16, 300, 270, 20),
    "two blocks of heads": (1, 2, 20, 70, 20, 12, 6),
    "few values": (1, 2, 9, 2, 40, 3, 4),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_equals_the_plain_formula(shape):
    B, L, S, H, D, V, K = SHAPES[shape]
    q, kv = randn(B, L, H, D), randn(B, S, D)
    check_sparse(q, kv, random_selection(visible_BLS(causal(B, L, S), S), K), 1 / math.sqrt(D), V)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", ["widths padded", "two value parts"])
def test_sparse_in_16_bits(shape, dtype):
    B, L, S, H, D, V, K = SHAPES[shape]
    q, kv = randn(B, L, H, D, dtype=dtype), randn(B, S, D, dtype=dtype)
    check_sparse(q, kv, random_selection(visible_BLS(causal(B, L, S), S), K), 1 / math.sqrt(D), V)


@pytest.mark.parametrize("where", ["nowhere", "front", "middle", "back", "everywhere"])
def test_sparse_with_missing_keys_anywhere(where):
    # Blocks hold 16 or 32 keys: whole blocks are missing, first, last and in between.
    L, S, K = 2, 110, 100
    check_sparse(randn(1, L, 3, 20), randn(1, S, 20), holes(L, K, S, where), -0.3, 12)


def test_sparse_with_rows_that_have_no_keys():
    indices = torch.tensor([[[-1, -1, -1], [3, -1, 1], [-1, -1, -1], [-1, 0, 3]]])
    _, _, actual = check_sparse(randn(1, 4, 3, 20), randn(1, 5, 20), indices, 0.3, 12)
    assert (actual["out"][0, [0, 2]] == 0).all()
    assert (actual["lse"][0, [0, 2]] == -INF).all()
    assert (actual["q"][0, [0, 2]] == 0).all()
    assert (actual["kv"][0, [2, 4]] == 0).all()


@pytest.mark.parametrize("shape", [(2, 3, 0), (2, 0, 4), (0, 3, 4)])
def test_sparse_without_indices_rows_or_batch(shape):
    B, L, _ = shape
    q, kv, indices = randn(B, L, 2, 20), randn(B, 5, 20), torch.zeros(shape, dtype=torch.int32)
    actual = run_sparse(q, kv, indices, 0.3, 12, randn(B, L, 2, 12))
    assert (actual["lse"] == -INF).all()
    for name in ("out", "q", "kv"):
        assert (actual[name] == 0).all()


def test_inputs_of_any_layout_and_of_two_dtypes():
    q = randn(2, 3, 4, 40).transpose(1, 2)[..., ::2]
    kv = randn(2, 20, 9, dtype=torch.bfloat16).transpose(1, 2)
    indices = torch.tensor([4, -1, 0, 8]).expand(2, 4, 4)
    assert not (q.is_contiguous() or kv.is_contiguous() or indices.is_contiguous())
    dout = randn(1, 4, 3, 1).expand(2, 4, 3, 12)
    oracle, expected = sparse_oracle(q, kv, indices, 0.3, 12, dout, torch.bfloat16)
    actual = run_sparse(q, kv, indices, 0.3, 12, dout)
    for name, value in expected.items():
        assert close(oracle, name, actual[name], value), name
    k, v, bounds = (randn(2, 3, 9, n).transpose(1, 2) for n in (20, 12)), None, causal(2, 4, 9)
    k, v = k
    check_dense(q, k, v, bounds, torch.tensor([4, -1, 0, 8]).expand(2, 4, 4))


def test_sparse_counts_a_slot_named_twice_twice():
    indices = torch.tensor([[[2, 5, 2, -1, 2], [5, 5, 0, 1, -1]]])
    _, _, twice = check_sparse(randn(1, 2, 3, 20), randn(1, 6, 20), indices, 0.3, 12)
    assert (twice["kv"][0, [3, 4]] == 0).all()


@pytest.mark.parametrize("poison", [NAN, INF, 1e30])
def test_sparse_never_reads_what_no_index_names(poison):
    B, L, S, H, D, V = 1, 4, 9, 2, 20, 12
    q, kv, dout = randn(B, L, H, D), randn(B, S, D), randn(B, L, H, V)
    # Slot 0 is what a clamped -1 would read, slot 8 what a wrapped one would.
    indices = torch.tensor([1, -1, 2, 7, -1, 4]).repeat(B, L, 1)
    indices[:, 3] = -1
    poisoned, poisoned_dout = kv.clone(), dout.clone()
    poisoned[:, [0, 3, 5, 8]] = poison
    # The gradient that arrives at a row without keys does not matter either.
    poisoned_dout[:, 3] = poison
    clean = run_sparse(q, kv, indices, 0.5, V, dout)
    for name, mine in run_sparse(q, poisoned, indices, 0.5, V, poisoned_dout).items():
        assert torch.equal(mine, clean[name]), name
    poisoned[:, 2] = poison
    seen = run_sparse(q, poisoned, indices, 0.5, V, dout)
    assert not torch.equal(seen["out"][:, :3], clean["out"][:, :3])


def test_sparse_gradients_are_the_same_bits_in_every_run_and_chunk(monkeypatch):
    L, S, H, D, V = 7, 12, 3, 20, 12
    q, kv, dout = randn(1, L, H, D), randn(1, S, D), randn(1, L, H, V)
    indices = random_selection(visible_BLS(causal(1, L, S), S), 6)
    first = run_sparse(q, kv, indices, 0.3, V, dout)
    monkeypatch.setattr(sparse_mla_backward, "MAX_CHUNK_ROWS", 3)
    for name, again in run_sparse(q, kv, indices, 0.3, V, dout).items():
        assert torch.equal(again, first[name]), name
    # In another order of rows, which is what atomics may take, bits do differ.
    order = torch.arange(L).flip(0)
    turned = run_sparse(q[:, order], kv, indices[:, order], 0.3, V, dout[:, order])
    assert torch.equal(turned["q"], first["q"][:, order])
    assert not torch.equal(turned["kv"], first["kv"])


def test_sparse_with_atomics_agrees_to_rounding():
    indices = torch.tensor([[[2, 5, 2, -1], [5, 4, 0, 1], [-1, -1, -1, -1]]])
    check_sparse(randn(1, 3, 3, 48), randn(1, 6, 48), indices, 0.3, 32, deterministic=False)


@pytest.mark.parametrize("wanted", ["q", "kv"])
def test_sparse_gradient_of_one_input_alone(wanted):
    q, kv, dout = randn(1, 3, 2, 20).to(DEVICE), randn(1, 6, 20).to(DEVICE), randn(1, 3, 2, 12).to(DEVICE)
    indices = random_selection(visible_BLS(causal(1, 3, 6), 6), 4).to(DEVICE)
    both = run_sparse(q, kv, indices, 0.3, 12, dout)
    inputs = {"q": q.detach(), "kv": kv.detach()}
    leaf = inputs[wanted] = inputs[wanted].clone().requires_grad_()
    inputs = {name: x if name == wanted else x.clone().requires_grad_(False) for name, x in inputs.items()}
    sparse_mla(inputs["q"], inputs["kv"], indices, 0.3, 12, backend="triton")[0].backward(dout)
    assert torch.equal(leaf.grad.cpu(), both[wanted])


def test_sparse_at_the_dimensions_of_v32():
    B, L, S, H, D, V, K = 1, 2, 2100, 128, 576, 512, 2048
    q, kv = randn(B, L, H, D, dtype=torch.bfloat16), randn(B, S, D, dtype=torch.bfloat16)
    indices = random_selection(visible_BLS(causal(B, L, S), S), K)
    indices[0, 1, 300:] = -1
    indices[0, 1, 40:80] = -1
    check_sparse(q, kv, indices, 0.1, V)


def faults(q, kv, indices, scale, d_v, dout):
    """Results of kernels that are wrong in one way each."""

    def of(q=q, kv=kv, indices=indices, scale=scale, dout=dout):
        return sparse_oracle(q, kv, indices, scale, d_v, dout, q.dtype)[1]

    yield "-1 reads slot 0", of(indices=indices.clamp(min=0))
    yield "the last key is left out", of(indices=torch.cat((indices[..., :-1], -torch.ones_like(indices[..., :1])), -1))
    yield "another scale", of(scale=scale * 1.01)
    yield "the next row's keys", of(indices=indices.roll(1, 1))
    right = of()
    yield "base 2", {**right, "lse": right["lse"] / math.log(2)}
    yield "no share of the values", {**right, "kv": of(dout=torch.zeros_like(dout))["kv"]}
    yield "no scale in dq", {**right, "q": right["q"] / scale}
    yield "key-only columns are left out", {**right, "kv": right["kv"] * (torch.arange(kv.shape[-1]) < d_v)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_wrong_is_rejected(dtype):
    q, kv, dout = randn(1, 4, 3, 20, dtype=dtype), randn(1, 9, 20, dtype=dtype), randn(1, 4, 3, 12, dtype=dtype)
    indices = random_selection(visible_BLS(causal(1, 4, 9), 9), 5)
    indices[:, :, 1] = -1
    oracle, expected = sparse_oracle(q, kv, indices, 0.3, 12, dout, dtype)
    for fault, wrong in faults(q, kv, indices, 0.3, 12, dout):
        # 1 % of a scale is what 16 bits cannot tell.
        if fault != "another scale" or dtype == torch.float32:
            assert not all(close(oracle, name, wrong[name], value) for name, value in expected.items()), fault


# Dense


def check_dense(q, k, v, bounds, indices=None, scale=0.3):
    dtype = q.dtype
    dout = randn(*q.shape[:3], v.shape[-1], dtype=dtype)
    B, L, S, H = q.shape[0], q.shape[1], k.shape[1], q.shape[2]
    q_, k_, v_ = leaves(q, k, v)
    keys, values = (x.transpose(1, 2).unsqueeze(1).expand(B, L, H, S, x.shape[-1]) for x in (k_, v_))
    oracle = Oracle(q_, keys, values, visible_BLS(bounds, S, indices), scale, dout, dtype)
    oracle.sizes["k"] = torch.einsum("blhk,blhd->bkhd", oracle.ds, q_.detach().abs())
    oracle.sizes["v"] = torch.einsum("blhk,blhv->bkhv", oracle.p, dout.double().abs())
    expected = {"out": oracle.out, "lse": oracle.lse, "q": q_.grad, "k": k_.grad, "v": v_.grad}
    actual = run_dense(q, k, v, bounds, indices, dout, scale)
    for name, value in expected.items():
        assert close(oracle, name, actual[name], value), name
        if name != "lse":
            assert actual[name].dtype == dtype
    return oracle, expected, actual


def run_dense(q, k, v, bounds, indices, dout, scale=0.3):
    q, k, v, bounds, dout = (x.detach().to(DEVICE) for x in (q, k, v, bounds, dout))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, lse = dense_mla(q, k, v, bounds, scale, None if indices is None else indices.to(DEVICE), backend="triton")
    out.backward(dout)
    results = {"out": out, "lse": lse, "q": q.grad, "k": k.grad, "v": v.grad}
    return {name: x.detach().cpu() for name, x in results.items()}


def dense_inputs(B, L, S, H, D, V, dtype=torch.float32):
    return randn(B, L, H, D, dtype=dtype), randn(B, S, H, D, dtype=dtype), randn(B, S, H, V, dtype=dtype)


GEOMETRIES = {name: BOUNDS[name] for name in ("causal", "one row", "offset", "no keys", "nothing at all")}
# Several tiles of rows and keys, documents that begin and end within them, rows without keys at the end.
GEOMETRIES["packed"] = (1, 75, 75, packed(75, [1, 40, 20, 12]))


@pytest.mark.parametrize("selected", [False, True], ids=["bounds", "selected"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_dense_equals_the_plain_formula(geometry, selected):
    B, L, S, bounds = GEOMETRIES[geometry]
    q, k, v = dense_inputs(B, L, S, 2, 12, 8)
    # The selection is made without the bounds, which then restrict it.
    check_dense(q, k, v, bounds, random_selection(torch.rand(B, L, S) < 0.8, 6) if selected else None)


@pytest.mark.parametrize(
    ("H", "D", "V"), [(1, 1, 1), (3, 48, 32), (5, 80, 20), (1, 300, 16), (2, 16, 270)], ids=lambda n: str(n)
)
def test_dense_with_any_heads_and_widths(H, D, V):
    q, k, v = dense_inputs(1, 5, 40, H, D, V)
    check_dense(q, k, v, causal(1, 5, 40), scale=1 / math.sqrt(D))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("selected", [False, True], ids=["bounds", "selected"])
def test_dense_in_16_bits_at_the_widths_of_v32(dtype, selected):
    # Tiles of 128 rows and of 64 or 128 keys.
    B, L, S, H = 1, 140, 150, 2
    q, k, v = dense_inputs(B, L, S, H, 192, 128, dtype)
    indices = random_selection(visible_BLS(causal(B, L, S), S), 40) if selected else None
    check_dense(q, k, v, causal(B, L, S), indices, 0.07)


def test_dense_takes_a_slot_named_twice_once():
    q, k, v = dense_inputs(1, 3, 6, 2, 12, 8)
    check_dense(q, k, v, causal(1, 3, 6), torch.tensor([[[2, 0, 2, -1, 2], [1, 1, 0, 3, -1], [5, 5, 5, 5, 5]]]))


def test_dense_rejects_what_is_wrong():
    q, k, v = dense_inputs(1, 6, 9, 2, 12, 8)
    indices = random_selection(torch.rand(1, 6, 9) < 0.8, 6)
    oracle, expected, _ = check_dense(q, k, v, causal(1, 6, 9), indices)
    wider = causal(1, 6, 9) + torch.tensor([0, 1])
    wider[..., 1].clamp_(max=9)
    for bounds, chosen, scale in (
        (wider, indices, 0.3),
        (causal(1, 6, 9), None, 0.3),
        (causal(1, 6, 9), indices.roll(1, 1), 0.3),
        (causal(1, 6, 9), indices, 0.303),
    ):
        wrong = plain_attention(q.double(), k.double(), v.double(), visible_BLS(bounds, 9, chosen), scale)[0]
        assert not close(oracle, "out", wrong, expected["out"])
    for name in ("q", "k", "v"):
        assert not close(oracle, name, expected[name].roll(1, 1), expected[name])


@pytest.mark.parametrize("poison", [NAN, INF, 1e30])
@pytest.mark.parametrize("selected", [False, True], ids=["bounds", "selected"])
def test_dense_keeps_hidden_values_hidden(poison, selected):
    B, L, S, H, D, V = 1, 6, 6, 2, 20, 12
    bounds = packed(6, [2, 3]).expand(B, L, 2)
    indices = torch.tensor([0, -1, 1, 2, 4]).repeat(B, L, 1) if selected else None
    inputs = dict(zip("qkv", dense_inputs(B, L, S, H, D, V), strict=True)) | {"dout": randn(B, L, H, V)}
    clean = run_dense(bounds=bounds, indices=indices, **inputs)
    # Documents are rows and keys 0 to 1 and 2 to 4, row 5 has no keys: only row 4 may see key 4.
    for name in inputs:
        poisoned = {other: x.clone() for other, x in inputs.items()}
        poisoned[name][:, 4:] = poison
        mine = run_dense(bounds=bounds, indices=indices, **poisoned)
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


@pytest.mark.parametrize("dtype", NARROW)
def test_dense_keeps_hidden_values_hidden_in_the_tiles_of_16_bits(dtype):
    # The guarded form of the kernels has tiles of its own there, so that equal bits are not asked for.
    L = 100
    q, k, v = dense_inputs(1, L, L, 1, 20, 12, dtype)
    dout = randn(1, L, 1, 12, dtype=dtype)
    clean = run_dense(q, k, v, causal(1, L, L), None, dout)
    for x in (q, k, v, dout):
        x[:, 70] = NAN
    mine = run_dense(q, k, v, causal(1, L, L), None, dout)
    for name in ("out", "lse", "q"):
        torch.testing.assert_close(mine[name][:, :70], clean[name][:, :70], atol=1e-5, rtol=torch.finfo(dtype).eps)
        assert mine[name][:, 70:].isnan().all()
    for name in ("k", "v"):
        assert mine[name][:, :71].isnan().all(), name


def test_a_visible_nan_in_a_value_reaches_its_readers_only():
    q, k, v = dense_inputs(1, 5, 5, 2, 20, 12)
    v[0, 2, 1, 0] = NAN
    out = run_dense(q, k, v, causal(1, 5, 5), None, randn(1, 5, 2, 12))["out"]
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[0, 2:, 1] = True
    assert torch.equal(out.isnan(), expected)


def test_masked_and_gathered_attention_agree():
    B, L, H, D, V = 2, 5, 3, 20, 12
    q, kv, dout = randn(B, L, H, D), randn(B, L, D), randn(B, L, H, V)
    indices = random_selection(visible_BLS(causal(B, L, L), L), 5)
    k = kv.unsqueeze(2).expand(B, L, H, D)
    masked = run_dense(q, k, k[..., :V], causal(B, L, L), indices, dout)
    sparse = run_sparse(q, kv, indices, 0.3, V, dout)
    masked["kv"] = masked["k"].sum(2)
    masked["kv"][..., :V] += masked["v"].sum(2)
    for name, mine in sparse.items():
        torch.testing.assert_close(mine, masked[name], atol=1e-5, rtol=1e-5)


def test_dense_gradients_are_the_same_bits_in_every_run():
    q, k, v = dense_inputs(1, 40, 40, 2, 20, 12)
    dout = randn(1, 40, 2, 12)
    first = run_dense(q, k, v, causal(1, 40, 40), None, dout)
    for name, again in run_dense(q, k, v, causal(1, 40, 40), None, dout).items():
        assert torch.equal(again, first[name]), name


@pytest.mark.parametrize("S", [1, 32, 33, 200])
def test_selections_become_bits(S):
    indices = random_selection(torch.rand(2, 3, S) < 0.5, 70)
    bits = dense_mla_forward.selection_bits(indices.to(DEVICE), S).cpu()
    slots = torch.arange(S)
    found = (bits[..., slots // 32] >> (slots % 32)) & 1
    assert torch.equal(found == 1, visible_BLS(torch.tensor([0, S]).expand(2, 3, 2), S, indices))
    assert bits.shape[2] * 32 >= S


def test_the_range_of_a_tile_leaves_rows_without_keys_out():
    bounds = torch.tensor([[[9, 9], [3, 5], [4, 8], [0, 0], [0, 0], [2, 3], [1, 1]]])
    ranges = dense_mla_forward.tile_ranges(bounds, 10, 3)
    assert ranges.tolist() == [[[3, 8], [2, 3], [10, 0]]]


# What both share


def test_fp64_is_refused():
    q, kv, indices = randn(1, 1, 1, 4, dtype=torch.float64), randn(1, 2, 4), torch.zeros(1, 1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="float64.*backend='torch'"):
        sparse_mla(q.to(DEVICE), kv.to(DEVICE), indices.to(DEVICE), 1.0, 4, backend="triton")


def add_one_by_one(target, indices, partial):
    total = target.clone()
    for c in range(indices.shape[0]):
        for slot, share in zip(indices[c].tolist(), partial[c], strict=True):
            if slot >= 0:
                total[slot] += share.float()
    return total


# C, K, S, X: words of 32 rows full and begun, one of everything, columns beyond a block.
@pytest.mark.parametrize("sizes", [(5, 4, 20, 12), (64, 3, 9, 130), (33, 1, 1, 1), (1, 3, 40, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shares_are_added_in_ascending_row(sizes, dtype):
    C, K, S, X = sizes
    indices = torch.rand(C, S).argsort(1)[:, :K].int()
    indices[torch.rand(indices.shape) < 0.2] = -1
    partial = randn(*indices.shape, X, dtype=dtype if DEVICE.type == "cuda" else torch.float32)
    partial[indices < 0] = NAN
    target = randn(S, X)
    summed = target.clone().to(DEVICE)
    scatter_rows_(summed, indices.to(DEVICE), partial.to(DEVICE))
    assert torch.equal(summed.cpu(), add_one_by_one(target, indices, partial))
    backwards = add_one_by_one(target, indices.flip(0), partial.flip(0))
    assert C == 1 or not torch.equal(summed.cpu(), backwards)


def test_a_slot_named_twice_gets_its_share_twice():
    indices = torch.tensor([[1, 0, 1, 1], [2, 2, -1, 0]], dtype=torch.int32)
    partial = torch.arange(6.0).reshape(2, 3, 1)[torch.arange(2)[:, None], indices.clamp(min=0).long()]
    summed = torch.zeros(4, 1, device=DEVICE)
    scatter_rows_(summed, indices.to(DEVICE), partial.to(DEVICE))
    assert summed.flatten().tolist() == [0 + 3, 3 * 1, 2 * 5, 0]


def test_a_chunk_is_bounded_in_memory_and_never_empty():
    rows = sparse_mla_backward.chunk_rows(131_072, 128, 576, 2048, 2, True)
    assert rows == 512
    assert sparse_mla_backward.chunk_rows(131_072, 128, 576, 16_384, 2, True) * 16_384 * 832 * 2 <= 2 * 2**30
    assert sparse_mla_backward.chunk_rows(131_072, 128, 576, 2**24, 2, True) == 1
    assert sparse_mla_backward.chunk_rows(7, 128, 576, 2048, 2, True) == 7


@pytest.mark.parametrize(
    ("D", "V", "cut"), [(576, 512, (256, True, 64)), (48, 32, (32, False, 16)), (12, 12, (16, False, 0))]
)
def test_latents_are_cut_into_powers_of_two(D, V, cut):
    assert sparse_mla_forward.parts(D, V) == cut
