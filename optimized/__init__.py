"""DeepSeek V3.2 with fused operators: the reference's API and weights, and never an L×L buffer."""

from reference import DeepseekV32Config, compute_indexer_kl_loss, save_official

from .loading import load_model_for_sft
from .model import DeepseekV32Attention, DeepseekV32ForCausalLM, DeepseekV32Model, check_backend, implementations
from .plug_in import plug_into_transformers

__all__ = [
    "DeepseekV32Attention", "DeepseekV32Config", "DeepseekV32ForCausalLM", "DeepseekV32Model", "check_backend",
    "compute_indexer_kl_loss", "implementations", "load_model_for_sft", "plug_into_transformers", "save_official",
]  # fmt: skip
