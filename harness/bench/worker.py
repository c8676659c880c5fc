"""A process that holds one contestant and runs its pass when it is asked: `python -m harness.bench.worker`.

It reads a point on the first line of its input, builds the model, warms up and answers with a line of JSON; then it
runs the pass once for every further line, and answers each. What it cannot do it answers with {"error", "traceback"}.

Time. CPU seconds of the whole process (`time.process_time`: user and system, all threads), so that other work on the
machine does not count; on a GPU the seconds between two events of its stream. Wall seconds are kept beside them.

Memory. The model is built and warmed up on a short text, so that libraries are loaded and threads started; freed heap
is given back; what is resident then is the base. Linux resets the high-water mark of resident memory (VmHWM) through
/proc/self/clear_refs: it is reset before each pass and read right after it, and the growth is its distance to the base.
Gradients count, weights do not. Where the mark cannot be reset the process's own maximum stands in for it, which also
holds the peak of building the model: an upper bound, and the answer says so. On a GPU: what torch's allocator held.

Every output is looked at after the clock has stopped: finite, and not all zero.
"""

import contextlib
import ctypes
import gc
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .operators import OperatorPass
from .passes import MIB, ModelPass, Outputs
from .point import MACHINE, Point, is_operator

# Sides of the square matrices whose product tells the machine's rate: beyond every cache, and short.
MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}


class Garbage(Exception):
    """A pass whose output is not finite, or nothing but zeros."""


def checked(outputs: Outputs, gradients: Iterable[torch.Tensor] | None) -> float:
    """A number that depends on all of a pass's output: the sum of the absolute values of its tensors.

    `gradients` is None for a pass that has none.

    Raises:
        Garbage: a tensor that is not finite, outputs that are all zero, gradients that are missing or all zero.
    """
    total = 0.0
    for name, tensor in outputs.items():
        size = float(tensor.double().abs().sum())
        if not size > 0 or size == float("inf"):
            raise Garbage(f"its {name} sum to {size}; they must be finite and not all zero")
        total += size
    if gradients is not None:
        size = float(sum((g.double().abs().sum() for g in gradients), torch.zeros((), dtype=torch.float64)))
        if not size > 0 or size == float("inf"):
            raise Garbage(f"its gradients sum to {size}; they must be there, finite and not all zero")
        total += size
    return total


def rejected_garbage(outputs: Outputs, gradients: list[torch.Tensor] | None) -> dict[str, bool]:
    """For each kind of garbage planted into a right output, whether `checked` refuses it."""
    name, tensor = next((n, x) for n, x in outputs.items() if x.is_floating_point())
    spoilt = tensor.clone(memory_format=torch.contiguous_format)
    spoilt.view(-1)[-1] = float("nan")
    tried = {"one NaN": ({name: spoilt}, gradients), "zeros": ({name: torch.zeros_like(tensor)}, gradients)}
    if gradients is not None:
        tried["no gradients"] = (outputs, [])
    found = {}
    for kind, (planted, planted_gradients) in tried.items():
        try:
            checked(planted, planted_gradients)
        except Garbage:
            found[kind] = True
        else:
            found[kind] = False
    return found


class Resident:
    """Resident memory of this process above a base, in MiB."""

    def __init__(self) -> None:
        gc.collect()
        # Freed heap that glibc keeps would be a part of the base, and hide as much growth.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        self.how = "high-water mark of resident memory, reset before each pass"
        if not self._reset():
            self.how = "largest resident memory of the process, which building the model is part of: an upper bound"
        self.base = _status("VmRSS") or _largest()

    def start(self) -> None:
        """A pass begins."""
        self._reset()

    def growth(self) -> float:
        """The peak since the last start, above the base."""
        peak = _status("VmHWM") if self.how.startswith("high") else _largest()
        return max(0.0, (peak - self.base) / MIB)

    @staticmethod
    def _reset() -> bool:
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError:
            return False
        return True


