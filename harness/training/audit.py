"""Which tensors a stage may move, which moved, which got gradient, and for which an optimizer keeps state.

What may move follows from the stage alone, never from `requires_grad`: a forgotten flag is what the audit looks for.
What moved is told by a digest of each tensor's bytes, so that one flipped bit is seen.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from reference.training import Trains, is_indexer, named_tensors, trainable_report
from reports.schema import Measure, NullCandidate, Verdict
from reports.strict_json import JSON

from ..runner import status_of
from .gradients import Gradient, kind_of, table_group
from .ranks import largest_values, whole
from .stages import Stage

# In the order in which one displaces the other as the answer of several steps: the last is never displaced.
ORDER: tuple[Gradient, ...] = ("none", "zero", "finite", "not finite")
ROUTER_BIAS = "e_score_correction_bias"
# In which a step may be too small to change any bit of a weight.
COARSE = (torch.bfloat16, torch.float16)
WHO = {"model": "all but the indexer trains", "indexer": "only the indexer trains", "all": "everything trains"}


def digest(tensor: Tensor) -> str:
    """A digest of the tensor's bytes, dtype and shape: equal where these are, bit for bit, on any number of ranks."""
    raw = whole(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    header = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return hashlib.blake2b(header + raw.tobytes(), digest_size=16).hexdigest()


def digests(model: nn.Module) -> dict[str, str]:
    """The digest of each of `named_tensors`."""
    return {name: digest(tensor) for name, tensor in named_tensors(model).items()}


def has_adapters(names: Iterable[str]) -> bool:
    """Whether any of the parameters called `names` is one of an adapter."""
    return any(".lora_" in name for name in names)


def may_train(name: str, trains: Trains, adapted: bool) -> bool:
    """Whether the parameter `name` trains: as `trains` says, and of an adapted model only the adapters."""
    return (not adapted or ".lora_" in name) and (trains == "all" or is_indexer(name) == (trains == "indexer"))


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of one tensor during a stage."""

    name: str
    may_move: bool
    moved: bool
    gradient: Gradient
    has_state: bool
    in_optimizer: bool
    coarse: bool = False


@dataclass(slots=True)
class Audit:
    """The evidence of a stage, gathered step by step; `start` and `gradients` go into a saved state."""

    stage: Stage
    start: dict[str, str]
    gradients: dict[str, Gradient] = field(default_factory=dict)
    steps: int = 0

    @classmethod
    def begin(cls, model: nn.Module, stage: Stage) -> "Audit":
        """The evidence before the first step."""
        return cls(stage, digests(model))

    def after_backward(self, model: nn.Module) -> None:
        """Note which parameters got gradient in this step."""
        named = list(model.named_parameters())
        # One call for all, because each answer of its own waits for the device.
        with_grad = [(name, p.grad) for name, p in named if p.grad is not None]
        norms = largest_values([grad for _, grad in with_grad])
        largest = torch.stack([norm.float() for norm in norms]).tolist() if norms else []
        answers = {name: kind_of(value) for (name, _), value in zip(with_grad, largest, strict=True)}
        for name, _ in named:
            answer = answers.get(name, "none")
            if ORDER.index(answer) >= ORDER.index(self.gradients.get(name, "none")):
                self.gradients[name] = answer
        self.steps += 1

    def seen(self, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> list[Seen]:
        """The evidence, a tensor at a time."""
        optimizers = list(optimizers)
        with_state = {id(t) for o in optimizers for t, state in o.state.items() if state}
        held = {id(t) for o in optimizers for group in o.param_groups for t in group["params"]}
        tensors = named_tensors(model)
        adapted = has_adapters(tensors)
        parameters = dict(model.named_parameters())
        return [
            Seen(
                name,
                may_move=may_train(name, self.stage.trains, adapted)
                if name in parameters
                else name.endswith(ROUTER_BIAS) and self.stage.bias_rate > 0,
                moved=self.start.get(name) != digest(tensor),
                gradient=self.gradients.get(name, "none"),
                has_state=id(tensor) in with_state,
                in_optimizer=id(tensor) in held,
                coarse=tensor.dtype in COARSE,
            )
            for name, tensor in tensors.items()
        ]


def violations(seen: Iterable[Seen], stage: Stage, steps: int) -> list[str]:
    """One sentence a tensor that was treated against the stage's rule, in the order of the tensors."""
    found = []
    for tensor in seen:
        trains = tensor.may_move and not tensor.name.endswith(ROUTER_BIAS)
        where = f"in stage {stage.name}, where {WHO[stage.trains]}"
        if not tensor.may_move and tensor.moved:
            found.append(f"{tensor.name} may not move {where}, but it is not what it was at the start.")
        elif not tensor.may_move and tensor.gradient != "none":
            found.append(f"{tensor.name} may not move {where}, but it got a gradient.")
        elif not tensor.may_move and (tensor.has_state or tensor.in_optimizer):
            kept = "keeps state for it" if tensor.has_state else "holds it"
            found.append(f"{tensor.name} may not move {where}, but an optimizer {kept}.")
        elif not trains or not steps:
            continue
        elif not tensor.in_optimizer:
            found.append(f"{tensor.name} should train {where}, but no optimizer holds it.")
        elif tensor.gradient == "not finite":
            found.append(f"{tensor.name} got a gradient that is not finite.")
        elif tensor.gradient == "none":
            found.append(f"{tensor.name} should train {where}, but it got no gradient in any of {steps} steps.")
        # The factor A of an adapter has gradient 0 in the first step, in which B is 0.
        elif tensor.gradient == "zero" and steps > 1:
            found.append(f"{tensor.name} should train {where}, but its gradient was 0 in each of {steps} steps.")
        elif tensor.gradient == "finite" and not tensor.moved and not tensor.coarse:
            found.append(f"{tensor.name} got gradient {where}, but it is bit for bit what it was at the start.")
    return found


def judge(audit: Audit, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> tuple[list[str], Verdict]:
    """The violations, and the verdict `train.audit`, which also says that planted ones are noticed."""
    seen = audit.seen(model, optimizers)
    broken = violations(seen, audit.stage, audit.steps)
    groups: dict[str, dict[str, int]] = {}
    for tensor in seen:
        group = "router bias" if tensor.name.endswith(ROUTER_BIAS) else table_group(tensor.name)
        row = groups.setdefault(group, {"tensors": 0, "may move": 0, "moved": 0, "optimizer state": 0})
        for column, count in (
            ("tensors", True), ("may move", tensor.may_move), ("moved", tensor.moved), ("optimizer state", tensor.has_state),
        ):  # fmt: skip
            row[column] += count
    columns = ["tensors", "may move", "moved", "optimizer state"]
    rows = [{"group": group, **{column: str(row[column]) for column in columns}} for group, row in groups.items()]
    measures = [
        Measure("tensors treated against the stage's rule", len(broken), 0),
        Measure("tensors that may move", sum(tensor.may_move for tensor in seen)),
        Measure("of them moved", sum(tensor.moved for tensor in seen if tensor.may_move)),
    ]
    nulls = planted(seen, audit, model)
    verdict = Verdict(
        "train.audit", "train", type(model).__name__, audit.stage.name, status_of(measures, nulls),
        reason=broken[0] if broken else "", measures=tuple(measures), nulls=tuple(nulls),
        data={"audit": {"columns": columns, "rows": rows}},
    )  # fmt: skip
    return broken, verdict


def planted(seen: list[Seen], audit: Audit, model: nn.Module) -> list[NullCandidate]:
    """Wrong evidence about one tensor that may not move and one that trains, each of which must be noticed."""

    def noticed(wrong: Seen) -> bool:
        return bool(violations([wrong], audit.stage, max(2, audit.steps)))

    found = []
    frozen = next((tensor for tensor in seen if not tensor.may_move), None)
    if frozen is not None:
        still = replace(frozen, moved=False, gradient="none", has_state=False, in_optimizer=False)
        flipped = _one_bit_flipped(named_tensors(model)[frozen.name])
        moved = replace(still, moved=digest(flipped) != digest(named_tensors(model)[frozen.name]))
        found += [
            NullCandidate("one bit of a frozen tensor flipped", noticed(moved), frozen.name),
            NullCandidate("a frozen tensor with gradient", noticed(replace(still, gradient="zero")), frozen.name),
            NullCandidate("optimizer state for a frozen tensor", noticed(replace(still, has_state=True)), frozen.name),
        ]
    training = next((tensor for tensor in seen if tensor.may_move and not tensor.name.endswith(ROUTER_BIAS)), None)
    if training is not None:
        right = replace(training, moved=True, gradient="finite", has_state=True, in_optimizer=True)
        found += [
            NullCandidate(kind, noticed(wrong), training.name)
            for kind, wrong in (
                ("one that trains without gradient", replace(right, gradient="none")),
                ("one that trains with NaN", replace(right, gradient="not finite")),
                ("one that trains and no optimizer holds", replace(right, in_optimizer=False)),
                ("one that trains and does not move", replace(right, moved=False, coarse=False)),
            )
        ]
    return found


def _one_bit_flipped(tensor: Tensor) -> Tensor:
    raw = whole(tensor.detach()).cpu().contiguous().clone().reshape(-1).view(torch.uint8)
    raw[0] ^= 1
    return raw.view(tensor.dtype).reshape(tensor.shape)


def parameter_counts(model: nn.Module) -> Mapping[str, JSON]:
    """`trainable_report` for a record: parameters of each group, and how many of them train."""
    return {count.group: [count.parameters, count.trainable] for count in trainable_report(model)}
