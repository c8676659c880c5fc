"""The whole harness on each implementation of the operators: model, operators and probes, and a planted fault in each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness.mutants.catalogue.fused import NATIVE, TRITON
from harness.mutants.matrix import mutant_subject, pass_of_unpatched
from harness.runner import run
from harness.subjects import on_backend, resolve_subject, with_backend
from optimized.ops import backend as backends
from reports.records import Status, read_run
from suites.meta.test_verify import Silent, plan_of, verdicts_of

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
FAMILIES = ("finite", "choices", "parity", "kl", "identity", "gradients", "operators")


def usable(name):
    if reason := backends.why_unusable(name, CPU):
        pytest.skip(f"backend {name} cannot be used here: {reason}")


@pytest.mark.parametrize("name", ["torch", "native"])
def test_the_model_is_verified_on(name):
    usable(name)
    subject = with_backend(resolve_subject("optimized"), name)
    verdicts = verdicts_of(subject, checks=FAMILIES, cases=("packed",), batch=2)
    wrong = [v.reproduce for v in verdicts if v.status is not Status.VERIFIED and v.status is not Status.NOT_APPLICABLE]
    assert wrong == []
    assert {v.family for v in verdicts if v.status is Status.VERIFIED} == set(FAMILIES)


def test_a_backend_that_cannot_run_says_why(monkeypatch, capsys):
    from harness.cli import main

    monkeypatch.setattr("optimized.kernels.interpreted", lambda: False)
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--backend", "triton"])
    assert ended.value.code == 2
    assert "set before Python starts" in capsys.readouterr().err
    with pytest.raises(ValueError, match="native operators run on the CPU, not on cuda"):
        backends.resolve_backend("sparse_mla", "native", torch.device("cuda"))


def test_triton_declares_no_fp64_and_the_others_do():
    optimized = resolve_subject("optimized")
    assert "fp64" not in on_backend(optimized, "triton").capabilities
    assert "fp64" in on_backend(optimized, "native").capabilities


def killers(mutant, checks, operator_case):
    with mutant_subject(mutant) as subject:
        plan = plan_of(subject, checks=checks, cases=(), length=24)
        object.__setattr__(plan, "operator_cases", (operator_case,))
        return {v.check for v in run(plan, Silent()) if v.status is Status.FAILED}


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("C01-native-nan-in-rows-without-keys", "operators.sparse_mla"),
        ("native-sum-not-rescaled", "operators.sparse_mla"),
        ("C09-native-lse-in-base-2", "operators.sparse_mla_lse"),
    ],
)
def test_a_fault_planted_in_the_native_code_is_noticed(name, check):
    usable("native")
    (mutant,) = [m for m in NATIVE if m.name == name]
    assert check in killers(mutant, ["operators"], "many-keys")


@pytest.mark.parametrize("name", ["C01-triton-nan-in-rows-without-keys", "C09-triton-lse-in-base-2"])
def test_a_fault_planted_in_a_triton_kernel_is_noticed(name):
    usable("triton")
    (mutant,) = [m for m in TRITON if m.name == name]
    assert "operators.sparse_mla_lse" in killers(
        mutant, ["operators.sparse_mla", "operators.sparse_mla_lse"], "many-keys"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "native", "triton"])
def test_a_copy_without_a_patch_raises_no_alarm_on(name):
    usable(name)
    assert pass_of_unpatched(name).alarms == []


@pytest.mark.slow
def test_the_harness_on_interpreted_kernels(tmp_path):
    """Everything but training curves, at a length at which the interpreter takes minutes."""
    usable("triton")
    checks = "finite,choices,parity,kl,identity,gradients,operators,probes"
    words = ["--backend", "triton", "--checks", checks, "--seq-len", "40", "--dtype", "float32", "--out", str(tmp_path)]
    cases = ["--cases", "text,left-padded,packed,documents,chunk,around-k,duplicate-keys,many-keys,odd-shapes"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "TRITON_INTERPRET": "1"}
    environment["OPENBLAS_NUM_THREADS"] = "1"
    ended = subprocess.run(
        [sys.executable, "-m", "harness.cli", "verify", *words, *cases], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    judged = {v.family for v in read_run(tmp_path).verdicts if v.status is Status.VERIFIED}
    assert judged == set(checks.split(","))
