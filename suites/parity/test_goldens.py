"""Published numbers (spec 1.5 and 2) and the precisions of the contract.

Letters: B batch, L rows, S key slots, J indexer heads, E indexer head dim.
"""

import math

import pytest
import torch

from optimized.ops import indexer_topk
from reference import DeepseekV32Config, DeepseekV32ForCausalLM
from reference.fp8 import (
    E4M3_MAX,
    dequantize_e4m3,
    fp8_round_trip,
    hadamard_matrix,
    hadamard_rotate,
    power_of_two_at_least,
    quantize_e4m3,
)
from reference.indexer import LightningIndexer, index_scores, select_topk
from reference.rope import (
    RotaryTable,
    rotary_factor,
    rotate_half_split,
    rotate_interleaved,
    softmax_scale,
    yarn_inv_freq,
    yarn_mscale,
)
from suites.support import MODELS, assert_same, both_models, both_modes, build, text, tiny

V32 = DeepseekV32Config.preset("v32")
L = 40


@pytest.mark.parametrize(
    ("index", "frequency"),
    [(0, 1.0), (10, 0.0562341325), (11, 0.0390069266), (16, 0.0055), (22, 1.778279e-4), (23, 3.3338036e-5),
     (31, 3.3338036e-6)],
)  # fmt: skip
def test_yarn_frequencies_have_the_published_values(index, frequency):
    table = yarn_inv_freq(V32.rope_parameters, 64)
    assert table.shape == (32,)
    assert float(table[index]) == pytest.approx(frequency, rel=5e-7)


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones():
    table = yarn_inv_freq(V32.rope_parameters, 64)
    plain = yarn_inv_freq({"rope_type": "default", "rope_theta": 10000.0}, 64)
    assert torch.equal(table[:11], plain[:11])
    assert torch.allclose(table[23:], plain[23:] / 40, rtol=1e-7, atol=0)
    assert (table[11:23] < plain[11:23]).all() and (table[11:23] > plain[11:23] / 40).all()


def test_the_softmax_scale_has_the_published_value():
    assert softmax_scale(V32) == pytest.approx(0.1352337789, abs=5e-11)
    assert yarn_mscale(40.0, 1.0) == pytest.approx(1.3688879454, abs=5e-11)
    assert yarn_mscale(40.0, 1.0) ** 2 == pytest.approx(1.8738542071, abs=5e-11)


