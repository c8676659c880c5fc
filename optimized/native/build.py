"""Compiles the operators on first use with the system's C++ compiler, and keeps the library in the user's cache.

The library is called through ctypes on the tensors' memory, so there is nothing of torch to compile against and
a build takes seconds. Its file name in the cache is a digest of the sources, of the flags and of all macros that
the compiler predefines under them (its version and the CPU's features), followed by a digest of the file itself:
what another machine, compiler or version built is never loaded, and neither is a damaged file. Files appear by
an atomic rename, so any number of processes may build at once.

Environment: CXX, the compiler to use, with its arguments; XDG_CACHE_HOME, the cache in place of ~/.cache.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
SOURCES = sorted(HERE.glob("*.cpp"))
HEADERS = sorted(HERE.glob("*.h"))
COMPILERS = ("c++", "g++", "clang++")

# No -ffast-math: NaN and infinities have a meaning here, and sums have an order.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-fvisibility=hidden", "-pthread")


class Unusable(RuntimeError):
    """The native operators cannot be used here; the message says why, as the end of a sentence."""


@cache
def why_unusable() -> str | None:
    """Why the native operators cannot be used on this machine, or None if they can. Builds them when first asked."""
    try:
        library()
    except Unusable as reason:
        return str(reason)
    return None


def call(function: str, *arguments: Tensor | int | float | None) -> int:
    """Calls a function of the library: tensors (contiguous, on the CPU) as pointers, None as a null pointer.

    The number of threads, torch's own, follows as the last argument. Returns the int that the function returns; of
    functions without a result it means nothing. Other threads of Python run meanwhile.
    """
    converted = [_converted(argument) for argument in (*arguments, torch.get_num_threads())]
    result: int = getattr(library(), function)(*converted)
    return result


def _converted(argument: Tensor | int | float | None) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, Tensor):
        assert argument.is_contiguous() and argument.device.type == "cpu"
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


@cache
def library() -> ctypes.CDLL:
    """The compiled operators, from the cache or built now.

    Raises Unusable if there is no compiler, it fails, or the cache directory cannot be written.
    """
    compiler = _compiler()
    command = [*compiler, *FLAGS, "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"]
    key = _digest(*(path.read_bytes() for path in (*SOURCES, *HEADERS)), " ".join(command).encode(), _macros(command))
    directory = _cache_directory()
    for path in directory.glob(f"{key}-*.so"):
        if path.name == f"{key}-{_digest(path.read_bytes())}.so":
            return _load(path)
        path.unlink(missing_ok=True)
    return _load(_build(command, key, directory))


def _compiler() -> list[str]:
    """The command of the compiler: what CXX says, else the first that is found."""
    given = os.environ.get("CXX")
    candidates = [shlex.split(given)] if given else [[name] for name in COMPILERS]
    for candidate in candidates:
        if candidate and shutil.which(candidate[0]):
            return candidate
    looked = f"CXX is {given!r}, which is no program" if given else f"none of {', '.join(COMPILERS)} is installed"
    raise Unusable(f"it needs a C++ compiler, but {looked}")


def _macros(command: list[str]) -> bytes:
    """All that the compiler predefines with these flags: its version and the features of this CPU."""
    return _run([*command, "-dM", "-E", "-x", "c++", os.devnull])


def _cache_directory() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(root) / "deepseek-v32-verify"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unusable(f"its cache directory {directory} cannot be made ({error}); set XDG_CACHE_HOME") from error
    return directory


def _build(command: list[str], key: str, directory: Path) -> Path:
    """Compiles into a directory of this process, then moves the library to its place in one step."""
    try:
        with tempfile.TemporaryDirectory(dir=directory, prefix="building-") as scratch:
            objects = [Path(scratch) / f"{source.stem}.o" for source in SOURCES]
            _run(*([*command, "-c", str(x), "-o", str(y)] for x, y in zip(SOURCES, objects, strict=True)))
            made = Path(scratch) / "native.so"
            _run([*command, "-shared", *map(str, objects), "-o", str(made)])
            path = directory / f"{key}-{_digest(made.read_bytes())}.so"
            os.replace(made, path)
    except OSError as error:
        raise Unusable(f"its library cannot be written to {directory} ({error}); set XDG_CACHE_HOME") from error
    return path


def _run(*commands: list[str]) -> bytes:
    """Runs commands side by side and returns what the last one printed. Raises Unusable if one fails."""
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for command in commands]
    ended = [process.communicate() for process in started]
    for process, command, (_, errors) in zip(started, commands, ended, strict=True):
        if process.returncode:
            raise Unusable(f"the compiler failed: {shlex.join(command)}\n{errors.decode(errors='replace').strip()}")
    return ended[-1][0]


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unusable(f"its library cannot be loaded ({error})") from error


def _digest(*parts: bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
    return whole.hexdigest()[:24]
