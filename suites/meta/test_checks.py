"""The checks themselves: each must be able to fail, and must say so when it cannot.

Letters: B batch, L rows, S key slots, K chosen keys, X experts, T chosen experts.
"""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness import budgets
from harness.cases import build_case
from harness.checks import CHECKS, FAMILIES
from harness.checks.choices import (
    expert_gaps,
    judge_experts,
    judge_keys,
    layout_of,
    relative_topk,
    wrong_selections,
)
from harness.checks.finite import count_not_finite
from harness.checks.parity import judge_tensor
from harness.checks.training import STEPS, apart, fall
from harness.checks.whole import MODES, differences, expected_table
from harness.metrics import SIDES, Errors, errors, null_candidates, rejected
from harness.runner import select_cases, status_of
from reference import DeepseekV32Config
from reference.layout import build_layout
from reference.moe import Gate
from reports.schema import Measure, NullCandidate, Status

CPU = torch.device("cpu")
SEED = 5
NONE = -1
# As wide as any budget of the project: what this accepts, a real budget may accept.
GENEROUS = Errors(*[0.03] * 5)


def random_matrix(rows=200, channels=64, seed=0):
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


GOOD = [NullCandidate("zeros", True)]


@pytest.mark.parametrize(
    ("measures", "nulls", "status"),
    [
        ([Measure("max", 0.5, 1.0)], GOOD, Status.VERIFIED),
        ([Measure("max", 1.0, 1.0)], GOOD, Status.VERIFIED),
        ([Measure("max", 0.0, 0.0)], GOOD, Status.VERIFIED),
        ([Measure("max", 1.1, 1.0)], GOOD, Status.FAILED),
        ([Measure("max", math.nan, 1.0)], GOOD, Status.FAILED),
        ([Measure("max", math.inf, 1.0)], GOOD, Status.FAILED),
        ([Measure("max", 0.5, math.nan)], GOOD, Status.FAILED),
        ([Measure("max", 0.5, 1.0), Measure("row", 2.0, 1.0)], GOOD, Status.FAILED),
        ([Measure("max", 0.5, 1.0), Measure("seen", 99.0)], GOOD, Status.VERIFIED),
        ([Measure("max", 0.5, 1.0)], [], Status.VACUOUS),
        ([Measure("max", 0.5)], GOOD, Status.VACUOUS),
        ([], GOOD, Status.VACUOUS),
        ([], [], Status.VACUOUS),
        ([Measure("max", 0.5, 1.0)], [*GOOD, NullCandidate("4 % gain", False)], Status.VACUOUS),
        ([Measure("max", 1.1, 1.0)], [NullCandidate("zeros", False)], Status.FAILED),
    ],
    ids=[
        "within", "at the budget", "zero on zero", "beyond", "NaN", "infinite", "NaN budget", "one of two beyond",
        "one without budget", "no null", "no budget", "no measure", "nothing", "accepted null", "failed beats vacuous",
    ],
)  # fmt: skip
def test_status_follows_from_measures_and_null_candidates(measures, nulls, status):
    assert status_of(measures, nulls) is status


def test_equal_tensors_have_no_error():
    expected = random_matrix()
    assert errors(expected.clone(), expected) == Errors(0.0, 0.0, 0.0, 0.0, 0.0)


def test_one_bad_row_is_its_own_side():
    expected = random_matrix()
    actual = expected.clone()
    actual[7] *= 0.9
    found = errors(actual, expected)
    assert found.row == pytest.approx(0.1)
    assert max(found.mean, found.gain) < 0.001
    assert found.channel < 0.05


def test_one_dead_channel_is_its_own_side():
    expected = random_matrix()
    actual = expected.clone()
    actual[:, 3] = 0
    found = errors(actual, expected)
    assert found.channel == pytest.approx(1.0)
    assert max(found.mean, found.gain) < 0.03


def test_a_gain_is_seen_exactly_by_every_side():
    expected = random_matrix()
    found = errors(expected * 1.04, expected)
    assert [getattr(found, side) for side in SIDES] == pytest.approx([0.04] * 5)


