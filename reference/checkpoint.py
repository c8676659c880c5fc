"""The official checkpoint layout, checked before it is loaded (spec 4.1, 4.2).

Files hold experts one by one (`mlp.experts.3.gate_proj.weight`); `state_dict` holds them stacked. The linear layers
of the published files are FP8, each with its scales beside it; the rest is bf16 or fp32. Headers of safetensors files
are enough to know every name, shape and dtype, so that a damaged checkpoint is refused in one sentence before any
weight is read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from .config import DeepseekV32Config
from .fp8 import BLOCK
from .fp8_blocks import scale_shape
from .shards import StoredTensor, held_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCALE_SUFFIX = "_scale_inv"
# What config.json says of the published files' FP8.
QUANTIZATION_CONFIG: dict[str, Any] = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
    "weight_block_size": [BLOCK, BLOCK],
}  # fmt: skip
_PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")
_QUANTISED_LAYERS = frozenset({
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "wq_b", "wk",
    "gate_proj", "up_proj", "down_proj",
})  # fmt: skip
_FP32_TENSORS = ("k_norm.weight", "k_norm.bias", "e_score_correction_bias")


def use_official_names() -> None:
    """Have transformers split and stack experts for our classes as it does for its own `deepseek_v32`.

    It keeps this mapping from classes outside its package unless somebody registers it: the mapping stays the same.
    """
    mapping = get_checkpoint_conversion_mapping(DeepseekV32Config.model_type)
    if not mapping:
        raise RuntimeError(
            "transformers has no checkpoint mapping for deepseek_v32; use a version of the tested range."
        )
    register_checkpoint_conversion_mapping(DeepseekV32Config.model_type, mapping, overwrite=True)


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a parameter that one tensor of the files holds: `parameter[index]`, of `shape`."""

    parameter: str
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]


def official_parts(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Part]:
    """The tensors that the official files hold for a model with this `state_dict`, by name, in its order."""
    parts: dict[str, Part] = {}
    for name, tensor in state_dict.items():
        prefix, _, leaf = name.rpartition(".")
        if not prefix.endswith("mlp.experts"):
            parts[name] = Part(name, (), tuple(tensor.shape))
            continue
        experts, rows, columns = tensor.shape
        for i in range(experts):
            if leaf == "down_proj":
                parts[f"{prefix}.{i}.down_proj.weight"] = Part(name, (i,), (rows, columns))
            else:
                half = rows // 2
                parts[f"{prefix}.{i}.gate_proj.weight"] = Part(name, (i, slice(half)), (half, columns))
                parts[f"{prefix}.{i}.up_proj.weight"] = Part(name, (i, slice(half, rows)), (half, columns))
    return parts


def is_quantised(name: str) -> bool:
    """Whether the published files hold the tensor called `name` in FP8: the linear layers, without head and gates."""
    layer, _, leaf = name.rpartition(".")
    return leaf == "weight" and layer.rpartition(".")[2] in _QUANTISED_LAYERS


