"""Loading: transformers' own `from_pretrained`, fed with one tensor of the files at a time.

transformers places, offloads and initialises; what it is given instead of files is a mapping of parameters that are
read when they are asked for. A parameter is allocated once, on the device and in the dtype where it stays, and every
tensor of the files goes to its place in it: experts into their stack, FP8 dequantised. Beside the model there is in
memory, for each of the loader's few threads, one tensor of the files, which is less than a shard.
"""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers.utils import logging

from .checkpoint import SCALE_SUFFIX, Checkpoint, Part, check_checkpoint, inspect_checkpoint, read_config
from .config import DeepseekV32Config
from .fp8_blocks import check_scale, dequantize_blocks, is_exact
from .shards import DTYPES, StoredTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.get_logger(__name__)

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
# Arguments of from_pretrained that the config has under the same name, and that mean the loader.
_LOADER_ARGUMENTS = frozenset({
    "dtype", "torch_dtype", "attn_implementation", "experts_implementation", "quantization_config",
})  # fmt: skip
# What each of these would read is not safetensors in the official layout, or is code.
_REFUSED_ARGUMENTS: dict[str, Any] = {
    "trust_remote_code": (None, False), "use_safetensors": (None, True), "gguf_file": (None,), "variant": (None,),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StreamedPart:
    """One tensor of the files on its way into a parameter."""

    name: str
    place: Part
    stored: StoredTensor
    scale: StoredTensor | None

    def read_into(self, out: torch.Tensor, rounded: list[str]) -> None:
        """Read, dequantise and round into `out`, a contiguous part of the parameter.

        Adds its name to `rounded` when an FP8 weight was rounded to the dtype of `out`.

        Raises:
            ValueError: a file that is gone or cut, a scale that is NaN, infinite, zero or negative.
        """
        if self.scale is not None:
            scale_PQ = self.scale.read()
            check_scale(self.name + SCALE_SUFFIX, scale_PQ)
            if not is_exact(scale_PQ, out.dtype):
                rounded.append(self.name)
            dequantize_blocks(self.stored.read().to(out.device), scale_PQ.to(out.device), out)
        elif out.device.type == "cpu" and out.dtype == DTYPES[self.stored.dtype]:
            self.stored.read(out)
        else:
            out.copy_(self.stored.read())


class StreamedParameter:
    """A parameter that is read when it is indexed, as transformers' loader does with slices of safetensors files."""

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        parts: list[StreamedPart],
        rounded: list[str],
    ) -> None:
        self.shape, self.dtype, self.device, self.parts, self.rounded = shape, dtype, device, parts, rounded

    def get_shape(self) -> list[int]:
        """As of a safetensors slice."""
        return list(self.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for part in self.parts:
            part.read_into(out[part.place.index], self.rounded)
        return out if index is ... else out[index]


def streamed_parameters(
    checkpoint: Checkpoint, state_dict: Mapping[str, torch.Tensor], load_config: Any, rounded: list[str]
) -> dict[str, StreamedParameter]:
    """Each parameter of `state_dict` (meta tensors) that the checkpoint holds, by name; nothing is read yet.

    `load_config` is transformers': its device map, and the dtypes that differ from the parameter's own. What is then
    read adds to `rounded`, from several threads, the FP8 weights that their dtype does not hold exactly.
    """
    parts: dict[str, list[StreamedPart]] = {}
    for name, place in checkpoint.parts.items():
        part = StreamedPart(name, place, checkpoint.tensors[name], checkpoint.scales.get(name))
        parts.setdefault(place.parameter, []).append(part)
    kept = load_config.dtype_plan or {}
    return {
        name: StreamedParameter(
            state_dict[name].shape,
            next((dtype for pattern, dtype in kept.items() if pattern in name), state_dict[name].dtype),
            _device_of(name, load_config.device_map or {}),
            found,
            rounded,
        )
        for name, found in parts.items()
    }


def _device_of(name: str, device_map: Mapping[str, Any]) -> torch.device:
    """Where `name` is read to: what is offloaded to disk passes through the CPU."""
    while name and name not in device_map:
        name = name.rpartition(".")[0]
    device = device_map.get(name, "cpu")
    return torch.device("cpu" if device == "disk" else device)


def load_streaming(load: Any, model: "PreTrainedModel", checkpoint_files: list[str], load_config: Any) -> Any:
    """transformers' `_load_pretrained_model`, which is `load`, with streamed parameters in place of files.

    Says what is skipped and what is rounded; returns what `load` does.

    Raises:
        ValueError: as `check_checkpoint`, or a scale that is NaN, infinite, zero or negative.
    """
    state_dict = model.state_dict()
    config: Any = model.config
    checkpoint = inspect_checkpoint(Path(checkpoint_files[0]).parent, state_dict, config)
    if checkpoint.skipped:
        logger.warning(
            f"Checkpoint {checkpoint.directory}: {len(checkpoint.skipped)} tensors of layer {config.num_hidden_layers} are skipped: it predicts further tokens, and this model does not have it."
        )
    rounded: list[str] = []
    streamed = streamed_parameters(checkpoint, state_dict, load_config, rounded)
    # Given the files, transformers would offload to disk by pointing at them, where weights are in FP8.
    found = load(model, streamed, None if checkpoint.scales else checkpoint_files, load_config)
    # It notes that nothing had to be stacked, and would then split nothing when it saves.
    del model._weight_conversions
    if rounded:
        logger.warning(
            f"Checkpoint {checkpoint.directory}: {len(rounded)} FP8 weights, {min(rounded)!r} among them, have scales that make {str(load_config.dtype).removeprefix('torch.')} round their products; load in float32 to have them exactly."
        )
    return found


def prepare(
    path: Any, model_class: "type[PreTrainedModel]", config: Any, arguments: dict[str, Any]
) -> tuple[str, DeepseekV32Config, dict[str, Any]]:
    """(directory, config, arguments) for transformers' `from_pretrained`, once the checkpoint has been checked.

    A name that is no directory is fetched from the hub, safetensors and JSON only. The config comes without
    `quantization_config`: once dequantised the model has none.

    Raises:
        ValueError: an argument that would read something else, a path that is not a checkpoint, one that does not fit.
    """
    arguments = dict(arguments)
    for name, allowed in _REFUSED_ARGUMENTS.items():
        if arguments.get(name) not in allowed:
            raise ValueError(
                f"{name} is {arguments[name]!r}; this model reads safetensors in the official layout and nothing else, never a pickle or code: leave it out."
            )
    if arguments.get("offload_buffers"):
        raise ValueError(
            "offload_buffers is True; it must be False, which is the default: the router bias is read between the calls of modules, where nothing brings it back, and all buffers of DeepSeek V3.2 are 60 KB."
        )
    directory = _locate(path, arguments)
    if config is None:
        config = read_config(directory)
        for name in arguments.keys() - _LOADER_ARGUMENTS:
            if hasattr(config, name):
                setattr(config, name, arguments.pop(name))
    elif isinstance(config, (str, os.PathLike)):
        config = read_config(Path(config))
    check_checkpoint(directory, model_class, config)
    if getattr(config, "auto_map", None):
        logger.warning(f"Checkpoint {directory}: its config names code to run (auto_map), which is not run.")
    if getattr(config, "quantization_config", None) is not None:
        config = copy.deepcopy(config)
        del config.quantization_config
        if arguments.get("dtype") is None and arguments.get("torch_dtype") is None and config.dtype is None:
            arguments["dtype"] = torch.bfloat16
    return str(directory), config, arguments


def _locate(path: Any, arguments: dict[str, Any]) -> Path:
    """The directory that `path` names, on this machine or on the hub; takes the arguments about that away."""
    subfolder = arguments.pop("subfolder", None) or ""
    if Path(path).is_dir():
        return Path(path) / subfolder
    if Path(path).exists():
        raise ValueError(f"{path} is a file; a checkpoint is the directory that holds config.json and its shards.")
    hub = {name: arguments.pop(name) for name in _HUB_ARGUMENTS if arguments.get(name) is not None}
    # Offline, some versions of the hub's client ask the network for what they know of a commit that the cache has.
    hub["local_files_only"] = hub.get("local_files_only", False) or constants.HF_HUB_OFFLINE
    try:
        found = snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"], **hub)
    except HFValidationError as error:
        raise ValueError(f"{str(path)!r} is not a directory, nor a name that a model on the hub can have.") from error
    except OSError as error:
        raise ValueError(
            f"{str(path)!r} is not a directory, nor a model that the hub gives: {' '.join(str(error).split())}"
        ) from error
    return Path(found) / subfolder
