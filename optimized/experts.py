"""The routed experts by one grouped matrix product a projection, where torch has one for their dtype and strides.

Letters: N tokens, M hidden_size, F width of an expert, X routed experts, T chosen experts a token, P = N·T pairs of a
token and one of its experts, sorted by expert.
"""

from typing import Literal

import torch

from reference.moe import Experts as ReferenceExperts
from reference.moe import swiglu
from reference.precision import at_least_fp32

from .linear import grouped_linear
from .ops.backend import opaque

ExpertsImplementation = Literal["grouped", "loop"]

# torch's grouped product reads rows in units of this many bytes.
ALIGNMENT = 16
GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def experts_implementation(width: int, inner: int, dtype: torch.dtype) -> ExpertsImplementation:
    """`grouped` where torch's grouped product takes weights of that dtype and width, else the reference's `loop`."""
    aligned = width * dtype.itemsize % ALIGNMENT == 0 and inner * dtype.itemsize % ALIGNMENT == 0
    return "grouped" if aligned and dtype in GROUPED_DTYPES else "loop"


class Experts(ReferenceExperts):
    """The reference's experts, computed together; which implementation runs is `implementation`."""

    @property
    def implementation(self) -> ExpertsImplementation:
        """Which of the two computes."""
        return experts_implementation(self.gate_up_proj.shape[-1], self.down_proj.shape[-1], self.gate_up_proj.dtype)

    @opaque
    def forward(self, x_NM: torch.Tensor, experts_NT: torch.Tensor, weights_NT: torch.Tensor) -> torch.Tensor:
        """As the reference's: Σ over a token's experts of weight · expert(x), `[N, M]` in at least fp32."""
        if self.implementation == "loop" or x_NM.dtype != self.gate_up_proj.dtype:
            return super().forward(x_NM, experts_NT, weights_NT)
        top = experts_NT.shape[1]
        order_P = experts_NT.flatten().argsort(stable=True)
        counts_X = torch.bincount(experts_NT.flatten(), minlength=self.gate_up_proj.shape[0])
        # In one expression, so that its largest parts are freed as soon as they have been read.
        inner_PF = swiglu(*grouped_linear(x_NM, order_P // top, self.gate_up_proj, counts_X).chunk(2, dim=-1))
        every_P = torch.arange(len(order_P), device=order_P.device)
        y_PM = grouped_linear(inner_PF, every_P, self.down_proj, counts_X)
        # Back in the order of the tokens, so that a token's experts are summed in the same order on every device.
        place_P = torch.empty_like(order_P).scatter_(0, order_P, every_P)
        y_NTM = y_PM[place_P].unflatten(0, (-1, top))
        return (at_least_fp32(y_NTM) * weights_NT[..., None]).sum(1)
