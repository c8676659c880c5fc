"""The native operators against the torch implementation in fp64 and against plain formulas; and how they are built.

Letters: B batch, L query rows, S key slots, H attention heads, D q/k width, V value width, J indexer heads,
E indexer head dim, K selected keys.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from optimized.native import build
from optimized.ops import dense_mla, indexer_kl, indexer_topk, sparse_mla
from suites.kernels.plain import (
    BOUNDS,
    INF,
    NAN,
    assert_near,
    causal,
    packed,
    plain_scores,
    plain_topk,
    randn,
    random_selection,
    visible_BLS,
)  # fmt: skip

NARROW = [torch.float32, torch.bfloat16, torch.float16]
# H, D, V: folded heads, whole vectors of heads, a vector and a bit; widths that are whole vectors and not.
WIDTHS = [(8, 80, 64), (3, 13, 5), (1, 1, 1), (16, 48, 32), (21, 100, 75), (130, 33, 17)]


@pytest.fixture
def built():
    reason = build.why_unusable()
    if reason is not None:
        pytest.skip(f"The native operators cannot be built: {reason}.")


needs_library = pytest.mark.usefixtures("built")


@pytest.fixture
def threads():
    """Sets the number of threads; it is put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=list(BOUNDS))
def geometry(request):
    return BOUNDS[request.param]


def with_gradients(operator, leaves, arguments, backend):
    """The outputs of `operator(*leaves, *arguments)` and the gradients of a fixed function of the first of them."""
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in leaves]
    first, second = operator(*leaves, *arguments, backend=backend)
    wanted = [x for x in leaves if x.requires_grad]
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(first.shape, generator=generator, dtype=torch.float64).to(first.dtype)
    return first, second, *torch.autograd.grad(first, wanted, weight)


def in_fp64(tensors):
    return [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in tensors]


def assert_agrees(operator, leaves, arguments, *, factor=64):
    """Outputs and gradients are those of the torch implementation in fp64, up to rounding."""
    got = with_gradients(operator, leaves, arguments, "native")
    arguments = [in_fp64([x])[0] if isinstance(x, torch.Tensor) else x for x in arguments]
    expected = with_gradients(operator, in_fp64(leaves), arguments, "torch")
    for actual, right in zip(got, expected, strict=True):
        assert_near(actual, right, rounded_to=actual.dtype, factor=factor)
    return got, expected


def sparse_case(B, L, S, H, D, V, K, *, dtype=torch.float32, bounds=None):
    visible = visible_BLS(causal(B, L, S) if bounds is None else bounds, S)
    q, kv = randn(B, L, H, D, dtype=dtype, grad=True), randn(B, S, D, dtype=dtype, grad=True)
    indices = random_selection(visible, K)
    indices[torch.rand(indices.shape) < 0.1] = -1
    return [q, kv], [indices, D**-0.5, V]


def dense_case(B, L, S, H, D, V, bounds, *, dtype=torch.float32, K=None):
    q, k, v = (randn(*shape, dtype=dtype, grad=True) for shape in ((B, L, H, D), (B, S, H, D), (B, S, H, V)))
    indices = None if K is None else random_selection(visible_BLS(bounds, S), K)
    return [q, k, v], [bounds, D**-0.5, indices]


def kl_case(B, L, S, J, E, H, D, bounds, *, heads, K=None, dtype=torch.float32):
    """Per-head keys or shared ones, all visible keys or K selected ones."""
    iq, ik, w = (randn(*shape, dtype=dtype, grad=True) for shape in ((B, L, J, E), (B, S, E), (B, L, J)))
    q, k = randn(B, L, H, D, dtype=dtype), randn(B, S, *([H] if heads else []), D, dtype=dtype)
    k_BSHD = k if heads else k.unsqueeze(2).expand(B, S, H, D)
    indices = None if K is None else random_selection(visible_BLS(bounds, S), K)
    _, lse = dense_mla(q.double(), k_BSHD.double(), k_BSHD.double(), bounds, D**-0.5, indices, backend="torch")
    return [iq, ik, w], [q, k, lse.float(), bounds, D**-0.5, indices]


