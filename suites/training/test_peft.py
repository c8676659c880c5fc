"""PEFT on both models: LoRA on attention, experts and indexer, saved, loaded, merged, trained and generated with.

In the optimized model linear layers and norms are classes of its own, and experts are computed together: an adapter
must find the first, and change the second.

Letters: L tokens.
"""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from reference import DeepseekV32ForCausalLM, compute_indexer_kl_loss
from reference.training import is_indexer
from suites.support import MODELS, SEED, assert_same, both_models, both_modes, build, text, tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.*:FutureWarning"),
    # "all-linear" makes patterns of ranks for names that this model does not have.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]
L = 40
ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
INDEXER = ["indexer.wq_b", "indexer.wk", "indexer.weights_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# What LoRA stands on, and how many tensors it then adds: A and B in 3 layers, of which 2 have experts.
ADAPTERS = {
    "attention": ({"target_modules": ATTENTION}, 2 * 3 * 5),
    "experts": ({"target_modules": [], "target_parameters": EXPERTS}, 2 * 2 * 2),
    "attention and experts": ({"target_modules": ATTENTION, "target_parameters": EXPERTS}, 2 * (15 + 4)),
    "indexer": ({"target_modules": INDEXER}, 2 * 3 * 3),
    # PEFT reads these names, of linear layers in files, as the stacked routed experts, and as nothing else.
    "experts by their names in files": ({"target_modules": ["gate_proj", "up_proj", "down_proj"]}, 2 * 2 * 2),
    "all-linear": ({"target_modules": "all-linear"}, 2 * (3 * 8 + 2 * 3)),
}
every_adapter = pytest.mark.parametrize("on", ADAPTERS)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def adapted(model_class, on, dtype=torch.float64, **overrides):
    """A model with adapters whose B, which starts at 0, is drawn at random: the same draw for both classes."""
    model = get_peft_model(build(model_class, dtype, **overrides), LoraConfig(r=4, lora_dropout=0.0, **ADAPTERS[on][0]))
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return model


def asked(model, **kwargs):
    """Logits, KL and the index scores of the last layer."""
    with torch.no_grad():
        out = model(text(L), output_indexer_kl_loss=True, output_indexer_scores="visible", **kwargs)
    return out.logits, out.indexer_kl_loss, out.indexer_scores[2].masked_fill(out.indexer_scores[2] == -torch.inf, 0)


def assert_same_answers(ours, theirs, atol=1e-10):
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b, atol)


@both_models
@every_adapter
def test_an_adapter_is_found_trains_alone_and_changes_what_is_computed(model_class, on):
    model = adapted(model_class, on)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == ADAPTERS[on][1]
    assert all("lora_" in name for name in trainable)
    plain, changed = asked(build(model_class)), asked(model)
    assert (plain[1] - changed[1]).abs() > 1e-3
    with model.disable_adapter():
        assert_same_answers(asked(model), plain)


@pytest.mark.parametrize("model_class", [MODELS["optimized"]])
@every_adapter
def test_an_adapter_changes_both_models_alike(model_class, on):
    assert_same_answers(asked(adapted(model_class, on)), asked(adapted(DeepseekV32ForCausalLM, on)))


@both_models
def test_a_tape_replays_under_adapters_of_everything(model_class):
    model = adapted(model_class, "all-linear")
    with torch.no_grad():
        tape = model(text(L), output_decisions=True).decisions
    assert_same_answers(asked(model, decisions=tape), asked(model), 0)


@both_models
@every_adapter
@both_modes
def test_saved_loaded_and_merged_adapters_compute_the_same(model_class, on, sparse):
    model = adapted(model_class, on, use_sparse_attention=sparse)
    expected = asked(model)
    model.save_pretrained("adapter")
    loaded = PeftModel.from_pretrained(build(model_class, use_sparse_attention=sparse), "adapter")
    assert_same_answers(asked(loaded), expected, 0)
    merged = model.merge_and_unload()
    assert type(merged) is model_class
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in build(model_class).named_parameters()}
    assert_same_answers(asked(merged), expected)


@both_models
def test_a_merged_model_is_saved_in_the_official_layout(model_class):
    merged = adapted(model_class, "attention and experts", torch.float32).merge_and_unload()
    merged.save_pretrained("merged")
    assert "model.layers.2.mlp.experts.7.up_proj.weight" in load_file("merged/model.safetensors")
    assert_same_answers(asked(model_class.from_pretrained("merged")), asked(merged), 0)


def test_an_adapter_of_which_a_tensor_is_lost_would_be_seen():
    model = adapted(DeepseekV32ForCausalLM, "experts")
    expected = asked(model)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).zero_()
    with pytest.raises(AssertionError):
        assert_same_answers(asked(model), expected)


@both_models
@both_modes
def test_each_loss_reaches_the_adapters_that_are_its_own(model_class, sparse):
    model = adapted(model_class, "all-linear", use_sparse_attention=sparse)
    out = model(text(L), labels=text(L), output_indexer_kl_loss=True)
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for loss, of_indexer in ((out.lm_loss, False), (out.indexer_kl_loss, True)):
        found = torch.autograd.grad(loss, list(adapters.values()), allow_unused=True, retain_graph=True)
        reached = {n for n, g in zip(adapters, found, strict=True) if g is not None}
        assert reached == {n for n in adapters if is_indexer(n) == of_indexer}
        assert all(g.isfinite().all() and g.abs().max() > 0 for g in found if g is not None)


