"""Constants of the Lightning Indexer (spec 2): sizes, scales, norm, Hadamard rotation and FP8.

Letters: D channels, J indexer heads, E indexer head dim, S keys.
"""

import torch

from reference import DeepseekV32Config
from reference.fp8 import (
    AMAX_FLOOR,
    E4M3_MAX,
    dequantize_e4m3,
    hadamard_matrix,
    hadamard_rotate,
    power_of_two_at_least,
    quantize_e4m3,
)
from reference.indexer import LightningIndexer, index_scores

from . import plain
from .constants import Constant

# amax, scale. 1e-5 shows that the floor is a maximum: one bug took the minimum.
PRINTED_SCALES = ((448.0, 1.0), (449.0, 2.0), (1.0, 2.0**-8), (3.0, 2.0**-7), (0.0, 2.0**-22), (1e-4, 2.0**-22))
HADAMARD_ROWS = (1, 2, 64, 127)
# One of each kind: zeros of both signs, normal numbers, the largest, subnormals, and ties, which go to even.
E4M3_EXAMPLES = (
    (0.0, 0x00), (-0.0, 0x80), (1.0, 0x38), (-1.0, 0xB8), (448.0, 0x7E), (-448.0, 0xFE), (0.0625, 0x18),
    (2.0**-6, 0x08), (2.0**-9, 0x01), (2.0**-10, 0x00), (3 * 2.0**-10, 0x02), (17.0, 0x58), (19.0, 0x5A),
    (1.0625, 0x38), (1.1875, 0x3A), (0.3, 0x2A), (100.0, 0x6C), (-5.5, 0xCB), (240.0, 0x77),
)  # fmt: skip


def constants() -> list[Constant]:
    """Sizes, head weights, k_norm, one score by hand, the Hadamard rotation and the FP8 bytes."""
    v32 = DeepseekV32Config.preset("v32")
    return [*_sizes(v32), *_scores(), *_hadamard(), *_fp8()]


def _sizes(v32: DeepseekV32Config) -> list[Constant]:
    with torch.device("meta"):
        indexer = LightningIndexer(v32)
    per_layer = sum(p.numel() for p in indexer.parameters())
    payload, scale = quantize_e4m3(torch.ones(1, v32.index_head_dim))
    heads, nope, rope = v32.num_attention_heads, v32.qk_nope_head_dim, v32.qk_rope_head_dim
    return [
        Constant(
            "indexer.sizes", "2", "Indexer heads, head dim, rope lanes (they come first in a head), index_topk.",
            [v32.index_n_heads, v32.index_head_dim, v32.qk_rope_head_dim, v32.index_topk], [64, 128, 64, 2048],
            "spec 1.1 and 2", arithmetic="exact",
        ),
        Constant(
            "indexer.parameters", "1.2", "Parameters of the indexer in one layer, and in all 61 layers.",
            [per_layer, per_layer * v32.num_hidden_layers], [13_959_424, 851_524_864], "spec 1.2", arithmetic="exact",
        ),
        Constant(
            "indexer.cache_bytes", "2", "Bytes of a token's indexer key in the cache: 128 of e4m3 and an fp32 scale.",
            payload.numel() * payload.itemsize + scale.numel() * scale.itemsize, 132, "spec 2, step 8", arithmetic="exact",
        ),
        Constant(
            "indexer.matmul_flop", "2", "FLOP a (query, key) pair: indexer, attention as MHA, attention as absorbed MQA.",
            [
                2 * v32.index_n_heads * v32.index_head_dim, 2 * heads * (nope + rope + v32.v_head_dim),
                2 * heads * (v32.kv_lora_rank + rope + v32.kv_lora_rank),
            ],
            [16_384, 81_920, 278_528], "spec 2, other facts", arithmetic="exact",
        ),
    ]  # fmt: skip


def _scores() -> list[Constant]:
    config = DeepseekV32Config.preset("tiny", index_n_heads=64, index_head_dim=128, hidden_size=4)
    indexer = LightningIndexer(config).double()
    torch.nn.init.ones_(indexer.weights_proj.weight)
    # Neighbours 0.001 above and below 1: their variance is that of eps, so that eps decides the result.
    row = [1.0 + 1e-3 * (-1) ** i for i in range(128)]
    with torch.no_grad():
        weights = indexer.head_weights(torch.tensor([[[1.0, 0.0, 0.0, 0.0]]]).double())
        normed = indexer.k_norm(torch.tensor([row], dtype=torch.float64))
    # Head 0 sees k_0 and k_2 with a positive product, head 1 has a negative weight and sees k_1 and k_2.
    q, w = [[1.0, 2.0], [-1.0, 0.5]], [0.5, -0.25]
    k = [[2.0, -0.5], [-3.0, 1.0], [1.0, 4.0], [0.0, -1.0]]
    q_BLJE, k_BSE, w_BLJ = torch.tensor([[q]]).double(), torch.tensor([k]).double(), torch.tensor([[w]]).double()
    return [
        Constant(
            "indexer.head_weight_factor", "2", "64^(-1/2) 128^(-1/2): scales weights_proj(x), which may be negative.",
            weights[0, 0].tolist(), [0.0110485435] * 64, "spec 2, step 9", within=5e-11,
            given={"weights_proj(x)": [1.0] * 64},
        ),
        Constant(
            "indexer.k_norm_eps", "2", "eps of the LayerNorm over an indexer key.", indexer.k_norm.eps, 1e-6,
            "spec 2, step 4", arithmetic="exact",
        ),
        Constant(
            "indexer.k_norm", "2",
            "LayerNorm of 128 values 1.001, 0.999, 1.001, ..., weight 1, bias 0: 0.0010/sqrt(2e-6). An eps of 1e-5 "
            "gives 0.3015, an RMSNorm 1.001.",
            normed[0].tolist(), [0.7071067812 * (-1) ** i for i in range(128)], "closed form 2^(-1/2)", within=1e-9,
            given={"k": row},
        ),
        Constant(
            "indexer.score", "2",
            "I[s] = sum over heads of w relu(q.k), without the factor above. Head 1's weight is negative, and so are scores.",
            index_scores(q_BLJE, k_BSE, w_BLJ)[0, 0].tolist(), [0.5, -0.875, 4.25, 0.0], "worked out by hand",
            within=1e-14, given={"q": q, "k": k, "w": w},
        ),
    ]  # fmt: skip


def _hadamard() -> list[Constant]:
    matrix = hadamard_matrix(128)
    rotated = hadamard_rotate(torch.eye(128, dtype=torch.float64))
    product = rotated @ rotated.T
    return [
        Constant(
            "indexer.hadamard_factor", "2", "128^(-1/2): with it the 128 x 128 Hadamard matrix is orthonormal.",
            float(rotated[0, 0]), 0.0883883476, "closed form 128^(-1/2)", within=5e-11,
        ),
        Constant(
            "indexer.hadamard_rows", "2", "Rows 1, 2, 64 and 127 of Sylvester's matrix, before the factor.",
            matrix[list(HADAMARD_ROWS)].int().tolist(),
            [[plain.hadamard_sign(i, j) for j in range(128)] for i in HADAMARD_ROWS], "plain.hadamard_sign",
            arithmetic="exact", given={"rows": list(HADAMARD_ROWS)},
        ),
        Constant(
            "indexer.hadamard_orthonormal", "2",
            "With the factor, of H H^T: the smallest and the largest diagonal entry, and the sum of all squares.",
            [float(product.diagonal().min()), float(product.diagonal().max()), float(product.square().sum())],
            [1.0, 1.0, 128.0], "closed form", within=1e-11,
        ),
        Constant(
            "indexer.hadamard_asymmetric", "2", "Entries in which H and its transpose differ: the gradient turns back by H.",
            int((matrix != matrix.T).sum()), 0, "spec 2, step 6", arithmetic="exact",
        ),
    ]  # fmt: skip


