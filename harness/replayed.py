"""Replayed states: one forward in which every stage starts from the oracle's own values, so that an error stays where it is.

The decision tape replays a model's choices; this replays its activations. A hook on each module with an official name
writes down what the module gives, and hands on what the fp64 oracle gave there, rounded to the subject's dtype. So no
stage inherits the error of the one before it, in the same layer or in the layers below.

The oracle makes the values on its own way: what it hands on is rounded too, and its next stage is exact for that input.
Where a subject has no such module, nothing is replaced, in the oracle and in the baseline neither: all three then carry
the same stages in one.

Letters: B batch, L rows, R rope dim; * any number of axes.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

# A layer, None outside the layers, and the name of a point.
Key = tuple[int | None, str]
Values = dict[Key, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Point:
    """A tensor of a forward that a module with an official name gives.

    path: of the module, from the layer or from the model. before: it is the module's input. wide: it is handed on in
    at least fp32, because the model keeps it so in every dtype.
    """

    name: str
    path: str
    stage: str
    before: bool = False
    wide: bool = False


IN_LAYERS = (
    Point("normed input", "input_layernorm", "projection"),
    Point("q latent", "self_attn.q_a_layernorm", "projection"),
    Point("queries", "self_attn.q_b_proj", "projection"),
    Point("kv projection", "self_attn.kv_a_proj_with_mqa", "projection"),
    Point("kv latent", "self_attn.kv_a_layernorm", "projection"),
    Point("index queries", "self_attn.indexer.wq_b", "projection"),
    Point("index keys before their norm", "self_attn.indexer.wk", "projection"),
    Point("index keys", "self_attn.indexer.k_norm", "projection"),
    Point("index head weights", "self_attn.indexer.weights_proj", "projection", wide=True),
    Point("heads' outputs", "self_attn.o_proj", "attention", before=True),
    Point("attention's output", "self_attn", "attention"),
    Point("normed input of the FFN", "post_attention_layernorm", "MoE"),
    Point("FFN's output", "mlp", "MoE"),
    Point("layer's output", "", "MoE"),
)
EMBEDDING = Point("embeddings", "model.embed_tokens", "projection")
ROTARY = Point("angles", "model.rotary_emb", "RoPE", wide=True)
FINAL_NORM = Point("final norm", "model.norm", "loss")
POINTS: dict[str, Point] = {point.name: point for point in (EMBEDDING, ROTARY, *IN_LAYERS, FINAL_NORM)}
ANGLES: Key = (None, ROTARY.name)
HEADS = "heads' outputs"


def modules_of(model: nn.Module) -> dict[Key, nn.Module]:
    """The modules of `model` that have a point's official name."""
    named = dict(model.named_modules())
    found: dict[Key, nn.Module | None] = {
        (None, point.name): named.get(point.path) for point in (EMBEDDING, ROTARY, FINAL_NORM)
    }
    layer = 0
    while f"model.layers.{layer}" in named:
        for point in IN_LAYERS:
            found[layer, point.name] = named.get(f"model.layers.{layer}.{point.path}".rstrip("."))
        layer += 1
    return {key: module for key, module in found.items() if module is not None}


@dataclass(slots=True)
class Replay:
    """What the hooks of one forward do, and what they saw.

    only: the points that are hooked. lanes: R. dtype: the subject's.
    values: what is handed on; a key that is not there yet is filled with what the model itself gives, in `dtype`.
    rotated: False turns nothing, by angles of 0 everywhere. touch: False hands everything on as it is.
    """

    only: frozenset[Key]
    lanes: int
    dtype: torch.dtype
    values: Values = field(default_factory=dict)
    rotated: bool = True
    touch: bool = True
    seen: Values = field(default_factory=dict)
    calls: Counter[Key] = field(default_factory=Counter)

    def at(self, key: Key, own: Any) -> Any:
        """Writes down `own`, what a module gives, and returns what is handed on; what is no tensor passes by."""
        self.calls[key] += 1
        if key == ANGLES:
            return self._rotary(own)
        first = own[0] if isinstance(own, tuple) and own else own
        if not isinstance(first, torch.Tensor):
            return own
        self.seen[key] = first.detach()
        if not self.touch:
            return own
        # A copy, because a model may write into what it has just been given.
        given = self._given(key).to(first.dtype).reshape(first.shape).clone()
        return (given, *own[1:]) if isinstance(own, tuple) else given

    def _given(self, key: Key) -> torch.Tensor:
        if key not in self.values:
            # What the model keeps in fp32 whatever its dtype is handed on in fp32.
            self.values[key] = self.seen[key].to(torch.float32 if POINTS[key[1]].wide else self.dtype)
        return self.values[key]

    def _rotary(self, own: Any) -> Any:
        """cos and sin, a column a pair of lanes, are one tensor `[*, L, R]`, cos first."""
        columns = [_of_pairs(x, self.lanes) for x in own] if isinstance(own, tuple) else []
        if len(columns) != 2 or any(x is None for x in columns):
            return own
        self.seen[ANGLES] = torch.cat(cast(list[torch.Tensor], columns), -1).detach()
        if not self.touch:
            return own
        given = self._given(ANGLES)
        cos, sin = given.chunk(2, -1)
        halves = (cos, sin) if self.rotated else (torch.ones_like(cos), torch.zeros_like(sin))
        return tuple(_spread_as(x, half).to(x.dtype) for x, half in zip(own, halves, strict=True))


