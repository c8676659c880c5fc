"""Both models against transformers' own `deepseek_v32`, with the same weights, on one tape, in fp32.

The yardstick is transformers' own: how far its sdpa and eager attention lie apart on the same case.
"""

import functools

import pytest
import torch

from harness.cases import CASE_NAMES, build_case, calibrated_state
from harness.checks import choices
from harness.checks.base import Bench, Oracle
from harness.observe import observe
from harness.subjects import resolve_subject
from reference import DeepseekV32Config

CPU = torch.device("cpu")
CONFIG = DeepseekV32Config.preset("tiny")
LENGTH = 96


@functools.cache
def oracle(case_name: str) -> Oracle:
    """The fp64 reference on one case, and its tape."""
    case = build_case(case_name, CONFIG, seed=5, length=LENGTH)
    return Oracle(case, calibrated_state(CONFIG, seed=5), CPU)


@functools.cache
def logits(subject_name: str, case_name: str) -> torch.Tensor:
    """The logits of real tokens, on the case's tape."""
    subject = resolve_subject(subject_name)
    held = oracle(case_name)
    module = subject.build(CONFIG, held.state, CPU, torch.float32)
    seen = observe(module, held.case, subject.capabilities, tape=held.tape, gradients=False)
    return seen.logits[held.case.real_BL]


def test_cases_are_past_index_topk_and_under_yarn():
    assert 4 * CONFIG.index_topk < LENGTH
    assert CONFIG.rope["rope_type"] == "yarn"


@pytest.mark.parametrize("model", ["reference", "optimized"])
@pytest.mark.parametrize("case", [name for name in CASE_NAMES if name != "fp8"])
def test_logits_are_as_close_as_upstreams_two_attentions(model, case):
    upstream = logits("transformers", case)
    theirs = float((upstream - logits("transformers-eager", case)).abs().max())
    largest = float(upstream.abs().max())
    assert theirs > 0
    off = float((logits(model, case) - upstream).abs().max())
    assert off <= 4 * theirs
    assert off <= 1e-4 * largest
    assert float((upstream * 1.04 - upstream).abs().max()) > 4 * theirs


@pytest.mark.parametrize("check", [choices.keys, choices.experts])
@pytest.mark.parametrize("model", ["optimized", "transformers"])
@pytest.mark.parametrize("case", [name for name in CASE_NAMES if name != "fp8"])
def test_choices_are_equal_outside_ties(model, case, check):
    answer = check(Bench(oracle(case), resolve_subject(model), torch.float32))
    assert all(measure.within for measure in answer.measures)
    assert all(null.rejected for null in answer.nulls)
    flips = next(m.value for m in answer.measures if m.name == "flips within the margin")
    rows = next(m.value for m in answer.measures if m.name == "rows")
    # Ties within fp32 rounding are rare on calibrated weights: the margin excuses next to nothing.
    assert flips <= 0.01 * rows


def test_a_case_without_its_positions_is_noticed():
    """The comparison can fail: packed rows, read as one document, are another model."""
    held = oracle("packed")
    unpacked = oracle("text")
    assert held.case.position_ids is not None
    model = resolve_subject("reference").build(CONFIG, held.state, CPU, torch.float32)
    with torch.no_grad():
        wrong = model(input_ids=held.case.input_ids, use_cache=False).logits
    off = float((wrong - logits("transformers", "packed").view_as(wrong)).abs().max())
    assert off > 1e-2
    assert torch.equal(unpacked.case.input_ids, held.case.input_ids)