# Selection.


@needs_library
@pytest.mark.parametrize("dtype", NARROW)
def test_topk_selects_what_a_stable_sort_selects(geometry, dtype):
    B, L, S, bounds = geometry
    # Small whole numbers make every score exact in every dtype, and many of them equal.
    q, k, w = (torch.randint(-2, 3, shape).to(dtype) for shape in ((B, L, 3, 4), (B, S, 4), (B, L, 3)))
    visible = visible_BLS(bounds, S)
    scores = plain_scores(q, k, w)
    for budget in (1, 4, 16, S, S + 5):
        indices, lse = indexer_topk(q, k, w, bounds, budget, backend="native")
        assert indices.dtype == torch.int32
        assert lse.dtype == torch.float32
        assert torch.equal(indices, plain_topk(scores, visible, budget))
        assert_near(lse, scores.masked_fill(~visible, -INF).logsumexp(-1))


def select(scores, k, start=0):
    """What the operator selects of one row with these scores: w = (1, -1) undoes relu on x and -x."""
    q, w = torch.tensor([[[[1.0], [-1.0]]]]), torch.tensor([[[1.0, -1.0]]])
    bounds = torch.tensor([[[start, scores.numel()]]])
    return indexer_topk(q, scores.reshape(1, -1, 1), w, bounds, k, backend="native")


LONG = 9000
LONG_ROWS = {
    "noise": lambda: torch.randn(LONG),
    "rising": lambda: torch.arange(LONG).float() - 4000,
    "falling": lambda: 4000 - torch.arange(LONG).float(),
    "all equal": lambda: torch.full((LONG,), -0.0),
    "few values": lambda: torch.randint(-1, 2, (LONG,)).float(),
    "zeros of both signs": lambda: torch.where(torch.rand(LONG) < 0.5, -0.0, 0.0),
    "all infinities": lambda: torch.where(torch.rand(LONG) < 0.5, INF, -INF),
    "many NaN": lambda: torch.where(torch.rand(LONG) < 0.2, NAN, torch.randn(LONG)),
    "one NaN": lambda: torch.randn(LONG).index_fill(0, torch.tensor([8000]), NAN),
    "wide range": lambda: torch.randn(LONG) * torch.logspace(-44, 37, LONG)[torch.randperm(LONG)],
}


@needs_library
@pytest.mark.parametrize("name", list(LONG_ROWS))
def test_topk_searches_long_rows_exactly(name):
    scores = LONG_ROWS[name]()
    for k, start in ((1, 0), (256, 3), (1500, 100), (LONG - 101, 100), (LONG, 0)):
        indices, _ = select(scores, k, start)
        visible = (torch.arange(LONG) >= start).view(1, 1, -1)
        expected = plain_topk(scores.view(1, 1, -1), visible, k)
        assert torch.equal(indices, expected)
    # The comparison sees a single wrong slot.
    assert not torch.equal(indices, expected.index_fill(2, torch.tensor([0]), 1))


@needs_library
@pytest.mark.parametrize("n_visible", [1, 7, 8, 9])
def test_topk_around_k_visible_keys(n_visible):
    scores = torch.randn(20)
    bounds = torch.tensor([[[5, 5 + n_visible]]])
    q, w = torch.tensor([[[[1.0], [-1.0]]]]), torch.tensor([[[1.0, -1.0]]])
    indices, lse = indexer_topk(q, scores.view(1, -1, 1), w, bounds, 8, backend="native")
    assert torch.equal(indices, plain_topk(scores.view(1, 1, -1), visible_BLS(bounds, 20), 8))
    assert_near(lse, scores[5 : 5 + n_visible].double().logsumexp(0).view(1, 1))


@needs_library
@pytest.mark.parametrize("special", [NAN, INF, -INF])
def test_lse_of_scores_that_are_not_finite(special):
    for scores in (torch.tensor([1.0, special, 2.0]), torch.full((40,), special)):
        _, lse = select(scores, 2)
        torch.testing.assert_close(lse, scores.logsumexp(0).view(1, 1), equal_nan=True)


@needs_library
def test_scores_of_wide_indexers():
    B, L, S, J, E = 1, 20, 300, 64, 128
    q, k, w = randn(B, L, J, E), randn(B, S, E), randn(B, L, J)
    bounds = causal(B, L, S)
    scores = plain_scores(q, k, w)
    indices, lse = indexer_topk(q, k, w, bounds, 40, backend="native")
    assert torch.equal(indices, plain_topk(scores, visible_BLS(bounds, S), 40))
    assert_near(lse, scores.masked_fill(~visible_BLS(bounds, S), -INF).logsumexp(-1))


# Attention and the indexer's loss.


@needs_library
@pytest.mark.parametrize(("H", "D", "V"), WIDTHS)
@pytest.mark.parametrize("K", [1, 7, 150])
def test_sparse_attention_and_its_gradients(H, D, V, K):
    leaves, arguments = sparse_case(2, 9, 180, H, D, V, K)
    assert_agrees(sparse_mla, leaves, arguments)


@needs_library
def test_sparse_attention_of_every_geometry(geometry):
    B, L, S, bounds = geometry
    leaves, arguments = sparse_case(B, L, S, 8, 24, 16, 12, bounds=bounds)
    (out, lse, dq, _), _ = assert_agrees(sparse_mla, leaves, arguments)
    empty = (arguments[0] < 0).all(-1)
    assert (out[empty] == 0).all()
    assert (lse[empty] == -INF).all()
    assert (dq[empty] == 0).all()


@needs_library
@pytest.mark.parametrize(("H", "D", "V"), WIDTHS)
@pytest.mark.parametrize("K", [None, 20])
def test_dense_attention_and_its_gradients(H, D, V, K):
    leaves, arguments = dense_case(1, 70, 90, H, D, V, causal(1, 70, 90), K=K)
    assert_agrees(dense_mla, leaves, arguments)


@needs_library
@pytest.mark.parametrize("K", [None, 6])
def test_dense_attention_of_every_geometry(geometry, K):
    B, L, S, bounds = geometry
    leaves, arguments = dense_case(B, L, S, 2, 24, 16, bounds, K=K)
    (out, lse, dq, *_), _ = assert_agrees(dense_mla, leaves, arguments)
    empty = bounds[..., 0] == bounds[..., 1]
    assert (out[empty] == 0).all()
    assert (lse[empty] == -INF).all()
    assert (dq[empty] == 0).all()


KINDS = {"dense": (True, None), "dense shared": (False, None), "masked": (True, 12), "selected": (False, 12)}


@needs_library
@pytest.mark.parametrize("kind", list(KINDS))
def test_divergence_of_every_geometry(geometry, kind):
    B, L, S, bounds = geometry
    heads, K = KINDS[kind]
    leaves, arguments = kl_case(B, L, S, 4, 16, 8, 24, bounds, heads=heads, K=K)
    assert_agrees(indexer_kl, leaves, arguments, factor=256)


@needs_library
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(("J", "E", "H", "D"), [(1, 1, 1, 1), (3, 13, 5, 17), (20, 32, 21, 48), (64, 128, 8, 80)])
def test_divergence_of_every_width(kind, J, E, H, D):
    heads, K = KINDS[kind]
    leaves, arguments = kl_case(2, 9, 100, J, E, H, D, causal(2, 9, 100), heads=heads, K=K)
    # Gradients of w sum many terms of either sign.
    assert_agrees(indexer_kl, leaves, arguments, factor=512)


