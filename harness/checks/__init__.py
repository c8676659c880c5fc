"""The checks, one family a file, in the order in which they run."""

from ..probes import (
    model_choices,
    model_config,
    model_decode,
    model_files,
    model_invariance,
    model_isolation,
    model_positions,
    model_training,
    plug_in,
)
from ..probes import operators as operator_probes
from . import choices, finite, first_layer, operators, parity, stages, training, whole
from .base import Answer, Bench, Check, NotExposed, Oracle, SubjectError

CHECKS: list[Check] = [
    *finite.CHECKS,
    *choices.CHECKS,
    *first_layer.CHECKS,
    *parity.CHECKS,
    *stages.CHECKS,
    *whole.CHECKS,
    *training.CHECKS,
    *operators.CHECKS,
    *model_isolation.CHECKS,
    *model_invariance.CHECKS,
    *model_positions.CHECKS,
    *model_decode.CHECKS,
    *model_choices.CHECKS,
    *model_config.CHECKS,
    *model_files.CHECKS,
    *model_training.CHECKS,
    *plug_in.CHECKS,
    *operator_probes.CHECKS,
]
FAMILIES = tuple(dict.fromkeys(check.family for check in CHECKS))

__all__ = ["CHECKS", "FAMILIES", "Answer", "Bench", "Check", "NotExposed", "Oracle", "SubjectError"]
