"""Every check and probe of single operators on drawn sizes, masks, ties and seeds: right operators raise no alarm.

A small case may leave a check without a null candidate that it could reject, such as one row with one key; what must
not happen is a failure, or an error.
"""

import pytest
import torch
from hypothesis import event, given, target
from hypothesis import strategies as st

from harness.checks import CHECKS, SubjectError
from harness.operators import OperatorBench
from harness.runner import missing_capability, status_of
from harness.strategies import DTYPES, operator_cases
from harness.subjects import resolve_subject
from reports.schema import Status

OF_OPERATORS = [check for check in CHECKS if "operators" in check.modes]
SUBJECTS = {name: resolve_subject(name) for name in ("optimized", "reference")}


def subject_for(check):
    """The optimized operators where they offer what is checked, the reference's elsewhere."""
    for name in SUBJECTS:
        if missing_capability(check, frozenset(), "operators", SUBJECTS[name]) is None:
            return SUBJECTS[name]
    raise AssertionError(f"no subject offers what {check.name} needs")


@pytest.mark.parametrize("check", OF_OPERATORS, ids=[check.name for check in OF_OPERATORS])
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_right_operators_raise_no_alarm(check, data, dtype):
    # A check that runs on some named cases only is written for sizes and numbers like theirs.
    case = data.draw(operator_cases(least=6 if check.only_cases else 1))
    if check.only_dtypes and dtype not in check.only_dtypes:
        (dtype,) = check.only_dtypes
    bench = OperatorBench(case, subject_for(check), dtype, torch.device("cpu"))
    try:
        answer = check.run(bench)
    except SubjectError as error:
        raise AssertionError(f"{check.name} on {case.sizes}, {case.family}") from error
    status = status_of(answer.measures, answer.nulls)
    event(str(status))
    shares = [m.used for m in answer.measures if m.used is not None and m.used == m.used and m.used < 1e3]
    if shares:
        target(max(shares), label="share of the budget")
    assert status is not Status.FAILED, (answer.reason, case.sizes, case.family)
