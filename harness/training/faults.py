"""Faults of a warm-up: what may be wrong in an indexer's training, each a patch of one place of the reference.

A faulty team trains with its own code, reads its own KL and serves with it; another serves its weights with right code.
Both are measured: some faults are learned around, so that only a comparison with right code finds them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..mutants.patching import Patch, patched_copy

_INDEXER, _LOSSES, _ATTENTION = "reference/indexer.py", "reference/losses.py", "reference/attention.py"
_SUMMED = "summed = probs_BHLS.detach().sum(1)"


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. own_code: whether the faulty code also serves; a fault of the loss alone leaves the forward right."""

    name: str
    what: str
    patch: Patch
    own_code: bool


FAULTS: tuple[Fault, ...] = (
    Fault(
        "interleaved RoPE", "The indexer turns the pairs that the main attention turns.",
        Patch(
            _INDEXER, "self.rotate = rotate_interleaved if config.indexer_rope_interleaved else rotate_half_split",
            "self.rotate = rotate_interleaved",
        ), True,
    ),
    Fault(
        "no ReLU", "Negative dot products count.",
        Patch(
            _INDEXER, "dots_BLJS.relu(), at_least_fp32(w_BLJ))", "dots_BLJS, at_least_fp32(w_BLJ))",
        ), True,
    ),
    Fault(
        "reversed KL", "KL(softmax I ‖ p) instead of KL(p ‖ softmax I).",
        Patch(
            _LOSSES, "kl = torch.xlogy(target, target).sum(-1) - (target * finite).sum(-1) + lse * mass",
            "logq = finite - lse[..., None]\n"
            "    log_ratio = logq - target.clamp_min(1e-12).log()\n"
            "    kl = (logq.exp() * log_ratio).masked_fill(~support, 0.0).sum(-1)",
        ), False,
    ),
    Fault(
        "target from one head", "The first head alone makes the target.",
        Patch(_ATTENTION, _SUMMED, "summed = probs_BHLS.detach()[:, 0]"), False,
    ),
    Fault(
        "target from a part of the keys", "The target is the softmax over the later half of the visible keys.",
        Patch(
            _ATTENTION, _SUMMED,
            "early = torch.arange(probs_BHLS.shape[-1]) < torch.arange(probs_BHLS.shape[-2])[:, None] // 2\n"
            "    summed = probs_BHLS.detach().sum(1).masked_fill(early, 0.0)",
        ), False,
    ),
)  # fmt: skip
"""What a warm-up is trained with; each name is a row of the table."""


def fault_called(name: str) -> Fault:
    """The fault of that name.

    Raises:
        ValueError: there is none; the sentence names those there are.
    """
    for fault in FAULTS:
        if fault.name == name:
            return fault
    raise ValueError(f"Unknown fault {name!r}; available: {', '.join(fault.name for fault in FAULTS)}.")


@contextmanager
def faulty(model: nn.Module, fault: Fault) -> Iterator[nn.Module]:
    """A twin of `model` with equal weights, whose code has the fault, until the block ends.

    The twin is the reference, in which each formula stands once.

    Raises:
        ValueError: the patch does not match the source exactly once.
    """
    config: Any = model.config
    with patched_copy([fault.patch]) as copy:
        twin: nn.Module = copy.reference.DeepseekV32ForCausalLM(
            copy.reference.DeepseekV32Config.from_dict(config.to_dict())
        )
        twin.load_state_dict(model.state_dict())
        yield twin
