"""Stages that cannot be are refused; optimizers hold each parameter once, in the right group, and balance the router."""

import copy
from dataclasses import replace

import pytest
import torch

from harness.training.optimizers import RouterBias, build_optimizers, scale_at, set_rates
from harness.training.stages import STAGES, Phase, Stage, full_length, stage_for
from reference import DeepseekV32Config, DeepseekV32ForCausalLM
from reference.moe import MoE
from reference.training import add_lora, is_indexer, set_trainable
from suites.support import assert_same, both_models, build, text, tiny


def groups_of(optimizers):
    """Names of groups, and the parameters of each."""
    return {group["name"]: group["params"] for optimizer in optimizers for group in optimizer.param_groups}


def named(model, parameters):
    ids = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in ids}


@pytest.mark.parametrize("preset", ["tiny", "mini"])
@pytest.mark.parametrize("name", STAGES)
def test_stages_fit_the_config(name, preset):
    config = DeepseekV32Config.preset(preset)
    stage = stage_for(name, config)
    assert stage.name == name
    assert stage.phases[-1].length == full_length(config) == 8 * config.index_topk
    assert stage.steps == sum(phase.steps for phase in stage.phases)
    shapes = [stage.phase_at(step) for step in range(stage.steps)]
    assert shapes == [phase for phase in stage.phases for _ in range(phase.steps)]
    for step in (-1, stage.steps):
        with pytest.raises(ValueError, match=rf"step is {step}; stage {name} has steps 0 … {stage.steps - 1}"):
            stage.phase_at(step)


@pytest.mark.parametrize("name", STAGES)
def test_stages_fit_few_keys_too(name):
    assert stage_for(name, tiny(index_topk=1)).phases[-1].length == 128


def test_an_unknown_stage_is_named():
    with pytest.raises(ValueError, match="Unknown stage 'warm-up'; available: dense, warmup, sparse, sft"):
        stage_for("warm-up", tiny())


def test_mini_is_small_enough_for_a_repository():
    config = DeepseekV32Config.preset("mini")
    assert config.rope["rope_type"] == "yarn"
    assert config.topk_group < config.n_group
    with torch.device("meta"):
        model = DeepseekV32ForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) * 4 < 8e6


@pytest.mark.parametrize(
    ("stage", "change", "sentence"),
    [
        ("dense", {"name": "pretrain"}, "Stage.name is 'pretrain'; allowed are dense, warmup, sparse, sft"),
        ("dense", {"phases": ()}, "Stage.phases is empty"),
        ("dense", {"trains": "head"}, "Stage.trains is 'head'; allowed are 'model', 'indexer', 'all'"),
        ("dense", {"lr": 0.0}, "Stage.lr is 0.0; it must be a finite number above 0"),
        ("dense", {"lr_matrices": float("inf")}, "Stage.lr_matrices is inf"),
        ("warmup", {"lr_indexer": -1.0}, "Stage.lr_indexer is -1.0"),
        ("dense", {"weight_decay": -0.1}, "Stage.weight_decay is -0.1; it must be a finite number of 0 or more"),
        ("dense", {"bias_rate": float("nan")}, "Stage.bias_rate is nan"),
        ("dense", {"clip": 0.0}, "Stage.clip is 0.0; it must be None or"),
        ("dense", {"betas": (0.9, 1.0)}, "Stage.betas is"),
        ("dense", {"ramp": -1}, "Stage.ramp is -1; it must be an integer of at least 0"),
        ("warmup", {"kl_coef": 0.0}, "Stage.trains is 'indexer' with lr_indexer .* and kl_coef 0.0"),
        ("sparse", {"lr_indexer": None}, "Stage.trains is 'all' with lr_indexer None"),
        ("sft", {"kl_coef": 1.0}, "Stage.trains is 'model' with lr_indexer None and kl_coef 1.0"),
    ],
)
def test_stages_that_cannot_be_are_refused_by_name(stage, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(stage_for(stage, tiny()), **change)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steps": 0}, "Phase.steps is 0; it must be an integer of at least 1"),
        ({"length": 31}, "Phase.length is 31; it must be an integer of at least 32"),
        ({"batch_size": 2.0}, "Phase.batch_size is 2.0; it must be an integer"),
        ({"shares": {"code": 1.0}}, "Phase.shares names 'code'; allowed are text, copy, retrieval, chat"),
        ({"shares": {"text": -1.0}}, r"Phase.shares\['text'\] is -1.0"),
        ({"shares": {}}, "at least one kind needs a share above 0"),
    ],
)
def test_phases_that_cannot_be_are_refused_by_name(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        Phase(**{"steps": 1, "length": 64, "batch_size": 2, "shares": {"text": 1.0}, **change})


@both_models
@pytest.mark.parametrize("name", STAGES)
def test_each_parameter_that_trains_is_in_one_group(model_class, name):
    model, stage = build(model_class, torch.float32), stage_for(name, tiny())
    set_trainable(model, stage.trains)
    optimizers = build_optimizers(model, stage)
    groups = {key: params for key, params in groups_of(optimizers).items() if key != "router bias"}
    held = [p for params in groups.values() for p in params]
    assert len({id(p) for p in held}) == len(held)
    assert named(model, held) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(is_indexer(n) for n in named(model, groups.get("indexer", [])))
    assert ("indexer" in groups) == (stage.trains != "model")
    assert ("matrices" in groups) == (stage.lr_matrices is not None)


@both_models
def test_muon_gets_hidden_matrices_and_nothing_else(model_class):
    model, stage = build(model_class, torch.float32), stage_for("dense", tiny())
    set_trainable(model, "model")
    muon = next(o for o in build_optimizers(model, stage) if isinstance(o, torch.optim.Muon))
    names = named(model, muon.param_groups[0]["params"])
    expected = {
        name for name, p in model.named_parameters()
        if p.dim() == 2 and ".layers." in name and ".gate." not in name and ".indexer." not in name
    }  # fmt: skip
    assert names == expected
    assert not [n for n in names if "experts.gate_up_proj" in n or "embed" in n or "lm_head" in n]


@both_models
def test_adapters_are_trained_by_adamw_and_the_frozen_rest_by_nobody(model_class):
    model, stage = build(model_class, torch.float32), stage_for("sft", tiny())
    adapted = add_lora(model, ("attention",))
    optimizers = build_optimizers(adapted, stage)
    assert [type(o) for o in optimizers] == [torch.optim.AdamW]
    held = named(adapted, groups_of(optimizers)["rest"])
    assert held
    assert all(".lora_" in name for name in held)


@both_models
def test_what_no_rate_is_given_for_is_refused(model_class):
    model = build(model_class, torch.float32)
    with pytest.raises(ValueError, match="stage sft has no lr_indexer, but parameters of the indexer require gradient"):
        build_optimizers(model, stage_for("sft", tiny()))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="model has no parameter that requires gradient"):
        build_optimizers(model, stage_for("dense", tiny()))


