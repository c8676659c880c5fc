"""Saving in the official layout: shards with an index, in bf16 or FP8 (spec 4.1, 4.2).

Names, dtypes and file names are those of the published files, so that what reads them reads this. A shard is made,
written and let go before the next, so that beside the model there is one shard in memory.
"""

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from transformers.utils import logging

from .checkpoint import QUANTIZATION_CONFIG, SCALE_SUFFIX, Part, is_fp32, is_quantised, official_parts
from .fp8_blocks import dequantize_blocks, quantize_blocks, scale_shape
from .model import DeepseekV32ForCausalLM
from .shards import INDEX_FILE

logger = logging.get_logger(__name__)

CheckpointFormat = Literal["bf16", "fp8"]


@dataclass(frozen=True, slots=True)
class Saved:
    """What `save_official` wrote: its files, their bytes of weights, and the tensors that were rounded."""

    files: tuple[str, ...]
    total_bytes: int
    rounded: tuple[str, ...]


def save_official(
    model: DeepseekV32ForCausalLM, path: str | Path, format: CheckpointFormat = "bf16", *,
    shard_size: int | str = "5GB",
) -> Saved:  # fmt: skip
    """Write `model` to the directory `path`, which must not exist or be empty.

    The index keys' norm and the router bias are written in fp32; the linear layers, without head and gates, in FP8
    with power-of-two scales when `format` is `"fp8"`; everything else in bf16. Numbers that were read from FP8 with
    such scales come back bit for bit in either format. What the format cannot hold is rounded to nearest, once, and a
    warning says how many tensors that were.

    The directory appears when it is complete: until then its files are in a hidden one beside it.

    Args:
        shard_size: most bytes of weights in a file, or text such as "5GB"; a larger tensor has a file of its own.

    Raises:
        ValueError: another format or shard size, a directory that holds something, a model with adapters, a weight
            with NaN or an infinity that is to be quantised.
    """
    if format not in ("bf16", "fp8"):
        raise ValueError(f"format is {format!r}; it must be 'bf16' or 'fp8'.")
    if not isinstance(model, DeepseekV32ForCausalLM):
        raise ValueError(
            f"model is a {type(model).__name__}; it must be a DeepseekV32ForCausalLM: merge adapters first (model.merge_and_unload())."
        )
    target = Path(path).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"path is {path}, which already holds something; give a directory that is new or empty.")
    shards = _shards(_entries(model, format), _bytes(shard_size))
    target.parent.mkdir(parents=True, exist_ok=True)
    hidden = target.with_name(f".{target.name}.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir()
    try:
        weight_map, rounded = {}, []
        files = [f"model-{i:05d}-of-{len(shards):06d}.safetensors" for i in range(1, len(shards) + 1)]
        with _Weights(model) as weights:
            for file, entries in zip(files, shards, strict=True):
                tensors: dict[str, torch.Tensor] = {}
                for entry in entries:
                    if not entry.write(weights.of(entry.part), tensors):
                        rounded.append(entry.name)
                weight_map.update(dict.fromkeys(tensors, file))
                save_file(tensors, hidden / file, metadata={"format": "pt"})
        total = sum(entry.size for entries in shards for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (hidden / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
        _save_config(model, hidden, format)
        if target.exists():
            target.rmdir()
        hidden.rename(target)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    if rounded:
        logger.warning(
            f"Checkpoint {target}: {len(rounded)} tensors, {min(rounded)!r} among them, hold numbers that {format} does not; they were rounded."
        )
    return Saved(tuple(files), total, tuple(rounded))


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of the files to be, with its scales if it has some; `size` in bytes."""

    name: str
    part: Part
    dtype: torch.dtype
    size: int

    def write(self, source: torch.Tensor, tensors: dict[str, torch.Tensor]) -> bool:
        """Put `source`, and its scales, into `tensors` in this entry's dtype; whether every number survives."""
        if self.dtype != torch.float8_e4m3fn:
            tensors[self.name] = source.to("cpu", self.dtype, copy=True).contiguous()
            return torch.equal(tensors[self.name].to(source.dtype), source.cpu())
        try:
            payload, scale = quantize_blocks(source)
        except ValueError as error:
            raise ValueError(f"Tensor {self.name!r} holds NaN or an infinity, which FP8 blocks cannot.") from error
        back = dequantize_blocks(payload, scale, torch.empty_like(source))
        tensors[self.name], tensors[self.name + SCALE_SUFFIX] = payload.cpu(), scale.cpu()
        return torch.equal(back, source)


class _Weights:
    """A model's weights by part; what is offloaded is brought back, and stays until another module is asked for."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._module: torch.nn.Module | None = None
        self._brought_back = ExitStack()

    def __enter__(self) -> "_Weights":
        return self

    def __exit__(self, *error: Any) -> None:
        self._brought_back.close()

    def of(self, part: Part) -> torch.Tensor:
        """`parameter[index]`, without gradient."""
        name, _, leaf = part.parameter.rpartition(".")
        module = self._model.get_submodule(name)
        if module is not self._module:
            self._brought_back.close()
            self._module = module
            if any(tensor.is_meta for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
                from accelerate.utils import align_module_device  # type: ignore[import-untyped]

                self._brought_back.enter_context(align_module_device(module, torch.device("cpu")))
        value: torch.Tensor = getattr(module, leaf)
        return value.detach()[part.index]


def _entries(model: DeepseekV32ForCausalLM, format: CheckpointFormat) -> Iterator[_Entry]:
    """Every tensor to be written, in the model's order."""
    state_dict = model.state_dict()
    with torch.device("meta"):
        official = type(model)(model.config).state_dict()
    for name in state_dict:
        if name not in official:
            raise ValueError(
                f"The model has tensor {name!r}, which the official layout does not: merge adapters first (model.merge_and_unload())."
            )
    for name, part in official_parts(state_dict).items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        dtype = torch.float32 if is_fp32(name) else torch.bfloat16
        size = prod(part.shape) * dtype.itemsize
        if format == "fp8" and is_quantised(name):
            dtype = torch.float8_e4m3fn
            rows, columns = part.shape
            size = prod(part.shape) + 4 * prod(scale_shape((rows, columns)))
        yield _Entry(name, part, dtype, size)


def _shards(entries: Iterator[_Entry], most: int) -> list[list[_Entry]]:
    shards: list[list[_Entry]] = []
    held = most
    for entry in entries:
        if held + entry.size > most:
            shards.append([])
            held = 0
        shards[-1].append(entry)
        held += entry.size
    return shards


def _bytes(size: int | str) -> int:
    from accelerate.utils import convert_file_size_to_int

    try:
        most: int = convert_file_size_to_int(size)
    except (ValueError, TypeError) as error:
        raise ValueError(f"shard_size is {size!r}; it must be a number of bytes, or text such as '5GB'.") from error
    if most < 1:
        raise ValueError(f"shard_size is {size!r}; it must be at least 1 byte.")
    return most


def _save_config(model: DeepseekV32ForCausalLM, directory: Path, format: CheckpointFormat) -> None:
    config: Any = copy.deepcopy(model.config)
    config.dtype = torch.bfloat16
    config.architectures = ["DeepseekV32ForCausalLM"]
    # What a config may say of the files that it came with: their quantisation, and code beside them.
    for name in ("quantization_config", "auto_map"):
        config.__dict__.pop(name, None)
    if format == "fp8":
        config.quantization_config = dict(QUANTIZATION_CONFIG)
    config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
