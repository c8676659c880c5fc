"""transformers' stock Trainer on both models: both losses, micro-batches, both stages, and its own save and resume.

Batches are padded unequally, so that a mean of means differs from the mean over the whole accumulated batch.

Letters: L tokens.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from reference import DeepseekV32ForCausalLM, freeze_indexer, train_only_indexer
from reference.model import DeepseekV32PreTrainedModel
from reference.training import is_indexer
from suites.support import SEED, both_models, build, text

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*:FutureWarning")
L = 40
COEF = 0.5
# Of each stage: what its config says, and who trains.
STAGES = {
    "warm-up": ({"use_sparse_attention": False}, train_only_indexer),
    "sparse": ({}, lambda model: None),
    "frozen indexer": ({}, freeze_indexer),
}
both_stages = pytest.mark.parametrize("stage", ["warm-up", "sparse"])


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def staged(model_class, stage, dtype=torch.float64, **overrides):
    """A model as its stage begins, and the same weights for each class."""
    fields, choose_who_trains = STAGES[stage]
    model = build(model_class, dtype, **{"indexer_kl_coef": COEF, **fields, **overrides})
    choose_who_trains(model)
    return model


def rows_of_unequal_length(count):
    """Labelled rows of one width; what stands behind each one's own length is padding."""
    rows = []
    for i, ids in enumerate(text(L, SEED, count)):
        mask = (torch.arange(L) < L - 7 * (i % 4)).long()
        rows.append({
            "input_ids": ids.masked_fill(mask == 0, 258), "attention_mask": mask,
            "labels": ids.masked_fill(mask == 0, -100),
        })  # fmt: skip
    return rows


def trainer_of(model, steps, batch=4, accumulate=1, resume=None, callbacks=(), **settings):
    """The stock Trainer on the CPU after `steps` steps of plain SGD, or what `settings` say."""
    asked = {
        "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "save_strategy": "no", **settings,
    }  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(Path.cwd() / "out"), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        max_steps=steps, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=SEED, **asked,
    )  # fmt: skip
    rows = rows_of_unequal_length(steps * batch * accumulate)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:2], callbacks=[*callbacks])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def together(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def assert_same_weights(a, b):
    for (name, ours), theirs in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12, msg=name)


@both_models
@both_stages
def test_the_loss_that_is_logged_holds_the_kl(model_class, stage):
    with torch.no_grad():
        out = staged(model_class, stage)(**together(rows_of_unequal_length(4)))
    first = logged(trainer_of(staged(model_class, stage), steps=1))[0]
    # Trainer divides both sums by the labels that it counts, which are the targets here: row 0 has no target, and each
    # other real token is one. The KL alone has a row more a sequence.
    rows, targets = 40 + 33 + 26 + 19, 39 + 32 + 25 + 18
    items = targets if Trainer(model=staged(model_class, stage))._loss_shifts_labels else rows
    expected = (out.lm_loss * targets + COEF * out.indexer_kl_loss * rows) / items
    assert first == pytest.approx(float(expected), rel=1e-6)
    assert abs(first - float(out.lm_loss * targets / items)) > 0.05


@both_models
@both_stages
def test_micro_batches_make_the_losses_and_the_steps_of_one_batch(model_class, stage):
    whole, parts = staged(model_class, stage), staged(model_class, stage)
    of_whole = trainer_of(whole, steps=2, batch=4)
    of_parts = trainer_of(parts, steps=2, batch=1, accumulate=4)
    assert logged(of_parts) == pytest.approx(logged(of_whole), rel=1e-6)
    assert_same_weights(parts, whole)
    start = dict(staged(model_class, stage).named_parameters())
    moved = {n for n, p in whole.named_parameters() if not torch.equal(p, start[n])}
    assert moved == ({n for n in start if is_indexer(n)} if stage == "warm-up" else set(start))


@both_stages
def test_means_of_micro_batches_would_be_seen(stage, monkeypatch):
    # The model as one that takes no num_items_in_batch: Trainer then averages the means of the micro-batches.
    monkeypatch.setattr(DeepseekV32ForCausalLM, "accepts_loss_kwargs", False)
    whole, parts = (staged(DeepseekV32ForCausalLM, stage) for _ in range(2))
    trainer_of(whole, steps=1, batch=4)
    trainer_of(parts, steps=1, batch=1, accumulate=4)
    with pytest.raises(AssertionError):
        assert_same_weights(parts, whole)


