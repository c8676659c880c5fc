"""FP8 blocks against numpy, bit for bit: every byte, every ragged shape, and shapes of the 671B model.

Letters: O rows, I columns of a weight, P and Q its blocks of 128×128.
"""

import numpy as np
import pytest
import torch

from reference.fp8_blocks import check_scale, dequantize_blocks, is_exact, quantize_blocks, scale_shape
from suites.checkpoints import official

SMALL = [(1, 1), (1, 300), (300, 1), (127, 129), (128, 128), (129, 127), (144, 192), (256, 384), (576, 72)]
# kv_a_proj_with_mqa with its ragged 576 rows, the indexer's wk and wq_b, q_a_proj.
TRUE = [(576, 7168), (128, 7168), (8192, 1536), (1536, 7168)]
shapes = pytest.mark.parametrize("shape", SMALL + TRUE, ids=lambda s: f"{s[0]}x{s[1]}")


def payload_of(bytes_OI):
    return torch.from_numpy(bytes_OI).view(torch.float8_e4m3fn)


def random_bytes(shape, seed=0):
    bytes_OI = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return np.where(bytes_OI & 127 == 127, 0, bytes_OI).astype(np.uint8)


def random_scales(shape, seed=1, power_of_two=True):
    rng = np.random.default_rng(seed)
    blocks = scale_shape(shape)
    if power_of_two:
        return (2.0 ** rng.integers(-20, 4, blocks)).astype(np.float32)
    return rng.uniform(1e-4, 2.0, blocks).astype(np.float32)


def same_bits(found, expected):
    return np.array_equal(found.numpy().view(np.uint32), expected.view(np.uint32))


def test_every_byte_means_what_numpy_says():
    every = np.arange(256, dtype=np.uint8).reshape(1, 256)
    ones = torch.ones(1, 2)
    found = dequantize_blocks(payload_of(every), ones, torch.empty(1, 256))
    nan = np.isnan(official.E4M3)
    assert np.flatnonzero(nan).tolist() == [127, 255]
    assert np.array_equal(found.isnan().numpy()[0], nan)
    assert np.array_equal(found.numpy()[0, ~nan].view(np.uint32), official.E4M3[~nan].view(np.uint32))


@shapes
@pytest.mark.parametrize("power_of_two", [True, False])
def test_dequantising_is_numpys_bit_for_bit(shape, power_of_two):
    bytes_OI, scale_PQ = random_bytes(shape), random_scales(shape, power_of_two=power_of_two)
    found = dequantize_blocks(payload_of(bytes_OI), torch.from_numpy(scale_PQ), torch.empty(shape))
    assert same_bits(found, official.dequantise(bytes_OI, scale_PQ))


@pytest.mark.parametrize("fault", ["transposed", "shifted", "inverse", "one block too wide"])
def test_wrong_dequantisers_are_seen(fault):
    shape = (300, 300)
    bytes_OI, scale_PQ = random_bytes(shape), random_scales(shape)
    wrong = {
        "transposed": scale_PQ.T.copy(), "shifted": np.roll(scale_PQ, 1, 0), "inverse": 1 / scale_PQ,
        "one block too wide": np.repeat(scale_PQ[:, :1], 3, 1),
    }[fault]  # fmt: skip
    found = dequantize_blocks(payload_of(bytes_OI), torch.from_numpy(wrong), torch.empty(shape))
    assert not same_bits(found, official.dequantise(bytes_OI, scale_PQ))


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_power_of_two_scales_are_exact_in_bf16_and_others_are_not(shape):
    bytes_OI = random_bytes(shape)
    for power_of_two in (True, False):
        scale_PQ = random_scales(shape, power_of_two=power_of_two)
        found = dequantize_blocks(payload_of(bytes_OI), torch.from_numpy(scale_PQ), torch.empty(shape).bfloat16())
        expected = official.dequantise(bytes_OI, scale_PQ)
        assert np.array_equal(found.view(torch.uint16).numpy(), official.to_bf16(expected))
        exact = same_bits(found.float(), expected)
        assert exact or not power_of_two
        assert is_exact(torch.from_numpy(scale_PQ), torch.bfloat16) == power_of_two
        if np.prod(shape) > 1000:
            assert exact == power_of_two


@pytest.mark.parametrize(
    ("scale", "dtype", "exact"),
    [
        (2.0**-117, torch.bfloat16, True), (2.0**-118, torch.bfloat16, False), (2.0**118, torch.bfloat16, True),
        (0.75, torch.bfloat16, False), (0.75, torch.float32, True), (0.75, torch.float64, True),
        (2.0**-5, torch.float16, True), (2.0**-6, torch.float16, False), (2.0**7, torch.float16, True),
        (2.0**8, torch.float16, False),
    ],
)  # fmt: skip
def test_a_dtype_is_exact_where_every_number_of_e4m3_survives(scale, dtype, exact):
    assert is_exact(torch.tensor([[1.0, scale]]), dtype) == exact
    every = torch.from_numpy(official.E4M3[:127].copy()) * scale
    assert torch.equal(every.to(dtype).float(), every) or not exact


@shapes
def test_quantising_is_numpys_bit_for_bit(shape):
    weight_OI = np.random.default_rng(2).standard_normal(shape).astype(np.float32) * np.float32(0.02)
    payload, scale = quantize_blocks(torch.from_numpy(weight_OI))
    bytes_OI, scale_PQ = official.quantise(weight_OI)
    assert np.array_equal(scale.numpy(), scale_PQ)
    assert np.array_equal(payload.view(torch.uint8).numpy(), bytes_OI)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_numbers_from_fp8_survive_fp8_whatever_power_of_two_they_had(shape, dtype):
    # Small payloads under a large scale, as in a block whose largest number has left: the new scale is another.
    bytes_OI = random_bytes(shape) & np.uint8(0x9F)
    scale_PQ = torch.from_numpy(random_scales(shape))
    weight = dequantize_blocks(payload_of(bytes_OI), scale_PQ, torch.empty(shape, dtype=dtype))
    again = dequantize_blocks(*quantize_blocks(weight), torch.empty(shape, dtype=dtype))
    assert torch.equal(again, weight)


@pytest.mark.parametrize(
    ("largest", "scale"),
    [(448.0, 1.0), (449.0, 2.0), (447.0, 1.0), (1.0, 2.0**-8), (3.0, 2.0**-7), (0.0, 1.0), (448 * 2.0**-126, 2.0**-126),
     (1e-38, 2.0**-126), (448.00003, 2.0), (3.0e38, 2.0**120)],
)  # fmt: skip
def test_the_scale_is_the_smallest_power_of_two_that_reaches_448(largest, scale):
    weight = torch.zeros(3, 5)
    weight[1, 2] = -largest
    payload, found = quantize_blocks(weight)
    assert found.tolist() == [[scale]]
    assert payload.float().isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_not_quantised(value):
    weight = torch.ones(200, 200)
    weight[150, 199] = value
    with pytest.raises(ValueError, match="NaN or an infinity"):
        quantize_blocks(weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -0.5, -float("inf")])
def test_a_scale_that_is_none_is_named_with_its_block(value):
    scale = torch.ones(3, 4)
    check_scale("w_scale_inv", scale)
    scale[2, 1] = value
    with pytest.raises(ValueError, match=rf"'w_scale_inv' holds {value} at block \[2, 1\]"):
        check_scale("w_scale_inv", scale)
