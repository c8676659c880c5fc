"""Probes of isolation: what a row may not see does not matter to it (spec B01, B02, B07, E13).

The perturbed run has the shapes of the first and its experts, and keys chosen anew, so that a leak through the
selection reaches the arithmetic. On a CPU untouched rows are then the same bits.

Letters: B batch, L rows, W vocabulary.
"""

from dataclasses import replace

import torch

from ..cases import Case
from ..observe import Observation
from ..text import PAD
from .model_budgets import CONTENT, LOSSES
from .model_sides import Notes, Side, loudest, only_experts, other_tokens, probe, with_ids

Null = dict[str, tuple[torch.Tensor, torch.Tensor]]


def untouched(
    notes: Notes, name: str, changed: Observation, base: Observation, rows_BL: torch.Tensor, others_BL: torch.Tensor,
    nulls: Null | None = None,
) -> None:  # fmt: skip
    """Logits of `rows_BL` must be as before; those of `others_BL`, which see the change, must not."""
    leak_BL = rows_BL | loudest(changed.logits, base.logits, others_BL)
    notes.same(
        name, changed.logits[rows_BL], base.logits[rows_BL], CONTENT,
        {
            "rows that see the change": (changed.logits[others_BL], base.logits[others_BL]),
            "one row that sees the change": (changed.logits[leak_BL], base.logits[leak_BL]),
            **(nulls or {}),
        },
    )  # fmt: skip


