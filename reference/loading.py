"""The training guide's `load_model_for_sft`: a checkpoint, ready to be fine-tuned."""

from pathlib import Path
from typing import Any

import torch

from . import training
from .model import DeepseekV32ForCausalLM


def load_model_for_sft(
    path: str | Path,
    freeze_indexer: bool = True,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device_map: Any = None,
    model_class: type[DeepseekV32ForCausalLM] = DeepseekV32ForCausalLM,
    **kwargs: Any,
) -> Any:
    """A model of `model_class` from a checkpoint in the official layout, FP8, bf16 or fp32.

    Training has one parameter dtype: the index keys' norm, which inference in bf16 keeps in fp32, is rounded to
    `dtype` too, and computes in fp32 all the same. The router bias, a buffer that no gradient moves, stays in fp32.
    The model comes in eval mode, as from `from_pretrained`.

    Args:
        path: a checkpoint directory, or a name on the hub.
        freeze_indexer: whether the indexers keep their weights; everything else trains in either case.
        dtype: of all parameters.
        device_map: as of `from_pretrained`: None is the CPU, `"auto"` whatever there is.
        kwargs: handed on to `from_pretrained`: fields of the config, `max_memory`, `offload_folder` and so on.

    Raises:
        ValueError: a dtype that no model trains in; a checkpoint that does not fit, by its first tensor that is wrong.
    """
    if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"dtype is {dtype!r}; it must be torch.bfloat16, float16, float32 or float64.")
    model = model_class.from_pretrained(path, dtype=dtype, device_map=device_map, **kwargs)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if freeze_indexer:
        training.freeze_indexer(model)
    return model
