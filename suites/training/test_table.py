"""Evaluation under a selection, and the table: each number moves when what it stands for is broken.

Letters: B rows, L tokens, S key slots.
"""

from dataclasses import replace

import pytest
import torch

from harness.training.data import held_out
from harness.training.evaluate import (
    SELECTIONS,
    Answers,
    Evaluation,
    Mass,
    answer,
    evaluate,
    judge_ranking,
    observe,
    ranking,
    tape,
    untrained,
)
from harness.training.faults import FAULTS, fault_called, faulty
from harness.training.stages import stage_for
from harness.training.table import (
    LONGER,
    RECIPE,
    SERVED,
    Line,
    Table,
    as_dense,
    measurements,
    measures,
    notices,
    table,
    verdicts,
)  # fmt: skip
from optimized import DeepseekV32ForCausalLM
from reference.training import is_indexer
from reports.schema import Status
from suites.support import assert_same, both_models, build, text, tiny

L, K = 48, 16
CODES = [fault.name for fault in FAULTS]


def model(model_class=DeepseekV32ForCausalLM):
    return build(model_class, torch.float32)


def rows(task="text", count=2):
    return held_out(tiny(), task, seed=0, length=L, count=count)


def quick(found_in, selections=SELECTIONS, **kwargs):
    found = evaluate(found_in, selections, **{"length": L, "count": 2, **kwargs})
    return dict(zip(selections, found, strict=True))


@both_models
def test_selections_are_what_they_are_called(model_class):
    data = observe(model(model_class), rows())
    chosen = {name: tape(ranking(name, data, 0), K) for name in ("best", "recent", "random", "indexer")}
    for row in (0, 5, K, L - 1):
        window = list(range(max(0, row - K + 1), row + 1))
        for layer in chosen["recent"]:
            assert [s for s in layer.topk_indices[0, row].tolist() if s >= 0] == window
    for layer, mass_BLS in zip(chosen["best"], data.mass_BLS, strict=True):
        kept = mass_BLS.gather(-1, layer.topk_indices.clamp_min(0).long())[:, K:].sum(-1)
        assert_same(kept, mass_BLS[:, K:].topk(K).values.sum(-1), 1e-6)
    last = {name: [tuple(layer.topk_indices[0, -1].tolist()) for layer in kept] for name, kept in chosen.items()}
    assert all(len(set(column)) == len(column) for column in zip(*last.values(), strict=True))
    assert len(set(last["random"])) == len(last["random"])


@both_models
def test_dense_and_indexer_are_the_model_as_it_is(model_class):
    subject, batch = model(model_class), rows()
    expected = {}
    for sparse in (False, True):
        subject.config.use_sparse_attention = sparse
        with torch.no_grad():
            expected[sparse] = float(subject(batch.input_ids_BL, labels=batch.labels_BL).lm_loss)
        subject.config.use_sparse_attention = True
        assert answer(subject, batch, sparse=sparse).loss == pytest.approx(expected[sparse], rel=1e-6)
    assert abs(expected[True] - expected[False]) > 1e-4


def test_all_keys_replayed_are_dense_attention():
    subject, batch = model(), rows()
    every = [torch.zeros(2, L, L).masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -torch.inf)] * 3
    subject.config.index_topk = L
    assert answer(subject, batch, sparse=True, ranking=every).loss == pytest.approx(
        answer(subject, batch, sparse=False).loss, rel=1e-6
    )


def test_each_selection_has_the_columns_that_it_can_have():
    found = quick(model(), ks=(8,))
    assert [name for name, e in found.items() if e.captured] == ["indexer", "untrained"]
    assert [name for name, e in found.items() if not e.masses] == ["dense"]
    for name, e in found.items():
        assert e.selection == name
        assert set(e.answers) == {"text", "copy", "retrieval"}
        assert [mass.k for mass in e.masses] == ([] if name == "dense" else [8, K])
    assert found["dense"].recall(K) == 1.0
    with pytest.raises(ValueError, match="k is 5; measured are 8, 16"):
        found["best"].recall(5)


