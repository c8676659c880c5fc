"""Cases of single operators: sizes, a family of inputs that kernels get wrong, and a seed (spec 5.0).

Everything is drawn in fp64 from a generator of its own, by the name of the tensor, and rounded to the dtype of a bench
later. What is drawn only when it is asked for costs nothing in a check of another operator.

Letters: B batch, L query rows, S key slots, H attention heads, D width of a query or key, V width of a value,
J indexer heads, E width of an indexer head, K selected keys, 2 = [start, end).
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch

from reference import DeepseekV32Config
from reference.indexer import selected_mask
from reference.rope import softmax_scale

Mask = Literal["causal", "documents", "around k"]
Scores = Literal["spread", "zero plateau", "whole numbers", "negative", "narrow"]
Values = Literal["plain", "outliers", "magnitudes"]

# Standard deviation of the attention logits of a plain case: far from uniform, and far from one-hot.
_LOGITS = 2.0
# Heads that are open in a narrow case: the sum of 2⁴ numbers of 20 bits is exact in fp32.
_OPEN_HEADS = 16


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the tensors of a case are. `k` keys are selected of a row that sees more."""

    batch: int
    rows: int
    slots: int
    heads: int
    width: int
    values: int
    index_heads: int
    index_width: int
    k: int

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if (size := getattr(self, name)) < 1:
                raise ValueError(f"Sizes: {name} is {size}; it must be 1 or more.")
        if self.rows > self.slots:
            raise ValueError(f"Sizes: rows is {self.rows}; it must be at most slots = {self.slots}.")
        if self.values > self.width:
            raise ValueError(f"Sizes: values is {self.values}; it must be at most width = {self.width}.")


@dataclass(frozen=True, slots=True)
class Family:
    """What is adversarial about a case.

    mask: which keys a row sees. "causal": all up to its own, the rows being the last of the slots. "documents": those
        of its own document, of at least three, and rows behind the last document see none. "around k": k − 1, k or
        k + 1 keys from anywhere.
    scores: what the index scores are like. "zero plateau": most are exactly 0, because the ReLU shuts every head.
        "whole numbers": of few values, on keys that are repeated, with zeros of either sign. "negative": never
        positive, because every head weight is negative. "narrow": within one step of fp16, and yet distinct in fp32.
    values: "outliers": keys with a mean and a loud channel. "magnitudes": numbers from 1e-4 to 1e4.
    holes: −1 anywhere among a row's indices, all before the keys in some rows, and rows of −1 alone.
    strided: no tensor is contiguous, and some are expanded.
    """

    mask: Mask = "causal"
    scores: Scores = "spread"
    values: Values = "plain"
    holes: bool = False
    strided: bool = False


