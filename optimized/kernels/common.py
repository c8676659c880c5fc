"""What every Triton kernel's launcher shares: where kernels can run, the dtypes they get, what a compile test needs.

On a GPU a kernel reads bf16, fp16 or fp32 and accumulates in fp32. Under Triton's interpreter, which runs the same
kernels on CPU tensors, arithmetic on bf16 is silently wrong (it works on the raw bits) and stores truncate. So there,
and only there, a launcher hands over fp32 copies, and rounds the results itself: `widened` and `like`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

# Shared memory that one block can use, in bytes, by the architecture's number (sm_80, sm_90a, sm_100a).
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}


def interpreted() -> bool:
    """Whether kernels are interpreted on the CPU. Triton decides this when a kernel is defined, so never change it later."""
    return bool(triton.knobs.runtime.interpret)


def check_runnable(operator: str, *tensors: Tensor | None) -> None:
    """Refuses tensors that no Triton kernel can take here.

    Raises:
        ValueError: tensors on a CPU without the interpreter, or fp64, which only the torch implementation computes in.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cuda" and not interpreted():
            raise ValueError(
                f"backend is 'triton', but {operator} was given tensors on {tensor.device}: Triton kernels need a CUDA "
                "device, or TRITON_INTERPRET=1 set before Python starts to interpret them on the CPU."
            )
        if tensor.dtype == torch.float64:
            raise ValueError(
                f"backend is 'triton', but {operator} was given float64; Triton kernels take float16, bfloat16 and "
                "float32: use backend='torch'."
            )


def architecture(device: torch.device) -> int:
    """80, 90 or 100: the newest generation of tile configurations that `device` can run (90 under the interpreter)."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return max((known for known in SHARED_MEMORY if known <= 10 * major + minor), default=80)


def widened(tensor: Tensor) -> Tensor:
    """`tensor` as a kernel may read it: itself, or in fp32 under the interpreter."""
    return tensor.float() if interpreted() and tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def like(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a kernel writes results that are wanted in `dtype`; `.to(dtype)` afterwards does the rest."""
    return torch.float32 if interpreted() and dtype in (torch.bfloat16, torch.float16) else dtype


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One kernel as it is launched at V3.2's dims, enough to compile it for a GPU that is not there.

    `signature` maps each argument, in order, to "*bf16", "*fp32", "*i32", "*i64", "i32", "i64", "fp32" or "constexpr";
    `constexprs` gives the values of the latter. `unaligned` names the integer arguments that need not be multiples
    of 16. `tensor_cores`: whether its matrix products must be found on tensor cores.
    """

    name: str
    function: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    unaligned: frozenset[str] = field(default_factory=frozenset)
    tensor_cores: bool = True
