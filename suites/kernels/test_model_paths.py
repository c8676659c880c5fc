"""What the optimized model computes with, and that every choice gives the same numbers: paths of sparse attention,
grouped experts, the Hadamard rotation, selections kept for recomputation, torch.compile around the operators.

Letters: N tokens, M hidden_size, X routed experts, T chosen experts a token.
"""

import sys
from types import ModuleType

import pytest
import torch

import optimized.model
from optimized import implementations
from optimized.experts import Experts
from optimized.linear import grouped_linear, is_linear, linear_implementation
from optimized.model import use_fast_parts
from optimized.norm import RMSNorm
from optimized.ops import hadamard
from optimized.ops.hadamard import butterfly, hadamard_implementation
from optimized.paths import PATHS, causal_pairs, choose_path
from reference import DeepseekV32Config
from reference.fp8 import hadamard_matrix, hadamard_rotate
from reference.moe import Experts as ReferenceExperts
from reference.moe import RMSNorm as ReferenceRMSNorm
from suites.kernels.plain import assert_near
from suites.support import MODELS, assert_same, build, text, tiny

# Its successor in transformers' next major version has another name.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able`:FutureWarning")


def trained(model, ids, **asked):
    """Logits, KL and every gradient of one step on both losses."""
    out = model(ids, labels=ids, output_indexer_kl_loss=True, **asked)
    (out.lm_loss + out.indexer_kl_loss).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return {"logits": out.logits, "kl": out.indexer_kl_loss, **{n: g for n, g in grads.items() if g is not None}}


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("path", PATHS)
def test_every_path_gives_the_reference_s_numbers(path, length):
    ids = text(length, batch=2)
    model = build(MODELS["optimized"])
    model.attention_path = path
    expected = trained(build(MODELS["reference"]), ids)
    found = trained(model, ids)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_same(found[name], value)


@pytest.mark.parametrize("path", PATHS)
def test_every_path_follows_the_tape(path):
    ids = text(40)
    tape = build(MODELS["reference"])(text(40, seed=7), output_decisions=True).decisions
    model = build(MODELS["optimized"])
    model.attention_path = path
    expected = build(MODELS["reference"])(ids, decisions=tape, output_decisions=True)
    found = model(ids, decisions=tape, output_decisions=True)
    assert_same(found.logits, expected.logits)
    assert not torch.equal(model(ids).logits, found.logits)
    for own, others in zip(found.decisions, expected.decisions, strict=True):
        assert torch.equal(own.topk_indices, others.topk_indices)


