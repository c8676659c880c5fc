"""The probes of models: right models pass, and each of many wrong ones fails the probe that looks for its fault."""

import functools

import pytest
import torch

from harness.cases import build_case, calibrated_state
from harness.checks import CHECKS, SubjectError
from harness.checks.base import Bench, Oracle
from harness.probes import plug_in
from harness.runner import missing_capability, status_of
from harness.subjects import Subject, resolve_subject
from reference import DeepseekV32Config
from reports.schema import Status
from suites.probes.wrong_training import WRONG

CPU = torch.device("cpu")
CONFIG = DeepseekV32Config.preset("tiny")
SEED = 5
# Those of plugged models are tried on plugged models: suites/meta/test_verify.py, harness/mutants/catalogue/plug_in.py.
PROBES = {
    check.name.removeprefix("probes."): check
    for check in CHECKS
    if check.family == "probes" and "whole" in check.modes and check not in plug_in.CHECKS
}


@functools.cache
def oracle(seed: int = SEED) -> Oracle:
    """The case that the probes take their configuration, weights and seed from; it keeps the reference's own errors."""
    return Oracle(build_case("text", CONFIG, seed=seed, length=48), calibrated_state(CONFIG, seed), CPU)


def judged(subject: Subject, name: str, seed: int = SEED) -> tuple[Status, str]:
    """What a probe says of a subject, and why."""
    try:
        answer = PROBES[name].run(Bench(oracle(seed), subject, torch.float32))
    except SubjectError as error:
        return Status.FAILED, str(error)
    accepted = [f"{null.kind} {null.detail}" for null in answer.nulls if not null.rejected]
    return status_of(answer.measures, answer.nulls), answer.reason or "; ".join(accepted)


@pytest.mark.parametrize("name", list(PROBES))
@pytest.mark.parametrize("subject", ["optimized", "transformers"])
def test_right_models_pass(subject, name):
    held = resolve_subject(subject)
    if (missing := missing_capability(PROBES[name], frozenset(), "whole", held)) is not None:
        pytest.skip(f"{subject} does not declare {missing}")
    status, why = judged(held, name)
    if subject == "transformers" and name in TRANSFORMERS_FAILS:
        assert status is Status.FAILED
        assert TRANSFORMERS_FAILS[name] in why
    else:
        assert status is Status.VERIFIED, why


# Findings 20 and 1 of docs/findings-transformers.md.
TRANSFORMERS_FAILS = {"padding_poison": "left-padded, nan", "decode_packed": "rows that choose otherwise"}


@pytest.mark.parametrize(
    ("name", "probe"),
    [pytest.param(name, probe, id=f"{name}-{probe}") for name, held in WRONG.items() for probe in held.seen_by],
)
def test_wrong_models_fail(name, probe):
    status, why = judged(WRONG[name].subject, probe)
    assert status in (Status.FAILED, Status.VACUOUS), f"{name} passed {probe}"
    assert why


def test_each_probe_has_a_wrong_model():
    assert {probe for held in WRONG.values() for probe in held.seen_by} == set(PROBES)