def test_a_wrong_selection_lowers_recall_and_the_best_has_all():
    found = quick(model())
    assert found["best"].recall(K) == pytest.approx(1.0, abs=1e-12)
    for name in ("indexer", "untrained", "recent", "random"):
        assert found[name].recall(K) < 0.99
        assert found[name].masses[0].left_out[0] > found["best"].masses[0].left_out[0] + 0.01
    assert found["random"].answers["text"].loss != found["indexer"].answers["text"].loss
    assert found["random"].recall(K) != found["indexer"].recall(K)


def test_an_indexer_that_knows_the_mass_captures_it():
    """Planted scores I = log p are the best there are, and their reverse the worst."""
    data = {"text": observe(model(), rows())}
    log_p = [mass_BLS.log() for mass_BLS in data["text"].mass_BLS]
    kl, captured, masses = judge_ranking({"text": log_p}, data, [K], True)
    assert max(abs(value) for value in kl) < 1e-5
    assert min(captured) > 1 - 1e-4
    assert min(masses[0].recall) == pytest.approx(1.0, abs=1e-12)
    worst = [(-x).masked_fill(x == -torch.inf, -torch.inf) for x in log_p]
    _, captured, masses = judge_ranking({"text": worst}, data, [K], True)
    assert max(captured) < 0
    assert max(masses[0].recall) < 0.9


def test_evaluation_is_repeatable_and_leaves_nothing_behind():
    subject = model().train()
    subject.config.use_sparse_attention, subject.config.indexer_kl_coef = False, 0.5
    before = {name: tensor.clone() for name, tensor in subject.state_dict().items()}
    state = torch.random.get_rng_state()
    first = quick(subject)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert quick(subject) == first
    assert quick(subject, seed=1) != first
    assert subject.training
    assert (subject.config.use_sparse_attention, subject.config.indexer_kl_coef) == (False, 0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.state_dict().items())
    assert all(p.grad is None for p in subject.parameters())