def test_up_to_k_keys_nobody_asks_the_indexer(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the top-k was computed")

    monkeypatch.setattr(optimized.model, "indexer_topk", refuse)
    monkeypatch.setattr(optimized.model, "sparse_mla", refuse)
    model = build(MODELS["optimized"])
    found = model(text(16), output_decisions=True)
    expected = build(MODELS["reference"])(text(16), output_decisions=True)
    for own, others in zip(found.decisions, expected.decisions, strict=True):
        assert torch.equal(own.topk_indices, others.topk_indices)
    with pytest.raises(AssertionError, match="was computed"):
        model(text(17))


def test_an_unknown_path_is_refused():
    with pytest.raises(
        ValueError, match="attention_path is 'flash'; it must be None or one of dense, masked, gathered"
    ):
        build(MODELS["optimized"]).attention_path = "flash"


@pytest.mark.parametrize(
    ("rows", "slots", "most"), [(1, 1, 1), (5, 5, None), (5, 9, 3), (5, 9, 7), (5, 9, 20), (6, 6, 4)]
)
def test_pairs_are_those_of_the_rows(rows, slots, most):
    visible = range(slots - rows + 1, slots + 1)
    assert causal_pairs(rows, slots, most) == sum(min(v, v if most is None else most) for v in visible)


def test_the_path_follows_the_dimensions():
    def path(name, rows, slots=None, backend="torch"):
        config = DeepseekV32Config.preset(name)
        slots = rows if slots is None else slots
        return choose_path(config, rows, slots, backend, all_selected=slots <= config.index_topk)

    # Absorption makes V3.2's pairs 3.4 times as dear: kernels gain from about 7 k on.
    assert [path("v32", length) for length in (2048, 4096, 8192, 32768)] == ["dense", "masked", "masked", "gathered"]
    assert path("v32", 16384, backend="triton") == "masked"
    assert path("bench", 8192) == "gathered"
    # One new token would have every key expanded for it, in each step anew.
    assert path("v32", 1, 5000) == path("v32", 1, 500) == "gathered"


def test_a_record_can_say_what_computes():
    config = tiny()
    said = implementations(config, 96, backend="torch")
    assert said.pop("linear") in ("onednn", "blas")
    assert said == {"operators": "torch", "attention": "gathered", "experts": "grouped", "hadamard": "butterfly"}
    assert implementations(config, 16, backend="torch")["attention"] == "dense"
    assert implementations(tiny(use_sparse_attention=False), 96, backend="torch")["attention"] == "dense"
    in_fp64 = implementations(config, 96, backend="torch", dtype=torch.float64)
    assert (in_fp64["experts"], in_fp64["linear"]) == ("loop", "blas")
    with pytest.raises(ValueError, match="'vulkan'"):
        implementations(config, 96, backend="vulkan")


@pytest.fixture(params=["onednn", "blas"])
def product(request, monkeypatch):
    """Either product, whatever this processor is."""
    if request.param == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch is built without oneDNN")
    monkeypatch.setattr(optimized.linear, "_mkl_is_slow", lambda: request.param == "onednn")
    return request.param


@pytest.mark.parametrize("shape", [(1, 1), (7,), (3, 5), (2, 3, 4)])
def test_a_fast_linear_is_nn_linear(product, shape):
    plain = torch.nn.Linear(24, 20, bias=False)
    fast = torch.nn.Linear(24, 20, bias=False)
    fast.load_state_dict(plain.state_dict())
    use_fast_parts(fast)
    assert linear_implementation(torch.device("cpu"), torch.float32) == product
    x = torch.randn(*shape, 24)
    found, expected = {}, {}
    for module, kept in ((fast, found), (plain, expected)):
        inputs = x.clone().requires_grad_()
        out = module(inputs)
        (out * torch.linspace(-1, 1, 20)).sum().backward()
        kept.update(out=out, dx=inputs.grad, dw=module.weight.grad)
    for name, value in expected.items():
        assert_near(found[name], value)
    assert not torch.allclose(fast(x.roll(1, -1)), expected["out"], atol=1e-3)


def test_a_fast_linear_leaves_other_dtypes_autocast_and_hooks_alone(product):
    fast = torch.nn.Linear(8, 4, bias=False)
    use_fast_parts(fast)
    assert isinstance(fast, torch.nn.Linear)
    assert is_linear(fast)
    assert fast.double()(torch.ones(2, 8, dtype=torch.float64)).dtype == torch.float64
    fast.float()
    assert fast(torch.ones(0, 8)).shape == (0, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast(torch.ones(2, 8)).dtype == torch.bfloat16
    fast._hf_hook = object()
    assert not is_linear(fast)
    assert not is_linear(torch.nn.Sequential(fast))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_lean_norm_is_the_reference_s(dtype):
    plain, lean = ReferenceRMSNorm(24, 1e-6).to(dtype), ReferenceRMSNorm(24, 1e-6).to(dtype)
    torch.nn.init.normal_(plain.weight)
    lean.load_state_dict(plain.state_dict())
    use_fast_parts(lean)
    assert type(lean) is RMSNorm
    x = torch.randn(2, 5, 24, dtype=dtype)
    found, expected = {}, {}
    for module, kept in ((lean, found), (plain, expected)):
        inputs = x.clone().requires_grad_()
        out = module(inputs)
        (out * torch.linspace(-1, 2, 24)).sum().backward()
        kept.update(out=out, dx=inputs.grad, dw=module.weight.grad)
    assert torch.equal(found["out"], expected["out"])
    for name in ("dx", "dw"):
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=8 * torch.finfo(dtype).eps * scale)
        assert not torch.allclose(found[name].roll(1, -1), expected[name], atol=1e-2 * scale)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lean, x.requires_grad_())


