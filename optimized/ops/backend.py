"""What every operator shares: choice of an implementation, checks of inputs, the chunks that it works in.

Shape legend, for all of `optimized.ops` (a suffix of a name is its shape):
B batch, L query rows, S key slots, H attention heads, D q/k width, V value width (= first d_v columns of the
latent), J indexer heads, E indexer head dim, K selected keys, C queries in a chunk, n key slots that a chunk
visits.

The seam. An operator is a public function that checks its inputs and then calls one registered implementation
of itself. Which one is decided by `resolve_backend`: the name that the caller gave, or the default of the
device. There is no fallback: a name without an implementation raises.

Memory. An implementation walks over the query rows in chunks of 16 to 128 (`chunk_rows`), so that its
temporaries grow with S, never with L * S. A chunk visits only the key slots between the smallest start and
the largest end of its rows.

Hidden values. A key that a row may not see must not reach that row, even if it holds NaN or overflows. Adding
a mask or multiplying by a weight of zero is not enough (0 * NaN is NaN), so every operator overwrites what is
hidden, and matrix products that sum over hidden entries go through `split_finite`.
"""

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Implementation = TypeVar("Implementation", bound=Callable[..., Any])
Operator = TypeVar("Operator", bound=Callable[..., Any])

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)

# A chunk's largest temporary aims at this size: small enough to stay near the caches of a CPU core.
CHUNK_BYTES = 16 * 2**20
MIN_CHUNK_ROWS = 16
MAX_CHUNK_ROWS = 128

_IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {}

# Backends that need more than torch, by the package that registers their implementations when it is first asked for.
_PACKAGES = {"triton": "..kernels", "native": "..native"}

# What a device's operators are by default, where that can be used; else "torch".
_DEFAULTS = {"cuda": "triton", "cpu": "native"}


def register(operator: str, backend: str) -> Callable[[Implementation], Implementation]:
    """Decorator: makes a function the implementation of `operator` that answers to the name `backend`."""

    def add(function: Implementation) -> Implementation:
        _IMPLEMENTATIONS.setdefault(operator, {})[backend] = function
        return function

    return add


def default_backend(device: torch.device) -> str:
    """The implementation that `backend=None` means on `device`: "triton", "native" or, where neither can be, "torch"."""
    name = _DEFAULTS.get(device.type, "torch")
    return "torch" if why_unusable(name, device) else name