def test_independent_errors_cancel_in_the_gain_alone():
    expected = random_matrix()
    found = errors(expected + 0.04 * random_matrix(seed=1), expected)
    assert found.gain < 0.002
    assert found.mean == pytest.approx(0.04, rel=0.1)


def test_permuted_rows_are_as_wrong_as_can_be():
    expected = random_matrix()
    found = errors(expected.flip(0), expected)
    assert min(found.max, found.mean, found.row, found.channel, found.gain) > 0.7


def test_a_quiet_row_is_judged_against_a_share_of_the_whole():
    expected = random_matrix()
    expected[7] *= 1e-6
    actual = expected.clone()
    actual[7] *= 2
    assert errors(actual, expected).row < 1e-4


@pytest.mark.parametrize(
    "actual",
    [
        torch.zeros(4, 5),
        torch.zeros(5),
        torch.zeros(1, 5, 4),
        torch.full((5, 4), math.nan),
        torch.full((5, 4), math.inf),
    ],
    ids=["transposed", "flat", "one axis more", "NaN", "infinite"],
)
def test_what_cannot_be_compared_is_infinitely_wrong(actual):
    expected = random_matrix(5, 4)
    assert errors(actual, expected) == Errors(*[math.inf] * 5)
    assert not errors(actual, expected).used(GENEROUS) <= 1


def test_one_entry_that_is_not_finite_is_infinitely_wrong():
    expected = random_matrix()
    actual = expected.clone()
    actual[-1, -1] = math.nan
    assert errors(actual, expected) == Errors(*[math.inf] * 5)


def test_an_expectation_that_is_not_finite_verifies_nothing():
    expected = random_matrix()
    expected[0, 0] = math.nan
    actual = expected.nan_to_num(0.0)
    assert not errors(actual, expected).used(GENEROUS) <= 1


@pytest.mark.parametrize(("value", "error"), [(0.0, 0.0), (1e-30, math.inf)])
def test_where_only_zeros_are_expected_zeros_are_right_and_nothing_else_is(value, error):
    assert errors(torch.full((3, 4), value, dtype=torch.float64), torch.zeros(3, 4)) == Errors(*[error] * 5)


@pytest.mark.parametrize("shape", [(), (1,), (6,), (1, 6), (6, 1), (2, 3, 4)])
def test_errors_take_every_rank(shape):
    expected = torch.arange(1, 1 + math.prod(shape), dtype=torch.float64).reshape(shape)
    found = errors(expected * 1.5, expected)
    assert [getattr(found, side) for side in SIDES] == pytest.approx([0.5] * 5)


@given(scale=st.floats(0.5, 1.5), noise=st.floats(0, 0.1), seed=st.integers(0, 99))
def test_rejected_agrees_with_all_five_errors(scale, noise, seed):
    expected = random_matrix(7, 5, seed)
    actual = expected * scale + noise * random_matrix(7, 5, seed + 100)
    assert rejected(actual, expected, GENEROUS) == (not errors(actual, expected).used(GENEROUS) <= 1)


@pytest.mark.parametrize(("row", "share"), [(3.0, 0.5), (12.0, 2.0), (math.inf, math.inf), (math.nan, math.nan)])
def test_the_share_of_a_budget_is_the_largest_of_the_sides(row, share):
    used = Errors(1.0, 2.0, row, 4.0, 5.0).used(Errors(10.0, 10.0, 6.0, 10.0, 10.0))
    assert used == pytest.approx(share, nan_ok=True)


def test_every_kind_of_null_candidate_is_made_and_rejected():
    expected = random_matrix()
    made = dict(null_candidates(expected))
    assert set(made) == {"zeros", "rows moved", "4 % gain", "dead channel", "stale buffer"}
    assert all(wrong.shape == expected.shape for wrong in made.values())
    assert [kind for kind, wrong in made.items() if not rejected(wrong, expected, GENEROUS)] == []


def test_null_candidates_leave_the_expectation_as_it_was():
    expected = random_matrix()
    before = expected.clone()
    list(null_candidates(expected))
    assert torch.equal(expected, before)


