"""Where the model leaves its own dtype: at least fp32, and never less because of autocast.

The specification runs in fp64 when asked, so that it is its own oracle. An upcast is therefore
"at least fp32" and never "to fp32".
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import nn
from torch.func import functional_call

P = ParamSpec("P")
T = TypeVar("T")


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """`x` in fp32, or unchanged when it is fp64 already."""
    return x if x.dtype == torch.float64 else x.float()


def call_in_dtype_of(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """`module(x)` with its parameters cast to x's dtype; adapters and hooks on the module stay in force."""
    parameters = dict(module.named_parameters())
    if all(p.dtype == x.dtype for p in parameters.values()):
        out: torch.Tensor = module(x)
        return out
    cast: torch.Tensor = functional_call(module, {name: p.to(x.dtype) for name, p in parameters.items()}, (x,))
    return cast


def without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """Run `function` with autocast off, on the device of its first tensor argument.

    Autocast turns fp32 matrix products into bf16 ones. Index scores, the gate and the softmax are
    specified in at least fp32 and their choices are discrete, so they are not up for that.
    """

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        tensor = next(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
        if not torch.is_autocast_enabled(tensor.device.type):
            return function(*args, **kwargs)
        with torch.autocast(tensor.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped
