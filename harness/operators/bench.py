"""One case of single operators in one dtype: what each operator is called with, and what came back from whom.

Three run every call: the oracle (the plain definitions in fp64), the baseline (the same in the bench's dtype) and the
subject. All get the inputs as rounded to the dtype, so that what is compared is arithmetic.

Letters: B batch, L query rows, S key slots, H attention heads, D width of a query or key, V width of a value,
J indexer heads, E width of an indexer head, K selected keys.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch

from ..checks.base import SubjectError
from ..subjects import Subject
from .cases import OperatorCase
from .plain import reference_operators

T = TypeVar("T")

PLAIN = reference_operators()
# What an operator returns, in order.
OUTPUTS: dict[str, tuple[str, ...]] = {
    "index_scores": ("I",),
    "indexer_topk": ("indices", "lse"),
    "sparse_mla": ("out", "lse"),
    "dense_mla": ("out", "lse"),
    "indexer_kl": ("kl_sum", "kl"),
}
# An operator that takes indices if it is given any is called without and with them.
FORMS = (
    "index_scores", "indexer_topk", "sparse_mla", "dense_mla", "dense_mla, selected", "indexer_kl",
    "indexer_kl, selected",
)  # fmt: skip
# What the KL's gradient is multiplied by on its way back: exact in every dtype, and not 1.
UPSTREAM = 1.75
# Elements of the largest temporary of a plain definition: rows are taken a block at a time beyond it.
_BLOCK = 2**26


@dataclass(frozen=True, eq=False)
class Call:
    """An operator, its positional arguments by name, the ones that take gradient, and what is fed back for it."""

    operator: str
    arguments: dict[str, Any]
    wrt: tuple[str, ...] = ()
    cotangent: torch.Tensor | None = None

    def changed(self, **arguments: Any) -> "Call":
        """The same call with some of its arguments replaced."""
        return replace(self, arguments={**self.arguments, **arguments})

    def to(self, dtype: torch.dtype) -> "Call":
        """The same call with every floating tensor in `dtype`."""
        return replace(self, arguments={n: _cast(a, dtype) for n, a in self.arguments.items()})


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an operator returned, and the gradients of its first output, by name; None where no gradient arrived."""

    outputs: dict[str, torch.Tensor]
    gradients: Mapping[str, torch.Tensor | None] = field(default_factory=dict)

    def gradient(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """The gradient of argument `name`; zeros where none arrived."""
        found = self.gradients[name]
        return torch.zeros_like(like) if found is None else found


def run_call(function: Callable[..., Any], call: Call, gradients: bool) -> Outcome:
    """Run `call` on copies of its arguments, which keep their strides.

    Raises:
        SubjectError: it returned something else than its outputs, or wrote into an argument.
    """
    arguments = {n: copied(a) if isinstance(a, torch.Tensor) else a for n, a in call.arguments.items()}
    if gradients:
        for name in call.wrt:
            arguments[name].requires_grad_()
    with torch.set_grad_enabled(gradients):
        outputs = _named(call.operator, function(*arguments.values()))
    found: dict[str, torch.Tensor | None] = {}
    if gradients:
        found = _backward(call, arguments, outputs)
    for name, given in call.arguments.items():
        if isinstance(given, torch.Tensor) and not _same(arguments[name].detach(), given):
            raise SubjectError(f"{call.operator} wrote into its argument {name}; it must leave its inputs as they are")
    return Outcome({n: x.detach() for n, x in outputs.items()}, found)


def _backward(
    call: Call, arguments: Mapping[str, Any], outputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor | None]:
    first = outputs[OUTPUTS[call.operator][0]]
    if not first.requires_grad:
        raise SubjectError(f"{call.operator} declares backward, but its first output carries no gradient")
    assert call.cotangent is not None
    found = torch.autograd.grad(
        first,
        [arguments[name] for name in call.wrt],
        call.cotangent.to(first.dtype).expand_as(first),
        allow_unused=True,
    )
    return dict(zip(call.wrt, found, strict=True))


def _named(operator: str, returned: Any) -> dict[str, torch.Tensor]:
    names = OUTPUTS[operator]
    tensors = (returned,) if len(names) == 1 else returned
    if (
        not isinstance(tensors, (tuple, list))
        or len(tensors) != len(names)
        or not all(isinstance(x, torch.Tensor) for x in tensors)
    ):
        shown = [type(x).__name__ for x in tensors] if isinstance(tensors, (tuple, list)) else type(tensors).__name__
        raise SubjectError(f"{operator} returned {shown}; it must return {' and '.join(names)}, as tensors")
    return dict(zip(names, tensors, strict=True))


def plain_outcome(call: Call, function: Callable[..., Any] | None = None, gradients: bool = True) -> Outcome:
    """A plain definition, or `function` in its place, on `call`; rows a block at a time, so that true sizes fit.

    A block's rows share all keys: outputs are joined, sums and gradients of keys added.
    """
    function = function or PLAIN[call.operator]
    gradients = gradients and bool(call.wrt)
    by_row = {n: a for n, a in call.arguments.items() if isinstance(a, torch.Tensor) and "_BL" in n}
    rows = next(iter(by_row.values())).shape[1]
    block = max(1, _BLOCK // max(1, _elements_a_row(call)))
    if block >= rows:
        return run_call(function, call, gradients)
    parts = []
    for start in range(0, rows, block):
        here = slice(start, start + block)
        cotangent = call.cotangent
        if cotangent is not None and cotangent.dim() > 1:
            cotangent = cotangent[:, here]
        part = replace(call.changed(**{n: a[:, here] for n, a in by_row.items()}), cotangent=cotangent)
        parts.append(run_call(function, part, gradients))
    outputs = {n: _joined([p.outputs[n] for p in parts]) for n in parts[0].outputs}
    return Outcome(outputs, {n: _joined([_held(p, n) for p in parts], n not in by_row) for n in parts[0].gradients})


def _held(part: Outcome, name: str) -> torch.Tensor:
    found = part.gradients[name]
    assert found is not None, "every argument of a plain definition that takes gradient gets some"
    return found


def _joined(parts: list[torch.Tensor], summed: bool = False) -> torch.Tensor:
    return torch.stack(parts).sum(0) if summed or parts[0].dim() == 0 else torch.cat(parts, 1)


def _elements_a_row(call: Call) -> int:
    """Elements that one query row takes in the largest temporary of a plain definition."""
    heads = max(x.shape[2] for n, x in call.arguments.items() if n.endswith(("BLHD", "BLJE")))
    keys = next(x for n, x in call.arguments.items() if n in ("kv_BSD", "k_BSE", "ik_BSE", "k_BSHD"))
    gathered = 0
    if call.operator == "sparse_mla":
        gathered = call.arguments["indices_BLK"].shape[-1] * keys.shape[-1]
    return int(keys.shape[0] * max(heads * keys.shape[1], gathered))


class OperatorBench:
    """A case, a subject and a dtype; every call is run once by each, when it is first asked for."""

    def __init__(self, case: OperatorCase, subject: Subject, dtype: torch.dtype, device: torch.device) -> None:
        self.case, self.subject, self.dtype, self.device = case, subject, dtype, device
        self._calls: dict[str, Call] = {}
        self._seen: dict[tuple[str, bool], Outcome] = {}
        self._plain: dict[tuple[str, str, bool], Outcome] = {}

    def of_subject(self, call: Callable[[], T]) -> T:
        """Run what the subject is answerable for.

        Raises:
            SubjectError: whatever it raised, named.
        """
        try:
            return call()
        except SubjectError:
            raise
        except Exception as error:
            raise SubjectError(f"the subject raised {type(error).__name__}: {error}") from error

    def ask(self, call: Call, gradients: bool = False) -> Outcome:
        """What the subject's operator answers to `call`.

        Raises:
            SubjectError: it raised, returned something else than its outputs, or wrote into an argument.
        """
        return self.of_subject(lambda: run_call(self.subject.operators[call.operator], call, gradients))

    def call(self, form: str) -> Call:
        """What `form` is called with, in this dtype and on this device."""
        if form not in self._calls:
            self._calls[form] = getattr(self, f"_{form.replace(', ', '_')}")()
        return self._calls[form]

    def of_another(self, subject: Subject) -> "OperatorBench":
        """The bench of another subject, which shares everything that does not depend on the subject."""
        other = OperatorBench(self.case, subject, self.dtype, self.device)
        other._calls, other._plain = self._calls, self._plain
        return other

    def seen(self, form: str, gradients: bool = False) -> Outcome:
        """The subject on `form`."""
        if (form, gradients) not in self._seen:
            self._seen[form, gradients] = self.ask(self.call(form), gradients)
        return self._seen[form, gradients]

    def expected(self, form: str, gradients: bool = False) -> Outcome:
        """The plain definition in fp64 on `form`."""
        return self._once(
            "oracle", form, gradients, lambda: plain_outcome(self.call(form).to(torch.float64), gradients=gradients)
        )

    def baseline(self, form: str, gradients: bool = False) -> Outcome:
        """The plain definition in this dtype on `form`: the error of plain low precision."""
        return self._once("baseline", form, gradients, lambda: plain_outcome(self.call(form), gradients=gradients))

    def _once(self, who: str, form: str, gradients: bool, run: Callable[[], Outcome]) -> Outcome:
        if (who, form, True) in self._plain:
            return self._plain[who, form, True]
        if (who, form, gradients) not in self._plain:
            self._plain[who, form, gradients] = run()
        return self._plain[who, form, gradients]

    def tensor(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor of the case in `dtype` (this bench's) and on this device, laid out as the case's family says."""
        dtype = (dtype or self.dtype) if x.is_floating_point() else x.dtype
        # An expanded axis is cast once and expanded again.
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())
        moved = x[once].to(self.device, dtype)
        if self.case.family.strided:
            # Stored with its second and last but one axes swapped, and a column of something else behind each row.
            wide = torch.full((*moved.shape[:-1], moved.shape[-1] + 1), 7, dtype=dtype, device=self.device)
            moved = wide.transpose(1, -2).contiguous().transpose(1, -2)[..., :-1].copy_(moved)
        return moved.expand(x.shape)

    @cached_property
    def bounds_BL2(self) -> torch.Tensor:
        """The case's bounds on this device."""
        return self.tensor(self.case.bounds_BL2)

    @cached_property
    def visible_BLS(self) -> torch.Tensor:
        """The case's visible keys on this device."""
        return self.case.visible_BLS.to(self.device)

    @cached_property
    def _index(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, w = self.case.index_inputs
        # Head weights are in at least fp32 in the model, whatever its dtype.
        return self.tensor(q), self.tensor(k), self.tensor(w, torch.promote_types(self.dtype, torch.float32))

    def _index_scores(self) -> Call:
        q, k, w = self._index
        arguments = {"q_BLJE": q, "k_BSE": k, "w_BLJ": w}
        return Call("index_scores", arguments, ("q_BLJE", "k_BSE", "w_BLJ"), self.case.dscores_BLS.to(self.device))

    def _indexer_topk(self) -> Call:
        q, k, w = self._index
        arguments = {"q_BLJE": q, "k_BSE": k, "w_BLJ": w, "bounds_BL2": self.bounds_BL2, "k": self.case.sizes.k}
        return Call("indexer_topk", arguments)

    @cached_property
    def _queries(self) -> torch.Tensor:
        return self.tensor(self.case.q_BLHD)

    @cached_property
    def _latent(self) -> torch.Tensor:
        return self.tensor(self.case.kv_BSD)

    @cached_property
    def _indices(self) -> torch.Tensor:
        return self.tensor(self.case.indices_BLK)

    @cached_property
    def _dout(self) -> torch.Tensor:
        return self.case.dout_BLHV.to(self.device, self.dtype)

    def _sparse_mla(self) -> Call:
        arguments = {
            "q_BLHD": self._queries, "kv_BSD": self._latent, "indices_BLK": self._indices, "scale": self.case.scale,
            "d_v": self.case.sizes.values,
        }  # fmt: skip
        return Call("sparse_mla", arguments, ("q_BLHD", "kv_BSD"), self._dout)

    def _dense_mla(self) -> Call:
        k, v = self.tensor(self.case.k_BSHD), self.tensor(self.case.v_BSHV)
        arguments = {
            "q_BLHD": self._queries, "k_BSHD": k, "v_BSHV": v, "bounds_BL2": self.bounds_BL2, "scale": self.case.scale,
        }  # fmt: skip
        return Call("dense_mla", arguments, ("q_BLHD", "k_BSHD", "v_BSHV"), self._dout)

    def _dense_mla_selected(self) -> Call:
        return self.call("dense_mla").changed(indices_BLK=self._indices)

    def _indexer_kl(self) -> Call:
        return self._kl(self.call("dense_mla").arguments["k_BSHD"], "dense_mla", {})

    def _indexer_kl_selected(self) -> Call:
        return self._kl(self._latent, "sparse_mla", {"indices_BLK": self._indices})

    def _kl(self, k: torch.Tensor, attention: str, indices: dict[str, torch.Tensor]) -> Call:
        iq, ik, w = self._index
        lse = self.expected(attention).outputs["lse"].to(w.dtype)
        arguments = {
            "iq_BLJE": iq, "ik_BSE": ik, "w_BLJ": w, "q_BLHD": self._queries, "k": k, "lse_BLH": lse,
            "bounds_BL2": self.bounds_BL2, "scale": self.case.scale, **indices,
        }  # fmt: skip
        upstream = torch.tensor(UPSTREAM, dtype=torch.float64, device=self.device)
        return Call("indexer_kl", arguments, ("iq_BLJE", "ik_BSE", "w_BLJ"), upstream)


def _cast(argument: Any, dtype: torch.dtype) -> Any:
    return argument.to(dtype) if isinstance(argument, torch.Tensor) and argument.is_floating_point() else argument


def copied(x: torch.Tensor) -> torch.Tensor:
    """A copy in memory of its own with the same strides, gaps and overlaps included."""
    memory = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage().clone())
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, NaN where NaN is."""
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


__all__ = [
    "FORMS",
    "OUTPUTS",
    "PLAIN",
    "UPSTREAM",
    "Call",
    "OperatorBench",
    "Outcome",
    "copied",
    "plain_outcome",
    "run_call",
]
