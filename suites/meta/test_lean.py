"""Checks of models that leave no room for the reference's L×S tensors: it runs some rows at a time, and is the same."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness import rowwise
from harness.cases import build_case, calibrated_state
from harness.observe import observe
from harness.runner import run
from harness.subjects import ALL, load_weights, resolve_subject
from harness.verify import HUGE, Request, plan_for
from reference import DeepseekV32Config, DeepseekV32ForCausalLM
from reports.records import Status, read_run
from suites.meta.test_verify import Silent, plan_of
from suites.support import assert_same

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(rowwise, "ROWS", 25)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("name", ["text", "left-padded", "packed", "fp8"])
def test_the_reference_by_rows_is_the_reference(name, sparse):
    config = DeepseekV32Config.preset("tiny", use_sparse_attention=sparse)
    state = calibrated_state(config, 0)
    case = build_case(name, config, seed=0, length=60)
    whole = load_weights(DeepseekV32ForCausalLM, case.config, state, CPU, torch.float64).train()
    expected = observe(whole, case, ALL, scores=True, lm_gradients=False)
    model = rowwise.build_rowwise(case.config, state, CPU, torch.float64)
    by_rows = observe(model, case, ALL, scores=True, lm_gradients=False)
    assert_same(by_rows.logits, expected.logits)
    assert_same(by_rows.kl_loss, expected.kl_loss)
    reached = {name for name, gradient in expected.kl_grads.items() if gradient is not None}
    assert {name for name, gradient in by_rows.kl_grads.items() if gradient is not None} == reached
    for parameter in reached:
        assert by_rows.kl_grads[parameter].dtype == torch.float64
        assert_same(by_rows.kl_grads[parameter], expected.kl_grads[parameter])
    for scores, others in zip(by_rows.scores_BLS, expected.scores_BLS, strict=True):
        assert_same(scores, others)
    # The weights that wait in fp32 are those of the state, before and after.
    shared = {tensor.data_ptr() for tensor in state.values()}
    for parameter, tensor in model.named_parameters():
        if ".layers." in parameter and ".indexer." not in parameter:
            assert tensor.data_ptr() in shared


def test_the_reference_by_rows_refuses_gradients_that_it_would_lose():
    config = DeepseekV32Config.preset("tiny")
    model = rowwise.build_rowwise(config, calibrated_state(config, 0), CPU, torch.float64)
    model.model.embed_tokens.requires_grad_(True)
    with pytest.raises(ValueError, match="freeze all but the indexer"):
        observe(model, build_case("text", config, seed=0, length=60), ALL)


def statuses(subject):
    plan = replace(plan_of(subject, checks=["parity", "kl"], cases=("text",)), lean=True)
    return {(v.check, v.case.split(", ")[1]): v for v in run(plan, Silent())}


def test_a_lean_run_judges_all_but_the_gradients_of_all_weights():
    found = statuses(resolve_subject("optimized"))
    skipped = {key for key, v in found.items() if v.status is Status.SKIPPED}
    assert skipped == {("parity.lm_gradients", "sparse"), ("parity.lm_gradients", "dense"), ("parity.stages", "sparse")}
    assert {v.status for key, v in found.items() if key not in skipped} == {Status.VERIFIED}
    whys = {"parity.lm_gradients": "only the indexer's are computed", "parity.stages": "activations of all stages"}
    assert all(whys[check] in found[check, mode].reason for check, mode in skipped)


@pytest.mark.parametrize(
    ("mutant", "check"),
    [("A01-interleaved-indexer-rope", "kl.loss"), ("gain-of-4-percent", "parity.logits"), ("D07-indexer-under-no-grad", "kl.gradients")],
)  # fmt: skip
def test_a_lean_run_notices(mutant, check):
    assert statuses(resolve_subject(f"mutant:{mutant}"))[check, "sparse"].status is Status.FAILED


def test_a_huge_model_on_a_cpu_gets_a_lean_plan(monkeypatch):
    assert not plan_for(Request()).lean
    monkeypatch.setattr("harness.verify.HUGE", 1000)
    plan = plan_for(Request())
    assert (plan.lean, plan.batch, plan.dtypes) == (True, 1, ("float32",))
    asked = plan_for(Request(batch=2, dtype="bfloat16"))
    assert (asked.lean, asked.batch, asked.dtypes) == (True, 2, ("bfloat16",))
    config = DeepseekV32Config.preset("medium")
    with torch.device("meta"):
        assert sum(p.numel() for p in DeepseekV32ForCausalLM(config).parameters()) > HUGE


@pytest.mark.slow
def test_medium_is_verified_on_a_cpu(tmp_path):
    """True attention dims: forward, and the indexer's gradients."""
    words = ["--config", "medium", "--checks", "parity,kl", "--seq-len", "2304", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "harness.cli", "verify", *words], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    by_status = {status: [v for v in read_run(tmp_path).verdicts if v.status is status] for status in Status}
    assert {v.check for v in by_status[Status.VERIFIED]} == {
        "parity.logits",
        "parity.lm_loss",
        "kl.loss",
        "kl.gradients",
    }
    assert {v.check for v in by_status[Status.SKIPPED]} == {"parity.lm_gradients", "parity.stages"}
