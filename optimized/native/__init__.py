"""The operators in C++ for CPUs; importing this package registers them under the name "native"."""

import torch

from optimized.native import dense_mla, indexer_kl, indexer_topk, sparse_mla  # noqa: F401
from optimized.native.build import why_unusable


def unusable(device: torch.device) -> str | None:
    """Why no operator can run on tensors of `device`, or None. Builds them when it is first asked."""
    if device.type != "cpu":
        return f"native operators run on the CPU, not on {device}"
    return why_unusable()