def test_the_softmax_scale_without_yarn_is_that_of_the_head_width():
    plain = DeepseekV32Config(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    assert softmax_scale(plain) == 192**-0.5


def test_cos_and_sin_are_not_scaled():
    assert rotary_factor(V32.rope_parameters) == 1.0
    assert rotary_factor({**V32.rope_parameters, "mscale": 0.5}) == pytest.approx(1.1844439727 / 1.3688879454)


@both_models
def test_the_model_uses_the_published_scale(model_class):
    with torch.device("meta"):
        model = model_class(DeepseekV32Config.preset("medium"))
    assert [layer.self_attn.scale for layer in model.model.layers] == [pytest.approx(0.1352337789, abs=5e-11)] * 4


def test_head_weights_carry_the_published_constant():
    config = tiny(index_n_heads=64, index_head_dim=128, hidden_size=4)
    indexer = LightningIndexer(config)
    torch.nn.init.ones_(indexer.weights_proj.weight)
    weights = indexer.head_weights(torch.tensor([[[1.0, 0.0, 0.0, 0.0]]]))
    assert weights[0, 0].tolist() == pytest.approx([0.0110485435] * 64, abs=5e-10)


def test_head_weights_of_a_bf16_indexer_are_fp32():
    indexer = LightningIndexer(tiny()).bfloat16()
    x = torch.randn(1, 3, 64).bfloat16()
    weights = indexer.head_weights(x)
    assert weights.dtype == torch.float32
    expected = x.double() @ indexer.weights_proj.weight.double().T * (16 * 32) ** -0.5
    assert_same(weights.double(), expected, 1e-6)


def test_the_keys_norm_is_a_layer_norm_with_eps_1e_6():
    indexer = LightningIndexer(tiny(rms_norm_eps=1e-2)).double()
    # Keys of tiny variance, on which eps decides, around a mean that an RMS norm would keep.
    indexer.wk.weight.data.mul_(1e-3)
    indexer.k_norm.bias.data.normal_()
    x = torch.randn(1, 5, 64, dtype=torch.float64)
    k = x @ indexer.wk.weight.T
    expected = (k - k.mean(-1, keepdim=True)) / (k.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    expected = expected * indexer.k_norm.weight + indexer.k_norm.bias
    no_turn = torch.ones(1, 5, 8).double(), torch.zeros(1, 5, 8).double()
    assert_same(indexer.keys(x, *no_turn), expected)


@pytest.mark.parametrize(
    ("amax", "scale"), [(448, 1.0), (449, 2.0), (1, 2**-8), (3, 2**-7), (0, 2**-22), (1e-4, 2**-22), (1e-5, 2**-22)]
)
def test_scales_are_rounded_up_to_powers_of_two(amax, scale):
    x = torch.zeros(1, 128)
    x[0, 17] = -amax
    assert quantize_e4m3(x)[1].tolist() == [[scale]]


@pytest.mark.parametrize("exponent", [-20, -3, 0, 5])
def test_the_rounding_up_goes_by_bits(exponent):
    exact = torch.tensor(2.0**exponent)
    above = torch.nextafter(exact, torch.tensor(torch.inf))
    below = torch.nextafter(exact, torch.tensor(0.0))
    assert power_of_two_at_least(torch.stack((below, exact, above))).tolist() == [2.0**exponent] * 2 + [
        2.0 ** (exponent + 1)
    ]


def test_quantised_values_lie_within_half_a_step_and_never_saturate():
    x = torch.randn(64, 256) * torch.logspace(-3, 3, 64)[:, None]
    payload, scale = quantize_e4m3(x)
    assert scale.shape == (64, 2)
    assert payload.float().abs().max() <= E4M3_MAX
    back = dequantize_e4m3(payload, scale, torch.float32)
    # e4m3: 3 bits of mantissa, subnormals below 2^-6.
    step = torch.maximum(x.abs() * 2**-4, scale.repeat_interleave(128, -1) * 2**-10)
    assert ((back - x).abs() <= step).all()


def test_a_width_that_is_no_multiple_of_the_block_is_refused():
    with pytest.raises(ValueError, match="quantize_e4m3: x has 192 channels; it must have a multiple of 128"):
        quantize_e4m3(torch.zeros(1, 192))


@pytest.mark.parametrize("width", [1, 2, 32, 128])
def test_the_hadamard_rotation_is_orthonormal_and_symmetric(width):
    matrix = hadamard_rotate(torch.eye(width, dtype=torch.float64))
    assert_same(matrix @ matrix.T, torch.eye(width).double(), 1e-14)
    assert torch.equal(matrix, matrix.T)
    assert_same(matrix.abs(), torch.full_like(matrix, width**-0.5), 1e-15)


def test_the_hadamard_matrix_is_sylvesters():
    bits = torch.tensor([[bin(i & j).count("1") % 2 for j in range(16)] for i in range(16)])
    assert torch.equal(hadamard_matrix(16), 1.0 - 2 * bits)


@pytest.mark.parametrize("width", [0, 3, 48])
def test_a_hadamard_matrix_of_another_width_is_refused(width):
    with pytest.raises(ValueError, match=f"hadamard_matrix: width is {width}; it must be a power of two"):
        hadamard_matrix(width)


def test_the_gradient_of_the_hadamard_rotation_is_its_transpose():
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 32, dtype=torch.float64)
    hadamard_rotate(x).backward(upstream)
    assert_same(x.grad, hadamard_rotate(upstream), 1e-14)


def test_the_gradient_passes_fp8_straight_through():
    x = torch.randn(3, 256, requires_grad=True)
    upstream = torch.randn(3, 256)
    rounded = fp8_round_trip(x)
    rounded.backward(upstream)
    assert not torch.equal(rounded, x)
    assert torch.equal(x.grad, upstream)


@both_models
def test_the_kl_trains_an_fp8_indexer(model_class):
    model = build(model_class, indexer_precision="fp8")
    model(text(L), output_indexer_kl_loss=True).indexer_kl_loss.backward()
    native = build(model_class)
    native(text(L), output_indexer_kl_loss=True).indexer_kl_loss.backward()
    for name, parameter in model.model.layers[0].self_attn.indexer.named_parameters():
        expected = native.model.layers[0].self_attn.indexer.get_parameter(name).grad
        # FP8 moves a direction a little; a gradient that lost the rotation would point anywhere.
        assert torch.cosine_similarity(parameter.grad.flatten(), expected.flatten(), 0) > 0.9


@pytest.mark.parametrize("position", [1, 4097, 100_000, 163_839])
def test_the_table_of_an_fp64_model_is_rounded_to_fp32(position):
    table = RotaryTable(tiny()).double()
    cos, sin = table(torch.tensor([[position]]), torch.float64)
    angles = torch.tensor(float(position)) * yarn_inv_freq(tiny().rope_parameters, 16)
    assert angles.dtype == torch.float32 and cos.dtype == torch.float64
    assert cos[0, 0].tolist() == [math.cos(a) for a in angles.tolist()]
    assert sin[0, 0].tolist() == [math.sin(a) for a in angles.tolist()]


@both_models
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_a_model_leaves_its_table_in_fp32(model_class, dtype):
    model = model_class(tiny())
    before = model.model.rotary_emb.inv_freq.clone()
    model.to(dtype)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    assert before.dtype == torch.float32


@both_models
@pytest.mark.parametrize(
    ("dtype", "kept"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)]
)
def test_casting_a_model_does_not_round_its_router_bias(model_class, dtype, kept):
    model = build(model_class, torch.float32)
    gate = model.model.layers[1].mlp.gate
    before = gate.e_score_correction_bias.clone()
    model.to(dtype)
    assert gate.weight.dtype == dtype
    assert gate.e_score_correction_bias.dtype == kept
    assert torch.equal(gate.e_score_correction_bias.float(), before)