@both_models
def test_an_untrained_indexer_is_new_and_the_rest_is_not(model_class):
    subject = model(model_class)
    twin, other = untrained(subject, 0), untrained(subject, 1)
    for name, tensor in subject.state_dict().items():
        if not is_indexer(name):
            assert torch.equal(twin.state_dict()[name], tensor)
        elif "k_norm" not in name:
            assert not torch.equal(twin.state_dict()[name], tensor)
            assert not torch.equal(twin.state_dict()[name], other.state_dict()[name])
    assert type(twin) is type(subject)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"selections": ("dense", "oldest")}, "selections names 'oldest'; allowed are dense, best, indexer"),
        ({"ks": (48,)}, r"ks and index_topk are \[16, 48\]; each must be 1 or more and below length \(48\)"),
        ({"ks": (0,)}, r"ks and index_topk are \[0, 16\]"),
        ({"length": 31}, "length is 31; it must be 32 or more"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_by_name(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        quick(model(), **{"selections": ("dense",), **change})


@pytest.mark.parametrize("name", CODES)
def test_a_fault_changes_the_indexers_loss_and_nothing_else(name):
    right, ids = model(), text(L)
    ask = {"output_indexer_kl_loss": True, "output_indexer_scores": "visible"}
    right.config.use_sparse_attention = False
    fault = fault_called(name)
    with faulty(right, fault) as twin, torch.no_grad():
        expected, found = right(ids, **ask), twin.eval()(ids, **ask)
        assert_same(found.logits, expected.logits, 1e-4)
        assert abs(float(found.indexer_kl_loss - expected.indexer_kl_loss)) > 1e-3
        pairs = zip(found.indexer_scores, expected.indexer_scores, strict=True)
        off = max(float((a - b).masked_fill(b == -torch.inf, 0).abs().max()) for a, b in pairs)
        assert (off > 1e-3) == fault.own_code
        assert {n: p.shape for n, p in twin.named_parameters()} == {n: p.shape for n, p in right.named_parameters()}


def test_a_fault_trains_the_indexer_to_a_finite_end():
    right, ids = model(), text(L)
    right.config.use_sparse_attention = False
    for fault in FAULTS:
        with faulty(right, fault) as twin:
            twin(ids, output_indexer_kl_loss=True).indexer_kl_loss.backward()
            grads = {n: p.grad for n, p in twin.named_parameters() if is_indexer(n)}
            assert all(g is not None and g.isfinite().all() for g in grads.values())


def test_an_unknown_fault_is_named():
    with pytest.raises(ValueError, match="Unknown fault 'no rope'; available: interleaved RoPE, no ReLU"):
        fault_called("no rope")


def row(selection, *, captured=(), recall=1.0, text_loss=1.0, copied=0.99, found=0.99):
    answers = {
        "text": Answers(text_loss, 0.7, 100),
        "copy": Answers(0.1, copied, 100),
        "retrieval": Answers(0.1, found, 100),
    }
    masses = () if selection == "dense" else (Mass(K, (recall,), (1 - recall,)),)
    return Evaluation(selection, tuple(0.1 for _ in captured), tuple(captured), masses, answers)


GOOD = {
    "dense": row("dense"),
    "indexer": row("indexer", captured=(0.95, 0.9, 0.92), recall=0.98, text_loss=1.005, copied=0.98, found=0.98),
    "untrained": row("untrained", captured=(-0.1,), recall=0.3, text_loss=2.5, copied=0.1, found=0.1),
    "recent": row("recent", recall=0.85, text_loss=1.08, copied=0.2, found=0.4),
    "random": row("random", recall=0.3, text_loss=2.5, copied=0.1, found=0.1),
}


def made(stage="warmup", **changes):
    lines = [Line(0, stage, RECIPE, {**GOOD, **changes}[name]) for name in GOOD]
    return Table(K, (*lines, Line(0, stage, LONGER, changes.get("longer", row("dense")))))


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_a_table_that_reaches_its_targets_is_verified(stage):
    found = verdicts(made(stage))
    assert [v.check for v in found] == ["train.recipe", "train.tasks_need_selection"]
    assert [v.status for v in found] == [Status.VERIFIED] * 2
    assert all(null.rejected for v in found for null in v.nulls)


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"captured": (0.7, 0.95, 0.95)}, "1 − captured, worst layer"),
        ({"captured": (0.89, 0.89, 0.89)}, "1 − captured, mean over layers"),
        ({"recall": 0.94}, "1 − recall at k = 16"),
        ({"copied": 0.96}, "accuracy lost to dense, copy"),
        ({"found": 0.96}, "accuracy lost to dense, retrieval"),
        ({"text_loss": 1.03}, "text loss over dense"),
    ],
)
def test_each_missed_target_fails_by_name(change, missed):
    shown = {"captured": (0.95, 0.9, 0.92), "recall": 0.98, "text_loss": 1.005, "copied": 0.98, "found": 0.98}
    bad = verdicts(made(indexer=row("indexer", **{**shown, **change})))[0]
    assert bad.status is Status.FAILED
    assert missed in bad.reason


def test_text_after_the_sparse_stage_is_held_to_dense_trained_equally_long():
    over = replace(GOOD["indexer"], answers=row("indexer", text_loss=1.015).answers)
    assert verdicts(made("warmup", indexer=over))[0].status is Status.VERIFIED
    assert verdicts(made("sparse", indexer=over))[0].status is Status.FAILED
    assert verdicts(made("sparse", indexer=over, longer=row("dense", text_loss=1.01)))[0].status is Status.VERIFIED


def test_a_table_on_which_ignorance_passes_is_no_proof():
    as_good = replace(GOOD["indexer"], selection="recent", captured=(), kl=())
    assert verdicts(made(recent=as_good))[0].status is Status.VACUOUS
    lucky = row("random", recall=0.3, copied=0.5)
    assert verdicts(made(random=lucky))[1].status is Status.FAILED
    ignorant = row("dense", copied=0.2)
    assert verdicts(made(dense=ignorant))[1].status is Status.VACUOUS


