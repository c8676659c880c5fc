"""What a ReLU kink may do to a KL gradient is computed by the reference's own scores, and widens nothing else."""

import pytest
import torch

import reference.attention
from harness import kinks
from harness.cases import build_case, calibrated_state
from harness.checks import Oracle
from harness.metrics import SIDES, Errors, errors
from harness.subjects import resolve_subject
from reference import DeepseekV32Config

SEED = 0
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def oracle():
    config = DeepseekV32Config.preset("tiny")
    case = build_case("text", config, seed=SEED, length=32, batch=1)
    return Oracle(case, calibrated_state(config, SEED), CPU)


def low_reference(oracle):
    return resolve_subject("reference").build(oracle.case.config, oracle.state, CPU, torch.float32)


def thresholds(oracle, value):
    return [value] * len(oracle.tape)


def test_the_scores_with_which_kinks_are_found_are_the_reference_s(oracle):
    shut = kinks.kl_gradients_beyond(oracle.model, oracle.case, oracle.tape, thresholds(oracle, 0.0))
    for name, gradient in oracle.seen.kl_grads.items():
        if gradient is None:
            assert shut[name] is None
        else:
            assert errors(shut[name], gradient).used(Errors(*[1e-9] * 5)) <= 1, name


def test_opening_kinks_lets_more_dot_products_through_than_shutting_them(oracle):
    for dots in kinks.dot_products(oracle.model, oracle.case, oracle.tape):
        margin = 0.01 * float(dots.abs().max())
        assert int((dots > -margin).sum()) > int((dots > 0).sum()) > int((dots > margin).sum())


def test_the_wider_the_margin_the_more_gradient_the_kinks_may_move(oracle):
    def moved(margin):
        beyond = [thresholds(oracle, sign * margin) for sign in (-1, 1)]
        opened, shut = (kinks.kl_gradients_beyond(oracle.model, oracle.case, oracle.tape, x) for x in beyond)
        return sum(float((opened[n] - shut[n]).norm()) for n, g in oracle.seen.kl_grads.items() if g is not None)

    assert 0 <= moved(1e-12) < moved(1e-2) < moved(1.0)


def test_kinks_widen_the_budget_of_every_kl_gradient_and_of_nothing_else(oracle):
    found = kinks.kink_errors(
        lambda: oracle.model, lambda: low_reference(oracle), oracle.case, oracle.tape, oracle.seen.kl_grads
    )
    assert set(found) == {name for name, gradient in oracle.seen.kl_grads.items() if gradient is not None}
    assert all(0 <= getattr(widened, side) < 0.5 for widened in found.values() for side in SIDES)


def test_the_reference_scores_as_before_when_kinks_have_been_looked_at(oracle):
    before = reference.attention.index_scores, reference.DeepseekV32Attention.attend
    with pytest.raises(IndexError):
        kinks.kl_gradients_beyond(oracle.model, oracle.case, oracle.tape, [])
    assert (reference.attention.index_scores, reference.DeepseekV32Attention.attend) == before


def test_kinks_are_looked_for_in_rows_spread_over_a_large_case(oracle, monkeypatch):
    every = kinks.dot_products(oracle.model, oracle.case, oracle.tape)
    monkeypatch.setattr(kinks, "LOOKED_AT", every[0].numel() // 4)
    some = kinks.dot_products(oracle.model, oracle.case, oracle.tape)
    for a, b in zip(every, some, strict=True):
        assert torch.equal(a[:, ::4], b)
