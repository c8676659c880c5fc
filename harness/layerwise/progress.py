"""What a walk has done, kept so that a later process goes on from there: the hidden states behind the last whole layer.

A layer's verdicts are in the record before its hidden states are in the file, and the file takes the place of the one
before in one step. So whenever a walk is cut, the record holds every layer that the file says is done.

Letters: B batch, L tokens, M hidden_size.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from reports.records import JSON, RUN_FILE, Run, RunWriter, read_run

from .source import Source

STATE_FILE = "hidden-states.safetensors"
# Under this name until it holds all that is kept of the record before: a kill in between loses nothing.
_NEXT = f".{RUN_FILE}.next"
LAYER_EVENT = "layer"


@dataclass(frozen=True, slots=True)
class State:
    """`x_BLM` in fp32 is the input of layer `layer`; the layers before it are done."""

    layer: int
    x_BLM: torch.Tensor


def save(out: Path, state: State, identity: Mapping[str, JSON]) -> None:
    """Write the state of the run in `out`, whole or not at all."""
    temporary = out / f".{STATE_FILE}.tmp"
    metadata = {"layer": str(state.layer), "identity": _text(identity)}
    save_file({"x": state.x_BLM.contiguous().cpu()}, temporary, metadata=metadata)
    os.replace(temporary, out / STATE_FILE)


def restore(out: Path, identity: Mapping[str, JSON]) -> State | None:
    """The state in `out`; None where there is none.

    Raises:
        ValueError: a file that cannot be read, or the state of another run, by the first thing that differs.
    """
    path = out / STATE_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), "pt") as file:
            metadata, x_BLM = file.metadata() or {}, file.get_tensor("x")
        layer, before = int(metadata["layer"]), json.loads(metadata["identity"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"--resume: {path} cannot be read as the state of a walk: {error}.") from error
    now = json.loads(_text(identity))
    for key in sorted(now.keys() | before.keys()):
        if before.get(key) != now.get(key):
            raise ValueError(
                f"--resume: the run in {out} has {key} {before.get(key)!r}, and this one {now.get(key)!r}; "
                "ask for the same, or name another --out."
            )
    return State(layer, x_BLM)


def identity_of(source: Source, directory: Path) -> str:
    """A hash of the checkpoint: its config and index, and each file's name and size."""
    found = hashlib.sha256(source.commit.encode())
    for path in sorted(directory.iterdir()):
        if path.suffix in (".json", ".safetensors"):
            found.update(f"{path.name} {path.stat().st_size}\n".encode())
            if path.suffix == ".json":
                found.update(path.read_bytes())
    return found.hexdigest()


def open_record(out: Path, header: Mapping[str, JSON], done: int) -> RunWriter:
    """The record's writer; entering it writes the header. With layers done before, `take_over` must follow."""
    return RunWriter(out / (_NEXT if done else RUN_FILE), header)


def take_over(out: Path, writer: RunWriter, before: Run, done: int) -> None:
    """Write what the record `before` says of the first `done` layers, and put the new record in its place."""
    for verdict in before.verdicts:
        if _layer_of(verdict.data) < done:
            writer.write(verdict)
    for event in before.events:
        if event.kind == LAYER_EVENT and _layer_of(event.data) < done:
            writer.event(event.kind, **event.data)
    # The writer holds the file itself, whatever its name.
    os.replace(out / _NEXT, out / RUN_FILE)


def read_before(out: Path, done: int) -> Run:
    """The record of an earlier process.

    Raises:
        ValueError: it lacks a layer that the state has done. RecordError: what is there is no record.
    """
    run = read_run(out)
    there = {_layer_of(event.data) for event in run.events if event.kind == LAYER_EVENT}
    if missing := sorted(set(range(done)) - there):
        raise ValueError(
            f"--resume: {out / RUN_FILE} lacks layer {missing[0]}, which the state has done; "
            "put the record back, or start again in another folder."
        )
    return run


def _layer_of(data: Mapping[str, JSON]) -> int:
    layer = data.get("layer")
    return layer if isinstance(layer, int) else 10**9


def _text(identity: Mapping[str, JSON]) -> str:
    return json.dumps(identity, sort_keys=True)