def test_null_candidates_that_would_change_nothing_are_left_out():
    assert {kind for kind, _ in null_candidates(torch.ones(9, 4))} == {"zeros", "4 % gain", "dead channel"}
    assert {kind for kind, _ in null_candidates(torch.ones(1))} == {"zeros", "4 % gain"}
    assert [*null_candidates(torch.zeros(3, 4)), *null_candidates(torch.zeros(0, 4))] == []


@given(rows=st.integers(1, 9), channels=st.integers(1, 9), seed=st.integers(0, 99))
def test_no_null_candidate_equals_what_is_expected(rows, channels, seed):
    expected = random_matrix(rows, channels, seed)
    for kind, wrong in null_candidates(expected):
        assert not torch.equal(wrong, expected), kind


def test_a_dead_channel_is_never_one_that_was_silent():
    expected = random_matrix()
    expected[:, ::2] = 0
    dead = dict(null_candidates(expected))["dead channel"]
    assert not torch.equal(dead, expected)


def test_a_budget_wide_enough_for_a_null_candidate_makes_a_check_vacuous():
    expected = random_matrix()
    measures, nulls = judge_tensor(expected.clone(), expected, Errors(*[0.05] * 5))
    assert status_of(measures, nulls) is Status.VACUOUS
    assert [null.kind for null in nulls if not null.rejected] == ["4 % gain"]


def rows_of(length, batch=1, **kwargs):
    return build_layout(batch, length, CPU, **kwargs)


