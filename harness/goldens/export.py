"""Golden vectors as files: the bytes of each, and a directory that appears whole or not at all."""

import json
import os
import secrets
import shutil
from collections.abc import Collection, Mapping
from itertools import groupby
from pathlib import Path

import safetensors.torch

from .constants import Constant, disagreements
from .manifest import MANIFEST_FILE, manifest_of, manifest_text
from .vectors import CONFIG_FILE, CONSTANTS_FILE, Vectors


class SpecificationError(ValueError):
    """The reference does not reproduce a constant of the specification; the message is a sentence for each."""


def export_files(vectors: Vectors) -> dict[str, bytes]:
    """Every file of an export by its name, manifest.json last; the same bytes for the same vectors.

    Raises:
        SpecificationError: a constant of the specification that the reference does not reproduce.
    """
    if wrong := disagreements(vectors.constants):
        raise SpecificationError(" ".join(wrong))
    files = {
        CONFIG_FILE: (json.dumps(vectors.config, indent=1) + "\n").encode(),
        CONSTANTS_FILE: constants_text(vectors.constants).encode(),
    }
    for file, goldens in groupby(vectors.goldens, key=lambda golden: golden.file):
        # One metadata key: safetensors writes several in no particular order. transformers asks for this one.
        files[file] = safetensors.torch.save({g.name: g.value for g in goldens}, metadata={"format": "pt"})
    files[MANIFEST_FILE] = manifest_text(manifest_of(vectors, files)).encode()
    return files


def constants_text(constants: list[Constant]) -> str:
    """A JSON list with one constant a line."""
    return "[\n" + ",\n".join(constant.as_json() for constant in constants) + "\n]\n"


def write_directory(directory: Path, files: Mapping[str, bytes]) -> None:
    """Create `directory`, which must be missing or empty, with `files` in it; cut off, it leaves nothing.

    Raises:
        OSError: it cannot be written, or something has been put there meanwhile.
    """
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(directory)
    try:
        _fill(temporary, files)
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_directory(directory: Path, files: Mapping[str, bytes], ours: Collection[str]) -> None:
    """Put a directory with `files` in the place of `directory`.

    What lies there and is neither in `files` nor in `ours`, the names that earlier exports wrote, is carried over. Two
    renames do it: only a process killed between the two leaves the old one as a hidden directory beside an empty place.

    Raises:
        OSError: it cannot be written; the old directory is then as it was.
    """
    directory = directory.resolve()
    temporary, old = _beside(directory), _beside(directory)
    try:
        _fill(temporary, files)
        for entry in directory.iterdir():
            if entry.name not in files and entry.name not in ours:
                _copy(entry, temporary / entry.name)
        directory.rename(old)
        try:
            temporary.rename(directory)
        except BaseException:
            old.rename(directory)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _beside(directory: Path) -> Path:
    # Not tempfile: its directories are private to the user, and this one stays.
    return directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.tmp")


def _fill(temporary: Path, files: Mapping[str, bytes]) -> None:
    temporary.mkdir()
    for name, content in files.items():
        with (temporary / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _copy(entry: Path, target: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.copytree(entry, target, symlinks=True)
    else:
        shutil.copy2(entry, target, follow_symlinks=False)
