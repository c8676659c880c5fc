"""The optimized model on many devices, by torch's own engine: FSDP2, device meshes, DTensors, distributed checkpoints."""

from .checkpoint import checkpoint_tensors, full_state_dict, load_checkpoint, plain_model, save_checkpoint
from .gradients import clip_gradients, global_norm, largest_entries
from .layout import ParallelLayout, Ranks
from .model import ParallelForCausalLM
from .muon import ShardedMuon
from .parallelize import parallelize

__all__ = [
    "ParallelForCausalLM", "ParallelLayout", "Ranks", "ShardedMuon", "checkpoint_tensors", "clip_gradients",
    "full_state_dict", "global_norm", "largest_entries", "load_checkpoint", "parallelize", "plain_model", "save_checkpoint",
]  # fmt: skip