@both_models
def test_warming_up_an_adapter_of_the_indexer_lowers_the_kl(model_class):
    model = adapted(model_class, "indexer", torch.float32, use_sparse_attention=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        out = model(text(L), output_indexer_scores=True, output_indexer_kl_target=True)
        loss = compute_indexer_kl_loss(out.indexer_scores, out.indexer_kl_targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("package", MODELS)
def test_the_names_of_the_guide_match_no_module(package):
    config = LoraConfig(target_modules=["indexer.q_b_proj", "indexer.k_proj", "indexer.weight_proj"])
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(build(MODELS[package]), config)


def test_lora_on_the_published_models_indexer_has_a_ninth_of_its_parameters():
    with torch.device("meta"):
        model = DeepseekV32ForCausalLM(tiny().preset("v32", num_hidden_layers=1))
    indexer = sum(p.numel() for n, p in model.named_parameters() if is_indexer(n))
    adapter = get_peft_model(model, LoraConfig(r=64, target_modules=INDEXER))
    trainable = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    assert 61 * indexer == 851_524_864
    # Of wq_b 1536 → 8192, wk 7168 → 128 and weights_proj 7168 → 64: r numbers for each input and each output.
    assert trainable == 64 * (1536 + 8192 + 7168 + 128 + 7168 + 64)
    assert 61 * trainable == 94_695_424


@both_models
@pytest.mark.parametrize("on", ["attention and experts", "indexer"])
def test_generating_with_an_adapter_is_generating_with_the_merged_model(model_class, on):
    model = adapted(model_class, on)
    prompt = text(24, batch=2)
    written = model.generate(input_ids=prompt, max_new_tokens=10, do_sample=False)
    without_cache = model.generate(input_ids=prompt, max_new_tokens=10, do_sample=False, use_cache=False)
    with model.disable_adapter():
        plain = model.generate(input_ids=prompt, max_new_tokens=10, do_sample=False)
    merged = model.merge_and_unload().generate(input_ids=prompt, max_new_tokens=10, do_sample=False)
    assert written.tolist() == merged.tolist() == without_cache.tolist()
    assert written.shape[1] > 30
    assert written.tolist() != plain.tolist()


@both_models
@pytest.mark.parametrize("on", ["attention and experts", "indexer", "all-linear"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_gives_adapters_equal_gradients(model_class, on, reentrant):
    recorded = []
    for kwargs in (None, {"use_reentrant": reentrant}):
        model = adapted(model_class, on).train()
        if kwargs:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
            model.enable_input_require_grads()
        out = model(text(L), labels=text(L), output_indexer_kl_loss=True)
        (out.lm_loss + out.indexer_kl_loss).backward()
        recorded.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in recorded[0].items():
        assert_same(recorded[1][name], gradient, 1e-13)


@both_models
@pytest.mark.parametrize("on", ["attention and experts", "indexer"])
def test_a_bf16_model_takes_adapters_in_fp32(model_class, on):
    model = adapted(model_class, on, torch.bfloat16)
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in adapters.values()} == {torch.float32}
    out = model(text(L), labels=text(L), output_indexer_kl_loss=True)
    assert out.logits.dtype == torch.bfloat16
    (out.lm_loss + out.indexer_kl_loss).backward()
    assert [n for n, p in adapters.items() if not p.grad.isfinite().all() or p.grad.abs().max() == 0] == []


def trained(model, steps, batch, accumulate, resume=None, **settings):
    """The losses of the stock Trainer on rows that are padded unequally."""
    rows = []
    for i, ids in enumerate(text(L, SEED, steps * batch * accumulate)):
        mask = (torch.arange(L) < L - 7 * (i % 4)).long()
        rows.append({
            "input_ids": ids.masked_fill(mask == 0, 258), "attention_mask": mask,
            "labels": ids.masked_fill(mask == 0, -100),
        })  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(Path.cwd() / "out"), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        max_steps=steps, learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=SEED,
        **{"save_strategy": "no", **settings},
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# SFT of the model with its indexer left alone, and the warm-up of the indexer.
TUNED = {"attention and experts": {}, "indexer": {"use_sparse_attention": False, "indexer_kl_coef": 0.5}}


@both_models
@pytest.mark.parametrize("on", TUNED)
def test_the_stock_trainer_accumulates_for_adapters(model_class, on):
    whole, parts = (adapted(model_class, on, **TUNED[on]) for _ in range(2))
    of_whole = trained(whole, 1, 4, 1, optim="sgd", max_grad_norm=0.0)
    of_parts = trained(parts, 1, 1, 4, optim="sgd", max_grad_norm=0.0)
    assert of_parts == pytest.approx(of_whole, rel=1e-6)
    start = dict(adapted(model_class, on, **TUNED[on]).named_parameters())
    for (name, ours), theirs in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert_same(ours, theirs, 1e-12)
        assert ours.equal(start[name]) != ours.requires_grad


@both_models
@pytest.mark.parametrize("on", TUNED)
def test_the_stock_trainer_resumes_adapters(model_class, on):
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = adapted(model_class, on, torch.float32, **TUNED[on])
    losses = trained(whole, 4, 2, 1, **saving)
    assert not list(Path("out/checkpoint-2").glob("model*.safetensors"))
    other = get_peft_model(
        build(model_class, torch.float32, **TUNED[on]), LoraConfig(r=4, lora_dropout=0.0, **ADAPTERS[on][0])
    )
    again = trained(other, 4, 2, 1, resume="out/checkpoint-2", **saving)
    assert again == losses
    assert all(a.equal(b) for a, b in zip(whole.parameters(), other.parameters(), strict=True))
