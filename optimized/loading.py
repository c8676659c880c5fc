"""The training guide's `load_model_for_sft`, for the optimized model."""

from pathlib import Path
from typing import Any

import torch

import reference

from .model import DeepseekV32ForCausalLM


def load_model_for_sft(
    path: str | Path,
    freeze_indexer: bool = True,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device_map: Any = None,
    **kwargs: Any,
) -> Any:
    """As `reference.load_model_for_sft`, which says what each argument means; the model is the optimized one."""
    return reference.load_model_for_sft(
        path, freeze_indexer, dtype=dtype, device_map=device_map, model_class=DeepseekV32ForCausalLM, **kwargs
    )