def test_a_fault_is_noticed_by_the_numbers_that_every_seed_misses():
    blind = row("indexer", captured=(0.95,), recall=0.9, copied=0.5)
    half = row("indexer", captured=(0.95,), recall=0.99, copied=0.5)
    first = (*made().lines, Line(0, "warmup", "no ReLU", blind))
    second = (*(replace(line, seed=1) for line in made().lines), Line(1, "warmup", "no ReLU", half))
    told = {m.name: m for m in notices(Table(K, first + second))}
    assert {m.case for m in told.values()} == {"no ReLU"}
    assert [name for name, m in told.items() if m.data["noticed"]] == ["accuracy lost to dense, copy"]
    assert told["accuracy lost to dense, copy"].data["target"] == 0.02
    assert told["accuracy lost to dense, copy"].samples == pytest.approx((0.49, 0.49))
    assert told["1 − recall at k = 16"].samples == pytest.approx((0.1, 0.01))
    only = {m.name: m for m in notices(Table(K, first))}
    assert only["1 − recall at k = 16"].data["noticed"]


def test_where_scores_are_no_indexers_no_kl_is_told():
    assert "1 − captured, mean over layers" not in {m.name for m in measures(GOOD["recent"], GOOD["dense"], K, 0.02)}


def test_measurements_hold_a_sample_a_seed():
    first, second = made(), made(dense=row("dense", text_loss=1.25))
    lines = (*first.lines, *(replace(line, seed=1) for line in second.lines))
    found = {
        (m.name, m.subject, m.case): m.samples
        for m in measurements(Table(K, lines, ((0, "dense", 5.0), (1, "dense", 7.0))))
    }
    assert found["loss, text", RECIPE, "warmup, dense"] == (1.0, 1.25)
    assert found["captured, layer 1", RECIPE, "warmup, indexer"] == (0.9, 0.9)
    assert found["recall at k = 16", RECIPE, "warmup, recent"] == (0.85, 0.85)
    assert found["CPU time", "dense", "training"] == (5.0, 7.0)


def test_a_row_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="The table has no row of seed 4, stage 'warmup', 'recipe', selection 'dense'"):
        made().line(4, "warmup", "dense")


def test_dense_trained_equally_long_differs_in_attention_alone():
    sparse = stage_for("sparse", tiny())
    longer = as_dense(sparse)
    assert (longer.phases, longer.lr, longer.ramp, longer.clip) == (sparse.phases, sparse.lr, sparse.ramp, sparse.clip)
    assert not longer.sparse
    assert longer.trains == "model"


def two_steps(name, config):
    stage = stage_for(name, config)
    return replace(stage, phases=tuple(replace(phase, steps=2, batch_size=2) for phase in stage.phases))


@pytest.mark.slow
def test_the_whole_table_is_made(tmp_path):
    faults = [fault_called("no ReLU"), fault_called("reversed KL")]
    made = table(tiny(), (0,), faults=faults, stages=two_steps, count=2, keep=tmp_path)
    for stage in ("warmup", "sparse"):
        for selection in SELECTIONS:
            assert made.line(0, stage, selection).selection == selection
    assert made.line(0, "sparse", "dense", LONGER)
    codes = {line.code for line in made.lines} - {RECIPE, LONGER}
    # A fault of the loss alone leaves the forward right, so that its own code is no other.
    assert codes == {"no ReLU", "no ReLU" + SERVED, "reversed KL" + SERVED}
    assert {path.name for path in (tmp_path / "seed0").iterdir()} == {"dense", "warmup", "sparse"}
    assert verdicts(made)
    again = DeepseekV32ForCausalLM.from_pretrained(tmp_path / "seed0" / "sparse", dtype=torch.float32)
    found = evaluate(again, ("indexer",), count=2, ks=(8, 32))[0]
    assert found == made.line(0, "sparse", "indexer")
