"""Probes of training: derivatives are derivatives, batches add up, recomputation recomputes (spec 3.3, C12, D01).

Letters: B batch, L rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn

from reference import Decisions
from reference.training import parameter_group

from ..cases import Case
from ..observe import Gradients
from ..subjects import recompute_activations
from .model_budgets import DERIVATIVES, GRADIENTS, LOSSES, OTHER_LENGTH
from .model_invariance import placed, row_of
from .model_sides import Notes, Side, padded, probe, stacked


def added(one: Gradients, other: Gradients) -> Gradients:
    """The sum of two sets of gradients; None where neither reaches."""
    return {
        name: (g if h is None else h if g is None else g + h)
        for name in {**one, **other}
        for g, h in [(one.get(name), other.get(name))]
    }


def loss_of(out: Any) -> torch.Tensor:
    """The LM loss of an output, by its own name or the general one."""
    lm_loss = getattr(out, "lm_loss", None)
    return cast(torch.Tensor, out.loss if lm_loss is None else lm_loss)


def losses_of(
    side: Side, model: nn.Module, case: Case, tape: Decisions | None = None, **more: Any
) -> list[torch.Tensor]:
    """The LM loss and, where declared, the KL loss of one forward, with their graphs."""
    wants: dict[str, Any] = dict(more)
    if "indexer-kl" in side.can:
        wants["output_indexer_kl_loss"] = True
    if tape is not None:
        wants["decisions"] = tape.to(side.device)
    out = model(**case.inputs(side.device), labels=case.labels.to(side.device), **wants)
    losses = [loss_of(out)]
    return [*losses, out.indexer_kl_loss] if "indexer-kl" in side.can else losses


def collected(model: nn.Module) -> Gradients:
    """What the last backwards left in .grad, taken away from there."""
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def checkpointing(side: Side, notes: Notes) -> None:
    """Two checkpointed forwards, then their two backwards: the gradients of two plain ones.

    Both choose for themselves, so that a recomputation which chooses otherwise is another model's gradient.
    """
    # Of one shape, so that what one forward left behind would fit the other.
    cases = [side.case(length=2 * side.k + 3, number=i) for i in range(2)]
    plain = side.model()
    expected = [side.see(plain, case, kl=True, gradients=True) for case in cases]
    sums = [added(seen.lm_grads, seen.kl_grads) for seen in expected]
    model: Any = side.model()
    recompute_activations(model)
    model.train()
    totals = [sum(losses_of(side, model, case)) for case in cases]
    found = []
    for total in totals:
        cast(torch.Tensor, total).backward()
        found.append(collected(model))
    for name, i in (("first of two", 0), ("second of two", 1)):
        notes.same_gradients(name, found[i], sums[i], GRADIENTS, {"the other forward's": sums[1 - i]})


@contextmanager
def moved(parameters: dict[str, nn.Parameter], directions: dict[str, torch.Tensor], step: float) -> Iterator[None]:
    """The parameters a step along the directions, within the block."""
    held = {name: parameters[name].detach().clone() for name in directions}
    with torch.no_grad():
        for name, direction in directions.items():
            parameters[name].add_(direction, alpha=step)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in held.items():
                parameters[name].copy_(value)


# In fp64 the error of a central difference is least near the cube root of the rounding. The smaller steps are for a
# loss whose kink the first one meets; CLOSE is near enough to try none of them.
STEPS = (1e-5, 1e-6, 1e-7)
CLOSE = 1e-6


def derivatives(side: Side, notes: Notes) -> None:
    """In fp64, with choices replayed: each group's gradient times a random direction is the loss's slope along it."""
    model = side.model(dtype=torch.float64)
    case = side.case(length=2 * side.k)
    tape = side.see(model, case).decisions
    seen = side.see(model, case, tape=tape, kl=True, gradients=True)
    parameters = dict(model.named_parameters())
    generator = side.generator()
    for loss, gradients in (("lm_loss", seen.lm_grads), ("kl_loss", seen.kl_grads)):
        groups: dict[str, dict[str, torch.Tensor]] = {}
        for name, gradient in gradients.items():
            # A parameter that the loss does not reach is not one whose slope is 0: gradients.who says which those are.
            if gradient is not None:
                noise = torch.randn(gradient.shape, generator=generator, dtype=torch.float64).to(gradient.device)
                groups.setdefault(parameter_group(name), {})[name] = (
                    noise * parameters[name].detach().square().mean().sqrt()
                )
        for group, directions in groups.items():
            products = {name: (cast(torch.Tensor, gradients[name]) * v).sum() for name, v in directions.items()}
            total = torch.stack([*products.values()]).sum()
            slopes: list[torch.Tensor] = []
            for step in STEPS:
                values = []
                for way in (step, -step):
                    with moved(parameters, directions, way):
                        values.append(getattr(side.see(model, case, tape=tape, kl=loss == "kl_loss"), loss))
                slopes.append((values[0] - values[1]) / (2 * step))
                if (slopes[-1] - total).abs() <= CLOSE * slopes[-1].abs():
                    break
            # A kink spoils the difference of one step; no step makes a wrong gradient right.
            slope = min(slopes, key=lambda s: (s - total).abs())
            largest = max(products.values(), key=abs)
            notes.same(f"{loss}, {group}", total[None], slope[None], DERIVATIVES,
                       {"one tensor's gradient missing": ((total - largest)[None], slope[None])})  # fmt: skip


def unequal_rows(side: Side) -> tuple[list[Case], list[Decisions | None], Case, Decisions | None]:
    """Four texts of unequal length alone, with their tapes; and as one left-padded batch, with its tape."""
    model = side.model()
    whole = side.case(length=2 * side.k + 4, batch=4)
    length = whole.input_ids.shape[1]
    sizes = [length, side.k - 1, side.k + 5, length - 2]
    rows = [row_of(whole, b, 0, size) for b, size in enumerate(sizes)]
    tapes = [side.see(model, row).decisions for row in rows]
    parts = [placed(replace(whole, input_ids=whole.input_ids[[b]], labels=whole.labels[[b]]), size, length - size)[0]
             for b, size in enumerate(sizes)]  # fmt: skip
    fields: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in ("input_ids", "labels", "attention_mask")
    }
    together = replace(whole, **fields)
    return (
        rows,
        tapes,
        together,
        stacked([padded(tape, length - size, 0) for tape, size in zip(tapes, sizes, strict=True)]),
    )


def micro_batches(side: Side, notes: Notes) -> None:
    """Four micro-batches divided by what the whole batch holds add up to the batch: LM loss, KL loss, gradients."""
    rows, tapes, together, tape = unequal_rows(side)
    model = side.model()
    items = int((together.labels[:, 1:] != -100).sum())

    def run(case: Case, replayed: Decisions | None, **more: Any) -> tuple[list[torch.Tensor], list[Gradients]]:
        losses = losses_of(side, model, case, replayed, **more)
        found = []
        for i, loss in enumerate(losses):
            loss.backward(retain_graph=i + 1 < len(losses))
            found.append(collected(model))
        return [loss.detach() for loss in losses], found

    whole_losses, whole = run(together, tape, num_items_in_batch=items)
    parts = [run(row, replayed, num_items_in_batch=items) for row, replayed in zip(rows, tapes, strict=True)]
    own_means = [run(row, replayed) for row, replayed in zip(rows, tapes, strict=True)]
    for i, loss in enumerate(("lm_loss", "kl_loss")):
        total, mean = (sum(part[0][i] for part in runs) for runs in (parts, own_means))
        notes.same(loss, cast(torch.Tensor, total)[None], whole_losses[i][None], LOSSES,
                   {"each divided by its own count": (cast(torch.Tensor, mean)[None] / len(rows), whole_losses[i][None])})  # fmt: skip
        gradients: Gradients = {}
        mean_gradients: Gradients = {}
        for part, own in zip(parts, own_means, strict=True):
            gradients, mean_gradients = added(gradients, part[1][i]), added(mean_gradients, own[1][i])
        notes.same_gradients(f"{loss}", gradients, whole[i], GRADIENTS, {"divided by each count": mean_gradients})


def kl_rows(side: Side, notes: Notes) -> None:
    """The KL of a row is at least 0, and 0 for a row with one key; padding behind a text adds nothing to it."""
    model = side.model()
    case = side.case(length=2 * side.k)
    sums = []
    for length in (1, 2, 3, side.k, side.k + 1, 2 * side.k):
        part = replace(case, input_ids=case.input_ids[:, :length], labels=case.labels[:, :length])
        kl = side.see(model, part, kl=True).kl_loss
        assert kl is not None
        sums.append(float(kl) * length)
    rows = [b - a for a, b in pairwise(sums)]
    notes.count("KL of one key", "row 0", abs(sums[0]), LEAST_KL, {"of two keys": rows[0]})
    notes.count("KL below zero", "rows", max(-r for r in rows), LEAST_KL, {"reversed sign": max(rows)})
    alone = side.see(model, row_of(case, 0), kl=True, gradients=True)
    for pads in (1, side.k):
        if "padding" not in side.can:
            break
        wider, _ = placed(side.case(length=2 * side.k + pads, batch=1), 2 * side.k, 0)
        ids = torch.cat((case.input_ids[:1], wider.input_ids[:, 2 * side.k :]), 1)
        seen = side.see(
            model, replace(wider, input_ids=ids), tape=padded(alone.decisions, 0, pads), kl=True, gradients=True
        )
        assert seen.kl_loss is not None and alone.kl_loss is not None
        counted = alone.kl_loss * (2 * side.k) / (2 * side.k + pads)
        notes.same(f"{pads} pads behind", seen.kl_loss[None], alone.kl_loss[None], LOSSES,
                   {"pads counted": (counted[None], alone.kl_loss[None])})  # fmt: skip
        notes.same_gradients(f"{pads} pads behind", seen.kl_grads, alone.kl_grads, OTHER_LENGTH)


LEAST_KL = 1e-4


def layers(side: Side, notes: Notes) -> None:
    """The KL gradient of an indexer does not depend on how many layers follow it."""
    depth = side.config.num_hidden_layers
    case = side.case(length=2 * side.k)
    seen = [side.see(side.model(), case, kl=True, gradients=True)]
    for fewer in range(depth - 1, 0, -1):
        shallow = replace(case, config=side.config_of(num_hidden_layers=fewer))
        tape = None if seen[0].decisions is None else Decisions(seen[0].decisions.layers[:fewer])
        part = side.see(side.model(num_hidden_layers=fewer), shallow, tape=tape, kl=True, gradients=True)
        gradients = {name: g for name, g in part.kl_grads.items() if g is not None}
        share = {name: None if g is None else g * (depth / fewer) for name, g in gradients.items()}
        notes.same_gradients(
            f"{fewer} of {depth} layers", {name: seen[0].kl_grads[name] for name in gradients}, gradients, GRADIENTS,
            {"mean over layers": share},
        )  # fmt: skip


CHECKS = [
    probe("checkpointing", checkpointing, {"checkpointing"}),
    probe("derivatives", derivatives, {"fp64", "tape"}),
    probe("micro_batches", micro_batches, {"indexer-kl", "padding"}),
    probe("kl_rows", kl_rows, {"indexer-kl"}),
    probe("layers", layers, {"indexer-kl"}),
]