def spread_scores(length, seed=0):
    """Distinct scores of both signs, a whole number apart."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.stack([torch.randperm(length, generator=generator) for _ in range(length)])
    return (ranks - length // 2).double()[None]


def best(scores, layout, k):
    return relative_topk(scores, layout.visible_BLS(), k, layout)


@pytest.mark.parametrize("k", [1, 2, 7, 8, 9, 16])
@pytest.mark.parametrize("length", [1, 2, 8])
def test_the_exact_selection_is_right_for_fewer_equal_and_more_visible_keys(length, k):
    layout, scores = rows_of(length), spread_scores(length)
    found = judge_keys(best(scores, layout, k), scores, layout, k, margin=0.4)
    assert (found.wrong, found.flips, found.rows) == (0, 0, length)


@pytest.mark.parametrize("shift", [-100.0, 0.0, 100.0], ids=["all negative", "both signs", "all positive"])
def test_judging_keys_does_not_depend_on_the_sign_of_scores(shift):
    layout, scores = rows_of(12), spread_scores(12) + shift
    assert judge_keys(best(scores, layout, 4), scores, layout, 4, 0.4).wrong == 0
    assert judge_keys(best(-scores, layout, 4), scores, layout, 4, 0.4).wrong > 0


def test_ties_at_zero_may_go_either_way():
    layout, scores = rows_of(8), torch.zeros(1, 8, 8, dtype=torch.float64)
    scores[..., 0] = 1.0
    lowest_first = best(scores, layout, 3)
    highest_first = best(scores + torch.arange(8) * 1e-9, layout, 3)
    assert not torch.equal(lowest_first, highest_first)
    assert judge_keys(lowest_first, scores, layout, 3, 1e-6).flips == 0
    found = judge_keys(highest_first, scores, layout, 3, 1e-6)
    assert found.wrong == 0
    assert found.flips > 0


def test_a_key_within_the_margin_is_a_flip_and_beyond_it_is_wrong():
    layout, scores = rows_of(6), spread_scores(6)
    chosen = best(scores, layout, 2)
    # In the last row the best key that was not chosen takes the place of the worst that was: one apart.
    chosen[0, 5] = scores[0, 5].argsort(descending=True)[[0, 2]].sort().values
    assert judge_keys(chosen, scores, layout, 2, margin=1.5).wrong == 0
    assert judge_keys(chosen, scores, layout, 2, margin=1.5).flips == 1
    assert judge_keys(chosen, scores, layout, 2, margin=0.5).wrong > 0


def test_scores_in_a_range_narrower_than_the_margin_still_need_the_right_number_of_keys():
    layout, scores = rows_of(8), spread_scores(8) * 1e-9
    assert judge_keys(best(-scores, layout, 3), scores, layout, 3, margin=1e-3).wrong == 0
    assert judge_keys(best(scores, layout, 2), scores, layout, 3, margin=1e-3).wrong > 0


def test_scores_in_a_range_narrower_than_the_margin_leave_null_candidates_unrejected():
    # This is what makes the check vacuous instead of green.
    layout, scores = rows_of(8), spread_scores(8) * 1e-9
    generator = torch.Generator().manual_seed(0)
    found = {
        kind: judge_keys(candidate, scores, layout, 3, margin=1e-3).wrong
        for kind, candidate in wrong_selections(scores, layout, 3, generator)
    }
    assert found["lowest scores"] == 0
    assert found["k − 1 keys"] > 0


def test_every_wrong_selection_is_rejected_on_spread_scores():
    layout, scores = rows_of(24), spread_scores(24)
    candidates = dict(wrong_selections(scores, layout, 6, torch.Generator().manual_seed(0)))
    assert set(candidates) == {
        "random keys", "most recent keys", "lowest scores", "the next row's scores", "k − 1 keys",
    }  # fmt: skip
    wrong = {kind: judge_keys(candidate, scores, layout, 6, 0.4).wrong for kind, candidate in candidates.items()}
    assert [kind for kind, count in wrong.items() if count == 0] == []


def packed_layout():
    """Two documents of 6 keys."""
    return rows_of(12, position_ids=torch.arange(6).repeat(2)[None])


def last_row(layout, scores, k, keys):
    chosen = best(scores, layout, k)
    chosen[0, -1] = torch.tensor(keys)
    return chosen


@pytest.mark.parametrize(
    ("layout", "keys"),
    [
        (rows_of(8), [0, 1, 99]),
        (rows_of(8), [0, 1, -2]),
        (rows_of(8), [3, 3, 4]),
        (rows_of(8), [3, 4, NONE]),
        (rows_of(8), [NONE, NONE, NONE]),
        (packed_layout(), [-3, 0, 1]),
        (packed_layout(), [0, 1, 6]),
    ],
    ids=["out of range", "below −1", "repeated", "too few", "none", "the document before", "beyond its document"],
)
def test_a_selection_that_cannot_be_is_wrong_even_within_the_margin(layout, keys):
    scores = torch.zeros(1, layout.num_slots, layout.num_slots, dtype=torch.float64)
    assert judge_keys(best(scores, layout, 3), scores, layout, 3, margin=1.0).wrong == 0
    assert judge_keys(last_row(layout, scores, 3, keys), scores, layout, 3, margin=1.0).wrong > 0


def test_a_future_key_is_wrong_even_within_the_margin():
    layout, scores = rows_of(8), torch.zeros(1, 8, 8, dtype=torch.float64)
    chosen = best(scores, layout, 3)
    chosen[0, 4] = torch.tensor([0, 1, 5])
    assert judge_keys(chosen, scores, layout, 3, margin=1.0).wrong > 0


def test_a_row_with_few_keys_must_choose_all_of_them_whatever_the_margin():
    layout, scores = rows_of(8), torch.zeros(1, 8, 8, dtype=torch.float64)
    chosen = best(scores, layout, 4)
    chosen[0, 2] = torch.tensor([0, 2, NONE, NONE])
    assert judge_keys(chosen, scores, layout, 4, margin=1.0).wrong > 0


def test_more_keys_than_asked_for_are_wrong():
    layout, scores = rows_of(8), spread_scores(8)
    assert judge_keys(best(scores, layout, 5), scores, layout, 4, margin=0.4).wrong > 0


def test_the_order_of_the_chosen_keys_does_not_matter():
    layout, scores = rows_of(8), spread_scores(8)
    assert judge_keys(best(scores, layout, 3).flip(-1), scores, layout, 3, margin=0.4).wrong == 0


def padded_layout():
    return rows_of(8, attention_mask=torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]))


def test_pad_rows_are_not_counted():
    layout, scores = padded_layout(), spread_scores(8)
    found = judge_keys(best(scores, layout, 2), scores, layout, 2, margin=0.4)
    assert (found.wrong, found.rows) == (0, 5)


@pytest.mark.parametrize("key", [0, 1])
def test_a_pad_row_that_chooses_a_key_is_wrong(key):
    layout, scores = padded_layout(), spread_scores(8)
    chosen = best(scores, layout, 2)
    chosen[0, 0, 0] = key
    assert judge_keys(chosen, scores, layout, 2, margin=0.4).wrong > 0


@pytest.mark.parametrize("name", select_cases(["all"])[0])
def test_the_exact_selection_is_right_on_every_case(name):
    case = build_case(name, DeepseekV32Config.preset("tiny"), seed=SEED, length=40)
    layout = layout_of(case, CPU)
    scores = random_matrix(80, 40).view(2, 40, 40)
    assert judge_keys(best(scores, layout, 16), scores, layout, 16, 1e-9).wrong == 0
    for kind, candidate in wrong_selections(scores, layout, 16, torch.Generator().manual_seed(0)):
        assert judge_keys(candidate, scores, layout, 16, 1e-9).wrong > 0, kind


GROUPINGS = [(1, 1, 2), (4, 2, 2), (4, 4, 3), (2, 1, 4), (2, 1, 3)]


def gate_of(n_group, topk_group, top):
    config = DeepseekV32Config.preset(
        "tiny", n_group=n_group, topk_group=topk_group, num_experts_per_tok=top, n_routed_experts=8
    )
    return Gate(config)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_scores_that_move_by_less_than_half_the_gap_choose_the_same_experts(grouping):
    gate, scores = gate_of(*grouping), random_matrix(300, 8)
    gaps = expert_gaps(scores, *grouping)
    exact = gate.choose(scores)
    for seed in range(1, 9):
        # The worst moves are at the corners of the box.
        moved = scores + random_matrix(300, 8, seed).sign() * gaps.clamp_max(10.0)[:, None] * 0.499
        assert torch.equal(gate.choose(moved), exact)


# With more than one group kept, the group that changes may hold no chosen expert: the gap is then on the safe side.
@pytest.mark.parametrize("grouping", [(1, 1, 2), (2, 1, 3), (2, 1, 4)])
def test_scores_that_move_by_more_than_half_the_gap_can_choose_others(grouping):
    gate, scores = gate_of(*grouping), random_matrix(300, 8)
    gaps = expert_gaps(scores, *grouping)
    exact = gate.choose(scores)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 8)
    for row in range(20):
        moved = gate.choose(scores[row] + corners * gaps[row] * 0.501)
        assert bool((moved != exact[row]).any())


def test_a_gap_is_infinite_where_every_expert_is_chosen():
    assert bool(torch.isinf(expert_gaps(random_matrix(5, 4), 1, 1, 4)).all())


def test_experts_are_judged_where_the_gap_is_clear():
    exact = torch.tensor([[[0, 1], [0, 1], [0, 1]]])
    chosen = torch.tensor([[[1, 0], [0, 2], [0, 2]]])
    gaps = torch.tensor([[1.0, 0.5, 0.01]])
    real = torch.ones(1, 3, dtype=torch.bool)
    found = judge_experts(chosen, exact, gaps, real, margin=0.1, n_experts=8)
    assert (found.wrong, found.flips, found.rows) == (1, 1, 3)
    real[0, 1] = False
    assert judge_experts(chosen, exact, gaps, real, margin=0.1, n_experts=8).wrong == 0


@pytest.mark.parametrize("experts", [[0, 0], [0, 99], [0, -1]], ids=["repeated", "out of range", "too few"])
def test_experts_that_cannot_be_are_wrong_even_within_the_margin(experts):
    exact, gaps, real = torch.tensor([[[0, 1]]]), torch.tensor([[0.01]]), torch.ones(1, 1, dtype=torch.bool)
    assert judge_experts(torch.tensor([[experts]]), exact, gaps, real, margin=0.1, n_experts=8).wrong > 0


def test_the_expected_gradient_table_agrees_with_itself():
    assert differences(expected_table(), expected_table()) == []


@pytest.mark.parametrize("mode", [mode.name for mode in MODES])
def test_every_wrong_cell_of_the_gradient_table_is_a_difference_that_names_it(mode):
    for group, right in expected_table()[mode].items():
        for value in {"none", "zero", "finite", "NaN", "some layers only"} - {right}:
            found = expected_table()
            found[mode][group] = value
            assert differences(found, expected_table()) == [f"{mode}: {group} gets {value}, must get {right}"]


def test_a_group_that_nobody_expects_is_a_difference():
    found = {"sparse, LM": {**expected_table()["sparse, LM"], "second head": "finite"}}
    assert len(differences(found, expected_table())) == 1


def test_modes_that_a_subject_does_not_declare_are_no_difference():
    assert differences({"sparse, LM": expected_table()["sparse, LM"]}, expected_table()) == []


FALLING = [6.0 - 0.1 * step for step in range(STEPS)]


def test_a_curve_is_not_apart_from_itself():
    assert apart(FALLING, FALLING) == 0


def test_curves_are_apart_by_their_largest_difference():
    other = [*FALLING[:-1], FALLING[-1] + 0.6]
    assert apart(other, FALLING) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "curve", [[*FALLING[:-1], math.nan], FALLING[:-1], [*FALLING[:-1], math.inf]], ids=["NaN", "shorter", "infinite"]
)
def test_a_broken_curve_is_infinitely_far(curve):
    assert apart(curve, FALLING) == math.inf


def test_a_flat_curve_does_not_fall():
    assert fall([5.0] * STEPS) == 0
    assert fall(FALLING) > budgets.LEAST_FALL
    assert fall(FALLING[::-1]) < 0


def test_a_curve_that_ends_in_nan_does_not_pass_as_falling():
    share = Measure("share not fallen", 1 - fall([*FALLING[:-1], math.nan]), 1 - budgets.LEAST_FALL)
    assert not share.within


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_entry_that_is_not_finite_is_counted(value):
    assert count_not_finite([torch.ones(3), torch.tensor([1.0, value])]) == 1


def test_check_names_are_unique_and_begin_with_their_family():
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert all(check.name.split(".")[0] == check.family for check in CHECKS)
    assert set(FAMILIES) == {check.family for check in CHECKS}


TABLE = {
    **{f"{output}, {dtype}": rule for rules in (budgets.RULES, budgets.SCALARS)
       for (output, dtype), rule in rules.items()},
    "sparse is dense": budgets.SPARSE_IS_DENSE,
    "curves": budgets.CURVES,
}  # fmt: skip


@pytest.mark.parametrize("name", list(TABLE))
def test_every_budget_gives_the_measurement_that_justifies_it(name):
    why = TABLE[name].why
    assert len(why) > 30
    assert re.search(r"\d", why)


@pytest.mark.parametrize("rule", [rule for rule in TABLE.values() if isinstance(rule, budgets.Rule)])
def test_no_floor_is_so_high_that_4_percent_pass(rule):
    assert max(getattr(rule.floor, side) for side in SIDES) < 0.02


def test_an_output_or_dtype_without_a_budget_is_refused():
    with pytest.raises(ValueError, match=r"no budget for logits in torch.float16; .* bfloat16, float32"):
        budgets.budget("logits", torch.float16, GENEROUS, 10)
    with pytest.raises(ValueError, match="no budget for speed"):
        budgets.scalar_budget("speed", torch.float32, 0.1)


def test_a_budget_grows_with_the_reference_s_own_error_and_not_below_its_floor():
    floor = budgets.budget("logits", torch.float32, Errors(*[0.0] * 5), 10)
    assert floor == budgets.RULES["logits", torch.float32].floor
    wide = budgets.budget("logits", torch.float32, Errors(*[0.01] * 5), 10)
    assert all(getattr(wide, side) > 0.03 for side in SIDES)


def test_the_luck_of_a_short_vector_is_granted_to_its_gain_alone():
    own = Errors(*[0.01] * 5)
    short, long = (budgets.budget("kl gradients", torch.bfloat16, own, entries) for entries in (4, 1_000_000))
    assert short.gain > long.gain
    assert [getattr(short, side) for side in SIDES[:-1]] == [getattr(long, side) for side in SIDES[:-1]]
