"""The operators' Triton kernels; importing this package registers them under the name "triton"."""

import torch

from optimized.kernels import dense_mla, indexer_kl, indexer_topk, sparse_mla  # noqa: F401
from optimized.kernels.common import interpreted


def unusable(device: torch.device) -> str | None:
    """Why no kernel can run on tensors of `device`, or None."""
    if device.type == "cuda" or interpreted():
        return None
    return (
        f"Triton kernels need a CUDA device, not {device}; TRITON_INTERPRET=1, set before Python starts, interprets them "
        "on the CPU"
    )
