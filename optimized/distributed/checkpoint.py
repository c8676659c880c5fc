"""Checkpoints of many ranks, by torch.distributed.checkpoint: each rank writes what it holds, any world reads it again.

A checkpoint is a flat dictionary of tensors under plain names, and says nothing of the ranks that wrote it:

    model.<parameter or buffer>        optimizer.<number>.<what is kept>.<parameter>

Tensors are stored by their place in the whole tensor, so that it is read on another number of ranks, on another layout,
or by one process without a process group. torch pickles the index of these files (`.metadata`): read only what you wrote.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from optimized.model import DeepseekV32ForCausalLM
from reference.training import named_tensors

Named = dict[str, Tensor]


def checkpoint_tensors(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> Named:
    """What a checkpoint of a model and its optimizers holds, by its names; no copies."""
    tensors = named_tensors(model)
    names = {id(tensor): name for name, tensor in tensors.items()}
    found = {f"model.{name}": tensor.detach() for name, tensor in tensors.items()}
    for i, optimizer in enumerate(optimizers):
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                found[f"optimizer.{i}.{key}.{names[id(parameter)]}"] = torch.as_tensor(value).detach()
    return found


def save_checkpoint(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` into `folder`, which must be empty or new; every rank calls it with the same names.

    The files are flushed, but the folder is not renamed: whoever wants all or nothing writes elsewhere first.

    Raises:
        OSError: on all ranks, where one of them could not write.
    """
    try:
        dcp.save(dict(tensors), checkpoint_id=folder, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise OSError(f"{folder} cannot be written: {_first_of(error)}") from error


def _first_of(error: CheckpointException) -> str:
    """What the first rank that failed said."""
    rank, failure = min(error.failures.items())
    # A failure is the exception with the traceback of its rank.
    return f"rank {rank} failed with {failure[0]!r}"


def stored(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each tensor of a checkpoint, by name.

    Raises:
        ValueError: `folder` holds no checkpoint, or one with something else than tensors.
    """
    try:
        metadata = dcp.FileSystemReader(folder).read_metadata()
    except (OSError, EOFError) as error:
        raise ValueError(f"{folder} holds no checkpoint of torch.distributed.checkpoint: {error}.") from error
    found = {}
    for name, item in metadata.state_dict_metadata.items():
        if not isinstance(item, TensorStorageMetadata):
            raise ValueError(f"{folder} holds {name}, which is no tensor; it is not a checkpoint of this model.")
        found[name] = (item.size, item.properties.dtype)
    return found


def load_checkpoint(folder: Path, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> Named:
    """Put a checkpoint into a model and its optimizers, however many ranks wrote it; gives back what belongs to neither.

    The optimizers are as they were built; only what they have accumulated is read.

    Raises:
        ValueError: no checkpoint, or a tensor that is missing, unknown, or of another shape or dtype, by its name.
    """
    optimizers = list(optimizers)
    there, own = stored(folder), named_tensors(model)
    wanted: Named = {}
    for name, tensor in own.items():
        _check(folder, f"model.{name}", tensor, there)
        wanted[f"model.{name}"] = tensor.detach()
    states: list[dict[Tensor, dict[str, Tensor]]] = [{} for _ in optimizers]
    more: Named = {}
    for label, (shape, dtype) in there.items():
        if label in wanted:
            continue
        if not label.startswith("optimizer."):
            if label.startswith("model."):
                raise ValueError(f"{folder} holds tensor {label!r}, which the model does not have.")
            wanted[label] = more[label] = torch.empty(shape, dtype=dtype)
            continue
        _, i, key, name = label.split(".", 3)
        if not optimizers:
            continue
        if int(i) >= len(optimizers) or name not in own:
            raise ValueError(f"{folder}: optimizer {i} kept {key!r} of {name!r}, which this run does not train.")
        parameter = own[name]
        # What has the shape of the parameter is sharded as that is.
        place = torch.empty_like(parameter.detach(), dtype=dtype)
        wanted[label] = place if shape == parameter.shape else torch.empty(shape, dtype=dtype)
        states[int(i)].setdefault(parameter, {})[key] = wanted[label]
    try:
        dcp.load(dict(wanted), checkpoint_id=folder, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise ValueError(f"{folder} cannot be read: {_first_of(error)}") from error
    for optimizer, found in zip(optimizers, states, strict=True):
        _restore_state(optimizer, found)
    return more


def _check(folder: Path, label: str, tensor: Tensor, there: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
    if label not in there:
        raise ValueError(f"{folder} lacks tensor {label!r}, which the model has.")
    shape, dtype = there[label]
    if (shape, dtype) != (tensor.shape, tensor.dtype):
        raise ValueError(
            f"{folder}: tensor {label!r} is {dtype} {list(shape)}; the model's is {tensor.dtype} {list(tensor.shape)}."
        )


def _restore_state(optimizer: torch.optim.Optimizer, found: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
    order = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    numbers = {id(tensor): number for number, tensor in enumerate(order)}
    state: dict[str, Any] = {
        "state": {numbers[id(tensor)]: dict(values) for tensor, values in found.items()},
        "param_groups": optimizer.state_dict()["param_groups"],
    }
    optimizer.load_state_dict(state)


@torch.no_grad()
def full_state_dict(model: nn.Module) -> Named:
    """The whole `state_dict` in the memory of the first rank, empty on the others; every rank must call it."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    found = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if first:
            found[name] = whole.detach().cpu()
    return found


def plain_model(model: DeepseekV32ForCausalLM) -> DeepseekV32ForCausalLM | None:
    """The plain model with these weights, on the CPU of the first rank; None on the others, which must call it too.

    Its `save_pretrained` writes the official files.
    """
    weights = full_state_dict(model)
    if not weights:
        return None
    with torch.device("meta"):
        plain = DeepseekV32ForCausalLM(model.config)
    plain.to_empty(device="cpu")
    plain.load_state_dict(weights, assign=True)
    return plain
