"""Properties of drawn models on drawn arrangements of documents: padded, packed, far off, in chunks.

Whatever the arrangement, each document is what it is alone. The reference judges itself, in fp32: budgets are made of
its own errors in the same experiment, and the optimized model must keep within them.

Letters: B batch, L rows.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from harness.cases import build_case, calibrated_state
from harness.checks import CHECKS, SubjectError
from harness.checks.base import Bench, Oracle
from harness.model_strategies import Arrangement, arrangements
from harness.probes.model_budgets import FLIPS
from harness.probes.model_isolation import untouched
from harness.probes.model_sides import (
    Notes,
    Side,
    feed,
    joined,
    only_experts,
    other_tokens,
    padded,
    probe,
    stacked,
    with_ids,
)
from harness.strategies import SEEDS, model_configs
from harness.subjects import Subject, resolve_subject
from reference import DeepseekV32Config

CPU = torch.device("cpu")
# An example costs 0.1 to 0.5 s.
FEW, FEWER = (settings(max_examples=max(settings().max_examples // n, 1)) for n in (2, 10))


def bench_of(config: DeepseekV32Config, seed: int, subject: Subject | None = None) -> Bench:
    """The bench of a drawn model, the optimized one unless another is given; the probes bring cases of their own."""
    case, subject = build_case("text", config, seed=seed, length=8), subject or resolve_subject("optimized")
    return Bench(Oracle(case, calibrated_state(config, seed), CPU), subject, torch.float32)


def assert_right(bench: Bench, experiment, *, flips: int = 0) -> None:
    """Every measure is within its budget; of few rows, `flips` may choose otherwise in a near tie."""
    answer = probe("drawn", experiment).run(bench)
    for measure in answer.measures:
        if measure.name == "rows that choose otherwise":
            assert measure.value <= max(FLIPS, flips), answer.reason
        else:
            assert measure.within, answer.reason


def tape_of(drawn: Arrangement, alone):
    """The tapes of the documents alone, put where the documents stand."""
    rows = []
    for b, row in enumerate(drawn.rows):
        parts = [padded(seen.decisions, d.pads, 0) for d, seen in zip(row, alone[b], strict=True)]
        end = drawn.length - sum(d.pads + d.length for d in row)
        rows.append(padded(joined(parts), 0, end))
    return stacked(rows)


def seen_alone(side: Side, model, drawn: Arrangement, config):
    return [
        [side.see(model, replace(drawn.alone(b, i), config=config), kl=True) for i in range(len(row))]
        for b, row in enumerate(drawn.rows)
    ]


def documents_are_themselves(drawn: Arrangement, sparse: bool, side: Side, notes: Notes) -> None:
    """Logits, losses and choices of each document, in its place and through a cache, are those of the document alone."""
    fields = {"index_topk": drawn.config.index_topk, "use_sparse_attention": sparse}
    config, model = side.config_of(**fields), side.model(**fields)
    alone = seen_alone(side, model, drawn, config)
    lone = [seen for row in alone for seen in row]
    case, tape, rows_BL = replace(drawn.case(), config=config), tape_of(drawn, alone), drawn.document_BL() >= 0
    expected_NW = torch.cat([seen.logits[0] for seen in lone])
    together = side.see(model, case, tape=tape, kl=True)
    through, _ = feed(side, model, case, drawn.chunks, tape=tape, kl=True)
    lengths = [d.length for row in drawn.rows for d in row]
    kl = torch.stack([seen.kl_loss * n for seen, n in zip(lone, lengths, strict=True)]).sum() / sum(lengths)
    for name, seen in (("together", together), ("in chunks", through)):
        notes.same(name, seen.logits[rows_BL], expected_NW, side.positions, gain=False)
        notes.few_flips(name, seen.decisions, tape, rows_BL)
        # Where every row sees one key the KL is 0, and its rounding is all there is.
        notes.same(f"{name}, kl", 1 + seen.kl_loss[None], 1 + kl[None], side.positions)
    targets = [n - 1 for n in lengths]
    if sum(targets):
        lm = torch.stack([seen.lm_loss * n for seen, n in zip(lone, targets, strict=True)]).sum() / sum(targets)
        notes.same("together, lm", together.lm_loss[None], lm[None], side.losses)


@given(drawn=arrangements(), sparse=st.booleans())
@FEW
def test_a_document_is_what_it_is_alone(drawn, sparse):
    event(f"{len(drawn.rows)} rows, {'packed' if max(map(len, drawn.rows)) > 1 else 'alone'}")
    event(f"{len(drawn.chunks)} chunks")
    assert_right(bench_of(drawn.config, drawn.seed), partial(documents_are_themselves, drawn, sparse), flips=1)


def documents_do_not_see_each_other(drawn: Arrangement, sparse: bool, which: int, side: Side, notes: Notes) -> None:
    """Other tokens in one document of each row, or in the padding, leave the rest as it was."""
    fields = {"index_topk": drawn.config.index_topk, "use_sparse_attention": sparse}
    case = replace(drawn.case(), config=side.config_of(**fields))
    document_BL = drawn.document_BL()
    inside_BL = document_BL == which
    rest_BL = (document_BL >= 0) & ~inside_BL
    if not (bool(inside_BL.any()) and bool(rest_BL.any())):
        return
    model = side.model(**fields)
    base = side.see(model, case)
    ids = other_tokens(case.input_ids, inside_BL, side.generator())
    seen = side.see(model, with_ids(case, ids), tape=only_experts(base.decisions))
    untouched(notes, f"document {which}", seen, base, rest_BL, inside_BL)


@given(drawn=arrangements(), sparse=st.booleans(), which=st.integers(-1, 2))
@FEW
def test_documents_do_not_see_each_other(drawn, sparse, which):
    assert_right(bench_of(drawn.config, drawn.seed), partial(documents_do_not_see_each_other, drawn, sparse, which))


CHEAP = ("future_tokens", "prefixes", "shift", "tape", "batch", "decode", "checkpointing", "routed_weights", "stages")


@pytest.mark.parametrize("name", CHEAP)
@given(config=model_configs(), seed=SEEDS)
@FEWER
def test_probes_raise_no_alarm_on_drawn_models(name, config, seed):
    """A small model may leave a probe without what it could reject; what must not happen is a failure, or an error."""
    (check,) = [check for check in CHECKS if check.name == f"probes.{name}"]
    try:
        answer = check.run(bench_of(config, seed))
    except SubjectError as error:
        raise AssertionError(str(error)) from error.__cause__
    for measure in answer.measures:
        if measure.name != "rows that choose otherwise":
            assert measure.within, answer.reason
