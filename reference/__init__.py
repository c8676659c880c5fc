"""DeepSeek V3.2, written to be read: the executable specification.

Read it in this order: config → rope → indexer → attention → moe → model → losses. Beside them: layout
(who sees whom), cache, decisions (the tape of discrete choices), checkpoint (the official layout; shards,
streaming, loading, saving), fp8 and fp8_blocks, training, packing (chats into rows).
"""

from .attention import DeepseekV32Attention
from .cache import LatentCache
from .config import PRESETS, DeepseekV32Config
from .decisions import Decisions, LayerDecisions, record_decisions
from .loading import load_model_for_sft
from .losses import causal_lm_loss, compute_indexer_kl_loss, kl_rows
from .model import DeepseekV32ForCausalLM, DeepseekV32Model, DeepseekV32PreTrainedModel
from .outputs import CausalLMOutput
from .saving import Saved, save_official
from .training import freeze_indexer, train_only_indexer, trainable_report

__all__ = [
    "PRESETS", "CausalLMOutput", "Decisions", "DeepseekV32Attention", "DeepseekV32Config", "DeepseekV32ForCausalLM",
    "DeepseekV32Model", "DeepseekV32PreTrainedModel", "LatentCache", "LayerDecisions", "Saved", "causal_lm_loss",
    "compute_indexer_kl_loss", "freeze_indexer", "kl_rows", "load_model_for_sft", "record_decisions", "save_official",
    "train_only_indexer", "trainable_report",
]  # fmt: skip
