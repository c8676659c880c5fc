"""Autocast in bf16: the error of losses and gradients is that of bf16, on the same choices, in both models.

The measuring stick is the reference in fp64; the allowance, what the reference in bf16 may be off (harness/budgets.py).
Autocast keeps parameters and residual stream wider than that.

Letters: L tokens.
"""

import pytest
import torch

from harness.budgets import budget, scalar_budget
from harness.metrics import errors, null_candidates, rejected
from reference import DeepseekV32ForCausalLM
from reference.training import is_indexer
from suites.support import assert_same, both_models, both_modes, build, text

L = 64
BF16 = torch.bfloat16


def graded(model, tape, *, autocast=False):
    """LM loss, KL loss and the gradient of their sum, on `tape`."""
    ids = text(L, batch=2)
    with torch.autocast("cpu", BF16, enabled=autocast):
        out = model(ids, labels=ids, decisions=tape, output_indexer_kl_loss=True)
    (out.lm_loss + out.indexer_kl_loss).backward()
    return out.lm_loss.detach(), out.indexer_kl_loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def tape_of(**overrides):
    with torch.no_grad():
        return build(DeepseekV32ForCausalLM, **overrides)(text(L, batch=2), output_decisions=True).decisions


@both_models
@both_modes
def test_losses_and_gradients_under_autocast_are_as_near_as_those_of_bf16(model_class, sparse):
    overrides = {"use_sparse_attention": sparse}
    tape = tape_of(**overrides)
    exact, low = (graded(build(DeepseekV32ForCausalLM, dtype, **overrides), tape) for dtype in (torch.float64, BF16))
    found = graded(build(model_class, torch.float32, **overrides), tape, autocast=True)
    for name, ours, expected, own in zip(("lm loss", "kl loss"), found, exact, low, strict=False):
        assert ours.dtype == torch.float32
        allowed = scalar_budget(name, BF16, float((own - expected).abs() / expected))
        assert float((ours - expected).abs() / expected) <= allowed
        # What is not rounded to bf16 at all is no autocast.
        assert (ours - expected).abs() > 1e-6
    for name, expected in exact[2].items():
        kind = "kl gradients" if is_indexer(name) else "lm gradients"
        allowed = budget(kind, BF16, errors(low[2][name], expected), expected.numel())
        assert errors(found[2][name], expected).used(allowed) <= 1, name
        nulls = [kind for kind, wrong in null_candidates(expected) if not rejected(wrong, expected, allowed)]
        # Where bf16 itself is off by as much, a gain of 4 % is not told apart.
        assert set(nulls) <= {"4 % gain"}, name


@both_models
@both_modes
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_under_autocast_gives_equal_gradients(model_class, sparse, reentrant):
    overrides = {"use_sparse_attention": sparse}
    tape, model = tape_of(**overrides), build(model_class, torch.float32, **overrides).train()
    plain = graded(model, tape, autocast=True)
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    again = graded(model, tape, autocast=True)
    for name, gradient in plain[2].items():
        assert_same(again[2][name], gradient, 0)


@both_models
def test_accumulated_micro_batches_under_autocast_give_the_gradients_of_the_batch(model_class):
    # bf16 products do not depend on how many rows they are computed with.
    ids, model = text(L, batch=4), build(model_class, torch.float32, indexer_kl_coef=0.5)
    with torch.no_grad():
        tape = model(ids, output_decisions=True).decisions
    gradients = []
    for size in (4, 1):
        model.zero_grad()
        for start in range(0, 4, size):
            part = ids[start : start + size]
            with torch.autocast("cpu", BF16):
                out = model(
                    part, labels=part, decisions=tape.batch(start, start + size), num_items_in_batch=4 * (L - 1)
                )
            out.loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    exact = build(DeepseekV32ForCausalLM, indexer_kl_coef=0.5)
    exact(ids, labels=ids, decisions=tape, num_items_in_batch=4 * (L - 1)).loss.backward()
    for name, whole in gradients[0].items():
        expected = dict(exact.named_parameters())[name].grad
        own = errors(whole, expected)
        kind = "kl gradients" if is_indexer(name) else "lm gradients"
        assert errors(gradients[1][name], expected).used(budget(kind, BF16, own, expected.numel())) <= 1, name


@both_models
def test_the_indexer_trains_under_autocast(model_class):
    model = build(model_class, torch.float32, use_sparse_attention=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_indexer(name))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(6):
        with torch.autocast("cpu", BF16):
            loss = model(text(L), output_indexer_kl_loss=True).indexer_kl_loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