def _status(key: str) -> int:
    """A line of /proc/self/status in bytes, 0 where there is none."""
    try:
        with open("/proc/self/status") as file:
            lines = dict(line.split(":", 1) for line in file)
    except OSError:
        return 0
    return int(lines[key].split()[0]) * 1024 if key in lines else 0


def _largest() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Allocated:
    """What torch's allocator holds on a GPU above a base, in MiB."""

    how = "largest memory allocated by torch on the device"

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        self.device, self.base = device, torch.cuda.memory_allocated(device)

    def start(self) -> None:
        """A pass begins."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def growth(self) -> float:
        """The peak since the last start, above the base."""
        return (torch.cuda.max_memory_allocated(self.device) - self.base) / MIB


def timed(device: torch.device, run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `run` returns, and its {"seconds", "wall"}: of CPU on a CPU, of the device's stream on a GPU."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        wall = time.perf_counter()
        begin.record()
        result = run()
        end.record()
        torch.cuda.synchronize(device)
        return result, {"seconds": begin.elapsed_time(end) / 1e3, "wall": time.perf_counter() - wall}
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, {"seconds": time.process_time() - cpu, "wall": time.perf_counter() - wall}


class Contestant:
    """A pass of a model or an operator at its point, warmed up."""

    def __init__(self, point: Point) -> None:
        self.device = torch.device(point.device)
        self.held: ModelPass | OperatorPass = OperatorPass(point) if is_operator(point.pass_) else ModelPass(point)
        outputs = self.held.warm_up()
        checked(outputs, self.held.gradients())
        self.ready = {
            "backend": self.held.backend,
            "implementations": self.held.implementations,
            "weights_mib": self.held.weights_mib,
            "rejected": rejected_garbage(outputs, self.held.gradients()),
        }
        del outputs
        self.held.forget()
        self.memory: Resident | Allocated = Allocated(self.device) if self.device.type == "cuda" else Resident()
        self.ready["memory"] = self.memory.how

    def run(self) -> dict[str, float]:
        """One pass: its times, its peak growth in MiB, its checksum."""
        gc.collect()
        self.memory.start()
        outputs, found = timed(self.device, self.held.run)
        found["peak_mib"] = self.memory.growth()
        found["checksum"] = checked(outputs, self.held.gradients())
        del outputs
        self.held.forget()
        return found


class Machine:
    """The machine's own rate: products of two square matrices in the point's dtype, in GFLOP a CPU or device second."""

    def __init__(self, point: Point) -> None:
        self.device = torch.device(point.device)
        self.side = MATMUL_SIDE[self.device.type]
        shape = (self.side, self.side)
        a, b = (torch.randn(shape, device=self.device).to(getattr(torch, point.dtype)) for _ in range(2))
        self.products: dict[str, Callable[[], Any]] = {"blas_gflops": lambda: a @ b}
        # On processors of some makers torch's BLAS takes half of the vector width; then oneDNN tells the rate.
        onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
        if self.device.type == "cpu" and onednn is not None:
            self.products["onednn_gflops"] = lambda: onednn(a, b, None, "none", [], "")
        self.ready = {"backend": "torch", "libraries": list(self.products)}
        self.run()

    def run(self) -> dict[str, float]:
        """The best of five products of each library, and of all: what else runs on the machine only slows one."""
        rates = {}
        for name, product in self.products.items():
            seconds = min(timed(self.device, product)[1]["seconds"] for _ in range(5))
            rates[name] = 2 * self.side**3 / seconds / 1e9
        return {**rates, "gflops": max(rates.values())}


def main() -> None:
    """Answer the lines of standard input until it ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    # Whatever a library prints must not stand between the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        point = Point.from_json(sys.stdin.readline())
        torch.set_num_threads(point.threads)
        held: Contestant | Machine = Machine(point) if point.contestant == MACHINE else Contestant(point)
        answers.write(json.dumps(held.ready) + "\n")
        for _ in iter(sys.stdin.readline, ""):
            answers.write(json.dumps(held.run()) + "\n")
    except Exception as error:
        sentence = " ".join(f"{type(error).__name__}: {error}".split())
        answers.write(json.dumps({"error": sentence, "traceback": traceback.format_exc()}) + "\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
