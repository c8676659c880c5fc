"""A writer and reader of the published layout in numpy alone: it shares no code with what it tests (spec 4.1, 4.2).

FP8 and bf16 are bytes here, safetensors files are put together by hand, and scales are taken block by block in loops.

Letters: O rows, I columns of a weight, P and Q its blocks of 128×128.
"""

import json
import math
import struct
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from harness.cases import calibrated_state
from reference import DeepseekV32Config

BLOCK = 128
LAYERS = 3
# Every ragged case: matrices below one block, of whole blocks, and with edges of rows, of columns and of both.
SIZES: dict[str, Any] = {
    "hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": LAYERS, "first_k_dense_replace": 1,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 144, "kv_lora_rank": 128,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 40, "index_n_heads": 8, "index_head_dim": 32,
    "index_topk": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 72,
    "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "vocab_size": 320,
}  # fmt: skip
# Linear layers by their last name; the gate, the head and weights_proj are linear too, and not quantised.
QUANTISED = (
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "wq_b", "wk",
    "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1}


def _e4m3_values() -> np.ndarray:
    """The 256 numbers of e4m3: sign, 4 bits of exponent with bias 7, 3 bits of mantissa; 127 and 255 are NaN."""
    values = np.empty(256, np.float32)
    for byte in range(256):
        exponent, mantissa = byte >> 3 & 15, byte & 7
        size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        values[byte] = math.nan if byte & 127 == 127 else -size if byte > 127 else size
    return values


E4M3 = _e4m3_values()


def to_e4m3(x: np.ndarray) -> np.ndarray:
    """The byte of the nearest number, ties to the even byte, of numbers up to 448 in size."""
    sizes = E4M3[:127].astype(np.float64)
    size = np.abs(x.astype(np.float64))
    above = np.clip(np.searchsorted(sizes, size), 1, 126)
    low, high = sizes[above - 1], sizes[above]
    up = (high - size < size - low) | ((high - size == size - low) & (above % 2 == 0))
    return (np.where(up, above, above - 1) | np.where(np.signbit(x), 128, 0)).astype(np.uint8)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """The upper halves of fp32 numbers, rounded to nearest, ties to even, as uint16."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(halves: np.ndarray) -> np.ndarray:
    """fp32 numbers of bf16 ones."""
    return (halves.astype(np.uint32) << 16).view(np.float32)


def quantise(weight_OI: np.ndarray, power_of_two: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Payload bytes `[O, I]` and fp32 scales `[P, Q]`; a scale brings its block's largest number to 448 or below."""
    rows, columns = weight_OI.shape
    payload_OI = np.empty((rows, columns), np.uint8)
    scale_PQ = np.empty((math.ceil(rows / BLOCK), math.ceil(columns / BLOCK)), np.float32)
    for p, q in product(*map(range, scale_PQ.shape)):
        block = np.s_[p * BLOCK : (p + 1) * BLOCK, q * BLOCK : (q + 1) * BLOCK]
        largest = float(np.abs(weight_OI[block]).max())
        wanted = largest / 448 if largest else 1.0
        scale_PQ[p, q] = 2.0 ** math.ceil(math.log2(wanted)) if power_of_two else wanted * 1.01
        payload_OI[block] = to_e4m3(weight_OI[block].astype(np.float64) / float(scale_PQ[p, q]))
    return payload_OI, scale_PQ


def dequantise(payload_OI: np.ndarray, scale_PQ: np.ndarray) -> np.ndarray:
    """payload · scale in fp32."""
    rows, columns = payload_OI.shape
    weight_OI = np.empty((rows, columns), np.float32)
    for p, q in product(*map(range, scale_PQ.shape)):
        block = np.s_[p * BLOCK : (p + 1) * BLOCK, q * BLOCK : (q + 1) * BLOCK]
        weight_OI[block] = E4M3[payload_OI[block]] * scale_PQ[p, q]
    return weight_OI


@dataclass(frozen=True)
class Raw:
    """One tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, dtype: str, values: np.ndarray) -> "Raw":
        """fp32 numbers, or the bytes of FP8, stored as `dtype`."""
        stored = {"BF16": to_bf16, "F32": np.float32, "F8_E4M3": np.uint8}[dtype](values)
        return cls(dtype, values.shape, stored.tobytes())

    def values(self) -> np.ndarray:
        """What is stored: fp32 numbers, or the bytes of FP8."""
        held = np.frombuffer(self.data, {"BF16": np.uint16, "F32": np.float32, "F8_E4M3": np.uint8}[self.dtype])
        return (from_bf16(held) if self.dtype == "BF16" else held).reshape(self.shape)

    def cast(self, dtype: str) -> "Raw":
        """Zeros of another dtype in the same shape."""
        return replace(self, dtype=dtype, data=bytes(math.prod(self.shape) * ITEM_BYTES[dtype]))

    def reshaped(self, *shape: int) -> "Raw":
        """Ones in another shape; 0x38 is 1 in e4m3."""
        if self.dtype == "F8_E4M3":
            return Raw(self.dtype, shape, b"\x38" * math.prod(shape))
        return Raw.of(self.dtype, np.ones(shape, np.float32))


Tensors = dict[str, Raw]


def official_weights(seed: int = 5) -> dict[str, np.ndarray]:
    """Calibrated fp32 weights of `SIZES` by their official names, experts one by one."""
    config = DeepseekV32Config.preset("tiny", **SIZES)
    weights = {}
    for name, tensor in calibrated_state(config, seed).items():
        prefix, _, leaf = name.rpartition(".")
        if not prefix.endswith(".experts"):
            weights[name] = tensor.numpy()
            continue
        for e, stack in enumerate(tensor.numpy()):
            if leaf == "down_proj":
                weights[f"{prefix}.{e}.down_proj.weight"] = stack
            else:
                middle = SIZES["moe_intermediate_size"]
                weights[f"{prefix}.{e}.gate_proj.weight"] = stack[:middle]
                weights[f"{prefix}.{e}.up_proj.weight"] = stack[middle:]
    return weights


def official_tensors(fp8: bool = True, power_of_two: bool = True, mtp: bool = True) -> Tensors:
    """The files' tensors: linear layers in FP8 (or bf16) with scales, fp32 key norms and router biases, bf16 the rest."""
    tensors: Tensors = {}
    weights = official_weights()
    if mtp:
        own = {"enorm.weight", "hnorm.weight", "shared_head.norm.weight"}
        width = SIZES["hidden_size"]
        last = f"model.layers.{LAYERS - 1}."
        layer = {name.replace(last, ""): w for name, w in weights.items() if name.startswith(last)}
        layer |= {name: np.ones(width, np.float32) for name in own}
        layer["eh_proj.weight"] = np.ones((width, 2 * width), np.float32)
        layer["embed_tokens.weight"] = layer["shared_head.head.weight"] = weights["lm_head.weight"]
        weights |= {f"model.layers.{LAYERS}.{name}": w for name, w in layer.items()}
    for name, weight in weights.items():
        if fp8 and name.split(".")[-2] in QUANTISED:
            payload_OI, scale_PQ = quantise(weight, power_of_two)
            tensors[name] = Raw.of("F8_E4M3", payload_OI)
            tensors[f"{name}_scale_inv"] = Raw.of("F32", scale_PQ)
        else:
            is_fp32 = "k_norm" in name or name.endswith("e_score_correction_bias")
            tensors[name] = Raw.of("F32" if is_fp32 else "BF16", weight)
    return tensors


def true_values(tensors: Tensors) -> dict[str, np.ndarray]:
    """The fp32 weights that `tensors` mean, by official name, without the layer behind the last."""
    return {
        name: dequantise(raw.values(), tensors[f"{name}_scale_inv"].values()) if raw.dtype == "F8_E4M3" else raw.values()
        for name, raw in tensors.items()
        if not name.endswith("_scale_inv") and f".layers.{LAYERS}." not in name
    }  # fmt: skip


def official_config(fp8: bool = True, **fields: Any) -> dict[str, Any]:
    """The published config.json, with `SIZES`."""
    config: dict[str, Any] = {
        "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "torch_dtype": "bfloat16",
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1,
        "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 163840, "moe_layer_freq": 1,
        "norm_topk_prob": True, "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-6, "rope_theta": 10000,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn",
        },
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
        "topk_method": "noaux_tc", "use_cache": True, **SIZES,
    }  # fmt: skip
    if fp8:
        config["quantization_config"] = {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
            "weight_block_size": [BLOCK, BLOCK],
        }  # fmt: skip
    return {**config, **fields}


def write_file(path: Path, tensors: Tensors) -> None:
    """One safetensors file, put together by hand."""
    header, data = {}, b""
    for name, raw in tensors.items():
        header[name] = {"dtype": raw.dtype, "shape": list(raw.shape), "data_offsets": [len(data), len(data + raw.data)]}
        data += raw.data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_checkpoint(directory: Path, tensors: Tensors, config: dict[str, Any] | None = None, shards: int = 6) -> Path:
    """A checkpoint directory: config, index and `shards` files.

    Tensors are dealt out in runs of unequal length, such that some scales lie in another file than their weights.
    """
    directory.mkdir(parents=True, exist_ok=True)
    fp8 = any(raw.dtype == "F8_E4M3" for raw in tensors.values())
    (directory / "config.json").write_text(json.dumps(config or official_config(fp8)))
    names = list(tensors)
    cuts = [len(names) * i // shards | 1 for i in range(1, shards)]
    bounds = [0, *cuts, len(names)]
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:06d}.safetensors"
        held = names[bounds[i] : bounds[i + 1]]
        write_file(directory / file, {name: tensors[name] for name in held})
        weight_map.update(dict.fromkeys(held, file))
    index = {"metadata": {"total_size": sum(len(raw.data) for raw in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