def is_fp32(name: str) -> bool:
    """Whether the published files hold the tensor called `name` in fp32: the index keys' norm and the router bias."""
    return name.endswith(_FP32_TENSORS)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint directory that holds exactly what a model asks for.

    `tensors` and `parts` have the same names; `scales` gives, to the name of an FP8 weight, its scales; `skipped`
    names the tensors of the multi-token-prediction layer, which no model here has.
    """

    directory: Path
    parts: Mapping[str, Part]
    tensors: Mapping[str, StoredTensor]
    scales: Mapping[str, StoredTensor]
    skipped: tuple[str, ...]


def check_checkpoint(path: Any, model_class: "type[PreTrainedModel]", config: DeepseekV32Config | None = None) -> None:
    """Refuse a checkpoint directory that does not hold exactly the tensors of its config.

    Raises:
        ValueError: no config, no weights, or the first tensor that is missing, unknown, truncated, wrongly typed or
            wrongly shaped, by its name.
    """
    directory = Path(path)
    config = config or read_config(directory)
    with torch.device("meta"):
        state_dict = model_class(config).state_dict()
    inspect_checkpoint(directory, state_dict, config)


def inspect_checkpoint(
    directory: Path, state_dict: Mapping[str, torch.Tensor], config: DeepseekV32Config
) -> Checkpoint:
    """What `directory` holds for a model with this `state_dict`, checked by the headers of its files.

    Raises:
        ValueError: as `check_checkpoint`.
    """
    parts = official_parts(state_dict)
    if config.tie_word_embeddings:
        parts.pop("lm_head.weight", None)
    held = held_tensors(directory)
    skipped = _mtp_tensors(held, config.num_hidden_layers)
    is_fp8 = _says_fp8(directory, config)
    scales = {}
    for name, part in parts.items():
        if name not in held:
            raise ValueError(f"Checkpoint {directory} lacks tensor {name!r} of shape {list(part.shape)}.")
        stored = held[name]
        if stored.shape != part.shape:
            raise ValueError(
                f"Checkpoint {directory}: tensor {name!r} has shape {list(stored.shape)}; its config asks for {list(part.shape)}."
            )
        if stored.dtype == "F8_E4M3" and is_quantised(name):
            if not is_fp8:
                raise ValueError(
                    f"Checkpoint {directory}: tensor {name!r} is stored as F8_E4M3, but its config has no quantization_config that says so."
                )
            scales[name] = _scale_of(name, held, directory)
        elif stored.dtype not in _PLAIN_DTYPES:
            allowed = f"{', '.join(_PLAIN_DTYPES)}{', F8_E4M3' if is_quantised(name) else ''}"
            raise ValueError(
                f"Checkpoint {directory}: tensor {name!r} is stored as {stored.dtype}; it must be one of {allowed}."
            )
    known = {*parts, *skipped, *(name + SCALE_SUFFIX for name in scales)}
    for name in held:
        if name not in known:
            weight = name.removesuffix(SCALE_SUFFIX)
            if weight != name and weight in parts:
                raise ValueError(
                    f"Checkpoint {directory} holds scale {name!r}, but its weight is stored as {held[weight].dtype}, which has none."
                )
            raise ValueError(f"Checkpoint {directory} holds tensor {name!r}, which this model does not have.")
    return Checkpoint(directory, parts, {name: held[name] for name in parts}, scales, skipped)


def _mtp_tensors(held: Mapping[str, StoredTensor], layers: int) -> tuple[str, ...]:
    # Published behind the last layer. A decoder layer too many is not one: it has no eh_proj.
    prefix = f"model.layers.{layers}."
    if f"{prefix}eh_proj.weight" not in held:
        return ()
    return tuple(name for name in held if name.startswith(prefix))


def _scale_of(name: str, held: Mapping[str, StoredTensor], directory: Path) -> StoredTensor:
    scale = name + SCALE_SUFFIX
    expected = scale_shape(held[name].shape)
    if scale not in held:
        raise ValueError(
            f"Checkpoint {directory} lacks scale {scale!r} of shape {list(expected)}: its weight is stored as F8_E4M3."
        )
    if held[scale].dtype != "F32":
        raise ValueError(f"Checkpoint {directory}: scale {scale!r} is stored as {held[scale].dtype}; it must be F32.")
    if held[scale].shape != expected:
        raise ValueError(
            f"Checkpoint {directory}: scale {scale!r} has shape {list(held[scale].shape)}; a weight of shape {list(held[name].shape)} has {list(expected)}."
        )
    return held[scale]


def _says_fp8(directory: Path, config: DeepseekV32Config) -> bool:
    """Whether the directory's config.json, or where there is none the given config, says that linear layers are FP8."""
    if (directory / "config.json").is_file():
        said = _read_json(directory).get("quantization_config")
    else:
        said = getattr(config, "quantization_config", None)
    if said is None:
        return False
    for name in ("quant_method", "fmt", "weight_block_size"):
        allowed = QUANTIZATION_CONFIG[name]
        if said.get(name, allowed if name == "fmt" else None) != allowed:
            raise ValueError(
                f"Checkpoint {directory}: quantization_config has {name} {said.get(name)!r}; this version reads {allowed!r}."
            )
    return True


def read_config(directory: Path) -> DeepseekV32Config:
    """The config of a local checkpoint directory.

    Raises:
        ValueError: no config.json, or one that is no JSON object, or a field that does not hold.
    """
    _read_json(directory)
    return DeepseekV32Config.from_pretrained(directory)


def _read_json(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is not a checkpoint: it has no config.json.")
    try:
        fields = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"Checkpoint config {path} is not JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"Checkpoint config {path} holds no JSON object.")
    if not isinstance(said := fields.get("quantization_config"), (dict, type(None))):
        raise ValueError(f"Checkpoint config {path}: quantization_config is {said!r}; it must be an object.")
    return fields


def check_loading(path: Any, info: Mapping[str, Any]) -> None:
    """Refuse a model of which transformers' loader says that it made something up.

    Raises:
        ValueError: the first tensor that was missing, unknown or did not fit.
    """
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs"):
        if found := info.get(kind):
            first = sorted(map(str, found))[0]
            raise ValueError(f"Checkpoint {path}: {kind.replace('_', ' ')}: {first} ({len(found)} in all).")
