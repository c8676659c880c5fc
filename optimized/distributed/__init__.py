"""The optimized model on many devices, by torch's own engine: FSDP2, device meshes, DTensors, distributed checkpoints."""

from .gradients import clip_gradients, global_norm
from .layout import ParallelLayout, Ranks
from .model import ParallelForCausalLM
from .parallelize import parallelize

__all__ = ["ParallelForCausalLM", "ParallelLayout", "Ranks", "clip_gradients", "global_norm", "parallelize"]
