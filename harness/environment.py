"""What a run ran on, as far as it can change a number: versions, machine, switches, seeds.

Nothing here says who ran it: no user or host name, no home directory, no variable outside a fixed list.
Heavy packages are not imported; torch is asked only when the run has imported it already.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from operator import attrgetter
from pathlib import Path
from typing import Any

from reports.records import JSON

ROOT = Path(__file__).resolve().parent.parent

PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "numpy",
    "safetensors",
    "tokenizers",
    "accelerate",
    "peft",
    "modal",
    "rich",
    "hypothesis",
    "pytest",
    "deepseek-v32-verify",
)

# Variables that change a number that a run prints; a fixed list, so that no token can get into a record.
VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TRITON_INTERPRET",
    "TRITON_DEFAULT_FP_FUSION",
    "PYTHONHASHSEED",
)

_TORCH_ATTRIBUTES = {
    "allow_tf32_matmul": "backends.cuda.matmul.allow_tf32",
    "allow_tf32_cudnn": "backends.cudnn.allow_tf32",
    "reduced_precision_bf16": "backends.cuda.matmul.allow_bf16_reduced_precision_reduction",
    "cudnn_deterministic": "backends.cudnn.deterministic",
    "cudnn_benchmark": "backends.cudnn.benchmark",
    "cuda": "version.cuda",
}
_TORCH_CALLS = {
    "deterministic": "are_deterministic_algorithms_enabled",
    "matmul_precision": "get_float32_matmul_precision",
    "default_dtype": "get_default_dtype",
    "threads": "get_num_threads",
    "cpu_capability": "backends.cpu.get_cpu_capability",
}


def capture(
    command: Sequence[str] | None = None,
    *,
    seeds: Mapping[str, int] | None = None,
    git: dict[str, JSON] | None = None,
) -> dict[str, JSON]:
    """The environment for a run's header.

    `command` is the command line, its home and project paths shortened; `git` is what `git_state` said where
    the project is a clone, for a run in a place where it is not.
    """
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": None if command is None else [without_paths(part) for part in command],
        "seeds": dict(seeds or {}),
        "versions": versions(),
        "os": operating_system(),
        "cpu": cpu(),
        "memory_gib": memory_gib(),
        "gpu": gpus(),
        "git": git if git is not None else git_state(),
        "variables": {name: without_paths(os.environ[name]) for name in VARIABLES if name in os.environ},
        "torch": torch_switches(),
    }


def without_paths(text: str) -> str:
    """The text with the project's folder as `.` and every home directory as `~`."""
    text = re.sub(rf"{re.escape(str(ROOT))}(?=/|$)", ".", text)
    home = str(Path.home())
    if len(home) > 1:
        text = re.sub(rf"{re.escape(home)}(?=/|$)", "~", text)
    return re.sub(r"(?<![\w.])/(?:home|Users)/[^/\s]+", "~", text)


def versions() -> dict[str, JSON]:
    """Python and the installed packages that a run depends on."""
    found: dict[str, JSON] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def operating_system() -> str:
    """The system, the processor's family and, where there is one, the C library, whose functions decide last bits."""
    library = " ".join(part for part in platform.libc_ver() if part)
    return ", ".join(part for part in (f"{platform.system()} {platform.machine()}", library) if part)


def cpu() -> dict[str, JSON]:
    """Model, cores, hardware threads, and how many threads this process may use."""
    model, cores = "", set()
    physical = ""
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name":
            model = value
        elif key == "physical id":
            physical = value
        elif key == "core id":
            cores.add((physical, value))
    threads = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else threads
    return {
        "model": model or platform.processor() or platform.machine(),
        "cores": len(cores) or threads,
        "threads": threads,
        "usable": usable,
    }


def memory_gib() -> float | None:
    """Memory that this process may use, in GiB: the machine's, or the container's limit."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = _read(path).strip()
        if limit.isdigit():
            total = min(total, int(limit))
    return round(total / 2**30, 1)


def gpus() -> list[JSON]:
    """Name, SM, memory and driver of each GPU, as torch sees them when it is loaded, else as the driver."""
    query = "--query-gpu=name,compute_cap,memory.total,driver_version"
    lines = _output("nvidia-smi", query, "--format=csv,noheader,nounits").splitlines()
    rows = [[cell.strip() for cell in line.split(",")] for line in lines if line.count(",") == 3]
    driver = rows[0][3] if rows else None
    torch = sys.modules.get("torch")
    if torch is None:
        return [
            {"name": name, "sm": capability.replace(".", ""), "memory_gib": _gib(memory), "driver": driver}
            for name, capability, memory, _ in rows
        ]
    found: list[JSON] = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            memory_gib = round(device.total_memory / 2**30, 1)
            sm = f"{device.major}{device.minor}"
            found.append({"name": device.name, "sm": sm, "memory_gib": memory_gib, "driver": driver})
    return found


def torch_switches() -> dict[str, JSON]:
    """Torch's switches that change numbers; empty as long as nothing has imported torch."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return {}
    found: dict[str, JSON] = {}
    for name, path in (_TORCH_ATTRIBUTES | _TORCH_CALLS).items():
        try:
            value = attrgetter(path)(torch)
            value = value() if name in _TORCH_CALLS else value
        # Reading the old switches raises after the new ones were set, and a version may lack one.
        except (AttributeError, RuntimeError) as error:
            value = f"unknown: {type(error).__name__}"
        found[name] = value if isinstance(value, (bool, int)) or value is None else str(value)
    return found


def git_state() -> dict[str, JSON] | None:
    """Commit and whether files differ from it; None where the project is not a clone of its own."""
    top = _output("git", "rev-parse", "--show-toplevel").strip()
    # Installed inside another repository, that one's commit would say nothing about us.
    if not top or Path(top).resolve() != ROOT:
        return None
    commit = _output("git", "rev-parse", "--verify", "HEAD").strip()
    return {"commit": commit or None, "dirty": bool(_output("git", "status", "--porcelain").strip())}


def _output(*command: str) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _gib(mebibytes: str) -> float | None:
    return round(float(mebibytes) / 1024, 1) if mebibytes.replace(".", "", 1).isdigit() else None
