"""The official checkpoint layout, checked before it is loaded (spec 4.1).

Files hold experts one by one (`mlp.experts.3.gate_proj.weight`); `state_dict` holds them stacked.
Headers of safetensors files are enough to know every name and shape, so that a damaged checkpoint is
refused in one sentence before any weight is read.
"""

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from .config import DeepseekV32Config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_MTP = re.compile(r"model\.layers\.(\d+)\.")


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


def official_shapes(state_dict: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the official files hold for a model with this `state_dict`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in state_dict.items():
        prefix, _, leaf = name.rpartition(".")
        if prefix.endswith("mlp.experts"):
            experts, rows, columns = tensor.shape
            for i in range(experts):
                if leaf == "down_proj":
                    shapes[f"{prefix}.{i}.down_proj.weight"] = (rows, columns)
                else:
                    shapes[f"{prefix}.{i}.gate_proj.weight"] = (rows // 2, columns)
                    shapes[f"{prefix}.{i}.up_proj.weight"] = (rows // 2, columns)
        else:
            shapes[name] = tuple(tensor.shape)
    return shapes


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name → {dtype, shape, data_offsets} of one safetensors file.

    Raises:
        ValueError: the file is missing, is no safetensors file, or ends before the tensor that is named.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError(
                    f"Checkpoint file {path} ends within its header: it is truncated or no safetensors file."
                )
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise ValueError(f"Checkpoint file {path} is missing.") from error
    except (OSError, struct.error, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"Checkpoint file {path} is not a safetensors file: its header cannot be read.") from error
    if not isinstance(header, dict):
        raise ValueError(f"Checkpoint file {path} is not a safetensors file: its header is no JSON object.")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if not _is_entry(entry):
            raise ValueError(f"Checkpoint file {path} is damaged: its header does not describe tensor {name!r}.")
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][1]):
        if 8 + length + entry["data_offsets"][1] > size:
            raise ValueError(f"Checkpoint file {path} is truncated: tensor {name!r} ends after the end of the file.")
    return header


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and all(
            isinstance(numbers := entry.get(key), list) and all(isinstance(n, int) and n >= 0 for n in numbers)
            for key in ("shape", "data_offsets")
        )
        and len(entry["data_offsets"]) == 2
    )


def check_checkpoint(path: Any, model_class: "type[PreTrainedModel]", config: DeepseekV32Config | None = None) -> None:
    """Refuse a local checkpoint directory that does not hold exactly the tensors of its config.

    A name that is not a local directory is left to transformers.

    Raises:
        ValueError: no config, no weights, or the first tensor that is missing, unknown, truncated, quantised or wrongly
            shaped, by its name.
    """
    directory = Path(path)
    if not directory.is_dir():
        return
    config = config or read_config(directory)
    with torch.device("meta"):
        expected = official_shapes(model_class(config).state_dict())
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    held = _held_tensors(directory)
    for name, shape in expected.items():
        if name not in held:
            raise ValueError(f"Checkpoint {directory} lacks tensor {name!r} of shape {list(shape)}.")
        entry = held[name]
        if tuple(entry["shape"]) != shape:
            raise ValueError(
                f"Checkpoint {directory}: tensor {name!r} has shape {entry['shape']}; its config asks for {list(shape)}."
            )
        if entry["dtype"] not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(
                f"Checkpoint {directory}: tensor {name!r} is stored as {entry['dtype']}; this version reads F64, F32, F16 and BF16: dequantise it first."
            )
    for name in held:
        layer = _MTP.match(name)
        is_mtp = layer is not None and int(layer[1]) >= config.num_hidden_layers
        if name not in expected and not is_mtp:
            raise ValueError(f"Checkpoint {directory} holds tensor {name!r}, which this model does not have.")


def read_config(directory: Path) -> DeepseekV32Config:
    """The config of a local checkpoint directory.

    Raises:
        ValueError: no config.json, or one that is no JSON object, or a field that does not hold.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is not a checkpoint: it has no config.json.")
    try:
        fields = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"Checkpoint config {path} is not JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"Checkpoint config {path} holds no JSON object.")
    return DeepseekV32Config.from_pretrained(directory)


def _held_tensors(directory: Path) -> dict[str, dict[str, Any]]:
    index = directory / INDEX_FILE
    if not index.is_file():
        return read_header(directory / SINGLE_FILE)
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"Checkpoint index {index} cannot be read: it must be JSON with a weight_map.") from error
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"Checkpoint index {index} is damaged: its weight_map must give a file name for each tensor.")
    headers = {file: read_header(directory / file) for file in sorted(set(weight_map.values()))}
    held = {}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise ValueError(
                f"Checkpoint {directory}: the index places tensor {name!r} in {file}, which does not hold it."
            )
        held[name] = headers[file][name]
    return held


def check_loading(path: Any, info: Mapping[str, Any]) -> None:
    """Refuse what transformers' loader had to make up (for checkpoints that are not local directories).

    Raises:
        ValueError: the first tensor that was missing, unknown or did not fit.
    """
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs"):
        if found := info.get(kind):
            first = sorted(map(str, found))[0]
            raise ValueError(f"Checkpoint {path}: {kind.replace('_', ' ')}: {first} ({len(found)} in all).")
