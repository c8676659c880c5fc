"""Finite: logits, losses and every gradient of a forward and backward, the first thing that breaks."""

from collections.abc import Iterator

import torch

from reports.schema import Measure, NullCandidate

from .base import Answer, Bench, Check


def count_not_finite(tensors: list[torch.Tensor]) -> int:
    """Number of NaN and infinite entries."""
    return sum(int((~torch.isfinite(t)).sum()) for t in tensors)


def _outputs(bench: Bench) -> Iterator[torch.Tensor]:
    # Logits of pad rows are nobody's business.
    yield bench.seen.logits[bench.case.real_BL.to(bench.seen.logits.device)]
    yield bench.seen.lm_loss
    if bench.seen.kl_loss is not None:
        yield bench.seen.kl_loss
    for grads in (bench.seen.lm_grads, bench.seen.kl_grads):
        yield from (g for g in grads.values() if g is not None)


def finite(bench: Bench) -> Answer:
    """No NaN and no infinity anywhere; one planted NaN, and one infinity, must be counted."""
    tensors = list(_outputs(bench))
    nulls = []
    for kind, value in (("one NaN", torch.nan), ("one infinity", torch.inf)):
        planted = tensors[-1].clone().flatten()
        planted[-1] = value
        nulls.append(NullCandidate(kind, count_not_finite([*tensors[:-1], planted]) > 0))
    count = count_not_finite(tensors)
    entries = sum(t.numel() for t in tensors)
    return Answer(
        [Measure("not finite", float(count), 0.0, "entries")],
        nulls,
        f"{count} of {entries} entries are not finite" if count else "",
    )


CHECKS = [Check("finite", "finite", finite)]
