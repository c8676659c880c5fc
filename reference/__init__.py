"""DeepSeek V3.2, written to be read: the executable specification.

Read it in this order: config → rope → indexer → attention → moe → model → losses. Beside them: layout
(who sees whom), cache, decisions (the tape of discrete choices), checkpoint, fp8, training.
"""

from .attention import DeepseekV32Attention
from .cache import LatentCache
from .config import PRESETS, DeepseekV32Config
from .decisions import Decisions, LayerDecisions
from .losses import causal_lm_loss, compute_indexer_kl_loss, kl_rows
from .model import DeepseekV32ForCausalLM, DeepseekV32Model, DeepseekV32PreTrainedModel
from .outputs import CausalLMOutput
from .training import freeze_indexer, train_only_indexer, trainable_report

__all__ = [
    "PRESETS", "CausalLMOutput", "Decisions", "DeepseekV32Attention", "DeepseekV32Config", "DeepseekV32ForCausalLM",
    "DeepseekV32Model", "DeepseekV32PreTrainedModel", "LatentCache", "LayerDecisions", "causal_lm_loss",
    "compute_indexer_kl_loss", "freeze_indexer", "kl_rows", "train_only_indexer", "trainable_report",
]  # fmt: skip