@both_models
@pytest.mark.parametrize(
    ("dtype", "kept"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)]
)
def test_casting_a_model_does_not_round_its_key_norm(model_class, dtype, kept):
    model = build(model_class, torch.float32)
    k_norm = model.model.layers[1].self_attn.indexer.k_norm
    k_norm.weight.grad = torch.full_like(k_norm.weight, 1 / 3)
    before = {name: p.detach().clone() for name, p in k_norm.named_parameters()}
    model.to(dtype)
    for name, p in k_norm.named_parameters():
        assert p.dtype == kept
        assert torch.equal(p.float(), before[name])
    assert k_norm.weight.grad.dtype == kept
    assert model.model.layers[1].self_attn.indexer.wk.weight.dtype == dtype
    # It can be rounded, and then other keys are chosen: what is kept matters.
    assert not torch.equal(before["weight"].to(torch.bfloat16).float(), before["weight"])


@both_models
def test_a_model_that_is_built_in_bf16_has_its_key_norm_in_fp32(model_class):
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = model_class(tiny())
    finally:
        torch.set_default_dtype(torch.float32)
    indexer = model.model.layers[0].self_attn.indexer
    assert {p.dtype for p in indexer.k_norm.parameters()} == {torch.float32}
    assert indexer.wk.weight.dtype == torch.bfloat16


def test_interleaved_and_half_split_turn_different_pairs():
    cos, sin = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rotate_interleaved(x, cos, sin).tolist() == [-2.0, 1.0, 3.0, 4.0]
    assert rotate_half_split(x, cos, sin).tolist() == [-3.0, 2.0, 1.0, 4.0]


@both_models
@both_modes
def test_the_indexers_layout_of_rope_changes_its_scores(model_class, sparse):
    models = [build(model_class, use_sparse_attention=sparse, indexer_rope_interleaved=flag) for flag in (False, True)]
    half, interleaved = (model(text(L), output_indexer_scores="visible") for model in models)
    a, b = half.indexer_scores[0], interleaved.indexer_scores[0]
    seen = a.isfinite()
    # Position 0 is not turned at all.
    assert_same(a[0, 0, :1], b[0, 0, :1])
    assert (a - b)[seen].std() > 0.1 * a[seen].std()
    assert torch.equal(half.logits, interleaved.logits) != sparse


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


@both_models
def test_fp8_changes_index_scores_a_little_and_not_a_lot(model_class):
    native, fp8 = (
        build(model_class, indexer_precision=p)(text(L), output_indexer_scores="visible").indexer_scores[0]
        for p in ("native", "fp8")
    )
    seen = native.isfinite()
    # Half a step of e4m3 is 1/16 of a value at most; 32 channels and 16 heads average it.
    assert 1e-3 < relative(fp8[seen], native[seen]) < 0.1


@both_models
def test_fp8_indexer_scores_are_those_of_rotated_and_rounded_bf16(model_class):
    model = build(model_class, indexer_precision="fp8")
    scores = model(text(L), output_indexer_scores="visible").indexer_scores[0]
    layer = model.model.layers[0]
    x = layer.input_layernorm(model.model.embed_tokens(text(L)))
    cos, sin = model.model.rotary_emb(torch.arange(L)[None], torch.float64)
    attention, indexer = layer.self_attn, layer.self_attn.indexer
    q = indexer.queries(attention.q_a_layernorm(attention.q_a_proj(x)), cos, sin)
    q, k = (
        dequantize_e4m3(*quantize_e4m3(hadamard_rotate(v.bfloat16())), torch.float64)
        for v in (q, indexer.keys(x, cos, sin))
    )
    expected = index_scores(q, k, indexer.head_weights(x))
    seen = scores.isfinite()
    assert_same(scores[seen], expected[seen])


@both_models
@both_modes
def test_fp8_latents_change_the_output_a_little_and_not_a_lot(model_class, sparse):
    native = build(model_class, use_sparse_attention=sparse)(text(L), output_decisions=True)
    fp8 = build(model_class, use_sparse_attention=sparse, kv_latent_precision="fp8")
    logits = fp8(text(L), decisions=native.decisions).logits
    assert 1e-3 < relative(logits, native.logits) < 0.1