def why_unusable(backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot compute on tensors of `device`, as the end of a sentence, or None where it can."""
    if backend not in _PACKAGES:
        return None
    try:
        package = importlib.import_module(_PACKAGES[backend], __package__)
    except ImportError as error:
        return str(error)
    reason: str | None = package.unusable(device)
    return reason


def resolve_backend(operator: str, backend: str | None, device: torch.device) -> str:
    """The name of the implementation of `operator` to run for tensors on `device`.

    Raises ValueError if `operator` is unknown or has no implementation of the name asked for, default
    included, or if that cannot be used on `device`.
    """
    if operator not in _IMPLEMENTATIONS:
        known = ", ".join(sorted(_IMPLEMENTATIONS))
        raise ValueError(f"operator is {operator!r}, but the operators are: {known}.")
    name = default_backend(device) if backend is None else backend
    if reason := why_unusable(name, device):
        raise ValueError(f"backend is {name!r}, which cannot be used here: {reason}.")
    if name not in _IMPLEMENTATIONS[operator]:
        available = ", ".join(sorted({*_IMPLEMENTATIONS[operator], *_PACKAGES}))
        raise ValueError(f"backend is {name!r}, but operator {operator} has implementations: {available}.")
    return name


def implementation(operator: str, backend: str | None, device: torch.device) -> Callable[..., Any]:
    """The function that `resolve_backend` names."""
    return _IMPLEMENTATIONS[operator][resolve_backend(operator, backend, device)]


def opaque(operator: Operator) -> Operator:
    """Decorator: torch.compile leaves `operator` as it is, and compiles what stands before and behind it."""
    disabled: Operator = torch.compiler.disable(operator)
    return disabled


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype to compute in: fp64 if any of `dtypes` is fp64, else fp32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Keeps an enclosing autocast region from lowering the matrix products of an operator below fp32."""
    return torch.autocast(device_type=device.type, enabled=False)


def check_tensor(
    argument: str,
    tensor: Tensor,
    axes: str,
    sizes: dict[str, int],
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES,
) -> None:
    """Checks rank, sizes, dtype and device of one argument, and learns the sizes of axes not seen before.

    `axes` names one axis a letter ("BLHD"); a digit is an axis of exactly that size. `sizes` maps the letters
    that are known to their sizes and is extended. Raises ValueError.
    """
    expected = [int(axis) if axis.isdigit() else sizes.get(axis) for axis in axes]
    given = list(tensor.shape)
    fits = len(given) == len(expected) and all(
        size in (None, actual) for size, actual in zip(expected, given, strict=True)
    )
    if not fits:
        known = [f"{axis} = {sizes[axis]}" for axis in axes if axis in sizes]
        where = f" with {', '.join(known)}" if known else ""
        raise ValueError(f"{argument} has shape {given}, but it must be [{', '.join(axes)}]{where}.")
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{argument} has dtype {tensor.dtype}, but allowed are: {allowed}.")
    if tensor.device != device:
        raise ValueError(f"{argument} is on {tensor.device}, but the first argument is on {device}.")
    sizes.update((axis, size) for axis, size in zip(axes, given, strict=True) if not axis.isdigit())


def check_bounds(bounds_BL2: Tensor, sizes: dict[str, int], device: torch.device) -> None:
    """Checks the key ranges [start, end) of the rows: 0 <= start <= end <= S. Raises ValueError."""
    check_tensor("bounds_BL2", bounds_BL2, "BL2", sizes, device, INDEX_DTYPES)
    if bounds_BL2.numel() == 0:
        return
    start_BL, end_BL = bounds_BL2.unbind(-1)
    lowest, highest, shortest = int(start_BL.min()), int(end_BL.max()), int((end_BL - start_BL).min())
    if lowest < 0 or highest > sizes["S"] or shortest < 0:
        raise ValueError(
            f"bounds_BL2 has starts from {lowest}, ends up to {highest} and lengths from {shortest}, "
            f"but 0 <= start <= end <= S = {sizes['S']} must hold in every row."
        )


def check_indices(indices_BLK: Tensor, sizes: dict[str, int], device: torch.device) -> None:
    """Checks selected key slots: -1 (none) or 0 to S - 1. Raises ValueError."""
    check_tensor("indices_BLK", indices_BLK, "BLK", sizes, device, INDEX_DTYPES)
    if indices_BLK.numel() == 0:
        return
    lowest, highest = (int(value) for value in torch.aminmax(indices_BLK))
    if lowest < -1 or highest >= sizes["S"]:
        raise ValueError(
            f"indices_BLK has values from {lowest} to {highest}, "
            f"but allowed are -1 (no key) and 0 to S - 1 = {sizes['S'] - 1}."
        )


def check_scale(scale: float) -> None:
    """Checks that the softmax scale is a finite number (it gets no gradient). Raises ValueError."""
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale is {scale!r}, but it must be a finite Python number.")


def chunk_rows(rows: int, elements_per_row: int, dtype: torch.dtype) -> int:
    """How many of `rows` query rows go into a chunk, if its largest temporary has that many elements a row.

    As many as fit CHUNK_BYTES, but 16 at least (below that the matrix products starve) and 128 at most; never
    more than there are, never less than 1. It depends on sizes only, not on free memory or on values, so that
    the same inputs are always cut in the same way.
    """
    fitting = CHUNK_BYTES // max(1, elements_per_row * dtype.itemsize)
    return max(1, min(rows, MAX_CHUNK_ROWS, max(MIN_CHUNK_ROWS, fitting)))


class Chunk(NamedTuple):
    """Rows [first, last) of batch entry b, and the key slots [low, high) that any of them may see."""

    b: int
    first: int
    last: int
    low: int
    high: int


def row_chunks(bounds_BL2: Tensor, rows: int) -> Iterator[Chunk]:
    """The chunks of at most `rows` query rows that have a visible key; rows without one widen no range."""
    bounds_BL2 = bounds_BL2.cpu()
    for b in range(bounds_BL2.shape[0]):
        for first in range(0, bounds_BL2.shape[1], rows):
            bounds_C2 = bounds_BL2[b, first : first + rows]
            seeing_R2 = bounds_C2[bounds_C2[:, 0] < bounds_C2[:, 1]]
            if len(seeing_R2):
                low, high = int(seeing_R2[:, 0].min()), int(seeing_R2[:, 1].max())
                yield Chunk(b, first, first + len(bounds_C2), low, high)


def visible_keys(bounds_BL2: Tensor, indices_BLK: Tensor | None, chunk: Chunk) -> Tensor:
    """bool [C, n]: which of the chunk's key slots each row may see, by its bounds and its selection."""
    b, first, last, low, high = chunk
    slots_n = torch.arange(low, high, device=bounds_BL2.device)
    start_C1, end_C1 = bounds_BL2[b, first:last].split(1, dim=1)
    visible_Cn = (slots_n >= start_C1) & (slots_n < end_C1)
    if indices_BLK is None:
        return visible_Cn
    indices_CK = indices_BLK[b, first:last].long()
    inside_CK = (indices_CK >= low) & (indices_CK < high)
    # One column more than there are slots: it takes the marks of whatever lies outside.
    column_CK = torch.where(inside_CK, indices_CK - low, high - low)
    selected_Cn = visible_Cn.new_zeros(last - first, high - low + 1).scatter_(1, column_CK, True)[:, :-1]
    return visible_Cn & selected_Cn


def carve(buffer: Tensor, *shape: int) -> Tensor:
    """The first elements of a flat buffer as a contiguous tensor of the given shape."""
    return buffer[: math.prod(shape)].view(shape)


def exp_and_lse_(logits: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """Turns masked logits [..., n] into exp(logits - row maximum), in place.

    Returns (total, lse), both [..., 1]: the divisor that makes the rows a softmax, and their natural
    logsumexp. Rows marked in `empty` have only logits of -inf and get weights 0, divisor 1 and lse -inf.
    """
    top = logits.amax(-1, keepdim=True).masked_fill_(empty, 0)
    total = logits.sub_(top).exp_().sum(-1, keepdim=True)
    return total.masked_fill(empty, 1), top.add_(total.log())


def split_finite(operand: Tensor) -> tuple[Tensor, Tensor | None]:
    """(operand, None) if all of it is finite, else (its non-finite entries set to 0, 1 where they were).

    For products `weights @ operand` whose weights are exactly 0 where a mask hides the operand's rows: there
    0 * NaN would leak. The product of the first part is right wherever no non-finite entry is visible, and
    `mark_reached_` puts NaN where one is.
    """
    finite = operand.isfinite()
    if bool(finite.all()):
        return operand, None
    return operand.where(finite, 0), (~finite).to(operand.dtype)


def mark_reached_(product: Tensor, visible: Tensor, nonfinite: Tensor | None) -> Tensor:
    """Puts NaN into `product`, in place, wherever its sum runs over a visible non-finite entry."""
    if nonfinite is None:
        return product
    return product.masked_fill_(visible.to(nonfinite.dtype) @ nonfinite > 0, math.nan)
