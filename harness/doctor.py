"""`v32 doctor`: what is installed, what can run here, and what to do about the rest.

It imports torch, because only torch knows what torch can run, and nothing else that is slow.
"""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Column, Table

from harness import environment
from reports.terminal import print_line, shown

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "deepseek-v32-verify"
State = Literal["ok", "missing", "limited"]

REQUIRED = "packages"
OPTIONAL = "optional packages"
RUNS = "what can run here"
MACHINE = "machine"
CPU_PATH = "CPU path"
NATIVE = "native operators"

_STYLES: dict[State, str] = {"ok": "green", "missing": "bold red", "limited": "yellow"}
_SETUP = "Run `make setup`."


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; `advice` is one sentence, empty when nothing is to be done."""

    area: str
    name: str
    state: State
    detail: str
    advice: str = ""


def diagnose() -> list[Finding]:
    """Everything that was looked at, packages first."""
    return [*_packages(), *_runs(), *_machine()]


def can_run_main_job(findings: list[Finding]) -> bool:
    """Whether `v32 verify` can run: every required package in its range, and torch computes on the CPU."""
    needed = [finding for finding in findings if finding.area == REQUIRED or finding.name == CPU_PATH]
    return all(finding.state == "ok" for finding in needed)


def print_doctor(console: Console) -> int:
    """Print what `diagnose` finds, its verdict last; 0 when the main job can run here, else 3."""
    findings = diagnose()
    for area in dict.fromkeys(finding.area for finding in findings):
        table = Table.grid(Column(), Column(overflow="fold"), Column(overflow="fold"), padding=(0, 2, 0, 0))
        for finding in findings:
            if finding.area == area:
                state = shown(console, finding.state, _STYLES[finding.state])
                table.add_row(state, shown(console, finding.name), shown(console, finding.detail))
        console.print(shown(console, area, "bold"))
        console.print(table)
        console.print()
    advised = [finding for finding in findings if finding.advice]
    if advised:
        console.print(shown(console, "what to do", "bold"))
        for finding in advised:
            console.print(shown(console, f"{finding.name}: {finding.advice}"), overflow="fold")
        console.print()
    able = can_run_main_job(findings)
    print_line(console, verdict(findings), "bold green" if able else "bold red")
    return 0 if able else 3


def verdict(findings: list[Finding]) -> str:
    """One line: whether the main job can run, and what is missing or limited."""
    able = can_run_main_job(findings)
    line = "the main job can run here" if able else "the main job cannot run here"
    for state in ("missing", "limited"):
        names = [finding.name for finding in findings if finding.state == state]
        line += f" · {state}: {', '.join(names)}" if names else ""
    return line


def _packages() -> list[Finding]:
    try:
        from packaging.requirements import Requirement

        own = metadata.metadata(DISTRIBUTION)
        listed = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    except ImportError as error:
        # PackageNotFoundError is an ImportError as well.
        absent = DISTRIBUTION if isinstance(error, metadata.PackageNotFoundError) else "packaging"
        detail = f"{absent} is not installed, so the ranges of the packages are not known"
        return [Finding(REQUIRED, absent, "missing", detail, _SETUP)]
    found = [_python(*own.get_all("Requires-Python", []))]
    extras = own.get_all("Provides-Extra") or []
    for requirement in listed:
        if requirement.name == DISTRIBUTION:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found.append(_package(requirement, REQUIRED, _SETUP))
            continue
        extra = next((name for name in extras if requirement.marker.evaluate({"extra": name})), None)
        if extra is not None:
            found.append(_package(requirement, OPTIONAL, f"Run `pip install -e '.[{extra}]'`."))
    return sorted(found, key=lambda finding: finding.area != REQUIRED)


def _python(allowed: str = "") -> Finding:
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    if SpecifierSet(allowed).contains(version, prereleases=True):
        return Finding(REQUIRED, "python", "ok", f"{version}, allowed {allowed or 'any'}")
    return Finding(REQUIRED, "python", "limited", f"{version}, allowed {allowed}", "Use an allowed Python.")


def _package(requirement: Requirement, area: str, advice: str) -> Finding:
    name, allowed = requirement.name, str(requirement.specifier) or "any"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(area, name, "missing", f"not installed, allowed {allowed}", advice)
    # A local build such as 2.13.0+cpu, or a nightly, is judged by its number.
    if requirement.specifier.contains(version, prereleases=True):
        return Finding(area, name, "ok", f"{version}, allowed {allowed}")
    return Finding(area, name, "limited", f"{version}, allowed {allowed}", advice)


def _runs() -> list[Finding]:
    cpu_path, gpu = _torch()
    return [cpu_path, _native(), gpu, *_triton(gpu.state == "ok"), _modal(), _hadamard(gpu.state == "ok")]


def _torch() -> tuple[Finding, Finding]:
    try:
        import torch

        total = float((torch.ones(8, 8) @ torch.ones(8, 8)).sum())
    # A broken installation raises anything from ImportError to OSError while it loads its libraries.
    except Exception as error:
        reason = f"torch does not compute: {type(error).__name__}: {error}"
        absent = Finding(RUNS, "GPU", "missing", "needs torch")
        return Finding(RUNS, CPU_PATH, "missing", reason, _SETUP), absent
    if total != 512:
        cpu_path = Finding(RUNS, CPU_PATH, "missing", f"a sum of 512 ones is {total}", "Reinstall torch.")
    else:
        cpu_path = Finding(RUNS, CPU_PATH, "ok", f"torch computes, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        names = ", ".join(
            f"{device.name} (SM {device.major}.{device.minor}, {device.total_memory / 2**30:.0f} GiB)"
            for device in devices
        )
        return cpu_path, Finding(RUNS, "GPU", "ok", names)
    if torch.version.cuda is None:
        reason, advice = (
            "this torch is built without CUDA",
            "Install a CUDA build of torch on a machine with a GPU.",
        )
    elif not Path("/dev/nvidiactl").exists() and shutil.which("nvidia-smi") is None:
        reason, advice = (
            "no NVIDIA driver was found",
            "Use a machine with an NVIDIA GPU.",
        )
    else:
        reason = f"torch for CUDA {torch.version.cuda} sees no device"
        advice = "Compare the driver with torch's CUDA version, and look at CUDA_VISIBLE_DEVICES."
    return cpu_path, Finding(RUNS, "GPU", "missing", reason, advice)


def _native() -> Finding:
    """Looks for the compiler alone: building, and loading the models that come along, would take seconds."""
    given = os.environ.get("CXX", "").split()
    found = next((name for name in given[:1] or ("c++", "g++", "clang++") if shutil.which(name)), None)
    if found is None:
        advice = "Install a C++ compiler, or name one in CXX; until then the slower torch operators are used."
        return Finding(RUNS, NATIVE, "limited", "no C++ compiler", advice)
    return Finding(RUNS, NATIVE, "ok", f"{found} builds them when they are first used")


def _interpreter(triton: str, numpy: str) -> Finding:
    # 3.6 reads scalars in a way that numpy took out in 2.4.
    if _release(triton) < (3, 7) and _release(numpy) >= (2, 4):
        advice = "Install numpy below 2.4 or triton from 3.7 on to interpret kernels; a GPU needs neither."
        return Finding(RUNS, "Triton interpreter", "limited", f"triton {triton} cannot with numpy {numpy}", advice)
    return Finding(RUNS, "Triton interpreter", "ok", "runs kernels on the CPU, TRITON_INTERPRET=1")


def _release(version: str) -> tuple[int, ...]:
    """Major and minor; of a package that is not there, whose absence is reported elsewhere, neither."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())


