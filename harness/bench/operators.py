"""Passes of single operators at the model's sizes, on random inputs: what a kernel takes by itself.

`op:NAME` runs the operator, `op:NAME+bwd` also the backward of its first output. All rows are causal; selected keys are
drawn uniformly from the visible ones, which is the hardest case for a gather. Made for a GPU, where an operator's speed
is compared with the peak that --peak-tflops names; small sizes run on a CPU too.

Letters: B batch, L query rows, S key slots (= L), H attention heads, D width of a query or key, V width of a value,
C kv_lora_rank, J indexer heads, E width of an indexer head, K selected keys.
"""

from collections.abc import Callable
from typing import Any

import torch

from optimized.ops.backend import resolve_backend
from reference import DeepseekV32Config
from reference.rope import softmax_scale

from .passes import Outputs
from .point import Point, operator_of
from .subjects import called, contestant_subject

# Elements of the largest tensor that drawing indices needs at a time.
_DRAWN = 2**24
Operator = Callable[..., Any]


class Inputs:
    """Tensors of one layer in the model's sizes; each is drawn when it is asked for."""

    def __init__(self, config: DeepseekV32Config, point: Point) -> None:
        self.config, self.rows, self.batch = config, point.length, point.batch
        self.device, self.dtype = torch.device(point.device), getattr(torch, point.dtype)
        self.generator = torch.Generator(self.device).manual_seed(point.seed)
        self.scale = softmax_scale(config)

    def normal(self, *shape: int) -> torch.Tensor:
        """`[B, L, *shape]` of standard normal numbers."""
        full = (self.batch, self.rows, *shape)
        return torch.randn(full, generator=self.generator, device=self.device).to(self.dtype)

    def bounds(self) -> torch.Tensor:
        """`[B, L, 2]`: every row sees the slots up to its own."""
        ends = torch.arange(1, self.rows + 1, device=self.device)
        return torch.stack((torch.zeros_like(ends), ends), -1).expand(self.batch, -1, -1).contiguous()

    def indices(self) -> torch.Tensor:
        """`[B, L, K]` int32: min(K, t) of the visible slots, ascending, −1 at the tail."""
        k = min(self.config.index_topk, self.rows)
        slots = torch.arange(self.rows, device=self.device)
        found = torch.empty(self.batch, self.rows, k, dtype=torch.int32, device=self.device)
        step = max(1, _DRAWN // self.rows)
        for b in range(self.batch):
            for start in range(0, self.rows, step):
                rows = slots[start : start + step, None]
                noise = torch.rand(len(rows), self.rows, generator=self.generator, device=self.device)
                chosen = noise.masked_fill_(slots > rows, -1.0).topk(k, -1)
                ascending = torch.where(chosen.values < 0, self.rows, chosen.indices).sort(-1).values
                found[b, start : start + step] = torch.where(ascending == self.rows, -1, ascending)
        return found

    def index(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`q_BLJE`, `k_BSE`, and `w_BLJ` in at least fp32, as the model keeps it."""
        c = self.config
        weights = self.normal(c.index_n_heads).to(torch.promote_types(self.dtype, torch.float32))
        return self.normal(c.index_n_heads, c.index_head_dim), self.normal(c.index_head_dim), weights

    def sparse(self) -> tuple[Any, ...]:
        """Arguments of sparse_mla: absorbed queries, the shared latent."""
        c = self.config
        width = c.kv_lora_rank + c.qk_rope_head_dim
        q, kv = self.normal(c.num_attention_heads, width), self.normal(width)
        return q, kv, self.indices(), self.scale, c.kv_lora_rank

    def dense(self) -> tuple[Any, ...]:
        """Arguments of dense_mla: keys and values of each head."""
        c = self.config
        width = c.qk_nope_head_dim + c.qk_rope_head_dim
        heads = c.num_attention_heads
        q, k, v = self.normal(heads, width), self.normal(heads, width), self.normal(heads, c.v_head_dim)
        return q, k, v, self.bounds(), self.scale


class OperatorPass:
    """A contestant's operator on its inputs; the inputs stand for weights: they are there before the pass."""

    weights_mib = 0.0

    def __init__(self, point: Point) -> None:
        subject = contestant_subject(point.contestant)
        name, self.has_backward = operator_of(point.pass_)
        self.operator: Operator = subject.operators[called(point.pass_)]
        self.backend = point.contestant
        if subject.name == "optimized":
            chosen = point.contestant.partition(":")[2] or None
            self.backend = resolve_backend(called(point.pass_), chosen, torch.device(point.device))
        self.implementations = {"operator": self.backend}
        inputs = Inputs(point.model_config(), point)
        self.arguments, self.wrt = self._arguments(name, inputs, subject.operators)
        if self.has_backward:
            for i in self.wrt:
                self.arguments[i].requires_grad_()

    def warm_up(self) -> Outputs:
        """The pass itself: a kernel that is compiled is compiled for its shapes."""
        return self.run()

    def run(self) -> Outputs:
        """The operator, and its backward when that is a part of the pass."""
        with torch.set_grad_enabled(self.has_backward):
            first, *rest = self.operator(*self.arguments)
            if self.has_backward:
                torch.autograd.backward(first, torch.ones_like(first))
        outputs = {"first output": first.detach()}
        # Logsumexps, and what a KL returns a row; a row of the KL may be 0, all of them may not.
        return outputs | {f"output {i + 2}": tensor.detach() for i, tensor in enumerate(rest)}

    def gradients(self) -> list[torch.Tensor] | None:
        """Of the differentiable inputs; None for a pass that has none."""
        if not self.has_backward:
            return None
        return [self.arguments[i].grad for i in self.wrt if self.arguments[i].grad is not None]

    def forget(self) -> None:
        """Drop the gradients."""
        for i in self.wrt:
            self.arguments[i].grad = None

    @staticmethod
    def _arguments(name: str, inputs: Inputs, operators: Any) -> tuple[list[Any], tuple[int, ...]]:
        """The operator's arguments, and the places of those that take gradient."""
        if name == "indexer_topk":
            return [*inputs.index(), inputs.bounds(), inputs.config.index_topk], ()
        if name == "sparse_mla":
            return list(inputs.sparse()), (0, 1)
        if name == "dense_mla":
            return list(inputs.dense()), (0, 1, 2)
        attention = inputs.sparse() if name.endswith("_selected") else inputs.dense()
        with torch.no_grad():
            lse = operators["sparse_mla" if name.endswith("_selected") else "dense_mla"](*attention)[1]
        selected = (attention[2],) if name.endswith("_selected") else ()
        bounds = inputs.bounds()
        return [*inputs.index(), attention[0], attention[1], lse, bounds, inputs.scale, *selected], (0, 1, 2)
