"""One kernel compiled for one target, and what the result takes: the part of `v32 kernels` that imports Triton.

It runs in worker processes alone (`worker.py`). What is compiled is kept in Triton's own cache.
"""

import importlib
import pkgutil
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

import optimized.kernels
from optimized.kernels.common import SHARED_MEMORY, KernelSpec

from . import sass
from .budgets import TARGETS, Measured
from .worker import Job, Listing, Outcome

# A matrix product that Triton leaves to HMMA, by its operand's dtype and the shape of its result.
_HMMA_PRODUCT = re.compile(r"tt\.dot .*: tensor<[\dx]+x(\w+), .* -> tensor<(?:\d+x)?(\d+)x\d+x\w+, ")
# The rows from which a product fits a warp group of Hopper, and the tensor memory of Blackwell.
_LARGE = 64
# Products in fp32 are asked for where their precision is needed, whatever computes them.
_WIDE = ("f32", "f64")


def toolchain(target: str) -> str:
    """The pair that decides about registers and spills, such as "Triton 3.9, ptxas 13.4"."""
    return f"Triton {'.'.join(triton.__version__.split('.')[:2])}, ptxas {get_ptxas(TARGETS[target]).version}"


def list_jobs(modules: tuple[str, ...], targets: tuple[str, ...]) -> Listing:
    """The jobs of `modules` (none: all of `optimized.kernels` that offer specs, in the order of their names).

    Raises:
        RuntimeError: Triton has no ptxas or no cuobjdump.
    """
    package = optimized.kernels
    # Without cuobjdump nothing can be read; Triton says so when it is asked for the tool.
    _ = triton.knobs.nvidia.cuobjdump.path
    names = modules or tuple(
        f"{package.__name__}.{found.name}" for found in sorted(pkgutil.iter_modules(package.__path__))
    )
    jobs: list[Job] = []
    problems: dict[str, str] = {}
    for name in names:
        try:
            jobs += _jobs_of(name, targets, {job.kernel for job in jobs})
        # A module that cannot be imported raises anything, and the others can be compiled all the same.
        except Exception as error:
            problems[name] = f"{type(error).__name__}: {error}"
    return Listing(tuple(jobs), problems, {target: toolchain(target) for target in targets})


def _jobs_of(name: str, targets: Iterable[str], taken: set[str]) -> list[Job]:
    module = importlib.import_module(name)
    if not hasattr(module, "specs"):
        return []
    jobs: dict[tuple[str, str], Job] = {}
    for target in targets:
        architecture = TARGETS[target]
        for spec in module.specs(architecture):
            if spec.name in taken or (spec.name, target) in jobs:
                raise ValueError(f"specs({architecture}) of {name} names {spec.name!r} again; names must be unique.")
            limit = SHARED_MEMORY[architecture]
            jobs[spec.name, target] = Job(name, spec.name, target, spec.num_warps, spec.tensor_cores, limit)
    # By kernel, because a reader compares the targets of one.
    order = list(dict.fromkeys(kernel for kernel, _ in jobs))
    return sorted(jobs.values(), key=lambda job: order.index(job.kernel))


def run_job(job: Job) -> Outcome:
    """Compile and measure; what the compiler raises is the problem."""
    began = time.perf_counter()
    try:
        measured = compile_spec(_spec_of(job), TARGETS[job.target])
        return Outcome(measured, time.perf_counter() - began)
    # The compiler raises errors of many kinds, some of which cannot travel between processes.
    except Exception as error:
        chain = _chain(error)
        details = "\n".join(f"{type(link).__name__}: {link}" for link in chain)
        return Outcome(None, time.perf_counter() - began, details.rstrip().splitlines()[-1].strip(), details)


def _chain(error: BaseException) -> list[BaseException]:
    # Triton wraps an error once for each function that the kernel was inlined through; the last one says what is wrong.
    inner = error.__cause__ or error.__context__
    return [error, *(_chain(inner) if inner is not None else ())]


def _spec_of(job: Job) -> KernelSpec:
    module = importlib.import_module(job.module)
    return next(spec for spec in _specs(module.specs, TARGETS[job.target]) if spec.name == job.kernel)


@cache
def _specs(specs: Any, architecture: int) -> tuple[KernelSpec, ...]:
    return tuple(specs(architecture))


def compile_spec(spec: KernelSpec, architecture: int) -> Measured:
    """Compile `spec` for the architecture (80, 90 or 100) as it would be launched, and measure the result.

    Raises:
        ValueError: a signature that is not that of the kernel.
        Exception: whatever Triton or ptxas raise on code that they cannot compile.
    """
    names = list(spec.function.arg_names)
    if list(spec.signature) != names:
        raise ValueError(f"signature of {spec.name} is {list(spec.signature)}; the arguments are {names}.")
    # As the launcher finds them: allocations and whole tiles are multiples of 16, or vector loads would be missing.
    aligned = [
        i
        for i, (name, kind) in enumerate(spec.signature.items())
        if kind.startswith("*") or (kind in ("i32", "i64") and name not in spec.unaligned)
    ]
    source = ASTSource(
        fn=spec.function,
        signature=dict(spec.signature),
        constexprs=dict(spec.constexprs),
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    code = sass.read(_cuobjdump(compiled.asm["cubin"]))
    return Measured(
        registers=code.registers,
        stack=code.stack,
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        instructions=code.tensor_cores,
        large_hmma=large_hmma(compiled.asm["ttgir"]) if architecture >= 90 else 0,
        loop_loads=code.loop_loads,
        loop_stores=code.loop_stores,
    )


def large_hmma(ttgir: str) -> int:
    """How many matrix products of 64 rows or more, with operands of 16 or 8 bits, Triton leaves to HMMA."""
    found = _HMMA_PRODUCT.findall(ttgir)
    return sum(int(rows) >= _LARGE and dtype not in _WIDE for dtype, rows in found)


def _cuobjdump(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(path)]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout
