"""The checks, one family a file, in the order in which they run."""

from . import choices, finite, parity, training, whole
from .base import Answer, Bench, Check, Oracle, SubjectError

CHECKS: list[Check] = [*finite.CHECKS, *choices.CHECKS, *parity.CHECKS, *whole.CHECKS, *training.CHECKS]
FAMILIES = tuple(dict.fromkeys(check.family for check in CHECKS))

__all__ = ["CHECKS", "FAMILIES", "Answer", "Bench", "Check", "Oracle", "SubjectError"]