# No two axes have the same size, so that a tensor's shape says what its axes are.
CASES = {
    "sparse_mla": lambda dtype: (sparse_mla, *sparse_case(2, 70, 90, 8, 40, 32, 30, dtype=dtype)),
    "dense_mla": lambda dtype: (dense_mla, *dense_case(2, 150, 160, 3, 40, 32, causal(2, 150, 160), dtype=dtype)),
    "masked dense_mla": lambda dtype: (
        dense_mla, *dense_case(1, 150, 160, 3, 40, 32, packed(150, [1, 90, 50]), dtype=dtype, K=20)
    ),
    "indexer_kl": lambda dtype: (
        indexer_kl, *kl_case(2, 150, 160, 4, 16, 8, 40, causal(2, 150, 160), heads=True, dtype=dtype)
    ),
    "selected indexer_kl": lambda dtype: (
        indexer_kl, *kl_case(2, 70, 90, 4, 16, 8, 40, causal(2, 70, 90), heads=False, K=30, dtype=dtype)
    ),
}  # fmt: skip


@pytest.fixture(params=list(CASES))
def case(request):
    return CASES[request.param]


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_fp32(case, dtype):
    operator, leaves, arguments = case(dtype)
    got, _ = assert_agrees(operator, leaves, arguments, factor=256)
    assert got[1].dtype == torch.float32
    assert all(gradient.dtype == dtype for gradient in got[2:])


@needs_library
def test_fp64_is_the_torch_implementation(case):
    operator, leaves, arguments = case(torch.float64)
    native, plain = (with_gradients(operator, leaves, arguments, backend) for backend in ("native", "torch"))
    assert all(torch.equal(a, b) for a, b in zip(native, plain, strict=True))