def test_rates_grow_hold_and_fall():
    stage = Stage("sft", (Phase(100, 64, 1, {"text": 1.0}),), sparse=True, trains="model", lr=1.0, ramp=10)
    scales = [scale_at(stage, step) for step in range(100)]
    assert scales[:10] == pytest.approx([(step + 1) / 10 for step in range(10)], abs=1e-12)
    assert set(scales[10:81]) == {1.0}
    assert scales[81:] == sorted(scales[81:], reverse=True)
    assert scales[-1] == pytest.approx(0.1, abs=1e-12)


@both_models
def test_rates_are_set_for_every_group(model_class):
    model, stage = build(model_class, torch.float32), stage_for("sparse", tiny())
    optimizers = build_optimizers(model, stage)
    for step in (0, 5, stage.steps - 1, 5):
        set_rates(optimizers, stage, step)
    rates = {g["name"]: g["lr"] / scale_at(stage, 5) for o in optimizers for g in o.param_groups}
    assert rates == pytest.approx({"rest": stage.lr, "indexer": stage.lr_indexer})


@both_models
def test_the_router_bias_moves_against_the_load_of_training_forwards_only(model_class):
    model = build(model_class, torch.float32)
    gates = [block.gate for block in model.modules() if isinstance(block, MoE)]
    before = [gate.e_score_correction_bias.clone() for gate in gates]
    balance = RouterBias(model, 0.5)
    ids = text(40, batch=2)
    model.eval()(ids)
    balance.step()
    assert all(torch.equal(gate.e_score_correction_bias, b) for gate, b in zip(gates, before, strict=True))
    tape = model.train()(ids, output_decisions=True).decisions
    balance.step()
    for gate, old, layer in zip(gates, before, [d for d in tape if d.expert_indices is not None], strict=True):
        load = torch.bincount(layer.expert_indices.flatten(), minlength=8).float()
        assert_same(gate.e_score_correction_bias - old, 0.5 * (load.mean() - load).sign(), 1e-6)
        assert load.std() > 0
    # Loads are forgotten with the step that used them.
    once = [gate.e_score_correction_bias.clone() for gate in gates]
    balance.step()
    assert all(torch.equal(gate.e_score_correction_bias, b) for gate, b in zip(gates, once, strict=True))
    with pytest.raises(ValueError, match="closure is .* leave it out"):
        balance.step(lambda: 0.0)


@both_models
def test_the_router_bias_counts_for_as_long_as_it_lives(model_class):
    model = build(model_class, torch.float32).train()
    twin, blocks = copy.deepcopy(model), [m for m in model.modules() if isinstance(m, MoE)]
    balance = RouterBias(model, 0.5)
    copied = copy.deepcopy(model)
    for other in (twin, copied):
        other(text(40))
    balance.step()
    assert all(not block.gate.e_score_correction_bias.ne(other.gate.e_score_correction_bias).any()
               for block, other in zip(blocks, [m for m in twin.modules() if isinstance(m, MoE)], strict=True))  # fmt: skip
    assert all(block.experts._forward_pre_hooks for block in blocks)
    del balance
    assert not any(block.experts._forward_pre_hooks for block in blocks)


@both_models
def test_balancing_evens_the_load(model_class):
    model = build(model_class, torch.float32).train()
    balance, ids = RouterBias(model, 0.02), text(64, batch=4)

    def spread():
        tape = model(ids, output_decisions=True).decisions
        loads = [
            torch.bincount(d.expert_indices.flatten(), minlength=8).float()
            for d in tape
            if d.expert_indices is not None
        ]
        return max(float(load.max() / load.mean()) for load in loads)

    with torch.no_grad():
        first = spread()
        for _ in range(40):
            balance.step()
            last = spread()
    assert first > 1.5
    assert last < 1.25
