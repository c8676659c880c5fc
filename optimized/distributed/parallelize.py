"""From the optimized model to the model of a world of ranks: parts replaced, parameters cut, then sharded by FSDP2.

    process group → parallelize(model, layout) → forward of the rank's own batch rows → loss.backward() → clip → step

Every rank starts from the same whole weights. Nothing is sent: each keeps its part of its own copy. Parameter names stay,
and so do the keys of `state_dict`, whose values are DTensors.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from optimized.experts import Experts
from optimized.linear import is_linear
from optimized.model import DeepseekV32Attention, DeepseekV32ForCausalLM
from reference.moe import Gate, SwiGLU
from reference.precision import WideLayerNorm

from .layout import ParallelLayout, Ranks, connect
from .model import ParallelForCausalLM, ParallelModel
from .parts import (
    HeadsLinear,
    ParallelAttention,
    ParallelExperts,
    ParallelGate,
    ParallelSwiGLU,
    PartLinear,
    SummedLinear,
)


def parallelize(model: DeepseekV32ForCausalLM, layout: ParallelLayout) -> ParallelForCausalLM:
    """The model, in place, as this rank's part of `layout`; the default process group must be running.

    Its forward takes whole sequences, those of the rank's place along dp and ep (`ranks.batch_rows`), and gives the
    same loss on every rank. After `backward` gradients are summed and sharded as the parameters are. KL sums of heads on
    several ranks (tp > 1) are computed by the operators' implementation "torch", whatever `model.backend` is.

    Raises:
        ValueError: a model that is not the plain optimized one, a config or a number of ranks that the layout does not
            fit, or no process group.
    """
    if type(model) is not DeepseekV32ForCausalLM:
        raise ValueError(
            f"model is a {type(model).__module__}.{type(model).__name__}; it must be optimized.DeepseekV32ForCausalLM, "
            "without adapters and not parallel yet."
        )
    if not dist.is_initialized():
        raise ValueError("parallelize needs a process group: call torch.distributed.init_process_group first.")
    layout.check(model.config, dist.get_world_size())
    ranks = connect(layout, model.device)
    _replace_parts(model, ranks)
    _shard(model, ranks)
    return cast(ParallelForCausalLM, model)


def _replace_parts(model: DeepseekV32ForCausalLM, ranks: Ranks) -> None:
    """Give each part that is divided its parallel class, and cut its parameters."""
    layout = ranks.layout
    for module in list(model.modules()):
        if isinstance(module, DeepseekV32Attention):
            _become(module, ParallelAttention, ranks)
            if layout.tp > 1:
                _cut_attention(cast(ParallelAttention, module), ranks)
        elif isinstance(module, Experts) and layout.expert_parts > 1:
            _become(module, ParallelExperts, ranks)
            for name in ("gate_up_proj", "down_proj"):
                _cut(module, name, ranks.experts["expert"], 0)
        elif isinstance(module, Gate) and layout.tp > 1:
            _become(module, ParallelGate, ranks)
        elif isinstance(module, SwiGLU) and layout.tp > 1:
            _become(module, ParallelSwiGLU, ranks)
            for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
                _become_part(getattr(module, name), PartLinear, ranks, dim)
    _become(model.model, ParallelModel, ranks)
    _become(model, ParallelForCausalLM, ranks)


def _cut_attention(attention: ParallelAttention, ranks: Ranks) -> None:
    attention.n_heads //= ranks.layout.tp
    _become_part(attention.q_b_proj, HeadsLinear, ranks, 0)
    # Its input is shared by attention itself, where its weight is read directly too.
    _become_part(attention.kv_b_proj, PartLinear, ranks, 0)
    _become_part(attention.o_proj, SummedLinear, ranks, 1)


def _become(module: nn.Module, parallel_class: type[nn.Module], ranks: Ranks) -> None:
    module.__class__ = parallel_class
    cast(Any, module).ranks = ranks


def _become_part(module: nn.Module, parallel_class: type[nn.Module], ranks: Ranks, dim: int) -> None:
    if not is_linear(module):
        raise ValueError(f"model has a {type(module).__name__} where tp cuts a linear layer; it must be a plain one.")
    _become(module, parallel_class, ranks)
    _cut(module, "weight", ranks.tokens["tp"], dim)


def _cut(module: nn.Module, name: str, mesh: DeviceMesh, dim: int) -> None:
    """Make a parameter a DTensor of which this rank keeps one of equal parts along `dim`."""
    whole = module.get_parameter(name)
    part = whole.detach().chunk(mesh.size(), dim)[mesh.get_local_rank()].clone()
    cut = DTensor.from_local(part, mesh, [Shard(dim)], run_check=False)
    setattr(module, name, nn.Parameter(cut, requires_grad=whole.requires_grad))


def _shard(model: DeepseekV32ForCausalLM, ranks: Ranks) -> None:
    """FSDP2 on every layer, on cut experts and, in a model of 16 bits, k_norm by themselves, and on what is left."""
    low = model.dtype in (torch.bfloat16, torch.float16)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if low else None)
    data, replica = ranks.tokens["data"], ranks.experts["replica"]
    before: FSDPModule | None = None
    for layer in model.model.layers:
        large: list[FSDPModule] = []
        for module in layer.modules():
            if isinstance(module, ParallelExperts):
                fully_shard(module, mesh=replica, mp_policy=policy, shard_placement_fn=_beside_the_cut)
                large.append(cast(FSDPModule, module))
            # What FSDP gathers at once has one dtype.
            elif isinstance(module, WideLayerNorm) and module.weight.dtype != model.dtype:
                fully_shard(module, mesh=data, mp_policy=policy)
        fully_shard(layer, mesh=data, mp_policy=policy, shard_placement_fn=_beside_the_cut)
        large.append(cast(FSDPModule, layer))
        # By itself a backward would prefetch k_norm's few numbers, and the layer before only once these are reached.
        for module, following in zip(large, [before, *large], strict=False):
            if following is not None:
                module.set_modules_to_backward_prefetch([following])
        before = large[-1]
    # Outside of a forward and a backward `model.parameters()` are the shards, also after a forward without a backward.
    fully_shard(model, mesh=data, mp_policy=policy, shard_placement_fn=_beside_the_cut, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are divided by counts of all ranks already. gloo has no sum with a factor.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _beside_the_cut(parameter: nn.Parameter) -> Shard | None:
    """The axis that FSDP shards: never the one that is cut already, so that parts stay in order in a checkpoint."""
    if not isinstance(parameter, DTensor):
        return None
    return Shard(1) if parameter.placements[0].is_shard(0) else Shard(0)
