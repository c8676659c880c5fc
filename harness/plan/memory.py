"""The memory of one rank in one training step, from what each block keeps and makes (`blocks`): a walk through the step.

    forward    layer by layer: what a block keeps stays, what it makes beside is alive once
    backward   in reverse: a block's own are set free, gradients of its parameters come and stay
    update     gradients, optimizer state, and the optimizer's temporaries

With checkpointing a layer keeps its input and its selection, and is computed again before its backward. The peak is the
fullest moment of the walk. Everything is in bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .blocks import Block, attention, dense_ffn, experts, head
from .parameters import Parameter
from .step import INT32, WIDE, Step

# AdamW keeps two moments, Muon one, each in the parameter's dtype.
MOMENTS = {"adamw": 2, "muon": 1}
MUON_GROUPS = ("attention", "FFN, shared experts")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank.

    weights, optimizer: between steps. gradients: at the end of the backward. kept: activations at the end of the
    forward. workspace: what is alive beside them at the fullest moment. communication: gathered weights of the layers
    at work, gradients on their way. growth: the peak of forward and backward beyond weights and optimizer state.
    update: the same of the optimizer's step.
    """

    weights: int
    optimizer: int
    gradients: int
    kept: int
    workspace: int
    communication: int
    growth: int
    update: int
    moment: str

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.optimizer + self.communication + max(self.growth, self.update)


def memory(step: Step) -> Memory:
    """The memory of a rank."""
    a = step.itemsize
    held = {id(p): step.shard(p) for p in step.parameters}
    weights = a * sum(held.values())
    trained = [p for p in step.parameters if p.trains]
    state = sum(held[id(p)] * MOMENTS[optimizer_of(step, p)] for p in trained) * a
    gradients = a * sum(held[id(p)] for p in trained)
    walk = _Walk(step, held)
    kept, growth, moment = walk.run()
    alone = max(growth - max(kept, gradients), 0)
    return Memory(
        weights, state, gradients, kept, alone, _communication(step), growth,
        gradients + _update(step, trained, held), moment,
    )  # fmt: skip


def optimizer_of(step: Step, parameter: Parameter) -> str:
    """`muon` for the layers' matrices where the stage trains them so, else `adamw`; as `harness.training.optimizers`."""
    matrix = len(parameter.shape) == 2 and parameter.group in MUON_GROUPS
    return "muon" if step.muon and matrix else "adamw"


def _update(step: Step, trained: Sequence[Parameter], held: dict[int, int]) -> int:
    """Temporaries of the optimizer: on a GPU a square root of all second moments at once, else two of one parameter."""
    sizes = [held[id(p)] for p in trained if optimizer_of(step, p) == "adamw"]
    if not sizes:
        return 0
    return step.itemsize * (sum(sizes) if step.on_gpu else 2 * max(sizes))


def _communication(step: Step) -> int:
    """FSDP2's buffers beside the shards: weights of the layer at work and of the next, gradients on their way.

    In the forward the gathered buffer, its copy by parameter, and the next layer's buffer; in the backward two of them and
    a layer's gradients whole, with a copy in fp32 where the dtype is lower. Without ranks to gather from one less. Experts
    that are cut and not sharded have none.
    """
    if step.layout.world == 1:
        return 0
    layers: dict[int, list[Parameter]] = {}
    for parameter in step.parameters:
        if parameter.layer is not None and (step.sharding(parameter) > 1 or not parameter.is_expert):
            layers.setdefault(parameter.layer, []).append(parameter)
    gathered = max(sum(map(step.whole, found)) for found in layers.values()) * step.itemsize
    trained = max(sum(step.whole(p) for p in found if p.trains) for found in layers.values())
    reduced = trained * (step.itemsize + (WIDE if step.itemsize < WIDE else 0))
    copies = 2 if step.layout.data > 1 else 1
    return max((copies + 1) * gathered, copies * gathered + reduced)


class _Walk:
    """What is alive, and the most that ever was."""

    def __init__(self, step: Step, held: dict[int, int]) -> None:
        self.step, self.live, self.peak, self.moment = step, 0, 0, ""
        self.grads: dict[int | None, int] = {}
        for parameter in step.parameters:
            if parameter.trains:
                self.grads[parameter.layer] = self.grads.get(parameter.layer, 0) + held[id(parameter)] * step.itemsize
        self.attention, self.dense, self.experts = attention(step), dense_ffn(step), experts(step)

    def run(self) -> tuple[int, int, str]:
        """Bytes kept at the end of the forward, peak bytes, and what was computed at the peak."""
        step, layers = self.step, range(self.step.config.num_hidden_layers)
        remembered = _remembered(step)
        for layer in layers:
            before = self.live
            self._forward(layer)
            if step.forgets:
                self.live = before + remembered
        last = head(step)
        self._at(last.forward + last.size, "the head's forward")
        self.live += last.size
        kept = self.live
        outside = self.grads.get(None, 0)
        self._at(last.backward, "the head's backward")
        # The logits are a part of the answer, which the loop holds until the step is done.
        freed = last.size - last.kept["logits"] if self.step.trains != "indexer" else 0
        self.live += outside // 2 - freed
        for layer in reversed(layers):
            if step.forgets:
                self.live -= remembered
                self._forward(layer)
            self._backward(layer)
        self.live += outside - outside // 2
        self._at(0, "the end")
        return kept, self.peak, self.moment

    def _blocks(self, layer: int) -> tuple[Block, Block]:
        return self.attention, self.experts if self.step.config.is_moe_layer(layer) else self.dense

    def _forward(self, layer: int) -> None:
        for block in self._blocks(layer):
            self._at(block.forward + block.size, f"forward of {block.name}, layer {layer}")
            self.live += block.size

    def _backward(self, layer: int) -> None:
        first, second = self._blocks(layer)
        grads = self.grads.get(layer, 0)
        if self.step.trains == "indexer" and self.step.checkpointing:
            # Only the KL's own part is reached, and set free.
            self._at(first.backward, f"backward of {first.name}, layer {layer}")
            self.live += grads - first.of_kl
            return
        # Most of a layer's parameters are the FFN's, whose gradients are there before attention's.
        for block in (second, first):
            self._at(block.backward + grads, f"backward of {block.name}, layer {layer}")
            self.live -= block.size
        self.live += grads

    def _at(self, more: int, moment: str) -> None:
        if self.live + more > self.peak:
            self.peak, self.moment = self.live + more, moment


def _remembered(step: Step) -> int:
    """What a checkpointed layer keeps: its input, and the selection that its recomputation takes again."""
    chosen = step.rows * step.selected * INT32 if step.sparse else 0
    return step.rows * step.config.hidden_size * step.itemsize + chosen