@both_models
def test_an_fp8_indexer_changes_selections_and_nothing_else(model_class):
    native, fp8 = (build(model_class, indexer_precision=p) for p in ("native", "fp8"))
    free = native(text(L), output_decisions=True)
    own = fp8(text(L), output_decisions=True)
    assert not torch.equal(own.decisions[0].topk_indices, free.decisions[0].topk_indices)
    assert torch.equal(fp8(text(L), decisions=free.decisions).logits, free.logits)


def reference_topk(scores_BLS, visible_BLS, k):
    return select_topk(scores_BLS, visible_BLS, k)


def operators_topk(scores_BLS, visible_BLS, k):
    """The operator made to see given scores: relu(s) − relu(−s) = s, one row a batch."""
    rows = scores_BLS.flatten(0, 1)
    q = torch.tensor([1.0, -1.0]).double().view(1, 1, 2, 1).expand(len(rows), 1, 2, 1)
    start = visible_BLS.flatten(0, 1).int().argmax(-1)
    bounds = torch.stack((start, start + visible_BLS.flatten(0, 1).sum(-1)), -1)[:, None]
    indices, _ = indexer_topk(q, rows[..., None], q[..., 0], bounds, k)
    return indices.view(*scores_BLS.shape[:2], -1)


both_selections = pytest.mark.parametrize("choose", [reference_topk, operators_topk], ids=list(MODELS))


def chosen(choose, row, k, visible=None):
    scores = torch.tensor([[row]], dtype=torch.float64)
    seen = torch.ones_like(scores, dtype=torch.bool) if visible is None else torch.tensor([[visible]])
    return choose(scores, seen, k)[0, 0].tolist()


@both_selections
@pytest.mark.parametrize("k", range(1, 6))
def test_among_equals_the_lowest_index_comes_first(choose, k):
    assert chosen(choose, [0.5, 2.0, 0.5, 0.5, 0.5], k) == sorted([1, 0, 2, 3, 4][:k])


@both_selections
def test_minus_zero_equals_zero(choose):
    assert chosen(choose, [-0.0, 0.0, -0.0, 0.0], 2) == [0, 1]
    assert chosen(choose, [0.0, -0.0, 0.0, -0.0], 3) == [0, 1, 2]


@both_selections
def test_a_plateau_of_zeros_is_cut_at_the_lowest_indices(choose):
    row = [0.0] * 100
    row[50], row[60], row[3] = 1.0, 2.0, -1.0
    assert chosen(choose, row, 16) == [0, 1, 2, *range(4, 15), 50, 60]


@both_selections
def test_nan_ranks_highest(choose):
    assert chosen(choose, [3.0, math.nan, 9.0, 1.0], 1) == [1]
    assert chosen(choose, [3.0, math.nan, 9.0, 1.0], 2) == [1, 2]
    assert chosen(choose, [math.inf, math.nan, 9.0, math.nan], 2) == [1, 3]


@both_selections
def test_invisible_keys_are_never_chosen_whatever_they_score(choose):
    visible = [False, True, True, True, False]
    assert chosen(choose, [math.nan, 1.0, -5.0, 2.0, math.inf], 2, visible) == [1, 3]
    assert chosen(choose, [math.nan, 1.0, -5.0, 2.0, math.inf], 4, visible) == [1, 2, 3, -1]


@both_selections
def test_a_score_of_minus_infinity_is_still_visible(choose):
    assert chosen(choose, [-math.inf, 1.0, -math.inf], 2) == [0, 1]


@both_selections
def test_more_places_than_keys_are_cut_to_the_keys(choose):
    assert chosen(choose, [1.0, 2.0], 16) == [0, 1]


def forward_with_nan_at_3(model):
    embeds = model.model.embed_tokens(text(L)).detach()
    embeds[0, 3] = torch.nan
    return model(inputs_embeds=embeds, output_decisions=True)


@both_models
def test_nan_in_a_real_token_is_selected_and_seen(model_class):
    out = forward_with_nan_at_3(build(model_class))
    assert (out.decisions[0].topk_indices[0, 3:] == 3).any(-1).all()
    assert out.logits[0, 3:].isnan().any(-1).all()


@both_modes
def test_nan_in_a_real_token_does_not_reach_rows_before_it(sparse):
    # The reference's plain sums over all slots make 0 · NaN of it; the operators read no key that a row cannot see.
    logits = forward_with_nan_at_3(build(MODELS["optimized"], use_sparse_attention=sparse)).logits
    assert logits[0, :3].isfinite().all()


def test_the_default_dtype_does_not_leak_into_the_table():
    torch.set_default_dtype(torch.float64)
    try:
        model = DeepseekV32ForCausalLM(tiny())
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, yarn_inv_freq(tiny().rope_parameters, 16))