@dataclass(frozen=True)
class OperatorCase:
    """The inputs of every operator, in fp64 on the CPU."""

    name: str
    sizes: Sizes
    family: Family
    seed: int
    scale: float
    config: DeepseekV32Config | None = None
    needs: frozenset[str] = field(default_factory=frozenset)

    @property
    def exact(self) -> bool:
        """Whether every index score is the same number in every dtype and order of summation."""
        return self.family.scores in ("zero plateau", "whole numbers", "narrow")

    @cached_property
    def bounds_BL2(self) -> torch.Tensor:
        """int64 [start, end) of the key slots that each row sees."""
        bounds = [_BOUNDS[self.family.mask](self.sizes, b) for b in range(self.sizes.batch)]
        return bounds[0].expand(self.sizes.batch, -1, -1) if self.family.strided else torch.stack(bounds)

    @cached_property
    def visible_BLS(self) -> torch.Tensor:
        """The bounds spelt out."""
        slots = torch.arange(self.sizes.slots)
        return (slots >= self.bounds_BL2[..., :1]) & (slots < self.bounds_BL2[..., 1:])

    @cached_property
    def indices_BLK(self) -> torch.Tensor:
        """int32: min(k, S) of each row's visible keys at random, distinct, ascending with −1 at the tail."""
        noise = self._uniform("indices", *self.visible_BLS.shape).masked_fill(~self.visible_BLS, -1.0)
        found = noise.topk(min(self.sizes.k, self.sizes.slots), dim=-1)
        chosen = torch.where(found.values < 0, -1, found.indices).to(torch.int32)
        if not self.family.holes:
            past_all = self.sizes.slots
            ascending = torch.where(chosen < 0, past_all, chosen).sort(-1).values
            return torch.where(ascending == past_all, -1, ascending)
        # Two keys stay in every row that has them, so that a softmax has something to weigh.
        dropped = self._uniform("holes", *chosen.shape) < 0.3
        dropped[..., :2] = False
        dropped[:, 3::7] = True
        order = self._uniform("places", *chosen.shape).argsort(-1)
        chosen = chosen.masked_fill(dropped, -1).gather(-1, order)
        # Some rows have their keys at the very end: what a kernel carries from block to block meets blocks without any.
        at_end = chosen[:, 1::5].sort(-1).values
        at_end[..., :-3] = -1
        chosen[:, 1::5] = at_end
        return chosen

    @cached_property
    def candidates_BLS(self) -> torch.Tensor:
        """Which keys the indices name."""
        return selected_mask(self.indices_BLK, self.sizes.slots)

    @cached_property
    def index_inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`q_BLJE`, `k_BSE` and `w_BLJ` of the indexer, every constant folded into w."""
        return _SCORES[self.family.scores](self)

    @cached_property
    def q_BLHD(self) -> torch.Tensor:
        """Queries, so large that the logits of a plain case have a standard deviation of 2."""
        s = self.sizes
        q = self._normal("q", s.batch, s.rows, s.heads, s.width) * self._row_factors[:, None, None]
        spread = (self._channels("kv", s.width)[0] ** 2).sum().sqrt()
        return q * float(_LOGITS / (self.scale * spread))

    @cached_property
    def kv_BSD(self) -> torch.Tensor:
        """The latent that all heads share: keys, and in the first V columns values."""
        s = self.sizes
        gain, mean = self._channels("kv", s.width)
        return self._repeated(self._normal("kv", s.batch, s.slots, s.width)) * gain + mean

    @cached_property
    def k_BSHD(self) -> torch.Tensor:
        """A key a head; in a strided case the latent, expanded."""
        s = self.sizes
        if self.family.strided:
            return self.kv_BSD[:, :, None].expand(-1, -1, s.heads, -1)
        gain, mean = self._channels("kv", s.width)
        return self._repeated(self._normal("k", s.batch, s.slots, s.heads, s.width)) * gain + mean

    @cached_property
    def v_BSHV(self) -> torch.Tensor:
        """A value a head; in a strided case the first columns of the keys."""
        s = self.sizes
        if self.family.strided:
            return self.k_BSHD[..., : s.values]
        gain, mean = self._channels("v", s.values)
        return self._repeated(self._normal("v", s.batch, s.slots, s.heads, s.values)) * gain + mean

    @cached_property
    def dout_BLHV(self) -> torch.Tensor:
        """What is fed back into attention's output."""
        return self._normal("dout", self.sizes.batch, self.sizes.rows, self.sizes.heads, self.sizes.values)

    @cached_property
    def dscores_BLS(self) -> torch.Tensor:
        """What is fed back into the index scores."""
        return self._normal("dscores", self.sizes.batch, self.sizes.rows, self.sizes.slots)

    def generator(self, name: str) -> torch.Generator:
        """The generator of whatever is called `name` in this case."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + zlib.crc32(f"{self.name} {name}".encode()))

    def _normal(self, name: str, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator(name), dtype=torch.float64)

    def _uniform(self, name: str, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator(name), dtype=torch.float64)

    def _whole(self, name: str, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator(name)).double()

    @cached_property
    def _row_factors(self) -> torch.Tensor:
        """What multiplies each row's queries: 1, or from 10 (rows that see few keys) down to 1e-4."""
        if self.family.values != "magnitudes":
            return torch.ones(self.sizes.rows, dtype=torch.float64)
        exponents = (
            torch.linspace(1, -4, self.sizes.rows, dtype=torch.float64) if self.sizes.rows > 1 else torch.zeros(1)
        )
        return 10.0 ** exponents.double()

    def _channels(self, name: str, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(standard deviation, mean) of each channel of keys or values."""
        gain, mean = torch.ones(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        if self.family.values == "outliers":
            gain[int(self._whole(f"{name} loud", 0, width - 1, 1))] = 8.0
            mean = 2.0 * self._normal(f"{name} mean", width).sign()
        return gain * (1e-4 if self.family.values == "magnitudes" else 1.0), mean

    def _repeated(self, x_BSX: torch.Tensor) -> torch.Tensor:
        """Every key four times on average, where scores are whole numbers."""
        if self.family.scores != "whole numbers":
            return x_BSX
        return x_BSX[:, self._whole("repeats", 0, self.sizes.slots // 4, self.sizes.slots).long()]


def _causal(s: Sizes, _: int) -> torch.Tensor:
    end = torch.arange(s.slots - s.rows + 1, s.slots + 1)
    return torch.stack([torch.zeros_like(end), end], -1)


def _documents(s: Sizes, b: int) -> torch.Tensor:
    bounds = _causal(s, b)
    position = bounds[:, 1] - 1
    # Documents of one, two and nine twelfths, a little longer from entry to entry, then a sixteenth that is padding.
    last = s.slots - s.slots // 16
    first = max(1, last // 12) + b % 3
    for start in (first, max(first + 1, last // 4 + b % 3)):
        bounds[:, 0] = torch.where(position >= start, start, bounds[:, 0])
    bounds[position >= last] = last
    return bounds


def _around_k(s: Sizes, b: int) -> torch.Tensor:
    row = torch.arange(s.rows)
    seen = (s.k - 1 + (row + 2) % 3).clamp(0, s.slots)
    start = (row * 7 + b) % (s.slots - seen + 1)
    return torch.stack([start, start + seen], -1)


def _spread(case: OperatorCase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    s = case.sizes
    gain, mean = case._channels("index", s.index_width)
    rows = case._row_factors
    q = case._normal("iq", s.batch, s.rows, s.index_heads, s.index_width) * rows[:, None, None]
    k = case._normal("ik", s.batch, s.slots, s.index_width) * gain + mean
    # The head weights undo what the rows and channels were multiplied by, so that every row's scores are of one size.
    size = 2.0 / (math.sqrt(s.index_heads) * float((gain**2).sum().sqrt()))
    w = case._normal("w", s.batch, s.rows, s.index_heads) * (size / rows[:, None])
    return q, k, w


def _negative(case: OperatorCase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, w = _spread(case)
    return q, k, -w.abs()


def _zero_plateau(case: OperatorCase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    s = case.sizes
    q = -case._whole("iq", 1, 2, s.batch, s.rows, s.index_heads, s.index_width)
    k = case._whole("ik", 1, 2, s.batch, s.slots, s.index_width)
    # A few keys open the heads: above the plateau in rows of positive weights, below it in the others.
    opened = case._uniform("opened", s.batch, s.slots).argsort(-1) < max(1, s.k // 3)
    k = torch.where(opened[..., None], -k, k)
    sign = 1.0 - 2.0 * (torch.arange(s.rows) % 2).double()
    w = case._whole("w", 1, 2, s.batch, s.rows, s.index_heads) * sign[:, None]
    return q, k, w * _power_of_two(2 * s.index_heads * s.index_width)


def _whole_numbers(case: OperatorCase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    s = case.sizes
    q = case._whole("iq", -2, 2, s.batch, s.rows, s.index_heads, s.index_width)
    k = case._repeated(case._whole("ik", -2, 2, s.batch, s.slots, s.index_width))
    k[:, ::9] = 0.0
    k = torch.where((k == 0) & (case._uniform("sign", *k.shape) < 0.5), -0.0, k)
    w = case._whole("w", 1, 2, s.batch, s.rows, s.index_heads) * (
        1 - 2 * case._whole("side", 0, 1, s.rows, s.index_heads)
    )
    return q, k, w * _power_of_two(4 * math.sqrt(s.index_heads * s.index_width))


def _narrow(case: OperatorCase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    s = case.sizes
    if s.index_width < 2:
        raise ValueError(f"Sizes: index_width is {s.index_width}; narrow scores need two channels or more.")
    # A dot product is 1 ± n · 2⁻¹⁹ with 0 ≤ n < 256: one step of fp16 holds all of them, and bf16 holds each factor.
    step = case._uniform("steps", s.batch, max(256, s.slots)).argsort(-1)[:, : s.slots] % 256
    k = case._normal("ik", s.batch, s.slots, s.index_width)
    k[..., 0], k[..., 1] = 1.0, step / 256.0
    q = torch.zeros(s.batch, s.rows, s.index_heads, s.index_width, dtype=torch.float64)
    q[..., 0], q[:, ::2, :, 1], q[:, 1::2, :, 1] = 1.0, 2.0**-11, -(2.0**-11)
    q[:, :, _OPEN_HEADS:] *= -1.0
    w = torch.full(
        (s.batch, s.rows, s.index_heads), _power_of_two(min(s.index_heads, _OPEN_HEADS)), dtype=torch.float64
    )
    return q, k, w


def _power_of_two(size: float) -> float:
    """The largest power of two that is at most 1 / size."""
    return 2.0 ** -math.ceil(math.log2(size))


_BOUNDS: dict[Mask, Callable[[Sizes, int], torch.Tensor]] = {
    "causal": _causal, "documents": _documents, "around k": _around_k,
}  # fmt: skip
_SCORES: dict[Scores, Callable[[OperatorCase], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {
    "spread": _spread, "negative": _negative, "zero plateau": _zero_plateau, "whole numbers": _whole_numbers,
    "narrow": _narrow,
}  # fmt: skip


def _same(sizes: Sizes) -> Sizes:
    return sizes


def _odd(s: Sizes) -> Sizes:
    # More batch entries than heads: a kernel that swaps the two strides reads past the end.
    return replace(
        s, batch=5, rows=max(1, s.rows // 3), heads=3, width=40, values=24, index_heads=5, index_width=24,
    )  # fmt: skip


def _many(s: Sizes) -> Sizes:
    # Kernels work in blocks of keys: what goes wrong between blocks shows only where a row has several.
    return replace(s, batch=1, rows=min(s.rows, 5), slots=max(s.slots, 700), k=max(s.k, 300))


_NAMED: dict[str, tuple[Family, Callable[[Sizes], Sizes]]] = {
    "causal": (Family(), _same),
    "documents": (Family(mask="documents"), _same),
    "chunk": (Family(holes=True), lambda s: replace(s, rows=max(1, s.rows // 3))),
    "around-k": (Family(mask="around k"), lambda s: replace(s, rows=max(1, s.rows // 2))),
    "one-row": (Family(), lambda s: replace(s, rows=1)),
    "zero-ties": (Family(scores="zero plateau"), lambda s: replace(s, index_heads=min(s.index_heads, 2))),
    "duplicate-keys": (Family(scores="whole numbers"), _same),
    "negative-weights": (Family(scores="negative"), _same),
    "narrow-range": (Family(scores="narrow"), _same),
    "outliers": (Family(values="outliers"), _same),
    "magnitudes": (Family(values="magnitudes"), _same),
    "many-keys": (Family(holes=True), _many),
    "odd-shapes": (Family(mask="documents", holes=True, strided=True), _odd),
}
OPERATOR_CASES: tuple[str, ...] = tuple(_NAMED)
# Cases in which many scores are equal, in every dtype.
TIED_CASES = frozenset({"zero-ties", "duplicate-keys"})


def build_operator_case(
    name: str, config: DeepseekV32Config, *, seed: int, length: int, batch: int = 2
) -> OperatorCase:
    """The case called `name` with the sizes of `config`'s operators and `length` key slots.

    Heads are the attention's, D is kv_lora_rank + qk_rope_head_dim, V is kv_lora_rank, the scale is the model's own;
    some cases have fewer rows than slots, and "odd-shapes" has sizes of its own.

    Raises:
        ValueError: an unknown name, or a length below 8.
    """
    if name not in _NAMED:
        raise ValueError(f"Unknown case {name!r}; cases of operators are {', '.join(OPERATOR_CASES)}.")
    if length < 8:
        raise ValueError(f"seq_len is {length}; cases of operators need 8 slots or more.")
    latent = config.kv_lora_rank
    sizes = Sizes(
        batch=batch, rows=length, slots=length, heads=config.num_attention_heads,
        width=latent + config.qk_rope_head_dim, values=latent, index_heads=config.index_n_heads,
        index_width=config.index_head_dim, k=config.index_topk,
    )  # fmt: skip
    family, resized = _NAMED[name]
    return OperatorCase(name, resized(sizes), family, seed, softmax_scale(config), config)
