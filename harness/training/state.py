"""Where a training run stands, on disk: written so that a process killed at any moment can be followed exactly.

A state is a folder `step-00000040`: `tensors.safetensors` (weights, optimizers, random numbers) and `state.json` (step,
identity of the run, evidence of the audit, digests of all files). It is written under another name, flushed, and
renamed when it is whole. The last two are kept. Nothing is pickled.

Several ranks write a folder `shards` in place of the one file, in the format of torch.distributed.checkpoint, each what
it holds. torch pickles its index, whose digest is checked first. Either kind is read by one process and by any number of
ranks.

The data needs no state: a batch is a function of seed and step (data.py), and so are the learning rates (optimizers.py).
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reports.strict_json import JSON

from .audit import named_tensors
from .ranks import is_first, on_first, ranks_of

FOLDER = "state"
TENSORS, SHARDS, FACTS = "tensors.safetensors", "shards", "state.json"
KEPT = 2
VERSION = 1
_NAME = re.compile(r"step-(\d{8})")
_PARTIAL = re.compile(r"\.step-\d{8}\.[0-9a-f]+\.tmp")


class StateError(ValueError):
    """A state that is damaged, or of another run; one sentence."""


@dataclass(frozen=True, slots=True)
class State:
    """A state that was read and found whole: `step` steps are done. `tensors` is None where it lies in shards."""

    path: Path
    step: int
    facts: dict[str, JSON]
    tensors: dict[str, Tensor] | None


def save_state(
    out: Path, step: int, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], identity: Mapping[str, JSON],
    extra: Mapping[str, JSON],
) -> Path:  # fmt: skip
    """Write the state after `step` steps below `out`, then remove all but the last two.

    `identity` says which run this is, and must be the same when it is read; `extra` is given back as it is.

    Raises:
        OSError: the folder cannot be written; the states that were there stay.
    """
    target = out / FOLDER / f"step-{step:08d}"
    facts = {"version": VERSION, "step": step, "identity": dict(identity), "extra": dict(extra)}
    partial = on_first(lambda: _new_partial(target))
    try:
        if ranks_of(model) is None:
            _write_tensors(partial / TENSORS, _tensors(model, optimizers))
        else:
            _write_shards(partial / SHARDS, model, optimizers)
        on_first(lambda: _complete(partial, target, facts))
    except BaseException:
        if is_first():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _new_partial(target: Path) -> Path:
    folder = target.parent
    folder.mkdir(parents=True, exist_ok=True)
    for name in os.listdir(folder):
        # Left behind by a process that was killed while it wrote.
        if _PARTIAL.fullmatch(name):
            shutil.rmtree(folder / name)
    partial = folder / f".{target.name}.{secrets.token_hex(4)}.tmp"
    partial.mkdir()
    return partial


def _complete(partial: Path, target: Path, facts: dict[str, JSON]) -> None:
    """Give a state whose tensors are written its facts and its name, then remove all but the last two."""
    if (partial / TENSORS).exists():
        facts["tensors_sha256"] = _sha256(partial / TENSORS)
    else:
        facts["shards_sha256"] = {path.name: _sha256(path) for path in sorted((partial / SHARDS).iterdir())}
    _write(partial / FACTS, json.dumps({**facts, "sha256": _checksum(facts)}, indent=1))
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    _flush(target.parent)
    for _, path in states(target.parent.parent)[:-KEPT]:
        shutil.rmtree(path)


def states(out: Path) -> list[tuple[int, Path]]:
    """The states below `out`, (steps done, folder), the last one last; not looked into yet."""
    folder = out / FOLDER
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted((int(found[1]), folder / name) for name in names if (found := _NAME.fullmatch(name)))


def read_state(out: Path, identity: Mapping[str, JSON]) -> State | None:
    """The last state below `out`; None where there is none.

    Raises:
        StateError: it is damaged, or its run was not the one of `identity`. An older state is never taken in its place
            without being asked for.
    """
    found = states(out)
    if not found:
        return None
    step, path = found[-1]
    facts = _facts(path, found)
    if facts["step"] != step:
        raise StateError(_damaged(path, found, f"{FACTS} says step {facts['step']}"))
    _check_identity(path, facts["identity"], identity)
    if "shards_sha256" in facts:
        on_first(lambda: _check_shards(path, found, facts["shards_sha256"]))
        return State(path, step, facts, None)
    try:
        intact = _sha256(path / TENSORS) == facts["tensors_sha256"]
        tensors = load_file(path / TENSORS) if intact else {}
    except (OSError, SafetensorError) as error:
        raise StateError(_damaged(path, found, f"{TENSORS} cannot be read ({error})")) from error
    if not intact:
        raise StateError(_damaged(path, found, f"{TENSORS} does not have the bytes that {FACTS} names"))
    return State(path, step, facts, tensors)


def restore(
    state: State, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]
) -> tuple[dict[str, JSON], list[str]]:
    """Put a state into a model and optimizers that were built as for its first step.

    What one process wrote is read by each of several ranks, which keeps its part.

    Returns:
        The state's `extra`, and a sentence for whatever makes this run go on with other bits than an unbroken one.

    Raises:
        StateError: a tensor is missing, too many, or of another shape or dtype.
    """
    optimizers = list(optimizers)
    extra: dict[str, JSON] = state.facts["extra"]
    if state.tensors is None:
        _restore_shards(state.path, model, optimizers)
        return extra, []
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "random": {}}
    for name, tensor in state.tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    _restore_model(state.path, model, parts["model"])
    _restore_optimizers(state.path, model, optimizers, parts["optimizer"])
    notes = _restore_random(state.path, parts["random"], next(model.parameters()).device)
    if ranks_of(model) is not None:
        notes.append(f"State {state.path} is of one process: on several ranks the run goes on equal to rounding.")
    return extra, notes


def _restore_random(path: Path, saved: Mapping[str, Tensor], device: torch.device) -> list[str]:
    """Set the generators that the state knows; says which of a model on `device` it does not."""
    torch.set_rng_state(saved["cpu"])
    if not torch.cuda.is_available():
        return []
    missing = []
    for i in range(torch.cuda.device_count()):
        if f"cuda{i}" in saved:
            torch.cuda.set_rng_state(saved[f"cuda{i}"], i)
        else:
            missing.append(str(i))
    if not missing or device.type != "cuda":
        return []
    return [
        f"State {path} holds no random numbers of GPU {', '.join(missing)}, where none was when it was written: the run "
        "goes on, but not bit for bit."
    ]


def _tensors(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    names = {id(tensor): name for name, tensor in named_tensors(model).items()}
    found = {f"model.{name}": tensor.detach() for name, tensor in named_tensors(model).items()}
    for i, optimizer in enumerate(optimizers):
        for tensor, values in optimizer.state.items():
            for key, value in values.items():
                # Steps are counted in tensors by some optimizers and in numbers by others.
                found[f"optimizer.{i}.{key}.{names[id(tensor)]}"] = torch.as_tensor(value).detach()
    found["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        found.update({f"random.cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


def _write_shards(folder: Path, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    from optimized.distributed import checkpoint_tensors, save_checkpoint

    # One seed for all ranks, so that the numbers of one are those of all.
    save_checkpoint(folder, {**checkpoint_tensors(model, optimizers), "random.cpu": torch.get_rng_state()})


def _restore_shards(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    from optimized.distributed import load_checkpoint

    try:
        more = load_checkpoint(path / SHARDS, model, optimizers)
    except ValueError as error:
        raise StateError(f"State {path} does not fit: {error}") from error
    torch.set_rng_state(more["random.cpu"])


def _check_shards(path: Path, found: list[tuple[int, Path]], expected: Mapping[str, str]) -> None:
    folder = path / SHARDS
    there = {file.name: _sha256(file) for file in folder.iterdir()} if folder.is_dir() else {}
    wrong = next((name for name in sorted(there.keys() | expected) if there.get(name) != expected.get(name)), None)
    if wrong is not None:
        raise StateError(_damaged(path, found, f"{SHARDS}/{wrong} does not have the bytes that {FACTS} names"))


def _restore_model(path: Path, model: nn.Module, saved: dict[str, Tensor]) -> None:
    own = named_tensors(model)
    if missing := own.keys() ^ saved.keys():
        raise StateError(f"State {path} and the model do not both have tensor {min(missing)!r}.")
    with torch.no_grad():
        for name, tensor in own.items():
            if (saved[name].shape, saved[name].dtype) != (tensor.shape, tensor.dtype):
                raise StateError(
                    f"State {path}: tensor {name!r} is {saved[name].dtype} {list(saved[name].shape)}; "
                    f"the model's is {tensor.dtype} {list(tensor.shape)}."
                )
            tensor.copy_(_placed_as(tensor, saved[name]))


def _restore_optimizers(
    path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], saved: dict[str, Tensor]
) -> None:
    by_name = named_tensors(model)
    states: list[dict[Tensor, dict[str, Any]]] = [{} for _ in optimizers]
    for label, value in saved.items():
        i, key, name = label.split(".", 2)
        if name not in by_name or int(i) >= len(optimizers):
            raise StateError(f"State {path}: optimizer {i} kept {key!r} of {name!r}, which this run does not train.")
        parameter = by_name[name]
        # Moments have the shape of their parameter, and lie where it lies; counts of steps are whole everywhere.
        placed = _placed_as(parameter, value) if value.shape == parameter.shape else value
        states[int(i)].setdefault(parameter, {})[key] = placed
    for optimizer, found in zip(optimizers, states, strict=True):
        # Groups and rates are functions of the stage and the step; only what was accumulated is read back.
        groups = optimizer.state_dict()["param_groups"]
        order = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        numbers = {id(tensor): number for number, tensor in enumerate(order)}
        optimizer.load_state_dict(
            {"state": {numbers[id(tensor)]: values for tensor, values in found.items()}, "param_groups": groups}
        )


def _placed_as(like: Tensor, whole: Tensor) -> Tensor:
    """`whole` itself, or this rank's part of it where `like` is spread over ranks; nothing is sent."""
    if not hasattr(like, "placements"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh = cast(Any, like).device_mesh
    return distribute_tensor(whole.to(like.device), mesh, cast(Any, like).placements, src_data_rank=None)


def _facts(path: Path, found: list[tuple[int, Path]]) -> dict[str, Any]:
    try:
        facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StateError(_damaged(path, found, f"{FACTS} cannot be read as JSON")) from error
    if not isinstance(facts, dict) or facts.get("version") != VERSION:
        raise StateError(_damaged(path, found, f"{FACTS} is not of version {VERSION}"))
    if facts.pop("sha256", None) != _checksum(facts):
        raise StateError(_damaged(path, found, f"{FACTS} does not have the content that its own digest names"))
    return facts


def _damaged(path: Path, found: list[tuple[int, Path]], why: str) -> str:
    before = found[-2][0] if len(found) > 1 else 0
    return f"State {path} is damaged: {why}; remove that folder to go on from step {before}."


def _check_identity(path: Path, saved: Mapping[str, JSON], own: Mapping[str, JSON]) -> None:
    # What was saved went through JSON, in which a tuple is a list.
    given = json.loads(json.dumps(dict(own)))
    for key in sorted(given.keys() | saved.keys()):
        before, now = saved.get(key), given.get(key)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            inner = next(k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k))
            key, before, now = f"{key}.{inner}", before.get(inner), now.get(inner)
        raise StateError(f"State {path} is of another run: {key} was {_short(before)}, and is {_short(now)} now.")


def _short(value: JSON) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _checksum(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        # What the disk refuses comes as an error of the library's own.
        raise OSError(f"{path.name} cannot be written: {error}") from error
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