def _triton(gpu: bool) -> list[Finding]:
    spec = util.find_spec("triton")
    if spec is None or spec.origin is None:
        advice = _SETUP if platform.system() == "Linux" else "Use Linux, which triton needs."
        return [Finding(RUNS, f"Triton {part}", "missing", "no triton", advice) for part in ("interpreter", "compile")]
    interpreter = _interpreter(
        *(metadata.version(name) if util.find_spec(name) else "" for name in ("triton", "numpy"))
    )
    assembler = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "ptxas"
    if not assembler.exists() and "TRITON_PTXAS_PATH" not in os.environ:
        advice = "Reinstall triton from a wheel, or set TRITON_PTXAS_PATH."
        return [interpreter, Finding(RUNS, "Triton compile", "missing", "triton has no ptxas", advice)]
    if not gpu:
        return [
            interpreter,
            Finding(RUNS, "Triton compile", "limited", "compiles for a GPU, cannot run on one"),
        ]
    if not any(shutil.which(name) for name in (os.environ.get("CC") or "cc", "gcc", "clang")):
        advice = "Install a C compiler, which triton needs to launch kernels."
        return [interpreter, Finding(RUNS, "Triton compile", "limited", "no C compiler", advice)]
    return [interpreter, Finding(RUNS, "Triton compile", "ok", "compiles and runs on the GPU")]


def _modal() -> Finding:
    installed = util.find_spec("modal") is not None
    config = Path(os.environ.get("MODAL_CONFIG_PATH") or "~/.modal.toml").expanduser()
    # Whether there is a token, and never what it is.
    token = bool(os.environ.get("MODAL_TOKEN_ID")) or config.is_file()
    detail = f"package {'yes' if installed else 'no'}, token {'yes' if token else 'no'}"
    if not installed:
        return Finding(RUNS, "Modal", "missing", detail, "Run `pip install -e '.[modal]'`, then `modal setup`.")
    if not token:
        return Finding(RUNS, "Modal", "limited", detail, "Run `modal setup` to run on Modal's GPUs.")
    return Finding(RUNS, "Modal", "ok", detail)


def _hadamard(gpu: bool) -> Finding:
    if util.find_spec("fast_hadamard_transform") is not None:
        return Finding(RUNS, "fast Hadamard", "ok", "fast_hadamard_transform is installed")
    advice = "Install fast_hadamard_transform for the official kernel." if gpu else ""
    return Finding(RUNS, "fast Hadamard", "limited", "the built-in transform is used", advice)


def _machine() -> list[Finding]:
    cpu = environment.cpu()
    memory = environment.memory_gib()
    findings = [Finding(MACHINE, "cores", "ok", f"{cpu['usable']} usable, {cpu['model']}")]
    if memory is None:
        findings.append(Finding(MACHINE, "memory", "limited", "the system does not say how much"))
    elif memory < 4:
        advice = "Stay with `--config tiny`; larger configurations need more memory."
        findings.append(Finding(MACHINE, "memory", "limited", f"{memory:.1f} GiB", advice))
    else:
        findings.append(Finding(MACHINE, "memory", "ok", f"{memory:.1f} GiB"))
    return findings
