"""Safetensors files of a checkpoint directory: what they hold and where, and one tensor's bytes at a time.

A file is opened for each tensor that is read and its bytes go where they shall stay, so that a checkpoint is never
mapped into memory, and neither is a file that somebody replaces while the model lives.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# The safetensors names of the dtypes that torch has too.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
# What torch.save writes, and what only unpickling would read.
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: bytes `[start, start + size)` of `file`; `dtype` by its safetensors name."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor, in its own shape and dtype on the CPU; in the memory of `out` when that is given.

        Raises:
            ValueError: the file is gone, or ends too early.
        """
        if out is None:
            out = torch.empty(self.shape, dtype=DTYPES[self.dtype], device="cpu")
        target = out.view(-1).view(torch.uint8).numpy().data
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.start)
                done = 0
                while done < self.size:
                    got = file.readinto(target[done:])
                    if not got:
                        raise ValueError(f"Checkpoint file {self.file} has been cut since its header was read.")
                    done += got
        except OSError as error:
            raise ValueError(f"Checkpoint file {self.file} cannot be read: {error.strerror}.") from error
        return out


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name.

    Raises:
        ValueError: the file is missing, is no safetensors file, or its size does not fit the tensor that is named.
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
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][1]):
        begin, end = entry["data_offsets"]
        if 8 + length + end > size:
            raise ValueError(f"Checkpoint file {path} is truncated: tensor {name!r} ends after the end of the file.")
        if entry["dtype"] in DTYPES and end - begin != prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize:
            raise ValueError(
                f"Checkpoint file {path} is damaged: tensor {name!r} has {end - begin} bytes, which is not what {entry['dtype']} of shape {entry['shape']} takes."
            )
        tensors[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
    return tensors


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and all(
            isinstance(numbers := entry.get(key), list) and all(isinstance(n, int) and n >= 0 for n in numbers)
            for key in ("shape", "data_offsets")
        )
        and len(entry["data_offsets"]) == 2
        and entry["data_offsets"][0] <= entry["data_offsets"][1]
    )


def held_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint directory: of its one file, or of the files that its index names.

    Raises:
        ValueError: no weights, only pickles, a file that is missing or damaged, or an index that its files contradict.
    """
    index = directory / INDEX_FILE
    single = directory / SINGLE_FILE
    if next(directory.glob("shard-*-model-*.safetensors"), None) is not None:
        raise ValueError(
            f"Checkpoint {directory} is a distributed one, in a part for each rank: write it with save_pretrained or save_official first."
        )
    if not index.is_file():
        if not single.is_file():
            raise ValueError(_no_weights(directory))
        return read_header(single)
    if single.is_file():
        raise ValueError(
            f"Checkpoint {directory} holds {SINGLE_FILE} and {INDEX_FILE}: one of the two is left over; remove it."
        )
    weight_map = _read_index(index)
    headers = {file: read_header(directory / file) for file in sorted(set(weight_map.values()))}
    held = {}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise ValueError(
                f"Checkpoint {directory}: the index places tensor {name!r} in {file}, which does not hold it."
            )
        held[name] = headers[file][name]
    for file, header in headers.items():
        for name in header:
            if weight_map.get(name) != file:
                place = f"places it in {weight_map[name]}" if name in weight_map else "does not name it"
                raise ValueError(f"Checkpoint {directory}: {file} holds tensor {name!r}, but the index {place}.")
    return held


def _read_index(index: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"Checkpoint index {index} cannot be read: it must be JSON with a weight_map.") from error
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"Checkpoint index {index} is damaged: its weight_map must give a file name for each tensor.")
    for name, file in weight_map.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"Checkpoint index {index} places tensor {name!r} in {file!r}; it must be a .safetensors file beside the index."
            )
    return weight_map


def _no_weights(directory: Path) -> str:
    held = sorted(directory.glob("*.safetensors"))
    pickles = sorted(path for pattern in _PICKLES for path in directory.glob(pattern))
    if held:
        return f"Checkpoint {directory} holds {held[0].name}, but neither {INDEX_FILE} nor {SINGLE_FILE}: the index is missing."
    if pickles:
        return f"Checkpoint {directory} holds {pickles[0].name}, which is a pickle and never read: convert it to safetensors first."
    return f"Checkpoint file {directory / SINGLE_FILE} is missing."