def _of_pairs(x: Any, lanes: int) -> torch.Tensor | None:
    """`x` with one column a pair of lanes; it may have one a lane, the halves or the neighbours equal. None otherwise."""
    if not isinstance(x, torch.Tensor) or x.dim() < 2 or x.shape[-1] not in (lanes, lanes // 2):
        return None
    if x.shape[-1] == lanes // 2:
        return x
    first, second = x.chunk(2, -1)
    if torch.equal(first, second):
        return first
    return x[..., 0::2] if torch.equal(x[..., 0::2], x[..., 1::2]) else None


def _spread_as(own: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """`pairs` with as many columns as `own`, in its order."""
    if own.shape[-1] == pairs.shape[-1]:
        return pairs
    first, second = own.chunk(2, -1)
    return torch.cat((pairs, pairs), -1) if torch.equal(first, second) else pairs.repeat_interleave(2, -1)


@contextmanager
def hooked(model: nn.Module, replay: Replay) -> Iterator[None]:
    """`model` with the hooks of `replay`, within the block."""

    def before(key: Key) -> Any:
        return lambda _, args: (replay.at(key, args[0]), *args[1:]) if args else None

    def after(key: Key) -> Any:
        return lambda *called: replay.at(key, called[-1])

    handles: list[Any] = []
    for key, module in modules_of(model).items():
        if key in replay.only and POINTS[key[1]].before:
            handles.append(module.register_forward_pre_hook(before(key)))
        elif key in replay.only:
            handles.append(module.register_forward_hook(after(key)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, slots=True)
class Exposed:
    """Which points a subject has, and why it lacks the others, by name."""

    keys: frozenset[Key]
    lacks: tuple[str, ...]


def exposed(subject: Replay, reference: Replay, rows: tuple[int, int]) -> Exposed:
    """The points at which one forward of the subject gave a tensor of the reference's shape, once (angles: at least once).

    Both replays have only looked. rows: B and L; a subject may have them in one axis.
    """
    keys, lacks = set(), dict[tuple[str, str], list[int]]()
    for key, tensor in reference.seen.items():
        why = _why_not(key, subject, tensor.shape, rows)
        if not why:
            keys.add(key)
        else:
            lacks.setdefault((key[1], why), []).extend([] if key[0] is None else [key[0]])
    layers = len({layer for layer, _ in reference.seen if layer is not None})
    told = []
    for (name, why), of_layers in lacks.items():
        word = "layer" if len(of_layers) == 1 else "layers"
        where = "" if len(of_layers) in (0, layers) else f" of {word} {', '.join(map(str, of_layers))}"
        told.append(f"{name}{where} ({POINTS[name].path or 'model.layers'} {why})")
    return Exposed(frozenset(keys), tuple(told))


def _why_not(key: Key, subject: Replay, shape: torch.Size, rows: tuple[int, int]) -> str:
    # Angles may be asked for again: each call gets the same ones.
    if subject.calls[key] != 1 and not (key == ANGLES and key in subject.seen):
        return f"is called {subject.calls[key]} times" if subject.calls[key] else "is not called"
    found = subject.seen.get(key)
    if found is None:
        return "gives no such tensor"
    allowed = [tuple(shape), (rows[0] * rows[1], *shape[2:])] if key != ANGLES else [tuple(shape), (1, *shape[1:])]
    return "" if tuple(found.shape) in allowed else f"gives a tensor of shape {tuple(found.shape)}"
