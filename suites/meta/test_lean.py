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

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(rowwise, "ROWS", 25)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("name", ["text", "left-padded", "packed"])
def test_the_reference_by_rows_is_the_reference(name, sparse):
    config = DeepseekV32Config.preset("tiny", use_sparse_attention=sparse)
    state = calibrated_state(config, 0)
    case = build_case(name, config, seed=0, length=60)
    whole, by_rows = (
        observe(load_weights(model, config, state, torch.device("cpu"), torch.float64).train(), case, ALL, scores=True)
        for model in (DeepseekV32ForCausalLM, rowwise.RowwiseForCausalLM)
    )
    assert_same(by_rows.logits, whole.logits)
    assert_same(by_rows.kl_loss, whole.kl_loss)
    for grads, expected in ((by_rows.lm_grads, whole.lm_grads), (by_rows.kl_grads, whole.kl_grads)):
        assert {n for n, g in grads.items() if g is None} == {n for n, g in expected.items() if g is None}
        for parameter, gradient in expected.items():
            if gradient is not None:
                assert_same(grads[parameter], gradient)
    for scores, others in zip(by_rows.scores_BLS, whole.scores_BLS, strict=True):
        assert_same(scores, others)


@pytest.mark.parametrize("sparse", [True, False])
def test_weights_that_wait_in_fp32_give_what_fp64_weights_give(sparse):
    config = DeepseekV32Config.preset("tiny", use_sparse_attention=sparse)
    state = calibrated_state(config, 0)
    case = build_case("text", config, seed=0, length=60)
    whole = load_weights(DeepseekV32ForCausalLM, config, state, torch.device("cpu"), torch.float64).train()
    waiting = rowwise.build_rowwise(config, state, torch.device("cpu"), torch.float64)
    expected = observe(whole, case, ALL)
    seen = observe(waiting, case, ALL, lm_gradients=False)
    assert_same(seen.logits, expected.logits)
    for name, gradient in expected.kl_grads.items():
        if gradient is not None:
            assert seen.kl_grads[name].dtype == torch.float64
            assert_same(seen.kl_grads[name], gradient)
    shared = {tensor.data_ptr() for tensor in state.values()}
    for name, parameter in waiting.named_parameters():
        if ".layers." in name and ".indexer." not in name:
            assert parameter.data_ptr() in shared


def statuses(subject):
    plan = replace(plan_of(subject, checks=["parity", "kl"], cases=("text",)), lean=True)
    return {(v.check, v.case.split(", ")[1]): v for v in run(plan, Silent())}


def test_a_lean_run_judges_all_but_the_gradients_of_all_weights():
    found = statuses(resolve_subject("optimized"))
    skipped = {key for key, v in found.items() if v.status is Status.SKIPPED}
    assert skipped == {("parity.lm_gradients", mode) for mode in ("sparse", "dense")}
    assert {v.status for key, v in found.items() if key not in skipped} == {Status.VERIFIED}
    assert all("only the indexer's are computed" in found[key].reason for key in skipped)


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
    assert {v.check for v in by_status[Status.SKIPPED]} == {"parity.lm_gradients"}
