"""Kernels with one fault each: the check that must fail fails, and its reason names the fault."""

import re

import pytest
import torch

from harness.checks import CHECKS
from harness.operators import OPERATOR_CASES
from harness.runner import Plan, run
from harness.subjects import Subject, operator_capabilities
from harness.third_party import declared
from reference import DeepseekV32Config
from reports.records import Status
from suites.kernels.wrong_operators import WRONG
from suites.meta.test_verify import Silent


def nothing():
    return {}


def verdicts_of(subject, *, checks, cases=OPERATOR_CASES, dtypes=("float32",), length=40):
    selected = tuple(check for check in CHECKS if check.family in checks or check.name in checks)
    plan = Plan(
        subject, DeepseekV32Config.preset("tiny"), {}, 3, length, 2, torch.device("cpu"), dtypes, (), selected,
        operator_cases=cases,
    )  # fmt: skip
    return list(run(plan, Silent()))


@pytest.mark.parametrize("wrong", WRONG, ids=[wrong.name for wrong in WRONG])
def test_a_wrong_kernel_is_failed_and_its_fault_is_named(wrong):
    verdicts = verdicts_of(wrong.subject(), checks=(wrong.check,))
    failed = [v for v in verdicts if v.status is Status.FAILED and v.check == wrong.check]
    assert failed
    assert any(re.search(wrong.says, v.reason) for v in failed), [v.reason for v in failed][:3]


def test_an_operator_without_backward_is_not_asked_for_gradients():
    def sparse_mla(q, kv, indices, scale, d_v):
        from optimized.ops import sparse_mla as right

        with torch.no_grad():
            return right(q, kv, indices, scale, d_v)

    operators = {"sparse_mla": sparse_mla}
    subject = Subject("kernels", None, operator_capabilities(operators), "kernels.py:operators", operators)
    verdicts = verdicts_of(subject, checks=("operators", "probes"))
    of_gradients = [v for v in verdicts if v.check == "operators.sparse_mla_gradients"]
    assert [v.status for v in of_gradients] == [Status.NOT_APPLICABLE]
    assert {v.status for v in verdicts if v.check == "operators.sparse_mla"} == {Status.VERIFIED}
    assert not [v for v in verdicts if v.status in (Status.FAILED, Status.ERROR, Status.VACUOUS)]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (nothing, "must return a dictionary of operators"),
        (lambda: {"attention": len}, "offers 'attention'; operators are index_scores"),
        (lambda: {"sparse_mla": 3}, "its sparse_mla is 3, which cannot be called"),
        (lambda: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_operators_that_cannot_be_judged_are_refused_in_one_sentence(given, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        declared(given, "kernels.py:operators")


def test_an_operator_that_declares_what_nobody_knows_is_refused():
    def sparse_mla(*args):
        raise NotImplementedError

    sparse_mla.capabilities = {"speed"}
    with pytest.raises(ValueError, match="sparse_mla declares 'speed'; capabilities are backward, bitwise"):
        declared(lambda: {"sparse_mla": sparse_mla}, "kernels.py:operators")
