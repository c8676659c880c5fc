"""Bugs that drawn cases found stay found, on the smallest case, where right operators raise no alarm."""

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, find, settings
from hypothesis import strategies as st

from harness.checks import CHECKS, SubjectError
from harness.mutants.catalogue import MUTANTS
from harness.mutants.matrix import mutant_called, mutant_subject
from harness.operators import OperatorBench
from harness.runner import status_of
from harness.strategies import DTYPES, operator_cases
from harness.subjects import on_backend, resolve_subject
from reports.schema import Status

from .pinned import PINNED, PINNED_MODELS
from .test_drawn_models import assert_right, bench_of, documents_are_themselves

CHECK = {check.name: check for check in CHECKS}
CPU = torch.device("cpu")
# One bug of each kind: they are looked for anew whenever the suite runs, the others when everything does.
FAST = {"B12-half-of-k-copied", "C09-lse-in-base-2", "query-gradient-without-scale", "D11-target-of-one-head"}
EACH = [pytest.param(p, id=p.mutant, marks=() if p.mutant in FAST else pytest.mark.slow) for p in PINNED]


def status_on(subject, check, case, dtype):
    """What `check` says of `subject`; a subject that cannot be run has failed."""
    try:
        answer = check.run(OperatorBench(case, subject, dtype, CPU))
    except SubjectError:
        return Status.FAILED
    return status_of(answer.measures, answer.nulls)


@pytest.mark.parametrize("pin", PINNED, ids=[p.mutant for p in PINNED])
def test_right_operators_raise_no_alarm_where_a_bug_was_found(pin):
    subject = resolve_subject("optimized")
    if (backend := mutant_called(pin.mutant).backend) is not None:
        subject = on_backend(subject, backend)
    assert status_on(subject, CHECK[pin.check], pin.case, pin.dtype) is not Status.FAILED


@pytest.mark.parametrize("pin", EACH)
def test_a_bug_is_seen_on_its_pinned_case(pin):
    with mutant_subject(mutant_called(pin.mutant)) as wrong:
        assert status_on(wrong, CHECK[pin.check], pin.case, pin.dtype) is Status.FAILED


def total(case):
    """All sizes together, which is what a smaller case has less of."""
    return sum(getattr(case.sizes, name) for name in case.sizes.__slots__)


@pytest.mark.parametrize("pin", EACH)
def test_a_bug_is_found_anew_and_shrinks_to_a_case_no_larger(pin):
    check = CHECK[pin.check]
    dtypes = check.only_dtypes or DTYPES
    drawn = st.tuples(operator_cases(least=6 if check.only_cases else 1), st.sampled_from(dtypes))
    looked = settings(max_examples=60, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    with mutant_subject(mutant_called(pin.mutant)) as wrong:
        case, _ = find(drawn, lambda d: status_on(wrong, check, *d) is Status.FAILED, settings=looked)
    assert total(case) <= total(pin.case), case


def judge(pin, subject):
    """Nothing, or an AssertionError that says which document is not what it is alone."""
    assert_right(
        bench_of(pin.drawn.config, pin.drawn.seed, subject), partial(documents_are_themselves, pin.drawn, pin.sparse)
    )


@pytest.mark.parametrize("pin", PINNED_MODELS, ids=[p.mutant for p in PINNED_MODELS])
def test_right_models_raise_no_alarm_where_a_bug_was_found(pin):
    judge(pin, resolve_subject("optimized"))


@pytest.mark.slow
@pytest.mark.parametrize("pin", PINNED_MODELS, ids=[p.mutant for p in PINNED_MODELS])
def test_a_bug_of_a_model_is_seen_on_its_pinned_documents(pin):
    with mutant_subject(mutant_called(pin.mutant)) as wrong, pytest.raises((AssertionError, SubjectError)):
        judge(pin, wrong)


def test_each_pinned_case_names_a_bug_and_a_check():
    assert {p.mutant for p in (*PINNED, *PINNED_MODELS)} <= {m.name for m in MUTANTS}
    assert {p.check for p in PINNED} <= set(CHECK)
    assert {p.mutant for p in PINNED} >= FAST
