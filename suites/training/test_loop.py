"""The loop: rates, clipping, curriculum and losses are those of the stage, and a stage that does not work says so."""

import math

import pytest
import torch

from harness.training import loop
from harness.training.loop import train
from harness.training.optimizers import build_optimizers, scale_at
from harness.training.stages import Phase
from harness.training.verdicts import judge_indexer, judge_losses, not_finite, not_working
from optimized import DeepseekV32ForCausalLM
from reference import DeepseekV32ForCausalLM as ReferenceForCausalLM
from reference.training import training_loss
from reports.schema import Status
from suites.support import tiny
from suites.training.runs import Listening, batch_of, losses, mixture, model_for, run, short


def statuses(verdicts):
    return {v.check: v.status for v in verdicts}


@pytest.fixture(scope="module")
def dense():
    """A model from scratch after a short dense stage: little loss, but attention with a structure to learn."""
    torch.manual_seed(0)
    model = DeepseekV32ForCausalLM(tiny())
    trained = train(model, short("dense", steps=60, batch=4, ramp=5), mixture())
    return trained, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def model_after(dense):
    model = DeepseekV32ForCausalLM(tiny())
    model.load_state_dict(dense[1])
    return model


def test_the_dense_stage_lowers_the_loss_and_computes_no_indexer(dense):
    trained, _ = dense
    curve = trained.curve("lm_loss")
    assert trained.problem is None
    assert sum(curve[-5:]) < 0.75 * sum(curve[:5])
    assert trained.curve("kl_loss") == trained.curve("captured") == []
    assert set(statuses(trained.verdicts)) == {"train.gradients", "train.losses", "train.audit"}


def test_the_warm_up_captures_what_attention_reads(dense):
    trained = train(model_after(dense), short("warmup", steps=30, batch=4, ramp=5), mixture(), measure_every=10)
    captured = trained.curve("captured")
    assert trained.problem is None
    assert abs(captured[0]) < 0.05 and captured[-1] > 0.7
    assert trained.curve("recall")[-1] > trained.curve("recall")[0]
    assert trained.curve("kl_loss")[-1] < 0.3 * trained.curve("kl_loss")[0]
    assert set(statuses(trained.verdicts).values()) == {Status.VERIFIED}
    assert [n.kind for v in trained.verdicts[-2:] for n in v.nulls] == [
        "constant scores",
        "reversed scores",
        "constant scores",
    ]


def test_a_warm_up_that_climbs_says_so_and_ends(dense, monkeypatch):
    monkeypatch.setattr(loop, "training_loss", lambda *given: -training_loss(*given))
    monkeypatch.setattr(loop, "PATIENCE", 8)
    trained = train(model_after(dense), short("warmup", steps=30), mixture(), measure_every=4)
    assert trained.problem.startswith(
        "Step 8 of stage warmup: the indexer tells no more than a uniform guess (captured -"
    )
    assert len(trained.steps) == 9
    assert statuses(trained.verdicts)["train.captured"] is Status.FAILED


@pytest.mark.parametrize("patience", [4, 100])
def test_a_stage_that_ends_with_nothing_captured_fails(patience, dense, monkeypatch):
    monkeypatch.setattr(loop, "training_loss", lambda *given: -training_loss(*given))
    monkeypatch.setattr(loop, "PATIENCE", patience)
    trained = train(model_after(dense), short("warmup", steps=6), mixture(), measure_every=3)
    if patience == 4:
        assert trained.problem.startswith("Step 3 of stage warmup: the indexer tells no more than a uniform guess")
        assert statuses(trained.verdicts)["train.losses"] is Status.FAILED
    else:
        assert trained.problem.startswith("train.captured: the indexer tells no more than a uniform guess")
        assert len(trained.steps) == 6