@both_models
def test_a_frozen_indexer_stays_while_the_rest_trains(model_class):
    model = staged(model_class, "frozen indexer", indexer_kl_coef=0.0)
    trainer_of(model, steps=1)
    start = dict(staged(model_class, "frozen indexer").named_parameters())
    still = {n for n, p in model.named_parameters() if torch.equal(p, start[n])}
    assert still == {n for n in start if is_indexer(n)}


@both_models
@both_stages
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_by_the_trainer_makes_the_same_steps(model_class, stage, reentrant):
    plain, checkpointed = staged(model_class, stage), staged(model_class, stage)
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    if reentrant and stage == "warm-up":
        # Reentrant checkpointing ends at an input that wants no gradient, as that of a frozen embedding.
        checkpointed.enable_input_require_grads()
    passes = []
    checkpointed.model.layers[1].self_attn.register_forward_hook(lambda *call: passes.append(call))
    of_plain = trainer_of(plain, steps=2)
    of_checkpointed = trainer_of(checkpointed, steps=2, **settings)
    assert logged(of_checkpointed) == pytest.approx(logged(of_plain), rel=1e-6)
    assert_same_weights(checkpointed, plain)
    assert len(passes) == 4


@both_models
@both_stages
def test_the_trainer_evaluates_what_it_trains(model_class, stage):
    trainer = trainer_of(staged(model_class, stage), steps=1)
    with torch.no_grad():
        out = trainer.model.eval()(**together(rows_of_unequal_length(2)))
    rows, targets = 40 + 33, 39 + 32
    sums = float(out.lm_loss * targets + COEF * out.indexer_kl_loss * rows)
    # Trainers before 5.20 leave the division of an evaluation to the model.
    expected = [sums / targets, float(out.loss)]
    assert any(trainer.evaluate()["eval_loss"] == pytest.approx(value, rel=1e-6) for value in expected)


@both_models
def test_the_trainer_predicts_with_logits_alone(model_class):
    trainer = trainer_of(staged(model_class, "sparse"), steps=1)
    rows = rows_of_unequal_length(2)
    found = trainer.predict(rows)
    with torch.no_grad():
        expected = trainer.model(**together(rows)).logits
    assert found.predictions.shape == (2, L, 320)
    assert abs(torch.from_numpy(found.predictions) - expected).max() < 1e-10


@both_models
@both_stages
def test_bf16_of_the_trainer_is_autocast(model_class, stage):
    model = staged(model_class, stage, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = staged(model_class, stage, torch.float32).train()(**together(rows_of_unequal_length(4)[:1]))
    rows, targets = 40, 39
    trainer = trainer_of(model, steps=1, batch=1, bf16=True)
    items = targets if trainer._loss_shifts_labels else rows
    expected = (out.lm_loss * targets + COEF * out.indexer_kl_loss * rows) / items
    assert logged(trainer)[0] == pytest.approx(float(expected), rel=1e-6)
    plain = logged(trainer_of(staged(model_class, stage, torch.float32), steps=1, batch=1))[0]
    assert logged(trainer)[0] != pytest.approx(plain, rel=1e-6)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class ShardedSaves(TrainerCallback):
    """Splits what Trainer has just saved into shards, as a large model's checkpoint is."""

    def on_save(self, args, state, control, model=None, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="300KB")


SAVING = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2,
          "lr_scheduler_type": "linear", "max_grad_norm": 1.0}  # fmt: skip


