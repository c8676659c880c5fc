"""The audit: each way in which a stage could train the wrong tensor is planted, and ends in a sentence that names it."""

from dataclasses import replace

import pytest
import torch

from harness.training import loop
from harness.training.audit import Audit, Seen, digest, digests, judge, named_tensors, violations
from harness.training.gradients import gradient_of
from harness.training.optimizers import build_optimizers
from optimized import DeepseekV32ForCausalLM
from reference.training import set_trainable
from reports.schema import Status
from suites.training.runs import Listening, model_for, run, short

WK = "model.layers.1.self_attn.indexer.wk.weight"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def audited(trained):
    return next(v for v in trained.verdicts if v.check == "train.audit")


def nudging(model, name):
    """A listener that moves a tensor by the smallest amount after the second step."""

    def nudge(values):
        if values["step"] == 1:
            tensor = named_tensors(model)[name].detach().view(-1)
            tensor[0] = torch.nextafter(tensor[0], torch.tensor(torch.inf))

    return Listening(nudge)


@pytest.mark.parametrize(
    ("name", "tensor", "who"),
    [
        ("dense", WK, "all but the indexer trains"),
        ("warmup", O_PROJ, "only the indexer trains"),
        ("warmup", BIAS, "only the indexer trains"),
        ("sft", WK, "all but the indexer trains"),
        ("sparse", BIAS, "everything trains"),
    ],
)
def test_a_tensor_that_moves_by_one_bit_fails_the_run(name, tensor, who):
    model = model_for(DeepseekV32ForCausalLM)
    trained = run(model, short(name, steps=3), listener=nudging(model, tensor), stop_early=False)
    said = f"{tensor} may not move in stage {name}, where {who}, but it is not what it was at the start."
    assert audited(trained).status is Status.FAILED
    assert audited(trained).reason == said
    assert trained.problem == said


def test_the_router_bias_moves_where_the_stage_balances_it_and_only_there():
    assert audited(run(model_for(DeepseekV32ForCausalLM), short("dense", steps=2))).status is Status.VERIFIED
    model = model_for(DeepseekV32ForCausalLM)
    before = digests(model)
    run(model, short("dense", steps=2, bias_rate=0.0))
    assert digests(model)[BIAS] == before[BIAS]


def with_optimizers(monkeypatch, change):
    """Have the loop build optimizers that are changed by `change(optimizers, model)`."""

    def build(model, stage):
        optimizers = build_optimizers(model, stage)
        change(optimizers, model)
        return optimizers

    monkeypatch.setattr(loop, "build_optimizers", build)


def test_an_optimizer_that_holds_a_frozen_tensor_fails_the_run(monkeypatch):
    with_optimizers(
        monkeypatch,
        lambda o, m: o[-1].add_param_group({"params": [named_tensors(m)[O_PROJ]], "name": "rest", "base_lr": 1e-3}),
    )
    trained = run(model_for(DeepseekV32ForCausalLM), short("warmup", steps=2), stop_early=False)
    assert trained.problem == (
        f"{O_PROJ} may not move in stage warmup, where only the indexer trains, but an optimizer holds it."
    )


def test_optimizer_state_for_a_frozen_tensor_fails_the_run(monkeypatch):
    def keep_state(optimizers, model):
        optimizers[-1].state[named_tensors(model)[O_PROJ]] = {"exp_avg": torch.zeros(1)}

    with_optimizers(monkeypatch, keep_state)
    trained = run(model_for(DeepseekV32ForCausalLM), short("warmup", steps=2), stop_early=False)
    assert trained.problem == (
        f"{O_PROJ} may not move in stage warmup, where only the indexer trains, but an optimizer keeps state for it."
    )


def test_a_tensor_that_no_optimizer_holds_fails_the_run(monkeypatch):
    def drop(optimizers, model):
        for group in optimizers[-1].param_groups:
            group["params"] = [p for p in group["params"] if p is not named_tensors(model)[WK]]

    with_optimizers(monkeypatch, drop)
    trained = run(model_for(DeepseekV32ForCausalLM), short("warmup", steps=2), stop_early=False)
    assert (
        trained.problem
        == f"{WK} should train in stage warmup, where only the indexer trains, but no optimizer holds it."
    )


def test_a_frozen_tensor_that_should_train_fails_the_run(monkeypatch):
    def forget(model, trains):
        set_trainable(model, trains)
        named_tensors(model)[WK].requires_grad_(False)

    monkeypatch.setattr(loop, "set_trainable", forget)
    trained = run(model_for(DeepseekV32ForCausalLM), short("warmup", steps=2), stop_early=False)
    assert audited(trained).status is Status.FAILED
    assert audited(trained).reason.startswith(f"{WK} should train in stage warmup")