def test_a_selection_that_collapsed_fails(dense):
    model = model_after(dense)
    with torch.no_grad():
        for layer in model.model.layers:
            # All scores 0: the first keys are selected in every row, and the KL is that of a uniform guess.
            layer.self_attn.indexer.weights_proj.weight.zero_()
    captured, selection = judge_indexer(model, short("warmup"), batch_of(short("warmup", batch=8)))
    assert captured.status is selection.status is Status.FAILED
    assert selection.reason.startswith("the indexer tells no more than a uniform guess (captured ")
    values = selection.data["indexer"]
    assert values["captured"] == pytest.approx(0, abs=1e-6)
    assert not_working({**values, "captured": 0.5}).startswith("the selection collapsed: in one layer")


def test_rows_that_choose_nothing_are_not_judged_by_their_choice(dense):
    stage = short("warmup", length=32, steps=2)
    model = model_after(dense)
    model.config.index_topk = 32
    verdicts = judge_indexer(model, stage, batch_of(stage))
    assert verdicts[1].status is Status.SKIPPED
    assert "more than 32 visible keys" in verdicts[1].reason


def test_what_works_and_what_does_not():
    assert not_working({"captured": 0.01}) is None
    assert not_working({"captured": 0.9, "collapse": 0.3}) is None
    for captured in (0.0, 1e-12, -0.1, math.nan):
        assert "uniform guess" in not_working({"captured": captured})
    for collapse in (0.7, math.nan):
        assert "collapsed" in not_working({"captured": 0.9, "collapse": collapse})


@pytest.mark.parametrize(
    ("part", "named", "value"), [("lm_loss", "lm_loss", math.nan), ("indexer_kl_loss", "kl_loss", math.inf)]
)
def test_a_loss_that_is_not_finite_ends_the_stage_before_an_update(part, named, value, monkeypatch):
    model = model_for(DeepseekV32ForCausalLM)
    at_step = {}

    def keep(values):
        at_step[values["step"]] = {n: p.detach().clone() for n, p in model.named_parameters()}

    right = DeepseekV32ForCausalLM.forward

    def spoilt(self, *args, **kwargs):
        out = right(self, *args, **kwargs)
        if len(at_step) == 2 and self.training:
            setattr(out, part, getattr(out, part) * value)
        return out

    monkeypatch.setattr(DeepseekV32ForCausalLM, "forward", spoilt)
    trained = run(model, short("sparse", steps=6), listener=Listening(keep), stop_early=False)
    assert trained.problem == f"Step 2 of stage sparse: {named} is not finite; no update was made."
    assert statuses(trained.verdicts)["train.losses"] is Status.FAILED
    assert all(torch.equal(p, at_step[1][n]) for n, p in model.named_parameters())


def test_each_value_of_a_step_that_is_not_finite_is_named():
    assert not_finite({"lm_loss": 1.0, "kl_loss": None, "gradient_norms": {"head": 1.0}}) is None
    assert not_finite({"lm_loss": 1.0, "gradient_norms": {"head": math.inf}}) == "gradient norm of head"
    assert judge_losses("optimized", short("dense"), [{"lm_loss": math.nan}], 4).status is Status.FAILED
    assert judge_losses("optimized", short("dense"), [{"lm_loss": 1.0}], 4).status is Status.VERIFIED


def test_a_stage_that_did_not_come_to_its_end_fails():
    verdict = judge_losses("optimized", short("dense"), [{"lm_loss": 1.0}], 3, "it was given up")
    assert (verdict.status, verdict.reason) == (Status.FAILED, "it was given up")


def test_rates_follow_the_schedule_of_each_group():
    stage = short("dense", steps=6, ramp=3)
    trained = run(model_for(DeepseekV32ForCausalLM), stage)
    for row in trained.steps:
        factor = scale_at(stage, row["step"])
        expected = {"matrices": stage.lr_matrices, "rest": stage.lr, "router bias": stage.bias_rate}
        assert row["rates"] == {name: rate * factor for name, rate in expected.items()}
    assert trained.steps[0]["rates"]["rest"] < trained.steps[2]["rates"]["rest"]


