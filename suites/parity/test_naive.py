"""The reference in fp64 against a naive per-query loop that was written from the report alone."""

import functools
from typing import Any

import pytest
import torch

from harness.cases import build_case, calibrated_state
from harness.subjects import load_weights
from reference import DeepseekV32Config, DeepseekV32ForCausalLM
from suites.parity.naive import NaiveOutput, naive_causal_lm_loss, naive_forward

LENGTH = 96
# Of each tensor's largest entry.
TOLERANCE = 1e-11
CPU = torch.device("cpu")


@functools.cache
def both(sparse: bool, case_name: str):
    """The reference's output and the loop's, on one row of text, with gradients of LM and KL loss of each."""
    config = DeepseekV32Config.preset("tiny", use_sparse_attention=sparse)
    state = calibrated_state(config, seed=3, dtype=torch.float64)
    case = build_case(case_name, config, seed=3, length=LENGTH, batch=1)
    model: Any = load_weights(DeepseekV32ForCausalLM, config, state, CPU, torch.float64)
    out = model(
        **case.inputs(), labels=case.input_ids, output_indexer_kl_loss=True, output_decisions=True,
        output_indexer_scores="visible",
    )  # fmt: skip
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours = {
        loss: dict(
            zip(names, torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True), strict=True)
        )
        for loss, value in (("lm", out.lm_loss), ("kl", out.indexer_kl_loss))
    }

    leaves = {
        name: value.clone().requires_grad_(not name.endswith("e_score_correction_bias"))
        for name, value in state.items()
    }
    positions = torch.arange(LENGTH) if case.position_ids is None else case.position_ids[0]
    cos, sin = model.model.rotary_emb(positions[None], torch.float64)
    naive = naive_forward(config, leaves, case.input_ids[0], positions, cos[0], sin[0], sparse=sparse)
    lm_loss = naive_causal_lm_loss(naive.logits_LV, case.input_ids[0])
    wanted = [leaves[name] for name in names]
    theirs = {
        loss: dict(zip(names, torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True), strict=True))
        for loss, value in (("lm", lm_loss), ("kl", naive.kl))
    }
    return out, ours, naive, theirs


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Within TOLERANCE of the largest entry of `expected`; a 4 % gain must not be."""
    expected = expected.detach()
    allowed = TOLERANCE * float(expected.abs().max())
    assert float((actual - expected).abs().max()) <= allowed, what
    assert float((expected * 1.04 - expected).abs().max()) > allowed, f"{what}: the tolerance accepts 4 %"


MODES = [(True, "text"), (True, "packed"), (True, "offset-100000"), (False, "text"), (False, "packed")]
both_modes = pytest.mark.parametrize(("sparse", "case"), MODES)


@both_modes
def test_logits_equal_the_loop(sparse, case):
    out, _, naive, _ = both(sparse, case)
    assert_close(out.logits[0], naive.logits_LV, "logits")


@both_modes
def test_kl_loss_equals_the_loop(sparse, case):
    out, _, naive, _ = both(sparse, case)
    assert_close(out.indexer_kl_loss[None], naive.kl.detach()[None], "KL loss")


@both_modes
@pytest.mark.parametrize("loss", ["lm", "kl"])
def test_every_gradient_equals_the_loop(sparse, case, loss):
    _, ours, _, theirs = both(sparse, case)
    reached = 0
    for name, expected in theirs[loss].items():
        actual = ours[loss][name]
        assert (actual is None) == (expected is None), f"{name} is reached by one of the two only"
        if expected is not None and bool((expected != 0).any()):
            assert_close(actual, expected, name)
            reached += 1
    assert reached > 10


@both_modes
def test_index_scores_equal_the_loop(sparse, case):
    out, _, naive, _ = both(sparse, case)
    for ours, theirs in zip(out.indexer_scores, naive.scores, strict=True):
        seen = torch.isfinite(theirs)
        assert torch.equal(torch.isfinite(ours[0]), seen)
        assert_close(ours[0][seen], theirs.detach()[seen], "index scores")


@pytest.mark.parametrize("case", ["text", "packed", "offset-100000"])
def test_selected_keys_equal_the_loop(case):
    out, _, naive, _ = both(True, case)
    starts = document_starts(naive, case)
    for decision, rows in zip(out.decisions, naive.topk, strict=True):
        for t, row in enumerate(rows):
            chosen = decision.topk_indices[0, t]
            assert [int(s) + starts[t] for s in chosen if s >= 0] == row, f"row {t}"


@both_modes
def test_experts_equal_the_loop(sparse, case):
    out, _, naive, _ = both(sparse, case)
    for decision, rows in zip(out.decisions, naive.experts, strict=True):
        assert (decision.expert_indices is None) == (rows is None)
        if rows is not None:
            assert decision.expert_indices[0].tolist() == rows


def document_starts(naive: NaiveOutput, case: str) -> list[int]:
    """The first visible key of each row, by the loop's own scores."""
    return [int(torch.isfinite(row).nonzero()[0]) for row in naive.scores[0]]