def future_tokens(side: Side, notes: Notes) -> None:
    """Another token at j leaves rows before j as they were: sparse and dense, in training and in evaluation.

    Also at a length of index_topk, where an implementation may skip the selection and its mask with it.
    """
    generator = side.generator()
    for sparse in side.modes:
        model = side.model(use_sparse_attention=sparse)
        for length in (side.k, 4 * side.k):
            case = side.case(length=length, use_sparse_attention=sparse)
            position_L = torch.arange(length)
            base = side.see(model, case)
            places = {1, length // 3, length - 2, int(torch.randint(1, length - 1, (1,), generator=generator))}
            for trial, j in enumerate(sorted(places)):
                # The batch rows are perturbed from both ends.
                at_B1 = torch.tensor([[j], [length - 1 - j if 0 < length - 1 - j < length - 1 else j]])
                ids = other_tokens(case.input_ids, position_L == at_B1, generator)
                model.train(trial % 2 == 0)
                seen = side.see(model, with_ids(case, ids), tape=only_experts(base.decisions))
                name = f"{'sparse' if sparse else 'dense'}, length {length}, token {j}"
                untouched(notes, name, seen, base, position_L < at_B1, position_L >= at_B1)


def packed(case: Case, lengths: tuple[int, ...]) -> tuple[Case, torch.Tensor]:
    """The case as documents of `lengths`, the second batch row in reverse order; and the document of each token."""
    rows = [lengths if b % 2 == 0 else lengths[::-1] for b in range(case.input_ids.shape[0])]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    document_BL = (positions == 0).long().cumsum(1) - 1
    labels = case.labels.masked_fill(positions == 0, -100)
    return replace(case, labels=labels, position_ids=positions), document_BL


def other_documents(side: Side, notes: Notes) -> None:
    """Other tokens in one document leave those before and behind it as they were."""
    lengths = (2 * side.k, side.k // 2 + 2, 2 * side.k - 3)
    generator = side.generator()
    for sparse in side.modes:
        model = side.model(use_sparse_attention=sparse)
        whole = side.case(length=sum(lengths), use_sparse_attention=sparse)
        case, document_BL = packed(whole, lengths)
        base, merged = side.see(model, case), side.see(model, whole)
        for d in range(len(lengths)):
            inside_BL = document_BL == d
            ids = other_tokens(case.input_ids, inside_BL, generator)
            seen = side.see(model, with_ids(case, ids), tape=only_experts(base.decisions))
            nulls: Null = {}
            if d < len(lengths) - 1:
                read = side.see(model, with_ids(whole, ids), tape=only_experts(merged.decisions))
                nulls["read as one document"] = (read.logits[~inside_BL], merged.logits[~inside_BL])
            name = f"{'sparse' if sparse else 'dense'}, document {d + 1}"
            untouched(notes, name, seen, base, ~inside_BL, inside_BL, nulls)


def padding_content(side: Side, notes: Notes) -> None:
    """Which token stands in for padding does not matter, to logits, LM loss and KL loss."""
    generator = side.generator()
    model = side.model()
    for kind in ("left-padded", "right-padded"):
        case = side.case(kind, length=4 * side.k)
        real_BL = case.real_BL
        base = side.see(model, case, kl=True)
        seen = side.see(
            model, with_ids(case, other_tokens(case.input_ids, ~real_BL, generator)),
            tape=only_experts(base.decisions), kl=True,
        )  # fmt: skip
        # The first real token, changed, reaches every row behind it.
        first_BL = real_BL & (real_BL.long().cumsum(1) == 1)
        real = side.see(
            model, with_ids(case, other_tokens(case.input_ids, first_BL, generator)),
            tape=only_experts(base.decisions), kl=True,
        )  # fmt: skip
        notes.same(kind, seen.logits[real_BL], base.logits[real_BL], CONTENT, {
            "a real token changed": (real.logits[real_BL], base.logits[real_BL]),
            "one pad counted as real": (real.logits[first_BL], base.logits[first_BL]),
        })  # fmt: skip
        same_losses(notes, kind, seen, base, {"a real token changed": real})


def same_losses(
    notes: Notes, name: str, actual: Observation, expected: Observation, wrong: dict[str, Observation] | None = None
) -> None:
    """LM loss and, where it is computed, KL loss."""
    for loss in ("lm_loss", "kl_loss"):
        a, e = (getattr(seen, loss) for seen in (actual, expected))
        if e is None:
            continue
        nulls = {kind: (getattr(seen, loss)[None], e[None]) for kind, seen in (wrong or {}).items()}
        notes.same(f"{name}, {loss}", a[None], e[None], LOSSES, nulls)


def padding_poison(side: Side, notes: Notes) -> None:
    """A NaN, or 1e30, in the embedding of the padding token reaches no logits, losses or gradients of real tokens."""
    embedding = "model.embed_tokens.weight"
    for kind in ("left-padded", "right-padded"):
        case = side.case(kind, length=2 * side.k)
        real_BL = case.real_BL
        base = side.see(side.model(), case, kl=True, gradients=True)
        for poison in (torch.nan, 1e30):
            table = side.state[embedding].clone()
            table[PAD] = poison
            model = side.model(state={**side.state, embedding: table})
            # One backward is enough for the costlier half: what reaches a gradient passed a state.
            gradients = kind == "left-padded" and poison != poison
            seen = side.see(model, case, tape=only_experts(base.decisions), kl=True, gradients=gradients)
            name, nulls = f"{kind}, {poison}", {}
            if kind == "left-padded":
                # Without its mask the poison is read by every row behind it.
                read = side.see(model, replace(case, attention_mask=None))
                nulls["poison read"] = (read.logits[real_BL], base.logits[real_BL])
            notes.same(name, seen.logits[real_BL], base.logits[real_BL], CONTENT, nulls)
            same_losses(notes, name, seen, base)
            if gradients:
                notes.same_gradients(f"{name}, LM", seen.lm_grads, base.lm_grads, CONTENT)
                notes.same_gradients(f"{name}, KL", seen.kl_grads, base.kl_grads, CONTENT)


CHECKS = [
    probe("future_tokens", future_tokens),
    probe("other_documents", other_documents, {"packing"}),
    probe("padding_content", padding_content, {"padding"}),
    probe("padding_poison", padding_poison, {"padding"}),
]