def _fp8() -> list[Constant]:
    amax = [a for a, _ in PRINTED_SCALES] + [1e-5]
    x = torch.zeros(len(amax), 128)
    x[:, 17] = -torch.tensor(amax)
    values = [v for v, _ in E4M3_EXAMPLES]
    # An amax of 448 makes the scale 1, so that the bytes are those of the values themselves.
    block = torch.tensor([values])
    payload, scale = quantize_e4m3(block)
    one = torch.tensor(1.0)
    near = torch.stack([torch.nextafter(one, -one), one, torch.nextafter(one, one + one)]) * 2.0**-8
    return [
        Constant(
            "indexer.e4m3_max", "2", "The largest e4m3 number, to which values are clamped.", E4M3_MAX, 448.0,
            "spec 2, step 7", arithmetic="exact",
        ),
        Constant(
            "indexer.amax_floor", "2", "amax is not smaller than this.", AMAX_FLOOR, 1e-4, "spec 2, step 7",
            arithmetic="exact",
        ),
        Constant(
            "indexer.fp8_scale", "2", "max(amax, 1e-4) / 448 rounded up to a power of two.",
            quantize_e4m3(x)[1].flatten().tolist(), [s for _, s in PRINTED_SCALES] + [2.0**-22],
            "spec 2, step 7, golden values", arithmetic="exact", given={"amax": amax},
        ),
        Constant(
            "indexer.ue8m0", "2",
            "The rounding goes by bits (exponent, + 1 if any mantissa bit): fp32 neighbours of a power of two tell.",
            power_of_two_at_least(near).tolist(), [2.0**-8, 2.0**-8, 2.0**-7], "spec 2, step 7, the bit rule",
            arithmetic="exact", given={"scale": near.tolist()},
        ),
        Constant(
            "indexer.e4m3_bytes", "2", "Payload bytes of one block whose amax is 448 (scale 1); ties go to even.",
            [*payload.view(torch.uint8)[0].tolist(), float(scale[0, 0])], [*(b for _, b in E4M3_EXAMPLES), 1.0],
            "worked out by hand from the format", arithmetic="exact",
            given={"x": values, "last entry of value": "the scale"},
        ),
        *_key_path(),
    ]  # fmt: skip


def _key_path() -> list[Constant]:
    # Thirty-seconds of small size are exact in bf16, and so are sums of 128 of them in fp32. Channel 5 sticks out.
    key = [((11 * i * i + 5 * i + 2) % 67 - 33) / 32 + (12.0 if i == 5 else 0.0) for i in range(128)]
    key = [plain.bf16(v) for v in key]
    rotated = hadamard_rotate(torch.tensor(key, dtype=torch.bfloat16))
    payload, scale = quantize_e4m3(rotated[None])
    again = plain.hadamard_rotate(key)
    again_bytes, again_scale = plain.quantize(again)
    given = {"k": key}
    return [
        Constant(
            "indexer.fp8_rotated", "2", "One key of 128 bf16 channels after the Hadamard rotation, rounded to bf16.",
            rotated.float().tolist(), again, "plain.hadamard_rotate", arithmetic="exact", given=given,
        ),
        Constant(
            "indexer.fp8_payload", "2", "The same key's e4m3 bytes: what the cache holds of it.",
            payload.view(torch.uint8)[0].tolist(), again_bytes, "plain.quantize", arithmetic="exact", given=given,
        ),
        Constant(
            "indexer.fp8_key_scale", "2", "The same key's scale.", float(scale[0, 0]), again_scale, "plain.quantize",
            arithmetic="exact", given=given,
        ),
        Constant(
            "indexer.fp8_read_back", "2", "The same key as it is read back: byte times scale.",
            dequantize_e4m3(payload, scale, torch.float32)[0].tolist(), [_value(b) * again_scale for b in again_bytes],
            "the e4m3 format", arithmetic="exact", given=given,
        ),
    ]  # fmt: skip


def _value(byte: int) -> float:
    exponent, mantissa = (byte >> 3) & 0xF, byte & 7
    size = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
    return -size if byte & 0x80 else size
