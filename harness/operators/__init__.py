"""Single operators under test: their cases, their plain definitions, and the bench that holds both."""

# First, and from the package of the checks: these read the benches, so that whoever comes here loads them before.
from ..checks.base import SubjectError
from .bench import OperatorBench
from .cases import OPERATOR_CASES, OperatorCase, build_operator_case

__all__ = ["OPERATOR_CASES", "OperatorBench", "OperatorCase", "SubjectError", "build_operator_case"]