def test_a_curriculum_is_followed_phase_by_phase():
    shares = {"text": 1.0}
    stage = short("dense", phases=(Phase(2, 32, 3, shares), Phase(2, 48, 2, shares)))
    assert [row["tokens"] for row in run(model_for(DeepseekV32ForCausalLM), stage).steps] == [96, 96, 96, 96]
    lengths = []
    model = model_for(DeepseekV32ForCausalLM)
    model.register_forward_pre_hook(
        lambda m, args, kwargs: lengths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    run(model, stage)
    # The first is of the gradient table.
    assert lengths[1:] == [(3, 32)] * 2 + [(2, 48)] * 2


def test_each_group_is_clipped_by_itself(monkeypatch):
    # Plain descent, so that a step is the clipped gradient.
    def sgd(model, stage):
        return [
            torch.optim.SGD(
                [{"params": group["params"], "name": group["name"], "base_lr": 1.0} for o in build_optimizers(model, stage)
                 for group in o.param_groups], lr=1.0,
            )
        ]  # fmt: skip

    monkeypatch.setattr(loop, "build_optimizers", sgd)
    model = model_for(DeepseekV32ForCausalLM)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    stage = short("sparse", steps=1, clip=1e-2)
    run(model, stage, stop_early=False)
    moved = {n: (p.detach() - before[n]).norm().square() for n, p in model.named_parameters()}
    indexer = sum(v for n, v in moved.items() if ".indexer." in n).sqrt()
    model_side = sum(v for n, v in moved.items() if ".indexer." not in n).sqrt()
    rate = scale_at(stage, 0)
    assert float(indexer) == pytest.approx(1e-2 * rate, rel=1e-3)
    assert float(model_side) == pytest.approx(1e-2 * rate, rel=1e-3)


def test_both_models_train_alike():
    # fp64, four steps: rounding has not yet turned a choice.
    curves = [
        losses(run(model_for(m, torch.float64), short("sparse"), stop_early=False).steps)
        for m in (ReferenceForCausalLM, DeepseekV32ForCausalLM)
    ]
    for (_, lm, kl, _), (_, other_lm, other_kl, _) in zip(*curves, strict=True):
        assert lm == pytest.approx(other_lm, rel=1e-6)
        assert kl == pytest.approx(other_kl, rel=1e-6)


def test_every_step_tells_what_people_watch():
    trained = run(model_for(DeepseekV32ForCausalLM), short("sparse", steps=2), measure_every=2, stop_early=False)
    told = {
        "step",
        "lm_loss",
        "kl_loss",
        "gradient_norms",
        "rates",
        "tokens",
        "tokens_per_second",
        "seconds",
        "rss_mib",
    }
    assert told <= set(trained.steps[0])
    assert {"captured", "uniform_kl", "recall", "left_out", "same", "collapse", "k"} <= set(trained.steps[0])
    assert set(trained.steps[0]["gradient_norms"]) == {
        "embedding", "attention", "indexer", "gate", "experts", "FFN, shared experts", "norms", "head",
    }  # fmt: skip
    assert trained.steps[1]["seconds"] > trained.steps[0]["seconds"] > 0
    assert trained.steps[0]["tokens_per_second"] == pytest.approx(128 / trained.steps[0]["seconds"])


def test_the_loop_weighs_the_losses_itself():
    model = model_for(DeepseekV32ForCausalLM, indexer_kl_coef=3.0)
    run(model, short("dense", steps=1))
    assert model.config.indexer_kl_coef == 0.0
    assert model.config.use_sparse_attention is False


def test_a_model_whose_kl_would_reach_the_model_is_refused():
    model = model_for(DeepseekV32ForCausalLM, detach_indexer_input=False)
    with pytest.raises(ValueError, match="detach_indexer_input is False"):
        run(model, short("sparse"))


def test_a_router_that_would_move_under_adapters_is_refused():
    stage = short("dense")
    with pytest.raises(ValueError, match="bias_rate is 0.001, but the model has adapters"):
        run(model_for(DeepseekV32ForCausalLM, lora_in=stage), stage)


@pytest.mark.parametrize("name", ["save_every", "measure_every"])
def test_intervals_are_at_least_one(name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be 1 or more"):
        run(model_for(DeepseekV32ForCausalLM), short("dense"), **{name: 0})