def test_groups_are_multiplied_one_by_one(product):
    x, w = torch.randn(9, 8), torch.randn(4, 12, 8)
    counts = torch.tensor([4, 0, 3, 2])
    inputs = x.clone().requires_grad_(), w.clone().requires_grad_()
    rows = torch.tensor([3, 1, 8, 3, 0, 7, 2, 5, 5])
    out = grouped_linear(inputs[0], rows, inputs[1], counts)
    out.square().sum().backward()
    again = x.clone().requires_grad_(), w.clone().requires_grad_()
    parts = [part @ matrix.T for part, matrix in zip(again[0][rows].split(counts.tolist()), again[1], strict=True)]
    expected = torch.cat(parts)
    expected.square().sum().backward()
    for found, value in ((out, expected), (inputs[0].grad, again[0].grad), (inputs[1].grad, again[1].grad)):
        assert_near(found, value)
    assert not torch.allclose(grouped_linear(x, rows, w, counts.roll(1)), expected, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_experts_are_the_loop(dtype):
    config = tiny(n_routed_experts=8, num_experts_per_tok=3, topk_group=4)
    grouped, loop = Experts(config).to(dtype), ReferenceExperts(config).to(dtype)
    for parameter in grouped.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    loop.load_state_dict(grouped.state_dict())
    assert grouped.implementation == "grouped"
    x = torch.randn(19, config.hidden_size, dtype=dtype)
    # Expert 5 gets no token, expert 0 every one.
    experts = torch.stack([torch.tensor([0, *(torch.randperm(4)[:2] + 1).sort().values.tolist()]) for _ in range(19)])
    weights = torch.rand(19, 3)
    found, expected = {}, {}
    for module, kept in ((grouped, found), (loop, expected)):
        inputs = x.clone().requires_grad_(), weights.clone().requires_grad_()
        out = module(inputs[0], experts.int(), inputs[1])
        out.square().sum().backward()
        kept.update(
            out=out, dx=inputs[0].grad, dw=inputs[1].grad, gate_up=module.gate_up_proj.grad, down=module.down_proj.grad
        )
    epsilon = torch.finfo(dtype).eps
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=8 * epsilon * float(value.detach().abs().max()), msg=name
        )
    assert not torch.allclose(found["out"], grouped(x, experts.int() + 1, weights), rtol=0.05)


def test_experts_of_odd_widths_or_fp64_take_the_loop():
    assert Experts(tiny()).double().implementation == "loop"
    odd = tiny(moe_intermediate_size=18)
    assert Experts(odd).implementation == "loop"
    ids, model = text(20), build(MODELS["optimized"], torch.float32, moe_intermediate_size=18)
    expected = build(MODELS["reference"], torch.float32, moe_intermediate_size=18)(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("width", [1, 2, 32, 128])
def test_the_butterfly_is_sylvester_s_matrix(width):
    x = torch.randn(3, 5, width, dtype=torch.float64)
    assert_same(butterfly(x), x @ hadamard_matrix(width).double())
    assert_same(hadamard(x), hadamard_rotate(x))
    assert_same(hadamard(hadamard(x)), x)
    assert torch.autograd.gradcheck(hadamard, x.requires_grad_())


def test_the_rotation_is_within_one_bf16_step_of_the_reference_s():
    x = torch.randn(64, 128).bfloat16()
    found, expected = hadamard(x), hadamard_rotate(x)
    steps = (found.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    assert int(steps.max()) <= 1
    assert int((hadamard(x.roll(1, -1)).view(torch.int16).int() - expected.view(torch.int16).int()).abs().max()) > 1


def test_a_width_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="hadamard: x has 48 channels; it must have a power of two"):
        hadamard(torch.ones(2, 48))


def test_the_fast_transform_is_used_where_it_is_installed(monkeypatch):
    fast = ModuleType("fast_hadamard_transform")
    fast.__spec__ = optimized.model.__spec__
    fast.hadamard_transform = lambda x, scale: 7 * x * scale
    monkeypatch.setitem(sys.modules, "fast_hadamard_transform", fast)
    assert hadamard_implementation(torch.device("cuda")) == "fast-hadamard-transform"
    assert hadamard_implementation(torch.device("cpu")) == "butterfly"
    operator = sys.modules["optimized.ops.hadamard"]
    monkeypatch.setattr(operator, "hadamard_implementation", lambda _: "fast-hadamard-transform")
    assert_same(hadamard(torch.ones(4)), torch.full((4,), 3.5))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_layer_reuses_its_selection(reentrant, monkeypatch):
    calls = []
    topk = optimized.model.indexer_topk
    monkeypatch.setattr(optimized.model, "indexer_topk", lambda *args, **kw: calls.append(1) or topk(*args, **kw))
    model = build(MODELS["optimized"]).train()
    expected = trained(model, text(40))
    assert len(calls) == 3
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    first, second = (model(text(40, seed=s), labels=text(40, seed=s)).loss for s in (0, 1))
    (first + second).backward()
    # Three layers, three forwards; no backward chose anew.
    assert len(calls) == 9
    model.zero_grad(set_to_none=True)
    for name, value in trained(model, text(40)).items():
        assert_same(value, expected[name])


@pytest.mark.slow
def test_torch_compile_leaves_the_operators_alone_and_compiles_the_rest():
    options = {"num_hidden_layers": 2}
    plain, compiled = (build(MODELS["optimized"], torch.float32, **options).train() for _ in range(2))
    ids = text(40)
    expected, found = trained(plain, ids), trained(torch.compile(compiled), ids)
    found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5 * float(value.detach().abs().max()), msg=name)
