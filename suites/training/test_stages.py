"""Who trains in each stage, on which loss: the gradient table of every stage, on whole weights and adapters, on both
models, and what each stage then moves.
"""

import copy

import pytest
import torch

from harness.training.audit import digests, may_train
from harness.training.gradients import expected_gradients, gradient_table, judge_gradients
from harness.training.stages import stage_for
from optimized import DeepseekV32ForCausalLM
from reference import DeepseekV32Config
from reference import DeepseekV32ForCausalLM as ReferenceForCausalLM
from reference.training import (
    LORA_MODULES,
    add_lora,
    freeze_indexer,
    is_indexer,
    lora_parts,
    merge_lora,
    parameter_group,
    set_trainable,
    trainable_report,
    training_loss,
)
from reports.schema import Status
from suites.support import assert_same, both_models, text, tiny
from suites.training.runs import NAMES, adapted, batch_of, model_for, run, short

every_stage = pytest.mark.parametrize("name", [*NAMES, "sft dense"])
full_and_lora = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
PLAIN = ("embedding", "attention", "indexer", "gate", "experts", "FFN, shared experts", "norms", "head")
MODEL = tuple(group for group in PLAIN if group != "indexer")


def stage_of(name, **changes):
    return short("sft", sparse=False, **changes) if name == "sft dense" else short(name, **changes)


def prepared(model_class, stage, lora):
    """The model as `train` would set it up."""
    model = model_for(model_class, lora_in=stage if lora else None, use_sparse_attention=stage.sparse).train()
    model.config.use_sparse_attention = stage.sparse
    if not lora:
        set_trainable(model, stage.trains)
    return model


def cells(table):
    return {row["group"]: {k: v for k, v in row.items() if k != "group"} for row in table["rows"]}


# Written out, not computed: rows of the table that are not "none" in every column.
LM, KL, BOTH = "LM loss", "KL", "what is minimised"
REACHED = {
    "dense": {group: {LM: "finite", BOTH: "finite"} for group in MODEL},
    "warmup": {"indexer": {LM: "none", KL: "finite", BOTH: "finite"}},
    "sparse": {group: {LM: "finite", KL: "none", BOTH: "finite"} for group in MODEL}
    | {"indexer": {LM: "none", KL: "finite", BOTH: "finite"}},
}
REACHED["sft"] = REACHED["sft dense"] = REACHED["dense"]
ADAPTERS = {"dense": ("attention", "experts"), "warmup": ("indexer",), "sparse": ("attention", "experts", "indexer")}
ADAPTERS["sft"] = ADAPTERS["sft dense"] = ADAPTERS["dense"]


def written_out(name, lora):
    """{group: {column: answer}} of the whole table."""
    reached = REACHED[name]
    columns = list(next(iter(reached.values())))
    table = {group: reached.get(group, dict.fromkeys(columns, "none")) for group in PLAIN}
    if not lora:
        return table
    table = {group: dict.fromkeys(columns, "none") for group in PLAIN}
    for group in ADAPTERS[name]:
        # B is 0 before the first step, so that nothing reaches A.
        table[f"{group}, LoRA A"] = {c: "zero" if a == "finite" else a for c, a in reached[group].items()}
        table[f"{group}, LoRA B"] = reached[group]
    return table


@both_models
@every_stage
@full_and_lora
def test_the_gradient_table_of_each_stage(model_class, name, lora):
    stage = stage_of(name)
    model = prepared(model_class, stage, lora)
    found = gradient_table(model, stage, batch_of(stage))
    assert cells(found) == written_out(name, lora)
    assert found == expected_gradients([row["group"] for row in found["rows"]], stage)
    verdict = judge_gradients(model, stage, batch_of(stage))
    assert verdict.status is Status.VERIFIED
    assert len(verdict.nulls) == 4