@needs_library
def test_results_repeat_bit_by_bit_with_any_number_of_threads(case, threads):
    operator, leaves, arguments = case(torch.float32)
    results = []
    for count in (1, 1, 2, 3, 7):
        threads(count)
        results.append(with_gradients(operator, leaves, arguments, "native"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_library
def test_selection_repeats_bit_by_bit_with_any_number_of_threads(threads):
    q, k, w = randn(2, 90, 4, 32), randn(2, 700, 32), randn(2, 90, 4)
    results = []
    for count in (1, 1, 2, 5):
        threads(count)
        results.append(indexer_topk(q, k, w, causal(2, 90, 700), 64, backend="native"))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@needs_library
def test_inputs_need_not_be_contiguous(case):
    operator, leaves, arguments = case(torch.float32)

    def scattered(x):
        # Every second element of a tensor with its last two axes swapped.
        spaced = torch.stack([x.detach(), torch.full_like(x, -1)], -1).transpose(-3, -2).contiguous()
        return spaced.transpose(-3, -2)[..., 0].requires_grad_(x.requires_grad)

    spread = [scattered(x) for x in leaves]
    spread_arguments = [scattered(x) if isinstance(x, torch.Tensor) and x.ndim > 2 else x for x in arguments]
    assert not any(x.is_contiguous() for x in spread)
    for a, b in zip(
        operator(*leaves, *arguments, backend="native"),
        operator(*spread, *spread_arguments, backend="native"),
        strict=True,
    ):
        assert torch.equal(a, b)


@needs_library
def test_only_the_gradients_that_are_needed_are_computed(case):
    operator, leaves, arguments = case(torch.float32)
    everything = with_gradients(operator, leaves, arguments, "native")[2:]
    for needed, expected in enumerate(everything):
        some = [x.detach().requires_grad_(i == needed) for i, x in enumerate(leaves)]
        assert torch.equal(with_gradients(operator, some, arguments, "native")[2], expected)


@needs_library
def test_lse_has_no_gradient_and_the_gradient_none_of_its_own(case):
    operator, leaves, arguments = case(torch.float32)
    first, second = operator(*leaves, *arguments, backend="native")
    assert not second.requires_grad
    (gradient,) = torch.autograd.grad(first.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        gradient.sum().backward()


@needs_library
@pytest.mark.parametrize("poison", [NAN, INF, 1e30])
def test_keys_that_a_row_may_not_see_do_not_reach_it(case, poison):
    operator, leaves, arguments = case(torch.float32)
    S = leaves[1].shape[1]
    last = S - 1

    def without(x):
        if not isinstance(x, torch.Tensor) or x.is_floating_point():
            return x
        # Bounds end before the last key, and of a selection it is dropped.
        return x.clamp(max=last) if x.shape[-1] == 2 else x.where(x != last, -1)

    arguments = [without(x) for x in arguments]
    clean = with_gradients(operator, leaves, arguments, "native")

    def poisoned(x):
        if not isinstance(x, torch.Tensor) or x.shape[1] != S:
            return x
        return x.detach().index_fill(1, torch.tensor([last]), poison).requires_grad_(x.requires_grad)

    got = with_gradients(operator, [poisoned(x) for x in leaves], [poisoned(x) for x in arguments], "native")
    for a, b in zip(clean, got, strict=True):
        # The torch implementation, which the loss over a range takes where not all is finite, rounds in another way.
        assert_near(b, a)
        assert torch.equal(a, b) or (operator is indexer_kl and poison != 1e30)


@needs_library
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_values_that_are_not_finite_are_seen_by_those_who_see_them(case, value):
    operator, leaves, arguments = case(torch.float32)
    poisoned = [x.detach().clone().requires_grad_() for x in leaves]
    with torch.no_grad():
        poisoned[0][0, 60, 0, 1] = value
        poisoned[1][0, 5] = value
    native, plain = (with_gradients(operator, poisoned, arguments, backend) for backend in ("native", "torch"))
    for a, b in zip(native, plain, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
    assert native[1][0].isnan().any()
    assert not native[1][1:].isnan().any()


@needs_library
def test_a_slot_given_twice_counts_twice():
    q, kv = randn(1, 1, 8, 16, grad=True), randn(1, 9, 16, grad=True)
    assert_agrees(sparse_mla, [q, kv], [torch.tensor([[[3, -1, 5, 3, 3, -1]]]), 0.5, 16])


@needs_library
def test_nothing_to_attend_to():
    q, kv = randn(1, 4, 8, 16, grad=True), randn(1, 9, 16, grad=True)
    for indices in (torch.full((1, 4, 3), -1), torch.empty(1, 4, 0, dtype=torch.int64)):
        out, lse, dq, dkv = with_gradients(sparse_mla, [q, kv], [indices, 0.5, 16], "native")
        assert (lse == -INF).all()
        assert not any(x.any() for x in (out, dq, dkv))


@needs_library
def test_a_wrong_gradient_is_rejected():
    leaves, arguments = sparse_case(1, 9, 40, 8, 24, 16, 12)
    (_, _, dq, _), (_, _, expected, _) = assert_agrees(sparse_mla, leaves, arguments)
    wrong = dq.clone()
    wrong[0, 4, 3, 7] += 1e-4 * dq.abs().max()
    with pytest.raises(AssertionError):
        assert_near(wrong, expected)


# Elementary functions.


@needs_library
def test_exp_and_log_are_right_to_two_units_in_the_last_place():
    x = torch.linspace(-87.3, 88.7, 2**20)
    y = torch.empty_like(x)
    build.call("exp_of", x, x.numel(), y)
    right = x.double().exp()
    assert ((y.double() - right).abs() / right).max() < 2 * torch.finfo(torch.float32).eps
    z = torch.logspace(-37.9, 38.5, 2**20)
    build.call("log_of", z, z.numel(), y)
    right = z.double().log()
    assert ((y.double() - right).abs() / right.abs().clamp(min=1e-30)).max() < 2 * torch.finfo(torch.float32).eps


@needs_library
def test_exp_at_its_ends():
    x = torch.tensor(
        [-INF, -1e30, -104.0, -88.0, -0.0, 0.0, 88.0, 89.0, 1e30, INF, NAN, -NAN, 1.0, -1.0, 1e-30, -1e-30]
    )
    y = torch.empty_like(x)
    build.call("exp_of", x, 16, y)
    # Numbers too small to be normal come out as 0.
    expected = x.exp().where(x >= -87.3, 0.0).where(~x.isnan(), NAN)
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=2e-7, atol=0)


# Building.

TINY = '#define VALUE {}\nextern "C" __attribute__((visibility("default"))) int answer() {{ return VALUE; }}\n'


@pytest.fixture
def tiny(tmp_path, monkeypatch, built):
    """A build of one small source with an empty cache; returns the source and the cache directory."""
    source = tmp_path / "tiny.cpp"
    source.write_text(TINY.format(42))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "SOURCES", [source])
    monkeypatch.setattr(build, "HEADERS", [])
    return source, tmp_path / "cache" / "deepseek-v32-verify"


def build_library():
    return build.library.__wrapped__()


def test_a_library_is_built_once_and_found_again(tiny):
    _, cache = tiny
    assert build_library().answer() == 42
    (library,) = cache.iterdir()
    made = library.stat().st_mtime_ns
    assert build_library().answer() == 42
    assert [x.stat().st_mtime_ns for x in cache.iterdir()] == [made]


def test_another_source_is_another_library(tiny):
    source, cache = tiny
    assert build_library().answer() == 42
    source.write_text(TINY.format(43))
    assert build_library().answer() == 43
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: content[:-1] + b"?"])
def test_a_damaged_file_in_the_cache_is_built_anew(tiny, damage):
    _, cache = tiny
    build_library()
    (library,) = cache.iterdir()
    content = library.read_bytes()
    # Written anew, not changed in place: the library that is loaded must keep its pages.
    library.unlink()
    library.write_bytes(damage(content))
    assert build_library().answer() == 42
    assert [build._digest(x.read_bytes()) in x.name for x in cache.iterdir()] == [True]