def drawn_anew(model):
    """The model as another process builds it: with weights of its own, of which a checkpoint must leave none."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model


def stopped_and_resumed(model_class, stage, callbacks=()):
    """A run of 4 steps, and one that takes up its checkpoint of step 2 with other weights: each model and its losses."""
    whole, resumed = staged(model_class, stage, torch.float32), drawn_anew(staged(model_class, stage, torch.float32))
    losses = logged(trainer_of(whole, steps=4, callbacks=callbacks, **SAVING))
    again = logged(trainer_of(resumed, steps=4, resume="out/checkpoint-2", **SAVING))
    return (whole, losses), (resumed, again)


def unequal(a, b):
    return [
        name
        for (name, ours), theirs in zip(a.named_parameters(), b.parameters(), strict=True)
        if not ours.equal(theirs)
    ]


@both_models
@both_stages
def test_a_resumed_run_has_the_losses_and_weights_of_one_that_never_stopped(model_class, stage):
    (whole, losses), (resumed, again) = stopped_and_resumed(model_class, stage)
    assert again == losses
    assert unequal(whole, resumed) == []


@both_models
def test_a_run_resumes_from_shards(model_class):
    (whole, losses), (resumed, again) = stopped_and_resumed(model_class, "sparse", [ShardedSaves()])
    # One of them ends within the experts of a layer.
    index = json.loads(Path("out/checkpoint-2/model.safetensors.index.json").read_text())["weight_map"]
    holding = [
        {f for n, f in index.items() if f".{i}.mlp.experts." in n and n.endswith("_proj.weight")} for i in (1, 2)
    ]
    assert max(map(len, holding)) > 1
    assert again == losses
    assert unequal(whole, resumed) == []


def test_experts_that_resuming_leaves_out_would_be_seen(monkeypatch):
    # What torch's own method makes of official names: it leaves stacked experts as they are, and says so in a warning.
    monkeypatch.setattr(DeepseekV32PreTrainedModel, "load_state_dict", nn.Module.load_state_dict)
    (whole, losses), (resumed, again) = stopped_and_resumed(DeepseekV32ForCausalLM, "warm-up")
    assert again[:2] == losses[:2]
    assert again[2:] != losses[2:]
    assert {n.rpartition(".")[0] for n in unequal(whole, resumed)} > {f"model.layers.{i}.mlp.experts" for i in (1, 2)}


@both_models
def test_the_best_model_is_loaded_at_the_end(model_class):
    model = staged(model_class, "sparse", torch.float32)
    trainer = trainer_of(
        model, steps=4, **SAVING, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    best = model_class.from_pretrained(trainer.state.best_model_checkpoint)
    assert unequal(model, best) == []


def official(model):
    """A model's `state_dict` with the experts one by one, as its files hold them."""
    model.save_pretrained("official")
    return load_file("official/model.safetensors")


@both_models
def test_a_state_dict_in_official_names_is_loaded(model_class):
    model = build(model_class, torch.float32)
    other = drawn_anew(build(model_class, torch.float32))
    assert str(other.load_state_dict(official(model))) == "<All keys matched successfully>"
    assert unequal(other, model) == []


@both_models
def test_a_shard_changes_no_expert_that_it_lacks(model_class):
    model, other = build(model_class, torch.float32), drawn_anew(build(model_class, torch.float32))
    before = other.model.layers[2].mlp.experts.gate_up_proj.detach().clone()
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    found = other.load_state_dict({name: official(model)[name]}, strict=False)
    after = other.model.layers[2].mlp.experts.gate_up_proj
    ours = model.model.layers[2].mlp.experts.gate_up_proj
    assert torch.equal(after[5, 32:], ours[5, 32:])
    assert torch.equal(after[5, :32], before[5, :32])
    assert torch.equal(after[[0, 1, 2, 3, 4, 6, 7]], before[[0, 1, 2, 3, 4, 6, 7]])
    assert found.unexpected_keys == []
    assert "model.layers.2.mlp.experts.down_proj" in found.missing_keys


def test_a_strict_loading_refuses_experts_that_are_missing_unknown_or_wrongly_shaped():
    model = build(DeepseekV32ForCausalLM, torch.float32)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    whole = official(model)
    without = {n: x for n, x in whole.items() if n != name}
    with pytest.raises(RuntimeError, match="Missing key.*model.layers.1.mlp.experts.gate_up_proj"):
        model.load_state_dict(without)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*model.layers.1.mlp.experts.8.up_proj.weight"):
        model.load_state_dict(whole | {name.replace(".3.", ".8."): whole[name]})
    with pytest.raises(RuntimeError, match=rf"load_state_dict: {name} has shape \(1, 64\); it must be \(32, 64\)."):
        model.load_state_dict(whole | {name: whole[name][:1]})


def test_a_state_dict_of_stacked_experts_is_handed_on_as_it_is():
    model = build(DeepseekV32ForCausalLM, torch.float32)
    state = model.state_dict()
    assert model._with_stacked_experts(state, partly=False) is state


@both_models
@pytest.mark.slow
def test_a_compiled_model_makes_the_same_step(model_class):
    plain, compiled = (staged(model_class, "sparse", num_hidden_layers=2) for _ in range(2))
    of_plain = trainer_of(plain, steps=1, batch=2)
    of_compiled = trainer_of(compiled, steps=1, batch=2, torch_compile=True)
    assert isinstance(of_compiled.model_wrapped, torch._dynamo.OptimizedModule)
    assert logged(of_compiled) == pytest.approx(logged(of_plain), rel=1e-6)
    assert_same_weights(compiled, plain)