def test_a_flag_that_was_left_on_fails_the_run(monkeypatch):
    # The KL reaches nothing but the indexer, so that the tensor gets no gradient; the optimizer holds it all the same.
    def forget(model, trains):
        set_trainable(model, trains)
        named_tensors(model)[O_PROJ].requires_grad_(True)

    monkeypatch.setattr(loop, "set_trainable", forget)
    trained = run(model_for(DeepseekV32ForCausalLM), short("warmup", steps=2), stop_early=False)
    assert audited(trained).reason.startswith(f"{O_PROJ} may not move in stage warmup")


RIGHT = {
    "trains": Seen(WK, may_move=True, moved=True, gradient="finite", has_state=True, in_optimizer=True),
    "frozen": Seen(O_PROJ, may_move=False, moved=False, gradient="none", has_state=False, in_optimizer=False),
}


def test_right_evidence_breaks_no_rule():
    assert violations(RIGHT.values(), short("warmup"), 5) == []


@pytest.mark.parametrize(
    ("who", "change", "said"),
    [
        ("frozen", {"moved": True}, "is not what it was at the start"),
        ("frozen", {"gradient": "zero"}, "got a gradient"),
        ("frozen", {"gradient": "finite"}, "got a gradient"),
        ("frozen", {"has_state": True}, "keeps state for it"),
        ("frozen", {"in_optimizer": True}, "holds it"),
        ("trains", {"gradient": "none"}, "got no gradient in any of 5 steps"),
        ("trains", {"gradient": "zero"}, "gradient was 0 in each of 5 steps"),
        ("trains", {"gradient": "not finite"}, "not finite"),
        ("trains", {"in_optimizer": False}, "no optimizer holds it"),
        ("trains", {"moved": False}, "bit for bit what it was"),
    ],
)
def test_each_rule_names_the_tensor(who, change, said):
    (found,) = violations([replace(RIGHT[who], **change)], short("warmup"), 5)
    assert found.startswith(RIGHT[who].name)
    assert said in found


def test_a_step_too_small_for_bf16_is_no_violation():
    assert violations([replace(RIGHT["trains"], moved=False, coarse=True)], short("warmup"), 5) == []


def test_the_verdict_rejects_wrong_evidence_and_shows_the_groups():
    verdict = audited(run(model_for(DeepseekV32ForCausalLM), short("warmup", steps=2), stop_early=False))
    assert verdict.status is Status.VERIFIED
    assert len(verdict.nulls) == 7 and all(null.rejected for null in verdict.nulls)
    rows = {row["group"]: row for row in verdict.data["audit"]["rows"]}
    assert rows["indexer"] == {
        "group": "indexer",
        "tensors": "15",
        "may move": "15",
        "moved": "15",
        "optimizer state": "15",
    }
    assert all(
        row["may move"] == row["moved"] == row["optimizer state"] == "0" for g, row in rows.items() if g != "indexer"
    )


def test_a_check_that_notices_nothing_is_vacuous(monkeypatch):
    monkeypatch.setattr("harness.training.audit.violations", lambda *_: [])
    stage, model = short("warmup"), model_for(DeepseekV32ForCausalLM)
    set_trainable(model, "indexer")
    _, verdict = judge(Audit.begin(model, stage), model, build_optimizers(model, stage))
    assert verdict.status is Status.VACUOUS


def test_a_digest_sees_bytes_dtype_and_shape():
    tensor = torch.arange(6.0)
    flipped = tensor.clone()
    flipped[5] = torch.nextafter(flipped[5], torch.tensor(9.0))
    others = [flipped, tensor.double(), tensor.view(2, 3), -tensor, torch.tensor(0.0), torch.tensor([])]
    assert len({digest(t) for t in (tensor, tensor.clone(), *others)}) == 1 + len(others)
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))
    assert digest(torch.ones(2, dtype=torch.bfloat16)) == digest(torch.ones(4, dtype=torch.bfloat16)[::2])


def test_what_a_gradient_is():
    assert gradient_of(None) == "none"
    assert gradient_of(torch.zeros(3)) == "zero"
    assert gradient_of(torch.tensor([0.0, -1e-30])) == "finite"
    assert gradient_of(torch.tensor([1.0, torch.nan])) == "not finite"
    assert gradient_of(torch.tensor([torch.inf, 0.0])) == "not finite"


def test_every_tensor_of_a_checkpoint_is_audited():
    model = model_for(DeepseekV32ForCausalLM)
    assert set(named_tensors(model)) == set(model.state_dict())