@pytest.mark.parametrize(
    ("name", "fault", "row", "answer"),
    [
        ("warmup", lambda m: m.requires_grad_(True), "attention", "KL"),
        ("warmup", lambda m: m.requires_grad_(False), "indexer", "KL"),
        ("sparse", freeze_indexer, "indexer", "KL"),
        ("sparse", lambda m: setattr(m.config, "detach_indexer_input", False), "attention", "KL"),
        ("sft", lambda m: m.model.embed_tokens.requires_grad_(False), "embedding", "LM loss"),
    ],
    ids=["nobody frozen", "all frozen", "indexer frozen", "attached", "embedding frozen"],
)
def test_a_wrong_table_is_noticed(name, fault, row, answer):
    stage = stage_of(name)
    model = prepared(ReferenceForCausalLM, stage, lora=False)
    if name == "warmup":
        # So that a path from the KL to the model is there to be taken.
        model.config.detach_indexer_input = False
    fault(model)
    found = gradient_table(model, stage, batch_of(stage))
    assert cells(found)[row][answer] != written_out(name, lora=False)[row][answer]
    verdict = judge_gradients(model, stage, batch_of(stage))
    assert verdict.status is Status.FAILED
    assert "must be" in verdict.reason


def test_one_tensor_of_a_group_apart_from_the_others_is_mixed():
    stage = stage_of("dense")
    model = prepared(DeepseekV32ForCausalLM, stage, lora=False)
    model.model.layers[1].self_attn.o_proj.requires_grad_(False)
    assert cells(gradient_table(model, stage, batch_of(stage)))["attention"] == {LM: "mixed", BOTH: "mixed"}


@both_models
@every_stage
@full_and_lora
def test_each_stage_moves_those_who_train_and_nobody_else(model_class, name, lora):
    stage = stage_of(name, steps=2, **({"bias_rate": 0.0} if lora else {}))
    model = model_for(model_class, lora_in=stage if lora else None)
    before = digests(model)
    trained = run(model, stage, stop_early=False)
    after = digests(model)
    moved = {n for n in before if before[n] != after[n]}
    parameters = [n for n, _ in model.named_parameters()]
    expected = {n for n in parameters if may_train(n, stage.trains, lora)}
    if stage.bias_rate:
        expected |= {n for n in before if n.endswith("e_score_correction_bias")}
    assert moved == expected
    checks = {v.check: v.status for v in trained.verdicts}
    assert checks["train.audit"] is checks["train.gradients"] is checks["train.losses"] is Status.VERIFIED


def test_who_may_train_is_told_by_the_stage():
    indexer, attention = "model.layers.0.self_attn.indexer.wk.weight", "model.layers.0.self_attn.o_proj.weight"
    adapter = "base_model.model.model.layers.0.self_attn.indexer.wk.lora_A.default.weight"
    assert [may_train(indexer, trains, False) for trains in ("model", "indexer", "all")] == [False, True, True]
    assert [may_train(attention, trains, False) for trains in ("model", "indexer", "all")] == [True, False, True]
    assert [may_train(indexer, trains, True) for trains in ("model", "indexer", "all")] == [False, False, False]
    assert [may_train(adapter, trains, True) for trains in ("model", "indexer", "all")] == [False, True, True]


def test_set_trainable_sets_every_flag_and_knows_three_words():
    model = model_for(DeepseekV32ForCausalLM)
    for trains in ("all", "indexer", "model"):
        set_trainable(model, trains)
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        assert flags == {n: trains == "all" or is_indexer(n) == (trains == "indexer") for n in flags}
    with pytest.raises(ValueError, match="trains is 'both'; it must be 'model', 'indexer' or 'all'"):
        set_trainable(model, "both")


@both_models
def test_the_losses_of_the_stages(model_class):
    model = model_for(model_class, torch.float64)
    out = model(text(48), labels=text(48), output_indexer_kl_loss=True)
    assert_same(training_loss(out, "model", 0.0), out.lm_loss, 0)
    assert_same(training_loss(out, "indexer", 0.5), 0.5 * out.indexer_kl_loss, 0)
    assert_same(training_loss(out, "all", 0.5), out.lm_loss + 0.5 * out.indexer_kl_loss, 0)
    with pytest.raises(ValueError, match="out holds no indexer_kl_loss"):
        training_loss(model(text(48), labels=text(48)), "all", 0.5)
    with pytest.raises(ValueError, match="out holds no lm_loss"):
        training_loss(model(text(48), output_indexer_kl_loss=True), "model", 0.0)