def test_any_number_of_builds_may_run_at_once(tiny):
    _, cache = tiny
    with ThreadPoolExecutor(3) as pool:
        assert [library.answer() for library in pool.map(lambda _: build_library(), range(3))] == [42] * 3
    assert all(x.suffix == ".so" for x in cache.iterdir())


@pytest.mark.parametrize(
    ("compiler", "sentence"),
    [
        ("/nonexistent", "needs a C\\+\\+ compiler, but CXX is '/nonexistent', which is no program"),
        ("false", "the compiler failed: false "),
    ],
)
def test_without_a_compiler_the_reason_is_a_sentence(tiny, monkeypatch, compiler, sentence):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(build.Unusable, match=sentence):
        build_library()
    # As the operators say it.
    build.why_unusable.cache_clear()
    build.library.cache_clear()
    try:
        with pytest.raises(ValueError, match=f"backend is 'native', which cannot be used here: .*{sentence}"):
            sparse_mla(
                randn(1, 1, 1, 1), randn(1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int32), 1.0, 1, backend="native"
            )
    finally:
        build.why_unusable.cache_clear()
        build.library.cache_clear()


def test_no_compiler_at_all(tiny, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    with pytest.raises(build.Unusable, match="none of no-such-compiler is installed"):
        build_library()


def test_a_cache_that_cannot_be_written(tiny, monkeypatch, tmp_path):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the directory should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.raises(build.Unusable, match="set XDG_CACHE_HOME"):
        build_library()


def test_a_source_that_does_not_compile(tiny):
    source, cache = tiny
    source.write_text("this is not C++\n")
    with pytest.raises(build.Unusable, match="the compiler failed"):
        build_library()
    assert list(cache.iterdir()) == []


def test_sources_are_installed_with_the_package():
    names = {path.name for path in (*build.SOURCES, *build.HEADERS)}
    assert {"indexer_topk.cpp", "sparse_mla.cpp", "dense_mla.cpp", "simd.h"} <= names
    assert all(path.parent == Path(build.__file__).parent for path in build.SOURCES)