@both_models
@pytest.mark.parametrize("name", ["dense", "warmup", "sparse"])
def test_adapters_start_as_nothing_and_merge_into_the_weights(model_class, name):
    stage = stage_for(name, tiny())
    plain = model_for(model_class, torch.float64)
    untouched = copy.deepcopy(plain)
    model = adapted(plain, stage)
    asked = {"output_indexer_scores": "visible"}
    assert_same(model(input_ids=text(48), **asked).logits, untouched(text(48), **asked).logits)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if ".lora_B." in parameter_name:
                parameter.normal_(std=0.1)
    trained = model(input_ids=text(48), **asked)
    merged = merge_lora(model)
    assert isinstance(merged, model_class)
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in untouched.named_parameters()}
    again = merged(text(48), **asked)
    seen = trained.indexer_scores[2].isfinite()
    assert_same(again.logits, trained.logits)
    assert_same(again.indexer_scores[2][seen], trained.indexer_scores[2][seen])
    assert (untouched(text(48), **asked).indexer_scores[2] - again.indexer_scores[2])[seen].abs().max() > 1e-2


def test_a_model_without_adapters_merges_into_itself():
    model = model_for(DeepseekV32ForCausalLM)
    assert merge_lora(model) is model


@pytest.mark.parametrize(
    ("parts", "rank", "said"), [([], 8, "parts is \\[\\]"), (["gate"], 8, "'gate'"), (["indexer"], 0, "rank is 0")]
)
def test_adapters_on_what_has_none_are_refused(parts, rank, said):
    with pytest.raises(ValueError, match=said):
        add_lora(model_for(DeepseekV32ForCausalLM), parts, rank=rank)


def test_adapters_keep_the_dtype_of_the_weights():
    model = add_lora(model_for(DeepseekV32ForCausalLM, torch.bfloat16), LORA_MODULES, rank=2)
    assert {p.dtype for n, p in model.named_parameters() if ".lora_" in n} == {torch.bfloat16}
    model(input_ids=text(48), labels=text(48)).lm_loss.backward()


def test_parts_with_adapters_follow_who_trains():
    assert {trains: lora_parts(trains) for trains in ("model", "indexer", "all")} == {
        "model": ("attention", "experts"), "indexer": ("indexer",), "all": ("attention", "experts", "indexer"),
    }  # fmt: skip


def test_the_report_counts_adapters_with_their_group():
    model = adapted(model_for(DeepseekV32ForCausalLM), stage_for("sparse", tiny()))
    plain = {c.group: c.parameters for c in trainable_report(model_for(DeepseekV32ForCausalLM))}
    found = {c.group: (c.parameters - plain[c.group], c.trainable) for c in trainable_report(model)}
    assert {group for group, (added, _) in found.items() if added} == {"attention", "experts", "indexer"}
    assert all(added == trains for added, trains in found.values())
    assert parameter_group("base_model.model.lm_head.lora_A.default.weight") == "head"


def test_the_indexer_of_v32_has_the_parameters_of_the_specification():
    # Not the 3.66 billion of the guide, which come from a query projection that reads hidden_size.
    with torch.device("meta"):
        model = ReferenceForCausalLM(DeepseekV32Config.preset("v32", num_hidden_layers=4))
    set_trainable(model, "indexer")
    counts = {c.group: (c.parameters, c.trainable) for c in trainable_report(model)}
    assert counts["indexer"] == (4 * 13_959_424,) * 2
    assert 61 * 13_959_424 == 851_524_864
    assert sum(trains for _, trains in counts.values()) == 4 * 13_959_424
